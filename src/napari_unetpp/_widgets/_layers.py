"""Between layers and arrays: images, annotations, colours, and what is on screen."""

from __future__ import annotations

import colorsys
import itertools
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from napari.layers import Image, Labels
from napari.utils import DirectLabelColormap
from scipy import ndimage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

OURS = "napari-unetpp"  # key in a layer's metadata: we made it and may write to it
STROKES = "napari-unetpp strokes"  # key: we made it for the user to paint in
_QUIET = 0.15  # s without an event after which a stroke counts as ended

# Okabe and Ito (2008), told apart with every kind of colour vision; no black.
_COLOURS = (
    "#56b4e9",
    "#e69f00",
    "#cc79a7",
    "#009e73",
    "#f0e442",
    "#d55e00",
    "#0072b2",
)


def colour_of(value: int) -> str:
    """Return the colour of class value 1, 2, ... as "#rrggbb"."""
    if value <= len(_COLOURS):
        return _COLOURS[value - 1]
    # The golden ratio spreads any number of further hues evenly.
    hue = (0.13 + 0.618034 * value) % 1
    light = (0.45, 0.62, 0.78)[value % 3]
    rgb = colorsys.hls_to_rgb(hue, light, 0.75)
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)


def colormap(n_classes: int, *, background: bool = True) -> DirectLabelColormap:
    """Return a new colormap; napari would share one between layers.

    Parameters
    ----------
    n_classes : int
        Classes, values 1 to `n_classes`; further ones are shown, too.
    background : bool
        Whether value 1 is visible.
    """
    colours: dict[int | None, str] = {None: "transparent", 0: "transparent"}
    colours |= {v: colour_of(v) for v in range(1, max(n_classes, 12) + 1)}
    if not background:
        colours[1] = "transparent"
    # By its name a layer is known to have these colours already.
    name = f"classes 1-{len(colours) - 2}" + ("" if background else ", 1 hidden")
    return DirectLabelColormap(color_dict=colours, name=name)


def image_of(layer: Image) -> tuple[Any, int | None]:
    """Return a layer's image, level 0, colours without alpha, and its channel axis."""
    data = layer.data[0] if layer.multiscale else layer.data
    return (data[..., :3], -1) if layer.rgb else (data, None)


def images_of(layers: Sequence[Image]) -> tuple[Any, int | None]:
    """Return one image of several layers, which become its channels.

    Raises
    ------
    ValueError
        If they do not have one shape or hold colours.
    """
    if len(layers) == 1:
        return image_of(layers[0])
    found = [image_of(layer) for layer in layers]
    shapes = {tuple(data.shape) for data, _ in found}
    if len(shapes) > 1 or any(axis is not None for _, axis in found):
        raise ValueError(
            "Layers that are channels of one image must be grey and of one shape, got "
            f"{sorted(shapes)}. Select others."
        )
    import dask.array

    lazy = [
        # Without a name dask would hash every pixel.
        data if hasattr(data, "dask") else dask.array.from_array(data, name=False)
        for data, _ in found
    ]
    return dask.array.stack(lazy), 0


def safe(text: str) -> str:
    """Return text that Qt does not take for HTML, wherever it guesses."""
    return text.replace("<", "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}").replace(
        ">", "\N{SINGLE RIGHT-POINTING ANGLE QUOTATION MARK}"
    )


def spatial_shape(layers: Sequence[Image]) -> tuple[int, ...]:
    """Return the shape of an annotation for these layers."""
    data, axis = image_of(layers[0])
    shape = tuple(int(n) for n in data.shape)
    return shape if axis is None else shape[:-1]


def aligned(layer: Image, ndim: int) -> dict[str, Any]:
    """Return what puts a layer of `ndim` axes where the last axes of `layer` lie."""
    last = slice(layer.ndim - ndim, None)
    affine = np.asarray(layer.affine.affine_matrix)
    keep = [*range(layer.ndim - ndim, layer.ndim), layer.ndim]
    return {
        "scale": np.asarray(layer.scale)[last],
        "translate": np.asarray(layer.translate)[last],
        "rotate": np.asarray(layer.rotate)[last, last],
        "shear": _last_shear(np.asarray(layer.shear), layer.ndim, ndim),
        "affine": affine[np.ix_(keep, keep)],
        "units": tuple(layer.units)[last],
        "axis_labels": tuple(layer.axis_labels)[last],
    }


