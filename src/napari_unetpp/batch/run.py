"""The run over many images: one that fails leaves the others be."""

from __future__ import annotations

import copy
import dataclasses
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from napari_unetpp import io
from napari_unetpp.batch.files import (
    REPLACE,
    check_targets,
    make_folder,
    read_picture,
    write_probabilities,
)
from napari_unetpp.errors import DeviceMemoryError, ImageFileError, SaveError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

    import torch

    from napari_unetpp.batch.files import Target
    from napari_unetpp.model import Model
    from napari_unetpp.predict import Tile

_log = logging.getLogger("napari_unetpp")

# What spoils one image and leaves the others be; torch raises RuntimeError.
_BAD_IMAGE = (
    ImageFileError,
    DeviceMemoryError,
    OSError,
    ValueError,
    MemoryError,
    RuntimeError,
)


class Stop(Protocol):
    """What is asked whether to end, for example a `threading.Event`."""

    def is_set(self) -> bool:
        """Return whether to end."""


@dataclass(frozen=True, eq=False)
class BatchStep:
    """How far `predict_files` has come.

    Attributes
    ----------
    state : {"started", "tile", "done", "skipped", "failed"}
        What has just happened to `target`; the last three end it.
    number, count : int
        `target` is number `number` (from 1) of `count`.
    target : Target
        The image.
    shape : tuple of int
        Shape of its labels, known from the first tile on.
    plane, planes : int
        The plane of `tile` (from 1) of all its planes.
    pixels : int
        Pixels labelled so far, of those of `shape`.
    tile : Tile or None
        The labels of a part, in the state "tile".
    error : Exception or None
        In the state "failed": why, as an exception without its traceback.
    """

    state: Literal["started", "tile", "done", "skipped", "failed"]
    number: int
    count: int
    target: Target
    shape: tuple[int, ...] = ()
    plane: int = 0
    planes: int = 0
    pixels: int = 0
    tile: Tile | None = None
    error: Exception | None = None


def predict_files(
    model: Model,
    targets: Sequence[Target],
    *,
    depth: int | None = None,
    heads: Literal["last", "mean"] = "last",
    tile: int | None = None,
    device: str | torch.device | None = None,
    channel_axis: int | None = None,
    overwrite: bool = False,
    skip_existing: bool = False,
    keep: Iterable[str | os.PathLike[str]] = (),
    remedy: str = REPLACE,
    stop: Stop | None = None,
) -> Iterator[BatchStep]:
    """Label many images, one after another; one that fails leaves the others be.

    Parameters
    ----------
    model : Model
        Left unchanged.
    targets : sequence of Target
        From `plan_files`, or made by hand for images in memory.
    depth, heads, tile, device
        As for `predict_tiles`.
    channel_axis : int or None, optional
        Axis of the channels in image files; None: as each file says.
    overwrite : bool, optional
        Whether outputs that exist are replaced.
    skip_existing : bool, optional
        Whether images whose outputs all exist are skipped. They are complete: every
        file is written at once.
    keep : iterable of path, optional
        Files that no output may replace, beside the images.
    remedy : str, optional
        What the message advises where an output exists.
    stop : object with ``is_set()``, optional
        Asked before each layer of the network; the image in work is given up.

    Yields
    ------
    step : BatchStep
        For each image "skipped", or "started", "tile" for each of its tiles, and
        "done" or "failed". After a `SaveError` no other image is tried.

    Raises
    ------
    ValueError
        Before anything is done: if an argument is out of range, or an output is an
        input, exists, or would be made twice.
    SaveError
        If the output folder is write-protected, cannot be made, or another run writes
        into it.
    """
    from napari_unetpp.predict import predict_tiles

    targets = list(targets)
    replace = overwrite or skip_existing
    check_targets(targets, keep=keep, overwrite=replace, remedy=remedy)
    options = {"depth": depth, "heads": heads, "tile": tile, "device": device}
    # Tried on nothing, so that no image fails by the options.
    nothing = np.zeros((model.config.in_channels, 1, 1), np.uint8)
    predict_tiles(model, nothing, channel_axis=0, **options)  # type: ignore[arg-type]
    if stop is not None:
        model = _stoppable(model, stop)
    job = _Job(model, options, channel_axis, replace, stop)
    return job.steps(targets, skip_existing)


