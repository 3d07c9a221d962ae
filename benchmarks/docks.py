"""The docks in a real napari, driven by mouse and keys: PROTOCOL section 4.

    xvfb-run -a -s "-screen 0 1600x1000x24" python benchmarks/docks.py session
    xvfb-run -a -s "-screen 0 1600x1000x24" python benchmarks/docks.py brush --side 2048
    xvfb-run -a -s "-screen 0 1600x1000x24" python benchmarks/docks.py stops
    xvfb-run -a -s "-screen 0 1600x1000x24" python benchmarks/docks.py closes
    xvfb-run -a -s "-screen 0 1600x1000x24" python benchmarks/docks.py depth
    xvfb-run -a -s "-screen 0 1600x1000x24" python benchmarks/docks.py cycles

`session`: from Train to a prediction that shows 90 % of the painted pixels in their
class, and from the end of a correcting stroke to the screen showing it. `brush`: how
late a brush at 60 Hz is handled, with the training off and on, and its speed beside a
headless one. `stops` and `closes`: how long until all is quiet. `depth`: from a key on
the slider to the screen showing that depth, while it trains and afterwards. `cycles`:
what memory grows by when the dock is opened, trains three steps and is closed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["NAPARI_CONFIG"] = str(Path(tempfile.mkdtemp()) / "settings.yaml")

# What a benchmark paints is nobody's work, and is not to be offered to anybody.
os.environ["NAPARI_UNETPP_RECOVERY"] = tempfile.mkdtemp()

import numpy as np

WINDOW = (1366, 768)


def event_loop(
    seconds: float = 0.0, condition: Any = None, limit: float = 120
) -> float:
    """Process events for a time, or until a condition holds; return the seconds."""
    from qtpy.QtWidgets import QApplication

    began = time.perf_counter()
    while True:
        QApplication.processEvents()
        spent = time.perf_counter() - began
        if condition is None and spent >= seconds:
            return spent
        if condition is not None and condition():
            return spent
        if spent > limit:
            raise TimeoutError
        time.sleep(0.002)


def canvas_point(viewer: Any, layer: Any, place: tuple[float, float]) -> Any:
    """Return where a pixel of a layer is on the canvas."""
    from qtpy.QtCore import QPoint

    world = np.asarray(layer.data_to_world(place))[list(viewer.dims.displayed)]
    view = viewer.window._qt_viewer.canvas.view
    mapped = (view.transform * view.scene.transform).map([world[1], world[0], 0, 1])
    return QPoint(*(round(float(c)) for c in mapped[:2]))


def move(native: Any, point: Any) -> None:
    """Send a mouse move with the left button down."""
    from qtpy.QtCore import QEvent, QPointF, Qt
    from qtpy.QtGui import QMouseEvent
    from qtpy.QtWidgets import QApplication

    event = QMouseEvent(
        QEvent.Type.MouseMove,
        QPointF(point),
        QPointF(native.mapToGlobal(point)),
        Qt.MouseButton.NoButton,
        Qt.MouseButton.LeftButton,
        Qt.KeyboardModifier.NoModifier,
    )
    QApplication.sendEvent(native, event)


def stroke(viewer: Any, layer: Any, *places: tuple[float, float]) -> None:
    """Draw a stroke with the mouse, 20 ms a move."""
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest

    native = viewer.window._qt_viewer.canvas.native
    points = [canvas_point(viewer, layer, p) for p in places]
    QTest.mousePress(native, Qt.MouseButton.LeftButton, pos=points[0])
    for a, b in pairwise(points):
        for part in np.linspace(0, 1, 9)[1:]:
            move(native, a + (b - a) * float(part))
            event_loop(0.02)
    QTest.mouseRelease(native, Qt.MouseButton.LeftButton, pos=points[-1])


def open_dock(sample: str | None, image: Any = None) -> tuple[Any, Any]:
    """Start napari with an image and the dock, ready to train."""
    import napari

    from napari_unetpp._widgets import _worker

    viewer = napari.Viewer()
    viewer.window._qt_window.resize(*WINDOW)
    if sample is not None:
        viewer.open_sample("napari-unetpp", sample)
    else:
        viewer.add_image(image)
    began = time.perf_counter()
    _, dock = viewer.window.add_plugin_dock_widget(
        "napari-unetpp", "Annotate and train"
    )
    opened = time.perf_counter() - began
    assert "torch" not in sys.modules or sample is None
    event_loop(condition=lambda: _worker.busy_with() is None and _worker._warm)
    event_loop(0.3)
    print(json.dumps({"opened_s": round(opened, 3), "size": list(WINDOW)}), flush=True)
    return viewer, dock


def prediction_of(viewer: Any) -> Any:
    """Return our prediction layer, None before there is one."""
    return next((v for v in viewer.layers if v.name.startswith("prediction")), None)


def three_strokes(sample: Any) -> Any:
    """Return the three largest strokes of each class of a sample, and nothing else."""
    from scipy import ndimage

    marks = np.zeros_like(sample.strokes)
    for value in range(1, len(sample.classes) + 1):
        parts, _ = ndimage.label(sample.strokes == value, np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        for part in np.argsort(-sizes)[:3]:
            marks[parts == part + 1] = value
    return marks


def wrong_place(shown: Any, truth: Any, rng: Any) -> tuple[int, int] | None:
    """Return a pixel well inside a wrongly predicted region, None if there is none."""
    from scipy import ndimage

    parts, n = ndimage.label((shown != truth) & (truth > 0))
    depth = ndimage.distance_transform_edt(parts > 0)
    deepest = ndimage.maximum(depth, parts, range(1, n + 1)) if n else []
    good = [i + 1 for i, d in enumerate(deepest) if d >= 5]
    if not good:
        return None
    inside = np.where(parts == rng.choice(good), depth, 0)
    return tuple(int(v) for v in np.unravel_index(inside.argmax(), inside.shape))


def session(network: str, rounds: int) -> None:
    """Measure the first prediction and the answer to corrections, on four samples."""
    from napari_unetpp import samples

    viewer, dock = open_dock("coins")
    rows: dict[str, Any] = {}
    for name in ("coins", "cell", "immunohistochemistry", "retina"):
        viewer.layers.clear()
        sample = samples.load(name)
        viewer.add_image(sample.image, rgb=sample.channel_axis == -1, name=name)
        dock.classes.set_names(sample.classes)
        dock._on_classes()
        dock._new_annotation(0)
        marks = dock.pairs.pairs()[0].annotation
        marks.data[:] = three_strokes(sample)
        marks.refresh()
        dock.network_box.setCurrentText(network)
        event_loop(0.2)
        viewer.reset_view()
        event_loop(0.5)
        rows[name] = {"first": [], "painted_90": [], "correction": []}
        for seed in range(rounds):
            _first(viewer, dock, marks, seed, rows[name])
            event_loop(8)
            _correct(viewer, dock, marks, sample.truth, seed, rows[name])
            dock.link._training = False
            dock.link.stop()
            event_loop(condition=lambda: dock.link.state == "idle")
            dock.start_over()
            viewer.layers.remove(prediction_of(viewer))
        print(name, json.dumps(rows[name]), flush=True)
    every = {
        key: [v for row in rows.values() for v in row[key]] for key in rows["coins"]
    }
    medians = {k: round(float(np.median(v)), 2) for k, v in every.items() if v}
    print(json.dumps({"network": network, "medians_s": medians}))
    viewer.close()


def _first(viewer: Any, dock: Any, marks: Any, seed: int, row: dict[str, Any]) -> None:
    painted = marks.data > 0
    dock.advanced._seed.setValue(seed)
    dock.train()
    began = time.perf_counter()

    def good() -> bool:
        shown = prediction_of(viewer).data[painted]
        return bool((shown == marks.data[painted]).mean() >= 0.9)

    event_loop(condition=lambda: bool(prediction_of(viewer) is not None))
    row["first"].append(round(time.perf_counter() - began, 2))
    with suppress(TimeoutError):  # counted as the limit
        event_loop(condition=good, limit=30)
    row["painted_90"].append(round(time.perf_counter() - began, 2))


def _correct(
    viewer: Any, dock: Any, marks: Any, truth: Any, seed: int, row: dict[str, Any]
) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(2):
        place = wrong_place(prediction_of(viewer).data, truth, rng)
        if place is None:
            return
        dock.pick(int(truth[place]))
        marks.brush_size = 5
        before = marks.data.copy()
        stroke(viewer, marks, (place[0], place[1] - 3), (place[0], place[1] + 3))
        ended = time.perf_counter()
        new = marks.data != before
        if not new.any():
            continue  # beside the canvas
        value = marks.selected_label

        def corrected(new: Any = new, value: int = value) -> bool:
            return bool((prediction_of(viewer).data[new] == value).mean() >= 0.9)

        with suppress(TimeoutError):
            event_loop(condition=corrected, limit=30)
        row["correction"].append(round(time.perf_counter() - ended, 2))
        event_loop(2)


def brush(network: str, side: int, events: int) -> None:
    """Measure the latency of a brush with the training off and on."""
    from skimage.data import immunohistochemistry

    tile = np.asarray(immunohistochemistry()[..., 1])
    image = np.tile(tile, (side // 512, side // 512))
    viewer, dock = open_dock(None, image)
    dock.network_box.setCurrentText(network)
    dock._new_annotation(0)
    marks = dock.pairs.pairs()[0].annotation
    marks.data[20:40, 20 : side // 4] = 1
    marks.data[60:80, 20 : side // 4] = 2
    marks.refresh()
    viewer.reset_view()
    event_loop(1)
    start = marks.data.copy()
    paint(viewer, marks, 240)  # the first strokes wait for OpenGL to compile
    rows: dict[str, Any] = {}
    for state in ("off", "on", "off again"):
        marks.data[:] = start  # the same strokes change the same pixels every time
        marks.refresh()
        if state == "on":
            dock.train()
            event_loop(condition=lambda: prediction_of(viewer) is not None)
            event_loop(6)
            looking = _speed(dock, lambda: event_loop(10))
            speed = _speed(dock, lambda: rows.update(late=paint(viewer, marks, events)))
            late, lost = rows.pop("late")
        else:
            event_loop(1)
            late, lost = paint(viewer, marks, events)
        if state == "on":
            dock.link._runner.stop()
            dock.link._training = False  # do not label the rest now
            event_loop(condition=lambda: dock.link.state == "idle")
        rows[state] = {
            "p50_ms": round(float(np.percentile(late, 50)), 1),
            "p95_ms": round(float(np.percentile(late, 95)), 1),
            "p99_ms": round(float(np.percentile(late, 99)), 1),
            "worst_ms": round(float(np.max(late)), 1),
            "points_lost": lost,
        }
        print(state, json.dumps(rows[state]), flush=True)
    print(
        json.dumps(
            {
                "network": network,
                "side": side,
                "events": events,
                "steps_per_s_while_painting": round(speed, 2),
                "steps_per_s_while_looking": round(looking, 2),
                "steps_per_s_headless": round(headless(network, image, marks), 2),
                **rows,
            }
        )
    )
    viewer.close()


def _speed(dock: Any, work: Any) -> float:
    """Return the steps per second while some work is done."""
    first, began = dock.link.steps, time.perf_counter()
    work()
    return float(dock.link.steps - first) / (time.perf_counter() - began)


def paint(viewer: Any, marks: Any, events: int) -> tuple[list[float], int]:
    """Drag a brush at 60 Hz; return how late each event is handled, in ms.

    An event counts as handled when napari has processed it and the events before it;
    the label must be in the array then, else the point counts as lost.
    """
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest

    native = viewer.window._qt_viewer.canvas.native
    viewer.layers.selection.active = marks
    marks.mode, marks.selected_label, marks.brush_size = "paint", 2, 12
    side = marks.data.shape[0]
    rng = np.random.default_rng(1)
    late, lost, sent = [], 0, 0
    per_stroke = 60
    while sent < events:
        start = rng.uniform(0.3, 0.7, 2) * side
        angle = rng.uniform(0, 2 * np.pi)
        step = side / 300
        points = [
            start + step * n * np.array([np.sin(angle), np.cos(angle)])
            for n in range(per_stroke)
        ]
        places = [canvas_point(viewer, marks, tuple(p)) for p in points]
        QTest.mousePress(native, Qt.MouseButton.LeftButton, pos=places[0])
        clock = time.perf_counter()
        for n, (place, point) in enumerate(zip(places, points, strict=True)):
            due = clock + n / 60
            while time.perf_counter() < due:
                event_loop(0)
                time.sleep(0.001)  # a real event loop waits, too, and lets go
            move(native, place)
            event_loop(0)
            late.append(1e3 * (time.perf_counter() - due))
            lost += int(marks.data[int(point[0]), int(point[1])] != 2)
            sent += 1
        QTest.mouseRelease(native, Qt.MouseButton.LeftButton, pos=places[-1])
        event_loop(0.05)
    return late, lost


def headless(network: str, image: Any, marks: Any) -> float:
    """Return the steps per second of `train_steps` with the dock's threads."""
    import torch

    from napari_unetpp import api

    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    names = {"UNet++": "unet++", "U-Net": "unet", "FCN": "fcn-8s"}
    began, n = None, 0
    for _ in api.train_steps(
        image,
        np.asarray(marks.data),
        network=names[network],
        classes=("background", "foreground"),
        max_seconds=25,
    ):
        n += 1
        if n == 10:
            began = time.perf_counter()
    assert began is not None
    return (n - 10) / (time.perf_counter() - began)


