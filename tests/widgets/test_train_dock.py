"""The dock in a real viewer: painted with a mouse, trained for real, broken."""

from __future__ import annotations

import gc
import threading
import time
from typing import TYPE_CHECKING, Any

import dask.array
import numpy as np
import pytest
import torch
import zarr
from napari.layers import Image, Labels
from qtpy.QtCore import QEvent, QPoint, QPointF, Qt
from qtpy.QtGui import QGuiApplication, QMouseEvent
from qtpy.QtWidgets import QApplication

from napari_unetpp import api
from napari_unetpp._widgets import _layers, _worker, offer
from napari_unetpp._widgets.train_dock import TrainDock
from napari_unetpp.errors import TrainingError
from napari_unetpp.messages import Prediction, Progress, Snapshot, Started

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path


def picture(size: int = 64) -> np.ndarray:
    """Return a bright disc on noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    inside = np.hypot(y - size / 2, x - size / 2) < size / 4
    return (100 * inside + 20 * rng.random((size, size))).astype(np.uint8)


def strokes(size: int = 64) -> np.ndarray:
    marks = np.zeros((size, size), np.uint8)
    marks[3:6, 4:40] = 1
    marks[size // 2 - 2 : size // 2 + 2, size // 2 - 8 : size // 2 + 8] = 2
    return marks


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What napari would show as notifications."""
    texts: list[str] = []
    for name in ("show_error", "show_info"):
        monkeypatch.setattr(f"napari_unetpp._widgets.train_dock.{name}", texts.append)
    monkeypatch.setattr("napari_unetpp._widgets.model_files.show_info", texts.append)
    return texts


@pytest.fixture
def open_dock(
    make_napari_viewer: Any,
    told: list[str],  # noqa: ARG001  # no notification in any test
) -> Callable[..., TrainDock]:
    """Open the dock in a new viewer with the given layers."""

    def make(*layers: Any, network: str = "U-Net", size: str = "small") -> TrainDock:
        viewer = make_napari_viewer()
        for layer in layers:
            viewer.add_layer(layer)
        dock = TrainDock(viewer)
        viewer.window.add_dock_widget(dock, name="dock")
        if dock.pairs.undecided():  # as a user picks what is painted already
            (marks,) = [layer for layer in layers if isinstance(layer, Labels)]
            dock.pairs.set_annotation(0, marks)
        dock.network_box.setCurrentText(network)
        dock.size_box.setCurrentText(size)
        dock.advanced._patch.setValue(32)
        dock.advanced._device.setCurrentText("CPU")
        QApplication.processEvents()
        return dock

    return make


def predictions(dock: TrainDock) -> list[Labels]:
    return [
        layer
        for layer in dock.viewer.layers
        if (layer.metadata.get(_layers.OURS) or {}).get("kind") == "prediction"
    ]


def click(qtbot: Any, button: Any) -> None:
    assert button.isEnabled()
    qtbot.mouseClick(button, Qt.MouseButton.LeftButton)


def is_shown(dock: TrainDock) -> bool:
    found = predictions(dock)
    return bool(found) and bool((found[0].data > 0).all())


# --- a session ------------------------------------------------------------------------


def canvas_pos(viewer: Any, layer: Any, place: tuple[float, float]) -> QPoint:
    world = np.asarray(layer.data_to_world(place))[list(viewer.dims.displayed)]
    view = viewer.window._qt_viewer.canvas.view
    mapped = (view.transform * view.scene.transform).map([world[1], world[0], 0, 1])
    return QPoint(*(round(float(c)) for c in mapped[:2]))


def drag(qtbot: Any, viewer: Any, layer: Any, *places: tuple[float, float]) -> None:
    native = viewer.window._qt_viewer.canvas.native
    points = [canvas_pos(viewer, layer, p) for p in places]
    qtbot.mouseMove(native, points[0])
    qtbot.mousePress(native, Qt.MouseButton.LeftButton, pos=points[0])
    for point in points[1:]:
        event = QMouseEvent(
            QEvent.Type.MouseMove,
            QPointF(point),
            QPointF(native.mapToGlobal(point)),
            Qt.MouseButton.NoButton,
            Qt.MouseButton.LeftButton,
            Qt.KeyboardModifier.NoModifier,
        )
        QApplication.sendEvent(native, event)
    qtbot.mouseRelease(native, Qt.MouseButton.LeftButton, pos=points[-1])


