"""A model beside a random forest and a threshold, in figures and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from napari_unetpp.api import Model
    from napari_unetpp.samples import Sample

Labels = NDArray[np.uint8]
Pixels = NDArray[np.uint8]

# Okabe and Ito's colours, which colour-blind people can tell apart; the first three
# also differ in brightness.
COLOURS = (
    (86, 180, 233),
    (240, 228, 66),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (0, 114, 178),
    (230, 159, 0),
)
_PANEL = 512  # px; smaller pictures are enlarged to about this, larger ones thinned
_GAP = 20
_TITLE, _TEXT = 30, 22  # font sizes in px


@dataclass(frozen=True, eq=False)
class Row:
    """One method's result.

    Attributes
    ----------
    name : str
        For the table.
    iou : dict of str to float
        Of each foreground class, on pixels that training did not see.
    mean : float
        Mean of `iou`.
    labels : ndarray of shape (Y, X) and dtype uint8, or None
        What the method says; None where each class has its own answer.
    """

    name: str
    iou: dict[str, float]
    mean: float
    labels: Labels | None


@dataclass(frozen=True, eq=False)
class Comparison:
    """All methods on one sample.

    Attributes
    ----------
    rows : tuple of Row
        The model at each depth, shallow first, then the others.
    n_pixels : int
        Pixels that were judged: the truth is sure, and no stroke covers them.
    """

    rows: tuple[Row, ...]
    n_pixels: int


def compare(
    sample: Sample, model: Model, *, device: str | None = None, seed: int = 0
) -> Comparison:
    """Judge a model, a random forest and a threshold on the same pixels.

    Parameters
    ----------
    sample : Sample
        A plane with strokes and a truth.
    model : Model
        Trained on the strokes.
    device : str or None
        Where the model predicts.
    seed : int
        Of the forest.
    """
    from napari_unetpp import api

    unseen = unseen_truth(sample)
    rows = []
    depths = model.network.depths
    for depth in depths:
        labels = api.predict(
            model,
            sample.image,
            depth=depth,
            channel_axis=sample.channel_axis,
            device=device,
        )
        name = model.config.name + (f", depth {depth}" if len(depths) > 1 else "")
        rows.append(_judged(name, labels, unseen, sample.classes))
    labels = forest(sample, seed=seed)
    rows.append(_judged("random forest", labels, unseen, sample.classes))
    rows.append(_thresholded(sample, unseen))
    return Comparison(tuple(rows), int(np.count_nonzero(unseen)))


def unseen_truth(sample: Sample) -> Labels:
    """Return the truth, 0 where it is unsure or was shown to the training."""
    if sample.truth is None or not sample.strokes.any():
        raise ValueError(
            f"The sample {sample.name!r} has no strokes or no truth. Choose "
            "another one, such as immunohistochemistry, coins or retina."
        )
    return np.where(sample.strokes > 0, 0, sample.truth).astype(np.uint8)


def _judged(name: str, labels: Labels, unseen: Labels, classes: tuple[str, ...]) -> Row:
    from napari_unetpp import api

    result = api.evaluate(labels, unseen, classes=classes)
    iou = {key: result.iou[key] for key in classes[1:]}
    return Row(name, iou, result.foreground_iou, labels)


def forest(sample: Sample, *, seed: int = 0) -> Labels:
    """Return the labels of a random forest on multiscale features of each pixel.

    Notes
    -----
    Intensity, edges and texture at 0.7 to 16 px, 100 trees with balanced classes,
    fitted on every stroke: what ilastik and napari's pixel classifiers do.
    """
    from sklearn.ensemble import RandomForestClassifier

    from napari_unetpp.teacher import pixel_features

    features = pixel_features(sample.image, sample.channel_axis)
    annotated = sample.strokes > 0
    trees = RandomForestClassifier(
        100, class_weight="balanced", n_jobs=-1, random_state=seed
    )
    trees.fit(features[annotated], sample.strokes[annotated])
    labels = trees.predict(features.reshape(-1, features.shape[-1]))
    return np.asarray(labels, np.uint8).reshape(sample.strokes.shape)


def _thresholded(sample: Sample, unseen: Labels) -> Row:
    """Give each class the side of the threshold, and the grey value, that suit it."""
    from skimage.filters import threshold_otsu

    from napari_unetpp import api

    image = sample.image.astype(np.float32)
    greys = [image]
    if sample.channel_axis is not None:
        channels = np.moveaxis(image, sample.channel_axis, 0)
        greys = [channels.mean(axis=0), *channels]
    judged = unseen > 0
    cuts = [threshold_otsu(grey) for grey in greys]  # type: ignore[no-untyped-call]
    above = [(g > cut)[judged] for g, cut in zip(greys, cuts, strict=True)]
    iou = {}
    for value, name in enumerate(sample.classes[1:], start=2):
        true = unseen[judged] == value
        found = [
            api.evaluate(side, true, unlabelled=None).iou.get(1, 0.0)
            for a in above
            for side in (a, ~a)
        ]
        iou[name] = max(found)
    return Row("Otsu's threshold", iou, float(np.mean(list(iou.values()))), None)


# --- picture ---------------------------------------------------------------------


def picture(sample: Sample, comparison: Comparison) -> Pixels:
    """Draw image, strokes, truth and every method's labels side by side.

    Parameters
    ----------
    sample : Sample
        A plane with strokes and a truth.
    comparison : Comparison
        From `compare`.

    Returns
    -------
    picture : ndarray of shape (Y, X, 3) and dtype uint8
    """
    image = visible(sample)
    # Thin strokes of any colour show on a dark picture, not on a bright one.
    dark = (image.mean(axis=-1, keepdims=True) * 0.4).repeat(3, axis=-1)
    share = np.count_nonzero(sample.strokes) / sample.strokes.size
    truth = np.asarray(sample.truth)
    panels = [
        ("image", sample.name, image),
        ("strokes", f"{share:.1%} of the pixels", _over(sample.strokes, dark)),
        ("truth", "white: not judged", _over(truth, np.full_like(image, 255))),
    ]
    for row in comparison.rows:
        if row.labels is not None:
            note = f"mean foreground IoU {row.mean:.3f}"
            panels.append((row.name, note, _over(row.labels, image)))
    return _sheet(panels, sample.classes)


def visible(sample: Sample) -> Pixels:
    """Return the image as RGB, from its darkest to its brightest percent."""
    image = sample.image
    if image.dtype != np.uint8:
        values = image.astype(np.float32)
        low, high = np.percentile(values, (1, 99))
        scaled = (values - low) / max(float(high - low), 1e-6)
        image = (255 * scaled.clip(0, 1)).astype(np.uint8)
    if sample.channel_axis is None:
        return np.stack([image] * 3, axis=-1)
    channels = np.moveaxis(image, sample.channel_axis, -1)
    if channels.shape[-1] != 3:
        channels = channels[..., :1].repeat(3, axis=-1)
    return np.asarray(channels, np.uint8)


def _over(labels: Labels, below: NDArray[Any]) -> Pixels:
    """Paint labels over an RGB image; it shows where they are 0."""
    result = np.array(below, np.uint8)
    for value in np.unique(labels[labels > 0]):
        result[labels == value] = _colour(int(value))
    return result


def _colour(value: int) -> tuple[int, int, int]:
    return COLOURS[(value - 1) % len(COLOURS)]


def _sheet(panels: list[tuple[str, str, Pixels]], classes: tuple[str, ...]) -> Pixels:
    """Set panels in rows, with titles above and the classes' colours below."""
    drawn = [_sized(pixels) for _, _, pixels in panels]
    height, width = drawn[0].shape[:2]
    columns = len(panels) if len(panels) <= 5 else 4
    rows = -(-len(panels) // columns)
    head = _TITLE + _TEXT + 3 * _GAP // 2
    size = (
        columns * (width + _GAP) + _GAP,
        rows * (height + head + _GAP) + _TEXT + 2 * _GAP,
    )
    sheet = Image.new("RGB", size, (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    title, text = ImageFont.load_default(_TITLE), ImageFont.load_default(_TEXT)
    for i, (name, note, _) in enumerate(panels):
        x = _GAP + (i % columns) * (width + _GAP)
        y = _GAP // 2 + (i // columns) * (height + head + _GAP)
        draw.text((x, y), name, fill=(0, 0, 0), font=title)
        draw.text((x, y + _TITLE + _GAP // 2), note, fill=(64, 64, 64), font=text)
        sheet.paste(Image.fromarray(drawn[i]), (x, y + head))
    x, y = _GAP, size[1] - _TEXT - _GAP
    for value, name in enumerate(classes, start=1):
        box = (x, y, x + _TEXT, y + _TEXT)
        draw.rectangle(box, fill=_colour(value), outline=(0, 0, 0))
        draw.text((x + _TEXT + _GAP // 2, y), name, fill=(0, 0, 0), font=text)
        x += _TEXT + 2 * _GAP + int(draw.textlength(name, font=text))
    return np.asarray(sheet)


def _sized(pixels: Pixels) -> Pixels:
    """Enlarge or thin by a whole number, so that every pixel stays crisp."""
    side = max(pixels.shape[:2])
    larger, smaller = max(1, round(_PANEL / side)), max(1, round(side / _PANEL))
    thin = pixels[::smaller, ::smaller]
    return np.ascontiguousarray(thin.repeat(larger, axis=0).repeat(larger, axis=1))
