"""What a run looks like: curves, labels over images, a film of them growing."""

from __future__ import annotations

import io as buffers
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from napari_unetpp.model import TrainStep

# Okabe and Ito's colours, which colour-blind people can tell apart.
RIGHT, MISSED, INVENTED, MIXED = (
    (86, 180, 233),
    (240, 228, 66),
    (213, 94, 0),
    (204, 121, 167),
)
_INK, _SOFT, _GRID, _LINE = (
    (33, 37, 41),
    (110, 118, 129),
    (228, 231, 235),
    (0, 114, 178),
)
_PANEL = 340  # px; pictures are enlarged or thinned to about this
_FRAMES = 40  # of a film, at most
_FINE = 2  # curves are drawn so many times larger, and thinned: smooth lines


def visible(plane: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a plane (Y, X) or (Y, X, C) as RGB, its darkest percent black."""
    values = np.asarray(plane, np.float32)
    low, high = np.percentile(values, (1, 99.5))
    scaled = (values - low) / max(float(high - low), 1e-6)
    pixels = (255 * scaled.clip(0, 1)).astype(np.uint8)
    if pixels.ndim == 2:
        return np.stack([pixels] * 3, axis=-1)
    if pixels.shape[-1] != 3:
        pixels = pixels[..., :1].repeat(3, axis=-1)
    return np.ascontiguousarray(pixels)


def compared(
    image: NDArray[np.uint8], labels: NDArray[np.uint8], truth: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Tint an image, in grey, by how labels agree with the truth.

    Parameters
    ----------
    image : ndarray of shape (Y, X, 3) and dtype uint8
        What is tinted; not changed.
    labels, truth : ndarray of shape (Y, X) and dtype uint8
        1 = background, 2, 3, ... = classes; 0 in the truth is not judged.

    Returns
    -------
    ndarray of shape (Y, X, 3) and dtype uint8
        Blue: found; yellow: missed; red: invented; pink: another class.
    """
    judged, found, true = truth > 0, labels > 1, truth > 1
    # In grey, no colour of the image can be taken for one of these.
    result = image.mean(axis=-1, dtype=np.float32)[..., None].repeat(3, axis=-1)
    for colour, where in (
        (RIGHT, found & true & (labels == truth)),
        (MISSED, ~found & true),
        (INVENTED, found & ~true & judged),
        (MIXED, found & true & (labels != truth)),
    ):
        result[where] = 0.5 * result[where] + 0.5 * np.array(colour, np.float32)
    pixels: NDArray[np.uint8] = result.round().astype(np.uint8)
    return pixels


def sized(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Enlarge or thin by a whole number, so that every pixel stays crisp."""
    side = max(pixels.shape[:2])
    larger, smaller = max(1, round(_PANEL / side)), max(1, round(side / _PANEL))
    thin = pixels[::smaller, ::smaller]
    return np.ascontiguousarray(thin.repeat(larger, axis=0).repeat(larger, axis=1))


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Return an RGB picture as the bytes of a PNG file."""
    buffer = buffers.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def film(
    image: NDArray[np.uint8],
    truth: NDArray[np.uint8],
    frames: Sequence[tuple[int, float | None, NDArray[np.uint8]]],
) -> bytes:
    """Return an animated PNG of labels growing over a training.

    Parameters
    ----------
    image : ndarray of shape (Y, X, 3) and dtype uint8
        What is tinted.
    truth : ndarray of shape (Y, X) and dtype uint8
        As for `compared`.
    frames : sequence of (step, score or None, labels)
        At least one; the last one stays for a while.
    """
    places = np.unique(
        np.linspace(0, len(frames) - 1, min(len(frames), _FRAMES)).round().astype(int)
    )
    last = frames[-1][0]
    pictures = []
    for step, score, labels in (frames[i] for i in places):
        tinted = sized(compared(image, labels, truth))
        height, width = tinted.shape[:2]
        sheet = Image.new("RGB", (width, height + 34), (255, 255, 255))
        sheet.paste(Image.fromarray(tinted), (0, 0))
        draw = ImageDraw.Draw(sheet)
        draw.rectangle((0, height, width * step / last, height + 3), fill=_LINE)
        text = f"step {step:,}" + (
            "" if score is None else f"    validation {score:.3f}"
        )
        draw.text((6, height + 9), text, fill=_INK, font=ImageFont.load_default(16))
        pictures.append(sheet.quantize(96, dither=Image.Dither.NONE))
    times = [150] * (len(pictures) - 1) + [2500]
    buffer = buffers.BytesIO()
    pictures[0].save(
        buffer, "PNG", save_all=True, append_images=pictures[1:], duration=times, loop=0
    )
    return buffer.getvalue()


def curves(history: Sequence[TrainStep]) -> NDArray[np.uint8]:
    """Draw the loss and the validation score over the steps.

    Returns
    -------
    ndarray of shape (Y, X, 3) and dtype uint8
    """
    width, height = 620, 470
    sheet = Image.new("RGB", (width * _FINE, height * _FINE), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    steps = np.array([s.step for s in history], float)
    losses = np.array([s.loss for s in history], float)
    scored = [(s.step, s.score) for s in history if s.score is not None]
    left = _Axes(draw, (62, 34, 596, 180), "loss", steps, _robust(losses))
    thin_x, thin_y = _thinned(steps, losses, 400)
    left.line(thin_x, thin_y, (178, 208, 232), 1.5)
    left.line(*_thinned(steps, losses, min(40, max(2, len(steps) // 6))), _LINE, 2.5)
    x, y = (np.array(v, float) for v in zip(*scored, strict=True)) if scored else (
        np.zeros(0), np.zeros(0)
    )  # fmt: skip
    right = _Axes(draw, (62, 272, 596, 420), "validation score", steps, y)
    right.line(x, y, _LINE, 2.5)
    if len(y):
        best = int(np.argmax(y))
        right.mark(x[best], y[best], f"best {y[best]:.3f} at step {int(x[best]):,}")
    return np.asarray(sheet.resize((width, height), Image.Resampling.LANCZOS))


def _robust(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return values without the few large ones of the very beginning."""
    if not len(values):
        return values
    return values[values <= np.percentile(values, 99)]


def _thinned(
    x: NDArray[np.float64], y: NDArray[np.float64], most: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return means of runs of neighbours, `most` of them at most."""
    if len(x) <= most:
        return x, y
    pieces = np.array_split(np.arange(len(x)), most)
    return tuple(np.array([v[p].mean() for p in pieces]) for v in (x, y))  # type: ignore[return-value]


class _Axes:
    """A box with ticks, and what is drawn in it."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        box: tuple[int, int, int, int],
        title: str,
        x: NDArray[np.float64],
        y: NDArray[np.float64],
    ) -> None:
        self._draw = draw
        self._box = [_FINE * v for v in box]
        self._font = ImageFont.load_default(13 * _FINE)
        left, top, right, bottom = self._box
        self._x = (0.0, max(float(x.max()), 1.0) if len(x) else 1.0)
        low, high = (float(y.min()), float(y.max())) if len(y) else (0.0, 1.0)
        ticks = _ticks(low, high)
        step = ticks[1] - ticks[0]
        self._y = (min(low, ticks[0]), max(high, ticks[-1]))
        draw.text(
            (left, top - 30 * _FINE),
            title,
            fill=_INK,
            font=ImageFont.load_default(16 * _FINE),
        )
        digits = max(0, -math.floor(math.log10(step)))
        for tick in ticks:
            height = self._place(0, tick)[1]
            draw.line((left, height, right, height), fill=_GRID, width=_FINE)
            draw.text(
                (left - 8 * _FINE, height), f"{tick:.{digits}f}", fill=_SOFT,
                font=self._font, anchor="rm",
            )  # fmt: skip
        for tick in _ticks(*self._x):
            if tick <= self._x[1]:
                draw.text(
                    (self._place(tick, 0)[0], bottom + 8 * _FINE), f"{tick:,.0f}",
                    fill=_SOFT, font=self._font, anchor="mt",
                )  # fmt: skip
        draw.text(
            ((left + right) / 2, bottom + 27 * _FINE), "steps", fill=_SOFT,
            font=self._font, anchor="mt",
        )  # fmt: skip

    def _place(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self._box
        across = (x - self._x[0]) / (self._x[1] - self._x[0])
        up = (min(max(y, self._y[0]), self._y[1]) - self._y[0]) / (
            self._y[1] - self._y[0]
        )
        return left + across * (right - left), bottom - up * (bottom - top)

    def line(
        self,
        x: NDArray[np.float64],
        y: NDArray[np.float64],
        colour: tuple[int, int, int],
        width: float,
    ) -> None:
        """Join points."""
        places = [self._place(a, b) for a, b in zip(x, y, strict=True)]
        if len(places) > 1:
            self._draw.line(
                places, fill=colour, width=round(width * _FINE), joint="curve"
            )

    def mark(self, x: float, y: float, text: str) -> None:
        """Set a dot, and say what it is in the corner."""
        a, b = self._place(x, y)
        r = 4 * _FINE
        self._draw.ellipse((a - r, b - r, a + r, b + r), fill=INVENTED)
        right, bottom = self._box[2], self._box[3]
        self._draw.text(
            (right, bottom - 8 * _FINE), text, fill=INVENTED, font=self._font,
            anchor="rb",
        )  # fmt: skip


def _ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers from below `low` to `high` or beyond."""
    span = max(high - low, 1e-3)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [n * step for n in range(first, max(last, first + 1) + 1)]
