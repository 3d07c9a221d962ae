"""The Predict dock's result layers: found again by identity, left alone once edited."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Labels

from ._layers import OURS, aligned, colormap

if TYPE_CHECKING:
    from napari.layers import Image
    from numpy.typing import NDArray

    from ._predict_run import Facts, Piece

_INCOMPLETE = " (incomplete)"


class Result:
    """A labels layer of ours, and the array that a run may write to."""

    def __init__(self, layer: Labels) -> None:
        self.layer = layer
        self._array: NDArray[np.uint8] = layer.data

    def write(self, viewer: Any, piece: Piece) -> bool:
        """Write, unless the user has removed the layer or replaced its data."""
        if self.layer not in viewer.layers or self.layer.data is not self._array:
            return False
        self._array[piece.slices] = piece.labels
        return True

    def finish(self, *, complete: bool) -> None:
        """Mark what has been written, so that an edit is seen before the next run."""
        if not complete:
            self.layer.name = self.layer.name[: 64 - len(_INCOMPLETE)] + _INCOMPLETE
        if self.layer.data is self._array:
            self.layer.metadata[OURS]["checksum"] = _checksum(self._array)
        self.layer.refresh()


def earlier(viewer: Any, source: str, shape: tuple[int, ...]) -> Labels | None:
    """Return our result of the same source if nobody has changed it since.

    Parameters
    ----------
    viewer : napari.Viewer
        Where to look.
    source : str
        What tells an image from all others.
    shape : tuple of int
        Of the result.
    """
    for layer in viewer.layers:
        mark = layer.metadata.get(OURS)
        if (
            isinstance(mark, dict)
            and mark.get("source") == source
            and mark.get("self") == str(layer.unique_id)  # no copy of ours
            and layer.data.shape == shape
            and mark.get("checksum") == _checksum(layer.data)
        ):
            return layer
    return None


def new(piece: Piece, facts: Facts, image: Image | None) -> Labels:
    """Return an empty layer for what is predicted of an image."""
    return Labels(
        np.zeros(piece.shape, np.uint8),
        name=f"prediction of {piece.title}"[:64],
        colormap=colormap(len(facts.classes), background=facts.dense),
        opacity=0.5,
        **(aligned(image, len(piece.shape)) if image is not None else {}),
    )


def clear(layer: Labels, facts: Facts, image: Image | None) -> None:
    """Empty a result for the next run over its image, wherever that lies by now."""
    layer.data[...] = 0
    layer.name = layer.name.removesuffix(_INCOMPLETE)
    layer.visible = True
    colours = colormap(len(facts.classes), background=facts.dense)
    if layer.colormap.name != colours.name:
        layer.colormap = colours
    if image is not None:
        for key, value in aligned(image, layer.ndim).items():
            setattr(layer, key, value)


def _checksum(array: Any) -> int:
    # The fastest that the standard library has: no secret is kept with it.
    return zlib.crc32(np.ascontiguousarray(array).data)
