"""Which annotated pixels never train, as a pure function of position and seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 32  # px; held-out pixels come in whole blocks, so that neighbours stay together
_MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def held_out_mask(
    shape: tuple[int, int], *, seed: int, fraction: float, plane: int = 0
) -> NDArray[np.bool_]:
    """Return which pixels of a plane are held out.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns of the plane.
    seed : int
        The same seed gives the same blocks, whatever is painted.
    fraction : float
        Share of the blocks that is held out, 0 to 1.
    plane : int, optional
        Number of the plane in its stack.

    Returns
    -------
    mask : ndarray of shape `shape` and dtype bool
        True where an annotated pixel only scores.

    Notes
    -----
    Blocks of 32 x 32 pixels are chosen by the SplitMix64 hash of their position [1]_.

    References
    ----------
    .. [1] Steele et al., Fast Splittable Pseudorandom Number Generators, OOPSLA 2014,
           :DOI:`10.1145/2660193.2660195`
    """
    rows, columns = (-(-side // BLOCK) for side in shape)
    y = np.arange(rows, dtype=np.uint64)[:, None]
    x = np.arange(columns, dtype=np.uint64)[None, :]
    key = (y << np.uint64(24)) ^ x ^ (np.uint64(plane) << np.uint64(48))
    value = _hash(key ^ _hash(np.uint64(seed % 2**64)))
    chosen = (value >> np.uint64(11)).astype(np.float64) / 2**53 < fraction
    mask: NDArray[np.bool_] = chosen.repeat(BLOCK, 0).repeat(BLOCK, 1)
    return mask[: shape[0], : shape[1]]


def _hash(value: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        z = np.asarray(value, dtype=np.uint64) + np.uint64(_MIX[0])
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX[1])
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX[2])
        return z ^ (z >> np.uint64(31))


def split(
    targets: list[NDArray[np.uint8]],
    planes: list[int],
    n_classes: int,
    *,
    seed: int,
    fraction: float,
) -> tuple[list[NDArray[np.uint8]], list[NDArray[np.uint8]]]:
    """Split annotations into what trains and what scores.

    Parameters
    ----------
    targets : list of ndarray of shape (Y, X) and dtype uint8
        0 = not annotated, v = class v - 1; not changed.
    planes : list of int
        Number of each target's plane in its stack.
    n_classes : int
        Classes in all.
    seed, fraction
        As for `held_out_mask`.

    Returns
    -------
    training, scoring : lists of ndarray of shape (Y, X) and dtype uint8
        Disjoint. Nothing is held out (`scoring` is all 0) while that would leave a
        class without a scoring pixel or take more than a third of its pixels.
    """
    masks = [
        held_out_mask(t.shape, seed=seed, fraction=fraction, plane=p)
        for t, p in zip(targets, planes, strict=True)
    ]
    training = [
        np.where(m, 0, t).astype(np.uint8) for t, m in zip(targets, masks, strict=True)
    ]
    scoring = [
        np.where(m, t, 0).astype(np.uint8) for t, m in zip(targets, masks, strict=True)
    ]
    kept = count(training, n_classes)
    held = count(scoring, n_classes)
    present = (kept + held) > 0
    if fraction > 0 and np.all((held > 0) & (2 * held <= kept) | ~present):
        return training, scoring
    return [t.copy() for t in targets], [np.zeros_like(t) for t in targets]


def count(targets: list[NDArray[np.uint8]], n_classes: int) -> NDArray[np.int64]:
    """Return how many annotated pixels each class has."""
    total = np.zeros(n_classes, np.int64)
    for target in targets:
        # Strokes are sparse; counting every pixel would copy it to 8 bytes.
        painted = np.bincount(target[target > 0], minlength=n_classes + 1)
        total += painted[1 : n_classes + 1]
    return total
