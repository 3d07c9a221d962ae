"""Everything that a training needs to go on exactly, in a file of its own."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from napari_unetpp import io, modelfile
from napari_unetpp.config import check_number
from napari_unetpp.errors import (
    DeviceError,
    ModelFileError,
    SaveError,
    TrainingError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from napari_unetpp.modelfile import ModelFile

_log = logging.getLogger("napari_unetpp")

_VERSION = 1
_NAME = "training.checkpoint.safetensors"  # in a folder
_WIDTH = 64  # numbers per row of a table in the file: a side has a limit there
_TWIN = "shown."  # state that is mostly the model's own weights, bit for bit


class State(NamedTuple):
    """What a trainer knows beside its arguments.

    Attributes
    ----------
    tensors : dict of str to ndarray
        Weights and what the optimizer remembers of them.
    rows : dict of str to ndarray of shape (n,) and dtype int64
        Tables of any length, flat.
    values : dict
        JSON-able: the rest.
    """

    tensors: dict[str, NDArray[Any]]
    rows: dict[str, NDArray[np.int64]]
    values: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A training as it stands after a step.

    Attributes
    ----------
    model : ModelFile
        As it is shown; `load_model` of the file gives this one.
    run : dict
        JSON-able: settings, seed and parent. Another training has others.
    environment : dict
        JSON-able: versions, device, threads; with others the bits may differ.
    data : ndarray of shape (n, 3) and dtype int64
        Of each annotated plane the fingerprints of image and annotation, its number.
    history : ndarray of shape (n, 4) and dtype float64
        Step, loss, seconds and score (NaN: none) of each step.
    state : State
        Of the trainer.
    """

    model: ModelFile
    run: dict[str, Any]
    environment: dict[str, Any]
    data: NDArray[np.int64]
    history: NDArray[np.float64]
    state: State

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for a training to be the one that goes on."""
        kept = {k: v for k, v in self.model.config.items() if k != "prior"}
        return {**kept, **self.run}

    @property
    def steps(self) -> int:
        """Steps taken, over all resumptions."""
        return int(self.history[-1, 0]) if len(self.history) else 0

    @property
    def seconds(self) -> float:
        """Seconds of training, over all resumptions."""
        return float(self.history[-1, 2]) if len(self.history) else 0.0

    @property
    def score(self) -> float | None:
        """Held-out score, as far as known."""
        last = self.history[-1, 3] if len(self.history) else np.nan
        return None if np.isnan(last) else float(last)

    def encode(self) -> bytes:
        """Return the bytes of the file: a model file, and the state with it."""
        start, own = f"{modelfile.STATE}.", self.model.tensors
        tensors = dict(own)
        for name, array in self.state.tensors.items():
            twin = own.get(name.removeprefix(_TWIN)) if name.startswith(_TWIN) else None
            if twin is None or twin.tobytes() != array.tobytes():
                tensors[start + name] = array
        rows = {
            **self.state.rows,
            "data": self.data.ravel(),
            "history": self.history.view(np.int64).ravel(),
        }
        for name, row in rows.items():
            if row.size:
                padded = np.pad(row, (0, -row.size % _WIDTH))
                tensors[f"{start}rows.{name}"] = padded.reshape(-1, _WIDTH)
        table = {
            "version": _VERSION,
            "run": self.run,
            "environment": self.environment,
            "values": self.state.values,
            "rows": {name: int(row.size) for name, row in rows.items()},
        }
        return modelfile.encode(
            tensors,
            config=self.model.config,
            provenance=self.model.provenance,
            extra={modelfile.STATE: table},
        )


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify a checkpoint; nothing in it is ever run.

    Parameters
    ----------
    path : path
        A file that `Rolling` wrote.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, a model without a training's state, or newer
        than this version.
    """
    file, name = modelfile.read(path), io.shown(path)
    table = file.extra.get(modelfile.STATE)
    if table is None:
        raise ModelFileError(
            f"`{name}` is a model, not a checkpoint: it does not hold what a training "
            "needs to go on exactly. Start a training from it instead: model=... or "
            "--from."
        )
    try:
        if check_whole(table["version"], 1) > _VERSION:
            raise ModelFileError(
                f"`{name}` was written by a newer version of napari-unetpp. Update "
                "napari-unetpp to go on with its training."
            )
        return _parsed(file, table)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise not_usable(name, error) from None


def not_usable(name: str, reason: object) -> ModelFileError:
    """Return the error for a checkpoint that is whole but makes no sense."""
    return ModelFileError(
        f"`{name}` holds a training that cannot go on: {reason!s:.200} It was damaged "
        "or made by another program; take its model alone, or start anew."
    )


