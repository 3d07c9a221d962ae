"""Where training patches are drawn: around annotated pixels, no class starved."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Draw(NamedTuple):
    """Places of one batch: which image, and row and column of the patch's centre."""

    image: NDArray[np.int64]  # (N,)
    centres: NDArray[np.int64]  # (N, 2)


class PatchSampler:
    """Draws patch centres near annotated pixels.

    An (image, class) pair is drawn with a probability that grows with the square root
    of its number of annotated pixels, which feeds rare classes without forgetting
    common ones; then one of its pixels, which lands anywhere inside the patch.

    Parameters
    ----------
    targets : list of ndarray of shape (Y, X) and dtype uint8
        0 = not annotated, v = class v - 1.
    patch : int
        Side of a patch in pixels.
    rng : numpy.random.Generator
        Source of all choices; its state is the sampler's only memory.

    Raises
    ------
    ValueError
        If nothing is annotated.
    """

    def __init__(
        self, targets: list[NDArray[np.uint8]], patch: int, rng: np.random.Generator
    ) -> None:
        self._patch = patch
        self._rng = rng
        self._images: list[int] = []
        self._points: list[NDArray[np.int32]] = []
        for image, target in enumerate(targets):
            rows, columns = np.nonzero(target)
            values = target[rows, columns]
            points = np.stack([rows, columns], axis=1).astype(np.int32)
            for value in np.unique(values):
                self._images.append(image)
                self._points.append(points[values == value])
        if not self._points:
            raise ValueError(
                "`annotations` must have annotated pixels, got none. Paint a few "
                "strokes of each class first."
            )
        weights = np.sqrt([len(p) for p in self._points])
        self._probability = weights / weights.sum()

    def draw(self, n: int) -> Draw:
        """Draw `n` patches; the centres shift by up to half the patch, less 8 px."""
        groups = self._rng.choice(len(self._points), size=n, p=self._probability)
        ranks = self._rng.random(n)
        reach = max(0, self._patch // 2 - 8)
        shift = self._rng.integers(-reach, reach + 1, size=(n, 2))
        points = np.stack(
            [
                self._points[g][int(r * len(self._points[g]))]
                for g, r in zip(groups, ranks, strict=True)
            ]
        )
        index = np.asarray([self._images[g] for g in groups], np.int64)
        return Draw(index, points.astype(np.int64) + shift)
