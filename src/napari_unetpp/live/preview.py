"""What is shown while a model learns: its tiles, those on screen first."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from napari_unetpp.device import autocast, is_out_of_memory, peak_bytes
from napari_unetpp.messages import Coverage, DepthCost, Prediction, View
from napari_unetpp.predict import (
    Core,
    Geometry,
    PlanePredictor,
    default_tile,
    most_likely,
    smaller_parts,
    working_copy,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from napari_unetpp.messages import Wishes
    from napari_unetpp.model import Model
    from napari_unetpp.networks import SegmentationNet
    from napari_unetpp.preprocess import Planes

# Small tiles show sooner and stop sooner; a wide halo makes them a waste.
_SMALL, _NARROW = 256, 96  # px: side of a small tile, and the widest halo for it


class Job(NamedTuple):
    """A tile to predict."""

    image: int
    plane: int
    core: Core


class Preview:
    """The predictions of one state of the weights, one depth and one kind of output.

    Parameters
    ----------
    sources : sequence of Planes
        The images.
    model : Model
        Its weights are copied.
    wishes : Wishes
        Depth, heads, and which maps.
    device : torch.device
        Where to compute.
    step : int
        Training step of the weights.
    before : Preview or None
        The one that this one replaces; what it knows of the images is taken over.
    fast : bool
        Half precision where the device has it: some 0.4 % of the labels differ.
    """

    def __init__(
        self,
        sources: Sequence[Planes],
        model: Model,
        wishes: Wishes,
        device: torch.device,
        step: int,
        before: Preview | None,
        *,
        fast: bool = False,
    ) -> None:
        self.model = model
        self.step = step
        self.fast = fast
        self._sources = sources
        self._wished = _kind(wishes)
        depths = model.network.depths
        self.depth = wishes.depth if wishes.depth in depths else depths[-1]
        self._network = working_copy(model.network, device)
        self._device = device
        self._tiles = [
            live_tile(model.network, self.depth, source.shape) for source in sources
        ]
        self._cores = [
            Geometry(self._network, self.depth, source.shape).cores(tile)
            for source, tile in zip(sources, self._tiles, strict=True)
        ]
        self._total = sum(
            len(source) * len(cores)
            for source, cores in zip(sources, self._cores, strict=True)
        )
        self._done: set[Job] = set()
        self._ever: set[Job] = before._ever if before is not None else set()
        self._limits: dict[tuple[int, int], NDArray[np.float64]] = (
            before._limits if before is not None else {}
        )
        self._ready: tuple[tuple[int, int], PlanePredictor] | None = None
        self._queue: tuple[View, Iterator[Job]] | None = None
        self._tile_seconds: float = before._tile_seconds if before is not None else 0.3

    def outdated(self, wishes: Wishes) -> bool:
        """Return whether another depth or kind of output is wished now."""
        return _kind(wishes) != self._wished

    @property
    def complete(self) -> bool:
        """Whether every tile of every image is done."""
        return len(self._done) >= self._total

    def _seen(self, view: View | None) -> View:
        """Return `view`, or all of the first plane where nothing is known of it."""
        if view is not None and view.image < len(self._sources):
            return view
        height, width = self._sources[0].shape
        return View(0, 0, (0, height), (0, width))

    def _visible(self, view: View) -> list[Job]:
        return [
            Job(view.image, view.plane, core)
            for core in self._cores[view.image]
            if _overlap(core.rows, view.rows) and _overlap(core.columns, view.columns)
        ]

    def done_in(self, view: View | None) -> bool:
        """Return whether all that is on screen is done."""
        return all(job in self._done for job in self._visible(self._seen(view)))

    def cost(self, view: View | None) -> float:
        """Return about how many seconds all that is on screen takes."""
        return self._tile_seconds * len(self._visible(self._seen(view)))

    def next_job(self, view: View | None) -> Job | None:
        """Return the tile to do next, None when all are done."""
        seen = self._seen(view)
        if self._queue is None or self._queue[0] != seen:
            self._queue = seen, self._order(seen)
        return next((j for j in self._queue[1] if j not in self._done), None)

    def _order(self, view: View) -> Iterator[Job]:
        """Yield what is on screen, its plane, the planes near it, the other images."""
        visible = set(self._visible(view))
        centre = [sum(span) / 2 for span in (view.rows, view.columns)]

        def rank(job: Job) -> tuple[bool, bool, float]:
            where = [sum(span) / 2 for span in job.core]
            return job not in visible, job in self._ever, math.dist(where, centre)

        images = [
            view.image,
            *(i for i in range(len(self._sources)) if i != view.image),
        ]
        for image in images:
            planes = range(len(self._sources[image]))
            start = view.plane if image == view.image else 0
            for plane in sorted(planes, key=lambda n: abs(n - start)):
                jobs = [Job(image, plane, core) for core in self._cores[image]]
                yield from sorted(jobs, key=rank)

    def predict(self, job: Job) -> Prediction:
        """Do one tile."""
        with autocast(self._device, self.fast):
            return self._predict(job)

    def _predict(self, job: Job) -> Prediction:
        began = time.perf_counter()
        source = self._sources[job.image]
        place = job.image, job.plane
        if self._ready is None or self._ready[0] != place:
            self._ready = None  # not two at a time: each may hold a whole plane
            plane = PlanePredictor(
                self._network,
                source.plane(job.plane),
                self.model.preprocessing,
                depth=self.depth,
                all_heads=self._wished[1] == "mean" or self._wished[3],
                tile=self._tiles[job.image],
                limits=self._limits.get(place),
            )
            self._limits[place] = plane.limits
            self._ready = place, plane
        found = self._found(self._ready[1], job)
        self._done.add(job)
        self._ever.add(job)
        took = time.perf_counter() - began
        self._tile_seconds += 0.3 * (took - self._tile_seconds)
        return found

    @torch.inference_mode()
    def _found(self, plane: PlanePredictor, job: Job) -> Prediction:
        heads = _softmaxes(plane, job.core)
        _, kind, probabilities, uncertainty = self._wished
        mean = torch.stack(heads).mean(0) if len(heads) > 1 else heads[0]
        shown = mean if kind == "mean" else heads[-1]
        labels = most_likely(shown, 1).cpu().numpy()
        lead = self._sources[job.image].index(job.plane)
        return Prediction(
            job.image,
            (*lead, slice(*job.core.rows), slice(*job.core.columns)),
            labels,
            shown.half().cpu().numpy() if probabilities else None,
            disagreement(heads).half().cpu().numpy() if uncertainty else None,
            self.step,
        )

    def coverage(self, view: View | None) -> Coverage:
        """Return how far it is."""
        return Coverage(len(self._done), self._total, self.done_in(view), self.step)

    @torch.inference_mode()
    def price(self, depth: int) -> DepthCost:
        """Measure what a depth costs for a tile of the first image."""
        shape = self._sources[0].shape
        tile = live_tile(self.model.network, depth, shape)
        geometry = Geometry(self._network, depth, shape)
        core = geometry.cores(tile)[0]
        sides = [high - low for (low, high), _ in map(geometry.window, core, (0, 1))]
        channels = self.model.config.in_channels
        x = torch.zeros((1, channels, *sides), device=self._device)
        x = x.to(memory_format=torch.channels_last)

        def work() -> None:
            self._network(x, depth, last_only=True)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        peak = peak_bytes(work) + x.nbytes
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
        pixels = math.prod(stop - start for start, stop in core)
        return DepthCost(depth, 1e9 * min(seconds) / pixels, peak / 1e6)


def live_tile(network: SegmentationNet, depth: int, shape: tuple[int, int]) -> int:
    """Return the side of the tiles of a plane: all of a small one, else 256 or 512."""
    whole = default_tile(shape)
    if whole >= max(shape):
        return whole
    return _SMALL if network.halo(depth) <= _NARROW else whole


def disagreement(heads: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return 0 to 1 per pixel for probabilities (K, h, w), see `Prediction`."""
    mean = torch.stack(list(heads)).mean(0)
    entropy = torch.special.entr(mean).sum(0)
    most = float(len(mean))
    if len(heads) > 1:
        each = [torch.special.entr(head).sum(0) for head in heads]
        entropy = entropy - torch.stack(each).mean(0)
        most = min(most, float(len(heads)))
    result: torch.Tensor = (entropy / math.log(most)).clamp(0, 1)
    return result


def _kind(wishes: Wishes) -> tuple[int | None, str, bool, bool]:
    return wishes.depth, wishes.heads, wishes.probabilities, wishes.uncertainty


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


def _softmaxes(plane: PlanePredictor, core: Core) -> list[torch.Tensor]:
    """Return the heads' probabilities, from smaller parts where memory is short."""
    try:
        return plane.softmaxes(core)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    rows: dict[int, list[list[torch.Tensor]]] = {}
    for part in reversed(smaller_parts(plane.geometry, core)):
        rows.setdefault(part.rows[0], []).append(_softmaxes(plane, part))
    bands = [[torch.cat(h, -1) for h in zip(*r, strict=True)] for r in rows.values()]
    return [torch.cat(head, -2) for head in zip(*bands, strict=True)]
