"""The bridge: newest values only, every error in words, one run at a time."""

from __future__ import annotations

import gc
import sys
import threading
import time
import warnings
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch

from napari_unetpp._widgets import _worker
from napari_unetpp._widgets._worker import Outcome, Runner, busy_with, failure_of
from napari_unetpp.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

pytestmark = pytest.mark.usefixtures("qtbot")


class Value:
    def __init__(self, key: object, number: int) -> None:
        self.key = key
        self.number = number


@pytest.fixture
def runner() -> Runner:
    made = Runner()
    made.values = []
    made.ends = []
    made.received.connect(made.values.append)
    made.ended.connect(made.ends.append)
    return made


def test_the_newest_value_of_each_key_arrives_last(runner: Any, wait: Any) -> None:
    def steps() -> Generator[Value, None, str]:
        for n in range(60):
            time.sleep(0.002)
            yield Value(n % 3, n)
        return "done"

    assert runner.start(lambda _: steps(), title="a")
    assert busy_with() == "a"
    wait(lambda: bool(runner.ends))
    assert runner.ends == [Outcome("done")]
    assert busy_with() is None
    assert not runner.busy
    last = {v.key: v.number for v in runner.values}
    assert last == {0: 57, 1: 58, 2: 59}
    assert len(runner.values) < 60  # latest wins


def test_the_run_is_in_another_thread_and_its_values_come_in_this_one(
    runner: Any, wait: Any
) -> None:
    threads = []

    def steps() -> Generator[Value, None, int]:
        yield Value(0, threading.get_ident())
        return threading.get_ident()

    runner.received.connect(lambda v: threads.append((threading.get_ident(), v.number)))
    runner.start(lambda _: steps(), title="a")
    wait(lambda: bool(runner.ends))
    here = threading.get_ident()
    assert threads[0][0] == here
    assert threads[0][1] == runner.ends[0].result != here


def test_stop_is_an_event_that_the_generator_sees(runner: Any, wait: Any) -> None:
    def steps(stop: threading.Event) -> Generator[int, None, str]:
        while not stop.is_set():
            time.sleep(0.005)
            yield 1
        return "stopped"

    runner.start(steps, title="a")
    wait(lambda: bool(runner.values))
    assert not runner.stopping
    runner.stop()
    assert runner.stopping
    wait(lambda: bool(runner.ends))
    assert runner.ends == [Outcome("stopped")]


def _out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


ERRORS: list[tuple[str, Callable[[], BaseException], str]] = [
    ("value", lambda: ValueError("`x` must be 1, got 2."), "`x` must be 1, got 2."),
    ("ours", lambda: TrainingError("The loss is NaN."), "The loss is NaN."),
    ("runtime", lambda: RuntimeError("shapes differ"), "RuntimeError: shapes differ"),
    ("cuda memory", _out_of_memory, "no memory left"),
    (
        "accelerator",
        lambda: torch.AcceleratorError("device-side assert", 710),
        "assert",
    ),
    ("memory", MemoryError, "no memory left"),
    ("disk full", lambda: OSError(28, "No space left on device"), "No space left"),
    ("interrupt", KeyboardInterrupt, "KeyboardInterrupt"),
    ("stop iteration", lambda: StopIteration(3), "StopIteration"),
    ("exit", lambda: SystemExit(3), "SystemExit"),
    ("warning", lambda: UserWarning("odd"), "odd"),
    ("no text", lambda: ValueError(""), "ValueError"),
]


