"""The Predict dock: what it shows and does, with a fake core and with the real one."""

from __future__ import annotations

import importlib.util
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile

pytest.importorskip("napari")
pytest.importorskip("qtpy")

from qtpy.QtCore import QMimeData, QPoint, QPointF, Qt, QUrl
from qtpy.QtGui import QDropEvent
from qtpy.QtWidgets import QCheckBox, QLabel, QPushButton, QRadioButton, QWidget

from napari_unetpp import api, io, modelfile
from napari_unetpp._widgets import _predict_run, _worker, offer, predict_dock
from napari_unetpp._widgets._layers import OURS
from napari_unetpp._widgets._worker import Runner
from napari_unetpp._widgets.predict_dock import PredictDock
from napari_unetpp._widgets.train_dock import TrainDock
from napari_unetpp.errors import UnetppError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIMIT = 30_000  # ms


def grey(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    classes = ("background", "<b>nucleus</b>")
    api.create_model("unet++", classes=classes, width=4, levels=2).save(path)
    return path


@pytest.fixture
def viewer(make_napari_viewer: Callable[..., Any]) -> Any:
    return make_napari_viewer()


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr(predict_dock, "show_error", texts.append)
    monkeypatch.setattr(predict_dock, "show_info", texts.append)
    return texts


@pytest.fixture
def dock(viewer: Any, qtbot: Any, told: list[str]) -> Iterator[PredictDock]:
    del told
    made = PredictDock(viewer)
    viewer.window.add_dock_widget(made, name="Predict")
    yield made
    made._close()
    qtbot.waitUntil(lambda: predict_dock.busy_with() is None, timeout=LIMIT)


def wait_idle(qtbot: Any, dock: PredictDock) -> None:
    qtbot.waitUntil(
        lambda: not dock._runner.busy and dock._unread is None, timeout=LIMIT
    )


def choose(qtbot: Any, dock: PredictDock, path: Path) -> None:
    dock.form.model.set_path(path)
    wait_idle(qtbot, dock)


def predict(qtbot: Any, dock: PredictDock) -> str:
    """Press Predict and return the result line once the run is over."""
    dock._poll()
    assert dock.form.start.isEnabled()
    dock.form.start.click()
    wait_idle(qtbot, dock)
    assert (dock.form.start.isEnabled(), dock.form.stop.isEnabled()) == (True, False)
    return str(dock.form.result.text())


def results(viewer: Any) -> list[Any]:
    return [layer for layer in viewer.layers if layer.metadata.get(OURS)]


# --- with a fake core ------------------------------------------------------------

FACTS = _predict_run.Facts("unet", ("a", "b"), 1, (4,), False, "1 step", "2026-01-01 1")


class FakeCore:
    """Labels the rows of one image (4, 6), each when it is allowed to."""

    def __init__(self) -> None:
        self.requests: list[_predict_run.Request] = []
        self.gate = threading.Semaphore(0)
        self.error: BaseException | None = None

    def run(self, request: _predict_run.Request) -> Any:
        self.requests.append(request)

        def make(stop: threading.Event) -> Any:
            yield _predict_run.Begun(FACTS, False)
            summary = _predict_run.Summary(1)
            for row in range(4):
                while not self.gate.acquire(timeout=0.02):
                    if stop.is_set():
                        return _predict_run.Summary(1, stopped=True)
                if self.error is not None:
                    raise self.error
                yield _predict_run.Progress(f"row {row}", row / 4)
                where = (slice(row, row + 1), slice(0, 6))
                labels = np.full((1, 6), 2, np.uint8)
                yield _predict_run.Piece((row,), 1, "x", (4, 6), where, labels)
            return _predict_run.Summary(1, done=(1,), started=summary.started)

        return make

    def read_model(self, _path: Path) -> Any:
        def make(_stop: threading.Event) -> Any:
            yield FACTS
            return FACTS

        return make


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    fake = FakeCore()
    monkeypatch.setattr(predict_dock, "run", fake.run)
    monkeypatch.setattr(predict_dock, "read_model", fake.read_model)
    return fake


@pytest.fixture
def ready(viewer: Any, dock: PredictDock, core: FakeCore, qtbot: Any) -> PredictDock:
    del core
    viewer.add_image(grey(4, 6), name="x")
    choose(qtbot, dock, Path("any.safetensors"))
    return dock


def test_a_run_from_press_to_layer(
    viewer: Any, ready: PredictDock, core: FakeCore, qtbot: Any, told: list[str]
) -> None:
    form = ready.form
    form.start.click()
    assert (form.start.isEnabled(), form.stop.isEnabled()) == (False, True)
    core.gate.release(2)
    qtbot.waitUntil(lambda: form.progress.text() == "row 1", timeout=LIMIT)
    (result,) = results(viewer)
    qtbot.waitUntil(lambda: bool((result.data[:2] == 2).all()), timeout=LIMIT)
    assert not result.data[2:].any()
    assert result.data.dtype == np.uint8
    core.gate.release(2)
    wait_idle(qtbot, ready)
    assert (result.data == 2).all()
    assert form.result.text().startswith("1 image labelled")
    assert result.name == "prediction of x"
    assert (form.start.isEnabled(), form.stop.isEnabled()) == (True, False)
    assert told[-1] == form.result.text()
    assert viewer.layers.selection.active.name == "x"


def test_one_refresh_for_all_that_came(
    viewer: Any,
    ready: PredictDock,
    core: FakeCore,
    qtbot: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []
    drains: list[int] = []
    ready._runner.drained.connect(lambda: drains.append(1))
    from napari.layers import Labels

    real = Labels.refresh

    def refresh(self: Any, event: Any = None, **options: Any) -> None:
        if options:
            calls.append(options)
        real(self, event, **options)

    monkeypatch.setattr(Labels, "refresh", refresh)
    core.gate.release(4)
    predict(qtbot, ready)
    quick = {"extent": False, "thumbnail": False, "highlight": False}
    assert 0 < calls.count(quick) <= len(drains)
    assert results(viewer)


def test_cancel(viewer: Any, ready: PredictDock, core: FakeCore, qtbot: Any) -> None:
    ready.form.start.click()
    core.gate.release(1)
    qtbot.waitUntil(lambda: bool(results(viewer)), timeout=LIMIT)
    ready.form.stop.click()
    assert not ready.form.stop.isEnabled()
    wait_idle(qtbot, ready)
    assert ready.form.result.text().startswith("Cancelled")
    assert results(viewer)[0].name == "prediction of x (incomplete)"
    core.gate.release(4)
    assert predict(qtbot, ready).startswith("1 image labelled")
    assert [layer.name for layer in results(viewer)] == ["prediction of x"]


def test_a_result_is_used_again_unless_it_was_edited(
    viewer: Any, ready: PredictDock, core: FakeCore, qtbot: Any
) -> None:
    core.gate.release(4)
    predict(qtbot, ready)
    (first,) = results(viewer)
    first.name = "mine"  # a name says nothing
    viewer.layers["x"].scale = (2, 3)
    copy = viewer.add_labels(first.data.copy(), metadata=dict(first.metadata))
    core.gate.release(4)
    predict(qtbot, ready)
    assert results(viewer) == [first, copy]
    np.testing.assert_array_equal(first.scale, (2, 3))
    first.paint((1, 1), 1)
    edited = first.data.copy()
    core.gate.release(4)
    predict(qtbot, ready)
    np.testing.assert_array_equal(first.data, edited)
    assert [layer.visible for layer in results(viewer)] == [False, True, True]
    assert (results(viewer)[-1].data == 2).all()
    first.undo()  # and is free again
    core.gate.release(4)
    predict(qtbot, ready)
    assert len(results(viewer)) == 3


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (UnetppError("<b>no</b>: take another."), "<b>no</b>: take another."),
        (RuntimeError("odd"), "RuntimeError"),
        (MemoryError(), "memory"),
        (OSError(28, "No space left on device"), "No space left"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_failure_is_told_as_text_and_the_next_run_works(
    ready: PredictDock,
    core: FakeCore,
    qtbot: Any,
    told: list[str],
    error: BaseException,
    word: str,
) -> None:
    core.error = error
    core.gate.release(1)
    assert word in predict(qtbot, ready)
    assert "<b>" not in told[-1]
    core.error = None
    core.gate.release(4)
    assert predict(qtbot, ready).startswith("1 image labelled")


@pytest.mark.parametrize("what", ["remove", "replace", "remove image", "new image"])
def test_layers_may_change_while_it_runs(
    viewer: Any, ready: PredictDock, core: FakeCore, qtbot: Any, what: str
) -> None:
    ready.form.start.click()
    core.gate.release(1)
    qtbot.waitUntil(lambda: bool(results(viewer)), timeout=LIMIT)
    (result,) = results(viewer)
    own = np.zeros((2, 3), np.uint8)
    if what == "remove":
        viewer.layers.remove(result)
    elif what == "replace":
        result.data = own
    elif what == "remove image":
        viewer.layers.remove(viewer.layers["x"])
    else:
        viewer.layers["x"].data = grey(2, 2)
    core.gate.release(3)
    wait_idle(qtbot, ready)
    assert ready.form.result.text().startswith("1 image labelled")
    assert not own.any()
    assert len(results(viewer)) == (what != "remove")


def test_another_run_has_the_thread(
    viewer: Any, dock: PredictDock, core: FakeCore, qtbot: Any
) -> None:
    end = threading.Event()

    def make(_stop: threading.Event) -> Any:
        while not end.wait(0.02):
            yield 1

    other = Runner()
    viewer.add_image(grey(4, 6))
    assert other.start(make, title="Training <b>")
    dock.form.model.set_path("any.safetensors")
    dock._poll()
    assert dock.form.busy.text().startswith("Training <b> is running")
    assert dock.form.busy.isVisibleTo(dock)
    assert not dock.form.start.isEnabled()
    assert dock._facts is None
    end.set()
    qtbot.waitUntil(lambda: dock._facts == FACTS, timeout=LIMIT)
    wait_idle(qtbot, dock)
    assert not dock.form.busy.isVisibleTo(dock)
    core.gate.release(4)
    assert predict(qtbot, dock).startswith("1 image labelled")


def test_closing_the_dock_gives_the_run_up(
    viewer: Any, ready: PredictDock, core: FakeCore, qtbot: Any
) -> None:
    layer = viewer.layers["x"]
    ready.form.start.click()
    core.gate.release(1)
    qtbot.waitUntil(lambda: bool(results(viewer)), timeout=LIMIT)
    viewer.window.remove_dock_widget(ready)
    core.gate.release(3)
    qtbot.waitUntil(lambda: predict_dock.busy_with() is None, timeout=LIMIT)
    assert not results(viewer)[0].data[3].any()
    assert ready.form.images._named == []
    for emitter in (
        viewer.layers.events.inserted,
        viewer.layers.selection.events.changed,
        layer.events.name,
    ):
        owners = [c[0]() for c in emitter.callbacks if isinstance(c, tuple)]
        assert ready.form.images not in owners
    layer.name = "y"
    viewer.add_image(grey(3, 3))
    assert ready.form.images.count() == 1
    viewer.window.add_dock_widget(ready, name="Predict")  # and it may come back
    assert ready.form.images.count() == 2
    core.gate.release(4)
    assert predict(qtbot, ready).startswith("1 image labelled")


def test_what_is_missing_is_told_at_once(
    viewer: Any, dock: PredictDock, core: FakeCore, qtbot: Any, told: list[str]
) -> None:
    form = dock.form
    assert "model file" in predict(qtbot, dock)
    choose(qtbot, dock, Path("any.safetensors"))
    assert "No image is ticked" in predict(qtbot, dock)
    form.on_folder.setChecked(True)
    assert "folder of images" in predict(qtbot, dock)
    form.on_layers.setChecked(True)
    viewer.add_image(grey(4, 4))
    form.as_files.setChecked(True)
    assert "folder for the label TIFFs" in predict(qtbot, dock)
    assert core.requests == []
    assert len(told) == 4


# --- the model on offer ----------------------------------------------------------


def test_a_model_that_was_just_trained_labels_without_a_file(
    viewer: Any, dock: PredictDock, qtbot: Any, model_file: Path
) -> None:
    model = api.load_model(model_file)
    viewer.add_image(grey(40, 48))
    offer.newest.put(model)
    assert "just trained, not saved" in dock.form.facts.text()
    assert "just trained" in dock.form.model.placeholderText()
    assert predict(qtbot, dock).startswith("1 image labelled")
    expected = api.predict(model, grey(40, 48))
    np.testing.assert_array_equal(results(viewer)[0].data, expected)
    offer.newest.put(None)
    assert "just trained" not in dock.form.facts.text()
    assert "model file" in predict(qtbot, dock)


def test_the_field_follows_the_offer_until_the_user_chooses(
    dock: PredictDock, core: FakeCore, qtbot: Any, tmp_path: Path
) -> None:
    del core
    field = dock.form.model
    for name in ("a.safetensors", "b.safetensors"):
        offer.newest.put(tmp_path / name)
        wait_idle(qtbot, dock)
        assert field.path() == tmp_path / name
        assert dock._facts == FACTS
    choose(qtbot, dock, tmp_path / "mine.safetensors")
    offer.newest.put(tmp_path / "c.safetensors")
    assert field.path() == tmp_path / "mine.safetensors"
    dock._close()
    field.clear()
    offer.newest.put(tmp_path / "d.safetensors")  # nobody listens
    assert field.text() == ""


# --- the list of images ----------------------------------------------------------


def test_ticks_follow_the_selection_until_the_user_sets_one(
    viewer: Any, dock: PredictDock
) -> None:
    images = dock.form.images
    a = viewer.add_image(grey(4, 4), name="a")
    viewer.layers.selection.clear()
    dock.form.images.close_list()
    dock.form.images.tick([])
    dock.form.images.open()
    assert images.ticked() == [a]  # there is no other choice
    b = viewer.add_image(grey(4, 4))
    viewer.add_labels(grey(4, 4))
    assert images.ticked() == [b]
    viewer.layers.selection = {a, b}
    assert images.ticked() == [a, b]
    viewer.layers.selection = {a}
    assert images.ticked() == [a]
    images.item(0).setCheckState(Qt.CheckState.Checked)
    viewer.layers.selection = {a}
    assert images.ticked() == [a, b]
    viewer.layers.move(0, 2)
    assert set(images.ticked()) == {a, b}
    viewer.layers.remove(b)
    assert images.ticked() == [a]
    a.name = "c"
    assert images.item(0).text() == "c"


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_boxes_are_seen_in_every_theme(
    viewer: Any, dock: PredictDock, theme: str
) -> None:
    viewer.theme = theme
    viewer.add_image(grey(4, 4), name="a")
    images = dock.form.images
    looks = []
    for state in (Qt.CheckState.Checked, Qt.CheckState.Unchecked):
        images.item(0).setCheckState(state)
        shot = images.grab(images.visualItemRect(images.item(0))).toImage()
        box = range(2, 18)
        grounds = shot.pixelColor(shot.width() - 3, 3).lightness()
        lights = [shot.pixelColor(x, y).lightness() for x in box
                  for y in range(shot.height())]  # fmt: skip
        looks.append(sum(abs(light - grounds) > 40 for light in lights))
    assert looks[1] > 20  # the frame
    assert looks[0] > looks[1]  # and what fills it


def test_foreign_names_are_short_plain_text(viewer: Any, dock: PredictDock) -> None:
    viewer.add_image(grey(4, 4), name="<img src='file:///x'>\n\u202e" + "n" * 300)
    item = dock.form.images.item(0)
    assert len(item.text()) <= 64
    assert item.text().isprintable()
    assert "<" not in item.toolTip()
    for label in dock.findChildren(QLabel):
        assert label.textFormat() == Qt.TextFormat.PlainText or label.buddy()


def test_every_control_has_a_tooltip_and_a_key(dock: PredictDock) -> None:
    keys = []
    for kind in (QPushButton, QRadioButton, QCheckBox):
        for control in dock.findChildren(kind):
            assert control.toolTip()
            assert control.focusPolicy() != Qt.FocusPolicy.NoFocus
            keys += [control.text()] if "&" in control.text() else []
    keys += [x.text() for x in dock.findChildren(QLabel) if x.buddy()]
    letters = [text[text.index("&") + 1].lower() for text in keys]
    assert len(letters) == len(set(letters)) == 11
    assert not set(letters) & set("fvlpwh"), "taken by napari's menu bar"


def test_nothing_is_cut_at_the_width_of_the_dock(
    viewer: Any, dock: PredictDock, qtbot: Any, model_file: Path
) -> None:
    choose(qtbot, dock, model_file)
    dock.form.as_files.setChecked(True)
    for folder in (False, True):
        dock.form.on_folder.setChecked(folder)
        assert dock.form.minimumSizeHint().width() <= dock.minimumWidth()
    viewer.add_image(grey(4, 4), name="w" * 300)
    assert dock.form.minimumSizeHint().width() <= dock.minimumWidth()


@pytest.mark.parametrize("on", ["dock", "field"])
def test_files_and_folders_can_be_dropped(
    dock: PredictDock, core: FakeCore, tmp_path: Path, on: str
) -> None:
    del core

    def drop(path: Path, target: QWidget) -> None:
        data = QMimeData()
        data.setUrls([QUrl.fromLocalFile(str(path))])
        target.dropEvent(
            QDropEvent(
                QPointF(QPoint(1, 1)),
                Qt.DropAction.CopyAction,
                data,
                Qt.MouseButton.LeftButton,
                Qt.KeyboardModifier.NoModifier,
            )
        )

    form = dock.form
    model = tmp_path / "m.safetensors"
    drop(model, dock if on == "dock" else form.model)
    drop(tmp_path, dock if on == "dock" else form.folder)
    assert form.model.path() == model
    assert form.folder.path() == tmp_path
    assert form.on_folder.isChecked() == (on == "dock")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cells [1]", "cells [1]"),
        ("a/b\\c:d\n", "a_b_c_d_"),
        ("../..", "_"),
        ("con.x", "_con.x"),
        ("", "image"),
        ("é" * 300, "é" * 40),
    ],
)
def test_layer_names_as_file_names(name: str, expected: str) -> None:
    assert _predict_run.file_name(name) == expected


# --- with the real core ----------------------------------------------------------


def test_a_real_stack_as_a_layer(
    viewer: Any, dock: PredictDock, qtbot: Any, model_file: Path
) -> None:
    image = grey(2, 40, 48)
    before = image.copy()
    layer = viewer.add_image(image, name="stack", scale=(3, 2, 2), translate=(1, 2, 3))
    choose(qtbot, dock, model_file)
    assert "<b>nucleus</b>" in dock.form.facts.text()
    assert "L1 to L2" in dock.form.facts.text()
    dock.form._slider.setValue(0)
    assert predict(qtbot, dock).startswith("1 image labelled")
    (result,) = results(viewer)
    expected = api.predict(api.load_model(model_file), image, depth=1)
    np.testing.assert_array_equal(result.data, expected)
    np.testing.assert_array_equal(result.scale, layer.scale)
    np.testing.assert_array_equal(result.translate, layer.translate)
    np.testing.assert_array_equal(image, before)
    dock.form._slider.setValue(1)
    dock.form.mean.setChecked(True)
    predict(qtbot, dock)
    expected = api.predict(api.load_model(model_file), image, heads="mean")
    np.testing.assert_array_equal(results(viewer)[-1].data, expected)


def test_a_real_folder_with_a_damaged_file(
    dock: PredictDock, qtbot: Any, model_file: Path, tmp_path: Path, told: list[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        tifffile.imwrite(folder / f"{name}.tif", grey(40, 48))
    (folder / "bad.tif").write_bytes(b"II*\0" + bytes(20))
    before = {p: p.read_bytes() for p in folder.iterdir()}
    choose(qtbot, dock, model_file)
    dock.form.on_folder.setChecked(True)
    dock.form.folder.set_path(folder)
    dock.form.as_files.setChecked(True)
    text = predict(qtbot, dock)
    assert text.startswith("2 of 3 images labelled")
    assert "bad.tif" in text
    assert told[-1]
    made = tmp_path / "images_labels"
    assert sorted(p.name for p in made.iterdir()) == ["a.tif", "b.tif"]
    assert io.read_labels(made / "a.tif").shape == (40, 48)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    assert "2 skipped" in predict(qtbot, dock)
    dock.form.skip.setChecked(False)
    assert "exists" in predict(qtbot, dock)
    dock.form.out.set_path(folder)
    assert "folder of the images" in predict(qtbot, dock)
    for name in ("x", "y"):
        (folder / f"{name}.tif").write_bytes(b"II*\0")
    dock.form.out.set_path(tmp_path / "new")
    assert predict(qtbot, dock).startswith("2 of 5 images labelled")
    assert dock.form.failures.toPlainText().count("\n\n• ") == 2
    assert dock.form.failures.isVisibleTo(dock)


def test_a_real_folder_as_layers(
    viewer: Any, dock: PredictDock, qtbot: Any, model_file: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        tifffile.imwrite(tmp_path / f"{name}.tif", grey(40, 48))
    choose(qtbot, dock, model_file)
    dock.form.on_folder.setChecked(True)
    dock.form.folder.set_path(tmp_path)
    assert predict(qtbot, dock).startswith("2 images labelled")
    names = [layer.name for layer in results(viewer)]
    assert names == ["prediction of a.tif", "prediction of b.tif"]
    assert [layer.visible for layer in results(viewer)] == [False, True]
    assert not (tmp_path.parent / f"{tmp_path.name}_labels").exists()


def test_real_layers_as_files(
    viewer: Any, dock: PredictDock, qtbot: Any, model_file: Path, tmp_path: Path
) -> None:
    viewer.add_image(grey(40, 48), name="a/b")
    choose(qtbot, dock, model_file)
    dock.form.as_files.setChecked(True)
    dock.form.out.set_path(tmp_path / "labels")
    assert "Written to labels" in predict(qtbot, dock)
    assert [p.name for p in (tmp_path / "labels").iterdir()] == ["a_b.tif"]
    assert not results(viewer)


@pytest.mark.parametrize("kind", ["rgb", "rgba", "multiscale", "dask", "two layers"])
def test_kinds_of_real_layers(
    viewer: Any, dock: PredictDock, qtbot: Any, tmp_path: Path, kind: str
) -> None:
    channels = {"rgb": 3, "rgba": 3, "two layers": 2}.get(kind, 1)
    made = api.create_model("unet", in_channels=channels, width=4, levels=2)
    made.save(tmp_path / "m.safetensors")
    flat, axis = grey(40, 48), None
    if kind in ("rgb", "rgba"):
        flat, axis = grey(40, 48, 3), -1
        data = np.dstack([flat, grey(40, 48)]) if kind == "rgba" else flat
        viewer.add_image(data, rgb=True)
    elif kind == "multiscale":
        viewer.add_image([flat, flat[::2, ::2]], multiscale=True)
    elif kind == "dask":
        import dask.array

        viewer.add_image(dask.array.from_array(flat, chunks=20))
    else:
        flat, axis = grey(2, 40, 48), 0
        layers = viewer.add_image(flat, channel_axis=0)
        viewer.layers.selection = set(layers)
        dock.form.images.tick(layers)
    choose(qtbot, dock, tmp_path / "m.safetensors")
    assert predict(qtbot, dock).startswith("1 image labelled"), kind
    (result,) = results(viewer)
    expected = api.predict(made, flat, channel_axis=axis)
    np.testing.assert_array_equal(result.data, expected)


def test_what_does_not_fit_is_told_and_can_be_mended(
    viewer: Any,
    dock: PredictDock,
    qtbot: Any,
    model_file: Path,
    tmp_path: Path,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damaged = bytearray(model_file.read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(damaged)
    choose(qtbot, dock, tmp_path / "bad.safetensors")
    assert "damaged" in dock.form.result.text()
    assert len(told) == 1
    viewer.add_image(grey(40, 48, 3), rgb=True, name="colour")
    assert "damaged" in predict(qtbot, dock)
    choose(qtbot, dock, model_file)
    assert dock.form.result.text() == ""
    assert "3 channels" in predict(qtbot, dock)
    hole = grey(40, 48).astype(np.float32)
    hole[2, 2] = np.nan
    layer = viewer.add_image(hole, name="hole")
    assert "NaN" in predict(qtbot, dock)
    layer.data = np.zeros_like(hole)
    assert predict(qtbot, dock).startswith("1 image labelled")
    dock.form.as_files.setChecked(True)
    dock.form.out.set_path(tmp_path)
    with monkeypatch.context() as patch:
        real = os.access
        patch.setattr(
            "napari_unetpp.batch.files.os.access",
            lambda path, mode: mode != os.W_OK and real(path, mode),
        )
        assert "write-protected" in predict(qtbot, dock)
    assert predict(qtbot, dock).startswith("1 image labelled")


def test_no_bad_model_file_gets_in(
    viewer: Any,
    dock: PredictDock,
    qtbot: Any,
    tmp_path: Path,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("train_dock", "model_files"):
        name = f"napari_unetpp._widgets.{module}.show_error"
        monkeypatch.setattr(name, told.append)
    file = Path(__file__).parents[1] / "test_modelfile.py"
    spec = importlib.util.spec_from_file_location("test_modelfile", file)
    assert spec is not None
    assert spec.loader is not None
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    good = modelfile.encode(cases.tensors(), config={"levels": 4}, provenance={})
    monkeypatch.setattr(_worker, "_TICK", 1)
    train = TrainDock(viewer)
    viewer.window.add_dock_widget(train, name="Train")
    layer = viewer.add_labels(np.eye(8, dtype=np.uint8))
    for number, make in enumerate(cases.HOSTILE.values()):
        path = tmp_path / f"bad{number}.safetensors"
        path.write_bytes(make(good))
        choose(qtbot, dock, path)
        assert f"`{path.name}`" in dock.form.result.text()
        assert dock.form.facts.text() == "This file cannot be used."
        train.files.read(str(path))
        qtbot.waitUntil(lambda: not train.files._runner.busy, timeout=LIMIT)
        assert f"`{path.name}`" in train.coach.text()
        assert train.link.model is None
        path.unlink()
    assert not any("Unexpected" in text for text in told)
    assert list(viewer.layers) == [layer]
    np.testing.assert_array_equal(layer.data, np.eye(8))
    assert not list(tmp_path.glob("bad*"))


def test_cancel_a_real_run_in_the_middle_of_a_tile(
    viewer: Any, dock: PredictDock, qtbot: Any, tmp_path: Path
) -> None:
    api.create_model("unet++", width=16).save(tmp_path / "m.safetensors")
    viewer.add_image(grey(20, 700, 700))
    choose(qtbot, dock, tmp_path / "m.safetensors")
    dock.form.start.click()
    qtbot.waitUntil(lambda: bool(results(viewer)), timeout=LIMIT)
    dock.form.stop.click()
    start = time.monotonic()
    wait_idle(qtbot, dock)
    assert dock.form.result.text().startswith("Cancelled: 0 of 1")
    assert time.monotonic() - start < 30  # the figure is in the report, not here
    assert "(incomplete)" in results(viewer)[0].name
