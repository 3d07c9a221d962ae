"""Images as planes of channels, and their normalisation: the same code everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp.config import Settings, check_number
from napari_unetpp.errors import ImageFileError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SAMPLE = 1_000_000  # pixels that the percentiles are taken from
_LARGE = 2**24  # px of a plane beyond which they are taken from squares of it, so that
# most of a file need not be read: _SIDE x _SIDE of them, each _SIDE pixels wide
_SIDE = 32


@dataclass(frozen=True)
class Preprocessing(Settings):
    """Percentile scaling of each channel of each plane, stored with the model.

    Attributes
    ----------
    low, high : float
        Percentiles that become 0 and 1.
    clip_low, clip_high : float
        Values beyond these are cut, so that one hot pixel cannot dominate.

    Notes
    -----
    The percentiles come from the plane itself (from an even sample of a million pixels
    where it is larger, from squares at fixed random places beyond 17 million), so a
    plane gives the same labels alone and in its stack.
    """

    low: float = 1.0
    high: float = 99.8
    clip_low: float = -0.5
    clip_high: float = 2.0

    def __post_init__(self) -> None:
        check_number("low", self.low, 0, 100)
        check_number("high", self.high, 0, 100)
        check_number("clip_low", self.clip_low, -100, 100)
        check_number("clip_high", self.clip_high, -100, 100)
        for small, large in (("low", "high"), ("clip_low", "clip_high")):
            if getattr(self, small) >= getattr(self, large):
                raise ValueError(
                    f"`{small}` must be below `{large}`, got "
                    f"{getattr(self, small)} and {getattr(self, large)}."
                )

    def limits(
        self, plane: Plane | NDArray[Any], *, name: str = "image"
    ) -> NDArray[np.float64]:
        """Return the grey values that become 0 and 1, float64 of shape (2, C).

        Parameters
        ----------
        plane : Plane or array of shape (C, Y, X)
            A lazy one is read once, thinned to a million pixels.
        name : str, optional
            What the message calls it.

        Raises
        ------
        ValueError
            If the sample holds a value that is not finite.
        """
        sample = _as_float(_sample(plane))
        sample = sample.reshape(len(sample), -1)
        _check_finite(sample, name)
        limits: NDArray[np.float64] = np.percentile(
            sample, (self.low, self.high), axis=1
        ).astype(np.float64)
        # A plane that is flat but for a few pixels has equal percentiles.
        flat = limits[1] <= limits[0]
        limits[1] = np.where(flat, sample.max(axis=1), limits[1])
        limits[0] = np.where(flat, sample.min(axis=1), limits[0])
        return limits

    def apply(
        self,
        pixels: NDArray[Any],
        limits: NDArray[np.float64],
        *,
        name: str = "image",
    ) -> NDArray[np.float32]:
        """Scale pixels (C, ...) by `limits`; a channel without contrast becomes 0."""
        shape = (-1,) + (1,) * (pixels.ndim - 1)
        low = limits[0].reshape(shape)
        span = limits[1].reshape(shape) - low
        scale = np.divide(1, span, out=np.zeros_like(span), where=span > 0)
        values = _as_float(pixels)
        _check_finite(values, name)
        values -= low.astype(values.dtype)
        values *= scale.astype(values.dtype)
        np.clip(values, self.clip_low, self.clip_high, out=values)
        return values.astype(np.float32, copy=False)


def _sample(plane: Plane | NDArray[Any]) -> NDArray[Any]:
    """Return about a million pixels (C, ...) of a plane, the same ones every time."""
    height, width = plane.shape[1:]
    if height * width <= _LARGE:
        step = max(1, int(np.ceil(np.sqrt(height * width / _SAMPLE))))
        return np.asarray(plane[:, ::step, ::step])
    rng = np.random.default_rng(0)
    y, x = (
        np.linspace(0, n, _SIDE, endpoint=False)
        + rng.uniform(0, n / _SIDE, (_SIDE, _SIDE))
        for n in (height, width)
    )
    squares = [
        np.asarray(plane[:, top : top + _SIDE, left : left + _SIDE])
        for top, left in zip(_corners(y.T, height), _corners(x, width), strict=True)
    ]
    return np.concatenate([s.reshape(len(s), -1) for s in squares], axis=1)


def _corners(places: NDArray[np.float64], n: int) -> list[int]:
    """Return where squares start, within one piece of most files and the plane."""
    last = max(0, n // _SIDE - 1) * _SIDE
    starts = np.minimum(places.astype(np.int64) // _SIDE * _SIDE, last)
    found: list[int] = starts.ravel().tolist()
    return found


def _as_float(pixels: NDArray[Any]) -> NDArray[Any]:
    """Copy to float32, or to float64 what float32 cannot tell apart."""
    exact = pixels.dtype.itemsize < 4 or pixels.dtype == np.float32
    return pixels.astype(np.float32 if exact else np.float64)


def _check_finite(values: NDArray[Any], name: str) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        total = values.sum(dtype=np.float64)
    if not np.isfinite(total):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        raise ValueError(
            f"`{name}` must hold finite numbers only, got {bad} NaN or infinite values "
            "(or values beyond 1e300). Replace them, for example with "
            "numpy.nan_to_num, and try again."
        )


def read_part(array: Any, key: tuple[int | slice, ...]) -> NDArray[Any]:
    """Return a part of an array, which may lie in a file.

    Raises
    ------
    ImageFileError
        If that file is damaged or gone.
    """
    try:
        return np.asarray(array[key])
    # What zarr, dask and the codecs below them raise.
    except (LookupError, OSError, RuntimeError, ValueError) as error:
        raise ImageFileError(
            "A part of an image or annotation cannot be read from its file "
            f"({str(error)[:200] or type(error).__name__}). Copy the file once more."
        ) from error


class Plane:
    """One plane of an image as (C, Y, X), which reads what it is asked for and no more.

    Parameters
    ----------
    image : array of shape (..., Y, X), with channels at `axis`
    index : tuple of int
        Position along the leading axes.
    axis : int or None
        Axis of the channels in `image`, not negative.
    shape : tuple of int
        (C, Y, X).
    """

    def __init__(
        self,
        image: Any,
        index: tuple[int, ...],
        axis: int | None,
        shape: tuple[int, int, int],
    ) -> None:
        self._image = image
        self._index = index
        self._axis = axis
        self.shape = shape

    def __getitem__(self, key: tuple[slice, slice, slice]) -> NDArray[Any]:
        channels, rows, columns = key
        whole: list[int | slice] = [*self._index, rows, columns]
        if self._axis is None:
            return read_part(self._image, tuple(whole))[None][channels]
        whole.insert(self._axis, channels)
        block = read_part(self._image, tuple(whole))
        return np.moveaxis(block, max(0, self._axis - len(self._index)), 0)


class Planes:
    """An image as a sequence of planes of shape (C, Y, X), read one at a time.

    Parameters
    ----------
    image : array of shape (..., Y, X), with channels at `channel_axis`
        Any real or boolean dtype; lazy arrays (dask, zarr) stay lazy.
    channel_axis : int or None, optional
        Axis that holds the channels; None for a single channel.

    Raises
    ------
    ValueError
        If the shape, dtype or `channel_axis` does not fit.
    """

    def __init__(
        self, image: Any, *, channel_axis: int | None = None, name: str = "image"
    ) -> None:
        if not isinstance(getattr(image, "dtype", None), np.dtype):
            image = np.asarray(image)  # a list; a tensor, whose dtype is not numpy's
        self._check(image, channel_axis, name)
        self._image = image
        self._axis = None if channel_axis is None else channel_axis % image.ndim
        shape = list(image.shape)
        self.channels: int = 1 if self._axis is None else shape.pop(self._axis)
        self.leading = tuple(shape[:-2])
        self.shape: tuple[int, int] = (shape[-2], shape[-1])

    @staticmethod
    def _check(image: Any, channel_axis: int | None, name: str) -> None:
        kind = np.dtype(image.dtype).kind
        if kind not in "buif":
            raise ValueError(
                f"`{name}` must hold real numbers, got dtype {image.dtype}. Convert "
                "it, for example to float32 (of a complex image: its absolute value)."
            )
        need = 2 if channel_axis is None else 3
        if image.ndim < need or min(image.shape) == 0:
            raise ValueError(
                f"`{name}` must have at least {need} axes, none of them empty, got "
                f"shape {tuple(image.shape)}."
            )
        if channel_axis is None:
            if image.ndim > 2 and image.shape[-1] in (3, 4):
                raise ValueError(
                    f"`{name}` of shape {tuple(image.shape)} looks like colour. Pass "
                    "channel_axis=-1, or the axis that holds the channels."
                )
            return
        check_number(
            "channel_axis", channel_axis, -image.ndim, image.ndim - 1, whole=True
        )
        if image.shape[channel_axis] > 16:
            raise ValueError(
                f"`{name}` must have at most 16 channels, got "
                f"{image.shape[channel_axis]} along channel_axis={channel_axis} of "
                f"shape {tuple(image.shape)}. Is that the right axis?"
            )

    def __len__(self) -> int:
        return int(np.prod(self.leading, dtype=np.int64))

    def index(self, number: int) -> tuple[int, ...]:
        """Return where plane `number` lies along the leading axes, in C order."""
        place = np.unravel_index(number, self.leading) if self.leading else ()
        return tuple(int(i) for i in place)

    def plane(self, number: int) -> Plane:
        """Return plane `number` (C order over the leading axes), not yet read."""
        shape = (self.channels, *self.shape)
        return Plane(self._image, self.index(number), self._axis, shape)


def check_annotation(annotation: Any, planes: Planes, name: str) -> None:
    """Raise ValueError unless `annotation` holds class numbers for every pixel."""
    shape = (*planes.leading, *planes.shape)
    if tuple(annotation.shape) != shape:
        raise ValueError(
            f"`{name}` must have the image's shape {shape}, got "
            f"{tuple(annotation.shape)}. Pick the annotation that was drawn on this "
            "image."
        )
    if np.dtype(annotation.dtype).kind not in "bui":
        raise ValueError(
            f"`{name}` must hold whole numbers (class numbers), got dtype "
            f"{annotation.dtype}. Convert it with .astype('uint8')."
        )


def reflect(index: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Fold any indices into 0..n-1 by mirrors at the first and last pixel."""
    period = max(1, 2 * (n - 1))
    folded = index % period
    return np.minimum(folded, period - folded) if n > 1 else np.zeros_like(index)


def read_window(
    plane: Plane | NDArray[Any],
    rows: tuple[int, int],
    columns: tuple[int, int],
    preprocessing: Preprocessing,
    limits: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Return a normalised window (C, rows, columns), mirrored outside the plane."""
    y = reflect(np.arange(*rows), plane.shape[1])
    x = reflect(np.arange(*columns), plane.shape[2])
    block = np.asarray(plane[:, y.min() : y.max() + 1, x.min() : x.max() + 1])
    values = preprocessing.apply(block, limits)
    return values[:, (y - y.min())[:, None], (x - x.min())[None, :]]