def _parsed(file: ModelFile, table: Mapping[str, Any]) -> Checkpoint:
    start, model = f"{modelfile.STATE}.", file.without_state()
    found = {
        k.removeprefix(start): v for k, v in file.tensors.items() if k.startswith(start)
    }
    rows = {
        name: _row(found.pop(f"rows.{name}", None), size)
        for name, size in table["rows"].items()
    }
    for name, array in model.tensors.items():
        found.setdefault(_TWIN + name, array)
    history = rows.pop("history").view(np.float64).reshape(-1, 4)
    if not np.isfinite(history[:, :3]).all() or np.isinf(history[:, 3]).any():
        raise ValueError("its loss curve holds NaN or infinity.")
    data = rows.pop("data").reshape(-1, 3)
    for name in ("run", "environment", "values"):
        if not isinstance(table[name], dict):
            raise ValueError(f"its {name} is not a table.")
    state = State(found, rows, dict(table["values"]))
    return Checkpoint(model, table["run"], table["environment"], data, history, state)


def _row(padded: NDArray[Any] | None, size: object) -> NDArray[np.int64]:
    flat = np.zeros(0, np.int64) if padded is None else padded.ravel()
    n = check_whole(size, 0, flat.size)
    if flat.dtype != np.int64 or flat.size - n >= _WIDTH:
        raise ValueError("a table in it has another length than it says.")
    return flat[:n].copy()


def check_whole(value: object, low: int, high: int = 10**15) -> int:
    """Return `value` if it is a whole number in range, else raise ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r:.40} is not a whole number.")
    if not low <= value <= high:
        raise ValueError(f"{value} does not lie between {low} and {high}.")
    return value


# --- chance ----------------------------------------------------------------------

# A file's whole numbers have at most 19 digits, these have up to 39.
_LONG = ("state", "inc")


def chance(rng: np.random.Generator) -> dict[str, Any]:
    """Return the state of a generator of random numbers, JSON-able and exact."""
    state: Any = rng.bit_generator.state
    return {
        "kind": state["bit_generator"],
        **{name: hex(state["state"][name]) for name in _LONG},
        "has_uint32": state["has_uint32"],
        "uinteger": state["uinteger"],
    }


def set_chance(rng: np.random.Generator, values: Mapping[str, Any]) -> None:
    """Let a generator go on where another one stood; ValueError if it cannot."""
    kind = type(rng.bit_generator).__name__
    if values["kind"] != kind:
        raise ValueError(f"its random numbers are not from {kind}.")
    long = {name: int(str(values[name])[:40], 16) for name in _LONG}
    if any(not 0 <= n < 2**128 for n in long.values()):
        raise ValueError("the state of its random numbers is out of range.")
    rng.bit_generator.state = {
        "bit_generator": kind,
        "state": long,
        "has_uint32": check_whole(values["has_uint32"], 0, 1),
        "uinteger": check_whole(values["uinteger"], 0, 2**32 - 1),
    }


# --- what differs ----------------------------------------------------------------


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words in what two tables differ, such as "threads: 2 then, 1 now"."""
    told = []
    for name in sorted({*then, *now}):
        old, new = then.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            told += [f"{_short(name)}.{line}" for line in differences(old, new)]
        elif old != new:
            told.append(f"{_short(name)}: {_short(old)} then, {_short(new)} now")
    return told


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain if len(plain) <= 64 else f"{plain[:61]}..."


def data_table(
    fingerprints: Sequence[str], numbers: Sequence[int]
) -> NDArray[np.int64]:
    """Return of each annotated plane two fingerprints and the number, as numbers."""
    rows = [
        (int(text[:16], 16), int(text[16:32], 16), number)
        for text, number in zip(fingerprints, numbers, strict=True)
    ]
    return np.array(rows, np.uint64).reshape(-1, 3).view(np.int64)


def data_differences(then: NDArray[np.int64], now: NDArray[np.int64]) -> list[str]:
    """Return in words in what two results of `data_table` differ."""
    if len(then) != len(now):
        return [f"annotated planes: {len(then)} then, {len(now)} now"]
    told = []
    for column, noun in enumerate(("images", "annotations", "positions")):
        changed = int(np.count_nonzero(then[:, column] != now[:, column]))
        if changed:
            told.append(f"{noun}: {changed} of {len(now)} changed")
    return told


# --- the files -------------------------------------------------------------------