def stops(rounds: int) -> None:
    """Measure how long Stop takes at random moments."""
    viewer, dock = open_dock("coins")
    rng = np.random.default_rng(0)
    took = []
    for n in range(rounds):
        dock.network_box.setCurrentText(("UNet++", "U-Net", "FCN")[n % 3])
        dock.train()
        event_loop(float(rng.uniform(0, 2.5)))
        began = time.perf_counter()
        dock.link.stop()
        event_loop(condition=lambda: dock.link.state != "stopping")
        took.append(time.perf_counter() - began)
        dock.link.stop()  # the labelling that follows
        event_loop(condition=lambda: dock.link.state == "idle")
        dock.start_over()
    print(
        json.dumps(
            {
                "stops": rounds,
                "p50_s": round(float(np.percentile(took, 50)), 3),
                "p95_s": round(float(np.percentile(took, 95)), 3),
                "worst_s": round(float(np.max(took)), 3),
            }
        )
    )
    viewer.close()


def depth(rounds: int) -> None:
    """Measure how long the screen takes to show another depth."""
    viewer, dock = open_dock("coins")
    _note_depths()
    for sample in ("coins", "immunohistochemistry"):
        if sample != "coins":
            viewer.layers.clear()
            viewer.open_sample("napari-unetpp", sample)
            dock.start_over()
        viewer.reset_view()
        dock.train()
        event_loop(condition=lambda: dock.link.steps >= 60, limit=300)
        rows = {"training": _moves(dock, rounds)}
        dock.pause()
        event_loop(3)
        rows["paused"] = _moves(dock, rounds)
        print(json.dumps({"sample": sample, "moves": rounds, **rows}), flush=True)
        dock.link._training = False
        dock.link.stop()
        event_loop(condition=lambda: dock.link.state == "idle")
    viewer.close()