def _last_shear(shear: NDArray[Any], ndim: int, kept: int) -> NDArray[Any]:
    """Return the shear (upper triangle, row by row) of the last axes."""
    matrix = np.zeros((ndim, ndim))
    matrix[np.triu_indices(ndim, 1)] = shear
    first = ndim - kept
    return np.asarray(matrix[first:, first:][np.triu_indices(kept, 1)])


def new_annotation(layers: Sequence[Image], n_classes: int) -> Labels:
    """Return an empty annotation that lies on the image."""
    shape = spatial_shape(layers)
    return Labels(
        np.zeros(shape, np.uint8),
        name=f"annotation of {layers[0].name}"[:64],
        colormap=colormap(n_classes),
        metadata={STROKES: True},
        **aligned(layers[0], len(shape)),
    )


def may_take(layer: Labels) -> bool:
    """Return whether a layer may become an annotation without the user's choice.

    One that holds something may be a segmentation that is looked at in its own colours.
    """
    if STROKES in layer.metadata or "classes" in layer.metadata:
        return True
    plain = isinstance(layer.data, np.ndarray) and not layer.multiscale
    return plain and not layer.data.any()


def prediction_layer(layers: Sequence[Image], n_classes: int) -> Labels:
    """Return an empty Labels layer of ours for what is predicted of an image."""
    shape = spatial_shape(layers)
    return Labels(
        np.zeros(shape, np.uint8),
        name=f"prediction of {layers[0].name}"[:64],
        colormap=colormap(n_classes, background=False),
        opacity=0.5,
        metadata={OURS: {"kind": "prediction"}},
        **aligned(layers[0], len(shape)),
    )


def map_layer(layers: Sequence[Image], kind: str, leading: int = 0) -> Image:
    """Return an empty Image layer of ours for probabilities or the uncertainty.

    Parameters
    ----------
    layers : sequence of Image
        What is predicted.
    kind : str
        "probability" or "uncertainty"; with which the name begins.
    leading : int
        Length of a further first axis (one map per class), 0 for none.
    """
    shape = spatial_shape(layers)
    place = aligned(layers[0], len(shape))
    if leading:
        place = {key: _widened(key, value) for key, value in place.items()}
    return Image(
        np.zeros(((leading,) if leading else ()) + shape, np.float16),
        name=f"{kind} of {layers[0].name}"[:64],
        colormap="magma" if kind == "uncertainty" else "gray",
        contrast_limits=(0, 1),
        blending="additive",
        metadata={OURS: {"kind": kind}},
        **place,
    )


def _widened(key: str, value: Any) -> Any:
    """Return a property of `aligned` for a layer with one more axis in front."""
    if key in ("rotate", "affine"):
        wide = np.eye(len(value) + 1)
        wide[1:, 1:] = value
        return wide
    if key == "shear":
        n = round((1 + np.sqrt(1 + 8 * len(value))) / 2)  # axes of the narrow layer
        return np.concatenate([np.zeros(n), value])
    first = {"scale": 1, "translate": 0, "units": "pixel", "axis_labels": "class"}[key]
    return [first, *value]


def check_annotation(layer: Labels, layers: Sequence[Image]) -> str | None:
    """Return why an annotation layer cannot be used, None if it can."""
    if layer.multiscale or not isinstance(layer.data, np.ndarray):
        return (
            "The annotation must be a plain array in memory, which napari can paint "
            "in. Press New to make one."
        )
    shape, need = tuple(layer.data.shape), spatial_shape(layers)
    if shape != need:
        return (
            f"The annotation must have the image's shape {need}, got {shape}. Pick "
            "the annotation that was drawn on this image, or press New."
        )
    return None


class View(NamedTuple):
    """What is on screen of an annotation's shape."""

    plane: int  # number in C order over the leading axes
    rows: slice
    columns: slice


