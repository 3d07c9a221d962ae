"""The errors of the ISBI 2012 challenge, on cases counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from napari_unetpp.isbi import _simple_codes, pixel_error, rand_error, warping_error


def plane(*rows: str) -> np.ndarray:
    """Return a map of the cells' interior: '#' inside."""
    return np.array([[c == "#" for c in row] for row in rows])


TWO = plane(
    "###.###",
    "###.###",
    "###.###",
)
MERGED = plane(
    "###.###",
    "#######",
    "###.###",
)
SHIFTED = plane(
    "##.####",
    "##.####",
    "##.####",
)
SPLIT = plane(
    "#.#.###",
    "#.#.###",
    "#.#.###",
)


def test_the_truth_itself_has_no_error() -> None:
    assert pixel_error(TWO, TWO) == rand_error(TWO, TWO) == warping_error(TWO, TWO) == 0


def test_pixels_that_differ_are_counted() -> None:
    assert pixel_error(MERGED, TWO) == 1 / 21
    assert pixel_error(SHIFTED, TWO) == 6 / 21
    assert pixel_error(~TWO, TWO) == 1


def test_a_merger_costs_pairs() -> None:
    # Two cells of 9 pixels, all in one segment of 18.
    joined, true = 18 * 17, 2 * 9 * 8
    assert rand_error(MERGED, TWO) == pytest.approx(1 - 2 * true / (joined + true))


def test_a_split_costs_pairs() -> None:
    # Segments of 3 and 3, three pixels of membrane, and 9; cells of 9 and 9.
    kept, true = 3 * 3 * 2 + 9 * 8, 2 * 9 * 8
    assert rand_error(SPLIT, TWO) == pytest.approx(1 - 2 * kept / (kept + true))


def test_the_width_of_membranes_costs_no_pairs() -> None:
    wide = TWO.copy()
    wide[:, 3] = (
        True  # in the result; the truth has it as membrane, which is not judged
    )
    truth = TWO.copy()
    truth[:, 2:5] = False
    assert rand_error(TWO, truth) == 0
    assert rand_error(wide, truth) > 0


def test_rand_error_needs_a_cell() -> None:
    with pytest.raises(ValueError, match="at least one cell"):
        rand_error(TWO, np.zeros_like(TWO))


def test_shifted_borders_warp_away() -> None:
    assert warping_error(SHIFTED, TWO) == 0


def test_a_merger_leaves_the_pixel_that_joins() -> None:
    assert warping_error(MERGED, TWO) == 1 / 21


def test_a_split_leaves_a_wall() -> None:
    # Each end of the wall may grow from the border, the last pixel would cut the cell.
    assert warping_error(SPLIT, TWO) == 1 / 21


def test_a_hole_and_an_invented_cell_cost_one_pixel_each() -> None:
    block = np.zeros((9, 9), bool)
    block[2:7, 2:7] = True
    hole = block.copy()
    hole[4, 4] = False
    assert warping_error(hole, block) == 1 / 81
    extra = block.copy()
    extra[0, 8] = True
    assert warping_error(extra, block) == 1 / 81


def test_a_lost_cell_costs_its_last_pixel() -> None:
    block = np.zeros((7, 7), bool)
    block[2:5, 2:5] = True
    assert warping_error(np.zeros_like(block), block) == 1 / 49


def test_a_radius_forbids_far_warps() -> None:
    block = np.zeros((15, 15), bool)
    block[3:12, 3:12] = True
    thin = np.zeros_like(block)
    thin[7, 7] = True
    assert warping_error(thin, block) == 0
    assert warping_error(thin, block, radius=2) == (5**2 - 1) / 15**2


def test_flipping_simple_pixels_keeps_the_number_of_cells_and_holes() -> None:
    """Brute force over all neighbourhoods with a frame of membrane around them."""
    from scipy import ndimage

    square = np.ones((3, 3), bool)
    for code, simple in enumerate(_simple_codes()):
        around = np.array([code >> i & 1 for i in range(8)], bool)
        grid = np.zeros((5, 5), bool)
        grid[1:4, 1:4] = np.insert(around, 4, False).reshape(3, 3)
        counts = []
        for middle in (False, True):
            grid[2, 2] = middle
            cells = ndimage.label(grid)[1]
            membranes = ndimage.label(~grid, square)[1]
            counts.append((cells, membranes))
        if simple:
            assert counts[0] == counts[1], code


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (np.zeros((3, 8), bool), "of one shape"),
        (np.zeros((3, 7), np.uint8) + 2, "true or false"),
        (np.zeros((1, 3, 7), bool), "planes"),
    ],
)
def test_other_arrays_are_refused(wrong: np.ndarray, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        pixel_error(wrong, TWO)
