"""Held-out pixels depend on position and key alone, chosen so that no class starves."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from napari_unetpp.heldout import BLOCK, RIM, HeldOut, _hash, choose, count

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


KEYS = st.integers(0, 2**63 - 1)


@given(
    key=KEYS,
    plane=st.integers(0, 9999),
    fraction=st.floats(0, 1),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
)
def test_a_block_is_held_out_by_its_own_hash(
    key: int, plane: int, fraction: float, rows: int, columns: int
) -> None:
    mask = HeldOut(key, fraction).mask((rows * BLOCK, columns * BLOCK), plane)
    start = splitmix(key)
    for y in range(rows):
        for x in range(columns):
            place = (y << 24) ^ x ^ (plane << 48) % WORD
            expected = (splitmix(place ^ start) >> 11) / 2**53 < fraction
            block = mask[y * BLOCK : (y + 1) * BLOCK, x * BLOCK : (x + 1) * BLOCK]
            assert block.min() == block.max() == expected


def test_blocks_are_32_pixels_wide() -> None:
    assert BLOCK == 32


@given(st.tuples(st.integers(1, 150), st.integers(1, 150)), KEYS, st.integers(0, 100))
def test_a_smaller_plane_has_the_same_mask(
    shape: tuple[int, int], key: int, plane: int
) -> None:
    small = HeldOut(key, 0.4).mask(shape, plane)
    large = HeldOut(key, 0.4).mask((170, 190), plane)
    assert small.shape == shape
    assert small.dtype == bool
    np.testing.assert_array_equal(small, large[: shape[0], : shape[1]])


def test_the_fraction_is_kept_and_nested() -> None:
    masks = [HeldOut(5, f).blocks((3200, 3200)) for f in (0, 0.1, 0.3, 1)]
    np.testing.assert_allclose([m.mean() for m in masks], [0, 0.1, 0.3, 1], atol=0.015)
    for smaller, larger in pairwise(masks):
        assert not (smaller & ~larger).any()


def test_keys_and_planes_differ_and_the_first_plane_is_the_default() -> None:
    def mask(key: int = 1, **plane: int) -> np.ndarray:
        return HeldOut(key, 0.5).mask((640, 640), **plane)

    np.testing.assert_array_equal(mask(), mask(plane=0))
    for other in (mask(2), mask(plane=1), mask(plane=2), mask().T):
        assert 0.3 < np.mean(mask() != other) < 0.7


def dense(seed: int, classes: int = 2, side: int = 640) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes + 1, (side, side)).astype(np.uint8)


def test_nothing_of_a_held_out_block_trains_and_its_inside_scores() -> None:
    targets = [dense(0), dense(1, side=300)]
    before = [t.copy() for t in targets]
    held = HeldOut(4, 0.2)
    training, scoring = held.split(targets, [0, 3])
    inner = np.zeros((BLOCK, BLOCK), bool)
    inner[RIM:-RIM, RIM:-RIM] = True
    for target, plane, trains, scores in zip(
        targets, [0, 3], training, scoring, strict=True
    ):
        mask = held.mask(target.shape, plane)
        tiled = np.tile(inner, (20, 20))[: target.shape[0], : target.shape[1]]
        np.testing.assert_array_equal(trains, np.where(mask, 0, target))
        np.testing.assert_array_equal(scores, np.where(mask & tiled, target, 0))
        assert trains.dtype == scores.dtype == np.uint8
        assert scores.any()
        gap = ndimage.distance_transform_cdt(trains == 0, "chessboard")[scores > 0]
        assert gap.min() > RIM
    for target, old in zip(targets, before, strict=True):
        np.testing.assert_array_equal(target, old)


def test_it_travels_as_json() -> None:
    held = HeldOut(2**63 - 1, 0.1)
    assert HeldOut.from_dict(json.loads(json.dumps(held.to_dict()))) == held
    assert HeldOut.of({"held_out": held.to_dict()}) == held
    assert HeldOut.of({"seed": 3}) is None


@pytest.mark.parametrize(
    "values",
    [None, [], {}, {"key": 1}, {"key": -1, "fraction": 0.1},
     {"key": "1", "fraction": 0.1},
     {"key": 2**63, "fraction": 0.1}, {"key": 1.5, "fraction": 0.1},
     {"key": 1, "fraction": 1.1}, {"key": 1, "fraction": float("nan")}],
)  # fmt: skip
def test_a_model_that_tells_nonsense_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match="held out by a key"):
        HeldOut.from_dict(values)


# --- the choice at the first training --------------------------------------------


@st.composite
def sparse(draw: st.DrawFn) -> np.ndarray:
    """Return up to a few short strokes on a plane that may be tiny."""
    shape = draw(st.tuples(st.integers(8, 130), st.integers(8, 130)))
    target = np.zeros(shape, np.uint8)
    for _ in range(draw(st.integers(1, 6))):
        y, x = (draw(st.integers(0, n - 1)) for n in shape)
        height, width = draw(st.tuples(st.integers(1, 4), st.integers(1, 40)))
        target[y : y + height, x : x + width] = draw(st.integers(1, 3))
    return target


@given(sparse(), st.integers(0, 2**70), st.floats(0, 1))
def test_the_choice_leaves_every_class_something_to_learn(
    target: np.ndarray, seed: int, fraction: float
) -> None:
    held = choose([target], [0], 3, seed=seed, fraction=fraction)
    (training,), _ = held.split([target], [0])
    assert np.all((count([training], 3) > 0) == (count([target], 3) > 0))
    assert held.starved([target], [0], 3) == []
    assert held == choose([target.copy()], [0], 3, seed=seed, fraction=fraction)
    assert held.fraction in (0.0, fraction)
    assert HeldOut.from_dict(held.to_dict()) == held


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_takes_the_share_of_every_class_and_lets_all_score(
    seed: int,
) -> None:
    target = np.zeros((512, 512), np.uint8)
    target[20::60, 10:500] = 1
    target[50::90, 100:300] = 2
    target[300:303, 20:400] = 3
    held = choose([target], [0], 3, seed=seed, fraction=0.15)
    (training,), (scoring,) = held.split([target], [0])
    lost = 1 - count([training], 3) / count([target], 3)
    assert np.all(lost <= 1 / 3)
    np.testing.assert_allclose(lost, 0.15, atol=0.08)
    assert np.all(count([scoring], 3) > 0)


def test_the_choice_looks_at_no_more_than_where_strokes_lie() -> None:
    target = dense(0, classes=3)
    swapped = np.array([0, 2, 3, 1], np.uint8)[target]
    a, b = (choose([t], [0], 3, seed=1, fraction=0.1) for t in (target, swapped))
    assert a == b
    assert a != choose([target], [0], 3, seed=2, fraction=0.1)


def test_where_every_key_starves_a_class_nothing_is_held_out() -> None:
    target = dense(0)
    held = choose([target], [0], 2, seed=0, fraction=1)
    assert held.fraction == 0
    (training,), (scoring,) = held.split([target], [0])
    np.testing.assert_array_equal(training, target)
    assert not scoring.any()


def test_a_class_that_lies_only_in_held_out_blocks_is_named() -> None:
    held = HeldOut(1, 0.5)
    blocks = np.argwhere(held.blocks((320, 320), 7)) * BLOCK
    free = np.argwhere(~held.blocks((320, 320), 7)) * BLOCK
    target = np.zeros((320, 320), np.uint8)
    target[tuple(free[0])] = 1
    target[tuple(blocks[0])] = 2
    target[tuple(blocks[1])] = 4
    assert held.starved([target], [7], 5) == [1, 3]
    target[tuple(free[1])] = 4
    assert held.starved([target], [7], 5) == [1]
    assert HeldOut(1, 0.0).starved([target], [7], 5) == []


def test_count_adds_up_the_images_and_leaves_out_the_rest() -> None:
    targets = [np.array([[0, 1, 1], [3, 0, 4]], np.uint8), np.array([[3]], np.uint8)]
    assert count(targets, 3).tolist() == [2, 0, 2]
    assert count(targets, 4).tolist() == [2, 0, 2, 1]
    assert count([], 2).tolist() == [0, 0]
