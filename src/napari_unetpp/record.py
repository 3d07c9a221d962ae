"""What the folder of a run holds: tables that are written whole, and read again."""

from __future__ import annotations

import csv
import io as buffers
import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from napari_unetpp import io
from napari_unetpp.checkpoint import Rolling
from napari_unetpp.errors import ImageFileError, SaveError
from napari_unetpp.model import TrainStep

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

FILES = {
    "config": "config.json",
    "environment": "environment.json",
    "history": "history.csv",
    "scores": "scores.json",
    "model": "model.safetensors",
    "report": "report.html",
}


@contextmanager
def open_folder(folder: Path, resume: bool) -> Iterator[Rolling]:
    """Make the folder, or see to it that what it holds may go on; be alone with it.

    Raises
    ------
    SaveError
        If it cannot be made, or holds a run that is not to go on; InUseError if that
        runs at this moment.
    """
    try:
        (folder / "frames").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"The folder `{io.shown(folder)}` cannot be made: {error.strerror}. Choose "
            "another one."
        ) from error
    with io.lock(folder):
        rolling = Rolling(folder)
        with rolling.alone():  # which tidies up after a kill
            pass
        if rolling.exists() and not resume:
            raise SaveError(
                f"`{io.shown(folder)}` holds a run that did not end. Go on with it "
                "(resume=True, --resume), choose another folder, or delete it."
            )
        if (folder / FILES["scores"]).exists() and not rolling.exists():
            raise SaveError(
                f"`{io.shown(folder)}` holds a run that has ended; its test was scored "
                "once and stays so. Choose another folder, or delete it."
            )
        io.sweep(folder)
        io.sweep(folder / "frames")
        yield rolling


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a table; what is not finite becomes null."""
    text = json.dumps(_finite(values), indent=1, allow_nan=False)
    io.write_text(path, text + "\n", overwrite=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_history(folder: Path, history: Sequence[TrainStep]) -> None:
    """Write step, loss, seconds and validation score of each step."""
    text = buffers.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "loss", "seconds", "validation"])
    for s in history:
        score = "" if s.score is None else repr(s.score)
        writer.writerow([s.step, repr(s.loss), f"{s.seconds:.3f}", score])
    io.write_text(folder / FILES["history"], text.getvalue(), overwrite=True)


def read_history(folder: Path) -> list[TrainStep]:
    """Return the steps that an earlier process has written down."""
    path = folder / FILES["history"]
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                TrainStep(
                    int(row["step"]),
                    float(row["loss"]),
                    float(row["seconds"]),
                    float(row["validation"]) if row["validation"] else None,
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ImageFileError(
            f"`{io.shown(path)}` is not the history of a run: {error}. Delete it; the "
            "run goes on without its first steps in the curves."
        ) from None