class _Stopped(Exception):
    """The run was asked to stop in the middle of an image."""


def _stoppable(model: Model, stop: Stop) -> Model:
    """Return the model with a network that asks `stop` before each of its layers."""

    def ask(*_: object) -> None:
        if stop.is_set():
            raise _Stopped

    network = copy.deepcopy(model.network)
    for module in network.modules():
        module.register_forward_pre_hook(ask)
    return dataclasses.replace(model, network=network)


@dataclass(frozen=True)
class _Job:
    """What all images of a run share."""

    model: Model
    options: dict[str, Any]
    channel_axis: int | None
    replace: bool
    stop: Stop | None

    def steps(
        self, targets: Sequence[Target], skip_existing: bool
    ) -> Iterator[BatchStep]:
        files = [f for t in targets for f in t.files]
        with ExitStack() as locks:
            for folder in sorted({f.parent for f in files}):
                make_folder(folder)
                locks.enter_context(io.lock(folder))
            for file in files:
                io.sweep(file)
            yield from self._images(targets, skip_existing)

    def _images(
        self, targets: Sequence[Target], skip_existing: bool
    ) -> Iterator[BatchStep]:
        for number, target in enumerate(targets, start=1):
            start = BatchStep("started", number, len(targets), target)
            if self._stopped():
                return
            files = target.files
            if skip_existing and files and all(f.exists() for f in files):
                yield dataclasses.replace(start, state="skipped")
                continue
            yield start
            try:
                yield from self._image(start)
                continue
            except _Stopped:
                return
            except (*_BAD_IMAGE, SaveError) as error:
                _log.debug("`%s` failed", target.title, exc_info=True)
                failed = error.with_traceback(None)  # its frames hold the image
            yield dataclasses.replace(start, state="failed", error=failed)
            if isinstance(failed, SaveError):  # the next one would fail as well
                return

    def _stopped(self) -> bool:
        return self.stop is not None and self.stop.is_set()

    def _image(self, step: BatchStep) -> Iterator[BatchStep]:
        from napari_unetpp.predict import predict_tiles

        target = step.target
        pixels, axis = self._read(target)
        shape = list(pixels.shape)
        if axis is not None:
            del shape[axis]
        step = dataclasses.replace(step, shape=tuple(shape))
        labels = np.zeros(shape, np.uint8) if target.labels else None
        maps = None
        if target.probabilities:
            maps = np.zeros((len(self.model.classes), *shape), np.float32)
        leading = step.shape[:-2]
        planes = int(np.prod(leading, dtype=np.int64))
        done = 0
        if self._stopped():
            raise _Stopped
        for tile in predict_tiles(
            self.model,
            pixels,
            channel_axis=axis,
            probabilities=maps is not None,
            **self.options,
        ):
            done += tile.labels.size
            if labels is not None:
                labels[tile.slices] = tile.labels
            if maps is not None:
                maps[(slice(None), *tile.slices)] = tile.probabilities
            place: Any = tile.slices[:-2]
            plane = int(np.ravel_multi_index(place, leading)) if leading else 0
            step = dataclasses.replace(
                step, state="tile", plane=plane + 1, planes=planes, pixels=done
            )
            yield dataclasses.replace(step, tile=tile)
            if self._stopped():
                raise _Stopped
        if target.labels and labels is not None:
            io.write_labels(target.labels, labels, overwrite=self.replace)
        if target.probabilities and maps is not None:
            write_probabilities(target.probabilities, maps, overwrite=self.replace)
        yield dataclasses.replace(step, state="done")

    def _read(self, target: Target) -> tuple[Any, int | None]:
        """Return the image and its channel axis, or raise if it does not fit."""
        wanted = self.model.config.in_channels
        pixels, axis = target.image, target.channel_axis
        if target.is_file:
            picture = read_picture(Path(pixels), self.channel_axis, channels=wanted)
            pixels, axis = picture.pixels, picture.channel_axis
        channels = 1 if axis is None else pixels.shape[axis]
        if channels != wanted:
            s = "" if channels == 1 else "s"
            raise ValueError(
                f"`{target.title}` has {channels:,} channel{s} (shape "
                f"{tuple(pixels.shape)}), the model takes {wanted}. Pick another image "
                "or model. In scripts and commands the axis of the channels can be "
                "named: channel_axis, --channel-axis."
            )
        return pixels, axis
