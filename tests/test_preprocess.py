"""Planes of channels, their percentiles, and windows with mirrored borders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from napari_unetpp.preprocess import (
    Planes,
    Preprocessing,
    check_annotation,
    read_window,
    reflect,
)


class Recorder:
    """An array that can only be indexed, and remembers how."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self.keys: list[Any] = []

    def __getitem__(self, key: Any) -> np.ndarray:
        self.keys.append(key)
        return self._array[key]


def plain(low: float = 0, high: float = 100) -> Preprocessing:
    return Preprocessing(low, high, clip_low=-100, clip_high=100)


# --- percentiles -----------------------------------------------------------------


def test_the_defaults() -> None:
    assert Preprocessing().to_dict() == {
        "low": 1.0,
        "high": 99.8,
        "clip_low": -0.5,
        "clip_high": 2.0,
    }


def test_limits_are_the_percentiles_of_each_channel() -> None:
    ramp = np.arange(1001, dtype=np.float32).reshape(7, 143)
    limits = Preprocessing().limits(np.stack([ramp, 10 * ramp + 5]))
    np.testing.assert_allclose(limits, [[10, 105], [998, 9985]], rtol=1e-6)
    assert limits.shape == (2, 2)
    assert limits.dtype == np.float64


def test_a_plane_that_is_flat_but_for_a_few_pixels_takes_its_extremes() -> None:
    plane = np.full((2, 40, 50), 7, np.uint8)
    plane[0, 0, 0], plane[0, 1, 1] = 3, 9
    plane[1] = np.arange(50)
    limits = Preprocessing(2, 98).limits(plane)
    np.testing.assert_array_equal(limits[:, 0], [3, 9])
    np.testing.assert_allclose(limits[:, 1], np.percentile(plane[1], (2, 98)))


@pytest.mark.parametrize(
    ("shape", "step"),
    [
        ((1, 1000, 1000), 1),
        ((1, 1000, 1001), 2),
        ((1, 2000, 2000), 2),
        ((1, 2001, 2000), 3),
        ((2, 1, 9_000_000), 3),
    ],
)
def test_a_large_plane_is_thinned_to_a_million_pixels(
    shape: tuple[int, int, int], step: int
) -> None:
    plane = Recorder(np.broadcast_to(np.uint8(3), shape))
    np.testing.assert_array_equal(plain().limits(plane), np.full((2, shape[0]), 3))
    every = slice(None, None, step)
    assert plane.keys == [(slice(None), every, every)]


# --- scaling ---------------------------------------------------------------------


def test_apply_scales_and_clips() -> None:
    pixels = np.array([[[10, 20, 30, 15, 5, 100]]], np.uint8)
    found = Preprocessing().apply(pixels, np.array([[10.0], [30.0]]))
    np.testing.assert_array_equal(found, [[[0, 0.5, 1, 0.25, -0.25, 2]]])
    assert found.dtype == np.float32
    other = Preprocessing(clip_low=0, clip_high=0.75).apply(
        pixels, np.array([[10.0], [30.0]])
    )
    np.testing.assert_array_equal(other, [[[0, 0.5, 0.75, 0.25, 0, 0.75]]])


def test_apply_scales_each_channel_by_its_own_limits() -> None:
    pixels = np.stack([np.full((2, 3), 4.0), np.full((2, 3), 4.0)])
    found = plain().apply(pixels, np.array([[0.0, 2.0], [8.0, 3.0]]))
    np.testing.assert_array_equal(found[:, 0, 0], [0.5, 2])
    assert found.shape == (2, 2, 3)


def test_a_channel_without_contrast_becomes_zero() -> None:
    pixels = np.stack([np.full((3, 3), 5.0), np.arange(9.0).reshape(3, 3)])
    settings = plain()
    found = settings.apply(pixels, settings.limits(pixels))
    assert not found[0].any()
    np.testing.assert_allclose(found[1].ravel(), np.arange(9) / 8, rtol=1e-6)


@pytest.mark.parametrize(
    "dtype",
    ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ">u2"],
)
def test_every_dtype_is_scaled_alike_and_left_unchanged(dtype: str) -> None:
    plane = np.arange(12).reshape(1, 3, 4).astype(dtype)
    before = plane.copy()
    settings = plain()
    found = settings.apply(plane, settings.limits(plane))
    top = plane.max().astype(float)
    np.testing.assert_allclose(found, before.astype(float) / top, rtol=1e-6)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(plane, before)
    assert not np.shares_memory(plane, found)


