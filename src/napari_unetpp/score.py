"""The held-out score: an estimate of the IoU on whole images, with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from napari_unetpp.augment import cut_windows
from napari_unetpp.config import check_number
from napari_unetpp.device import autocast
from napari_unetpp.heldout import BLOCK
from napari_unetpp.networks.blocks import measure_norms, release_norms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from napari_unetpp.networks import SegmentationNet

MIN_PIXELS = 10  # of every class: fewer are less than a dab of the thinnest brush
MIN_BLOCKS = 3  # in all: of fewer, a bootstrap has nothing to draw from
_HELD = 10  # windows with held-out pixels (two per class if those are more)
_WHOLE = 6  # windows anywhere in the annotated images, and of each at least
_EACH, _MOST = 3, 12  # so many, which are not more than that in all
_CELL = 4  # px; side of the cells in which borders are blurred
_BORDER = 3.0  # px; how far strokes leave open where a border lies
_BEYOND = 0.1  # standard deviation of what neither strokes nor windows can tell
_TEMPERATURES = np.geomspace(1, 8, 13)
_REPLICATES = 200


@dataclass(frozen=True)
class Score:
    """An estimate of the IoU on all pixels of the annotated images.

    Attributes
    ----------
    mean : float
        Mean IoU over the classes that have strokes.
    low, high : float
        Interval that should hold the truth in 90 % of trainings.
    per_class : tuple of float
        IoU of each class; NaN of one that has no strokes.
    pixels : int
        Held-out painted pixels that it comes from.
    """

    mean: float
    low: float
    high: float
    per_class: tuple[float, ...]
    pixels: int

    @classmethod
    def known(cls, mean: float) -> Score:
        """Return a mean IoU that was measured on other images, not estimated."""
        return cls(mean, mean, mean, (), 0)

    def to_list(self) -> list[Any]:
        """Return it, JSON-able."""
        classes = [v if np.isfinite(v) else None for v in self.per_class]
        return [self.mean, self.low, self.high, classes, self.pixels]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Score:
        """Return what `to_list` has returned; ValueError if it is something else."""
        mean, low, high, classes, pixels = values
        for value in (mean, low, high, *(v for v in classes if v is not None)):
            check_number("score", value, 0, 1)
        check_number("pixels", pixels, 0, 2**53, whole=True)
        per_class = (np.nan if v is None else float(v) for v in classes)
        return cls(float(mean), float(low), float(high), tuple(per_class), pixels)

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {(self.high - self.low) / 2:.2f}"

    def words(self, classes: Sequence[str]) -> str:
        """Return what it says, its interval, and each class's own value."""
        values = (
            f"{name} {value:.2f}"
            for name, value in zip(classes, self.per_class, strict=False)
            if np.isfinite(value)
        )
        return (
            f"{self.low:.2f} to {self.high:.2f} (90 %): estimated IoU on the whole "
            f"images, from {self.pixels:,} painted pixels that training never saw. "
            f"{', '.join(values)}."
        )


class Counts(NamedTuple):
    """What is measured of one head, at each temperature.

    Attributes
    ----------
    pixels : ndarray of shape (B, K)
        Held-out pixels by block and true class.
    right : ndarray of shape (B, K)
        Those of them whose label is right.
    sure : ndarray of shape (B, K, T)
        Sum over them of the label's probability.
    tables : ndarray of shape (W, T, K, K)
        Expected confusion of each window: rows the truth, columns the labels.
    """

    pixels: NDArray[np.float64]
    right: NDArray[np.float64]
    sure: NDArray[np.float64]
    tables: NDArray[np.float64]