class Rolling:
    """The files of one training: the newest checkpoint, the one before, the best.

    They are written beside the training, one at a time. The newest replaces an older
    one only after it was read back.

    Parameters
    ----------
    path : path
        Ending in ``.safetensors``, or a folder.
    seconds : float, optional
        Between two checkpoints.

    Raises
    ------
    ValueError
        If an argument does not fit.
    SaveError
        If nothing can be written there.
    """

    def __init__(self, path: str | os.PathLike[str], seconds: float = 60.0) -> None:
        check_number("checkpoint_seconds", seconds, 0, 1e9)
        self.path = Path(path) / _NAME if os.path.isdir(path) else Path(path)
        if self.path.suffix != ".safetensors":
            raise ValueError(
                "`checkpoint` must be a folder or a file that ends in .safetensors, "
                f"got `{io.shown(path)}`."
            )
        folder = self.path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise SaveError(
                f"No checkpoint can be written to the folder `{io.shown(folder)}`: it "
                "must exist and not be write-protected. Choose another one."
            )
        self._new, self._old, self._best = (
            self.path.with_name(f"{self.path.stem}.{kind}.safetensors")
            for kind in ("new", "previous", "best")
        )
        self._seconds = seconds
        self._at = time.monotonic()
        self._asked = -1  # the step that was handed over last
        self._failed = False
        self._top = -1.0
        self._thread: threading.Thread | None = None
        self.kept: int | None = None  # the last step that is safe

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only one that writes these files, and tidy up after a killed one.

        Raises
        ------
        InUseError
            If another training writes them.
        """
        with io.lock(self.path):
            for path in (self._new, self._best):
                io.sweep(path)
            if not self.exists():
                with suppress(OSError):  # the last of a training that has ended
                    self._best.unlink()
            yield

    def exists(self) -> bool:
        """Return whether there is a training to go on with."""
        return any(p.exists() for p in (self.path, self._new, self._old))

    def begin(self, resume: bool) -> Checkpoint | None:
        """Return what to go on with, None to start anew.

        Raises
        ------
        SaveError
            If there is something, but it is not wanted: it would be overwritten.
        ModelFileError
            If there is something, but none of it can be read.
        """
        if not self.exists():
            if resume:
                _log.warning(
                    "There is no checkpoint `%s`: the training starts from step 1.",
                    io.shown(self.path),
                )
            return None
        if not resume:
            raise SaveError(
                f"`{io.shown(self.path)}` holds an earlier training. Go on with it "
                "(resume=True), or delete it first."
            )
        found = self._newest()
        self.kept = self._asked = found.steps
        best = self.best()
        if best is not None and best.score is not None:
            self._top = best.score
        return found

    def _newest(self) -> Checkpoint:
        """Return the newest whole checkpoint; a kill may leave any one of the three."""
        problem: ModelFileError | None = None
        for path in (self._new, self.path, self._old):
            if path.exists():
                try:
                    return read(path)
                except ModelFileError as error:
                    _log.warning("%s", error)
                    problem = problem or error
        raise problem or ModelFileError(f"There is no `{io.shown(self.path)}`.")

    def due(self, steps: int) -> bool:
        """Return whether it is time for a checkpoint of this step."""
        busy = self._thread is not None and self._thread.is_alive()
        waited = time.monotonic() - self._at >= self._seconds
        return waited and not busy and self.lacks(steps, retry=True)

    def lacks(self, steps: int, *, retry: bool = False) -> bool:
        """Return whether this step was never handed over, or (`retry`) not written."""
        return steps != self._asked or (retry and self._failed)

    def keep(self, checkpoint: Checkpoint, *, wait: bool = False) -> None:
        """Write a checkpoint; a failure is logged, and the training goes on.

        Parameters
        ----------
        checkpoint : Checkpoint
            Not to be changed any more.
        wait : bool, optional
            Whether to return only when it is written.
        """
        self.wait()
        self._at, self._asked = time.monotonic(), checkpoint.steps
        # Half a second on a slow disk would be felt where the user paints.
        self._thread = threading.Thread(target=self._write, args=(checkpoint,))
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Wait until what was handed over is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            data = checkpoint.encode()
            io.atomic_write(self._new, data, overwrite=True)
            if self._new.read_bytes() != data:
                raise SaveError(f"`{io.shown(self._new)}` is damaged on the disk.")
            io.rotate(self._new, self.path, self._old)
            self.kept, self._failed = checkpoint.steps, False
            score = checkpoint.score
            if score is not None and score > self._top:
                io.atomic_write(self._best, data, overwrite=True)
                self._top = score
        except (SaveError, OSError, ValueError, MemoryError) as error:
            self._failed = True
            _log.warning(
                "No checkpoint of step %d: %s %s",
                checkpoint.steps, error, self.hint() or "The training goes on.",
            )  # fmt: skip

    def hint(self) -> str:
        """Return in words where the last good checkpoint is; "" if there is none."""
        if self.kept is None:
            return ""
        return f"The last good checkpoint is `{self.path}` (step {self.kept})."

    def best(self) -> Checkpoint | None:
        """Return the checkpoint that scored best, as far as there is one."""
        try:
            return read(self._best) if self._best.exists() else None
        except ModelFileError as error:
            _log.warning("%s", error)
            return None

    def remove(self) -> None:
        """Delete all files: the training has come to its end, or is given up.

        Raises
        ------
        InUseError
            If another training writes them.
        """
        self.wait()
        with self.alone():
            # In this order, and no further than it works, what is left goes on to
            # the same end: an older checkpoint has its best one beside it.
            for path in (self._new, self.path, self._old, self._best):
                try:
                    if path.exists():
                        path.unlink()
                except OSError as error:
                    _log.warning(
                        "`%s` was not deleted: %s", io.shown(path), error.strerror
                    )
                    break


@contextmanager
def telling(rolling: Rolling | None) -> Iterator[None]:
    """Let an error also say where the last good checkpoint is."""
    try:
        yield
    except (TrainingError, DeviceError) as error:
        if rolling is None:
            raise
        rolling.wait()
        raise type(error)(f"{error} {rolling.hint()}".strip()) from None
