"""The run over many images, shared by workers: one that fails leaves the others be."""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari_unetpp import cluster
from napari_unetpp.batch.steps import BatchStep
from napari_unetpp.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from napari_unetpp.batch.files import Target
    from napari_unetpp.batch.steps import Stop
    from napari_unetpp.model import Model


@dataclass(frozen=True)
class Job:
    """What every image needs to know; travels to the workers.

    Attributes
    ----------
    model : Path
        The file of the model.
    options : dict
        Arguments of `predict_files`.
    """

    model: Path
    options: dict[str, Any]


def shared_steps(
    model: Model,
    targets: Sequence[Target],
    options: dict[str, Any],
    skip_existing: bool,
    wanted: cluster.Wanted,
    stop: Stop | None,
    work: Callable[[bytes, tuple[int, Target]], Exception | None],
) -> Iterator[BatchStep]:
    """Yield what becomes of the images, in the order in which they end.

    Parameters
    ----------
    model, targets, skip_existing, stop
        As for `predict_files`.
    options : dict
        Its other arguments, for the workers.
    wanted : Wanted
        Who shares the work.
    work : callable
        Takes a packed `Job` and a numbered target, in a worker.

    Raises
    ------
    ValueError
        If an image is no file, or no file is to be made of it.
    """
    for target in targets:
        if not (target.is_file and target.files):
            raise ValueError(
                f"Workers read and write files themselves, `{target.title}` is none, "
                "or nothing is made of it. Leave out `workers` and `scheduler`."
            )
    return _steps(model, targets, options, skip_existing, wanted, stop, work)


def _steps(
    model: Model,
    targets: Sequence[Target],
    options: dict[str, Any],
    skip_existing: bool,
    wanted: cluster.Wanted,
    stop: Stop | None,
    work: Callable[[bytes, tuple[int, Target]], Exception | None],
) -> Iterator[BatchStep]:
    todo: dict[int, BatchStep] = {}
    for number, target in enumerate(targets, start=1):
        step = BatchStep("started", number, len(targets), target)
        if skip_existing and all(f.exists() for f in target.files):
            yield dataclasses.replace(step, state="skipped")
        else:
            todo[number] = step
    if not todo or (stop is not None and stop.is_set()):
        return
    folder = next(iter(todo.values())).target.files[0].parent.absolute()
    # The folder of the labels is one that all workers see.
    path = folder / f".model.{secrets.token_hex(4)}.safetensors"
    model.save(path)
    try:
        items = [(n, _absolute(step.target)) for n, step in todo.items()]
        with wanted.client() as client:
            job = Job(path, options)
            for (number, _), error in cluster.each(
                client, work, job, items, keep_going=True
            ):
                step = todo[number]
                yield step
                state = "done" if error is None else "failed"
                yield dataclasses.replace(step, state=state, error=error)  # type: ignore[arg-type]
                if isinstance(error, SaveError):  # the next one would fail as well
                    return
                if stop is not None and stop.is_set():
                    return
    finally:
        path.unlink(missing_ok=True)


def _absolute(target: Target) -> Target:
    both = (target.labels, target.probabilities)
    labels, probabilities = (None if f is None else f.absolute() for f in both)
    return dataclasses.replace(
        target,
        image=Path(target.image).absolute(),
        labels=labels,
        probabilities=probabilities,
    )


@lru_cache(maxsize=1)
def model_of(path: Path) -> Model:
    """Return the model of a file, which a worker keeps between two images."""
    from napari_unetpp.model import load_model

    return load_model(path)
