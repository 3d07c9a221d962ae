"""A project's images: named where they lie, stored where they are in no file."""

from __future__ import annotations

import io as buffers
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from napari_unetpp import io
from napari_unetpp.errors import SaveError, UnetppError
from napari_unetpp.project.format import ProjectImage, fingerprint, inside

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LARGEST = 4 * 2**30  # bytes of an image without a file that is stored with a project


def own_folder(parent: Path, name: str) -> Path:
    """Return a folder of the project, made if there is none; no link leads there."""
    path = inside(parent, name)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"The folder `{io.shown(path)}` cannot be made: {error.strerror}. Make "
            "room, or choose another folder for the project."
        ) from error
    return path


def as_image(image: Any, number: int, axis: int | None) -> ProjectImage:
    """Return what was given, a path or an array, as an image of a project."""
    if isinstance(image, ProjectImage):
        return image
    if isinstance(image, (str, os.PathLike)):
        path = Path(os.path.realpath(image))
        return ProjectImage(path.stem, (path,), channel_axis=axis)
    return ProjectImage(
        f"image {number + 1}", (None,), channel_axis=axis, data=(image,)
    )


def placed(folder: Path, image: ProjectImage, note: NDArray[Any]) -> ProjectImage:
    """Return an image that is in files, whose annotation fits."""
    data = image.data or (None,) * len(image.files)
    parts = [
        _in_file(folder, image.name, path, pixels, image.rgb)
        for path, pixels in zip(image.files, data, strict=True)
    ]
    shape = tuple(parts[0][1]["shape"])
    if image.channel_axis is not None and len(parts) == 1:
        shape = shape[:-1]
    if note.shape != shape or note.dtype.kind not in "uib":
        raise ValueError(
            f"The annotation of `{io.shown(image.name)}` must hold whole numbers in "
            f"the image's shape {shape}, got {note.shape} {note.dtype}."
        )
    return replace(
        image,
        files=tuple(p for p, _ in parts),
        facts=tuple(f for _, f in parts),
        shape=shape,
        data=(),
    )


def _in_file(
    folder: Path, name: str, path: Path | None, pixels: Any, rgb: bool
) -> tuple[Path, dict[str, Any]]:
    """Return the file that holds these pixels, made if there is none."""
    if path is not None:
        try:
            found = _open(path, lazy=pixels is not None and not _in_memory(pixels))
        except UnetppError:
            if pixels is None:
                raise  # else another program's format, which its own reader has read
            found = np.zeros(0)
        if pixels is None or _same(found, pixels):
            return path, _facts(folder, path, found)
        # What is shown is not what the file alone holds, such as a changed image.
    if _size(pixels) > _LARGEST:
        raise SaveError(
            f"The image `{io.shown(name)}` is in no file and too large to be stored "
            "with the project. Save it as a TIFF or Zarr first, and open that."
        )
    array = np.asarray(pixels)
    stem = plain(name)
    target = own_folder(folder, "images") / f"{stem}.{fingerprint(array)}.tif"
    if not target.exists():
        buffer = buffers.BytesIO()
        kind = "rgb" if rgb and array.dtype.kind == "u" else "minisblack"
        tifffile.imwrite(buffer, array, compression="zlib", photometric=kind)
        io.atomic_write(target, buffer.getvalue())
    return target, _facts(folder, target, array)


def _size(pixels: Any) -> int:
    numbers: int = math.prod(pixels.shape)
    return int(numbers * np.dtype(pixels.dtype).itemsize)


def _in_memory(pixels: Any) -> bool:
    return isinstance(pixels, np.ndarray) and not isinstance(pixels, np.memmap)


def _open(path: Path, *, lazy: bool) -> Any:
    return io.open_image(path) if lazy or path.is_dir() else io.read_image(path)


def _same(found: Any, pixels: Any) -> bool:
    """Whether a file holds these pixels; of lazy ones the size and type tell."""
    if found.shape != tuple(pixels.shape) or found.dtype != pixels.dtype:
        return False
    if not isinstance(found, np.ndarray) or not _in_memory(pixels):
        return True
    return np.array_equal(found, pixels, equal_nan=found.dtype.kind == "f")


def _facts(folder: Path, path: Path, array: Any) -> dict[str, Any]:
    path = Path(os.path.realpath(path))
    near = path.is_relative_to(folder.parent)
    whole = isinstance(array, np.ndarray)
    return {
        "path": Path(os.path.relpath(path, folder)).as_posix() if near else str(path),
        "shape": [int(n) for n in array.shape],
        "dtype": np.dtype(array.dtype).name,
        "fingerprint": fingerprint(array) if whole else "",
    }


def plain(name: str) -> str:
    """Return a name that every file system takes."""
    return re.sub(r"[^\w\- ]", "_", name, flags=re.ASCII).strip()[:60] or "image"
