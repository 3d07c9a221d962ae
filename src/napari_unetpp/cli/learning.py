"""Training as a command does it: with a progress bar, stopped by Ctrl-C, never lost."""

from __future__ import annotations

import signal
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_unetpp import io, parallel
from napari_unetpp.cli.console import Console, count, quoted
from napari_unetpp.errors import DeviceError, DeviceMemoryError, SaveError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Generator, Iterator

    from napari_unetpp.api import Model, TrainStep
    from napari_unetpp.checkpoint import Rolling

SECONDS = 30.0  # without --seconds and --steps


class Stop:
    """What the training asks after each step; a signal sets it.

    Attributes
    ----------
    code : int
        0, or the exit code: 128 + the number of the signal.
    """

    def __init__(self) -> None:
        self.code = 0

    def is_set(self) -> bool:
        """Return whether to stop."""
        return self.code != 0

    def on_signal(self, number: int, _frame: object) -> None:
        """Stop at the next step; a second signal ends at once."""
        if self.code:
            raise KeyboardInterrupt
        self.code = 128 + number


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Let the first Ctrl-C (or SIGTERM) set a flag and the second one interrupt."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, stop.on_signal) for n in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def limits(seconds: float | None, steps: int | None) -> dict[str, Any]:
    """Return the limits as `train_steps` takes them."""
    if seconds is None and steps is None:
        seconds = SECONDS
    return {"max_seconds": seconds, "max_steps": steps}


def learn(
    console: Console,
    training: Generator[TrainStep, None, Model],
    stop: Stop,
    **limit: Any,
) -> Model:
    """Drain a training under a progress bar and return its model."""
    by_time = limit["max_seconds"] is not None
    total = limit["max_seconds"] if by_time else limit["max_steps"]
    told = False
    with console.bar(total, "s" if by_time else "steps", "training") as bar:
        while True:
            try:
                step = next(training)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            if step.note:
                console.tell(step.note)
            bar.n = min(total, step.seconds if by_time else step.step)
            score = "" if step.score is None else f", held-out IoU {step.score:.2f}"
            bar.set_postfix_str(f"step {step.step}, loss {step.loss:.3f}{score}")
            if stop.is_set() and not told:
                told = True
                console.tell(
                    "stopping; the model will be saved. Ctrl-C again ends at once."
                )


@contextmanager
def resumable(console: Console, options: Namespace, rolling: Rolling) -> Iterator[None]:
    """Tell how to go on with a training that something has ended too early."""
    try:
        yield
    except (KeyboardInterrupt, DeviceError, DeviceMemoryError, SaveError):
        tell_resume(console, options, rolling)
        raise


def tell_resume(console: Console, options: Namespace, rolling: Rolling) -> None:
    """Tell how to go on, if there is something to go on with."""
    rolling.wait()
    if rolling.exists() and not parallel.team().rank:
        replace = " --overwrite" if options.out.exists() else ""
        console.tell(
            f"the training is kept in {quoted(rolling.path)}; to go on, give the same "
            f"command with --resume{replace}."
        )


def summary(model: Model) -> dict[str, Any]:
    """Return how a model was trained, JSON-able."""
    last = model.history[-1] if model.history else None
    return {
        "network": model.config.name,
        "classes": list(model.classes),
        "steps": last.step if last else 0,
        "seconds": round(last.seconds, 2) if last else 0.0,
        "loss": last.loss if last else None,
        "held_out_mean_iou": last.score if last else None,
        "held_out_interval": _interval(model),
    }


def _interval(model: Model) -> list[float] | None:
    found = model.provenance.get("held_out_interval")  # a file may say anything
    if not isinstance(found, list) or len(found) != 2:
        return None
    numbers = all(type(v) in (int, float) for v in found)
    return [float(v) for v in found] if numbers else None


def save(model: Model, path: Path, *, overwrite: bool) -> None:
    """Save, or if that fails keep the model in the folder for temporary files.

    Raises
    ------
    SaveError
        Whenever `path` could not be written; it tells where the model is instead.
    """
    try:
        model.save(path, overwrite=overwrite)
    except SaveError as error:
        raise rescued(model, path.name, error) from None


def rescued(model: Model, name: str, error: SaveError) -> SaveError:
    """Keep a model in the folder for temporary files; return the error that says so."""
    try:
        spare = Path(tempfile.mkdtemp(prefix="napari-unetpp-")) / name
        model.save(spare)
    except (SaveError, OSError):
        return error
    return SaveError(f"{error}\nThe model was saved as {spare} instead.")


def size_of(path: Path) -> str:
    """Return a file's name and size."""
    return f"{io.shown(path)} ({path.stat().st_size / 1e6:.1f} MB)"


def trained(model: Model) -> str:
    """Return in words how a model was trained."""
    facts = summary(model)
    text = f"{facts['network']}: {count(facts['steps'], 'step')}"
    text += f" in {facts['seconds']:.1f} s"
    if facts["loss"] is not None:
        text += f", loss {facts['loss']:.3f}"
    return text


def estimated(model: Model) -> str:
    """Return the held-out score in words."""
    facts = summary(model)
    score, interval = facts["held_out_mean_iou"], facts["held_out_interval"]
    if score is None or interval is None:
        return "no held-out score: too few strokes lie where nothing is learned"
    return (
        f"held-out estimate: mean IoU {score:.2f} over all classes of the whole "
        f"images, {interval[0]:.2f} to {interval[1]:.2f} (90 %)"
    )


def class_list(model: Model) -> str:
    """Return the classes with their values."""
    first = 1 if model.unlabelled == 0 else 0
    return ", ".join(f"{i} {n}" for i, n in enumerate(model.classes, start=first))
