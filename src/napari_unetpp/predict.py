"""Prediction tile by tile: seamless, in bounded memory, what is looked at first."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from napari_unetpp.budget import free_bytes, tile_side
from napari_unetpp.config import PredictConfig, check_number
from napari_unetpp.device import (
    guarded,
    is_out_of_memory,
    release_memory,
    resolve_device,
)
from napari_unetpp.errors import DeviceMemoryError
from napari_unetpp.model import Model, check_depth
from napari_unetpp.networks.blocks import GroupNorm, measure_norms
from napari_unetpp.preprocess import Planes, Preprocessing, read_window

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from napari_unetpp.networks import SegmentationNet

# px of mirrored image around it: zeros at the border would be learned as a class
_MARGIN = 32
_TILE = 512
_WHOLE = (
    768  # images up to this side are one tile, and their norms measured on all of it
)
_SAMPLES = (256, 128, 64)  # sides of the 3 x 3 crops that larger images' norms are
# measured on; the smaller ones where memory is short

Span = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """A finished part of a prediction.

    Attributes
    ----------
    slices : tuple of int and slice
        Where it belongs in the labels: an int per leading axis, then two slices.
    labels : ndarray of shape (h, w) and dtype uint8
        Class values, coded as the model's annotations.
    probabilities : ndarray of shape (K, h, w) and dtype float32, or None
        Sums to 1 over K; None unless asked for.
    """

    slices: tuple[int | slice, ...]
    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float32] | None = None


class Core(NamedTuple):
    """A part of a plane that one step predicts: its rows and its columns."""

    rows: Span
    columns: Span


class Geometry:
    """Which window of the mirrored image a core of the labels needs."""

    def __init__(
        self, network: SegmentationNet, depth: int, shape: tuple[int, int]
    ) -> None:
        self._network = network
        self._multiple = network.multiple(depth)
        self._halo = network.halo(depth)
        self._border = self.round_up(_MARGIN)
        self._shape = shape

    def round_up(self, n: int) -> int:
        return -(-n // self._multiple) * self._multiple

    def cores(self, tile: int) -> list[Core]:
        height, width = self._shape
        tile = self.round_up(tile)
        return [
            Core((y, min(y + tile, height)), (x, min(x + tile, width)))
            for y in range(0, height, tile)
            for x in range(0, width, tile)
        ]

    def window(self, span: Span, axis: int) -> tuple[Span, int]:
        """Return the window along an axis and where the core begins in its output.

        The same network on the whole mirrored image would see the same zeros at its
        outer border, so windows end where that image ends and never further out.
        """
        start, stop = span
        margin = self._network.margin
        if margin:
            return (
                start - margin,
                start - margin + self._network.valid_size(stop - start),
            ), 0
        end = self.round_up(self._shape[axis] + 2 * self._border) - self._border
        low = max(-self._border, start - self._halo)
        high = min(end, self.round_up(stop + self._halo))
        return (low, high), start - low

    def split(self, core: Core) -> list[Core]:
        """Return up to four parts of a core, or nothing when it is small already."""
        parts = [self._halves(span) for span in core]
        if all(len(p) == 1 for p in parts):
            return []
        return [Core(rows, columns) for rows in parts[0] for columns in parts[1]]

    def _halves(self, span: Span) -> list[Span]:
        half = self.round_up((span[1] - span[0]) // 2)
        if half < 64 or span[0] + half >= span[1]:
            return [span]
        return [(span[0], span[0] + half), (span[0] + half, span[1])]


class PlanePredictor:
    """One plane, ready to be predicted: its grey-value limits and norms are known.

    Parameters
    ----------
    network : SegmentationNet
        In evaluation mode; the statistics of its norms are set to those of the plane.
    plane : Plane or array of shape (C, Y, X)
        What is predicted.
    preprocessing : Preprocessing
        How grey values are scaled.
    depth : int
        The head to use.
    all_heads : bool
        Whether `softmaxes` returns the heads 1 to `depth`, not `depth` alone.
    tile : int or None
        Side of the cores that will be asked for; None: the whole plane if it is small.
    limits : ndarray or None
        What `preprocessing.limits` told of the plane, if it has been asked before.
    """

    def __init__(
        self,
        network: SegmentationNet,
        plane: Any,
        preprocessing: Preprocessing,
        *,
        depth: int,
        all_heads: bool = False,
        tile: int | None = None,
        limits: NDArray[np.float64] | None = None,
    ) -> None:
        self._network = network
        self._plane = plane
        self._preprocessing = preprocessing
        self._all_heads = all_heads
        self._depth = depth
        self.limits = preprocessing.limits(plane) if limits is None else limits
        height, width = plane.shape[1:]
        self.geometry = Geometry(network, depth, (height, width))
        self._parameter = next(network.parameters())
        self._whole = Core((0, height), (0, width))
        self._known: list[
            torch.Tensor
        ] = []  # the heads on the whole plane, once measured
        if any(isinstance(m, GroupNorm) for m in network.modules()):
            self._measure(tile)

    def _measure(self, tile: int | None) -> None:
        """Fix the norms' statistics, on less of the plane where memory runs out."""
        side = max(self._plane.shape[1:])
        for sample in (0, *_SAMPLES) if side <= _WHOLE else _SAMPLES:
            try:
                heads = self._measured(sample)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                continue
            if not sample and (tile is None or tile >= side):
                self._known = heads if self._all_heads else heads[-1:]
            return
        raise DeviceMemoryError(_NO_MEMORY)

    @torch.inference_mode()
    def _measured(self, sample: int) -> list[torch.Tensor]:
        """Measure on crops of side `sample`, or (0) on the whole plane."""
        cores = [self._whole]
        if sample:
            rows, columns = (
                [
                    (int(a), int(a) + sample)
                    for a in np.linspace(0, max(0, n - sample), 3)
                ]
                for n in self._plane.shape[1:]
            )
            cores = [Core(y, x) for y in rows for x in columns]
        batch = torch.cat([self._read(core, crop=bool(sample)) for core in cores])
        return measure_norms(self._network, batch, self._depth)

    def _read(self, core: Core, *, crop: bool = False) -> torch.Tensor:
        if crop and not self._network.margin:
            rows, columns = core.rows, core.columns
        else:
            rows, columns = (self.geometry.window(s, a)[0] for a, s in enumerate(core))
        window = read_window(
            self._plane, rows, columns, self._preprocessing, self.limits
        )
        batch = torch.from_numpy(np.ascontiguousarray(window))[None]
        return batch.to(self._parameter.device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def softmaxes(self, core: Core) -> list[torch.Tensor]:
        """Return (K, h, w) for a core, one per head."""
        if self._known and core == self._whole:
            heads = self._known
        else:
            batch = self._read(core)
            heads = self._network(batch, self._depth, last_only=not self._all_heads)
        (top, left) = (self.geometry.window(s, a)[1] for a, s in enumerate(core))
        height, width = (stop - start for start, stop in core)
        return [
            logits[0, :, top : top + height, left : left + width].float().softmax(0)
            for logits in heads
        ]

    @torch.inference_mode()
    def probabilities(self, core: Core) -> torch.Tensor:
        """Return (K, h, w) for a core: the last head's, or the mean of all."""
        parts = self.softmaxes(core)
        total = parts[0] / len(parts)
        for part in parts[1:]:
            total = total + part / len(parts)
        return total


def default_tile(shape: tuple[int, int]) -> int:
    """Return the side of a tile for a plane: all of a small one, else 512 pixels."""
    return max(shape) if max(shape) <= _WHOLE else _TILE


def predict_tiles(
    model: Model,
    image: Any,
    *,
    first: Sequence[int | slice] | None = None,
    probabilities: bool = False,
    depth: int | None = None,
    heads: Literal["last", "mean"] = "last",
    channel_axis: int | None = None,
    tile: int | None = None,
    memory: float | None = None,
    device: str | torch.device | None = None,
) -> Iterator[Tile]:
    """Predict an image part by part.

    Parameters
    ----------
    model : Model
        Left unchanged.
    image : array of shape (..., Y, X), with channels at `channel_axis`
        Any real dtype; leading axes are planes. Lazy arrays are read window by window.
    first : sequence of int and slice, optional
        The region to do first, as an index into the labels; a pair of slices means
        that region of every plane.
    probabilities : bool, optional
        Whether tiles carry probabilities.
    depth : int or None, optional
        UNet++ head, 1 to its levels; None is the deepest.
    heads : {"last", "mean"}, optional
        "mean" averages the probabilities of the heads up to `depth` [1]_.
    channel_axis : int or None, optional
        Axis of the channels; None for a single channel.
    tile : int or None, optional
        Side of a tile in pixels (16 to 16384, rounded up to what the network needs);
        None: the whole plane up to 768 x 768, else as `memory` allows, up to about
        1400 with the context around it.
    memory : float or None, optional
        What a tile may take, in 10^9 bytes (0.01 to 1000); None: a fourth of what is
        free, at most 4. The result does not depend on it.
    device : str, torch.device or None, optional
        None: the fastest there is.

    Yields
    ------
    tile : Tile
        Disjoint parts that together cover the image.

    Raises
    ------
    ValueError
        If an argument is out of range or the image does not fit the model.
    DeviceMemoryError
        If even a small tile does not fit on the device.
    DeviceError
        If the device has failed, now or earlier in this process.

    Notes
    -----
    Tiles overlap by each network's receptive field and are cropped, not blended. Group
    norms take their statistics once per plane, so no pixel depends on the tiling.

    References
    ----------
    .. [1] Zhou et al., UNet++, DLMIA 2018, :DOI:`10.1007/978-3-030-00889-5_1`
    """
    config = PredictConfig(tile, depth, heads)
    if memory is not None:
        check_number("memory", memory, 0.01, 1000)
    depth = check_depth(model.network, depth)
    planes = Planes(image, channel_axis=channel_axis)
    if planes.channels != model.config.in_channels:
        raise ValueError(
            f"`image` must have {model.config.in_channels} channel(s) for this model, "
            f"got {planes.channels} (shape {tuple(np.shape(image))}, "
            f"channel_axis={channel_axis})."
        )
    where = _Order(first, planes)
    target = resolve_device(device)
    network = working_copy(model.network, target)
    side = tile
    if side is None and max(planes.shape) > _WHOLE:
        side = tile_side(
            network,
            depth,
            planes.shape,
            memory=free_bytes(target) if memory is None else 1e9 * memory,
            all_heads=heads == "mean",
        )
    cores = Geometry(network, depth, planes.shape).cores(side or max(planes.shape))
    tiles = _tiles(model, network, planes, config, depth, where, cores, probabilities)
    return _guarded(tiles, target)


def _guarded(tiles: Iterator[Tile], device: torch.device) -> Iterator[Tile]:
    with guarded(device):
        yield from tiles


def _tiles(
    model: Model,
    network: SegmentationNet,
    planes: Planes,
    config: PredictConfig,
    depth: int,
    where: _Order,
    cores: list[Core],
    probabilities: bool,
) -> Iterator[Tile]:
    shift = 1 if model.unlabelled == 0 else 0
    geometry = Geometry(network, depth, planes.shape)
    for number, queue in where.jobs(cores):
        plane = PlanePredictor(
            network,
            planes.plane(number),
            model.preprocessing,
            depth=depth,
            all_heads=config.heads == "mean",
            tile=config.tile,
        )
        lead: tuple[int | slice, ...] = planes.index(number)
        queue.reverse()
        while queue:
            core = queue.pop()
            try:
                found: torch.Tensor | None = plane.probabilities(core).cpu()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                found = None
            if found is None:  # only here are the error's frames, and tensors, gone
                release_memory()
                queue += smaller_parts(geometry, core)
                continue
            labels = most_likely(found, shift).numpy()
            slices = (*lead, slice(*core.rows), slice(*core.columns))
            yield Tile(slices, labels, found.numpy() if probabilities else None)


_NO_MEMORY = (
    "The device has no memory left even for a small tile. Close other programs, "
    "choose a smaller depth, or use device='cpu'."
)


def most_likely(probabilities: torch.Tensor, first: int) -> torch.Tensor:
    """Return the class of each pixel, (h, w) uint8, of (K, h, w).

    Parameters
    ----------
    probabilities : Tensor
        Where two are equal the class that comes first is taken.
    first : int
        Value of the first class.
    """
    # argmax over the first axis takes fifty times as long (torch 2.13, CPU).
    best = probabilities[0]
    labels = torch.full_like(best, first, dtype=torch.uint8)
    for value, other in enumerate(probabilities[1:], start=first + 1):
        labels.masked_fill_(other > best, value)
        best = torch.maximum(best, other)
    return labels


def smaller_parts(geometry: Geometry, core: Core) -> list[Core]:
    """Return smaller cores, the first one last, or raise DeviceMemoryError."""
    parts = geometry.split(core)
    if not parts:
        raise DeviceMemoryError(_NO_MEMORY)
    return parts[::-1]


def predict(
    model: Model,
    image: Any,
    *,
    depth: int | None = None,
    heads: Literal["last", "mean"] = "last",
    channel_axis: int | None = None,
    tile: int | None = None,
    memory: float | None = None,
    device: str | torch.device | None = None,
) -> NDArray[np.uint8]:
    """Label every pixel of `image`.

    Parameters
    ----------
    model, image, depth, heads, channel_axis, tile, memory, device
        As for `predict_tiles`.

    Returns
    -------
    labels : ndarray of shape (..., Y, X) and dtype uint8
        Class values, coded as the model's annotations: 1 to K where `model.unlabelled`
        is 0, else 0 to K - 1.

    Raises
    ------
    ValueError, DeviceMemoryError
        As `predict_tiles`.
    """
    tiles = predict_tiles(
        model,
        image,
        depth=depth,
        heads=heads,
        channel_axis=channel_axis,
        tile=tile,
        memory=memory,
        device=device,
    )
    labels = np.zeros(_label_shape(image, channel_axis), np.uint8)
    for part in tiles:
        labels[part.slices] = part.labels
    return labels


def predict_proba(
    model: Model,
    image: Any,
    *,
    depth: int | None = None,
    heads: Literal["last", "mean"] = "last",
    channel_axis: int | None = None,
    tile: int | None = None,
    memory: float | None = None,
    device: str | torch.device | None = None,
) -> NDArray[np.float32]:
    """Return the probability of every class at every pixel.

    Parameters
    ----------
    model, image, depth, heads, channel_axis, tile, memory, device
        As for `predict_tiles`.

    Returns
    -------
    probabilities : ndarray of shape (K, ..., Y, X) and dtype float32
        Sums to 1 over K.

    Raises
    ------
    ValueError, DeviceMemoryError
        As `predict_tiles`.
    """
    tiles = predict_tiles(
        model,
        image,
        probabilities=True,
        depth=depth,
        heads=heads,
        channel_axis=channel_axis,
        tile=tile,
        memory=memory,
        device=device,
    )
    shape = (len(model.classes), *_label_shape(image, channel_axis))
    result = np.zeros(shape, np.float32)
    for part in tiles:
        result[(slice(None), *part.slices)] = part.probabilities
    return result


def _label_shape(image: Any, channel_axis: int | None) -> tuple[int, ...]:
    planes = Planes(image, channel_axis=channel_axis)
    return (*planes.leading, *planes.shape)


def working_copy(network: SegmentationNet, device: torch.device) -> SegmentationNet:
    """Return a network whose norms may be measured while others use the original."""
    own = copy.deepcopy(network).to(device)
    return own.to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


class _Order:
    """Which planes and cores come first."""

    def __init__(self, first: Sequence[int | slice] | None, planes: Planes) -> None:
        self._planes = planes
        shape = (*planes.leading, *planes.shape)
        whole = (slice(None),) * len(shape)
        try:
            key = whole if first is None else tuple(first)
            key = whole[: len(shape) - 2] + key if len(key) == 2 else key
            self._ranges = [
                range(n)[k] if isinstance(k, slice) else (range(n)[k],)
                for k, n in zip(key, shape, strict=True)
            ]
        except (TypeError, ValueError, IndexError):
            raise ValueError(
                f"`first` must be 2 or {len(shape)} whole numbers or slices within the "
                f"labels of shape {shape}, got {first!r}."
            ) from None

    def jobs(self, cores: list[Core]) -> Iterator[tuple[int, list[Core]]]:
        """Yield planes and what to do of each: the region of all planes, then the rest.

        One plane in view is finished at once, so that it need not be read twice.
        """
        planes = range(len(self._planes))
        first = [n for n in planes if self._wanted(n)]
        cores = sorted(cores, key=self._distance)
        inside = [core for core in cores if self._distance(core)[0] == 0]
        outside = [core for core in cores if self._distance(core)[0] > 0]
        if len(first) == 1 or not outside or not inside:
            yield from ((n, [*cores]) for n in first)
        else:
            yield from ((n, [*inside]) for n in first)
            yield from ((n, [*outside]) for n in first)
        wanted = set(first)
        yield from ((n, [*cores]) for n in planes if n not in wanted)

    def _wanted(self, number: int) -> bool:
        place = self._planes.index(number)
        return all(i in r for i, r in zip(place, self._ranges, strict=False))

    def _distance(self, core: Core) -> tuple[float, float]:
        """Return the gap between core and region, and the distance of their centres."""
        gap = centre = 0.0
        for (start, stop), r in zip(core, self._ranges[-2:], strict=True):
            low, high = (min(r), max(r) + 1) if len(r) else (0, 0)
            gap += max(0, low - stop + 1, start - high + 1)
            centre += ((start + stop) / 2 - (low + high) / 2) ** 2
        return gap, centre