def test_a_first_session_with_the_mouse(qtbot: Any, wait: Any, open_dock: Any) -> None:
    dock = open_dock(Image(picture(), name="cells"))
    viewer = dock.viewer
    assert dock.coach.text().startswith("Paint a stroke of background")
    click(qtbot, dock.pairs._rows[0].new)
    annotation = viewer.layers["annotation of cells"]
    assert annotation.data.shape == (64, 64)
    assert (annotation.mode, annotation.selected_label) == ("paint", 1)
    assert viewer.layers.selection.active == annotation
    drag(qtbot, viewer, annotation, (4, 4), (4, 20), (4, 40))
    wait(lambda: dock.coach.text() == "Paint some foreground.")
    dock.classes.picked.emit(2)
    drag(qtbot, viewer, annotation, (32, 24), (32, 40))
    wait(lambda: dock.coach.text().startswith("Press Train"))
    assert set(np.unique(annotation.data)) == {0, 1, 2}
    painted = annotation.data.copy()
    click(qtbot, dock.train_button)
    wait(lambda: is_shown(dock))
    assert dock.link.state == "training"
    assert viewer.layers.selection.active == annotation  # the brush is where it was
    names = [layer.name for layer in viewer.layers]
    assert names == ["cells", "prediction of cells", "annotation of cells"]
    wait(lambda: dock.status.text().startswith("Step 1"))
    click(qtbot, dock.stop_button)
    wait(lambda: dock.link.state == "idle")
    np.testing.assert_array_equal(annotation.data, painted)
    expected = api.predict(dock.link.model, picture(), device="cpu")
    np.testing.assert_array_equal(predictions(dock)[0].data, expected)
    assert dock.status.text().startswith("Model: ")
    assert offer.newest.model is not None  # for the other dock
    assert dock.link.model.classes == ("background", "foreground")


def test_every_way_of_painting_counts(wait: Any, open_dock: Any) -> None:
    dock = open_dock(Image(picture()), Labels(strokes(), name="marks"))
    layer = dock.viewer.layers["marks"]

    def pixels() -> list[int]:
        return dock.link.counts()[0]

    wait(lambda: pixels() == [108, 64])
    layer.brush_size = 1
    layer.paint((60, 60), 2)
    wait(lambda: pixels() == [108, 65])
    layer.undo()
    wait(lambda: pixels() == [108, 64])
    layer.redo()
    wait(lambda: pixels() == [108, 65])
    layer.data[50:52, 50:52] = 1
    layer.refresh()
    wait(lambda: pixels() == [112, 65])
    layer.fill((4, 4), 2)
    wait(lambda: pixels() == [4, 65 + 108])
    layer.data = strokes()
    wait(lambda: pixels() == [108, 64])
    layer.data_setitem((np.array([0]), np.array([0])), 2)
    wait(lambda: dock.link.counts() == ([108, 65], [1, 2]))


def test_strokes_painted_while_it_trains_are_learned(wait: Any, open_dock: Any) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    dock.train()
    wait(lambda: is_shown(dock))
    seen = dock.link._mailbox.latest().strokes[0][0]
    dock.viewer.layers[-1].paint((60, 60), 2)
    wait(lambda: dock.link._mailbox.latest().strokes[0][0] is not seen)
    assert (dock.link._mailbox.latest().strokes[0][0] == 2).sum() > 64
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")


def test_what_was_painted_just_before_train_is_shown_and_named(
    wait: Any, open_dock: Any
) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    wait(lambda: dock.classes._pixels == [108, 64])
    layer = dock.viewer.layers[-1]
    layer.data_setitem((np.array([0]), np.array([0])), 3)
    time.sleep(_layers._QUIET + 0.05)  # no event of Qt: Train sees the change first
    dock.train()
    assert dock.classes._pixels == [108, 64, 1]
    wait(lambda: dock.link.steps > 0)
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")
    assert len(dock.link.model.classes) == 3


def test_painting_the_next_label_makes_a_class(wait: Any, open_dock: Any) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    dock.viewer.layers[-1].paint((60, 60), 3)
    wait(lambda: len(dock.classes.names()) == 3)
    dock.train()
    wait(lambda: is_shown(dock))
    dock.viewer.layers["Labels"].paint((60, 10), 4)
    wait(lambda: len(dock.classes.names()) == 4)
    wait(lambda: len(dock.link.model.classes) == 4)
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")
    assert len(dock.link.model.classes) == 4


def test_pause_keeps_the_training_and_stop_keeps_the_model(
    qtbot: Any, wait: Any, open_dock: Any
) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    click(qtbot, dock.train_button)
    wait(lambda: is_shown(dock))
    click(qtbot, dock.pause_button)
    assert dock.link.state == "paused"
    wait(lambda: dock.link._runner.busy)
    qtbot.wait(400)
    steps = dock.link.steps
    qtbot.wait(400)
    assert dock.link.steps == steps
    assert dock.pause_button.text() == "Resume"
    click(qtbot, dock.pause_button)
    wait(lambda: dock.link.steps > steps)
    click(qtbot, dock.stop_button)
    wait(lambda: dock.link.state == "idle")
    first = dock.link.model
    assert dock.train_button.text() == "Go on"
    click(qtbot, dock.train_button)
    wait(lambda: dock.link.state == "training" and dock.link.model is not first)
    click(qtbot, dock.stop_button)
    wait(lambda: dock.link.state == "idle")
    click(qtbot, dock.over_button)
    assert dock.link.model is None
    assert dock.train_button.text() == "Train"
    assert dock.network_box.isEnabled()


