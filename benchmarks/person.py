"""A simulated person who paints strokes where labels are wrong, and takes time for it.

A stroke takes 1.5 s to look and move and its length at some px/s of an image that fills
a view of 600 px. It stays inside one region of the truth, away from the border, and now
and then the hand goes straight on where it should not, and slips out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, label

VIEW, BRUSH = 600.0, 4.0  # px on screen
LOOK, MOVE = 1.0, 0.5  # s before each stroke
LENGTH, SPREAD = 80.0, 0.5  # median px on screen, and deviation of its logarithm
SLIP, FAR = 0.15, (3.0, 10.0)  # share of careless strokes, and how far one gets out
_PAD = 12  # px; more than the hand looks ahead


@dataclass
class Stroke:
    """Where the brush went, in pixels of the image."""

    image: int
    label: int
    radius: float
    points: NDArray[np.int64]
    seconds: float = 0.0  # to look, to move and to paint

    def paint(self, target: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a copy of `target` with the stroke over it."""
        line = np.ones(target.shape, bool)
        line[tuple(self.points.T)] = False
        near = distance_transform_edt(line) <= self.radius
        return np.where(near, np.uint8(self.label), target)


class Person:
    """Looks at labels, and paints one stroke after the other where they are wrong."""

    def __init__(
        self, truths: list[NDArray[np.uint8]], seed: int, speed: float = 60.0
    ) -> None:
        self._truths, self._speed = truths, speed
        self._rng = np.random.default_rng(seed)
        self._zooms = [VIEW / max(t.shape) for t in truths]
        self._classes = range(1, 1 + max(int(t.max()) for t in truths))
        self._first = list(self._classes)

    def next(self, shown: list[NDArray[np.uint8]] | None) -> Stroke:
        """Return the next stroke."""
        anywhere = [t > 0 for t in self._truths]
        if self._first or shown is None:
            classes = [self._first.pop(0)] if self._first else self._classes
            found = self._regions(anywhere, classes)
            found = [f for f in found if f[0] == found[0][0]]  # all in one image
        else:
            # What is thinner on screen is taken for the width of a border.
            wrong = [
                distance_transform_edt((a != t) & (t > 0)) >= max(1.0, 1.5 / zoom)
                for a, t, zoom in zip(shown, self._truths, self._zooms, strict=True)
            ]
            found = self._regions(wrong, self._classes)
            found = found or self._regions(anywhere, self._classes)
        sizes = np.array([size for *_, size in found])
        return self._stroke(
            *found[self._rng.choice(len(found), p=sizes / sizes.sum())][:3]
        )

    def _regions(self, where: list[NDArray[np.bool_]], classes: Any) -> list[Any]:
        """Return image, class, pixels and size on screen of connected regions."""
        found = []
        for i, truth in enumerate(self._truths):
            for k in classes:
                regions, n = label(where[i] & (truth == k))
                sizes = np.bincount(regions.ravel()) * self._zooms[i] ** 2
                found += [(i, k, regions == r, sizes[r]) for r in range(1, n + 1)]
        return found

    def _stroke(self, image: int, k: int, wanted: NDArray[np.bool_]) -> Stroke:
        """Return the longest of three tries: nobody begins where there is no room."""
        rng, zoom = self._rng, self._zooms[image]
        clear = distance_transform_edt(self._truths[image] == k)
        places = np.argwhere(wanted)
        length = np.clip(LENGTH * rng.lognormal(0, SPREAD), 15, 300) / zoom
        slip = rng.uniform(*FAR) / zoom if rng.random() < SLIP else 0.0
        tries = []
        for _ in range(3):
            starts = places[rng.integers(len(places), size=3)]
            start = max(starts, key=lambda p: clear[tuple(p)])
            radius = min(BRUSH / 2 / zoom, max(0.5, 0.7 * clear[tuple(start)] - 1))
            path = _walk(rng, clear, wanted, start, radius, length, slip)
            tries.append(Stroke(image, k, float(radius), path))
        best = max(tries, key=lambda t: len(t.points))
        pixels = np.linalg.norm(np.diff(best.points, axis=0), axis=1).sum()
        best.seconds = LOOK + MOVE + float(pixels) * zoom / self._speed
        return best


def _walk(
    rng: np.random.Generator,
    clear: NDArray[np.float64],
    wanted: NDArray[np.bool_],
    start: NDArray[np.int64],
    radius: float,
    length: float,
    slip: float,
) -> NDArray[np.int64]:
    """Go on smoothly where there is room, rather through what is wanted.

    With `slip`, the hand looks away on its way, until it is so many pixels outside.
    """
    need = radius + 1.0
    clear, wanted = np.pad(clear, _PAD), np.pad(wanted, _PAD)
    position, path = start + float(_PAD), [start]

    def worth(angles: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.zeros(len(angles))
        for ahead in (2.0, 5.0, 9.0):
            way = position + ahead * np.stack([np.sin(angles), np.cos(angles)], 1)
            y, x = np.rint(way).astype(int).T
            total += np.minimum(clear[y, x] / (2 * need), 1) + 0.3 * wanted[y, x]
        return total / 3

    angles = rng.uniform(0, 2 * np.pi) + np.arange(12) * np.pi / 6
    heading, drift, outside = angles[np.argmax(worth(angles))], 0.0, 0
    turns = np.linspace(-0.36, 0.36, 7)
    careful = length * (rng.uniform(0.3, 1) if slip else 1)
    while True:
        drift = 0.9 * drift + rng.normal(0, 0.015)
        heading += drift
        if len(path) <= careful:
            options = heading + turns
            heading = options[np.argmax(worth(options) - 0.6 * np.abs(turns))]
        position = position + np.array((np.sin(heading), np.cos(heading)))
        y, x = np.rint(position).astype(int)
        outside += clear[y, x] == 0
        if not (_PAD <= y < len(clear) - _PAD and _PAD <= x < len(clear[0]) - _PAD):
            break
        if outside > slip or len(path) > length or (not slip and clear[y, x] < need):
            break
        path.append(np.array((y - _PAD, x - _PAD)))
    return np.array(path)
