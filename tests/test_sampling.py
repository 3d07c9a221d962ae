"""Patches are drawn around annotated pixels, in agreed shares, reproducibly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from napari_unetpp.sampling import PatchSampler


class Dice:
    """A generator that throws what it is told and remembers what it was asked."""

    def __init__(self, groups: list[int], ranks: list[float], shift: list[Any]) -> None:
        self._answers = groups, ranks, shift
        self.asked: list[Any] = []

    def choice(self, n: int, *, size: int, p: np.ndarray) -> np.ndarray:
        self.asked += [n, size, p.tolist()]
        return np.array(self._answers[0])

    def random(self, n: int) -> np.ndarray:
        self.asked.append(n)
        return np.array(self._answers[1])

    def integers(self, low: int, high: int, size: tuple[int, int]) -> np.ndarray:
        self.asked += [low, high, size]
        return np.array(self._answers[2])


def painted(shape: tuple[int, int], **classes: list[tuple[int, int]]) -> np.ndarray:
    target = np.zeros(shape, np.uint8)
    for name, points in classes.items():
        for point in points:
            target[point] = int(name[1:])
    return target


def test_a_draw_is_an_image_and_class_then_a_pixel_then_a_shift() -> None:
    first = painted((9, 9), c1=[(0, 1), (2, 3), (8, 8), (8, 7)], c3=[(4, 4)])
    second = painted((5, 30), c1=[(4, 29)] + [(0, x) for x in range(8)])
    dice = Dice(
        [0, 1, 2, 0], [0.5, 0.999, 0.0, 0.25], [[0, 0], [3, -2], [1, 1], [0, 5]]
    )
    draw = PatchSampler([first, np.zeros((3, 3), np.uint8), second], 40, dice).draw(4)  # type: ignore[arg-type]
    assert draw.image.tolist() == [0, 0, 2, 0]
    assert draw.centres.tolist() == [[8, 7], [7, 2], [1, 1], [2, 8]]
    n, size, p, ranks, *integers = dice.asked
    assert (n, size, ranks) == (3, 4, 4)
    np.testing.assert_allclose(p, np.array([2, 1, 3]) / 6)
    assert integers == [-12, 13, (4, 2)]
    assert draw.image.dtype == draw.centres.dtype == np.int64


@pytest.mark.parametrize(
    ("patch", "reach"), [(16, 0), (15, 0), (17, 0), (18, 1), (64, 24)]
)
def test_the_shift_leaves_eight_pixels_to_the_edge(patch: int, reach: int) -> None:
    dice = Dice([0], [0], [[0, 0]])
    PatchSampler([painted((9, 9), c2=[(4, 4)])], patch, dice).draw(1)  # type: ignore[arg-type]
    assert dice.asked[-3:-1] == [-reach, reach + 1]


@given(st.integers(0, 2**32), st.integers(16, 200), st.data())
def test_every_patch_contains_its_pixel(
    seed: int, patch: int, data: st.DataObject
) -> None:
    shape = (data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300)))
    point = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    sampler = PatchSampler(
        [painted(shape, c7=[point])],
        patch,
        np.random.default_rng(seed),  # type: ignore[list-item]
    )
    draw = sampler.draw(20)
    start = draw.centres - patch // 2
    inside = (start <= np.array(point)) & (np.array(point) < start + patch)
    assert inside.all()
    assert (np.abs(draw.centres - point) <= max(0, patch // 2 - 8)).all()


def test_the_centres_are_spread_over_the_whole_reach() -> None:
    sampler = PatchSampler(
        [painted((50, 50), c1=[(25, 25)])], 20, np.random.default_rng(0)
    )
    shifts = sampler.draw(600).centres - 25
    for axis in (0, 1):
        values, counts = np.unique(shifts[:, axis], return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert counts.min() > 80
    assert abs(np.corrcoef(shifts.T)[0, 1]) < 0.15


def test_shares_follow_the_roots_of_the_counts() -> None:
    # 400, 16 and 4 pixels: roots 20 : 4 : 2.
    target = np.zeros((40, 40), np.uint8)
    target[:20, :20], target[30:34, 30:34], target[20:22, :2] = 1, 2, 5
    sampler = PatchSampler([target], 16, np.random.default_rng(3))
    draw = sampler.draw(5000)
    values = target[tuple(draw.centres.T)]
    shares = [np.mean(values == v) for v in (1, 2, 5)]
    np.testing.assert_allclose(shares, np.array([20, 4, 2]) / 26, atol=0.02)


def test_the_pixels_of_a_class_are_drawn_alike() -> None:
    points = [(0, 0), (0, 39), (20, 20), (39, 3)]
    sampler = PatchSampler([painted((40, 40), c2=points)], 16, np.random.default_rng(5))
    found, counts = np.unique(sampler.draw(4000).centres, axis=0, return_counts=True)
    assert [tuple(p) for p in found] == points
    np.testing.assert_allclose(counts / 4000, 0.25, atol=0.03)


def test_the_generators_state_is_the_whole_memory() -> None:
    target = np.random.default_rng(0).integers(0, 3, (30, 30)).astype(np.uint8)
    before = target.copy()
    rng = np.random.default_rng(11)
    sampler = PatchSampler([target, target], 64, rng)
    sampler.draw(5)
    state = rng.bit_generator.state
    first = sampler.draw(8)
    other = np.random.default_rng(0)
    other.bit_generator.state = state
    again = PatchSampler([target, target], 64, other).draw(8)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.centres, again.centres)
    assert (sampler.draw(8).centres != first.centres).any()
    np.testing.assert_array_equal(target, before)


@pytest.mark.parametrize("targets", [[], [np.zeros((5, 5), np.uint8)]])
def test_nothing_annotated_is_refused(targets: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="`annotations` must have annotated pixels"):
        PatchSampler(targets, 64, np.random.default_rng(0))
