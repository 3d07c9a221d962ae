"""The depth panel moves by mouse and keys, and shows what each depth is worth."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
from qtpy.QtCore import QPoint, Qt
from qtpy.QtWidgets import QCheckBox, QLabel, QPushButton, QSlider, QTableWidget

from napari_unetpp._widgets.depths import UNKNOWN, DepthPanel

if TYPE_CHECKING:
    from pytestqt.qtbot import QtBot

LEFT = Qt.MouseButton.LeftButton


class Seen:
    """A depth panel on screen with four depths, its parts, and what it told."""

    def __init__(self, qtbot: QtBot) -> None:
        self.bot = qtbot
        self.widget = DepthPanel()
        qtbot.addWidget(self.widget)
        self.slider = self.widget.findChild(QSlider)
        self.table = self.widget.findChild(QTableWidget)
        self.mean = self.widget.findChild(QCheckBox)
        self.keep = self.widget.findChild(QPushButton)
        self.changed: list[tuple[int | None, str]] = []
        self.kept: list[int] = []
        self.widget.changed.connect(
            lambda: self.changed.append((self.widget.depth(), self.widget.heads()))
        )
        self.widget.keep.connect(self.kept.append)
        self.widget.set_depths((1, 2, 3, 4))
        self.widget.resize(338, 150)
        self.widget.show()
        qtbot.waitExposed(self.widget)

    def click(self, row: int) -> None:
        place = self.table.visualItemRect(self.table.item(row, 1)).center()
        self.bot.mouseClick(self.table.viewport(), LEFT, pos=place)

    def text(self, row: int) -> list[str]:
        return [self.table.item(row, column).text() for column in range(4)]

    def marked(self) -> list[str]:
        items = [self.table.item(row, 0) for row in range(self.table.rowCount())]
        bold = [item.text() for item in items if item.font().bold()]
        assert bold == [item.text() for item in items if item.isSelected()]
        return bold


@pytest.fixture
def seen(qtbot: QtBot) -> Seen:
    return Seen(qtbot)


def test_the_deepest_is_chosen_first_and_without_a_signal(seen: Seen) -> None:
    assert seen.widget.depth() == 4
    assert seen.widget.heads() == "last"
    assert seen.marked() == ["L4"]
    assert seen.changed == []


def test_arrow_keys_move_the_slider(seen: Seen) -> None:
    seen.bot.keyClick(seen.slider, Qt.Key.Key_Left)
    seen.bot.keyClick(seen.slider, Qt.Key.Key_Left)
    seen.bot.keyClick(seen.slider, Qt.Key.Key_Right)
    assert seen.changed == [(3, "last"), (2, "last"), (3, "last")]
    assert seen.marked() == ["L3"]


def test_a_click_on_a_row_moves_the_slider(seen: Seen) -> None:
    seen.click(1)
    assert seen.slider.value() == 1
    assert seen.changed == [(2, "last")]
    seen.click(1)
    assert len(seen.changed) == 1
    seen.bot.keyClick(seen.table, Qt.Key.Key_Up)
    assert seen.changed[1:] == [(1, "last")]


def test_a_click_beside_the_handle_jumps_to_the_depth(seen: Seen) -> None:
    for value in (0, 2, 1, 3):
        place = QPoint(seen.slider.stops()[value] + 4, seen.slider.height() // 2)
        seen.bot.mouseClick(seen.slider, LEFT, pos=place)
        assert seen.slider.value() == value
    assert [depth for depth, _ in seen.changed] == [1, 3, 2, 4]  # no stops between


def test_the_labels_stand_where_the_handle_stops(seen: Seen) -> None:
    for value, x in enumerate(seen.slider.stops()):
        seen.slider.setValue(value)
        middle = QPoint(x, seen.slider.height() // 2)
        seen.bot.mousePress(seen.slider, LEFT, pos=middle)
        assert seen.slider.isSliderDown()  # the press met the handle
        seen.bot.mouseRelease(seen.slider, LEFT, pos=middle)
        assert seen.slider.value() == value


def test_the_heads_are_averaged_on_demand(seen: Seen) -> None:
    place = QPoint(8, seen.mean.height() // 2)
    seen.bot.mouseClick(seen.mean, LEFT, pos=place)
    assert seen.changed == [(4, "mean")]
    seen.bot.keyClick(seen.mean, Qt.Key.Key_Space)
    assert seen.changed[1:] == [(4, "last")]


def test_keeping_tells_the_depth(seen: Seen) -> None:
    seen.click(1)
    seen.bot.mouseClick(seen.keep, LEFT)
    assert seen.kept == [2]
    seen.widget.set_keep_enabled(False)
    seen.bot.mouseClick(seen.keep, LEFT)
    assert seen.kept == [2]


def test_costs_and_scores_stand_in_their_row(seen: Seen) -> None:
    assert seen.text(1) == ["L2", UNKNOWN, UNKNOWN, UNKNOWN]
    seen.widget.set_cost(2, 8.53, 1512.4)
    seen.widget.set_score(2, 0.8749)
    seen.widget.set_cost(3, 1840.7, float("nan"))
    assert seen.text(1) == ["L2", "8.5", "1,512", "0.87"]
    assert seen.text(2) == ["L3", "1,841", UNKNOWN, UNKNOWN]
    assert "never saw" in seen.table.item(1, 3).toolTip()
    seen.widget.set_score(2, 0.8749, "0.80 to 0.94: <b>sky</b> 0.9")
    assert seen.table.item(1, 3).toolTip() == "0.80 to 0.94: &lt;b&gt;sky&lt;/b&gt; 0.9"
    seen.widget.set_score(2, None)
    assert "never saw" in seen.table.item(1, 3).toolTip()
    seen.widget.set_score(3, 0.5)
    seen.widget.clear_scores()
    seen.widget.clear_costs()
    assert seen.text(1) == ["L2", UNKNOWN, UNKNOWN, UNKNOWN]
    assert seen.changed == []


def test_the_choice_stays_while_it_exists(seen: Seen) -> None:
    seen.click(1)
    seen.widget.set_depths((1, 2, 3))
    assert seen.widget.depth() == 2
    seen.widget.set_depths((4,))
    seen.widget.set_depths((1, 2, 3, 4))
    assert seen.widget.depth() == 2
    seen.widget.set_depths((3, 4))
    assert seen.widget.depth() == 4
    assert seen.marked() == ["L4"]
    assert seen.changed == [(2, "last")]


@pytest.mark.parametrize("depths", [(), (1,), (4,)])
def test_a_network_of_one_depth_says_so(seen: Seen, depths: tuple[int, ...]) -> None:
    seen.mean.setChecked(True)
    seen.widget.set_depths(depths)
    assert seen.widget.depth() is None
    assert seen.widget.heads() == "last"
    assert not seen.slider.isVisible()
    assert not seen.table.isVisible()
    texts = [x.text() for x in seen.widget.findChildren(QLabel) if x.isVisible()]
    assert texts == ["This network has one depth."]


def test_it_is_flat_enough_for_the_dock(seen: Seen) -> None:
    assert seen.widget.sizeHint().height() <= 150
    assert seen.widget.minimumSizeHint().width() <= 338
    last = seen.table.visualItemRect(seen.table.item(3, 3))
    assert seen.table.viewport().rect().contains(last)


def test_nothing_keeps_it_alive(qtbot: QtBot) -> None:  # noqa: ARG001
    alive = weakref.ref(DepthPanel())
    gc.collect()
    assert alive() is None


def test_every_control_says_what_it_is(seen: Seen) -> None:
    for control in (seen.slider, seen.table, seen.mean, seen.keep):
        assert control.accessibleName() or control.text()
        assert control.toolTip()
        assert control.focusPolicy() & Qt.FocusPolicy.TabFocus
