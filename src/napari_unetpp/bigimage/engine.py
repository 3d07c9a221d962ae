"""Predicting one chunk of a large image and writing it, in this process or a worker."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from napari_unetpp import cluster, io
from napari_unetpp.device import is_out_of_memory, resolve_device
from napari_unetpp.model import Model, load_model
from napari_unetpp.predict import (
    Core,
    Geometry,
    PlanePredictor,
    default_tile,
    most_likely,
    smaller_parts,
    working_copy,
)
from napari_unetpp.preprocess import Planes

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Place = tuple[int | slice, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """What every tile needs to know; travels to the workers.

    Attributes
    ----------
    labels, model : Path
        Where the labels are written, and the model is read.
    image : Path or array
        What is labelled.
    channel_axis, tile, depth, heads, device
        As for `predict_to_zarr_steps`, but the depth is a number.
    key : str
        No two runs have the same, so that no worker goes on with another model.
    """

    labels: Path
    model: Path
    image: Any
    channel_axis: int | None
    tile: int | None
    depth: int
    heads: Literal["last", "mean"]
    device: str | None
    key: str


class Tiles:
    """The chunks of all planes, by number, row by row; no list, which would grow.

    Parameters
    ----------
    model : Model
    planes : Planes
        The image.
    job : Job
        Its tile and depth.

    Attributes
    ----------
    side : int
        Of a chunk, in pixels.
    """

    def __init__(self, model: Model, planes: Planes, job: Job) -> None:
        geometry = Geometry(model.network, job.depth, planes.shape)
        self.side = geometry.round_up(job.tile or default_tile(planes.shape))
        self._down, self._across = (-(-n // self.side) for n in planes.shape)
        self._planes = planes

    def __len__(self) -> int:
        return len(self._planes) * self._down * self._across

    def __getitem__(self, number: int) -> tuple[int, Core, Place]:
        plane, row, column = np.unravel_index(
            number, (len(self._planes), self._down, self._across)
        )
        rows, columns = (
            (int(i) * self.side, min((int(i) + 1) * self.side, n))
            for i, n in zip((row, column), self._planes.shape, strict=True)
        )
        lead = self._planes.index(int(plane))
        return int(plane), Core(rows, columns), (*lead, slice(*rows), slice(*columns))


class Engine:
    """Predicts and writes any tile; in each process there is one.

    Parameters
    ----------
    job : Job
        What is wanted.
    model : Model
        As of `job`, loaded.
    image : array
        As of `job`, opened.
    """

    def __init__(self, job: Job, model: Model, image: Any) -> None:
        self._job, self._model = job, model
        self._planes = Planes(image, channel_axis=job.channel_axis)
        self._tiles = Tiles(model, self._planes, job)
        self._network = working_copy(model.network, resolve_device(job.device))
        self._geometry = Geometry(self._network, job.depth, self._planes.shape)
        self._labels = io.Labels(job.labels)
        self._plane: tuple[int, PlanePredictor] | None = None

    def write(self, number: int) -> int:
        """Predict a tile, write its chunk, and return the checksum."""
        plane, core, place = self._tiles[number]
        if self._plane is None or self._plane[0] != plane:
            job = self._job
            predictor = PlanePredictor(
                self._network,
                self._planes.plane(plane),
                self._model.preprocessing,
                depth=job.depth,
                all_heads=job.heads == "mean",
                tile=job.tile,
            )
            self._plane = plane, predictor
        return self._labels.write(place, self._predicted(self._plane[1], core))

    def _predicted(self, plane: PlanePredictor, core: Core) -> NDArray[np.uint8]:
        """Return the labels of a core, in smaller parts where memory is short."""
        labels = np.zeros([stop - start for start, stop in core], np.uint8)
        shift = 1 if self._model.unlabelled == 0 else 0
        queue = [core]
        while queue:
            part = queue.pop()
            try:
                found = plane.probabilities(part).cpu()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                queue += smaller_parts(self._geometry, part)
                continue
            here = tuple(
                slice(a - start, b - start)
                for (a, b), (start, _) in zip(part, core, strict=True)
            )
            labels[here] = most_likely(found, shift).numpy()
        return labels


_engine: tuple[bytes, Engine] | None = None
_one_at_a_time = threading.Lock()


def work(blob: bytes, number: int) -> int:
    """Predict and write a tile in a worker, which keeps the model between two."""
    global _engine
    with _one_at_a_time, cluster.alone():
        if _engine is None or _engine[0] != blob:
            job = cluster.unpacked(blob)
            image = io.open_image(job.image) if is_path(job.image) else job.image
            _engine = blob, Engine(job, load_model(job.model), image)
        return _engine[1].write(number)


def is_path(image: Any) -> bool:
    """Return whether an image is named, not given."""
    return isinstance(image, (str, os.PathLike))