@pytest.mark.parametrize("dtype", ["i4", "u4", "i8", "f8"])
def test_small_contrast_on_a_large_offset_survives(dtype: str) -> None:
    plane = (2**30 + np.arange(5)).reshape(1, 1, 5).astype(dtype)
    settings = plain()
    found = settings.apply(plane, settings.limits(plane))
    np.testing.assert_allclose(found[0, 0], np.arange(5) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "count"),
    [
        ((np.nan,), 1),
        ((np.inf,), 1),
        ((-np.inf, np.inf, np.nan), 3),
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite_are_refused(
    values: tuple[float, ...], count: int, dtype: type
) -> None:
    plane = np.zeros((1, 4, 4), dtype)
    plane[0, 0, : len(values)] = values
    for refuse in (
        lambda: plain().limits(plane),
        lambda: plain().apply(plane, np.array([[0.0], [1.0]])),
    ):
        with pytest.raises(ValueError, match=rf"finite numbers only, got {count} NaN"):
            refuse()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": -0.1}, "`low` must lie between 0 and 100, got -0.1"),
        ({"low": 100.5}, "`low` must lie between 0 and 100"),
        ({"high": -1}, "`high` must lie between 0 and 100"),
        ({"high": 101}, "`high` must lie between 0 and 100, got 101"),
        ({"high": float("nan")}, "`high` must lie between"),
        ({"low": "1"}, "`low` must be a number"),
        ({"clip_low": -101}, "`clip_low` must lie between -100 and 100"),
        ({"clip_low": 101}, "`clip_low` must lie between -100 and 100"),
        ({"clip_high": 100.5}, "`clip_high` must lie between -100 and 100"),
        ({"clip_high": -101}, "`clip_high` must lie between -100 and 100"),
        ({"low": 99, "high": 1}, "`low` must be below `high`, got 99 and 1"),
        ({"low": 50, "high": 50}, "`low` must be below `high`"),
        ({"clip_low": 3}, "`clip_low` must be below `clip_high`, got 3 and 2.0"),
    ],
)
def test_settings_out_of_range_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing(**changes)


def test_settings_at_their_ends_are_accepted() -> None:
    Preprocessing(0, 100, clip_low=-100, clip_high=100)


# --- planes ----------------------------------------------------------------------


@st.composite
def images(draw: st.DrawFn) -> tuple[np.ndarray, int | None, np.ndarray]:
    """Return an image, its channel axis, and the same as (planes, C, Y, X)."""
    leading = draw(st.lists(st.integers(1, 3), max_size=3))
    channels = draw(st.one_of(st.none(), st.integers(1, 5)))
    size = draw(st.tuples(st.integers(1, 5), st.integers(5, 7)))
    shape = (*leading, *([] if channels is None else [channels]), *size)
    image = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    expected = image.reshape(-1, channels or 1, *size)
    if channels is None:
        return image, None, expected
    axis = draw(st.integers(-image.ndim, image.ndim - 1))
    return np.moveaxis(image, len(leading), axis), axis, expected


@given(images())
def test_planes_are_channels_first_wherever_the_channels_are(
    drawn: tuple[np.ndarray, int | None, np.ndarray],
) -> None:
    image, axis, expected = drawn
    planes = Planes(image, channel_axis=axis)
    assert len(planes) == len(expected)
    assert planes.channels == expected.shape[1]
    assert planes.shape == expected.shape[2:]
    kept = [
        n for i, n in enumerate(image.shape) if axis is None or i != axis % image.ndim
    ]
    assert (*planes.leading, *planes.shape) == tuple(kept)
    order = np.arange(len(planes)).reshape(planes.leading)
    for number, plane in enumerate(expected):
        found = planes.plane(number)
        assert found.shape == plane.shape
        np.testing.assert_array_equal(found[:, :, :], plane)
        np.testing.assert_array_equal(found[0:1, 1:3, ::2], plane[0:1, 1:3, ::2])
        index = planes.index(number)
        assert all(type(i) is int for i in index)
        assert index == tuple(np.argwhere(order == number)[0])


@pytest.mark.parametrize(
    ("shape", "axis", "key"),
    [
        ((50, 60), None, (slice(2, 4), slice(5, 9))),
        ((4, 50, 60), None, (1, slice(2, 4), slice(5, 9))),
        ((2, 50, 60), 0, (slice(None), slice(2, 4), slice(5, 9))),
        ((50, 60, 2), -1, (slice(2, 4), slice(5, 9), slice(None))),
        ((50, 2, 60), 1, (slice(2, 4), slice(None), slice(5, 9))),
        ((4, 2, 50, 60), 1, (1, slice(None), slice(2, 4), slice(5, 9))),
        ((2, 4, 50, 60), 0, (slice(None), 1, slice(2, 4), slice(5, 9))),
    ],
)
def test_a_lazy_image_is_asked_for_the_window_alone(
    shape: tuple[int, ...], axis: int | None, key: tuple[Any, ...]
) -> None:
    image = Recorder(np.zeros(shape, np.uint8))
    planes = Planes(image, channel_axis=axis)
    plane = planes.plane(min(1, len(planes) - 1))
    assert image.keys == []
    assert plane[:, 2:4, 5:9].shape == (planes.channels, 2, 4)
    assert image.keys == [key]


