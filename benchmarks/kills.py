"""Painting in a real napari that is killed at random moments, and what is lost.

    xvfb-run -a python benchmarks/kills.py --kills 200 --side 16384
    xvfb-run -a python benchmarks/kills.py --stall --side 16384

The clock is scaled: saved every 1.5 s instead of 15 s. A painter says of each stroke
when it ended; after the kill, the recovery file must have every stroke that is older
than a period and the time that a save takes, and each label must be the painted one.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PERIOD = 1.5  # s
SLACK = 1.0  # s for a save on a busy machine


def place(n: int, side: int) -> tuple[int, int]:
    """Return where stroke n is, and never another."""
    across = side // 16 - 1
    return 16 * (n // across % across) + 8, 16 * (n % across) + 8


def open_dock(side: int) -> tuple[Any, Any]:
    """Open napari with the dock and an empty annotation."""
    os.environ["NAPARI_CONFIG"] = str(Path(tempfile.mkdtemp()) / "settings.yaml")
    import napari
    from napari.layers import Image

    from napari_unetpp._widgets import recovery, train_dock

    recovery.PERIOD = int(1000 * PERIOD)
    train_dock.get_ready = lambda *_: None  # no torch is needed to paint
    viewer = napari.Viewer(show=False)
    viewer.add_layer(Image(np.zeros((side, side), np.uint8), name="cell"))
    dock = train_dock.TrainDock(viewer)
    viewer.window.add_dock_widget(dock)
    dock.pairs.want_annotations()
    return dock, dock.pairs.pairs()[0].annotation


def paint(side: int) -> None:
    """Paint a stroke every 20 ms until killed; say each with its time."""
    from qtpy.QtWidgets import QApplication

    _, layer = open_dock(side)
    n = 0
    while True:
        layer.paint(place(n, side), n % 2 + 1)
        print(n, time.time(), flush=True)
        n += 1
        end = time.monotonic() + 0.02
        while time.monotonic() < end:
            QApplication.processEvents()
            time.sleep(0.001)


def kill_once(side: int, seconds: float) -> tuple[int, int, int]:
    """Return torn files, lost strokes older than a period, and strokes painted."""
    from napari_unetpp.errors import RecoveryFileError
    from napari_unetpp.recovery import FOLDER, Store, read

    folder = Path(tempfile.mkdtemp())
    painter = subprocess.Popen(
        [sys.executable, __file__, "--paint", "--side", str(side)],
        env=os.environ | {FOLDER: str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert painter.stdout is not None
    lines = [painter.stdout.readline()]
    time.sleep(seconds)
    painter.send_signal(signal.SIGKILL)
    killed = time.time()
    lines += painter.stdout.readlines()
    painter.wait()
    strokes = [line.split() for line in lines if line.endswith("\n")]
    offers, bad = Store(folder).offers()
    torn = len(bad)
    labels = np.zeros((side, side), np.uint8)
    try:
        if offers:
            labels = read(offers[0].path)[1]
    except RecoveryFileError:
        torn += 1
    ages = [
        killed - float(when)
        for n, when in strokes
        if labels[place(int(n), side)] != int(n) % 2 + 1
    ]
    print(f"oldest stroke lost: {max(ages, default=0):.2f} s", flush=True)
    return torn, sum(age > PERIOD + SLACK for age in ages), len(strokes)


def stall(side: int) -> None:
    """Print how late a timer of 5 ms is while annotations are saved, and without."""
    from qtpy.QtWidgets import QApplication

    dock, layer = open_dock(side)
    autosave = dock.unsaved.autosave
    autosave._timer.stop()
    for n in range(500):
        layer.data[place(n, side)] = n % 2 + 1
    for saving in (False, True):
        late, calls = [], []
        for n in range(400):
            began = time.perf_counter()
            if saving and n % 20 == 0:
                layer.data[place(500 + n, side)] = 1
                autosave._kept[0].dirty = True
                autosave.save()
                calls.append(time.perf_counter() - began)
            QApplication.processEvents()
            time.sleep(0.005)
            late.append(time.perf_counter() - began - 0.005)
        text = ", ".join(f"{1000 * np.percentile(late, p):.1f}" for p in (50, 95, 100))
        print(f"saving {saving}: late by p50, p95, max {text} ms")
    print(f"the call itself: max {1000 * max(calls):.2f} ms")
    began = time.perf_counter()
    autosave._kept[0].dirty = True
    layer.data[-1, -1] = 1
    autosave.flush()
    print(f"a whole save: {time.perf_counter() - began:.2f} s")


def main() -> None:
    """Kill as often as asked, or as time allows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--side", type=int, default=16384)
    parser.add_argument("--limit", type=float, default=1e9, help="seconds in all")
    parser.add_argument("--paint", action="store_true")
    parser.add_argument("--stall", action="store_true")
    options = parser.parse_args()
    if options.paint:
        paint(options.side)
    if options.stall:
        stall(options.side)
        return
    rng, began, found = random.Random(0), time.monotonic(), []
    while len(found) < options.kills and time.monotonic() - began < options.limit:
        found.append(kill_once(options.side, rng.uniform(3, 6)))
    torn, lost, strokes = map(sum, zip(*found, strict=True))
    print(f"kills {len(found)}, torn files {torn}, lost beyond a period {lost}", end="")
    print(f", strokes {strokes}")


if __name__ == "__main__":
    main()
