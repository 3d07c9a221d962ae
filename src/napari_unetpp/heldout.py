"""Which annotated pixels never train: frozen blocks, a function of position and key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

BLOCK = 32  # px; held-out pixels come in whole blocks, so that neighbours stay together
RIM = 4  # px at the sides of a held-out block that neither train nor score
_CANDIDATES = 32  # keys that the first training chooses from
_MOST = 1 / 3  # of the pixels of a class that the choice takes from training
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class HeldOut:
    """What is held out for ever, whatever is painted, merged or erased later.

    Attributes
    ----------
    key : int
        The same key gives the same blocks.
    fraction : float
        Share of the blocks that is held out, 0 to 1.

    Notes
    -----
    Blocks of 32 x 32 pixels are chosen by the SplitMix64 hash of their position [1]_.
    Nothing in them trains; what is at least 4 pixels inside scores.

    References
    ----------
    .. [1] Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014,
           :DOI:`10.1145/2660193.2660195`
    """

    key: int
    fraction: float

    def blocks(self, shape: tuple[int, int], plane: int = 0) -> NDArray[np.bool_]:
        """Return which blocks of a plane with `shape` pixels are held out."""
        rows, columns = (-(-side // BLOCK) for side in shape)
        y = np.arange(rows, dtype=np.uint64)[:, None]
        x = np.arange(columns, dtype=np.uint64)[None, :]
        place = (y << np.uint64(24)) ^ x ^ (np.uint64(plane) << np.uint64(48))
        value = _hash(place ^ _hash(np.uint64(self.key % 2**64)))
        chosen: NDArray[np.bool_] = (value >> np.uint64(11)) / 2**53 < self.fraction
        return chosen

    def mask(self, shape: tuple[int, int], plane: int = 0) -> NDArray[np.bool_]:
        """Return which pixels of a plane never train.

        Parameters
        ----------
        shape : tuple of int
            Rows and columns of the plane.
        plane : int, optional
            Number of the plane in its stack.

        Returns
        -------
        mask : ndarray of shape `shape` and dtype bool
        """
        whole = self.blocks(shape, plane).repeat(BLOCK, 0).repeat(BLOCK, 1)
        return whole[: shape[0], : shape[1]]

    def split(
        self, targets: Sequence[NDArray[np.uint8]], planes: Sequence[int]
    ) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
        """Split annotations into what trains and what scores.

        Parameters
        ----------
        targets : sequence of ndarray of shape (Y, X) and dtype uint8
            0 = not annotated, v = class v - 1; not changed.
        planes : sequence of int
            Number of each target's plane in its stack.

        Returns
        -------
        training, scoring : lists of ndarray of shape (Y, X) and dtype uint8
            Never closer to each other than 4 pixels.
        """
        training, scoring = [], []
        for target, plane in zip(targets, planes, strict=True):
            mask = self.mask(target.shape, plane)
            training.append(np.where(mask, np.uint8(0), target))
            scoring.append(np.where(mask & _inside(target.shape), target, np.uint8(0)))
        return training, scoring

    def starved(
        self,
        targets: Sequence[NDArray[np.uint8]],
        planes: Sequence[int],
        n_classes: int,
    ) -> list[int]:
        """Return the classes that are painted, but only where nothing trains."""
        if not self.fraction:
            return []
        painted, held = np.zeros(n_classes, int), np.zeros(n_classes, int)
        for target, plane in zip(targets, planes, strict=True):
            pixels = _per_block(target, n_classes)
            painted += pixels.sum((0, 1))
            held += pixels[self.blocks(target.shape, plane)].sum(0)
        return np.flatnonzero((painted > 0) & (held == painted)).tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return it JSON-able."""
        return {"key": self.key, "fraction": self.fraction}

    @staticmethod
    def from_dict(values: Any) -> HeldOut:
        """Return what `to_dict` was called on; ValueError if it cannot be."""
        known = values if isinstance(values, dict) else {}
        key, fraction = known.get("key"), known.get("fraction")
        if (
            isinstance(key, int)
            and isinstance(fraction, (int, float))
            and 0 <= key < 2**63
            and 0 <= fraction <= 1
        ):
            return HeldOut(key, float(fraction))
        raise ValueError(
            "A model must tell what is held out by a key from 0 to 2^63 - 1 and a "
            f"fraction from 0 to 1, got {values!r}. Train a new model."
        )

    @staticmethod
    def of(provenance: Mapping[str, Any]) -> HeldOut | None:
        """Return what a model holds out; None before its first training."""
        frozen = provenance.get("held_out")
        return None if frozen is None else HeldOut.from_dict(frozen)


