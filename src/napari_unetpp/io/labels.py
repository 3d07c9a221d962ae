"""OME-Zarr label images, written chunk by chunk, with their pyramid."""

from __future__ import annotations

import zlib
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp.errors import SaveError
from napari_unetpp.io.files import shown
from napari_unetpp.io.lazy import Axis, needed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_TOP = 512  # px; the smallest level of the pyramid is not larger
_MISSING = 255  # what a chunk that is missing holds: no class, so it is not overlooked


class Labels:
    """The full resolution of an OME-Zarr label image that is being written.

    Parameters
    ----------
    folder : path
        As `create_labels` made it.

    Attributes
    ----------
    coarse : int
        Pixels of the smaller levels.
    """

    def __init__(self, folder: Path) -> None:
        zarr = needed("zarr", "big")
        # So that a chunk that is missing is a fault, whatever the labels in it.
        with zarr.config.set({"array.write_empty_chunks": True}):
            self._levels = [
                zarr.open_array(folder, path=str(n), mode="r+")
                for n in range(sum(f.name.isdecimal() for f in folder.iterdir()))
            ]
        self._name = shown(folder.parent)
        self.coarse = sum(level.size for level in self._levels[1:])

    def write(self, place: tuple[int | slice, ...], labels: NDArray[np.uint8]) -> int:
        """Write a whole chunk and return its checksum; SaveError if that fails."""
        self._put(0, place, labels)
        return zlib.crc32(labels.tobytes())

    def checksum(self, place: tuple[int | slice, ...]) -> int:
        """Return the checksum of what is stored, -1 if it cannot be read."""
        try:
            return zlib.crc32(np.asarray(self._levels[0][place]).tobytes())
        except (OSError, ValueError, RuntimeError):
            return -1

    def _put(
        self, level: int, place: tuple[int | slice, ...], labels: NDArray[np.uint8]
    ) -> None:
        try:
            self._levels[level][place] = labels
        except OSError as error:
            raise SaveError(
                f"A part of `{self._name}` was not written: {error.strerror or error}. "
                "Make room, or see to the disk; the same command then goes on."
            ) from error

    def coarsen(self) -> Iterator[int]:
        """Write the smaller levels, every second pixel; yield the pixels of chunks."""
        for n, (fine, coarse) in enumerate(
            zip(self._levels, self._levels[1:], strict=False), start=1
        ):
            side = coarse.chunks[-1]
            *leading, height, width = coarse.shape
            for lead in np.ndindex(*leading):
                for y in range(0, height, side):
                    for x in range(0, width, side):
                        here = slice(y, y + side), slice(x, x + side)
                        there = (
                            slice(2 * y, 2 * (y + side)),
                            slice(2 * x, 2 * (x + side)),
                        )
                        block = np.asarray(fine[(*lead, *there)])[::2, ::2]
                        self._put(n, (*lead, *here), block)
                        yield block.size


def create_labels(
    folder: Path,
    shape: tuple[int, ...],
    chunk: int,
    axes: tuple[Axis, ...],
    classes: Mapping[int, str],
    version: str,
) -> None:
    """Make an OME-Zarr label image with all levels of its pyramid, still empty.

    Parameters
    ----------
    folder : path
        Must not exist.
    shape : tuple of int
        (..., Y, X), at most 5 axes.
    chunk : int
        Side of a chunk in Y and X.
    axes : tuple of Axis
        One per axis; those of the image, with their scales.
    classes : mapping of int to str
        What the values mean.
    version : str
        Of OME-Zarr: "0.4" or "0.5".
    """
    zarr, yaozarrs = needed("zarr", "big"), needed("yaozarrs", "big")
    shapes = [shape]
    while max(shapes[-1][-2:]) > _TOP:
        shapes.append((*shape[:-2], *(-(-n // 2) for n in shapes[-1][-2:])))
    form = 2 if version == "0.4" else 3
    group = zarr.create_group(folder, zarr_format=form)
    datasets = []
    for n, level in enumerate(shapes):
        group.create_array(
            str(n),
            shape=level,
            chunks=(*(1,) * (len(shape) - 2), chunk, chunk),
            dtype=np.uint8,
            fill_value=_MISSING,
            dimension_names=None if form == 2 else [a.name for a in axes],
            chunk_key_encoding={"name": "v2", "separator": "/"} if form == 2 else None,
        )
        steps = [
            a.scale * (2**n if i >= len(shape) - 2 else 1) for i, a in enumerate(axes)
        ]
        moves: list[dict[str, Any]] = [{"type": "scale", "scale": steps}]
        if any(a.offset for a in axes):
            moves.append(
                {"type": "translation", "translation": [a.offset for a in axes]}
            )
        datasets.append({"path": str(n), "coordinateTransformations": moves})
    told = [
        {k: v for k, v in (("name", a.name), ("type", a.kind), ("unit", a.unit)) if v}
        for a in axes
    ]
    meta: dict[str, Any] = {
        "multiscales": [
            {"name": "labels", "axes": told, "datasets": datasets, "type": "nearest"}
        ],
        "image-label": {
            "properties": [{"label-value": v, "class": k} for v, k in classes.items()]
        },
    }
    if form == 2:
        meta["multiscales"][0]["version"] = "0.4"
        meta["image-label"]["version"] = "0.4"
    else:
        meta["version"] = "0.5"
    yaozarrs.validate_ome_object(meta)
    group.attrs.update(meta if form == 2 else {"ome": meta})


def ordered(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Return axes that OME-Zarr allows: time first, then others, then space."""
    rank = {"time": 0, "space": 2}
    ranks = [rank.get(a.kind or "", 1) for a in axes]
    names = {a.name for a in axes}
    if ranks == sorted(ranks) and len(names) == len(axes) and ranks.count(0) < 2:
        return axes
    return (
        *(replace(a, name=f"axis{i}", kind=None) for i, a in enumerate(axes[:-2])),
        *axes[-2:],
    )


def is_labels(folder: Path) -> bool:
    """Return whether a folder is an OME-Zarr label image and may be replaced as one."""
    for name in ("zarr.json", ".zattrs"):
        with suppress(OSError, ValueError):
            text = (folder / name).read_text(encoding="utf-8")
            if '"image-label"' in text:
                return True
    return False