@pytest.mark.parametrize("when", ["before the first value", "after it", "at the start"])
@pytest.mark.parametrize(
    ("make", "says"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_every_error_is_told_in_words_and_the_next_run_works(
    runner: Any, wait: Any, make: Any, says: str, when: str, caplog: Any
) -> None:
    def steps() -> Generator[int, None, None]:
        if when == "after it":
            yield 1
        raise make()
        yield 2

    def start(_: threading.Event) -> Generator[int, None, None]:
        if when == "at the start":
            raise make()
        return steps()

    began = time.monotonic()
    runner.start(start, title="a")
    wait(lambda: bool(runner.ends))
    assert time.monotonic() - began < 5
    (outcome,) = runner.ends
    assert outcome.result is None
    assert says in outcome.failure.message
    # What the user can mend is told in the dock alone.
    assert bool(caplog.records) != outcome.failure.expected
    assert busy_with() is None
    runner.start(lambda _: iter_of("fine"), title="b")
    wait(lambda: len(runner.ends) == 2)
    assert runner.ends[1] == Outcome("fine")


def iter_of(result: object) -> Generator[int, None, object]:
    yield 1
    return result


def test_a_warning_made_an_error_is_told(runner: Any, wait: Any) -> None:
    def steps() -> Generator[int, None, None]:
        yield 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.warn("too few pixels", stacklevel=1)

    runner.start(lambda _: steps(), title="a")
    wait(lambda: bool(runner.ends))
    assert "too few pixels" in runner.ends[0].failure.message


def test_one_run_at_a_time_but_a_short_one_is_waited_for(wait: Any) -> None:
    first, second, third = Runner(), Runner(), Runner()
    ends: list[str] = []
    for name, one in (("first", first), ("second", second), ("third", third)):
        one.ended.connect(lambda _, name=name: ends.append(name))
    go = threading.Event()

    def slow() -> Generator[int, None, None]:
        while not go.is_set():
            time.sleep(0.005)
            yield 1

    assert first.start(lambda _: slow(), title="getting ready", short=True)
    assert second.start(lambda _: iter_of(1), title="training")
    assert second.busy
    assert not second.start(lambda _: iter_of(1), title="training")
    go.set()
    wait(lambda: ends == ["first", "second"])
    go.clear()
    assert first.start(lambda _: slow(), title="long")
    assert not third.start(lambda _: iter_of(1), title="other")
    assert busy_with() == "long"
    go.set()
    wait(lambda: ends == ["first", "second", "first"])


def test_an_abandoned_run_says_nothing_and_frees_the_thread(
    runner: Any, wait: Any
) -> None:
    def steps(stop: threading.Event) -> Generator[int, None, str]:
        while not stop.is_set():
            time.sleep(0.005)
            yield 1
        return "late"

    runner.start(steps, title="a")
    wait(lambda: bool(runner.values))
    n = len(runner.values)
    runner.abandon()
    wait(lambda: busy_with() is None)
    assert (len(runner.values), runner.ends) == (n, [])
    assert runner.start(lambda _: iter_of("next"), title="b")
    wait(lambda: bool(runner.ends))
    assert runner.ends == [Outcome("next")]


@pytest.mark.parametrize("how", ["ended", "abandoned"])
def test_nothing_of_a_run_is_kept_after_it(runner: Any, wait: Any, how: str) -> None:
    class Big:
        pass

    kept: list[weakref.ref[Big]] = []

    def big() -> Big:
        made = Big()
        kept.append(weakref.ref(made))
        return made

    image = big()

    def start(stop: threading.Event, image: Big = image) -> Generator[Any, None, Big]:
        yield image
        yield big()
        while how == "abandoned" and not stop.wait(0.01):
            yield big()
        return big()

    runner.start(start, title="a")
    worker = runner._worker  # napari may keep it
    wait(lambda: len(kept) > 2)
    if how == "abandoned":
        runner.abandon()
    wait(lambda: busy_with() is None and not worker.is_running)
    del start, image
    runner.ends.clear()
    runner.values.clear()

    def gone() -> bool:
        gc.collect()
        return all(ref() is None for ref in kept)

    wait(gone)
    assert worker is not None


def test_what_a_run_changes_for_the_process_is_put_back(runner: Any, wait: Any) -> None:
    gc.unfreeze()  # what conftest.py froze
    inside: dict[str, Any] = {}
    before = sys.getswitchinterval()

    def steps() -> Generator[int, None, None]:
        inside["interval"] = sys.getswitchinterval()
        yield 1
        time.sleep(0.05)
        inside["frozen"] = gc.get_freeze_count()
        yield 2

    runner.start(lambda _: steps(), title="a")
    wait(lambda: bool(runner.ends))
    assert inside["interval"] < before
    assert inside["frozen"] > 1000
    assert sys.getswitchinterval() == pytest.approx(before)
    assert gc.get_freeze_count() == 0


def test_a_failure_keeps_no_exception_alive() -> None:
    failure = failure_of(ValueError("x" * 5000))
    assert len(failure.message) == 1000
    assert not any(isinstance(v, BaseException) for v in vars(failure).values())


def test_getting_ready_tells_the_device_once_and_again_at_once(
    wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_worker, "_warm", {})
    told: list[str] = []
    _worker.get_ready("cpu", told.append)
    wait(lambda: bool(told))
    assert told[0].startswith("CPU, ")
    _worker.get_ready("cpu", told.append)
    assert told[1] == told[0]