def choose(
    targets: Sequence[NDArray[np.uint8]],
    planes: Sequence[int],
    n_classes: int,
    *,
    seed: int,
    fraction: float,
) -> HeldOut:
    """Decide, once for a model, what is held out.

    Parameters
    ----------
    targets, planes
        As for `HeldOut.split`; only where they are annotated matters.
    n_classes : int
        Classes in all.
    seed : int
        Of the 32 keys that are looked at.
    fraction : float
        Share of the blocks that is held out.

    Returns
    -------
    held_out : HeldOut
        Of the keys that leave every class at least two thirds of its pixels and, if
        there are any, let every class score, that which takes most nearly `fraction`
        of every class. If every key takes all pixels of some class, nothing is held
        out.
    """
    if not fraction:
        return HeldOut(_key(seed, 0), 0.0)
    outer = [_per_block(t, n_classes) for t in targets]
    inner = [
        _per_block(np.where(_inside(t.shape), t, np.uint8(0)), n_classes)
        for t in targets
    ]
    painted = np.sum([pixels.sum((0, 1)) for pixels in outer], axis=0)
    present = painted > 0
    best, best_rank = HeldOut(_key(seed, 0), 0.0), None
    for number in range(_CANDIDATES):
        found = HeldOut(_key(seed, number), fraction)
        chosen = [
            found.blocks(t.shape, p) for t, p in zip(targets, planes, strict=True)
        ]
        held, scored = (
            np.sum([pixels[c].sum(0) for pixels, c in zip(of, chosen, strict=True)], 0)
            for of in (outer, inner)
        )
        if np.any(present & (held == painted)):
            continue
        lost = held[present] / painted[present]
        rank = (
            float(max(0, lost.max() - _MOST)),
            int(np.sum(scored[present] == 0)),
            float(np.abs(lost - fraction).max()),
        )
        if best_rank is None or rank < best_rank:
            best, best_rank = found, rank
    return best


def count(targets: Sequence[NDArray[np.uint8]], n_classes: int) -> NDArray[np.int64]:
    """Return how many annotated pixels each class has."""
    total = np.zeros(n_classes, np.int64)
    for target in targets:
        # Strokes are sparse; counting every pixel would copy it to 8 bytes.
        painted = np.bincount(target[target > 0], minlength=n_classes + 1)
        total += painted[1 : n_classes + 1]
    return total


def _per_block(target: NDArray[np.uint8], n_classes: int) -> NDArray[np.int64]:
    """Return how many pixels each class has in each block, (rows, columns, K)."""
    rows, columns = (-(-side // BLOCK) for side in target.shape)
    y, x = np.nonzero(target)
    place = (y // BLOCK * columns + x // BLOCK) * n_classes + target[y, x] - 1
    pixels = np.bincount(place, minlength=rows * columns * n_classes)
    return pixels.reshape(rows, columns, n_classes)


def _inside(shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return which pixels lie inside their block, away from its rim."""
    rows, columns = (
        (np.arange(side) % BLOCK >= RIM) & (np.arange(side) % BLOCK < BLOCK - RIM)
        for side in shape
    )
    return rows[:, None] & columns[None, :]


def _key(seed: int, number: int) -> int:
    """Return a candidate, below 2^63: what every reader of JSON knows as a number."""
    return int(_hash(_hash(np.uint64(seed % 2**64)) ^ np.uint64(number))) >> 1


def _hash(value: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        z = np.asarray(value, dtype=np.uint64) + np.uint64(_MIX[0])
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX[1])
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX[2])
        return z ^ (z >> np.uint64(31))
