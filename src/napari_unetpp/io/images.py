"""Images and labels: what the header promises, then the pixels, and back to a file."""

from __future__ import annotations

import io
import logging
import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tifffile
from PIL import Image

from napari_unetpp.errors import ImageFileError
from napari_unetpp.io.files import atomic_write, opened, shown
from napari_unetpp.io.formats import BROKEN, MAX_PIXELS, Load, Probe, open_image

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

MAX_AXES = 6

# A file that unpacks to more than this and to more than this many times its own size
# is a trap; an empty mask of 16,000 x 16,000 pixels is not yet one. No file can unpack
# to thousands of times its size: deflate ends at 1032.
_BOMB_BYTES = 2**28
_BOMB_RATIO = 500
_IMPOSSIBLE_RATIO = 4000


def probe(path: str | os.PathLike[str]) -> Probe:
    """Read and check the header of an image file; no pixel is decoded.

    Raises
    ------
    ImageFileError
        If the file is missing, cut, no image, or promises what it cannot hold.
    """
    with _image(path, indices=False) as (found, _):
        return found


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read the first image series of a TIFF, or a PNG, JPEG, BMP or NPY file.

    Parameters
    ----------
    path : path-like
        The content decides on the format, not the suffix.

    Returns
    -------
    ndarray
        (..., Y, X) or, for colours, (..., Y, X, samples); in the file's own type.

    Raises
    ------
    ImageFileError
        If the file is missing, damaged, no image, or larger than it can be.
    """
    with _image(path, indices=False) as (_, load):
        return load()


def read_labels(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an annotation or labels: one whole number per pixel, values as they are.

    Returns
    -------
    ndarray of integer
        (..., Y, X); bool becomes uint8, whole floats int32, and colours that are grey
        one channel; a palette image gives its indices.

    Raises
    ------
    ImageFileError
        As `read_image`, and if the values are no whole numbers.
    """
    name = shown(path)
    with _image(path, indices=True) as (found, load):
        if found.kind == "jpeg":
            raise ImageFileError(
                f"`{name}` is a JPEG, which changes the values of pixels, so it cannot "
                "hold an annotation. Save the labels as TIFF or PNG."
            )
        array = load()
    if found.axes and "S" in found.axes:
        array = _grey(name, np.moveaxis(array, found.axes.index("S"), -1))
    if array.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int32)
        if not np.array_equal(whole, array):
            raise ImageFileError(
                f"`{name}` holds fractions or NaN; an annotation holds whole numbers, "
                "one for each class. Save the labels as 8-bit or 16-bit numbers."
            )
        return whole
    return array.astype(np.uint8) if array.dtype == np.bool_ else array


def write_labels(
    path: str | os.PathLike[str], labels: np.ndarray, *, overwrite: bool = False
) -> None:
    """Write labels as they are: deflated TIFF, PNG or NPY, by the suffix of `path`.

    Parameters
    ----------
    path : path-like
        Ends in .tif, .tiff, .png or .npy.
    labels : ndarray of bool or integer
        (..., Y, X); PNG takes (Y, X) with values from 0 to 65,535. 64-bit integers are
        stored in the smallest type that holds them.
    overwrite : bool
        Whether an existing file may be replaced.

    Raises
    ------
    ValueError
        If the suffix is another one, or the labels do not fit into such a file.
    SaveError
        See `atomic_write`.
    """
    labels = _compact(np.asarray(labels))
    suffix = Path(path).suffix.lower()
    buffer = io.BytesIO()
    if suffix in (".tif", ".tiff"):
        axes = ("QQQQZYX"[-labels.ndim :]) if labels.ndim <= 7 else None
        tifffile.imwrite(
            buffer,
            labels,
            compression="zlib",
            photometric="minisblack",
            metadata={"axes": axes},
        )
    elif suffix == ".png":
        if labels.ndim != 2 or labels.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                "A PNG file holds labels of shape (Y, X) from 0 to 65535, got "
                f"{labels.shape} {labels.dtype}. Choose a name that ends in .tif."
            )
        Image.fromarray(labels).save(buffer, "PNG")
    elif suffix == ".npy":
        np.lib.format.write_array(buffer, labels, allow_pickle=False)
    else:
        raise ValueError(
            f"Labels are saved as .tif, .tiff, .png or .npy, got `{shown(path)}`."
        )
    atomic_write(path, buffer.getvalue(), overwrite=overwrite)


