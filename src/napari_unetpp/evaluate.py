"""How well labels agree with a truth: IoU, Dice, accuracy, confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

_BLOCK = 1 << 20  # pixels counted at a time
_MOST = 1000  # classes; the matrix grows with their square


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The agreement of labels with a truth on the annotated pixels.

    Attributes
    ----------
    iou, dice : dict
        By class, each from 0 to 1; NaN where a class is absent in both.
    mean_iou : float
        Mean of `iou` over the classes that are present in labels or truth.
    foreground_iou : float
        The same without the first class, which is the background.
    accuracy : float
        Share of the annotated pixels whose label is right.
    confusion : ndarray
        (K, K) int64 pixels, rows the truth, columns the labels. Pixels without label
        are in no column, but count as wrong everywhere else.
    n_pixels : int
        Annotated pixels.
    """

    iou: dict[Any, float]
    dice: dict[Any, float]
    mean_iou: float
    foreground_iou: float
    accuracy: float
    confusion: NDArray[np.int64]
    n_pixels: int


def evaluate(
    labels: ArrayLike,
    truth: ArrayLike,
    *,
    classes: Sequence[str] | None = None,
    unlabelled: int | None = 0,
) -> Evaluation:
    """Compare labels with a truth.

    Parameters
    ----------
    labels : array-like
        Predicted integers, any shape.
    truth : array-like
        True integers of the same shape.
    classes : sequence of str, optional
        Names of the classes, the background first. They become the keys of the
        result; without them the keys are the values found in either array.
    unlabelled : 0 or None
        0: a 0 in `truth` is not counted, a 0 in `labels` is wrong, value v means
        ``classes[v - 1]``. None: every pixel counts, value v means ``classes[v]``.

    Returns
    -------
    Evaluation
        NaN wherever there is nothing to divide by.

    Raises
    ------
    ValueError
        If the arrays are not integers of one shape or hold values without a class.
    """
    if classes is not None:
        counts = confusion_matrix(labels, truth, len(classes), unlabelled)
        return from_confusion(counts, classes=classes, unlabelled=unlabelled)
    labels, truth = _checked(labels, truth)
    first = _first_value(unlabelled)
    found: set[int] = set()
    for block, true in _blocks(labels, truth, first):
        found.update(np.unique(true).tolist(), np.unique(block).tolist())
    values = sorted(v for v in found if v >= first)
    if len(values) > _MOST:
        raise ValueError(
            f"At most {_MOST} classes can be compared, got {len(values)} values. "
            "Number the pixels by class, not by instance."
        )
    return _evaluation(_count(labels, truth, values, first), values, first)


def confusion_matrix(
    labels: ArrayLike, truth: ArrayLike, n_classes: int, unlabelled: int | None = 0
) -> NDArray[np.int64]:
    """Count pixels by true and by predicted class; matrices of many images add up.

    Parameters
    ----------
    labels, truth, unlabelled
        As in `evaluate`.
    n_classes : int
        K, at least 1.

    Returns
    -------
    ndarray
        (K, K + 1) int64, rows the truth; the last column counts the annotated pixels
        that have no label.

    Raises
    ------
    ValueError
        As in `evaluate`.
    """
    labels, truth = _checked(labels, truth)
    if not 1 <= n_classes <= _MOST:
        raise ValueError(
            f"The number of classes must lie between 1 and {_MOST}, got {n_classes!r}."
        )
    first = _first_value(unlabelled)
    last = first + n_classes - 1
    for name, array in (("labels", labels), ("truth", truth)):
        if array.size and array.max() > last:
            raise ValueError(
                f"`{name}` must not exceed {last} for {n_classes} classes with "
                f"unlabelled={unlabelled}, got {array.max()}."
            )
    return _count(labels, truth, list(range(first, last + 1)), first)


