"""Images with their annotations: found in pairs, read, and brought to one coding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from napari_unetpp import io
from napari_unetpp.batch import find_images

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from napari_unetpp.batch import Picture

_MASK = {0, 255}  # what ImageJ and many others write for a mask


class Coded(NamedTuple):
    """Annotations in the coding that training or evaluation needs."""

    arrays: list[NDArray[Any]]
    unlabelled: int | None
    note: str


def find_pairs(first: Path, second: Path, names: str) -> list[tuple[Path, Path]]:
    """Pair two files, or the files of two folders by their names up to the suffix.

    Raises
    ------
    ValueError
        If a file has no partner, or a file is given with a folder.
    ImageFileError
        If something is missing, or a folder has no image.
    """
    left, right = find_images([first]), find_images([second])
    if first.is_dir() != second.is_dir():
        raise ValueError(
            f"{names} must be two files or two folders, got a folder and a file."
        )
    if first.samefile(second):
        raise ValueError(f"{names} must differ, got `{io.shown(first)}` twice.")
    if not first.is_dir():
        return [(first, second)]
    try:
        return io.pair_by_stem(left, right)
    except ValueError as error:
        raise ValueError(f"{names} do not pair up. {error}") from None


def read_annotations(
    pairs: Sequence[tuple[Path, Path]], pictures: Sequence[Picture]
) -> list[NDArray[Any]]:
    """Read the second file of each pair, which must fit the picture of the first."""
    found = []
    for (_, path), picture in zip(pairs, pictures, strict=True):
        annotation = io.read_labels(path)
        if annotation.shape != picture.shape:
            raise ValueError(
                f"The annotation `{io.shown(path)}` must have its image's shape "
                f"{picture.shape}, got {annotation.shape}. If the image has channels, "
                "name their axis with --channel-axis."
            )
        found.append(annotation)
    return found


def values_of(arrays: Iterable[NDArray[Any]]) -> set[int]:
    """Return every value that occurs."""
    found: set[int] = set()
    for array in arrays:
        found.update(int(v) for v in np.unique(array))
    return found


def code(arrays: list[NDArray[Any]], asked: str | None, base: Any = None) -> Coded:
    """Return annotations with the meaning of 0, reading 0/255 masks as two classes.

    Parameters
    ----------
    arrays : list of ndarray
        As read.
    asked : {"0", "none"} or None
        What the user says of 0; None: nothing.
    base : Model or None
        The model that goes on learning; its coding holds.
    """
    unlabelled = None if asked == "none" else 0
    if base is not None:
        unlabelled = base.unlabelled
    values = values_of(arrays)
    if asked == "0" or values != _MASK:
        _check_one_value(values, asked, unlabelled)
        return Coded(arrays, unlabelled, "")
    if base is None:
        unlabelled = None
    first = 0 if unlabelled is None else 1
    masks = [(a > 0).astype(np.uint8) + np.uint8(first) for a in arrays]
    note = (
        "the annotations are masks of 0 and 255: every pixel counts, "
        f"0 = background is class value {first}, 255 = foreground {first + 1}"
    )
    return Coded(masks, unlabelled, note)


def _check_one_value(values: set[int], asked: str | None, unlabelled: Any) -> None:
    if asked is None and unlabelled == 0 and len(values - {0}) == 1 and 0 in values:
        raise ValueError(
            "The annotations must hold at least two classes, got only the value "
            f"{max(values)} beside 0 (not annotated).\nIf 0 means background, pass "
            "--unlabelled none; if not, paint some of another class."
        )
