"""The one bridge from a dock to the thread that works: values out, stop in."""

from __future__ import annotations

import gc
import logging
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from napari.qt.threading import create_worker
from qtpy.QtCore import QObject, QTimer, Signal

from napari_unetpp.errors import UnetppError

_log = logging.getLogger("napari_unetpp")
_TICK = 100  # ms between two looks into the box

Make = Callable[[threading.Event], Generator[Any, None, Any]]


@dataclass(frozen=True)
class Failure:
    """What went wrong, as plain text; the exception itself would keep memory alive."""

    message: str
    expected: bool  # one of our own errors, which tells the user what to do


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with a result, with a failure, or with neither (given up)."""

    result: Any = None
    failure: Failure | None = None


def failure_of(error: BaseException) -> Failure:
    """Return an error in words."""
    if isinstance(error.__cause__, StopIteration):  # as a generator passes it on
        error = error.__cause__
    text = str(error).strip()[:1000]
    if isinstance(error, (UnetppError, ValueError)) and text:
        return Failure(text, expected=True)
    # torch's has no base class of its own, and torch is not imported here.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure(
            "There is no memory left for this. Close other programs, or take a smaller "
            "network or depth, or the CPU.",
            expected=True,
        )
    if isinstance(error, OSError) and error.strerror:
        return Failure(
            f"The disk refused: {error.strerror}. Make room or choose another folder, "
            "then try again.",
            expected=True,
        )
    return Failure(
        f"Unexpected {type(error).__name__}: {text or 'no further text'}. Nothing that "
        "you painted is lost; try again, and report it if it comes back.",
        expected=False,
    )


class _Box:
    """Keeps the newest value of each kind until the GUI thread fetches them all."""

    def __init__(self) -> None:
        self._values: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def put(self, value: Any) -> None:
        key = getattr(value, "key", type(value))
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = value

    def take(self) -> list[Any]:
        with self._lock:
            values, self._values = list(self._values.values()), {}
        return values


class _Run:
    """One run of a generator in the thread; everything it raises becomes a value."""

    def __init__(self, make: Make) -> None:
        self._make: Make | None = make
        self.stop = threading.Event()
        self.box = _Box()
        self.outcome: Outcome | None = None

    def relay(self) -> Generator[None, None, None]:
        """Yield after each value, so that napari can quit here, too."""
        outcome = Outcome()
        try:
            outcome = yield from self._relay()
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001  # the one guard: told, not lost
            failure = failure_of(error)
            if not failure.expected:  # the others are no faults of ours
                _log.error("A run failed:\n%s", traceback.format_exc())
            outcome = Outcome(failure=failure)
        finally:
            self.outcome = outcome

    def forget(self) -> None:
        """Let go of images and models: napari keeps a worker longer than its run."""
        self._make = self.outcome = None
        self.box.take()

    def _relay(self) -> Generator[None, None, Outcome]:
        from napari_unetpp.device import considerate

        frozen, make = False, self._make
        if make is None:
            return Outcome()
        with considerate():
            try:
                steps = make(self.stop)
                del make
                while True:
                    try:
                        value = next(steps)
                    except StopIteration as end:
                        return Outcome(result=end.value)
                    self.box.put(value)
                    if not frozen:
                        # A full pass of the collector over napari's and torch's
                        # objects would stop the window for 300 ms, again and again.
                        gc.freeze()
                        frozen = True
                    yield
            finally:
                if frozen:
                    gc.unfreeze()


class _Titled(partial[Generator[None, None, None]]):
    """What napari's list of tasks shows for a worker is its function's text."""

    def __repr__(self) -> str:
        return str(_active[0].title) if _active else "napari-unetpp"


def _pass_on(relay: Generator[None, None, None]) -> Generator[None, None, None]:
    yield from relay


_active: list[Runner] = []
_queue: list[Callable[[], object]] = []  # what waits for a short run to end


def busy_with() -> str | None:
    """Return the title of the run that has the thread, None when it is free."""
    return _active[0].title if _active else None


def is_busy() -> bool:
    """Whether a run has the thread that others do not wait for."""
    return bool(_active) and not _active[0].short


class Runner(QObject):
    """Runs one generator of the core in a thread and hands on what it yields.

    Signals
    -------
    received : object
        Each value, on the GUI thread, at most 100 ms late. Of values with the same
        ``key`` (or, without one, the same type) only the newest arrives.
    ended : Outcome
        Once per run, after its last value.
    """

    received = Signal(object)
    drained = Signal()  # all that had waited has been handed on
    ended = Signal(object)

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self.title = ""
        self.short = False
        self._run: _Run | None = None
        self._worker: Any = None
        self._timer = QTimer(self)
        self._timer.setInterval(_TICK)
        self._timer.timeout.connect(self._tick)

    @property
    def busy(self) -> bool:
        """Whether a run of this runner has not ended yet."""
        return self._run is not None

    @property
    def stopping(self) -> bool:
        """Whether it has been asked to stop and has not ended yet."""
        return self._run is not None and self._run.stop.is_set()

    def start(self, make: Make, *, title: str, short: bool = False) -> bool:
        """Start a run unless the thread is taken; return whether it has started.

        A run that finds a short one waits for its end, and counts as started.

        Parameters
        ----------
        make : callable
            Called in the thread with an event that asks for the stop; returns the
            generator. It is the place to import what is slow.
        title : str
            What the task is called while it runs.
        short : bool
            Whether others wait for it: it takes a few seconds at most.
        """
        if self.busy or is_busy():
            return False
        self.title, self.short = title, short
        self._run = _Run(make)
        if _active:
            _queue.append(partial(self._begin, self._run))
        else:
            self._begin(self._run)
        return True

    def _begin(self, run: _Run) -> None:
        if run is not self._run:  # given up while it waited
            _next()
            return
        _active.append(self)
        relay = run.relay()
        worker = create_worker(_Titled(_pass_on, relay), _ignore_errors=True)
        worker.warned.connect(_log_warning)
        worker.finished.connect(lambda: self._finish(run, relay))
        self._worker = worker
        self._timer.start()
        worker.start()

    def stop(self) -> None:
        """Ask the run to stop; `ended` follows."""
        if self._run is not None:
            self._run.stop.set()

    def abandon(self) -> None:
        """Stop, and hear no more of it: no value, no end."""
        run, self._run = self._run, None
        self._timer.stop()
        if run is not None:
            run.stop.set()
            if self._worker is not None:
                self._worker.quit()

    def _tick(self) -> None:
        run = self._run
        if run is None:
            return
        over = run.outcome is not None
        self._drain(run)
        if over and self._run is run:
            self._end(run)

    def _drain(self, run: _Run) -> None:
        values = run.box.take()
        for value in values:
            if self._run is not run:
                return
            self.received.emit(value)
        if values:
            self.drained.emit()

    def _finish(self, run: _Run, relay: Generator[None, None, None]) -> None:
        relay.close()  # a run that napari has quit still stands at its last yield
        if self._run is run:
            self._drain(run)
        if self._run is run:
            self._end(run)
        elif self._run is None:
            self._release()
        run.forget()

    def _end(self, run: _Run) -> None:
        self._run = None
        self._worker = None
        self._timer.stop()
        self._release()
        self.ended.emit(run.outcome or Outcome())

    def _release(self) -> None:
        if self in _active:
            _active.remove(self)
            _next()


class Inbox(QObject):
    """Calls on the GUI thread what another thread has put here.

    A plain thread must not emit: the object may go from under its signal.
    """

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._timer = QTimer(self)
        self._timer.setInterval(_TICK)
        self._timer.timeout.connect(self._read)
        self._timer.start()

    def put(self, call: Callable[[], None]) -> None:
        """Let the GUI thread call this, if it still does when its turn comes."""
        self._calls.put(call)

    def close(self) -> None:
        """Call nothing any more."""
        self._timer.stop()

    def _read(self) -> None:
        while not self._calls.empty():
            self._calls.get()()


class Aside(QObject):
    """Does short work beside the run that has the thread, such as writing a file.

    It is not one of napari's workers, of which only one can run at a time; the process
    ends when the work has ended, so that no file is lost.
    """

    def __init__(self, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._inbox = Inbox(self)

    def start(
        self, work: Callable[[], object], then: Callable[[Outcome], None]
    ) -> None:
        """Work in a thread, and call `then` on the GUI thread afterwards."""

        def run() -> None:
            try:
                outcome = Outcome(result=work())
            except BaseException as error:  # noqa: BLE001  # told, not lost
                outcome = Outcome(failure=failure_of(error))
            self._inbox.put(lambda: then(outcome))

        threading.Thread(target=run, name="napari-unetpp aside").start()


def _next() -> None:
    if _queue:
        _queue.pop(0)()


_warm: dict[str, str] = {}  # device: its description, once all is imported


def get_ready(device: str, then: Callable[[str], None]) -> None:
    """Import torch in the thread, try it once, and call back with the device's text."""
    if device in _warm:
        then(_warm[device])
        return

    def make(_: threading.Event) -> Generator[Any, None, str]:
        from napari_unetpp.live import warm_up

        return warm_up(device)

    def ended(outcome: Outcome) -> None:
        if outcome.failure is None and outcome.result is not None:
            _warm[device] = outcome.result
        # A viewer that was closed meanwhile has deleted its dock's labels.
        with suppress(RuntimeError):
            then(_warm.get(device, "not known yet"))
        runner.deleteLater()

    runner = Runner()
    runner.ended.connect(ended)
    if not runner.start(make, title="getting ready", short=True):
        then("not known yet")


def _log_warning(arguments: tuple[Any, ...]) -> None:
    _log.warning("%s", arguments[0])
