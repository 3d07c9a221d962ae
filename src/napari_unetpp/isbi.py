"""The errors by which the ISBI 2012 challenge judged membranes: pixel, Rand, warping.

Each plane (Y, X) is a map of the cells' interior: true inside a cell, false on the
membranes. The sources are [1]_ for the challenge and its Rand error, [2]_ for the
warping error.

References
----------
.. [1] Arganda-Carreras et al., Crowdsourcing the creation of image segmentation
       algorithms for connectomics, Frontiers in Neuroanatomy 9, 2015,
       :DOI:`10.3389/fnana.2015.00142`
.. [2] Jain et al., Boundary Learning by Optimization with Topological Constraints, CVPR
       2010, :DOI:`10.1109/CVPR.2010.5539950`
"""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_CROSS = ndimage.generate_binary_structure(2, 1)
_SQUARE = ndimage.generate_binary_structure(2, 2)
# The neighbours of a pixel in the order of their bits in a code from 0 to 255.
_AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


def pixel_error(interior: ArrayLike, truth: ArrayLike) -> float:
    """Return the share of the pixels that differ.

    Parameters
    ----------
    interior, truth : array-like of shape (Y, X)
        True inside the cells.

    Raises
    ------
    ValueError
        If the shapes differ or are not those of a plane.
    """
    found, true = _checked(interior, truth)
    return float(np.mean(found != true))


def rand_error(interior: ArrayLike, truth: ArrayLike) -> float:
    """Return 1 - the F-score of pairs of pixels, from 0 (the same cells) to 1.

    Cells are the regions of `interior` whose pixels share a side. With n_ij the pixels
    in cell i of the result and in cell j of the truth, s_i and t_j its sums, and
    P(n) = n (n - 1), the F-score is ``2 sum P(n_ij) / (sum P(s_i) + sum P(t_j))``. Only
    pixels inside the true cells count: the width of true membranes does not matter.

    Parameters
    ----------
    interior, truth : array-like of shape (Y, X)
        True inside the cells.

    Raises
    ------
    ValueError
        As `pixel_error`, or if the truth has no cell.

    Notes
    -----
    Membrane pixels of the result that lie inside true cells are one more segment, as in
    `skimage.metrics.adapted_rand_error`, which computes it. The challenge took the best
    of all thresholds of a probability map; here the caller chooses one.
    """
    from skimage.metrics import adapted_rand_error

    found, true = _checked(interior, truth)
    if not true.any():
        raise ValueError(
            "The Rand error needs a truth with at least one cell, got membranes only. "
            "Pass maps that are true inside the cells."
        )
    segments, cells = (ndimage.label(plane, _CROSS)[0] for plane in (found, true))
    error, _, _ = adapted_rand_error(cells, segments)  # type: ignore[no-untyped-call]
    return float(error)


def warping_error(
    interior: ArrayLike, truth: ArrayLike, *, radius: float | None = None
) -> float:
    """Return the share of the pixels that no warp of the truth explains.

    The truth is warped towards the result: pixels where the two differ are flipped one
    by one as long as that changes no topology, joins or splits no cell, opens or fills
    no hole. Shifted borders cost nothing then; what remains are splits, mergers, holes
    and lost or invented cells.

    Parameters
    ----------
    interior, truth : array-like of shape (Y, X)
        True inside the cells.
    radius : float, optional
        Pixels further from the true borders than this stay as they are.

    Raises
    ------
    ValueError
        As `pixel_error`.

    Notes
    -----
    A pixel may be flipped if it is simple: cells are connected by the sides of pixels,
    membranes by sides and corners, and what lies outside the plane is membrane. The
    best warp of [2]_ is not known to be found by any fast method; as there, this is a
    greedy one, in the order of rows first, so the value is an upper bound.
    """
    found, true = _checked(interior, truth)
    warped = np.pad(true, 1)
    goal = np.pad(found, 1)
    free = np.pad(np.ones_like(true), 1)
    if radius is not None:
        inner = ndimage.distance_transform_edt(true)
        outer = ndimage.distance_transform_edt(~true)
        free &= np.pad(np.maximum(inner, outer) <= radius, 1)
    state: list[list[bool]] = warped.tolist()
    simple = _simple_codes()
    todo = deque(map(tuple, np.argwhere((warped != goal) & free).tolist()))
    waiting = set(todo)
    while todo:
        place = todo.popleft()
        waiting.discard(place)
        y, x = place
        code = sum(state[y + dy][x + dx] << i for i, (dy, dx) in enumerate(_AROUND))
        if not simple[code]:
            continue
        state[y][x] = not state[y][x]
        for dy, dx in _AROUND:
            near = (y + dy, x + dx)
            if (
                near not in waiting
                and free[near]
                and state[near[0]][near[1]] != (goal[near])
            ):
                waiting.add(near)
                todo.append(near)
    return float(np.sum(np.array(state) != goal) / true.size)


@cache
def _simple_codes() -> list[bool]:
    """Return for each neighbourhood whether its middle may change.

    The cells around it must be one piece by sides, that touches it with a side, and the
    membranes one piece by corners.
    """
    result = []
    for code in range(256):
        cells = np.zeros((3, 3), bool)
        for i, (dy, dx) in enumerate(_AROUND):
            cells[1 + dy, 1 + dx] = code >> i & 1
        pieces = ndimage.label(cells, _CROSS)[0]
        touching = {int(pieces[1 + dy, 1 + dx]) for dy, dx in _AROUND if not dy * dx}
        membrane = ~cells
        membrane[1, 1] = False
        gaps = ndimage.label(membrane, _SQUARE)[1]
        result.append(len(touching - {0}) == 1 and gaps == 1)
    return result


def _checked(
    interior: ArrayLike, truth: ArrayLike
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    found, true = np.asarray(interior), np.asarray(truth)
    if found.shape != true.shape or found.ndim != 2:
        raise ValueError(
            "`interior` and `truth` must be planes (Y, X) of one shape, got "
            f"{found.shape} and {true.shape}. Compare stacks plane by plane."
        )
    arrays: list[Any] = [found, true]
    for name, array in zip(("interior", "truth"), arrays, strict=True):
        if array.dtype != np.bool_ and not set(np.unique(array)) <= {0, 1}:
            raise ValueError(
                f"`{name}` must be true or false, got {array.dtype} with other values "
                "than 0 and 1. Compare labels with a class first, such as labels == 1."
            )
    return found.astype(bool), true.astype(bool)
