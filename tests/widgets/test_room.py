"""Both docks on a small screen, and the letters that Alt reaches."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from qtpy.QtCore import QPoint, QPointF, Qt
from qtpy.QtGui import QWheelEvent
from qtpy.QtWidgets import (
    QAbstractButton,
    QApplication,
    QDockWidget,
    QLabel,
    QScrollArea,
)

from napari_unetpp._widgets import _worker
from napari_unetpp._widgets.keys import KEYS
from napari_unetpp._widgets.predict_dock import PredictDock
from napari_unetpp._widgets.train_dock import TrainDock

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("Annotate and train", "Predict")


@pytest.fixture
def viewer(make_napari_viewer: Any, wait: Any) -> Iterator[Any]:
    viewer = make_napari_viewer(show=True)
    viewer.window._qt_window.resize(1366, 768)
    viewer.add_image(np.eye(16))
    yield viewer
    for dock in list(viewer.window.dock_widgets.values()):
        if isinstance(dock, PredictDock):
            dock._close()
        elif isinstance(dock, TrainDock):
            dock.shut_down()
    wait(lambda: _worker.busy_with() is None)


def opened(
    viewer: Any, kind: type, name: str, area: str = "right"
) -> tuple[QDockWidget, Any]:
    widget = kind(viewer)
    dock = viewer.window.add_dock_widget(widget, name=name, area=area)
    for _ in range(5):
        QApplication.processEvents()
    return dock, widget


@pytest.mark.parametrize("order", [(TrainDock, PredictDock), (PredictDock, TrainDock)])
def test_the_second_dock_is_a_tab_of_the_first(
    viewer: Any, wait: Any, order: tuple[type, type]
) -> None:
    window = viewer.window._qt_window
    strange = viewer.window.add_dock_widget(QLabel("another plugin"), name="other")
    first, _ = opened(viewer, order[0], "a")
    second, widget = opened(viewer, order[1], "b")
    assert window.tabifiedDockWidgets(first) == [second]
    assert window.tabifiedDockWidgets(strange) == []
    wait(lambda: not widget.visibleRegion().isEmpty())  # the new one is in front


def test_docks_on_two_sides_stay_there(viewer: Any) -> None:
    window = viewer.window._qt_window
    first, _ = opened(viewer, TrainDock, "a")
    opened(viewer, PredictDock, "b", area="left")
    assert window.tabifiedDockWidgets(first) == []


def test_nothing_grows_beyond_the_screen_and_nothing_is_cut(
    viewer: Any, wait: Any
) -> None:
    window = viewer.window._qt_window
    _, dock = opened(viewer, TrainDock, "a")
    _, predict = opened(viewer, PredictDock, "b")
    dock.advanced._fold.expand(False)
    for _ in range(5):
        QApplication.processEvents()
    assert (window.width(), window.height()) == (1366, 768)
    for widget in (dock, predict):
        area = widget.findChild(QScrollArea, options=Qt.FindDirectChildrenOnly)
        needs = area.widget().minimumSizeHint().width()
        assert area.minimumSizeHint().width() > needs
    area = dock.findChild(QScrollArea, options=Qt.FindDirectChildrenOnly)
    wait(lambda: area.verticalScrollBar().maximum() > 0)


def test_no_line_pushes_the_training_dock_out_of_view(viewer: Any) -> None:
    _, dock = opened(viewer, TrainDock, NAMES[0])
    dock.status.setText("Step 123,456 · 12.3 steps/s · 123:45 min · IoU 0.70 ± 0.18")
    dock.device.setText("Device: NVIDIA RTX 6000 Ada Generation, 47.3 GB free")
    dock.coach.setText("Paint where the prediction is wrong. " * 4)
    for _ in range(5):
        QApplication.processEvents()
    area = dock.findChild(QScrollArea)
    assert area.widget().width() <= area.viewport().width()


def letters(widgets: Any) -> list[str]:
    """Return what Alt reaches: the letters behind an &."""
    found = (re.search(r"&(\w)", widget.text()) for widget in widgets)
    return [match[1].lower() for match in found if match]


def test_no_letter_of_alt_is_given_twice(viewer: Any) -> None:
    menus = letters(viewer.window._qt_window.menuBar().actions())
    bar = {*menus, "d"}  # Debug is there only while napari is profiled
    assert {"f", "v", "w"} <= bar
    keys = [key[4:].lower() for key in KEYS if key.startswith("Alt-")]
    docks = []
    for kind, name in zip((TrainDock, PredictDock), NAMES, strict=True):
        _, dock = opened(viewer, kind, name)
        labels = [w for w in dock.findChildren(QLabel) if w.buddy()]
        docks += letters([*dock.findChildren(QAbstractButton), *labels])
    assert len(docks) >= 11
    assert len({*docks, *keys}) == len(docks) + len(keys)
    assert not bar & {*docks, *keys}


def test_the_wheel_scrolls_and_changes_no_value(viewer: Any) -> None:
    _, dock = opened(viewer, TrainDock, "a")
    for control in (dock.network_box, dock.advanced._seed, dock.depths._slider):
        control.clearFocus()
        event = QWheelEvent(
            QPointF(5, 5), QPointF(5, 5), QPoint(0, -120), QPoint(0, -120),
            Qt.MouseButton.NoButton, Qt.KeyboardModifier.NoModifier,
            Qt.ScrollPhase.NoScrollPhase, False,
        )  # fmt: skip
        QApplication.sendEvent(control, event)
    assert dock.network_box.currentIndex() == 0
    assert dock.advanced.seed() == 0
    assert dock.depths.depth() == 4
