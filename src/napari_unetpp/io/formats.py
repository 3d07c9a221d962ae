"""The image formats: which one a file has, its header, and a way to its pixels."""

from __future__ import annotations

import math
import struct
import tokenize
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import tifffile
from PIL import (
    BmpImagePlugin,
    ImageSequence,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
)

from napari_unetpp.errors import ImageFileError
from napari_unetpp.io.files import SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.ImageFile import ImageFile

MAX_PIXELS = 2**40
MAX_PAGES = 2**20

_LZW, _DEFLATE, _LZMA = 5, (8, 32946), 34925

Load = Callable[[], np.ndarray]

# What a damaged file makes the decoders raise; a warning is raised where tests ask.
BROKEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    tokenize.TokenError,
    zlib.error,
)

# Type and number of samples of Pillow's modes; 16-bit grey has several names.
_MODES: dict[str, tuple[type, int]] = {
    "1": (np.bool_, 0),
    "L": (np.uint8, 0),
    "P": (np.uint8, 0),
    "I": (np.int32, 0),
    "F": (np.float32, 0),
    "LA": (np.uint8, 2),
    "RGB": (np.uint8, 3),
    "RGBA": (np.uint8, 4),
}


@dataclass(frozen=True)
class Probe:
    """What the header of an image file promises.

    Attributes
    ----------
    shape : tuple of int
        The shape that `read_image` returns.
    dtype : numpy.dtype
        Its type: bool, integer or float.
    axes : str or None
        One letter per axis where the file tells (S: colour samples), else None.
    kind : str
        The format: "tiff", "png", "jpeg", "bmp" or "npy".
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    axes: str | None
    kind: str


def open_image(
    name: str, file: BinaryIO, size: int, indices: bool
) -> tuple[Probe, Load]:
    """Return the header and the loader of the format that the content has."""
    start = file.read(8)
    file.seek(0)
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _open_tiff(file, size)
    if start[:6] == b"\x93NUMPY":
        return _open_npy(file, size)
    if start == b"\x89PNG\r\n\x1a\n":
        return _open_pillow("png", PngImagePlugin.PngImageFile(file), indices)
    if start[:3] == b"\xff\xd8\xff":
        return _open_pillow("jpeg", JpegImagePlugin.JpegImageFile(file), indices)
    if start[:2] == b"BM":
        return _open_pillow("bmp", BmpImagePlugin.BmpImageFile(file), indices)
    content = "it is empty" if not start else f"its content starts with {start!a}"
    raise ImageFileError(
        f"`{name}` is no image that can be read here: {content}. "
        f"Save it as one of {', '.join(SUFFIXES)}."
    )


def _open_npy(file: BinaryIO, size: int) -> tuple[Probe, Load]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"NPY version {version} is unknown")
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > size - file.tell():
        raise ValueError(f"it is cut: {size:,} bytes are too few for {shape} {dtype}")
    file.seek(0)
    found = Probe(shape, dtype.newbyteorder("="), None, "npy")
    return found, lambda: np.lib.format.read_array(file, allow_pickle=False)


def _open_pillow(kind: str, image: ImageFile, indices: bool) -> tuple[Probe, Load]:
    """Open by the format's own class: our limits hold, not Pillow's global one."""
    height, width = image.height, image.width
    mode = image.mode
    if mode == "P" and not indices:
        mode = "L" if _grey_palette(image) else "RGB"
    elif mode not in ("1", "L", "P", "I", "F", "LA", "RGBA") and mode[:2] != "I;":
        mode = "RGB"
    dtype, samples = _MODES.get(mode, (np.uint16, 0))
    shape = (height, width, samples) if samples else (height, width)
    found = Probe(shape, np.dtype(dtype), "YXS" if samples else "YX", kind)
    same = mode == image.mode
    return found, lambda: np.asarray(image if same else image.convert(mode))


def _grey_palette(image: ImageFile) -> bool:
    """Return whether a palette has no colours; Pillow's way to ask decodes pixels."""
    palette = image.palette
    if palette is None:
        return True
    raw = np.frombuffer(bytes(palette.palette), np.uint8)
    entry = len(palette.rawmode or palette.mode)
    colours = raw[: raw.size - raw.size % entry].reshape(-1, entry)[:, :3]
    return bool((colours == colours[:, :1]).all())


