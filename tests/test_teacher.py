"""A forest's soft labels: of free pixels only, and of nothing it has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from napari_unetpp.heldout import HeldOut
from napari_unetpp.teacher import _VALUES, Teacher

NOTHING = HeldOut(0, 0.0)


def stripes(
    side: int = 96, seed: int = 0, channels: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an image of three grey values, strokes on each, and the truth."""
    truth = np.repeat(np.arange(3), -(-side // 3))[:side]
    truth = np.broadcast_to(truth, (side, side))
    noise = np.random.default_rng(seed).normal(0, 0.05, (channels, side, side))
    strokes = np.zeros((side, side), np.uint8)
    strokes[10:14] = strokes[side // 2 : side // 2 + 4] = 1
    return (truth / 2 + noise).astype(np.float32), strokes * (truth + 1), truth + 1


def test_a_forest_tells_grey_values_apart() -> None:
    image, strokes, truth = stripes()
    lesson = Teacher(3, NOTHING, 0).teach([image], [strokes], [0])
    assert lesson is not None
    (places,), (beliefs,) = lesson
    assert len(places) == len(np.unique(places)) > 150
    assert not strokes.ravel()[places].any()
    np.testing.assert_allclose(beliefs.sum(1), 1, atol=1e-6)
    assert beliefs.max(1).min() >= 0.9
    right = beliefs.argmax(1) + 1 == truth.ravel()[places]
    assert right.mean() > 0.95


def test_what_is_held_out_gets_no_soft_labels() -> None:
    image, strokes, _ = stripes()
    held_out = HeldOut(3, 0.4)
    mask = held_out.mask(strokes.shape, 7)
    lesson = Teacher(3, held_out, 0).teach([image], [np.where(mask, 0, strokes)], [7])
    assert lesson is not None
    assert 0 < mask.mean() < 1
    assert not mask.ravel()[lesson.places[0]].any()


def test_a_class_without_strokes_means_no_lesson() -> None:
    image, strokes, _ = stripes()
    strokes[strokes == 3] = 0
    assert Teacher(3, NOTHING, 0).teach([image], [strokes], [0]) is None


def test_an_image_without_strokes_gets_none_and_tiny_ones_are_left_out() -> None:
    image, strokes, _ = stripes()
    bare, tiny = np.zeros_like(strokes), np.ones((5, 5), np.uint8)
    teacher = Teacher(3, NOTHING, 0)
    lesson = teacher.teach(
        [image, image, image[:, :5, :5]], [bare, strokes, tiny], [0, 0, 0]
    )
    assert lesson is not None
    assert [len(p) > 0 for p in lesson.places] == [False, True, False]
    assert [b.shape[1] for b in lesson.beliefs] == [3, 3, 3]
    assert teacher.teach([image[:, :5, :5]], [tiny], [0]) is None


def test_the_same_seed_gives_the_same_lesson_whatever_was_asked_before() -> None:
    image, strokes, _ = stripes()
    more = np.where(np.roll(strokes, 30, axis=0), 2, strokes).astype(np.uint8)
    teacher = Teacher(3, NOTHING, 5)
    teacher.ask([image], [more], [0])
    teacher.ask([image], [strokes], [0])  # the older question is forgotten
    found = teacher.answer()
    expected = Teacher(3, NOTHING, 5).teach([image], [strokes], [0])
    other = Teacher(3, NOTHING, 6).teach([image], [strokes], [0])
    assert found is not None
    assert expected is not None
    assert other is not None
    np.testing.assert_array_equal(found.places[0], expected.places[0])
    np.testing.assert_array_equal(found.beliefs[0], expected.beliefs[0])
    assert not np.array_equal(found.places[0], other.places[0])


def test_features_are_made_once_and_only_around_strokes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from napari_unetpp import teacher as room

    seen = []
    monkeypatch.setattr(
        room,
        "pixel_features",
        lambda window, _: (
            seen.append(window.shape) or np.repeat(window[0, ..., None], 20, axis=-1)
        ),
    )
    image, strokes, _ = stripes(2400)
    strokes[:1100], strokes[:, 1500:] = 0, 0
    strokes[1300:1310, :1000], strokes[1400:1410, :1000] = 2, 3
    asked = Teacher(3, NOTHING, 0)
    for _ in range(2):
        asked.teach([image], [strokes], [0])
        strokes[1500:1510, :500] = 1
    # A block of a third of the side and 64 px around it, where the image goes on.
    assert set(seen) == {(1, 928, 864), (1, 928, 928)}
    assert len(seen) == 2
    held = sum(b.features.size for b in asked._blocks.values())
    assert held <= _VALUES


def test_a_failure_is_raised_by_the_answer() -> None:
    teacher = Teacher(3, NOTHING, 0)
    teacher.ask([np.zeros((1, 40, 40), np.float32)], [], [0])
    with pytest.raises(ValueError, match="shorter"):
        teacher.answer()
