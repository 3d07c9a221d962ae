"""What can be learned from: annotated planes, read, checked and scaled."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp.preprocess import Planes, Preprocessing, check_annotation

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Examples:
    """What can be learned from: annotated planes, scaled, and their class numbers.

    Attributes
    ----------
    images : list of ndarray of shape (C, Y, X) and dtype float32
    targets : list of ndarray of shape (Y, X) and dtype uint8
        0 = not annotated, v = class v - 1.
    numbers : list of int
        Each one's number in its stack.
    n_classes : int
        Highest class number found.
    fingerprints : list of str
        SHA-256 of each image and annotation, shortened.
    """

    images: list[NDArray[np.float32]]
    targets: list[NDArray[np.uint8]]
    numbers: list[int]
    n_classes: int
    fingerprints: list[str]


def read_examples(
    images: Any,
    annotations: Any,
    *,
    unlabelled: int | None = 0,
    channel_axis: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> Examples:
    """Read and scale every annotated plane.

    Parameters
    ----------
    images : array or sequence of arrays
        See `train_steps`.
    annotations : array or sequence of arrays
        One per image, of its shape without the channels.
    unlabelled, channel_axis
        See `train_steps`.
    preprocessing : Preprocessing or None, optional
        How grey values are scaled.

    Raises
    ------
    ValueError
        If shapes, dtypes or values do not fit, or nothing is annotated.
    """
    preprocessing = preprocessing or Preprocessing()
    pairs = _pairs(images, annotations)
    found = Examples([], [], [], 0, [])
    channels = set()
    top = 0
    for i, (image, annotation) in enumerate(pairs):
        which = f"[{i}]" if len(pairs) > 1 else ""
        planes = Planes(image, channel_axis=channel_axis, name=f"image{which}")
        channels.add(planes.channels)
        if not isinstance(getattr(annotation, "dtype", None), np.dtype):
            annotation = np.asarray(annotation)
        check_annotation(annotation, planes, f"annotation{which}")
        for number in range(len(planes)):
            target = np.asarray(annotation[planes.index(number)])
            target = _target(target, unlabelled, f"annotation{which}")
            if not target.any():
                continue
            plane = planes.plane(number)[:, :, :]
            name = f"image{which}"
            limits = preprocessing.limits(plane, name=name)
            if not np.any(limits[1] > limits[0]):
                raise ValueError(
                    f"`image{which}` must have contrast where it is annotated, but "
                    f"plane {number} holds only the value {plane.flat[0]}. Leave it "
                    "out."
                )
            found.images.append(preprocessing.apply(plane, limits, name=name))
            found.targets.append(target)
            found.numbers.append(number)
            found.fingerprints.append(_fingerprint(plane, target))
            top = max(top, int(target.max()))
    if not found.images:
        raise ValueError(
            "`annotations` must have annotated pixels, got none. Paint a few strokes "
            "of each class first."
        )
    if len(channels) > 1:
        raise ValueError(
            f"`images` must all have as many channels, got {sorted(channels)}."
        )
    return Examples(found.images, found.targets, found.numbers, top, found.fingerprints)


def _pairs(images: Any, annotations: Any) -> list[tuple[Any, Any]]:
    several = isinstance(images, (list, tuple))
    if several != isinstance(annotations, (list, tuple)):
        raise ValueError(
            "`images` and `annotations` must both be arrays or both be sequences of "
            f"arrays, got {type(images).__name__} and {type(annotations).__name__}."
        )
    if not several:
        return [(images, annotations)]
    if len(images) != len(annotations) or not images:
        raise ValueError(
            "`images` and `annotations` must be as many, at least one, got "
            f"{len(images)} and {len(annotations)}."
        )
    return list(zip(images, annotations, strict=True))


def _target(
    values: NDArray[Any], unlabelled: int | None, name: str
) -> NDArray[np.uint8]:
    """Return class number + 1 per pixel, 0 where nothing is annotated."""
    low, high = int(values.min()), int(values.max())
    limit = 255 if unlabelled == 0 else 254
    if low < 0 or high > limit:
        raise ValueError(
            f"`{name}` must hold values from 0 to {limit}, got {low} to {high}. Number "
            "the classes 1, 2, 3, ... (instance labels: use labels > 0)."
        )
    target = values.astype(np.uint8)
    return target if unlabelled == 0 else target + np.uint8(1)


def _fingerprint(image: NDArray[Any], target: NDArray[np.uint8]) -> str:
    digest = hashlib.sha256()
    for array in (image, target):
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