def test_lists_and_tensors_are_taken_too() -> None:
    assert Planes([[1, 2], [3, 4]]).shape == (2, 2)
    planes = Planes(torch.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(planes.plane(0)[:, :, :], [[[0, 1, 2], [3, 4, 5]]])


@pytest.mark.parametrize(
    ("image", "axis", "message"),
    [
        (np.zeros((4, 4), np.complex64), None, "real numbers, got dtype complex64"),
        (np.zeros((4, 4), object), None, "real numbers, got dtype object"),
        (np.full((4, 4), "a"), None, "real numbers, got dtype"),
        (None, None, "real numbers, got dtype object"),
        (np.zeros(4), None, r"at least 2 axes.*got shape \(4,\)"),
        (np.float32(1), None, r"at least 2 axes.*got shape \(\)"),
        (np.zeros((4, 4)), 0, "at least 3 axes"),
        (np.zeros((0, 4)), None, "none of them empty"),
        (np.zeros((2, 4, 0)), 0, "none of them empty"),
        (
            np.zeros((4, 4, 3)),
            None,
            r"\(4, 4, 3\) looks like colour. Pass channel_axis=-1",
        ),
        (np.zeros((4, 4, 4)), None, "looks like colour"),
        (np.zeros((2, 9, 9, 3)), None, "looks like colour"),
        (np.zeros((4, 4, 3)), 3, "`channel_axis` must lie between -3 and 2, got 3"),
        (np.zeros((4, 4, 3)), -4, "`channel_axis` must lie between -3 and 2, got -4"),
        (np.zeros((4, 4, 3)), True, "`channel_axis` must be a whole number"),
        (np.zeros((4, 4, 3)), 1.0, "`channel_axis` must be a whole number"),
        (np.zeros((17, 4, 4)), 0, "at most 16 channels, got 17 along channel_axis=0"),
    ],
)
def test_what_is_no_image_is_refused(image: Any, axis: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"`volume` .*{message}|^{message}"):
        Planes(image, channel_axis=axis, name="volume")


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((9, 3), None), ((9, 4), None), ((3, 9, 9), None), ((2, 9, 5), None),
     ((9, 9, 2), None), ((16, 4, 4), 0), ((3, 3, 3), 0), ((1, 1), None)],
)  # fmt: skip
def test_what_only_resembles_colour_is_taken(
    shape: tuple[int, ...], axis: int | None
) -> None:
    Planes(np.zeros(shape), channel_axis=axis)


def test_a_stack_of_planes_needs_the_annotation_of_its_shape() -> None:
    planes = Planes(np.zeros((5, 3, 8, 9)), channel_axis=1)
    for dtype in (bool, np.uint8, np.int64):
        check_annotation(np.zeros((5, 8, 9), dtype), planes, "a")
    with pytest.raises(
        ValueError, match=r"`a` must have the image's shape \(5, 8, 9\), got \(8, 9\)"
    ):
        check_annotation(np.zeros((8, 9), int), planes, "a")
    with pytest.raises(ValueError, match=r"`a` must hold whole numbers.*float64"):
        check_annotation(np.zeros((5, 8, 9)), planes, "a")
    with pytest.raises(ValueError, match=r"`a` must hold whole numbers.*complex128"):
        check_annotation(np.zeros((5, 8, 9), complex), planes, "a")


# --- windows ---------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(0, 90), st.integers(0, 90))
def test_reflect_is_numpys_mirror(n: int, before: int, after: int) -> None:
    expected = np.pad(np.arange(n), (before, after), mode="reflect")
    found = reflect(np.arange(-before, n + after), n)
    np.testing.assert_array_equal(found, expected)


@given(
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(-30, 30), st.integers(-30, 30)),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_a_window_is_cut_from_the_mirrored_plane(
    shape: tuple[int, int], start: tuple[int, int], size: tuple[int, int]
) -> None:
    plane = np.arange(2 * shape[0] * shape[1]).reshape(2, *shape)
    limits = np.array([[0.0, 0.0], [1.0, 2.0]])
    settings = Preprocessing(clip_low=-100, clip_high=100)
    mirrored = np.pad(plane, ((0, 0), (60, 60), (60, 60)), mode="reflect")
    top, left = start[0] + 60, start[1] + 60
    expected = mirrored[:, top : top + size[0], left : left + size[1]]
    expected = np.minimum(expected / np.array([1, 2])[:, None, None], 100)
    rows, columns = ((a, a + n) for a, n in zip(start, size, strict=True))
    found = read_window(plane, rows, columns, settings, limits)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32


def test_a_window_reads_no_more_than_it_holds() -> None:
    plane = Recorder(np.arange(400.0).reshape(1, 20, 20))
    limits = np.array([[0.0], [400.0]])
    read_window(plane, (3, 9), (-4, 2), Preprocessing(), limits)  # type: ignore[arg-type]
    assert plane.keys == [(slice(None), slice(3, 9), slice(0, 5))]