def estimate(counts: Counts, painted: NDArray[np.bool_], *, seed: int) -> Score:
    """Estimate the IoU on all pixels.

    Parameters
    ----------
    counts : Counts
        Of one head.
    painted : ndarray of shape (K,) and dtype bool
        Which classes have strokes.
    seed : int
        Of the bootstrap.

    Returns
    -------
    score : Score

    Notes
    -----
    IoU on painted pixels alone is far too high: strokes have other shares of the
    classes than images, and keep away from borders. So the held-out pixels tell how
    far the network's probabilities can be believed: as the temperature [1]_ at which
    it is as sure of them as it is right, each class weighing the same (never below 1:
    easy pixels cannot prove a network too modest). The probabilities over whole
    windows, blurred by the few pixels within which strokes leave a border open, tell
    the IoU that is to be expected. Where no temperature makes a network modest enough,
    its hits are scaled down to how often it was right.

    The interval is a bootstrap over held-out blocks and over windows, to which the
    spread of the errors is added that this estimate showed where the truth is known
    (``benchmarks/heldout.py``).

    References
    ----------
    .. [1] Guo et al., On Calibration of Modern Neural Networks, ICML 2017,
           :arXiv:`1706.04599`
    """
    rng = np.random.default_rng(seed)
    blocks, windows = len(counts.pixels), len(counts.tables)
    one = np.ones((1, blocks)), np.ones((1, windows))
    value = _ious(counts, painted, *one)[0]
    drawn = [
        rng.multinomial(n, np.full(n, 1 / n), size=_REPLICATES).astype(float)
        for n in (blocks, windows)
    ]
    spread = np.nanmean(_ious(counts, painted, *drawn), axis=1)
    mean = float(np.nanmean(value))
    ends = np.nanquantile(spread, (0.05, 0.95))
    beyond = 1.645 * _BEYOND
    low = mean - float(np.hypot(max(0, mean - ends[0]), beyond))
    high = mean + float(np.hypot(max(0, ends[1] - mean), beyond))
    return Score(
        mean,
        max(0.0, low),
        min(1.0, high),
        tuple(float(v) for v in value),
        int(counts.pixels.sum()),
    )