def _open_tiff(file: BinaryIO, size: int) -> tuple[Probe, Load]:
    """Open without OME-XML, whose claims and links to other files cost much."""
    tif = tifffile.TiffFile(file, is_ome=False, _multifile=False)
    _check_chain(file, size, tif.tiff)
    if not tif.series:
        raise ValueError("it has no image")
    series = tif.series[0]
    shape, keyframe = tuple(series.shape), series.keyframe
    found = Probe(shape, np.dtype(series.dtype), series.axes, "tiff")
    if 0 not in shape and math.prod(shape) <= MAX_PIXELS:
        _check_segments(series, size)

    def load() -> np.ndarray:
        _check_unpacked(file, series)
        # tifffile needs the package imagecodecs for LZW, Pillow has its own.
        if keyframe.compression == _LZW and keyframe.planarconfig == 1:
            with suppress(*BROKEN):
                return _pillow_tiff(file, found)
        return series.asarray()

    return found, load


def _pillow_tiff(file: BinaryIO, found: Probe) -> np.ndarray:
    file.seek(0)
    with TiffImagePlugin.TiffImageFile(file) as image:
        frames = [np.array(frame) for frame in ImageSequence.Iterator(image)]
    array = np.stack(frames)
    if array.dtype.newbyteorder("=") != found.dtype:
        raise ValueError("Pillow sees other numbers")
    return array.reshape(found.shape)


def _check_chain(file: BinaryIO, size: int, tiff: tifffile.TiffFormat) -> None:
    """Follow the list of pages to its end: a cut file loses pages without a sign."""
    file.seek(tiff.offsetsize if tiff.offsetsize == 8 else 4)
    seen: set[int] = set()
    while True:
        (offset,) = struct.unpack(tiff.offsetformat, file.read(tiff.offsetsize))
        if offset == 0:
            break
        if offset in seen or len(seen) > MAX_PAGES:
            raise ValueError("its list of pages runs in a circle")
        seen.add(offset)
        file.seek(offset)
        (tags,) = struct.unpack(tiff.tagnoformat, file.read(tiff.tagnosize))
        file.seek(offset + tiff.tagnosize + tags * tiff.tagsize)
    if not seen or max(seen) >= size:
        raise ValueError("its list of pages is missing or cut")
    file.seek(0)


def _check_segments(series: tifffile.TiffPageSeries, size: int) -> None:
    """Check that the pixels lie within the file and that no piece is missing."""
    unpacked = math.prod(series.shape) * np.dtype(series.dtype).itemsize
    if series.dataoffset is not None:
        if series.dataoffset + unpacked > size:
            raise ValueError("it is cut: pixels are missing at its end")
        return
    for page in _pages(series):
        if len(page.dataoffsets) != math.prod(page.chunked):
            raise ValueError("a page has not all of its pieces")
        pieces = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        if not any(count for _, count in pieces):
            raise ValueError("a page has no pixels")
        if any(start + count > size for start, count in pieces if count):
            raise ValueError("it is cut: pixels are missing at its end")


def _pages(
    series: tifffile.TiffPageSeries,
) -> Iterator[tifffile.TiffPage | tifffile.TiffFrame]:
    for page in series:
        if page is None:
            raise ValueError("a page is missing")
        yield page


def _check_unpacked(file: BinaryIO, series: tifffile.TiffPageSeries) -> None:
    """Stop a piece that unpacks to far more than its place in the image."""
    keyframe = series.keyframe
    if keyframe.compression == _LZMA:
        raise ValueError("its compression is LZMA, which is not read here")
    if keyframe.compression not in _DEFLATE:
        return
    wanted = math.prod(keyframe.chunks) * np.dtype(keyframe.dtype).itemsize
    for page in _pages(series):
        for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            # Deflate packs at most 1032 to 1, so small pieces do no harm.
            if count * 1032 <= 2**26:
                continue
            file.seek(start)
            unpack = zlib.decompressobj()
            unpack.decompress(file.read(count), wanted)
            if unpack.unconsumed_tail and unpack.decompress(unpack.unconsumed_tail, 1):
                raise ValueError("its pixels unpack to more than the image has")
