"""The run over many images: one that fails leaves the others be."""

from __future__ import annotations

import copy
import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from napari_unetpp import cluster, io
from napari_unetpp.batch.files import (
    REPLACE,
    alone,
    check_targets,
    read_picture,
    write_probabilities,
)
from napari_unetpp.batch.shared import model_of, shared_steps
from napari_unetpp.batch.steps import BatchStep, Stop
from napari_unetpp.errors import DeviceMemoryError, ImageFileError, SaveError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

    import torch

    from napari_unetpp.batch.files import Target
    from napari_unetpp.model import Model

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
    workers: int | None = None,
    scheduler: str | None = None,
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
    workers : int or None, optional
        Number of processes on this computer that share the image files.
    scheduler : str or None, optional
        Address of a running dask scheduler, whose workers share them; files must have
        the same names on all computers.

    Yields
    ------
    step : BatchStep
        For each image "skipped", or "started", "tile" for each of its tiles, and
        "done" or "failed". After a `SaveError` no other image is tried. With workers
        there are no tiles, and images end in any order.

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
    shared = cluster.Wanted(workers, scheduler)
    if shared:
        options |= {"channel_axis": channel_axis}
        steps = shared_steps(
            model, targets, options, skip_existing, shared, stop, _in_worker
        )
    else:
        if stop is not None:
            model = _stoppable(model, stop)
        job = _Job(model, options, channel_axis, replace, stop)
        steps = job.images(targets, skip_existing)
    return _locked(targets, steps)


def _locked(
    targets: Sequence[Target], steps: Iterator[BatchStep]
) -> Iterator[BatchStep]:
    with alone(targets):
        yield from steps


def _in_worker(blob: bytes, item: tuple[int, Target]) -> Exception | None:
    """Label an image in a worker; return what went wrong."""
    shared = cluster.unpacked(blob)
    options = dict(shared.options)
    axis = options.pop("channel_axis")
    # The one that shares the work out holds the lock of the folder. A worker that died
    # may have written the labels before.
    job = _Job(model_of(shared.model), options, axis, replace=True, stop=None)
    return [step.error for step in job.images([item[1]], skip_existing=False)][-1]


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

    def images(
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