def test_the_slider_shows_another_depth_without_training(
    wait: Any, open_dock: Any
) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()), network="UNet++")
    assert dock.depths.depth() == 4
    dock.train()
    wait(lambda: dock.link.model is not None and is_shown(dock))
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")
    steps = dock.link.steps
    for depth in (1, 3):
        dock.depths._slider.setValue(depth - 1)
        assert dock.depths.depth() == depth
        expected = api.predict(dock.link.model, picture(), depth=depth, device="cpu")
        wait(lambda: dock.link.state == "idle")
        np.testing.assert_array_equal(predictions(dock)[0].data, expected)
    dock.depths._mean.setChecked(True)
    wait(lambda: dock.link.state == "idle")
    expected = api.predict(
        dock.link.model, picture(), depth=3, heads="mean", device="cpu"
    )
    np.testing.assert_array_equal(predictions(dock)[0].data, expected)
    assert dock.link.steps == steps
    costs = [dock.depths._table.item(row, 1).text() for row in range(4)]
    assert all(c[0].isdigit() for c in costs)


def test_accepting_a_region_is_one_undoable_step_and_keeps_strokes(
    wait: Any, open_dock: Any, told: list[str]
) -> None:
    dock = open_dock(Image(picture()), Labels(strokes(), name="marks"))
    dock.accept()
    assert "no prediction" in told[-1]
    dock.train()
    wait(lambda: is_shown(dock))
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")
    marks = dock.viewer.layers["marks"]
    shown = predictions(dock)[0]
    shown.data[:] = 1
    shown.data[20:30, 20:30] = 2
    shown.data[50:55, 50:55] = 2
    before = marks.data.copy()
    dock.viewer.cursor.position = (25, 25)
    dock.accept()
    assert (marks.data[20:30, 20:30] == 2).all()
    assert (marks.data[50:55, 50:55] == 0).all()
    assert (marks.data[before > 0] == before[before > 0]).all()
    marks.undo()
    np.testing.assert_array_equal(marks.data, before)
    dock.accept(whole_class=True)
    assert (marks.data[50:55, 50:55] == 2).all()
    marks.undo()
    np.testing.assert_array_equal(marks.data, before)
    assert "Ctrl+Z" in told[-1]


def test_keys_pick_classes_and_are_given_back(
    qtbot: Any, wait: Any, open_dock: Any
) -> None:
    dock = open_dock(Image(picture()), Labels(strokes(), name="marks"))
    viewer, marks = dock.viewer, dock.viewer.layers["marks"]
    native = viewer.window._qt_viewer.canvas.native
    qtbot.keyClick(native, Qt.Key.Key_2, Qt.KeyboardModifier.AltModifier)
    assert (marks.selected_label, marks.mode) == (2, "paint")
    qtbot.keyClick(native, Qt.Key.Key_1, Qt.KeyboardModifier.AltModifier)
    assert marks.selected_label == 1
    qtbot.keyClick(native, Qt.Key.Key_T, Qt.KeyboardModifier.AltModifier)
    assert dock.link.state == "training"
    wait(lambda: is_shown(dock))
    qtbot.keyClick(native, Qt.Key.Key_Q)
    assert not predictions(dock)[0].visible
    qtbot.keyClick(native, Qt.Key.Key_Q)
    assert predictions(dock)[0].visible
    qtbot.keyClick(native, Qt.Key.Key_T, Qt.KeyboardModifier.AltModifier)
    assert dock.link.state == "paused"
    bound = {str(key) for key in viewer.keymap}
    assert len(bound) >= 13
    dock.shut_down()
    left = {str(key) for key, action in viewer.keymap.items() if action is not None}
    assert not left & bound


def test_no_key_is_one_of_napari_or_of_its_labels_layer() -> None:
    from napari.utils.shortcuts import default_shortcuts

    from napari_unetpp._widgets.keys import KEYS

    taken = {
        str(key).replace("+", "-").lower()
        for name, keys in default_shortcuts.items()
        if not any(kind in name for kind in ("points", "shapes", "slice", "vertex"))
        for key in keys
    }
    assert not taken & {key.lower() for key in KEYS}


# --- files ---------------------------------------------------------------------------


def test_a_model_is_saved_while_it_trains_and_loaded_again(
    wait: Any,
    open_dock: Any,
    told: list[str],
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    dock.train()
    wait(lambda: is_shown(dock))
    assert dock.save_button.isEnabled()
    path = str(tmp_path / "cells")
    threads: list[threading.Thread] = []
    save = api.Model.save

    def noted(self: Any, *arguments: Any, **options: Any) -> None:
        threads.append(threading.current_thread())
        save(self, *arguments, **options)

    monkeypatch.setattr(api.Model, "save", noted)
    dock.files.write(dock.link.model, path)
    wait(lambda: bool(told) and "Saved cells.safetensors" in told[-1])
    assert threads[0] is not threading.main_thread()  # the window goes on
    assert dock.link.state == "training"
    assert offer.newest.path == tmp_path / "cells.safetensors"
    dock.files.write(dock.link.model, path)  # the dialog asked about another name
    wait(lambda: "exists" in dock.coach.text())
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")
    dock.start_over()
    dock.files.read(path + ".safetensors")
    wait(lambda: dock.link.model is not None)
    wait(lambda: dock.link.state == "idle" and not dock.files._runner.busy)
    expected = api.predict(dock.link.model, picture(), device="cpu")
    np.testing.assert_array_equal(predictions(dock)[0].data, expected)
    (tmp_path / "bad.safetensors").write_bytes(b"no model")
    dock.files.read(str(tmp_path / "bad.safetensors"))
    wait(lambda: "bad.safetensors" in dock.coach.text())
    assert dock.link.model is not None


def test_a_kept_depth_is_the_smaller_network(
    wait: Any, open_dock: Any, tmp_path: Any
) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()), network="UNet++")
    dock.link.model = api.create_model("unet++", width=8)
    path = str(tmp_path / "l2.safetensors")
    dock.files.save = lambda model: dock.files.write(model, path)
    dock.depths.keep.emit(2)
    wait(lambda: (tmp_path / "l2.safetensors").exists())
    wait(lambda: not dock.files._runner.busy)
    small = api.load_model(path)
    assert small.config.levels == 2
    np.testing.assert_array_equal(
        api.predict(small, picture(), device="cpu"),
        api.predict(dock.link.model, picture(), depth=2, device="cpu"),
    )


