"""The table and the pictures of annotator.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from person import Stroke
from PIL import Image

from napari_unetpp import pictures

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Lines = list[dict[str, Any]]
PARTS = {"seen": "the annotated images", "unseen": "other images"}
WHOLE = "dense-unet++"
# Okabe and Ito's, and whether a line is dashed.
COLOURS = {
    WHOLE: ("#969CA4", None),
    "fcn-8s": ("#E69F00", None),
    "unet": ("#009E73", None),
    "unet++-scratch": ("#56B4E9", None),
    "forest@unet++": ("#D55E00", (3, 2)),
    "forest": ("#D55E00", None),
    "unet++": ("#0072B2", None),
}


def curves(lines: Lines, part: str) -> dict[tuple[str, str], NDArray[np.float64]]:
    """Return IoU over time by task and method, mean over seeds; depths apart."""
    found: dict[tuple[str, str], list[Any]] = {}
    for line in lines:
        values = np.array([row[part] for row in line["rows"]]).T
        for depth, curve in enumerate(values[: None if len(line["rows"]) > 1 else 1]):
            name = line["method"] + (f" L{depth}" if depth else "")
            found.setdefault((line["task"], name), []).append(curve)
    return {key: np.mean(seeds, axis=0) for key, seeds in found.items()}


def times_of(lines: Lines) -> list[float]:
    """Return the times at which something was scored."""
    return next([r["time"] for r in a["rows"]] for a in lines if len(a["rows"]) > 1)


def reached(times: list[float], curve: NDArray[np.float64], bar: float) -> str:
    """Return when a curve first reaches a bar, between two times on a straight line."""
    for i in np.flatnonzero(curve >= bar):
        x, y = (0.0, *times), (0.0, *curve)
        return f"{x[i] + (bar - y[i]) / (y[i + 1] - y[i]) * (x[i + 1] - x[i]):.0f} s"
    return "never"


def print_table(lines: Lines) -> None:
    """Print IoU over time, who is ahead, and the time to 90 % of the bar."""
    for part, words in PARTS.items():
        found = curves(lines, part)
        times = "".join(f"{t:7g}" for t in times_of(lines))
        print(f"\nforeground IoU on {words}, after seconds of annotation")
        print(f"{'':30s}{times}    whole truth, 90 % of it reached after")
        ahead: dict[str, list[NDArray[np.float64]]] = {}
        for (task, method), curve in sorted(found.items()):
            if method.startswith("dense-"):
                continue
            bar = found.get((task, WHOLE), [np.nan])[0]
            cells = "".join(f"{v:7.3f}" for v in curve).ljust(len(times))
            after = reached(times_of(lines), curve, 0.9 * bar)
            print(f"{task:14s}{method:16s}{cells}  {bar:.3f} {after}")
            forest = found.get((task, "forest"))
            if forest is not None and method != "forest":
                ahead.setdefault(method, []).append(curve - forest)
        print("ahead of the forest that is itself corrected: mean, and where >= 0")
        for method, values in ahead.items():
            means = "".join(f"{v:+7.3f}" for v in np.mean(values, axis=0))
            counts = np.sum(np.array(values) >= 0, axis=0)
            print(f"{'':14s}{method:16s}{means}")
            print(f"{'':30s}" + "".join(f"{n}/{len(values)}".rjust(7) for n in counts))


def plot(lines: Lines, path: Path) -> None:
    """Draw a panel per task, for the annotated images and below for the others."""
    os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
    import pyqtgraph as pg
    from pyqtgraph.exporters import ImageExporter

    app = pg.mkQApp()
    pg.setConfigOptions(antialias=True, background="w", foreground=(60, 66, 74))
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    times = times_of(lines)
    high = -(-len(tasks) // 3)
    sheet = pg.GraphicsLayoutWidget(size=(1260, 540 * high + 40))
    methods = [m for m in COLOURS if any(line["method"] == m for line in lines)]
    names = [
        f"<span style='color: {COLOURS[m][0]}'>{'- -' if COLOURS[m][1] else '&mdash;'} "
        f"{m}</span>"
        for m in methods
    ]
    sheet.addLabel("&nbsp; &nbsp;".join(names), 0, 0, 1, 3, size="12pt", bold=True)
    for n, (part, words) in enumerate(PARTS.items()):
        found = curves(lines, part)
        for i, task in enumerate(tasks):
            row = 1 + n * high + i // 3
            panel = sheet.addPlot(row, i % 3, title=f"{task}, {words}")
            panel.showGrid(x=False, y=True, alpha=0.15)
            panel.setLabels(left="foreground IoU", bottom="annotation time (s)")
            for side, ticks in (
                ("bottom", (0, *times)),
                ("left", np.arange(0, 1.1, 0.2)),
            ):
                panel.getAxis(side).setTicks([[(t, f"{t:.2g}") for t in ticks]])
                panel.getAxis(side).setStyle(hideOverlappingLabels=False)
            panel.setRange(xRange=(0, times[-1]), yRange=(0, 1), padding=0.01)
            for method in methods:
                if (task, method) in found:
                    y = np.array([0.0, *found[task, method]])
                    if method == WHOLE:
                        y = np.full(1 + len(times), y[1])
                    colour, dash = COLOURS[method]
                    pen = pg.mkPen(colour, width=2.2, dash=dash)
                    panel.plot([0.0, *times], y, pen=pen)
    sheet.show()  # only then is it laid out
    app.processEvents()
    ImageExporter(sheet.scene()).export(str(path))


def picture(lines: Lines, image_of: Callable[[str], NDArray[Any]], path: Path) -> None:
    """Draw what was painted for UNet++ with the first seed on the first images."""
    chosen = [r for r in lines if r["method"] == "unet++" and r["seed"] == 0]
    whole = Image.new("RGB", (1836, 612 * -(-len(chosen) // 3)), "white")
    for n, line in enumerate(chosen):
        image = image_of(line["task"])
        painted = np.zeros(image.shape[:2], np.uint8)
        for stroke in line["strokes"]:
            if stroke["image"] == 0:
                points = np.array(stroke["points"])
                painted = Stroke(**stroke | {"points": points}).paint(painted)
        shown = pictures.visible(image)
        for k, colour in enumerate(((86, 180, 233), (230, 159, 0), (204, 121, 167))):
            shown[painted == k + 1] = colour
        size = [round(600 * side / max(painted.shape)) for side in painted.shape[::-1]]
        whole.paste(Image.fromarray(shown).resize(size), (n % 3 * 612, n // 3 * 612))
    whole.save(path)