def _note_depths() -> None:
    """Let every Coverage tell of which depth it speaks."""
    from napari_unetpp.live.preview import Preview

    coverage = Preview.coverage

    def with_depth(self: Any, view: Any) -> Any:
        found = coverage(self, view)
        object.__setattr__(found, "depth", self.depth)
        return found

    Preview.coverage = with_depth  # type: ignore[method-assign]


def _moves(dock: Any, rounds: int) -> dict[str, float]:
    from qtpy.QtCore import Qt
    from qtpy.QtTest import QTest

    from napari_unetpp.messages import Coverage

    seen: list[int] = []

    def note(message: Any) -> None:
        if isinstance(message, Coverage) and message.view_done:
            seen.append(message.depth)  # type: ignore[attr-defined]

    dock.link.message.connect(note)
    took = []
    keys = [Qt.Key.Key_Left] * 3 + [Qt.Key.Key_Right] * 3
    for n in range(rounds):
        QTest.keyClick(dock.depths._slider, keys[n % 6])
        began = time.perf_counter()
        seen.clear()
        wanted = dock.depths.depth()
        event_loop(condition=lambda wanted=wanted: wanted in seen)
        event_loop(0)  # painted
        took.append(time.perf_counter() - began)
        event_loop(1.5)
    dock.link.message.disconnect(note)
    return {
        "p50_s": round(float(np.median(took)), 3),
        "worst_s": round(float(np.max(took)), 3),
    }


