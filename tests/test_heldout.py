"""Held-out pixels depend on position and seed alone."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_unetpp.heldout import BLOCK, _hash, count, held_out_mask, split

WORD = 2**64


def splitmix(value: int) -> int:
    """Return SplitMix64's output for a state, in Python's own whole numbers."""
    z = (value + 0x9E3779B97F4A7C15) % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64() -> None:
    # The published generator's first numbers for the seed 1234567.
    state, expected = 1234567, (6457827717110365317, 3203168211198807973)
    assert int(_hash(np.uint64(state))) == expected[0]
    step = 0x9E3779B97F4A7C15
    assert int(_hash(np.uint64((state + step) % WORD))) == expected[1]


@given(
    seed=st.integers(0, 2**70),
    plane=st.integers(0, 9999),
    fraction=st.floats(0, 1),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
)
def test_a_block_is_held_out_by_its_own_hash(
    seed: int, plane: int, fraction: float, rows: int, columns: int
) -> None:
    mask = held_out_mask(
        (rows * BLOCK, columns * BLOCK), seed=seed, fraction=fraction, plane=plane
    )
    start = splitmix(seed % WORD)
    for y in range(rows):
        for x in range(columns):
            key = (y << 24) ^ x ^ (plane << 48) % WORD
            expected = (splitmix(key ^ start) >> 11) / 2**53 < fraction
            block = mask[y * BLOCK : (y + 1) * BLOCK, x * BLOCK : (x + 1) * BLOCK]
            assert block.min() == block.max() == expected


def test_blocks_are_32_pixels_wide() -> None:
    assert BLOCK == 32


@given(
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.integers(0, 2**63 - 1),
    st.integers(0, 100),
)
def test_a_smaller_plane_has_the_same_mask(
    shape: tuple[int, int], seed: int, plane: int
) -> None:
    small = held_out_mask(shape, seed=seed, fraction=0.4, plane=plane)
    large = held_out_mask((170, 190), seed=seed, fraction=0.4, plane=plane)
    assert small.shape == shape
    assert small.dtype == bool
    np.testing.assert_array_equal(small, large[: shape[0], : shape[1]])


def test_the_fraction_is_kept_and_nested() -> None:
    masks = [
        held_out_mask((3200, 3200), seed=5, fraction=f)[::BLOCK, ::BLOCK]
        for f in (0, 0.1, 0.3, 1)
    ]
    np.testing.assert_allclose([m.mean() for m in masks], [0, 0.1, 0.3, 1], atol=0.015)
    for smaller, larger in pairwise(masks):
        assert not (smaller & ~larger).any()


def test_seeds_and_planes_differ_and_the_first_plane_is_the_default() -> None:
    def mask(**settings: int) -> np.ndarray:
        return held_out_mask((640, 640), fraction=0.5, **{"seed": 1, **settings})

    np.testing.assert_array_equal(mask(), mask(plane=0))
    np.testing.assert_array_equal(mask(), mask(seed=1 + WORD))
    for other in (mask(seed=2), mask(plane=1), mask(plane=2), mask().T):
        assert 0.3 < np.mean(mask() != other) < 0.7


def dense(seed: int, classes: int = 2, side: int = 640) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes + 1, (side, side)).astype(np.uint8)


def test_a_split_is_disjoint_and_complete() -> None:
    targets = [dense(0), dense(1, side=300)]
    before = [t.copy() for t in targets]
    training, scoring = split(targets, [0, 3], 2, seed=4, fraction=0.2)
    for target, plane, trains, scores in zip(
        targets, [0, 3], training, scoring, strict=True
    ):
        mask = held_out_mask(target.shape, seed=4, fraction=0.2, plane=plane)
        np.testing.assert_array_equal(trains, np.where(mask, 0, target))
        np.testing.assert_array_equal(scores, np.where(mask, target, 0))
        assert trains.dtype == scores.dtype == np.uint8
    assert all(s.any() for s in scoring)
    for target, old in zip(targets, before, strict=True):
        np.testing.assert_array_equal(target, old)


def place(mask: np.ndarray, held: int, kept: int) -> np.ndarray:
    """Paint class 1 on so many held-out and training pixels."""
    target = np.zeros(mask.shape, np.uint8)
    target[tuple(np.argwhere(mask)[:held].T)] = 1
    target[tuple(np.argwhere(~mask)[:kept].T)] = 1
    return target


@pytest.mark.parametrize(
    ("held", "kept", "splits"),
    [(0, 10, False), (0, 1, False), (1, 0, False), (1, 2, True), (1, 1, False),
     (5, 10, True), (6, 11, False), (5, 0, False)],
)  # fmt: skip
def test_nothing_is_held_out_if_a_class_would_suffer(
    held: int, kept: int, splits: bool
) -> None:
    mask = held_out_mask((320, 320), seed=0, fraction=0.3)
    target = place(mask, held, kept)
    other = np.roll(place(mask, 0, 0), 1)
    other[tuple(np.argwhere(mask)[-20:].T)] = 2
    other[tuple(np.argwhere(~mask)[-90:].T)] = 2
    target = np.where(other > 0, other, target)
    before = target.copy()
    (training,), (scoring,) = split([target], [0], 3, seed=0, fraction=0.3)
    assert bool(scoring.any()) is splits
    if splits:
        assert count([scoring], 3).tolist() == [held, 20, 0]
        assert count([training], 3).tolist() == [kept, 90, 0]
        return
    np.testing.assert_array_equal(training, before)
    assert training is not target
    assert scoring.dtype == np.uint8
    assert scoring.shape == target.shape


def test_the_fraction_zero_holds_nothing_out() -> None:
    target = dense(0)
    (training,), (scoring,) = split([target], [0], 2, seed=0, fraction=0)
    np.testing.assert_array_equal(training, target)
    assert not scoring.any()


def test_count_adds_up_the_images_and_leaves_out_the_rest() -> None:
    targets = [np.array([[0, 1, 1], [3, 0, 4]], np.uint8), np.array([[3]], np.uint8)]
    assert count(targets, 3).tolist() == [2, 0, 2]
    assert count(targets, 4).tolist() == [2, 0, 2, 1]
    assert count([], 2).tolist() == [0, 0]
