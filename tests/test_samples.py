"""The samples agree with themselves and fail clearly without a network."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import skimage.data
from skimage.color import rgb2gray
from skimage.filters import threshold_otsu
from skimage.measure import label

from napari_unetpp import _sample_data, samples
from napari_unetpp.errors import ImageFileError

LOCAL = tuple(name for name in samples.SAMPLES if name not in samples.NEEDS_NETWORK)


@pytest.fixture(scope="module", params=LOCAL)
def sample(request):
    return samples.load(request.param)


def test_shapes_and_dtypes_agree(sample):
    plane = sample.image.shape[:2]
    assert sample.image.ndim == (2 if sample.channel_axis is None else 3)
    assert sample.image.dtype == np.uint8
    for labels in (sample.strokes, sample.truth):
        assert labels.shape == plane
        assert labels.dtype == np.uint8


def test_values_are_the_classes(sample):
    wished = list(range(len(sample.classes) + 1))
    assert sample.classes[0] == "background"
    assert np.unique(sample.strokes).tolist() == wished
    assert np.unique(sample.truth).tolist() == wished


def test_every_class_has_three_strokes(sample):
    for value in range(1, len(sample.classes) + 1):
        assert label(sample.strokes == value, connectivity=2).max() >= 3


def test_strokes_are_sparse(sample):
    assert 0.002 < (sample.strokes > 0).mean() < 0.025


def test_strokes_agree_with_the_truth(sample):
    both = (sample.strokes > 0) & (sample.truth > 0)
    assert both.sum() > 0.9 * (sample.strokes > 0).sum()
    assert (sample.strokes == sample.truth)[both].mean() >= 0.98


def test_truth_judges_most_of_the_image(sample):
    assert (sample.truth > 0).mean() > 0.9


def test_description_says_source_licence_and_how(sample):
    for word in ("scikit-image", "drawn by hand", "unsure", "agree by IoU"):
        assert word in sample.description
    assert "CC0" in sample.description or "copyright" in sample.description


def otsu_iou(sample):
    grey = sample.image if sample.channel_axis is None else rgb2gray(sample.image)
    judged = sample.truth > 0
    objects = sample.truth[judged] > 1
    bright = grey[judged] >= threshold_otsu(grey)
    return max(
        (mask & objects).sum() / (mask | objects).sum() for mask in (bright, ~bright)
    )


@pytest.mark.parametrize("name", ["immunohistochemistry", "coins", "retina"])
def test_a_threshold_does_not_solve_the_demos(name):
    assert otsu_iou(samples.load(name)) < 0.85


def test_loads_are_independent():
    first = samples.load("coins")
    image, strokes = first.image.copy(), first.strokes.copy()
    first.image[:] = 0
    first.strokes[:] = 0
    second = samples.load("coins")
    np.testing.assert_array_equal(second.image, image)
    np.testing.assert_array_equal(second.strokes, strokes)
    np.testing.assert_array_equal(second.image, skimage.data.coins())


def test_sample_is_frozen():
    with pytest.raises(AttributeError):
        samples.load("coins").name = "other"


def test_unknown_name_lists_the_names():
    with pytest.raises(ValueError, match=r"immunohistochemistry.*got 'lena'"):
        samples.load("lena")


@pytest.mark.parametrize("name", samples.NEEDS_NETWORK)
@pytest.mark.parametrize("cause", [ConnectionError, ModuleNotFoundError, ValueError])
def test_without_network_the_error_is_ours(monkeypatch, name, cause):
    def offline():
        raise cause("no way out")

    monkeypatch.setattr(skimage.data, name, offline)
    wished = rf"{name}.*{cause.__name__}.*network.*needs none: immuno"
    with pytest.raises(ImageFileError, match=wished) as caught:
        samples.load(name)
    assert isinstance(caught.value.__cause__, cause)


def test_fetched_samples_have_empty_strokes(monkeypatch):
    stack = np.zeros((3, 2, 8, 9), np.uint16)
    stack[:, 1] = 7
    monkeypatch.setattr(skimage.data, "cells3d", lambda: stack)
    sample = samples.load("cells3d")
    assert sample.needs_network
    assert sample.image.shape == (3, 8, 9, 2)
    assert (sample.image[..., 1] == 7).all()
    assert sample.strokes.shape == (3, 8, 9)
    assert not sample.strokes.any()
    assert sample.truth is None


def test_data_folder_is_small():
    folder = resources.files("napari_unetpp") / "_data"
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".png")]
    assert {entry.name for entry in files} == {
        f"{name}_{kind}.png" for name in LOCAL for kind in ("strokes", "truth")
    }
    assert sum(len(entry.read_bytes()) for entry in folder.iterdir()) < 1_000_000


@pytest.mark.parametrize("name", LOCAL)
def test_napari_gets_image_and_annotation(name):
    (image, options, kind), (strokes, label_options, label_kind) = getattr(
        _sample_data, f"sample_{name}"
    )()
    assert (kind, label_kind) == ("image", "labels")
    assert options["name"] == name
    assert options.get("rgb", False) is (image.ndim == 3)
    assert label_options["name"] == "annotation"
    assert label_options["metadata"] == {"classes": list(samples.load(name).classes)}
    assert strokes.shape == image.shape[:2]


def test_every_sample_has_a_napari_function():
    for name in samples.SAMPLES:
        assert callable(getattr(_sample_data, f"sample_{name}"))


def test_napari_splits_channels_that_are_no_colours(monkeypatch):
    monkeypatch.setattr(
        skimage.data, "cells3d", lambda: np.zeros((3, 2, 8, 9), np.uint16)
    )
    (_, options, _), _ = _sample_data.sample_cells3d()
    assert options == {"name": ["cells3d 0", "cells3d 1"], "channel_axis": -1}
