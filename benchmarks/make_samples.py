"""Draw the strokes and make the truths of the sample images from hand-drawn outlines.

The coordinates lie in ``sample_outlines_*.json``. Borders are refined in two ways;
where these differ, along the border and where the eye could not decide, the truth is 0.

Run it from the root of the repository: ``python benchmarks/make_samples.py``.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage import (
    color,
    data,
    draw,
    filters,
    graph,
    io,
    morphology,
    segmentation,
)

HERE = Path(__file__).parent
OUT = HERE.parent / "src" / "napari_unetpp" / "_data"
UNSURE = 0
WIDTH = 3  # pixels, the width of a brush stroke
RETINA = (slice(226, 738), slice(141, 653))  # as in samples.py


def outlines(name):
    """Read the coordinates that were drawn by hand."""
    return json.loads((HERE / f"sample_outlines_{name}.json").read_text())


def fill(shape, outlines, order):
    """Label by polygons; a later name of `order` covers an earlier one."""
    labels = np.zeros(shape, np.uint8)
    for value, name in order:
        for points in outlines[name]:
            x, y = np.asarray(points, float).T
            labels[draw.polygon(y, x, shape)] = value
    return labels


def polyline(shape, points):
    """Mark the pixels of a polyline."""
    line = np.zeros(shape, bool)
    for (x0, y0), (x1, y1) in pairwise(points):
        line[draw.line(y0, x0, y1, x1)] = True
    return line


def brush(shape, strokes, classes):
    """Label by polylines of `WIDTH` pixels."""
    labels = np.zeros(shape, np.uint8)
    for value, name in enumerate(classes, 1):
        line = np.zeros(shape, bool)
        for points in strokes[name]:
            line |= polyline(shape, points)
        labels[ndimage.binary_dilation(line, np.ones((WIDTH, WIDTH)))] = value
    return labels


def markers_of(labels, inwards):
    """Shrink each region by `inwards` pixels, thin ones by half their half width."""
    border = segmentation.find_boundaries(labels, mode="inner")
    depth = ndimage.distance_transform_edt(~border)
    markers = np.zeros_like(labels)
    for value in np.unique(labels[labels > 0]):
        inside = labels == value
        # the local half width: thin places keep a marker too
        ridge = ndimage.grey_dilation(
            np.where(inside, depth, 0), footprint=morphology.disk(2 * inwards)
        )
        markers[inside & (depth > np.minimum(inwards, 0.5 * ridge))] = value
    return markers


def refine(drawn, channels, unsure, beta):
    """Find borders by watershed and by random walker; 0 where they differ."""
    gradient = np.sqrt(sum(filters.sobel(c) ** 2 for c in channels))
    markers = markers_of(drawn, 5)
    flooded = segmentation.watershed(gradient, markers)
    walked = segmentation.random_walker(
        np.stack(channels, -1), markers, beta=beta, mode="cg_j", channel_axis=-1
    )
    truth = np.where(flooded == walked, flooded, UNSURE)
    truth[segmentation.find_boundaries(flooded, mode="thick")] = UNSURE
    truth[unsure] = UNSURE
    return flooded, walked, truth


def immunohistochemistry():
    """Compartments of the tissue, from polygons."""
    image = data.immunohistochemistry()
    shape = image.shape[:2]
    spec = outlines("ihc")
    drawn = fill(
        shape, spec["outlines"], [(2, "stroma"), (3, "gland"), (1, "background")]
    )
    unsure = fill(shape, spec["outlines"], [(1, "unsure")]) > 0
    lab = filters.gaussian(color.rgb2lab(image), 1.5, channel_axis=-1)
    ways = refine(drawn, list(np.moveaxis(lab / lab.std(), -1, 0)), unsure, 300)
    strokes = brush(shape, spec["strokes"], ("background", "stroma", "gland"))
    save("immunohistochemistry", strokes, drawn, *ways)


def coins():
    """Coins on an unevenly lit ground, from ellipses."""
    ellipses("coins", data.coins(), "coin")


def cell():
    """One floating cell, from an ellipse."""
    ellipses("cell", data.cell(), "cell")


def ellipses(name, image, what):
    """Make a grey sample whose objects are outlined by ellipses."""
    spec = outlines(name)
    drawn = np.ones(image.shape, np.uint8)
    for x, y, rx, ry in spec[name]:
        drawn[draw.ellipse(y, x, ry, rx, image.shape)] = 2
    unsure = fill(image.shape, spec, [(1, "unsure")]) > 0
    grey = filters.gaussian(image.astype(float), 1)
    ways = refine(drawn, [grey / grey.std()], unsure, 100)
    strokes = brush(image.shape, spec["strokes"], ("background", what))
    save(name, strokes, drawn, *ways)


def retina():
    """Vessels of a crop, from polylines with half widths; faint ones are unsure."""
    rows, columns = RETINA
    green = data.retina()[rows, columns, 1].astype(float)
    spec = outlines("retina")
    smooth = filters.gaussian(green, 1)
    drawn, core, beyond = bands(smooth, spec["vessels"])
    for points in spec["ground"]:  # gaps too narrow to be beyond both vessels
        beyond |= polyline(green.shape, points) & ~core
    markers = np.where(core, 2, np.where(beyond, 1, 0))
    flooded = segmentation.watershed(filters.sobel(smooth), markers)
    halved = half_depth(green, core, beyond)
    truth = np.where(flooded == halved, flooded, UNSURE)
    truth[segmentation.find_boundaries(flooded == 2, mode="outer")] = UNSURE
    for points in spec["faint"]:
        truth[grow(snap(smooth, points), 4)] = UNSURE
    # ridges that nobody traced may be vessels too
    ridges = filters.sato(green, sigmas=(1.5, 2.5), black_ridges=True)
    lost = filters.apply_hysteresis_threshold(
        ridges, *np.quantile(ridges, (0.90, 0.96))
    )
    lost = morphology.remove_small_objects(lost & (truth == 1), 40)
    pigment = fill(green.shape, spec, [(1, "pigment")]) > 0
    truth[grow(lost, 2) & (truth == 1) & ~pigment] = UNSURE
    truth[fill(green.shape, spec, [(1, "unsure")]) > 0] = UNSURE
    strokes = brush(green.shape, spec["strokes"], ("background", "vessel"))
    save("retina", strokes, drawn, flooded, halved, truth)


def grow(mask, radius):
    """All pixels within `radius` of a mask."""
    return ndimage.distance_transform_edt(~mask) <= radius


def snap(smooth, points):
    """Find the darkest path along a drawn polyline (live wire), at most 4 px off."""
    line = polyline(smooth.shape, points)
    near = grow(line, 4)
    local = smooth - ndimage.uniform_filter(smooth, 31)
    cost = np.where(near, np.exp(local / 6), np.inf)
    (x0, y0), (x1, y1) = points[0], points[-1]
    path, _ = graph.route_through_array(cost, (y0, x0), (y1, x1), geometric=True)
    snapped = np.zeros(smooth.shape, bool)
    snapped[tuple(np.transpose(path))] = True
    return snapped


def bands(smooth, vessels):
    """Give what is drawn, the sure core of vessels, what is surely beyond them."""
    drawn = np.ones(smooth.shape, np.uint8)
    core = np.zeros(smooth.shape, bool)
    reach = np.zeros(smooth.shape, bool)
    for vessel in vessels:
        for a, b in pairwise(vessel):
            half = (a[2] + b[2]) / 2
            # wide vessels reflect light along their middle: no dark path to snap to
            ends = [a[:2], b[:2]]
            line = snap(smooth, ends) if half <= 3 else polyline(smooth.shape, ends)
            drawn[grow(line, half)] = 2
            core |= grow(line, 0.4 * half if half > 3 else 0.5)
            reach |= grow(line, 1.5 * half + 2)
    return drawn, core, ~reach


def half_depth(green, core, beyond):
    """Vessel where the grey is nearer to the core's local grey than to the ground's."""

    def local(mask):
        weight = ndimage.gaussian_filter(mask.astype(float), 6)
        return ndimage.gaussian_filter(green * mask, 6) / np.maximum(weight, 1e-6)

    middle = (local(core) + local(beyond)) / 2
    inside = (filters.gaussian(green, 0.7) < middle) & ~beyond
    return np.where(ndimage.binary_opening(inside | core), 2, np.where(core, 2, 1))


def save(name, strokes, drawn, flooded, other, truth):
    """Write strokes and truth as PNG of 8 bit, and print how well the ways agree."""
    OUT.mkdir(exist_ok=True)
    io.imsave(OUT / f"{name}_strokes.png", strokes, check_contrast=False)
    io.imsave(OUT / f"{name}_truth.png", truth.astype(np.uint8), check_contrast=False)
    print(
        f"{name}: {(truth > 0).mean():.1%} judged, {(strokes > 0).mean():.1%} painted"
    )
    print("  drawn against refined, IoU by class", iou(drawn, flooded))
    print("  two refinements, IoU by class", iou(flooded, other))


def iou(a, b):
    """IoU of each class of two labellings."""
    return [
        round(float(((a == v) & (b == v)).sum() / ((a == v) | (b == v)).sum()), 4)
        for v in np.unique(a[a > 0])
    ]


if __name__ == "__main__":
    for make in (immunohistochemistry, coins, cell, retina):
        if len(sys.argv) == 1 or make.__name__ in sys.argv:
            make()
