"""Annotated planes are read, checked and scaled; anything doubtful is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from napari_unetpp.examples import read_examples
from napari_unetpp.preprocess import Preprocessing


def ramp(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return (np.arange(np.prod(shape)) % 251).reshape(shape).astype(dtype)


def strokes(*shape: int) -> np.ndarray:
    annotation = np.zeros(shape, np.uint8)
    annotation[..., 0, 0], annotation[..., -1, -1] = 1, 2
    return annotation


def test_a_single_image() -> None:
    image, annotation = ramp(20, 30), strokes(20, 30)
    found = read_examples(image, annotation)
    settings = Preprocessing()
    expected = settings.apply(image[None], settings.limits(image[None]))
    np.testing.assert_array_equal(found.images[0], expected)
    np.testing.assert_array_equal(found.targets[0], annotation)
    assert found.targets[0].dtype == np.uint8
    assert (found.numbers, found.n_classes) == ([0], 2)
    assert len(found.images) == len(found.fingerprints) == 1


def test_only_annotated_planes_are_read() -> None:
    class Lazy:
        shape, dtype, ndim = (4, 20, 30), np.dtype(np.uint8), 3

        def __init__(self) -> None:
            self.read: list[int] = []

        def __getitem__(self, key: tuple[Any, ...]) -> np.ndarray:
            self.read.append(key[0])
            return ramp(4, 20, 30, dtype=np.uint8)[key]

    image, annotation = Lazy(), np.zeros((4, 20, 30), np.uint8)
    annotation[1] = strokes(20, 30)
    annotation[3, 5, 5] = 4
    found = read_examples(image, annotation)
    assert image.read == [1, 3]
    assert found.numbers == [1, 3]
    assert found.n_classes == 4
    np.testing.assert_array_equal(found.targets[1], annotation[3])


def test_planes_of_several_leading_axes_are_numbered_in_c_order() -> None:
    image, annotation = ramp(2, 3, 20, 30), np.zeros((2, 3, 20, 30), np.int64)
    annotation[1, 2, 0, 0] = annotation[0, 1, 4, 4] = 1
    found = read_examples(image, annotation)
    assert found.numbers == [1, 5]
    np.testing.assert_array_equal(found.targets[1], annotation[1, 2])
    settings = Preprocessing()
    plane = image[1, 2][None]
    np.testing.assert_array_equal(
        found.images[1], settings.apply(plane, settings.limits(plane))
    )


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_channels_may_be_anywhere(axis: int) -> None:
    image = ramp(3, 20, 30)
    moved = np.moveaxis(image, 0, axis)
    found = read_examples(moved, strokes(20, 30), channel_axis=axis)
    expected = read_examples(image, strokes(20, 30), channel_axis=0)
    np.testing.assert_array_equal(found.images[0], expected.images[0])
    assert found.images[0].shape == (3, 20, 30)


def test_a_sequence_may_mix_sizes_and_dtypes() -> None:
    shapes = [(20, 30), (1, 9), (64, 5), (2, 9, 9)]
    dtypes = [np.uint8, np.uint16, np.float64, bool]
    images = [
        (ramp(*s) % 200 if d is not bool else ramp(*s) % 2).astype(d)
        for s, d in zip(shapes, dtypes, strict=True)
    ]
    kinds = [np.uint8, np.int16, np.uint64, np.int64]
    annotations = [strokes(*s).astype(k) for s, k in zip(shapes, kinds, strict=True)]
    before = [a.copy() for a in (*images, *annotations)]
    for sequence in (list, tuple):
        found = read_examples(sequence(images), sequence(annotations))
        assert [i.shape for i in found.images] == [
            (1, 20, 30), (1, 1, 9), (1, 64, 5), (1, 9, 9), (1, 9, 9)
        ]  # fmt: skip
        assert found.numbers == [0, 0, 0, 0, 1]
    for array, old in zip((*images, *annotations), before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_a_dense_mask_counts_its_first_class_from_zero() -> None:
    mask = np.zeros((2, 20, 30), np.int32)
    mask[1, 3, 3] = 5
    found = read_examples(ramp(2, 20, 30), mask, unlabelled=None)
    np.testing.assert_array_equal(found.targets, mask + 1)
    assert found.targets[0].dtype == np.uint8
    assert found.n_classes == 6
    assert found.numbers == [0, 1]


def test_lists_tensors_and_truth_values_are_annotations_too() -> None:
    image = ramp(4, 5)
    for annotation in (
        strokes(4, 5) > 0,
        torch.from_numpy((strokes(4, 5) > 0).astype(int)),
    ):
        (target,) = read_examples(image, annotation).targets
        np.testing.assert_array_equal(target, strokes(4, 5) > 0)


def test_the_highest_values_fit() -> None:
    annotation = strokes(4, 5)
    annotation[0, 1] = 255
    assert read_examples(ramp(4, 5), annotation).n_classes == 255
    annotation[0, 1] = 254
    found = read_examples(ramp(4, 5), annotation, unlabelled=None)
    assert found.targets[0][0, 1] == found.n_classes == 255


def test_the_models_preprocessing_is_used() -> None:
    settings = Preprocessing(20, 80, clip_low=0, clip_high=1)
    found = read_examples(ramp(9, 9), strokes(9, 9), preprocessing=settings)
    plane = ramp(9, 9)[None]
    np.testing.assert_array_equal(
        found.images[0], settings.apply(plane, settings.limits(plane))
    )


def test_fingerprints_tell_images_annotations_and_dtypes_apart() -> None:
    image, annotation = ramp(8, 9, dtype=np.uint8), strokes(8, 9)
    other = annotation.copy()
    other[3, 3] = 1
    cases = [
        (image, annotation),
        (image + 1, annotation),
        (image.astype(np.uint16), annotation),
        (image.reshape(9, 8), annotation.reshape(9, 8)),
        (image, other),
    ]
    prints = [read_examples(*case).fingerprints[0] for case in cases]
    assert len(set(prints)) == len(cases)
    assert prints[0] == read_examples(image.copy(), annotation).fingerprints[0]
    assert all(len(p) == 32 and set(p) <= set("0123456789abcdef") for p in prints)


GOOD, PAINT = ramp(8, 9), strokes(8, 9)
NAN = ramp(8, 9)
NAN[2, 3] = np.nan


def with_value(value: int, dtype: Any = np.int64) -> np.ndarray:
    annotation = PAINT.astype(dtype)
    annotation[4, 4] = value
    return annotation


@pytest.mark.parametrize(
    ("images", "annotations", "settings", "message"),
    [
        (
            GOOD,
            strokes(8, 8),
            {},
            r"`annotation` must have the image's shape \(8, 9\), got \(8, 8\)",
        ),
        ([GOOD, GOOD], [PAINT, strokes(9, 8)], {}, r"`annotation\[1\]` must have"),
        (ramp(4, 8, 9), PAINT, {}, r"shape \(4, 8, 9\), got \(8, 9\)"),
        (
            GOOD,
            PAINT.astype(float),
            {},
            "`annotation` must hold whole numbers.*float64",
        ),
        (
            GOOD,
            with_value(-1),
            {},
            "`annotation` must hold values from 0 to 255, got -1 to 2",
        ),
        (GOOD, with_value(256), {}, "values from 0 to 255, got 0 to 256"),
        (GOOD, with_value(2**63, np.uint64), {}, f"got 0 to {2**63}"),
        (
            GOOD,
            with_value(255),
            {"unlabelled": None},
            "values from 0 to 254, got 0 to 255",
        ),
        (GOOD, 0 * PAINT, {}, "`annotations` must have annotated pixels, got none"),
        ([GOOD], [0 * PAINT], {}, "`annotations` must have annotated pixels, got none"),
        (NAN, PAINT, {}, "`image` must hold finite numbers only, got 1 NaN"),
        ([GOOD, NAN], [PAINT, PAINT], {}, r"`image\[1\]` must hold finite numbers"),
        ([GOOD, 0 * GOOD], [PAINT, PAINT], {}, r"`image\[1\]` must have contrast"),
        ([GOOD, None], [PAINT, PAINT], {}, r"`image\[1\]` must hold real numbers"),
        (
            [GOOD, GOOD],
            [PAINT, with_value(-1)],
            {},
            r"`annotation\[1\]` must hold values",
        ),
        (
            0 * GOOD + 7,
            PAINT,
            {},
            "`image` must have contrast.*plane 0 holds only the value 7",
        ),
        (np.ones((1, 1)), np.ones((1, 1), int), {}, "must have contrast"),
        ([], [], {}, "at least one, got 0 and 0"),
        ([GOOD], [], {}, "at least one, got 1 and 0"),
        ([GOOD, GOOD], [PAINT], {}, "must be as many.*got 2 and 1"),
        (
            [GOOD],
            PAINT,
            {},
            "both be arrays or both be sequences.*got list and ndarray",
        ),
        (
            GOOD,
            [PAINT],
            {},
            "both be arrays or both be sequences.*got ndarray and list",
        ),
        (ramp(8, 9, 3), PAINT, {}, "channel_axis=-1"),
        (ramp(8, 9, 3), PAINT, {"channel_axis": 0}, r"shape \(9, 3\)"),
        (ramp(17, 8, 9), PAINT, {"channel_axis": 0}, "at most 16 channels, got 17"),
        (GOOD.astype(complex), PAINT, {}, "real numbers, got dtype complex"),
        (
            [ramp(8, 9, 3), ramp(8, 9, 2)],
            [PAINT, PAINT],
            {"channel_axis": -1},
            r"`images` must all have as many channels, got \[2, 3\]",
        ),
        (None, None, {}, "real numbers, got dtype object"),
    ],
)
def test_bad_input_is_refused(
    images: Any, annotations: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_examples(images, annotations, **settings)


def test_a_flat_channel_is_no_reason_to_refuse() -> None:
    image = np.stack([GOOD, 0 * GOOD])
    found = read_examples(image, PAINT, channel_axis=0)
    assert found.images[0][0].any()
    assert not found.images[0][1].any()
