"""What can be learned from: annotated planes, read, checked and scaled."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp.preprocess import (
    Planes,
    Preprocessing,
    check_annotation,
    read_part,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
        SHA-256 of each image and of its annotation, both shortened.
    instances : list of ndarray of shape (Y, X)
        Objects, numbered from 1; empty where they are not known.
    """

    images: list[NDArray[np.float32]]
    targets: list[NDArray[np.uint8]]
    numbers: list[int]
    n_classes: int
    fingerprints: list[str]
    instances: list[NDArray[np.integer]] = field(default_factory=list)


def read_examples(
    images: Any,
    annotations: Any,
    *,
    unlabelled: int | None = 0,
    channel_axis: int | None = None,
    preprocessing: Preprocessing | None = None,
    instances: Any = None,
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
    instances
        See `train_steps`.

    Raises
    ------
    ValueError
        If shapes, dtypes or values do not fit, or nothing is annotated.
    """
    pairs = _pairs(images, annotations)
    names = [f"[{i}]" if len(pairs) > 1 else "" for i in range(len(pairs))]
    book = ExampleBook(
        [image for image, _ in pairs],
        [channel_axis] * len(pairs),
        preprocessing=preprocessing,
        names=[f"image{which}" for which in names],
    )
    planes: list[dict[int, NDArray[np.uint8]]] = []
    for (_, annotation), source, which in zip(pairs, book.sources, names, strict=True):
        if not isinstance(getattr(annotation, "dtype", None), np.dtype):
            annotation = np.asarray(annotation)
        name = f"annotation{which}"
        check_annotation(annotation, source, name)
        targets = (
            (n, _target(read_part(annotation, source.index(n)), unlabelled, name))
            for n in range(len(source))
        )
        planes.append({n: target for n, target in targets if target.any()})
    found = book.read(planes)
    if instances is None:
        return found
    kept = []
    for (_, objects), source, which, chosen in zip(
        _pairs(images, instances), book.sources, names, planes, strict=True
    ):
        objects = np.asarray(objects)
        check_annotation(objects, source, f"instances{which}")
        kept += [objects[source.index(n)] for n in sorted(chosen)]
    return replace(found, instances=kept)


class ExampleBook:
    """Images whose annotated planes are read and scaled once, however often asked.

    Parameters
    ----------
    images : sequence of arrays of shape (..., Y, X)
        With channels at their `channel_axes`; lazy ones stay lazy.
    channel_axes : sequence of int or None
        One per image.
    preprocessing : Preprocessing or None, optional
        How grey values are scaled.
    names : sequence of str or None, optional
        What messages call them.

    Raises
    ------
    ValueError
        If an image's shape or dtype does not fit, or the numbers of channels differ.
    """

    def __init__(
        self,
        images: Sequence[Any],
        channel_axes: Sequence[int | None],
        *,
        preprocessing: Preprocessing | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self._preprocessing = preprocessing or Preprocessing()
        self._names = names or [f"image[{i}]" for i in range(len(images))]
        self.sources = [
            Planes(image, channel_axis=axis, name=name)
            for image, axis, name in zip(images, channel_axes, self._names, strict=True)
        ]
        channels = {source.channels for source in self.sources}
        if len(channels) > 1:
            raise ValueError(
                f"`images` must all have as many channels, got {sorted(channels)}."
            )
        self._scaled: dict[tuple[int, int], tuple[NDArray[np.float32], str]] = {}
        self._hashed: dict[tuple[int, int], tuple[NDArray[np.uint8], str]] = {}

    def read(self, targets: Sequence[Mapping[int, NDArray[np.uint8]]]) -> Examples:
        """Return the annotated planes.

        Parameters
        ----------
        targets : sequence of mapping of int to ndarray of shape (Y, X) and dtype uint8
            For each image, class number + 1 of every pixel (0: not annotated) by the
            plane's number; planes that are not annotated are left out.

        Raises
        ------
        ValueError
            If nothing is annotated, or an annotated plane has no contrast or holds
            values that are not finite.
        """
        found = Examples([], [], [], 0, [])
        top = 0
        for i, planes in enumerate(targets):
            for number, target in sorted(planes.items()):
                image, of_image = self._plane(i, number)
                known, digest = self._hashed.get((i, number), (None, ""))
                if known is not target:
                    digest = fingerprint(target)
                    self._hashed[i, number] = target, digest
                found.images.append(image)
                found.targets.append(target)
                found.numbers.append(number)
                found.fingerprints.append(of_image + digest)
                top = max(top, int(target.max()))
        if not found.images:
            raise ValueError(
                "`annotations` must have annotated pixels, got none. Paint a few "
                "strokes of each class first."
            )
        return replace(found, n_classes=top)

    def _plane(self, i: int, number: int) -> tuple[NDArray[np.float32], str]:
        if (i, number) not in self._scaled:
            name = self._names[i]
            plane = self.sources[i].plane(number)[:, :, :]
            limits = self._preprocessing.limits(plane, name=name)
            if not np.any(limits[1] > limits[0]):
                raise ValueError(
                    f"`{name}` must have contrast where it is annotated, but plane "
                    f"{number} holds only the value {plane.flat[0]}. Leave it out."
                )
            image = self._preprocessing.apply(plane, limits, name=name)
            self._scaled[i, number] = image, fingerprint(plane)
        return self._scaled[i, number]


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


def fingerprint(array: NDArray[Any]) -> str:
    """Return 16 digits that tell an array of this type, shape and values."""
    digest = hashlib.sha256(f"{array.dtype}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