def from_confusion(
    counts: ArrayLike,
    *,
    classes: Sequence[str] | None = None,
    unlabelled: int | None = 0,
) -> Evaluation:
    """Evaluate a confusion matrix, or the sum of several.

    Parameters
    ----------
    counts : array-like
        (K, K + 1) from `confusion_matrix`, or (K, K).
    classes : sequence of str, optional
        K names; without them the keys are the values.
    unlabelled : 0 or None
        As in `evaluate`; tells the first value.

    Returns
    -------
    Evaluation
        As from `evaluate`.

    Raises
    ------
    ValueError
        If the shape is another one, `classes` are not K different names or
        `unlabelled` is neither 0 nor None.
    """
    counts = np.asarray(counts, dtype=np.int64)
    if counts.ndim != 2 or counts.shape[1] - counts.shape[0] not in (0, 1):
        raise ValueError(
            f"`counts` must have the shape (K, K + 1) or (K, K), got {counts.shape}."
        )
    k = len(counts)
    if counts.shape[1] == k:
        counts = np.pad(counts, ((0, 0), (0, 1)))
    first = _first_value(unlabelled)
    if classes is None:
        return _evaluation(counts, range(first, first + k), first)
    if isinstance(classes, str) or len(classes) != k or len(set(classes)) != k:
        raise ValueError(f"`classes` must be {k} different names, got {classes!r}.")
    return _evaluation(counts, classes, classes[0] if k else None)


def _evaluation(
    counts: NDArray[np.int64], keys: Sequence[Hashable], background: Hashable
) -> Evaluation:
    """Build the result from counts (K, K + 1) and one key per row."""
    confusion = counts[:, :-1]
    hits = np.diagonal(confusion).astype(float)
    both = counts.sum(1) + confusion.sum(0)  # true + predicted pixels of each class
    iou = [_ratio(h, b - h) for h, b in zip(hits, both, strict=True)]
    dice = [_ratio(2 * h, b) for h, b in zip(hits, both, strict=True)]
    total = int(counts.sum())
    return Evaluation(
        iou=dict(zip(keys, iou, strict=True)),
        dice=dict(zip(keys, dice, strict=True)),
        mean_iou=_mean(iou),
        foreground_iou=_mean(
            [x for key, x in zip(keys, iou, strict=True) if key != background]
        ),
        accuracy=_ratio(float(hits.sum()), total),
        confusion=confusion,
        n_pixels=total,
    )


def _ratio(above: float, below: float) -> float:
    return float(above / below) if below else float("nan")


def _mean(scores: list[float]) -> float:
    present = [x for x in scores if not np.isnan(x)]
    return _ratio(sum(present), len(present))


def _count(
    labels: NDArray[Any], truth: NDArray[Any], values: list[int], first: int
) -> NDArray[np.int64]:
    """Return (K, K + 1) counts of the sorted `values`; below `first` is no label."""
    k = len(values)
    counts = np.zeros(k * (k + 1), np.int64)
    if not values:
        return counts.reshape(k, k + 1)
    known = np.array(values)
    for block, true in _blocks(labels, truth, first):
        column = np.where(block < first, k, np.searchsorted(known, block))
        row = np.searchsorted(known, true)
        counts += np.bincount(row * (k + 1) + column, minlength=len(counts))
    return counts.reshape(k, k + 1)


def _blocks(
    labels: NDArray[Any], truth: NDArray[Any], first: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield labels and truth of the annotated pixels, a bounded number at a time."""
    labels, truth = labels.reshape(-1), truth.reshape(-1)
    for start in range(0, truth.size, _BLOCK):
        true = truth[start : start + _BLOCK]
        counted = true >= first
        block = labels[start : start + _BLOCK][counted]
        yield block.astype(np.int64), true[counted].astype(np.int64)


def _first_value(unlabelled: int | None) -> int:
    if unlabelled is not None and unlabelled != 0:
        raise ValueError(
            "`unlabelled` must be 0 (value 0 is not annotated) or None (every pixel "
            f"is), got {unlabelled!r}."
        )
    return 0 if unlabelled is None else 1


def _checked(labels: ArrayLike, truth: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    labels, truth = np.asarray(labels), np.asarray(truth)
    for name, array in (("labels", labels), ("truth", truth)):
        if array.dtype.kind not in "iub":
            raise ValueError(
                f"`{name}` must be integers, the classes' values, got {array.dtype}. "
                "Take the labels, not the image or the probabilities."
            )
        if array.size and array.min() < 0:
            raise ValueError(f"`{name}` must not be negative, got {array.min()}.")
    if labels.shape != truth.shape:
        raise ValueError(
            f"`labels` must have the truth's shape {truth.shape}, got {labels.shape}."
        )
    return labels, truth
