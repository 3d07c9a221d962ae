"""Images larger than memory: opened by their header, read region by region."""

from __future__ import annotations

import importlib
import math
import re
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from napari_unetpp.errors import ImageFileError, MissingPackageError
from napari_unetpp.io.files import shown
from napari_unetpp.io.formats import BROKEN, MAX_PIXELS
from napari_unetpp.io.images import probe, read_image

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

_PIECE = 2**30  # bytes; what is read at once must fit into memory many times
_KINDS = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}
_UNITS = {
    "nm": "nanometer",
    "mm": "millimeter",
    "cm": "centimeter",
    "inch": "inch",
    **dict.fromkeys(("µm", "um", "micron", "microns", r"\u00B5m"), "micrometer"),
}


@dataclass(frozen=True)
class Axis:
    """An axis of an image, as OME-Zarr tells it.

    Attributes
    ----------
    name : str
        Such as "z", "y" or "x".
    kind : str or None
        "time", "channel", "space", or anything else.
    unit : str or None
        Such as "micrometer".
    scale, offset : float
        Size of a pixel, and where the first one is.
    """

    name: str
    kind: str | None = None
    unit: str | None = None
    scale: float = 1.0
    offset: float = 0.0


class LazyImage:
    """An image in a file that is read region by region; indexed like an array.

    Parameters
    ----------
    path : path
        The file, or the folder of a Zarr image.
    array : array
        What is indexed.
    axes : tuple of Axis
        One per axis.
    version : str, optional
        Of OME-Zarr.

    Attributes
    ----------
    shape, ndim, dtype
        As of an array.
    channel_axis : int or None
        The axis of the channels, as the file tells; None: there is one channel.
    """

    def __init__(
        self,
        path: Path,
        array: Any,
        axes: tuple[Axis, ...],
        *,
        version: str = "0.5",
    ) -> None:
        self.path = path
        self.axes = axes
        self.version = version
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.ndim = len(self.shape)
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        self._array = array
        kinds = [axis.kind for axis in axes]
        self.channel_axis = kinds.index("channel") if "channel" in kinds else None

    def __getitem__(self, key: Any) -> NDArray[Any]:
        try:
            return np.asarray(self._array[key], dtype=self.dtype)
        except BROKEN as error:
            raise ImageFileError(
                f"`{shown(self.path)}` is damaged: a part of it cannot be read "
                f"({str(error)[:200] or type(error).__name__}). Copy it once more."
            ) from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self[...], dtype=dtype)


def plain_axes(ndim: int) -> tuple[Axis, ...]:
    """Return the axes of an array of which no more is known, the last ones y and x."""
    names = [f"axis{i}" for i in range(ndim - 3)] + ["z", "y", "x"][-ndim:]
    return tuple(Axis(name, _KINDS.get(name)) for name in names)


