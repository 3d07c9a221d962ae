"""Strokes in a real viewer: saved by themselves, offered again, never overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask.array
import numpy as np
import pytest
from napari.layers import Image, Labels
from qtpy.QtWidgets import QMessageBox

from napari_unetpp._widgets import recovery as room
from napari_unetpp._widgets.train_dock import TrainDock
from napari_unetpp.errors import RecoveryFileError
from napari_unetpp.recovery import FOLDER, Note, Store, pack, read

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPE = (300, 400)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path / "recovery"))
    monkeypatch.setattr(room, "PERIOD", 50)
    return tmp_path / "recovery"


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    texts: list[str] = []
    monkeypatch.setattr("napari_unetpp._widgets.train_dock.show_error", texts.append)
    return texts


@pytest.fixture
def open_dock(make_napari_viewer: Any, told: list[str]) -> Callable[..., TrainDock]:  # noqa: ARG001
    def make(*layers: Any) -> TrainDock:
        viewer = make_napari_viewer()
        for layer in layers:
            viewer.add_layer(layer)
        dock = TrainDock(viewer)
        viewer.window.add_dock_widget(dock, name="dock")
        return dock

    return make


def cell() -> Image:
    return Image(np.zeros(SHAPE, np.uint8), name="cell", scale=(2, 3))


def left_behind(folder: Path, **changes: Any) -> np.ndarray:
    """Leave the work of an ended session."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[10:20, 30:40] = 2
    store = Store(folder)
    facts = {"name": "nuclei", "image": "cell", "classes": ("sky", "star", "sea")}
    store.save(Note("c" * 32, **(facts | changes)), pack(labels))
    store.close()
    return labels


def newest(folder: Path) -> np.ndarray | None:
    files = []
    for path in folder.glob("*.strokes"):
        try:
            files.append(read(path))
        except RecoveryFileError:
            if path.exists():  # else the thread has just removed it
                raise
    return max(files, key=lambda f: f[0].serial)[1] if files else None


def saved(folder: Path, labels: np.ndarray) -> bool:
    last = newest(folder)
    return last is not None and np.array_equal(last, labels)


def test_paint_and_undo_are_saved(open_dock: Any, folder: Path, wait: Any) -> None:
    dock = open_dock(cell())
    dock.pairs.want_annotations()
    layer = dock.pairs.pairs()[0].annotation
    layer.paint((50, 60), 1)
    wait(lambda: saved(folder, layer.data))
    before = layer.data.copy()
    layer.paint((200, 300), 2)
    wait(lambda: saved(folder, layer.data))
    layer.undo()
    assert np.array_equal(layer.data, before)
    wait(lambda: saved(folder, before))
    layer.data[5, 5] = 2
    layer.refresh()
    wait(lambda: saved(folder, layer.data))


