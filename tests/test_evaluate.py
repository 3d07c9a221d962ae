from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from napari_unetpp import evaluate as module
from napari_unetpp.evaluate import confusion_matrix, evaluate, from_confusion

TRUTH = np.array([[0, 1, 1, 2], [2, 2, 1, 0]])
LABELS = np.array([[1, 1, 2, 2], [2, 0, 1, 2]])


def same(a, b):
    """Equal, NaN to NaN."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value == pytest.approx(b[key], nan_ok=True, abs=1e-12)


def test_worked_example():
    # Counted: truth 1 1 2 2 2 1, labels 1 2 2 2 0 1.
    result = evaluate(LABELS, TRUTH, classes=("background", "cell", "mitosis"))
    same(result.iou, {"background": 2 / 3, "cell": 2 / 4, "mitosis": math.nan})
    same(result.dice, {"background": 4 / 5, "cell": 4 / 6, "mitosis": math.nan})
    assert result.mean_iou == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result.foreground_iou == pytest.approx(1 / 2)
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.n_pixels == 6
    np.testing.assert_array_equal(result.confusion, [[2, 1, 0], [0, 2, 0], [0, 0, 0]])
    assert result.confusion.dtype == np.int64


def test_the_result_holds_plain_numbers():
    result = evaluate(LABELS, TRUTH)
    values = [*result.iou.values(), *result.dice.values()]
    values += [result.mean_iou, result.foreground_iou, result.accuracy]
    assert {type(v) for v in values} == {float}
    assert type(result.n_pixels) is int
    assert {type(k) for k in result.iou} == {int}
    with pytest.raises(AttributeError):
        result.accuracy = 1.0


def test_without_classes_the_keys_are_the_values_found():
    truth = np.array([0, 1, 1, 300, 300, 70000, 0])
    labels = np.array([9, 1, 300, 300, 0, 70000, 8])
    result = evaluate(labels, truth)
    same(result.iou, {1: 1 / 2, 300: 1 / 3, 70000: 1.0})
    np.testing.assert_array_equal(result.confusion, [[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    assert result.n_pixels == 5
    assert result.foreground_iou == pytest.approx(2 / 3)


def test_a_value_only_predicted_is_a_class_of_its_own():
    result = evaluate([1, 5], [1, 1])
    same(result.iou, {1: 1 / 2, 5: 0.0})
    assert result.mean_iou == 1 / 4


def test_dense_coding_counts_every_pixel():
    result = evaluate(LABELS, TRUTH, unlabelled=None)
    same(result.iou, {0: 0.0, 1: 2 / 4, 2: 2 / 5})
    assert result.n_pixels == 8
    assert result.foreground_iou == pytest.approx((2 / 4 + 2 / 5) / 2)
    assert result.mean_iou == pytest.approx((2 / 4 + 2 / 5) / 3)
    np.testing.assert_array_equal(result.confusion, [[0, 1, 1], [0, 2, 1], [1, 0, 2]])
    named = evaluate(LABELS, TRUTH, unlabelled=None, classes=("a", "b", "c"))
    same(named.iou, {"a": 0.0, "b": 2 / 4, "c": 2 / 5})
    assert named.foreground_iou == result.foreground_iou


def test_foreground_without_the_first_class_found():
    assert evaluate([2, 2], [2, 2]).foreground_iou == 1
    assert math.isnan(evaluate([1, 1], [1, 1]).foreground_iou)
    assert math.isnan(evaluate([0, 0], [0, 0], unlabelled=None).foreground_iou)
    assert evaluate([1, 1], [1, 1], unlabelled=None).foreground_iou == 1


def test_labels_without_class_are_wrong():
    result = evaluate([0, 0, 1], [1, 1, 1], classes=("a",))
    same(result.iou, {"a": 1 / 3})
    same(result.dice, {"a": 2 / 4})
    assert result.accuracy == 1 / 3
    np.testing.assert_array_equal(result.confusion, [[1]])
    assert result.n_pixels == 3


@pytest.mark.parametrize("classes", [None, ("a", "b")])
def test_nothing_annotated_is_nan(classes):
    result = evaluate(np.ones((2, 2), int), np.zeros((2, 2), int), classes=classes)
    assert all(math.isnan(v) for v in [*result.iou.values(), *result.dice.values()])
    assert math.isnan(result.mean_iou)
    assert math.isnan(result.foreground_iou)
    assert math.isnan(result.accuracy)
    assert result.n_pixels == 0
    assert len(result.iou) == (2 if classes else 0)


def test_empty_arrays_are_nan():
    for unlabelled in (0, None):
        empty = np.zeros((0, 4), np.uint8)
        result = evaluate(empty, empty, classes=("a",), unlabelled=unlabelled)
        assert math.isnan(result.accuracy)


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.uint16, np.int64])
def test_every_integer_type_counts_alike(dtype):
    truth = np.array([0, 1, 1, 0]).astype(dtype)
    labels = np.array([1, 1, 0, 0], dtype=np.int32)
    result = evaluate(labels, truth, unlabelled=None)
    same(result.iou, {0: 1 / 3, 1: 1 / 3})


def test_three_dimensions_and_lists():
    assert evaluate([[[1]], [[2]]], [[[1]], [[2]]]).accuracy == 1


def test_views_with_strides():
    result = evaluate(LABELS.T[::-1], TRUTH.T[::-1])
    same(result.iou, evaluate(LABELS, TRUTH).iou)


@pytest.mark.parametrize("block", [1, 3, 7, 8, 100])
@pytest.mark.parametrize("classes", [None, ("a", "b", "c")])
def test_blocks_add_up(monkeypatch, block, classes):
    expected = evaluate(LABELS, TRUTH, classes=classes)
    monkeypatch.setattr(module, "_BLOCK", block)
    result = evaluate(LABELS, TRUTH, classes=classes)
    same(result.iou, expected.iou)
    np.testing.assert_array_equal(result.confusion, expected.confusion)


masks = hnp.arrays(np.uint8, (3, 7), elements=st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(masks, masks, st.sampled_from([0, None]))
def test_scores_equal_set_arithmetic(labels, truth, unlabelled):
    first = 1 if unlabelled == 0 else 0
    counted = truth >= first
    names = ["a", "b", "c", "d"][: 4 - first]
    result = evaluate(labels, truth, classes=names, unlabelled=unlabelled)
    for value, name in enumerate(names, start=first):
        a, b = (labels == value) & counted, truth == value
        either, size = (a | b).sum(), a.sum() + b.sum()
        if either:
            assert result.iou[name] == pytest.approx((a & b).sum() / either)
            assert result.dice[name] == pytest.approx(2 * (a & b).sum() / size)
        else:
            assert math.isnan(result.iou[name])
            assert math.isnan(result.dice[name])
        for other, column in zip(names, range(first, 4), strict=True):
            row = value - first
            assert (
                result.confusion[row, names.index(other)]
                == ((truth == value) & (labels == column)).sum()
            )
    assert result.n_pixels == counted.sum()
    if counted.any():
        right = (labels == truth)[counted].mean()
        assert result.accuracy == pytest.approx(right)
    found = evaluate(labels, truth, unlabelled=unlabelled)
    for value, score in found.iou.items():
        assert score == pytest.approx(result.iou[names[value - first]])
    assert found.mean_iou == pytest.approx(result.mean_iou, nan_ok=True)
    assert found.foreground_iou == pytest.approx(result.foreground_iou, nan_ok=True)


def test_inputs_stay_as_they_are():
    labels, truth = LABELS.copy(), TRUTH.copy()
    evaluate(labels, truth)
    np.testing.assert_array_equal(labels, LABELS)
    np.testing.assert_array_equal(truth, TRUTH)


# Summing over images


def test_confusion_matrix_has_a_column_for_no_label():
    counts = confusion_matrix(LABELS, TRUTH, 2)
    np.testing.assert_array_equal(counts, [[2, 1, 0], [0, 2, 1]])
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(
        confusion_matrix(LABELS, TRUTH, 3, None),
        [[0, 1, 1, 0], [0, 2, 1, 0], [1, 0, 2, 0]],
    )


def test_matrices_of_images_add_up():
    parts = sum(
        confusion_matrix(LABELS[:, i], TRUTH[:, i], 2) for i in range(TRUTH.shape[1])
    )
    names = ("a", "b")
    result = from_confusion(parts, classes=names)
    expected = evaluate(LABELS, TRUTH, classes=names)
    same(result.iou, expected.iou)
    assert result.accuracy == expected.accuracy
    assert result.n_pixels == 6


def test_from_a_square_matrix():
    result = from_confusion([[3, 1], [0, 4]])
    same(result.iou, {1: 3 / 4, 2: 4 / 5})
    assert result.foreground_iou == 4 / 5
    assert result.n_pixels == 8
    dense = from_confusion([[3, 1], [0, 4]], unlabelled=None)
    same(dense.iou, {0: 3 / 4, 1: 4 / 5})
    assert dense.foreground_iou == 4 / 5


def test_a_thousand_classes_are_the_limit():
    values = np.arange(1, 1001)
    assert evaluate(values, values).mean_iou == 1
    assert confusion_matrix(values, values, 1000).shape == (1000, 1001)
    with pytest.raises(ValueError, match=r"1000 classes.*got 1001 values.*by class"):
        evaluate(np.arange(1, 1002), np.arange(1, 1002))


# What is refused


@pytest.mark.parametrize(
    ("labels", "truth", "kwargs", "match"),
    [
        ([1.0], [1], {}, "`labels` must be integers.*float64"),
        ([1], [1.0], {}, "`truth` must be integers.*float64"),
        (["a"], [1], {}, "`labels` must be integers"),
        ([1, 2], [1], {}, r"truth's shape \(1,\), got \(2,\)"),
        ([[1]], [1], {}, r"truth's shape \(1,\), got \(1, 1\)"),
        ([-1], [1], {}, "`labels` must not be negative, got -1"),
        ([1], [-2], {}, "`truth` must not be negative, got -2"),
        ([3], [1], {"classes": ("a", "b")}, "`labels` must not exceed 2 .*got 3"),
        ([1], [3], {"classes": ("a", "b")}, "`truth` must not exceed 2 .*got 3"),
        (
            [2],
            [1],
            {"classes": ("a", "b"), "unlabelled": None},
            "`labels` must not exceed 1 for 2 classes with unlabelled=None, got 2",
        ),
        ([1], [1], {"classes": ()}, "between 1 and 1000, got 0"),
        ([1], [1], {"classes": ("a", "a")}, "2 different names"),
        ([1], [1], {"classes": "ab"}, "2 different names, got 'ab'"),
        ([1], [1], {"unlabelled": 255}, "`unlabelled` must be 0 .*got 255"),
    ],
)
def test_errors_name_the_rule_and_the_value(labels, truth, kwargs, match):
    with pytest.raises(ValueError, match=match):
        evaluate(labels, truth, **kwargs)


def test_classes_at_the_limit_are_accepted():
    assert evaluate([2], [2], classes=("a", "b")).accuracy == 1
    assert evaluate([1], [1], classes=("a", "b"), unlabelled=None).accuracy == 1


@pytest.mark.parametrize("n", [0, 1001])
def test_confusion_matrix_limits_the_classes(n):
    with pytest.raises(ValueError, match=f"between 1 and 1000, got {n}"):
        confusion_matrix([1], [1], n)


def test_confusion_matrix_checks_its_arrays():
    with pytest.raises(ValueError, match="must be integers"):
        confusion_matrix([1.0], [1], 2)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 4)])
def test_from_confusion_checks_the_shape(shape):
    with pytest.raises(ValueError, match=r"\(K, K \+ 1\) or \(K, K\)"):
        from_confusion(np.zeros(shape))


def test_from_confusion_checks_the_names():
    with pytest.raises(ValueError, match="2 different names"):
        from_confusion([[1, 0], [0, 1]], classes=("a",))
    with pytest.raises(ValueError, match="`unlabelled` must be 0"):
        from_confusion([[1, 0], [0, 1]], unlabelled=255)