def needed(name: str, extra: str) -> Any:
    """Import a package of an optional extra.

    Raises
    ------
    MissingPackageError
        If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"This needs the package {error.name}, which is not installed. Install it "
            f"with: pip install 'napari-unetpp[{extra}]'"
        ) from None


def open_image(path: str | os.PathLike[str]) -> LazyImage:
    """Open an image file without reading its pixels.

    Parameters
    ----------
    path : path-like
        A folder of OME-Zarr (0.4 or 0.5) or plain Zarr, or any image file. TIFF files
        are read region by region, other ones at once.

    Returns
    -------
    image : LazyImage
        With the `channel_axis`, axes and scales that the file tells.

    Raises
    ------
    ImageFileError
        If it is missing, damaged, or no image.
    MissingPackageError
        If the packages for it are not installed.
    """
    path = Path(path)
    if path.is_dir():
        image = _open_zarr(path)
    elif (found := probe(path)).kind == "tiff":
        image = _open_tiff(path, found.axes or "")
    else:
        axes = plain_axes(len(found.shape))
        if found.axes == "YXS":
            axes = (*plain_axes(2), Axis("c", "channel"))
        return LazyImage(path, read_image(path), axes)
    if not 2 <= image.ndim <= 6 or not 0 < math.prod(image.shape) <= MAX_PIXELS:
        raise ImageFileError(
            f"`{shown(path)}` has the shape {image.shape}; an image has 2 to 6 axes "
            "and at least one pixel."
        )
    return image


def _check_piece(name: str, shape: tuple[int, ...], itemsize: int) -> None:
    size = math.prod(shape) * itemsize
    if size > _PIECE:
        raise ImageFileError(
            f"`{name}` is stored in pieces of {shape} pixels, {size / 1e9:.1f} GB, "
            "which cannot be read part by part. Save it in tiles or chunks of about "
            "1024 x 1024 pixels."
        )


# --- Zarr ------------------------------------------------------------------------


def _open_zarr(path: Path) -> LazyImage:
    zarr = needed("zarr", "big")
    name = shown(path)
    try:
        node = zarr.open(path, mode="r")
        version, axes = "0.5", plain_axes(getattr(node, "ndim", 2))
        if isinstance(node, zarr.Group):
            told = node.attrs.asdict()
            if "bioformats2raw.layout" in {**told, **told.get("ome", {})}:
                node = node["0"]
        if isinstance(node, zarr.Group):
            version, dataset, axes = _multiscale(node.attrs.asdict())
            node = node[dataset]
        if not isinstance(node, zarr.Array):
            raise ValueError("its first level is no array")
    except BROKEN as error:
        told = " ".join(str(error).split())[:200]
        raise ImageFileError(
            f"The folder `{name}` is no Zarr image that can be read: {told}. Pick the "
            "folder of one image; its name often ends in .zarr."
        ) from error
    _check_piece(name, node.chunks, node.dtype.itemsize)
    return LazyImage(path, node, axes, version=version)


def _multiscale(attributes: dict[str, Any]) -> tuple[str, str, tuple[Axis, ...]]:
    """Return version, path of the full resolution, and axes of an OME-Zarr group."""
    yaozarrs = needed("yaozarrs", "big")
    ome = attributes.get("ome", attributes)
    if "multiscales" not in ome:
        raise ValueError("it does not tell of a multiscale image")
    first = yaozarrs.validate_ome_object(ome).multiscales[0]
    level = first.datasets[0]
    scale, offset = np.ones(len(first.axes)), np.zeros(len(first.axes))
    for step in (
        *level.coordinateTransformations,
        *(first.coordinateTransformations or ()),
    ):
        factor = getattr(step, "scale", None)
        if factor is not None:
            scale, offset = scale * factor, offset * factor
        else:
            offset = offset + step.translation
    axes = tuple(
        Axis(a.name, a.type, a.unit, float(s), float(o))
        for a, s, o in zip(first.axes, scale, offset, strict=True)
    )
    return "0.5" if "ome" in attributes else "0.4", level.path, axes


# --- TIFF ------------------------------------------------------------------------


class _Mapped:
    """The pixels of an uncompressed file, mapped for each region anew.

    A map that stays open counts every page that was ever read as used memory.
    """

    def __init__(self, path: Path, series: tifffile.TiffPageSeries, offset: int):
        self.shape, self.offset, self.path = series.shape, offset, path
        self.order = series.keyframe.parent.byteorder
        self.dtype = np.dtype(series.dtype).newbyteorder(self.order)

    def __getitem__(self, key: Any) -> NDArray[Any]:
        pixels = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        return np.array(pixels[key])


def _open_tiff(path: Path, letters: str) -> LazyImage:
    """Open a TIFF that `probe` has checked."""
    tif = tifffile.TiffFile(path, is_ome=False, _multifile=False)
    series = tif.series[0]
    if series.dataoffset is not None:
        array: Any = _Mapped(path, series, series.dataoffset)
    else:
        zarr = needed("zarr", "big")
        chunks = (*series.keyframe.chunks,)
        _check_piece(shown(path), chunks, np.dtype(series.dtype).itemsize)
        array = zarr.open_array(series.aszarr(level=0), mode="r")
    axes = plain_axes(len(series.shape))
    if len(letters) == len(axes):
        axes = _tiff_axes(letters, _pixel_size(tif))
    image = LazyImage(path, array, axes)
    weakref.finalize(image, tif.close)
    return image


def _tiff_axes(letters: str, sizes: dict[str, dict[str, Any]]) -> tuple[Axis, ...]:
    axes = []
    for i, letter in enumerate(letters.lower()):
        name = "c" if letter == "s" else letter
        known = name if name in _KINDS else f"axis{i}"
        axis = Axis(known, _KINDS.get(name))
        axes.append(replace(axis, **sizes.get(name, {})))
    return tuple(axes)


def _pixel_size(tif: tifffile.TiffFile) -> dict[str, dict[str, Any]]:
    """Return scale and unit of y and x, where ImageJ or OME have written them."""
    page = tif.pages.first
    text = page.description or ""
    found: dict[str, dict[str, Any]] = {}
    if "<OME" in text[:4096]:
        for letter in "xyz":
            size = re.search(rf'PhysicalSize{letter.upper()}="([0-9.eE+-]+)"', text)
            unit = re.search(rf'PhysicalSize{letter.upper()}Unit="([^"]+)"', text)
            if size and (scale := _positive(size[1])):
                told = _UNITS.get(unit[1] if unit else "µm")
                found[letter] = {"scale": scale, "unit": told}
        return found
    told = _UNITS.get(str((tif.imagej_metadata or {}).get("unit", "")))
    for letter, tag in (("x", "XResolution"), ("y", "YResolution")):
        value = page.tags.valueof(tag) if told else None
        if value and value[0] > 0 and value[1] > 0:
            found[letter] = {"scale": value[1] / value[0], "unit": told}
    return found


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 < value < 1e12 else 0.0
