"""Rounds to go back to, and a project that brings all of it back in a new viewer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
from napari.layers import Image, Labels
from qtpy.QtWidgets import QApplication

from napari_unetpp import api, io
from napari_unetpp._widgets.pairs import Pair
from napari_unetpp._widgets.train_dock import TrainDock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def picture() -> np.ndarray:
    """Return a bright disc on noise."""
    y, x = np.mgrid[:64, :64]
    inside = np.hypot(y - 32, x - 32) < 16
    noise = np.random.default_rng(0).random((64, 64))
    return (100 * inside + 20 * noise).astype(np.uint8)


def strokes() -> np.ndarray:
    marks = np.zeros((64, 64), np.uint8)
    marks[3:6, 4:40], marks[30:34, 24:40] = 1, 2
    return marks


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What napari would show as notifications."""
    texts: list[str] = []
    for name in ("train_dock.show_error", "train_dock.show_info", "projects.show_info"):
        monkeypatch.setattr(f"napari_unetpp._widgets.{name}", texts.append)
    return texts


@pytest.fixture
def open_dock(
    make_napari_viewer: Any,
    told: list[str],  # noqa: ARG001  # no notification in any test
) -> Callable[..., TrainDock]:
    """Open the dock in a new viewer with the given layers."""

    def make(*layers: Any) -> TrainDock:
        viewer = make_napari_viewer()
        for layer in layers:
            viewer.add_layer(layer)
        dock = TrainDock(viewer)
        viewer.window.add_dock_widget(dock, name="dock")
        for layer in layers:
            if isinstance(layer, Labels):
                dock.pairs.set_annotation(0, layer)
        dock.network_box.setCurrentText("U-Net")
        dock.size_box.setCurrentText("small")
        dock.advanced._patch.setValue(32)
        dock.advanced._device.setCurrentText("CPU")
        QApplication.processEvents()
        return dock

    return make


def train(dock: TrainDock, wait: Any) -> None:
    before = len(dock.projects.rounds)
    dock.train()
    assert dock.link.state == "training", dock.coach.text()
    wait(lambda: dock.link.steps > dock.link._before)
    dock.link.stop()
    wait(lambda: len(dock.projects.rounds) == before + 1)
    wait(lambda: dock.link.state == "idle")


def actions(dock: TrainDock) -> list[Any]:
    dock.projects.fill()
    return [a for a in dock.projects.menu.actions() if a.isCheckable()]


def weights(model: Any) -> np.ndarray:
    return next(iter(model.network.state_dict().values())).numpy().copy()


@pytest.mark.parametrize("planes", [0, 2])
def test_one_goes_back_and_no_stroke_is_lost(
    wait: Any, open_dock: Any, planes: int
) -> None:
    image, first = picture(), strokes()
    if planes:
        image, first = np.stack([image] * planes), np.stack([first, 0 * first])
    layer = Labels(first.copy())
    dock = open_dock(Image(image), layer)
    assert actions(dock) == []
    train(dock, wait)
    one = weights(dock.link.model)
    layer.data_setitem(np.nonzero(layer.data == 2), 0)
    layer.data_setitem(np.nonzero(np.roll(first, 9, -1) == 2), 2)
    second = layer.data.copy()
    train(dock, wait)
    two = weights(dock.link.model)
    layer.data_setitem(tuple(np.array([i]) for i in (0,) * layer.ndim), 1)
    third = layer.data.copy()
    newest, oldest = actions(dock)
    assert newest.isChecked()
    assert "steps" in oldest.text()
    oldest.trigger()
    np.testing.assert_array_equal(layer.data, first)
    np.testing.assert_array_equal(weights(dock.link.model), one)
    assert dock.projects.current is dock.projects.rounds[0]
    assert len(dock.projects.rounds) == 3  # what was painted last is one, too
    layer.undo()  # in one step
    np.testing.assert_array_equal(layer.data, third)
    layer.redo()
    wait(lambda: dock.link.state == "idle")
    actions(dock)[1].trigger()
    np.testing.assert_array_equal(layer.data, second)
    np.testing.assert_array_equal(weights(dock.link.model), two)
    assert len(dock.projects.rounds) == 3  # nothing new that would be lost
    wait(lambda: dock.link.state == "idle")
    actions(dock)[0].trigger()
    np.testing.assert_array_equal(layer.data, third)
    wait(lambda: dock.link.state == "idle")
    train(dock, wait)  # goes on from there


