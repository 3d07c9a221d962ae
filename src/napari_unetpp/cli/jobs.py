"""Which files a command reads and writes: found and checked before any work starts."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tifffile

from napari_unetpp import io
from napari_unetpp.config import check_number
from napari_unetpp.errors import ImageFileError, SaveError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

_MASK = {0, 255}  # what ImageJ and many others write for a mask


class Picture(NamedTuple):
    """An image as read, its channels (if any) on the last axis."""

    path: Path
    pixels: NDArray[Any]
    channel_axis: int | None  # -1 or None
    note: str  # what was decided without being asked, or ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the labels."""
        return self.pixels.shape[: self.channel_axis]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return 1 if self.channel_axis is None else self.pixels.shape[-1]


class Coded(NamedTuple):
    """Annotations in the coding that training or evaluation needs."""

    arrays: list[NDArray[Any]]
    unlabelled: int | None
    note: str


class Target(NamedTuple):
    """An image and the files that are made of it."""

    image: Path
    labels: Path
    probabilities: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are made."""
        both = (self.labels, self.probabilities)
        return tuple(path for path in both if path is not None)


# --- reading ---------------------------------------------------------------------


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the image files that are given by name or by their folder."""
    return [file for path in paths for file in _listed(path)]


def find_pairs(first: Path, second: Path, names: str) -> list[tuple[Path, Path]]:
    """Pair two files, or the files of two folders by their names up to the suffix.

    Raises
    ------
    ValueError
        If a file has no partner, or a file is given with a folder.
    ImageFileError
        If something is missing, or a folder has no image.
    """
    left, right = _listed(first), _listed(second)
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


def _listed(path: Path) -> list[Path]:
    if not path.exists():
        raise ImageFileError(
            f"There is no file or folder `{io.shown(path)}`. Check name and folder."
        )
    return io.list_images(path)


def read_picture(
    path: Path, channel_axis: int | None = None, *, channels: int | None = None
) -> Picture:
    """Read an image and find its channels.

    Parameters
    ----------
    path : Path
        The image file.
    channel_axis : int or None
        Axis of the channels; None: where the file says so, else there is one channel.
    channels : int or None
        How many the model takes; alpha is dropped unless it is among them.
    """
    axes = io.probe(path).axes or ""
    pixels = io.read_image(path)
    if channel_axis is not None:
        check_number(
            "channel_axis", channel_axis, -pixels.ndim, pixels.ndim - 1, whole=True
        )
        return Picture(path, np.moveaxis(pixels, channel_axis, -1), -1, "")
    if len(axes) != pixels.ndim or not {"S", "C"} & set(axes):
        return Picture(path, pixels, None, "")
    colour = "S" in axes
    pixels = np.moveaxis(pixels, axes.index("S" if colour else "C"), -1)
    note = f"{pixels.shape[-1]} channels, as the file says"
    if colour and pixels.shape[-1] in (2, 4) and channels != pixels.shape[-1]:
        pixels = pixels[..., :-1]
        note = "colour without its transparency (alpha)"
    elif colour:
        note = "colour, channel axis -1"
    if pixels.shape[-1] == 1:
        return Picture(path, pixels[..., 0], None, "grey without transparency (alpha)")
    return Picture(path, pixels, -1, note)


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


# --- writing ---------------------------------------------------------------------


def check_output(path: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an output that cannot or must not be written.

    Raises
    ------
    ValueError
        If it is an input, exists without `overwrite`, or has no folder.
    SaveError
        If the folder is write-protected.
    """
    name = io.shown(path)
    real = os.path.realpath(path)
    if any(os.path.realpath(source) == real for source in inputs):
        raise ValueError(f"`{name}` is an input. Choose another name for the output.")
    if path.is_dir():
        raise ValueError(f"`{name}` is a folder. Add the name of a file to it.")
    if os.path.lexists(path) and not overwrite:
        raise ValueError(
            f"`{name}` exists. Choose another name, or pass --overwrite to replace it."
        )
    folder = Path(real).parent
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder `{io.shown(folder)}` for `{name}`. Create it first."
        )
    if not os.access(folder, os.W_OK):
        raise SaveError(
            f"The folder `{io.shown(folder)}` is write-protected. Choose another one."
        )


def plan_outputs(
    given: Sequence[Path], out: Path, *, probabilities: bool = False
) -> list[Target]:
    """Return every image of `given` with the files to make of it.

    Parameters
    ----------
    given : sequence of Path
        Image files and folders.
    out : Path
        The folder of the outputs, or for one image file the name of a TIFF.
    probabilities : bool
        Whether they are written as well.

    Raises
    ------
    ValueError
        If two images would give one file, or the folder of the images is `out`.
    """
    images = find_images(given)
    one_file = (
        len(given) == 1
        and not given[0].is_dir()
        and out.suffix.lower() in (".tif", ".tiff")
        and not out.is_dir()
    )
    if not one_file:
        _check_folder(given, out)
    targets = []
    for image in images:
        labels = out if one_file else out / f"{image.stem}.tif"
        beside = labels.with_name(f"{labels.stem}_probabilities.tif")
        targets.append(Target(image, labels, beside if probabilities else None))
    _check_different(targets)
    return targets


def _check_folder(given: Sequence[Path], out: Path) -> None:
    name = io.shown(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"`{name}` is a file, but the output is a folder of labels.")
    for path in given:
        if path.is_dir() and os.path.realpath(path) == os.path.realpath(out):
            raise ValueError(
                f"`{name}` is the folder of the images, which labels would mix with. "
                "Choose another folder for the output."
            )


def _check_different(targets: Sequence[Target]) -> None:
    seen: dict[str, Path] = {}
    for target in targets:
        for file in target.files:
            # Windows and macOS do not tell capitals from small letters.
            other = seen.setdefault(str(file).casefold(), target.image)
            if other is not target.image:
                raise ValueError(
                    f"`{io.shown(other)}` and `{io.shown(target.image)}` would both "
                    f"give `{io.shown(file)}`. Rename one, or use two output folders."
                )


def make_folder(path: Path) -> None:
    """Create a folder where there is none.

    Raises
    ------
    SaveError
        If that fails.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"The folder `{io.shown(path)}` cannot be made: {error.strerror or error}. "
            "Choose another one."
        ) from error


def write_probabilities(
    path: Path, values: NDArray[np.float32], *, overwrite: bool = False
) -> None:
    """Write probabilities (K, ..., Y, X) as a float32 TIFF, a channel per class."""
    axes = f"C{'QQQZYX'[-(values.ndim - 1) :]}"
    buffer = BytesIO()
    tifffile.imwrite(
        buffer,
        values,
        bigtiff=values.nbytes > 2**31,
        photometric="minisblack",
        metadata={"axes": axes},
    )
    io.atomic_write(path, buffer.getvalue(), overwrite=overwrite)