def test_the_script_on_the_clipboard_trains_the_same(
    wait: Any, open_dock: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dock = open_dock(Image(picture(), name="it's"), Labels(strokes()))
    dock.train()
    wait(lambda: is_shown(dock) and dock.link.steps > 10)
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")
    dock.copy_script()
    wait(lambda: "api.train" in QGuiApplication.clipboard().text())
    wait(lambda: not dock.files._runner.busy)
    text = QGuiApplication.clipboard().text()
    assert f"max_steps={dock.link.steps}" in text
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "script", "exec"), {})
    model = api.load_model(tmp_path / "model.safetensors")
    assert model.config == dock.link.model.config
    labels = api.predict(model, picture(), device="cpu")
    assert (labels == predictions(dock)[0].data).mean() >= 0.99


# --- layers as they come --------------------------------------------------------------


def run_briefly(dock: TrainDock, wait: Any) -> None:
    dock.train()
    assert dock.link.state == "training", dock.coach.text()
    wait(lambda: is_shown(dock))
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")


def test_colours_and_channels(wait: Any, open_dock: Any) -> None:
    grey = picture()
    rgba = np.stack([grey, grey // 2, 255 - grey, np.full_like(grey, 255)], -1)
    dock = open_dock(Image(rgba, rgb=True), Labels(strokes()))
    run_briefly(dock, wait)
    assert dock.link.model.config.in_channels == 3
    expected = api.predict(
        dock.link.model, rgba[..., :3], channel_axis=-1, device="cpu"
    )
    np.testing.assert_array_equal(predictions(dock)[0].data, expected)


def test_several_layers_are_channels(wait: Any, open_dock: Any) -> None:
    red, green = Image(picture(), name="red"), Image(255 - picture(), name="green")
    dock = open_dock(red, green, Labels(strokes()))
    dock.viewer.layers.selection = {red, green}
    combo = dock.pairs._rows[0].image
    combo.setCurrentIndex(combo.count() - 1)
    combo.activated.emit(combo.count() - 1)
    assert len(dock.pairs.pairs()[0].images) == 2
    run_briefly(dock, wait)
    assert dock.link.model.config.in_channels == 2
    both = np.stack([picture(), 255 - picture()])
    expected = api.predict(dock.link.model, both, channel_axis=0, device="cpu")
    np.testing.assert_array_equal(predictions(dock)[0].data, expected)


def test_a_stack_is_predicted_from_the_plane_in_view(wait: Any, open_dock: Any) -> None:
    stack = np.stack([picture()] * 5)
    marks = np.zeros(stack.shape, np.uint8)
    marks[3] = strokes()
    dock = open_dock(Image(stack, name="stack"), Labels(marks))
    dock.viewer.dims.set_current_step(0, 3)
    wait(lambda: dock.link.counts()[0] == [108, 64])
    first: list[int] = []
    draw = dock.link._draw

    def noted(tile: Prediction) -> None:
        first.append(tile.slices[0])
        draw(tile)

    dock.link._draw = noted
    run_briefly(dock, wait)
    assert first[0] == 3
    expected = api.predict(dock.link.model, stack, device="cpu")
    np.testing.assert_array_equal(predictions(dock)[0].data, expected)


@pytest.mark.parametrize("kind", ["dask", "multiscale", "float", "uint16", "bool"])
def test_other_arrays(kind: str, wait: Any, open_dock: Any) -> None:
    image: Any = picture()
    layer = {
        "dask": lambda: Image(dask.array.from_array(image, chunks=20)),
        "multiscale": lambda: Image([image, image[::2, ::2]], multiscale=True),
        "float": lambda: Image(image / 255),
        "uint16": lambda: Image(image.astype(np.uint16) * 200),
        "bool": lambda: Image(image > 60),
    }[kind]()
    dock = open_dock(layer, Labels(strokes()))
    run_briefly(dock, wait)
    assert predictions(dock)[0].data.shape == (64, 64)


def test_layers_lie_where_the_image_lies(qtbot: Any, wait: Any, open_dock: Any) -> None:
    stack = np.stack([picture()] * 2)
    image = Image(
        stack,
        scale=(2, 0.5, 0.25),
        translate=(1, 5, 7),
        rotate=30,
        units=("um", "um", "um"),
        axis_labels=("z", "y", "x"),
    )
    dock = open_dock(image)
    click(qtbot, dock.pairs._rows[0].new)
    annotation = dock.pairs.pairs()[0].annotation
    annotation.data[0] = strokes()
    annotation.refresh()
    wait(lambda: dock.link.counts()[0] == [108, 64])
    run_briefly(dock, wait)
    for layer in (annotation, predictions(dock)[0]):
        np.testing.assert_allclose(
            layer.data_to_world((1, 30, 12)), image.data_to_world((1, 30, 12))
        )
        assert layer.units == image.units
        assert layer.axis_labels == image.axis_labels


def test_maps_become_layers(wait: Any, open_dock: Any) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    dock.advanced._uncertainty.setChecked(True)
    dock.advanced._probabilities.setChecked(True)
    run_briefly(dock, wait)
    kinds = {
        layer.metadata[_layers.OURS]["kind"]: layer
        for layer in dock.viewer.layers
        if _layers.OURS in layer.metadata
    }
    assert set(kinds) == {"prediction", "uncertainty", "probability"}
    assert kinds["probability"].data.shape == (2, 64, 64)
    np.testing.assert_allclose(kinds["probability"].data.sum(0), 1, atol=0.01)
    assert kinds["uncertainty"].data.max() <= 1
    assert kinds["uncertainty"].data.max() > 0


WRONG: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "no image": (lambda: [Labels(strokes())], "Open an image"),
    "nothing painted": (
        lambda: [Image(picture()), Labels(np.zeros((64, 64), np.uint8))],
        "Paint a few strokes",
    ),
    "one class": (
        lambda: [Image(picture()), Labels((strokes() == 1).astype(np.uint8))],
        "Paint some foreground",
    ),
    "a gap": (
        lambda: [Image(picture()), Labels(np.where(strokes() == 2, 7, strokes()))],
        "Label 7 is painted",
    ),
    "too high": (
        lambda: [Image(picture()), Labels(strokes().astype(np.int32) * 200)],
        "from 1 to 255",
    ),
    "negative": (
        lambda: [Image(picture()), Labels(-strokes().astype(np.int32))],
        "from 1 to 255",
    ),
    "another shape": (
        lambda: [Image(picture()), Labels(strokes(80))],
        "the image's shape (64, 64)",
    ),
    "flat on a stack": (
        lambda: [Image(np.stack([picture()] * 3)), Labels(strokes())],
        "the image's shape (3, 64, 64)",
    ),
    "transposed": (
        lambda: [Image(picture()[:, :40]), Labels(strokes()[:, :40].T.copy())],
        "the image's shape (64, 40)",
    ),
    "multiscale labels": (
        lambda: [
            Image(picture()),
            Labels([strokes(), strokes()[::2, ::2]], multiscale=True),
        ],
        "plain array",
    ),
    "dask labels": (
        lambda: [Image(picture()), Labels(dask.array.from_array(strokes()))],
        "plain array",
    ),
    "1 x 1": (
        lambda: [Image(picture()[:1, :1]), Labels(np.ones((1, 1), np.uint8))],
        "Paint some foreground",
    ),
    "a zarr with a cut chunk": (
        lambda: [
            Image(_cut_zarr(), contrast_limits=(0, 255)),
            Labels(np.stack([strokes()] * 3)),
        ],
        "cannot be read from its file",
    ),
    "all NaN": (
        lambda: [Image(np.full((64, 64), np.nan, np.float32)), Labels(strokes())],
        "finite",
    ),
    "one NaN": (
        lambda: [Image(_with_nan()), Labels(strokes())],
        "finite",
    ),
    "constant": (
        lambda: [Image(np.ones((64, 64))), Labels(strokes())],
        "contrast",
    ),
}


def _cut_zarr() -> Any:
    """Return a stack whose last plane, which nobody looks at, cannot be read."""
    kept: dict[str, Any] = {}
    array = zarr.create_array(
        zarr.storage.MemoryStore(kept),
        shape=(3, 64, 64),
        chunks=(1, 64, 64),
        dtype="u1",
    )
    array[:] = np.stack([picture()] * 3)
    (last,) = (key for key in kept if key.endswith("c/2/0/0"))
    kept[last] = kept[last][:20]
    return array


def _with_nan() -> np.ndarray:
    image = picture().astype(np.float32)
    image[5, 5] = np.nan
    return image


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_told_and_changes_nothing(
    case: str, wait: Any, open_dock: Any
) -> None:
    make, says = WRONG[case]
    layers = make()
    dock = open_dock(*layers)
    # The table pairs what fits; a user may insist.
    notes = [layer for layer in layers if isinstance(layer, Labels)]
    if notes and dock.pairs.pairs() and dock.pairs.pairs()[0].annotation is None:
        dock.pairs.set_annotation(0, notes[0])
    before = [np.array(_first(layer)).tobytes() for layer in layers]
    names = [layer.name for layer in layers]
    dock.train()
    wait(lambda: says in dock.coach.text())
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")
    assert dock.train_button.isEnabled()
    assert [np.array(_first(layer)).tobytes() for layer in layers] == before
    assert [layer.name for layer in layers] == names


def _first(layer: Any) -> Any:
    whole = isinstance(layer.data, np.ndarray) or hasattr(layer.data, "compute")
    return layer.data if whole else layer.data[0]


def test_labels_with_fractions_are_no_layer() -> None:
    with pytest.raises(TypeError, match="Only integer types"):  # by napari itself
        Labels(strokes() * 1.5)


@pytest.mark.parametrize(
    "kind", ["two pixels", "read-only", "int64", "other scale", "one name", "1 x 2"]
)
def test_odd_layers_simply_work(
    kind: str, wait: Any, open_dock: Any, tmp_path: Path
) -> None:
    image, marks = picture(), strokes()
    options: dict[str, Any] = {}
    if kind == "two pixels":
        marks = np.zeros_like(marks)
        marks[0, :2], marks[32, 31:33] = 1, 2
    elif kind == "read-only":
        np.save(tmp_path / "marks.npy", marks)
        marks = np.load(tmp_path / "marks.npy", mmap_mode="r")
    elif kind == "int64":
        marks = marks.astype(np.int64)
    elif kind == "other scale":
        options["scale"] = (3, 3)
    elif kind == "one name":
        options["name"] = "same"
    elif kind == "1 x 2":
        image, marks = np.array([[1, 5]], np.uint8), np.array([[1, 2]], np.uint8)
    dock = open_dock(Image(image, name="same"), Labels(marks, **options))
    run_briefly(dock, wait)
    assert predictions(dock)[0].data.shape == image.shape


def test_a_segmentation_keeps_its_colours_until_it_is_picked(
    make_napari_viewer: Any, told: list[str], wait: Any
) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(picture())
    other = viewer.add_labels(strokes(), name="somebody's nuclei")
    colours = other.colormap
    dock = TrainDock(viewer)
    viewer.window.add_dock_widget(dock, name="dock")
    assert dock.pairs.pairs()[0].annotation is None
    assert "Choose the layer with your strokes" in dock.coach.text()
    dock.train()
    assert "press New" in told[-1]
    assert [layer.name for layer in viewer.layers] == ["Image", "somebody's nuclei"]
    assert other.colormap is colours
    dock._new_annotation(0)
    own = dock.pairs.pairs()[0].annotation
    assert other.colormap is colours
    own.data[:] = strokes()
    dock.shut_down()
    viewer.window.remove_dock_widget(dock)
    again = TrainDock(viewer)  # knows its own again, painted or not
    viewer.window.add_dock_widget(again, name="dock")
    assert again.pairs.pairs()[0].annotation == own
    again.pairs.set_annotation(0, other)
    assert other.colormap is not colours
    wait(lambda: _worker.busy_with() is None)


def test_layers_may_be_renamed_moved_and_replaced_while_it_trains(
    wait: Any, open_dock: Any
) -> None:
    image, marks = Image(picture(), name="a"), Labels(strokes(), name="b")
    dock = open_dock(image, marks)
    dock.train()
    wait(lambda: is_shown(dock))
    image.name, marks.name = "x", "y"
    dock.viewer.layers.move(0, 2)
    predictions(dock)[0].name = "mine"
    steps = dock.link.steps
    wait(lambda: dock.link.steps > steps + 3)
    assert len(predictions(dock)) == 1
    marks.data = strokes(80)  # another shape
    wait(lambda: "the image's shape" in dock.coach.text())
    wait(lambda: dock.link.state == "idle")
    assert dock.link.model is not None


@pytest.mark.parametrize("which", ["image", "annotation"])
def test_a_removed_layer_ends_the_training_and_keeps_the_model(
    which: str, wait: Any, open_dock: Any, told: list[str]
) -> None:
    image, marks = Image(picture(), name="image"), Labels(strokes(), name="annotation")
    dock = open_dock(image, marks)
    dock.train()
    wait(lambda: is_shown(dock))
    dock.viewer.layers.remove(which)
    wait(lambda: dock.link.state == "idle")
    assert any("was removed" in text for text in told)
    assert dock.link.model is not None


def test_a_removed_prediction_is_not_put_back(wait: Any, open_dock: Any) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    dock.train()
    wait(lambda: is_shown(dock))
    dock.viewer.layers.remove(predictions(dock)[0])
    steps = dock.link.steps
    wait(lambda: dock.link.steps > steps + 10)
    assert not predictions(dock)
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")
    run_briefly(dock, wait)  # a new training shows it again
    assert len(predictions(dock)) == 1


def test_two_viewers_one_training(wait: Any, open_dock: Any, told: list[str]) -> None:
    first = open_dock(Image(picture()), Labels(strokes()))
    second = open_dock(Image(picture()), Labels(strokes()))
    first.train()
    wait(lambda: is_shown(first))
    second.train()
    assert "Something else is running (training)" in told[-1]
    assert second.link.state == "idle"
    first.link.stop()
    wait(lambda: first.link.state == "idle")
    run_briefly(second, wait)


# --- errors and ends ------------------------------------------------------------------

KINDS: list[Callable[[], BaseException]] = [
    lambda: ValueError("Told: value."),
    lambda: RuntimeError("Told: runtime."),
    lambda: torch.OutOfMemoryError("Told: CUDA out of memory"),
    lambda: torch.AcceleratorError("Told: assert", 710),
    lambda: MemoryError(),
    lambda: OSError(28, "Told: no space left"),
    lambda: KeyboardInterrupt("Told: interrupt"),
    lambda: StopIteration("Told: stop"),
    lambda: TrainingError("Told: the loss is NaN."),
    lambda: ChildProcessError("Told: thread pool"),
    lambda: UserWarning("Told: warning"),
    lambda: SystemExit("Told: exit"),
]
PHASES = ["start", "first", "training", "predicting", "pausing", "stopping", "showing"]


class FakeCore:
    """Stands for `live_steps`; raises where it is told to."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.phase = ""
        self.error: Callable[[], BaseException] = KINDS[0]
        self.runs = 0

    def __call__(
        self, _images: Any, mailbox: Any, *, stop: Any, **_: Any
    ) -> Generator[Any, None, Any]:
        self.runs += 1
        if self.phase == "start":
            raise self.error()
        return self._steps(mailbox, stop)

    def _fail_in(self, phase: str) -> None:
        if self.phase == phase:
            raise self.error()

    def _steps(self, mailbox: Any, stop: threading.Event) -> Any:
        step = api.TrainStep(1, 0.5, 0.1, 0.5)
        self._fail_in("first")
        yield Started("unet", "CPU", (3,))
        training = mailbox.latest().training
        if not training:
            self._fail_in("showing")
            return self.model
        yield Snapshot(self.model)
        yield Prediction(
            0, (slice(0, 64), slice(0, 64)), np.ones((64, 64), np.uint8), None, None, 1
        )
        self._fail_in("predicting")
        while not stop.is_set():
            if not mailbox.latest().training:
                self._fail_in("pausing")
            mailbox.wait(0.01)
            yield Progress(step, 1.0)
            self._fail_in("training")
        self._fail_in("stopping")
        return self.model


@pytest.mark.parametrize("phase", [*PHASES, "loading"])
def test_every_error_in_every_phase_is_told_and_the_next_run_works(
    phase: str,
    wait: Any,
    open_dock: Any,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    core = FakeCore(api.create_model("unet", width=4))
    monkeypatch.setattr("napari_unetpp.live.live_steps", core)

    def load(_: Any) -> Any:
        raise core.error()

    monkeypatch.setattr("napari_unetpp.api.load_model", load)
    for kind in KINDS:
        told.clear()
        core.error, core.phase = kind, phase
        if phase == "loading":
            dock.files.read("x.safetensors")
        else:
            dock.train()
        if phase in ("pausing", "stopping", "showing"):
            wait(lambda: bool(predictions(dock)) and dock.link.steps == 1)
            dock.pause() if phase == "pausing" else dock.link.stop()
        wait(lambda: bool(told))
        wait(lambda: dock.link.state == "idle" and not dock.files._runner.busy)
        message = told[-1]
        assert "Told" in message or "memory" in message, message
        assert dock.coach.text() != ""
        assert dock.train_button.isEnabled()
        core.phase = ""
        dock.train()
        assert dock.link.state == "training"
        wait(lambda: dock.link._runner.busy and dock.link.model is not None)
        dock.link.stop()
        wait(lambda: dock.link.state == "idle")
        dock.start_over()


def test_closing_the_dock_ends_the_training(wait: Any, open_dock: Any) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    viewer = dock.viewer
    dock.train()
    wait(lambda: is_shown(dock))
    viewer.window.remove_dock_widget(dock)
    wait(lambda: _worker.busy_with() is None)
    assert dock._closed
    viewer.layers[-1].paint((1, 1), 2)  # nobody listens, nothing fails
    viewer.layers.clear()


def test_opening_and_closing_twenty_times_leaves_nothing(
    wait: Any, make_napari_viewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    viewer = make_napari_viewer()
    viewer.add_image(picture())
    viewer.add_labels(strokes(), metadata={_layers.STROKES: True})
    core = FakeCore(api.create_model("unet", width=4))
    monkeypatch.setattr("napari_unetpp.live.live_steps", core)

    def cycle() -> None:
        dock = TrainDock(viewer)
        viewer.window.add_dock_widget(dock, name="dock")
        dock.train()
        wait(lambda: dock.link.steps == 1)
        viewer.window.remove_dock_widget(dock)
        wait(lambda: _worker.busy_with() is None)
        dock.deleteLater()
        QApplication.processEvents()

    for _ in range(3):
        cycle()
    gc.collect()
    widgets, threads = len(QApplication.allWidgets()), threading.active_count()
    listeners = len(viewer.layers.events.inserted.callbacks)
    for _ in range(20):
        cycle()
    gc.collect()
    QApplication.processEvents()
    assert threading.active_count() <= threads
    assert len(viewer.layers.events.inserted.callbacks) <= listeners
    assert len(QApplication.allWidgets()) <= widgets + 5


def test_the_plot_follows_the_theme(
    wait: Any, open_dock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dock = open_dock(Image(picture()))
    dock.viewer.window.show()
    for step in range(1, 20):
        dock.plot.add(step, 1 / step, 0.5)
    wait(lambda: dock.plot._plot is not None)
    grounds = []
    for theme in ("dark", "light"):
        dock.viewer.theme = theme
        shot = dock.plot._plot.widget.grab().toImage()
        grounds.append(shot.pixelColor(1, 1).lightness())
    assert grounds[0] < 80
    assert grounds[1] > 200
    dock.shut_down()
    monkeypatch.setattr(dock.plot, "set_theme", lambda *_: pytest.fail("still heard"))
    dock.viewer.theme = "dark"


def test_names_are_plain_text(open_dock: Any) -> None:
    evil = '<img src="file:///etc/hostname"><b>x</b>'
    dock = open_dock(Image(picture(), name=evil), Labels(strokes(), name=evil))
    assert dock.coach.textFormat() == Qt.TextFormat.PlainText
    assert dock.status.textFormat() == Qt.TextFormat.PlainText
    dock.classes.set_names((evil[:40], "b"))
    dock._on_classes()
    for label in dock.findChildren(type(dock.coach)):
        assert label.textFormat() == Qt.TextFormat.PlainText or "<" not in label.text()


def test_the_settings_of_the_dock_reach_the_core(open_dock: Any) -> None:
    dock = open_dock(network="UNet++", size="large")
    dock.advanced._elastic.setChecked(False)
    dock.advanced._seed.setValue(7)
    settings = dock._settings()
    assert (settings.network, settings.width, settings.seed) == ("unet++", 32, 7)
    assert settings.changes["patch"] == 32
    assert settings.changes["elastic_sigma"] == 0


# --- what a review found --------------------------------------------------------------


def test_going_on_while_all_is_being_labelled_waits_its_turn(
    wait: Any, open_dock: Any
) -> None:
    stack = np.stack([picture()] * 40)
    marks = np.zeros(stack.shape, np.uint8)
    marks[0] = strokes()
    dock = open_dock(Image(stack), Labels(marks))
    dock.viewer.dims.set_current_step(0, 0)
    wait(lambda: sum(dock.link.counts()[0]) > 0)
    dock.train()
    wait(lambda: dock.link.steps > 3)
    dock.link.stop()
    wait(lambda: dock.link.state == "showing")
    before = dock.link.steps
    dock.train()
    wait(lambda: dock.link.state == "training" and dock.link.steps > before)
    dock.pause()
    dock.link.stop()  # from the pause: all is labelled with the last weights
    wait(lambda: dock.link.state == "idle")
    expected = api.predict(dock.link.model, stack, device="cpu")
    np.testing.assert_array_equal(predictions(dock)[0].data, expected)
    assert dock.link.steps > before


def test_strokes_on_planes_out_of_sight_count(wait: Any, open_dock: Any) -> None:
    stack = np.stack([picture()] * 8)
    dock = open_dock(Image(stack), Labels(np.zeros(stack.shape, np.uint8)))
    layer = dock.viewer.layers[-1]
    layer.n_edit_dimensions, layer.brush_size = 3, 5
    dock.viewer.dims.set_current_step(0, 4)
    layer.paint((4, 30, 30), 1)
    dock.viewer.dims.set_current_step(0, 0)  # away before the next look
    wait(lambda: set(dock.link._links[0].strokes.planes) == {2, 3, 4, 5, 6})
    layer.data[7, 3, 3] = 2  # behind napari's back
    layer.refresh()
    wait(lambda: 7 in dock.link._links[0].strokes.planes)


def test_a_replaced_image_ends_the_run(wait: Any, open_dock: Any) -> None:
    image = Image(picture(), name="image")
    dock = open_dock(image, Labels(strokes()))
    dock.train()
    wait(lambda: is_shown(dock))
    image.data = 255 - picture()
    wait(lambda: "was replaced" in dock.coach.text())
    wait(lambda: dock.link.state == "idle")
    run_briefly(dock, wait)


def test_an_image_whose_rgb_is_switched_ends_the_run(wait: Any, open_dock: Any) -> None:
    image = Image(np.stack([picture()] * 3, -1), rgb=True)
    dock = open_dock(image, Labels(strokes()))
    dock.train()
    wait(lambda: dock.link.state == "training" and dock.link.model is not None)
    image.rgb = False
    wait(lambda: "switched between colour and grey" in dock.coach.text())
    wait(lambda: dock.link.state == "idle")
    assert dock.link.model is not None
    image.rgb = True
    dock.train()
    wait(lambda: dock.link.state == "training" and dock.link._runner.busy)
    dock.link._training = False
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")


def test_a_renamed_class_is_saved_under_its_new_name(open_dock: Any) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    dock.link.model = api.create_model("unet", width=4)
    dock.classes.set_names(("ground", "nucleus"))
    dock._on_classes()
    assert dock.link.named().classes == ("ground", "nucleus")
    assert dock.link.model.classes == ("background", "foreground")


def test_training_with_an_emptied_row_works(wait: Any, open_dock: Any) -> None:
    first = Image(picture(), name="first")
    dock = open_dock(first, Image(picture(), name="second"), Labels(strokes()))
    dock.pairs._add.click()
    dock.viewer.layers.remove("first")
    dock.train()
    wait(lambda: dock.link.state == "training")
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")


def test_odd_metadata_of_a_layer_do_no_harm(open_dock: Any) -> None:
    for odd in (5, "abc", ["a"], ["a", "a"], [1, 2]):
        dock = open_dock(Image(picture()), Labels(strokes(), metadata={"classes": odd}))
        assert dock.classes.names() == ("background", "foreground")