def cycles(rounds: int) -> None:
    """Measure the memory after the dock was opened, trained and closed many times."""
    import gc

    import psutil
    from qtpy.QtCore import QEvent
    from qtpy.QtWidgets import QApplication

    from napari_unetpp._widgets import _worker

    viewer, dock = open_dock("coins")
    process, rows = psutil.Process(), []
    for n in range(rounds + 3):
        dock.train()
        link = dock.link
        event_loop(condition=lambda link=link: link.steps >= 3)
        del link
        viewer.window.remove_dock_widget(dock)
        event_loop(condition=lambda: _worker.busy_with() is None)
        dock = None
        event_loop(0.2)
        gc.collect()
        # What Qt deletes later it deletes in a running event loop only.
        QApplication.sendPostedEvents(None, QEvent.Type.DeferredDelete)
        rows.append(process.memory_info().rss / 1e6)
        if n < rounds + 2:
            dock = viewer.window.add_plugin_dock_widget(
                "napari-unetpp", "Annotate and train"
            )[1]
            event_loop(0.2)
    rows = rows[3:]  # the first three fill what is kept for ever
    early, late = np.median(rows[:5]), np.median(rows[-5:])  # single ones waver
    print(
        json.dumps(
            {
                "cycles": rounds,
                "grown_mb": round(float(late - early), 1),
                "last_less_first_mb": round(rows[-1] - rows[0], 1),
                "rss_mb": [round(r) for r in rows],
                "widgets": len(QApplication.allWidgets()),
            }
        )
    )
    viewer.close()