def _ious(
    counts: Counts,
    painted: NDArray[np.bool_],
    of_blocks: NDArray[np.float64],
    of_windows: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return the IoU of each class, (R, K), for R sets of weights."""
    # Each class weighs the same; one that no drawn block holds weighs nothing.
    weight = 1 / np.maximum(of_blocks @ counts.pixels, 1)
    right = ((of_blocks @ counts.right) * weight).sum(1)
    sure = np.einsum("rb,bkt,rk->rt", of_blocks, counts.sure, weight)
    modest = sure <= right[:, None] + 1e-9
    best = np.where(modest.any(1), modest.argmax(1), -1)
    kept = np.minimum(1, right / np.maximum(sure[np.arange(len(best)), best], 1e-9))
    of_class = np.diagonal(counts.tables, axis1=2, axis2=3)  # (W, T, K)
    both = counts.tables.sum(2) + counts.tables.sum(3)
    hits, total = (
        np.einsum("rw,wrk->rk", of_windows, each[:, best]) for each in (of_class, both)
    )
    hits = hits * kept[:, None]
    union = total - hits
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(painted & (union > 0), hits / union, np.nan)


class _Window(NamedTuple):
    """Where a window lies, and the held-out pixels that it scores."""

    image: int
    centre: tuple[int, int]
    rows: NDArray[np.int64]  # in the network's output
    columns: NDArray[np.int64]
    truth: NDArray[np.int64]
    block: NDArray[np.int64]


class Scorer:
    """Measures a network on held-out pixels and on windows of the annotated images.

    Parameters
    ----------
    images : list of Tensor of shape (C, Y, X)
        What is annotated.
    scoring : list of ndarray of shape (Y, X) and dtype uint8
        Held-out pixels of each: 0 = none, v = class v - 1.
    painted : ndarray of shape (K,) and dtype bool
        Which classes have strokes.
    side, margin : int
        Of a window in pixels, and what the network cuts off at each of its sides.
    seed : int
        Of the windows and the bootstrap.

    Attributes
    ----------
    enough : bool
        Whether every class that has strokes has enough held-out pixels.
    """

    def __init__(
        self,
        images: list[Tensor],
        scoring: list[NDArray[np.uint8]],
        painted: NDArray[np.bool_],
        *,
        side: int,
        margin: int,
        seed: int,
    ) -> None:
        self._images, self._painted = images, painted
        self._side, self._margin, self._seed = side, margin, seed
        self._half = side // 2 - margin
        rng = np.random.default_rng(seed)
        self._held = self._held_windows(scoring, rng)
        truths = np.concatenate([w.truth for w in self._held] or [np.zeros(0, int)])
        pixels = np.bincount(truths, minlength=len(painted))
        blocks = {int(b) for w in self._held for b in w.block}
        self._blocks = max(blocks, default=-1) + 1
        self.enough = len(blocks) >= MIN_BLOCKS and bool(
            np.all(pixels[painted] >= MIN_PIXELS)
        )
        self._places = self._anywhere(rng)

    def _held_windows(
        self, scoring: list[NDArray[np.uint8]], rng: np.random.Generator
    ) -> list[_Window]:
        """Place windows on held-out blocks, each class in turn."""
        points = [np.nonzero(target) for target in scoring]
        image = np.repeat(np.arange(len(points)), [len(y) for y, _ in points])
        y, x = (np.concatenate([p[axis] for p in points]) for axis in (0, 1))
        values = [
            t[p].astype(np.int64) - 1 for t, p in zip(scoring, points, strict=True)
        ]
        truth = np.concatenate(values)
        place = np.stack([image, y // BLOCK, x // BLOCK], axis=1)
        blocks, block = np.unique(place, axis=0, return_inverse=True)
        block = block.ravel()
        classes = range(len(self._painted))
        shuffled = [rng.permutation(np.unique(block[truth == c])) for c in classes]
        turns = chain.from_iterable(zip_longest(*(s.tolist() for s in shuffled)))
        reach = min(self._half, max(BLOCK // 2, self._half - BLOCK // 2))
        free = np.ones(len(truth), bool)
        windows: list[_Window] = []
        for number in (n for n in dict.fromkeys(turns) if n is not None):
            if len(windows) == max(_HELD, 2 * len(self._painted)):
                break
            i, *corner = blocks[number].tolist()
            cy, cx = (c * BLOCK + BLOCK // 2 for c in corner)
            near = (np.maximum(cy - y, y + 1 - cy) <= reach) & (
                np.maximum(cx - x, x + 1 - cx) <= reach
            )
            taken = np.flatnonzero(free & near & (image == i))
            if not len(taken):
                continue
            free[taken] = False
            rows, columns = y[taken] - cy + self._half, x[taken] - cx + self._half
            windows.append(
                _Window(i, (cy, cx), rows, columns, truth[taken], block[taken])
            )
        return windows

    def _anywhere(self, rng: np.random.Generator) -> list[tuple[int, tuple[int, int]]]:
        """Place windows evenly over the images' area."""
        sizes = np.array([image[0].numel() for image in self._images], float)
        ends = np.cumsum(sizes) / sizes.sum()
        whole = min(_MOST, max(_WHOLE, _EACH * len(sizes)))
        places = []
        for k in range(whole):
            i = int(np.searchsorted(ends, (k + rng.random()) / whole))
            y, x = (
                int(
                    rng.integers(
                        min(self._half, n // 2), max(n - self._half, n // 2) + 1
                    )
                )
                for n in self._images[i].shape[1:]
            )
            places.append((i, (y, x)))
        return places

    @torch.inference_mode()
    def measure(
        self, network: SegmentationNet, prior: Sequence[float], *, half: bool = False
    ) -> dict[int, Score]:
        """Return the score at each depth; empty while there are too few strokes.

        Parameters
        ----------
        network : SegmentationNet
            On the images' device.
        prior : sequence of float
            What the user's model adds to its logits.
        half : bool, optional
            Compute in half precision where the device does.
        """
        if not self.enough:
            return {}
        network.eval()
        k, t = len(self._painted), len(_TEMPERATURES)
        found = {
            depth: Counts(
                np.zeros((self._blocks, k)),
                np.zeros((self._blocks, k)),
                np.zeros((self._blocks, k, t)),
                np.zeros((len(self._places), t, k, k)),
            )
            for depth in network.depths
        }
        look = partial(self._logits, network, prior, half)
        try:
            for image in range(len(self._images)):
                self._look_at(image, look, list(found.values()))
        finally:
            release_norms(network)
        return {
            depth: estimate(counts, self._painted, seed=self._seed)
            for depth, counts in found.items()
        }

    def _look_at(
        self,
        image: int,
        look: Callable[..., list[Tensor]],
        found: list[Counts],
    ) -> None:
        """Count one image's windows, with norms that are fixed as in prediction."""
        held = [w for w in self._held if w.image == image]
        places = [n for n, (i, _) in enumerate(self._places) if i == image]
        centres = [self._places[n][1] for n in places]
        if not held and not places:
            return
        heads = look(image, centres or [w.centre for w in held], fix=True)
        for row, (n, centre) in enumerate(zip(places, centres, strict=True)):
            inside = self._inside(image, centre, heads[0][row])
            for counts, logits in zip(found, heads, strict=True):
                counts.tables[n] = _table(logits[row], inside)
        for window in held:
            heads = look(image, [window.centre])
            for counts, logits in zip(found, heads, strict=True):
                there = window.block, window.truth
                seen = logits[0][:, window.rows, window.columns]
                right, sure = _beliefs(seen, window.truth)
                np.add.at(counts.pixels, there, 1)
                np.add.at(counts.right, there, right)
                np.add.at(counts.sure, there, sure)

    def _logits(
        self,
        network: SegmentationNet,
        prior: Sequence[float],
        half: bool,
        image: int,
        centres: list[tuple[int, int]],
        *,
        fix: bool = False,
    ) -> list[Tensor]:
        """Return each head's logits (N, K, h, w); `fix` measures the norms on them."""
        pixels = self._images[image]
        windows, _ = cut_windows(
            [pixels],
            [pixels[0].new_zeros(pixels.shape[1:])],
            [0] * len(centres),
            centres,
            self._side,
        )
        offset = torch.tensor(prior, device=pixels.device)[:, None, None]
        with autocast(pixels.device, half):
            heads = measure_norms(network, windows) if fix else network(windows)
        return [logits.float() + offset for logits in heads]

    def _inside(self, image: int, centre: tuple[int, int], logits: Tensor) -> Tensor:
        """Return 1 where an output lies in the image, 0 in its mirrored rest."""
        rows, columns = (
            (line >= 0) & (line < length)
            for c, length, side in zip(
                centre, self._images[image].shape[1:], logits.shape[1:], strict=True
            )
            for line in [torch.arange(side) + (c - self._half)]
        )
        return (rows[:, None] & columns[None, :]).to(logits)


def _beliefs(
    logits: Tensor, truth: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return whether each label of (K, N) is right, and its probability, (N, T)."""
    right = logits.argmax(0).cpu().numpy() == truth
    sure = torch.softmax(logits / _column(logits)[:, None, None], 1).amax(1)
    return right.astype(float), sure.T.cpu().numpy().astype(float)


def _table(logits: Tensor, inside: Tensor) -> NDArray[np.float64]:
    """Return the expected confusion of (K, h, w) at each temperature, (T, K, K).

    Blurring the labels sums to the same as blurring the probabilities, and is needed
    once for all temperatures.
    """
    k = len(logits)
    labels = functional.one_hot(logits.argmax(0), k).movedim(-1, 0) * inside
    cells = functional.avg_pool2d(labels[:, None], _CELL)
    # The average over a cell is a blur itself.
    sigma = (_BORDER**2 - (_CELL**2 - 1) / 12) ** 0.5 / _CELL
    line = torch.exp(-0.5 * (torch.arange(-3, 4).to(logits) / sigma) ** 2)
    line = line / line.sum()
    cells = functional.conv2d(cells, torch.outer(line, line)[None, None], padding=3)
    h, w = cells.shape[-2:]
    middle = logits[:, _CELL // 2 :: _CELL, _CELL // 2 :: _CELL][:, :h, :w]
    there = inside[_CELL // 2 :: _CELL, _CELL // 2 :: _CELL][:h, :w]
    believed = torch.softmax(middle / _column(logits)[:, None, None, None], 1) * there
    table = torch.einsum("tiyx,jyx->tij", believed, cells[:, 0])
    return table.cpu().numpy().astype(float)


def _column(like: Tensor) -> Tensor:
    return torch.as_tensor(_TEMPERATURES, dtype=like.dtype).to(like.device)