def test_a_project_brings_all_back_in_a_new_viewer(
    wait: Any, open_dock: Any, told: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "cells.tif"
    tifffile.imwrite(path, picture())
    place = {"scale": (0.5, 0.25), "translate": (3, 4), "units": ("um", "um")}
    (image,) = [Image(picture(), name="cells", **place)]
    image.metadata["napari-unetpp path"] = str(path)
    layer = Labels(strokes(), name="mine", **place)
    dock = open_dock(image, layer)
    train(dock, wait)
    folder = tmp_path / "project"
    dock.projects._save_in(folder)
    wait(lambda: dock.projects.folder == folder)
    assert not any("in no file" in text for text in told)
    assert dock.projects.rounds[0].disk == 1
    layer.data_setitem(np.nonzero(np.roll(strokes(), 9, 1) == 2), 2)
    train(dock, wait)  # is on the disk by itself
    wait(lambda: dock.projects.rounds[1].disk == 2)
    newest = weights(dock.link.model)
    dock.shut_down()

    again = open_dock()
    again.projects.read(folder)
    wait(lambda: again.link.model is not None)
    (pair,) = again.pairs.pairs()
    np.testing.assert_array_equal(pair.images[0].data, picture())
    np.testing.assert_array_equal(pair.annotation.data, layer.data)
    for each in (pair.images[0], pair.annotation):
        assert tuple(each.scale) == (0.5, 0.25)
        assert tuple(each.translate) == (3, 4)
        assert [str(u) for u in each.units] == ["micrometer"] * 2
    np.testing.assert_array_equal(weights(again.link.model), newest)
    wait(lambda: again.link.state == "idle")
    assert [a.isChecked() for a in actions(again)] == [True, False]
    actions(again)[1].trigger()  # its model is on the disk alone
    wait(lambda: again.projects.current is again.projects.rounds[0])
    np.testing.assert_array_equal(pair.annotation.data, strokes())
    wait(lambda: api.load_project(folder).current == 1)
    wait(lambda: again.link.state == "idle")
    again.projects.save()
    told.clear()
    wait(lambda: any("Saved the project" in text for text in told))
    assert [r.number for r in api.load_project(folder).rounds] == [1, 2]


def test_an_image_without_a_file_is_stored_and_that_is_told(
    wait: Any, open_dock: Any, told: list[str], tmp_path: Path
) -> None:
    colours = np.stack([picture()] * 3, axis=-1)
    dock = open_dock(Image(colours, rgb=True, name="a/b"), Labels(strokes()))
    dock.projects._save_in(tmp_path / "p")
    wait(lambda: dock.projects.folder is not None)
    assert any("in no file" in text for text in told)
    again = open_dock()
    again.projects.read(tmp_path / "p")
    wait(lambda: bool(again.pairs.pairs()))
    (pair,) = again.pairs.pairs()
    assert pair.images[0].rgb
    np.testing.assert_array_equal(pair.images[0].data, colours)
    np.testing.assert_array_equal(pair.annotation.data, strokes())


def test_what_goes_wrong_is_told_and_the_round_stays_in_memory(
    wait: Any, open_dock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dock = open_dock(Image(picture()), Labels(strokes()))
    folder = tmp_path / "p"
    dock.projects._save_in(folder)
    wait(lambda: dock.projects.folder is not None)
    with io.lock(folder):
        train(dock, wait)
        wait(lambda: "being written by another" in dock.coach.text())
    assert dock.projects.rounds[0].disk is None
    dock.projects.save()
    wait(lambda: dock.projects.rounds[0].disk == 1)
    other = tmp_path / "other"
    api.save_project(other, picture(), strokes())
    ask = "napari_unetpp._widgets.projects.QFileDialog.getExistingDirectory"
    monkeypatch.setattr(ask, lambda *_: str(other))
    dock.projects.ask_save()
    assert "holds another project" in dock.coach.text()
    dock.projects.read(tmp_path)
    wait(lambda: "is no project" in dock.coach.text())


def test_a_unit_that_napari_does_not_know_is_left_out(
    wait: Any, open_dock: Any, tmp_path: Path
) -> None:
    odd = api.ProjectImage(
        "a", (None,), data=(picture(),), scale=(2, 2), units=("nope", "none")
    )
    api.save_project(tmp_path / "p", odd, strokes())
    dock = open_dock()
    dock.projects.read(tmp_path / "p")
    wait(lambda: bool(dock.pairs.pairs()))
    assert tuple(dock.pairs.pairs()[0].images[0].scale) == (2, 2)


def test_two_channels_come_back_as_two_layers(
    wait: Any, open_dock: Any, tmp_path: Path
) -> None:
    one, two = Image(picture(), name="one"), Image(picture()[::-1], name="two")
    layer = Labels(strokes())
    dock = open_dock(one, two, layer)
    dock.pairs.set_pairs([Pair((one, two), layer)])
    dock.projects._save_in(tmp_path / "p")
    wait(lambda: dock.projects.folder is not None)
    again = open_dock()
    again.projects.read(tmp_path / "p")
    wait(lambda: bool(again.pairs.pairs()))
    (pair,) = again.pairs.pairs()
    for back, given in zip(pair.images, (one, two), strict=True):
        np.testing.assert_array_equal(back.data, given.data)
    np.testing.assert_array_equal(pair.annotation.data, strokes())