def test_what_was_unsaved_at_the_end_is_offered_and_restored(
    open_dock: Any, folder: Path, wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PERIOD", 10**7)
    dock = open_dock(cell())
    dock.pairs.want_annotations()
    layer = dock.pairs.pairs()[0].annotation
    layer.name = "<b>nuclei</b>"
    layer.paint((50, 60), 2)
    labels = layer.data.copy()
    dock.viewer.window.remove_dock_widget(dock)
    again = open_dock(cell())
    wait(lambda: bool(again.unsaved.offers))
    assert again.unsaved.isVisibleTo(again)
    text = again.unsaved.text.text()
    assert "'<b>nuclei</b>' of image 'cell'" in text
    assert f"{np.count_nonzero(labels):,} painted pixels" in text
    again.unsaved.restore.click()
    back = again.pairs.pairs()[0].annotation
    assert np.array_equal(back.data, labels)
    assert tuple(back.scale) == (2, 3)
    assert not again.unsaved.isVisibleTo(again)
    # The old file goes when the new layer has one.
    wait(lambda: {p.name[:32] for p in folder.glob("*.s*")} == {back.unique_id.hex})


def test_a_plain_close_of_the_viewer_saves(
    open_dock: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "PERIOD", 10**7)
    dock = open_dock(cell())
    dock.pairs.want_annotations()
    layer = dock.pairs.pairs()[0].annotation
    dock.viewer.window._qt_window.show()
    layer.paint((50, 60), 2)
    assert newest(folder) is None
    dock.viewer.close()
    assert saved(folder, layer.data)


def test_restoring_adds_a_layer_with_its_classes(
    open_dock: Any, folder: Path, wait: Any
) -> None:
    labels = left_behind(folder)
    own = Labels(np.ones(SHAPE, np.uint8), name="nuclei")
    dock = open_dock(cell(), own)
    wait(lambda: bool(dock.unsaved.offers))
    dock.unsaved.restore.click()
    assert (own.data == 1).all()
    back = dock.pairs.pairs()[0].annotation
    assert np.array_equal(back.data, labels)
    assert dock.classes.names() == ("sky", "star", "sea")


def test_work_of_another_image_is_told_and_stays_apart(
    open_dock: Any, folder: Path, wait: Any
) -> None:
    labels = left_behind(folder, image="another cell")
    image = Image(np.zeros((64, 64), np.uint8), name="cell")
    dock = open_dock(image)
    wait(lambda: bool(dock.unsaved.offers))
    assert "of image 'another cell'" in dock.unsaved.text.text()
    dock.unsaved.restore.click()
    back = dock.viewer.layers[-1]
    assert np.array_equal(back.data, labels)
    assert dock.pairs.pairs()[0].annotation is not back  # of another shape
    dock.pairs.set_annotation(0, back)
    dock.train()
    assert "must have the image's shape (64, 64), got (300, 400)" in dock.coach.text()
    assert dock.link.state == "idle"
    assert np.array_equal(back.data, labels)


def test_later_keeps_and_discard_asks(
    open_dock: Any, folder: Path, wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_behind(folder)
    dock = open_dock()
    wait(lambda: bool(dock.unsaved.offers))
    dock.unsaved.later.click()
    assert not dock.unsaved.isVisibleTo(dock)
    dock = open_dock()
    wait(lambda: bool(dock.unsaved.offers))
    answers = [QMessageBox.StandardButton.Cancel, QMessageBox.StandardButton.Discard]
    monkeypatch.setattr(QMessageBox, "exec", lambda _: answers.pop(0))
    dock.unsaved.discard.click()
    assert newest(folder) is not None
    dock.unsaved.discard.click()
    assert newest(folder) is None


def test_nothing_is_offered_after_a_save_by_napari(
    open_dock: Any, folder: Path, wait: Any, tmp_path: Path
) -> None:
    dock = open_dock(cell())
    dock.pairs.want_annotations()
    layer = dock.pairs.pairs()[0].annotation
    layer.paint((50, 60), 1)
    wait(lambda: saved(folder, layer.data))
    dock.viewer.layers.selection = {layer}
    assert dock.viewer.layers.save(str(tmp_path / "mine.tif"), selected=True)
    layer.refresh()  # as when the user moves to another plane
    wait(lambda: newest(folder) is None)
    dock.unsaved.autosave.flush()
    assert newest(folder) is None
    layer.paint((90, 90), 1)
    wait(lambda: saved(folder, layer.data))


def test_two_viewers_do_not_offer_each_others_work(
    open_dock: Any, folder: Path, wait: Any
) -> None:
    one = open_dock(cell())
    one.pairs.want_annotations()
    one.pairs.pairs()[0].annotation.paint((50, 60), 1)
    wait(lambda: newest(folder) is not None)
    two = open_dock(cell())
    two.unsaved.autosave.flush()
    assert two.unsaved.autosave.store.offers() == ([], [])


def test_a_failed_save_is_told_once(
    open_dock: Any, folder: Path, told: list[str], wait: Any
) -> None:
    folder.write_bytes(b"")  # no folder can be made here
    dock = open_dock(cell())
    dock.pairs.want_annotations()
    layer = dock.pairs.pairs()[0].annotation
    layer.paint((50, 60), 1)
    wait(lambda: bool(told))
    for _ in range(3):
        layer.paint((90, 60), 1)
        dock.unsaved.autosave.flush()
    assert len(told) == 1
    assert "not being saved" in told[0]
    folder.unlink()
    wait(lambda: saved(folder, layer.data))


def test_a_damaged_file_is_told_once(
    open_dock: Any, folder: Path, told: list[str], wait: Any
) -> None:
    left_behind(folder)
    for path in folder.glob("*.strokes"):
        path.write_bytes(path.read_bytes()[:100])
    open_dock()
    wait(lambda: bool(told))
    assert "damaged" in told[0]
    assert len(list(folder.glob("*.bad"))) == 1


def test_labels_that_are_not_in_memory_are_let_alone(
    open_dock: Any, folder: Path
) -> None:
    lazy = Labels(dask.array.zeros(SHAPE, dtype=np.uint8, chunks=100), name="lazy")
    dock = open_dock(cell(), lazy)
    dock.unsaved.autosave.flush()
    assert "save it yourself" in dock.pairs.toolTip()
    assert newest(folder) is None


KILLED = Path(__file__).parents[2] / "benchmarks" / "kills.py"


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.skipif(not KILLED.exists(), reason="needs a source tree")
def test_a_killed_process_loses_no_saved_stroke(tmp_path: Path) -> None:
    environment = os.environ | {FOLDER: str(tmp_path / "killed")}
    found = subprocess.run(
        [sys.executable, str(KILLED), "--kills", "3", "--side", "1024"],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-500:] + found.stderr[-2000:]
    assert "kills 3, torn files 0" in found.stdout  # what is lost depends on the load


def trained_dock(open_dock: Any, wait: Any) -> TrainDock:
    """Return a dock that has trained a small network for some steps."""
    rng = np.random.default_rng(0)
    dock = open_dock(Image(rng.random((64, 96)), name="cell"))
    dock.pairs.want_annotations()
    layer = dock.pairs.pairs()[0].annotation
    layer.data[8:14, 8:60], layer.data[40:46, 8:60] = 1, 2
    layer.refresh()
    dock.network_box.setCurrentText("U-Net")
    dock.train()
    wait(lambda: dock.link.steps >= 3)
    dock.link.stop()
    wait(lambda: dock.link.state == "idle")
    return dock


def reopened(dock: TrainDock, open_dock: Any, wait: Any) -> TrainDock:
    """Close the dock; return one that offers what it trained."""
    dock.viewer.window.remove_dock_widget(dock)
    again = open_dock()
    wait(lambda: any(hasattr(o, "steps") for o in again.unsaved.offers))
    again.unsaved.offers = [o for o in again.unsaved.offers if hasattr(o, "steps")]
    again.unsaved._show()
    return again


def test_a_training_that_was_not_saved_is_offered_and_goes_on(
    open_dock: Any, folder: Path, wait: Any, tmp_path: Path
) -> None:
    dock = trained_dock(open_dock, wait)
    steps = dock.link.model.history[-1].step
    again = reopened(dock, open_dock, wait)
    assert f"trained for {steps:,} steps" in again.unsaved.text.text()
    again.unsaved.restore.click()
    wait(lambda: again.link.model is not None)
    wait(lambda: again.link.state == "idle")
    assert again.link.model.config.name == "unet"
    assert again.link.model.history[-1].step == steps
    assert list(folder.glob("*.safetensors"))  # until it is saved
    again.files.write(again.link.named(), str(tmp_path / "mine.safetensors"))
    wait(lambda: not list(folder.glob("*.safetensors")))
    assert (tmp_path / "mine.safetensors").exists()


@pytest.mark.parametrize(
    ("state", "offered"),
    [("idle", False), ("showing", False), ("training", True), ("paused", True)],
)
def test_a_saved_model_is_offered_only_if_training_goes_on(
    state: str, offered: bool, open_dock: Any, folder: Path, wait: Any
) -> None:
    dock = trained_dock(open_dock, wait)
    dock.link.state = state
    dock.files.saved.emit()
    assert bool(list(folder.glob("*.safetensors"))) is offered
    dock.link.state = "idle"


def test_a_training_can_be_discarded(
    open_dock: Any, folder: Path, wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = reopened(trained_dock(open_dock, wait), open_dock, wait)
    answers = iter(
        [QMessageBox.StandardButton.Cancel, QMessageBox.StandardButton.Discard]
    )
    monkeypatch.setattr(QMessageBox, "exec", lambda _: next(answers))
    again.unsaved.discard.click()
    assert list(folder.glob("*.safetensors"))
    again.unsaved.discard.click()
    assert not list(folder.glob("*.safetensors"))
    assert not again.unsaved.isVisibleTo(again)


def test_training_goes_on_where_no_checkpoint_can_be_kept(
    open_dock: Any, folder: Path, wait: Any, told: list[str]
) -> None:
    folder.parent.mkdir(exist_ok=True)
    folder.write_bytes(b"in the way")
    dock = trained_dock(open_dock, wait)
    assert dock.link.model is not None
    assert "not being saved by themselves" in " ".join(told)


def test_an_undo_in_a_hidden_layer_is_saved(
    open_dock: Any, folder: Path, wait: Any
) -> None:
    dock = open_dock(cell())
    dock.pairs.want_annotations()
    layer = dock.pairs.pairs()[0].annotation
    layer.paint((50, 60), 1)
    before = layer.data.copy()
    layer.paint((200, 300), 2)
    wait(lambda: saved(folder, layer.data))
    layer.visible = False
    layer.undo()
    assert np.array_equal(layer.data, before)
    wait(lambda: saved(folder, before))