def view_of(viewer: Any, layer: Labels) -> View:
    """Return the plane and the region of `layer` that the viewer shows.

    Where the displayed axes are not the last two, the whole plane at the current
    position counts as shown.
    """
    shape = layer.data.shape
    offset = viewer.dims.ndim - layer.ndim
    point = np.asarray(layer.world_to_data(viewer.dims.point[max(0, offset) :]))
    leading = shape[:-2]
    index = [
        int(np.clip(round(float(p)), 0, n - 1))
        for p, n in zip(point, leading, strict=False)
    ]
    plane = int(np.ravel_multi_index(index, leading)) if leading else 0
    whole = View(plane, slice(0, shape[-2]), slice(0, shape[-1]))
    displayed = [axis - offset for axis in viewer.dims.displayed]
    if displayed != [layer.ndim - 2, layer.ndim - 1]:
        return whole
    low, high = np.asarray(layer.corner_pixels)[:, -2:]
    rows, columns = (
        slice(int(np.clip(a, 0, n - 1)), int(np.clip(b + 1, 1, n)))
        for a, b, n in zip(low, high, shape[-2:], strict=True)
    )
    if rows.stop - rows.start < 2 or columns.stop - columns.start < 2:
        return whole  # not drawn yet
    return View(plane, rows, columns)


