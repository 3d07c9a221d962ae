"""The score estimates the IoU of whole images from held-out pixels and windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import ndimage

from napari_unetpp.heldout import HeldOut
from napari_unetpp.networks.blocks import GroupNorm
from napari_unetpp.score import (
    _BEYOND,
    _TEMPERATURES,
    MIN_BLOCKS,
    MIN_PIXELS,
    Counts,
    Scorer,
    _table,
    estimate,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

T = len(_TEMPERATURES)
LEAST = 1.645 * _BEYOND


def counts(best: list[list[int]], table: np.ndarray, n: float = 20) -> Counts:
    """Return counts in which each block's class suits one temperature best (-1: none).

    The network is as sure as 1 - t/20, and as often right as the best t asks for.
    """
    chosen = np.asarray(best)
    pixels = np.where(chosen >= 0, n, 0.0)
    right = pixels * (1 - chosen / 20)
    sure = pixels[:, :, None] * (1 - np.arange(T) / 20)
    return Counts(pixels, right, sure, table)


def tables(*values: np.ndarray) -> np.ndarray:
    """Return one window; at temperature number t its confusion is `values[t]`."""
    last = values[-1]
    found = [values[t] if t < len(values) else last for t in range(T)]
    return np.stack(found)[None].astype(float)


SURE = np.array([[60, 0], [20, 20]])  # IoU 3/4 and 1/2
UNSURE = np.array([[40, 20], [20, 20]])  # IoU 1/2 and 1/3


def test_the_iou_is_that_of_the_expected_confusion() -> None:
    both = np.array([True, True])
    score = estimate(counts([[0, 0]] * 4, tables(SURE, UNSURE)), both, seed=0)
    assert score.per_class == (0.75, 0.5)
    assert score.mean == 0.625
    assert score.pixels == 4 * 2 * 20
    # Nothing that is drawn again differs: what is left is what cannot be known.
    assert score.low == pytest.approx(0.625 - LEAST)
    assert score.high == pytest.approx(0.625 + LEAST)
    assert str(score) == f"0.62 ± {LEAST:.2f}"
    assert score.words(["sky", "cell"]) == (
        "0.46 to 0.79 (90 %): estimated IoU on the whole images, from 160 painted "
        "pixels that training never saw. sky 0.75, cell 0.50."
    )


def test_held_out_pixels_tell_how_far_the_network_is_believed() -> None:
    both = np.array([True, True])
    score = estimate(counts([[1, 1]] * 4, tables(SURE, UNSURE)), both, seed=0)
    assert score.per_class == pytest.approx((1 / 2, 1 / 3))


def test_each_class_weighs_the_same_however_much_of_it_is_painted() -> None:
    # Nine blocks are right throughout, the tenth asks for twice of what is the mean.
    found = counts([[0, -1]] * 9 + [[-1, 2]], tables(SURE, UNSURE))
    score = estimate(found, np.array([True, True]), seed=0)
    assert score.per_class == pytest.approx((1 / 2, 1 / 3))


def test_a_network_that_no_temperature_makes_modest_is_scaled_down() -> None:
    both = np.array([True, True])
    found = counts([[0, 0]] * 4, tables(SURE))
    half = found._replace(right=found.sure[:, :, -1] / 2)
    score = estimate(half, both, seed=0)
    # 30 of 60 + 80 - 30 and 10 of 40 + 20 - 10.
    assert score.per_class == pytest.approx((30 / 110, 10 / 50))
    never = estimate(found._replace(right=found.right * 0), both, seed=0)
    assert never.mean == 0


def test_windows_add_up_before_the_ratio() -> None:
    window = tables(SURE), tables(np.array([[0, 0], [0, 60]]))
    found = counts([[0, 0]] * 4, np.concatenate(window))
    score = estimate(found, np.array([True, True]), seed=0)
    assert score.per_class == (0.75, 0.8)


def test_a_class_without_strokes_does_not_count() -> None:
    three = np.zeros((3, 3))
    three[:2, :2] = SURE
    three[2, 2] = three[0, 2] = 1
    painted = np.array([True, True, False])
    score = estimate(counts([[0, 0, -1]] * 4, tables(three)), painted, seed=0)
    assert np.isnan(score.per_class[2])
    assert score.mean == np.mean(score.per_class[:2])


def test_blocks_that_disagree_widen_the_interval() -> None:
    both = np.array([True, True])
    agree = estimate(counts([[0, 0]] * 8, tables(SURE, UNSURE)), both, seed=0)
    mixed = counts([[0, 0], [0, 0], [0, 0], [1, 1], [1, 1]], tables(SURE, UNSURE))
    split = estimate(mixed, both, seed=0)
    assert split.mean < agree.mean
    assert split.high - split.low > agree.high - agree.low + 0.05
    assert split == estimate(mixed, both, seed=0)
    for score in (agree, split):
        assert 0 <= score.low <= score.mean <= score.high <= 1


def test_the_interval_stays_within_0_and_1() -> None:
    both = np.array([True, True])
    good = estimate(counts([[0, 0]] * 4, tables(np.diag([9, 9]))), both, seed=0)
    bad = estimate(counts([[0, 0]] * 4, tables(9 - np.diag([9, 9]))), both, seed=0)
    assert (good.mean, good.high) == (1, 1)
    assert (bad.mean, bad.low) == (0, 0)


def test_the_table_is_that_of_blurred_probabilities() -> None:
    rng = np.random.default_rng(0)
    rough = ndimage.gaussian_filter(rng.normal(size=(3, 128, 128)), (0, 6, 6)) * 60
    found = _table(torch.from_numpy(rough).float(), torch.ones(128, 128))
    for temperature, table in zip(_TEMPERATURES, found, strict=True):
        p = np.exp(rough / temperature)
        p = ndimage.gaussian_filter(p / p.sum(0), (0, 3, 3), mode="constant")
        labels = rough.argmax(0)
        expected = np.stack([p[:, labels == j].sum(1) for j in range(3)], axis=1)
        np.testing.assert_allclose(
            table / table.sum(), expected / expected.sum(), atol=0.006
        )


def test_what_is_mirrored_is_not_counted() -> None:
    logits = torch.zeros(2, 64, 64)
    logits[0, :32], logits[1, 32:] = 9, 9
    inside = torch.zeros(64, 64)
    inside[:16] = 1
    table = _table(logits, inside)[0]
    assert table[:, 1].sum() == 0
    assert table[0, 0] > 0


class Oracle:
    """A network that finds the logits in the image itself."""

    depths = (1, 2)

    def eval(self) -> Oracle:
        return self

    def modules(self) -> Iterator[torch.nn.Module]:
        return iter(())

    def __call__(
        self, windows: torch.Tensor, _depth: int | None = None
    ) -> list[torch.Tensor]:
        return [-windows, windows]


def scene(
    sides: tuple[int, ...] = (230, 70), fraction: float = 0.3
) -> tuple[list[torch.Tensor], list[np.ndarray], list[np.ndarray]]:
    """Return logits as images, the truth as annotation, and what of it scores."""
    rng = np.random.default_rng(0)
    truths = [rng.integers(1, 3, (n, n + 9)).astype(np.uint8) for n in sides]
    images = [
        torch.from_numpy(np.stack([t == 1, t == 2]).astype(np.float32) * 9)
        for t in truths
    ]
    _, scoring = HeldOut(3, fraction).split(truths, [0] * len(sides))
    return images, truths, scoring


BOTH = np.array([True, True])


@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_pixels_are_scored_where_they_lie_and_once(side: int) -> None:
    images, truths, scoring = scene()
    own = Scorer(images, scoring, BOTH, side=side, margin=0, seed=1)
    assert own.enough
    seen = [np.zeros(t.shape, int) for t in truths]
    for window in own._held:
        y = window.rows + window.centre[0] - side // 2
        x = window.columns + window.centre[1] - side // 2
        assert 0 <= min(window.rows.min(), window.columns.min())
        assert max(window.rows.max(), window.columns.max()) < side
        np.testing.assert_array_equal(scoring[window.image][y, x], window.truth + 1)
        np.add.at(seen[window.image], (y, x), 1)
    assert max(s.max() for s in seen) == 1
    found = own.measure(Oracle(), (0.0, 0.0))
    assert found[2].pixels == sum(len(w.truth) for w in own._held)
    assert set(found) == {1, 2}


def test_a_network_that_is_right_is_believed_more_than_one_that_is_wrong() -> None:
    images, _, scoring = scene()
    for image in images:
        image[:] = torch.from_numpy(
            ndimage.zoom(image[:, ::16, ::16].numpy(), (1, 17, 17), order=0)
        )[:, : image.shape[1], : image.shape[2]]
    truth = [(image.argmax(0) + 1).numpy().astype(np.uint8) for image in images]
    for target, values in zip(scoring, truth, strict=True):
        target[target > 0] = values[target > 0]
    own = Scorer(images, scoring, BOTH, side=128, margin=0, seed=1)
    found = own.measure(Oracle(), (0.0, 0.0))
    assert found[2].mean > 0.6
    assert found[1].mean == 0


class Normed(torch.nn.Module):
    """A group norm and nothing else, which notes whether its statistics are held."""

    depths = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.norm = GroupNorm(2)
        self.held: list[bool] = []

    def forward(
        self, windows: torch.Tensor, _depth: int | None = None
    ) -> list[torch.Tensor]:
        self.held.append(self.norm.measuring or self.norm.fixed is not None)
        return [self.norm(windows)]


def test_norms_are_those_of_the_image_as_in_prediction() -> None:
    images, _, scoring = scene()
    network = Normed()
    own = Scorer(images, scoring, BOTH, side=32, margin=0, seed=1)
    found = own.measure(network, (0.0, 0.0))[1]
    assert all(network.held)
    assert network.norm.fixed is None
    assert 2 < len(network.held) <= len(own._held) + len(images)
    assert np.isfinite(found.mean)


def test_the_score_is_of_the_model_that_the_user_gets() -> None:
    images, _, scoring = scene()
    own = Scorer(images, scoring, BOTH, side=64, margin=0, seed=1)
    assert own.measure(Oracle(), (0.0, 0.0)) != own.measure(Oracle(), (1.0, 0.0))
    # So much of the first class that no other is left.
    assert own.measure(Oracle(), (99.0, 0.0))[2].per_class[1] < 0.01


def test_too_few_held_out_pixels_give_no_score() -> None:
    images, _, scoring = scene()
    empty = [np.zeros_like(s) for s in scoring]

    def enough(*targets: np.ndarray, painted: np.ndarray = BOTH) -> bool:
        own = Scorer(images, list(targets), painted, side=64, margin=0, seed=0)
        assert bool(own.measure(Oracle(), (0.0, 0.0))) == own.enough
        return own.enough

    assert enough(*scoring)
    assert not enough(*empty)
    one = [np.where(s == 1, s, 0) for s in scoring]
    assert not enough(*one)
    assert enough(*one, painted=np.array([True, False]))
    few = [e.copy() for e in empty]
    places = np.argwhere(scoring[0] == 1), np.argwhere(scoring[0] == 2)
    for value, found in enumerate(places, start=1):
        few[0][
            tuple(found[:: len(found) // MIN_PIXELS][: MIN_PIXELS - value // 2].T)
        ] = value
    assert not enough(*few)
    few[0][tuple(places[1][-3:].T)] = 2
    assert enough(*few)


def test_fewer_blocks_than_a_bootstrap_needs_give_no_score() -> None:
    image = torch.ones(2, 64, 160)
    scoring = np.zeros((64, 160), np.uint8)
    for n, (y, x) in enumerate([(4, 4), (36, 36), (4, 100)], start=1):
        scoring[y : y + 10, x : x + 9], scoring[y : y + 10, x + 9 : x + 18] = 1, 2
        own = Scorer([image], [scoring], BOTH, side=64, margin=0, seed=0)
        assert own.enough == (n >= MIN_BLOCKS)