_CLOSE = """
import sys, time
sys.path.insert(0, {folder!r})
import docks, napari
from qtpy.QtCore import QTimer
viewer, dock = docks.open_dock("coins")
dock.network_box.setCurrentText({network!r})
dock.train()
def close():
    print("closing", time.time(), flush=True)
    viewer.window._qt_window.close(quit_app=True, confirm_need=False)
QTimer.singleShot({delay}, close)
napari.run()
"""


def closes(rounds: int) -> None:
    """Measure how long the process lives after its window is closed while it trains."""
    rng = np.random.default_rng(0)
    took, codes = [], []
    for n in range(rounds):
        code = _CLOSE.format(
            folder=str(Path(__file__).parent),
            network=("UNet++", "U-Net", "FCN")[n % 3],
            delay=int(rng.uniform(0, 3000)),
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
        )
        lines = [row for row in done.stdout.splitlines() if row.startswith("closing")]
        took.append(time.time() - float(lines[-1].split()[1]) if lines else np.nan)
        codes.append(done.returncode)
        if done.returncode or not lines:
            print(done.stderr[-2000:], flush=True)
    print(
        json.dumps(
            {
                "closes": rounds,
                "worst_s": round(float(np.max(took)), 2),
                "exit_codes": sorted(set(codes)),
            }
        )
    )


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modes = ["session", "brush", "stops", "closes", "depth", "cycles"]
    parser.add_argument("what", choices=modes)
    parser.add_argument(
        "--network", default="UNet++", choices=["UNet++", "U-Net", "FCN"]
    )
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--events", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=0)
    args = parser.parse_args()
    if args.what == "session":
        session(args.network, args.rounds or 3)
    elif args.what == "brush":
        brush(args.network, args.side, args.events)
    elif args.what == "stops":
        stops(args.rounds or 100)
    elif args.what == "depth":
        depth(args.rounds or 12)
    elif args.what == "cycles":
        cycles(args.rounds or 20)
    else:
        closes(args.rounds or 30)


if __name__ == "__main__":
    main()