class Strokes:
    """Copies of the painted planes of an annotation, taken on the GUI thread.

    A plane's copy stays the same object while its content does, so that the core sees
    by identity what has changed. `paint` tells which planes it touched. Undo, redo and
    direct writes emit only `set_data`: then the plane on screen and those that ever had
    strokes are compared at once, and all others little by little.

    Parameters
    ----------
    layer : Labels
        Only read.
    """

    def __init__(self, layer: Labels) -> None:
        self.layer = layer
        self.planes: dict[int, NDArray[np.uint8]] = {}
        self._problems: dict[int, str] = {}
        self._shape: tuple[int, ...] = ()
        self._counts: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._seen: set[int] = set()
        self._touched: set[int] = set()
        self._changed: float | None = 0.0
        self._unread: list[int] = []
        self._start_over()
        layer.events.paint.connect(self._on_paint)
        layer.events.set_data.connect(self._on_change)
        layer.events.data.connect(self._start_over)

    def close(self) -> None:
        """Listen no more."""
        self.layer.events.paint.disconnect(self._on_paint)
        self.layer.events.set_data.disconnect(self._on_change)
        self.layer.events.data.disconnect(self._start_over)

    def _start_over(self, *_: object) -> None:
        if self.layer.data.shape != self._shape:
            self.planes, self._counts, self._problems = {}, {}, {}
            self._seen, self._touched = set(), set()
        self._shape = self.layer.data.shape
        self._planes = int(np.prod(self._shape[:-2], dtype=np.int64))
        self._changed = 0.0

    def _on_paint(self, event: Any) -> None:
        for atom in event.value:
            key = getattr(atom, "slice_key", None)
            self._touched |= self._numbers(atom[0] if key is None else key)

    def _numbers(self, key: Any) -> set[int]:
        """Return the planes that an index reaches: slices, whole numbers or arrays."""
        leading = self._shape[:-2]
        parts = [
            range(n)[k] if isinstance(k, slice) else np.unique(np.asarray(k))
            for k, n in zip(key, leading, strict=False)
        ]
        places = itertools.product(*parts)
        return {int(np.ravel_multi_index(p, leading)) if p else 0 for p in places}

    def _on_change(self, *_: object) -> None:
        self._changed = time.monotonic()

    def refresh(self, current: int, *, budget: float = 0.01) -> bool:
        """Copy what has changed; return whether anything has.

        Parameters
        ----------
        current : int
            Number of the plane on screen.
        budget : float
            Seconds to spend on planes not read yet; the others follow next time.
        """
        touched, self._touched = self._touched, set()
        if self._changed is not None and time.monotonic() - self._changed >= _QUIET:
            self._changed = None
            touched |= {current, *self._seen}
            self._unread = [n for n in range(self._planes) if n not in touched]
        changed = [self._read(plane) for plane in touched]
        end = time.monotonic() + budget
        while self._unread and time.monotonic() < end:
            changed.append(self._read(self._unread.pop()))
        return any(changed)

    def _read(self, number: int) -> bool:
        leading = self._shape[:-2]
        index = np.unravel_index(number, leading) if leading else ()
        plane = np.asarray(self.layer.data[tuple(int(i) for i in index)])
        old = self.planes.get(number)
        if old is not None and np.array_equal(plane, old):
            return False
        if not plane.any():
            self._counts.pop(number, None)
            self._problems.pop(number, None)
            return self.planes.pop(number, None) is not None
        low, high = int(plane.min()), int(plane.max())
        if low < 0 or high > 255:
            self._problems[number] = (
                f"The annotation must hold class numbers from 1 to 255, got {low} to "
                f"{high}. Erase the others, or press New for a fresh annotation."
            )
            return False
        self._problems.pop(number, None)
        self._seen.add(number)
        self.planes[number] = plane.astype(np.uint8)  # always a copy
        self._counts[number] = _counts_of(self.planes[number])
        return True

    @property
    def problem(self) -> str | None:
        """Why the annotation cannot be used, in words; None if it can."""
        return next(iter(self._problems.values()), None)

    def counts(self, n_classes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the painted pixels and the strokes of each class."""
        empty = np.zeros(256, np.int64)
        pixels = sum((c[0] for c in self._counts.values()), empty)
        strokes = sum((c[1] for c in self._counts.values()), empty)
        return pixels[1 : n_classes + 1], strokes[1 : n_classes + 1]

    @property
    def highest(self) -> int:
        """The highest class value that is painted, 0 for none."""
        return max(
            (int(np.flatnonzero(c[0])[-1]) for c in self._counts.values()), default=0
        )


_COUNTED = 2**18  # pixels in which strokes are told apart; larger planes are thinned


def _counts_of(
    plane: NDArray[np.uint8],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return how many pixels and how many connected strokes each value has."""
    rows = np.flatnonzero(plane.any(axis=1))
    band = plane[rows[0] : rows[-1] + 1]
    columns = np.flatnonzero(band.any(axis=0))
    crop = band[:, columns[0] : columns[-1] + 1]
    pixels = np.bincount(crop[crop > 0], minlength=256)
    step = int(np.ceil(np.sqrt(crop.size / _COUNTED)))
    thin = crop[::step, ::step]
    strokes = np.zeros(256, np.int64)
    for value in np.flatnonzero(pixels):
        strokes[value] = ndimage.label(thin == value, np.ones((3, 3)))[1]
    return pixels, strokes


def region_at(
    labels: NDArray[np.uint8], place: tuple[int, int], view: View
) -> NDArray[np.bool_]:
    """Return the connected region of one label around a pixel, within the view.

    Parameters
    ----------
    labels : ndarray of shape (Y, X) and dtype uint8
        Predicted classes.
    place : tuple of int
        Row and column, within the view.
    view : View
        What is on screen; of a larger one than 2048 x 2048 pixels, that much of it.

    Returns
    -------
    mask : ndarray of shape (Y, X) and dtype bool
        False outside the view.
    """
    windows = []
    for span, centre in zip((view.rows, view.columns), place, strict=True):
        low = max(span.start, min(centre - 1024, span.stop - 2048))
        windows.append(slice(low, min(span.stop, low + 2048)))
    crop = labels[windows[0], windows[1]]
    seed = tuple(p - w.start for p, w in zip(place, windows, strict=True))
    parts, _ = ndimage.label(crop == crop[seed])
    mask = np.zeros(labels.shape, bool)
    mask[windows[0], windows[1]] = parts == parts[seed]
    return mask


def accept(annotation: Labels, plane: int, mask: NDArray[np.bool_], value: int) -> int:
    """Annotate a region as one undoable step, leaving what is painted; return how much.

    Parameters
    ----------
    annotation : Labels
        The user's; only its unpainted pixels change.
    plane : int
        Number of the plane, in C order.
    mask : ndarray of shape (Y, X) and dtype bool
        The region.
    value : int
        The class value.
    """
    leading = annotation.data.shape[:-2]
    index = [int(i) for i in np.unravel_index(plane, leading)] if leading else []
    rows, columns = np.nonzero(mask & (annotation.data[tuple(index)] == 0))
    if len(rows):
        lead = [np.full(len(rows), i) for i in index]
        annotation.data_setitem((*lead, rows, columns), value)
    return len(rows)