def write_png(
    path: str | os.PathLike[str], pixels: np.ndarray, *, overwrite: bool = False
) -> None:
    """Write a picture for looking at: uint8, (Y, X), (Y, X, 3) or (Y, X, 4).

    Raises
    ------
    ValueError
        If `pixels` has another shape or type.
    SaveError
        See `atomic_write`.
    """
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (
        grey or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    ):
        raise ValueError(
            "`pixels` must be uint8 of shape (Y, X), (Y, X, 3) or (Y, X, 4), "
            f"got {pixels.shape} {pixels.dtype}."
        )
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    atomic_write(path, buffer.getvalue(), overwrite=overwrite)


def _grey(name: str, array: np.ndarray) -> np.ndarray:
    """Return the one channel that grey colours repeat."""
    colours = array[..., : array.shape[-1] - (array.shape[-1] in (2, 4))]
    if not (colours == colours[..., :1]).all():
        raise ImageFileError(
            f"`{name}` holds colours; an annotation holds one whole number per pixel. "
            "Save the labels layer itself, not a screenshot of it."
        )
    return np.ascontiguousarray(colours[..., 0])


def _compact(labels: np.ndarray) -> np.ndarray:
    """Return labels in a type that common image formats know."""
    if labels.dtype == np.bool_:
        return labels.astype(np.uint8)
    if labels.dtype.kind not in "ui" or 0 in labels.shape or labels.ndim < 2:
        raise ValueError(
            "`labels` must be whole numbers of shape (..., Y, X), "
            f"got {labels.shape} {labels.dtype}."
        )
    if labels.dtype.itemsize == 8:
        low, high = int(labels.min()), int(labels.max())
        kind = np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high))
        return labels.astype(kind)
    return labels.astype(labels.dtype.newbyteorder("="), copy=False)


@contextmanager
def _image(
    path: str | os.PathLike[str], *, indices: bool
) -> Iterator[tuple[Probe, Load]]:
    """Open an image file, check its header, and hand out a way to decode it."""
    name = shown(path)
    # tifffile tells of damage through its log, which by default is the screen.
    log, silent = logging.getLogger("tifffile"), logging.NullHandler()
    log.addHandler(silent)
    try:
        with opened(path, ImageFileError) as (file, stat):
            found, load = open_image(name, file, stat.st_size, indices)
            _check_claim(name, found, stat.st_size)
            yield found, lambda: _as_promised(found, load())
    except MemoryError as error:
        raise ImageFileError(
            f"`{name}` does not fit into the memory. Cut it into smaller images."
        ) from error
    except BROKEN as error:
        told = "".join(c if c.isprintable() else " " for c in str(error))
        reason = " ".join(told.split())[:200] or type(error).__name__
        hint = "Copy it once more, or save it again in Fiji as an uncompressed TIFF."
        if "imagecodecs" in reason:
            hint = "Install the package imagecodecs, or save it without compression."
        raise ImageFileError(
            f"`{name}` is damaged or of a kind that cannot be read: {reason}. {hint}"
        ) from error
    finally:
        log.removeHandler(silent)


def _check_claim(name: str, found: Probe, size: int) -> None:
    """Refuse a header that promises nothing, too much, or no grey values."""
    shape, dtype = found.shape, found.dtype
    pixels = math.prod(shape)
    if not 2 <= len(shape) <= MAX_AXES or min(shape) < 1:
        raise ImageFileError(
            f"`{name}` has the shape {shape}; an image has 2 to {MAX_AXES} axes and at "
            "least one pixel. The file may have been cut when it was copied."
        )
    if dtype.kind not in "buif" or dtype.itemsize > 8:
        raise ImageFileError(
            f"`{name}` holds {dtype} numbers; an image holds whole or decimal numbers "
            "of at most 64 bits. Save it as 8-bit, 16-bit or 32-bit."
        )
    unpacked = pixels * dtype.itemsize
    possible = 2**20 + _IMPOSSIBLE_RATIO * size
    allowed = min(possible, max(_BOMB_BYTES, _BOMB_RATIO * size))
    if pixels > MAX_PIXELS or unpacked > allowed:
        raise ImageFileError(
            f"`{name}` has {size:,} bytes but claims an image of {shape}, {unpacked:,} "
            "bytes. It is damaged or a trap. Ask for it again."
        )


def _as_promised(found: Probe, array: np.ndarray) -> np.ndarray:
    """Return a writable array in this machine's byte order."""
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if (array.shape, array.dtype) != (found.shape, found.dtype.newbyteorder("=")):
        raise ValueError(
            f"it holds {array.shape} {array.dtype}, not {found.shape} {found.dtype}"
        )
    return array if array.flags.writeable else array.copy()
