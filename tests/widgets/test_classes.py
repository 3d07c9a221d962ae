"""The class table takes good names, refuses bad ones in words, and tells the choice."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
from qtpy.QtCore import Qt
from qtpy.QtWidgets import QApplication, QLineEdit, QPushButton, QTableWidget

from napari_unetpp._widgets.classes import MOST, ClassTable, problem_of

if TYPE_CHECKING:
    from pytestqt.qtbot import QtBot

LEFT = Qt.MouseButton.LeftButton


class Seen:
    """A class table on screen, its parts, and what it told."""

    def __init__(self, qtbot: QtBot) -> None:
        self.bot = qtbot
        self.widget = ClassTable()
        qtbot.addWidget(self.widget)
        self.table = self.widget.findChild(QTableWidget)
        self.add, self.remove = self.widget.findChildren(QPushButton)
        self.changed: list[tuple[str, ...]] = []
        self.picked: list[int] = []
        self.refused: list[str] = []
        self.widget.changed.connect(lambda: self.changed.append(self.widget.names()))
        self.widget.picked.connect(self.picked.append)
        self.widget.refused.connect(self.refused.append)
        self.widget.resize(338, 110)
        self.widget.show()
        qtbot.waitExposed(self.widget)

    def click(self, row: int, column: int = 1) -> None:
        place = self.table.visualItemRect(self.table.item(row, column)).center()
        self.bot.mouseClick(self.table.viewport(), LEFT, pos=place)

    def double_click(self, row: int) -> QLineEdit:
        self.click(row)
        place = self.table.visualItemRect(self.table.item(row, 1)).center()
        self.bot.mouseDClick(self.table.viewport(), LEFT, pos=place)
        return self.editor()

    def editor(self) -> QLineEdit:
        editor = self.table.findChild(QLineEdit)
        assert editor is not None
        return editor

    def text(self, row: int) -> list[str]:
        return [self.table.item(row, column).text() for column in range(4)]


@pytest.fixture
def seen(qtbot: QtBot) -> Seen:
    return Seen(qtbot)


def test_there_are_two_classes_to_begin_with(seen: Seen) -> None:
    assert seen.widget.names() == ("background", "foreground")
    assert seen.text(0) == ["1 ◂", "background", "0", "0"]
    assert seen.text(1)[0] == "2"


def test_a_double_click_renames(seen: Seen) -> None:
    editor = seen.double_click(1)
    editor.selectAll()
    seen.bot.keyClicks(editor, " nucleus ")
    seen.bot.keyClick(editor, Qt.Key.Key_Return)
    seen.bot.waitUntil(lambda: seen.changed == [("background", "nucleus")])
    assert seen.text(1)[1] == "nucleus"
    assert seen.refused == []
    assert seen.picked == [2]  # by the first click; Return ended the edit only


def test_f2_renames_and_escape_does_not(seen: Seen) -> None:
    seen.table.setFocus()
    seen.table.setCurrentCell(0, 1)
    seen.bot.keyClick(seen.table, Qt.Key.Key_F2)
    seen.bot.keyClicks(seen.editor(), "x")
    seen.bot.keyClick(seen.editor(), Qt.Key.Key_Escape)
    assert seen.widget.names()[0] == "background"
    assert seen.changed == []


def test_the_same_name_twice_is_refused_in_words(seen: Seen) -> None:
    editor = seen.double_click(1)
    editor.selectAll()
    seen.bot.keyClicks(editor, "background")
    seen.bot.keyClick(editor, Qt.Key.Key_Return)
    seen.bot.waitUntil(lambda: len(seen.refused) == 1)
    assert seen.refused[0].startswith("Another class is called background.")
    assert seen.text(1)[1] == "foreground"
    assert seen.changed == []


@pytest.mark.parametrize("name", ["", "  ", "x" * 65, "a\nb", "a\u202eb", "a\u2028b"])
def test_names_that_a_model_file_would_not_take_are_refused(
    seen: Seen, name: str
) -> None:
    seen.widget.rename(0, name)
    assert len(seen.refused) == 1
    assert seen.widget.names()[0] == "background"


@pytest.mark.parametrize("name", ["x" * 64, "Kern, groß", "细胞核", "می\u200cخواهم"])  # noqa: RUF001
def test_names_in_any_writing_are_taken(name: str) -> None:
    assert problem_of(name, ()) is None


def test_a_long_name_is_edited_in_full(seen: Seen) -> None:
    seen.widget.set_names(("background", "n" * 80))
    assert len(seen.text(1)[1]) == 64
    assert seen.widget.names()[1] == "n" * 80
    assert seen.double_click(1).text() == "n" * 80


def test_a_click_enter_and_the_number_pick_a_class(seen: Seen) -> None:
    seen.click(1)
    assert seen.picked == [2]
    seen.bot.keyClick(seen.table, Qt.Key.Key_Up)
    assert seen.picked == [2]  # the arrow only moves
    seen.bot.keyClick(seen.table, Qt.Key.Key_Return)
    assert seen.picked == [2, 1]
    seen.bot.keyClick(seen.table, "2")
    seen.bot.keyClick(seen.table, "3")  # there is none
    assert seen.picked == [2, 1, 2]
    assert seen.text(1)[0] == "2 ◂"
    assert seen.table.item(1, 1).font().bold()
    assert not seen.table.item(0, 1).font().bold()


def test_what_a_program_sets_gives_no_signal(seen: Seen) -> None:
    seen.widget.set_names(("a", "b", "c"))
    seen.widget.set_counts((1, 2, 3), (1, 1, 1))
    seen.widget.pick(3)
    seen.widget.pick(9)
    assert seen.text(2) == ["3 ◂", "c", "3", "1"]
    assert (seen.changed, seen.picked, seen.refused) == ([], [], [])


def test_a_class_is_added_and_named_at_once(seen: Seen) -> None:
    seen.bot.mouseClick(seen.add, LEFT)
    assert seen.changed == [("background", "foreground", "class 3")]
    editor = seen.editor()
    editor.selectAll()
    seen.bot.keyClicks(editor, "debris")
    seen.bot.keyClick(editor, Qt.Key.Key_Return)
    seen.bot.waitUntil(lambda: seen.widget.names()[-1] == "debris")


def test_no_more_classes_than_an_annotation_can_hold(seen: Seen) -> None:
    names = tuple(f"c{i}" for i in range(MOST))
    seen.widget.set_names(names)
    seen.bot.mouseClick(seen.add, LEFT)
    assert seen.widget.names() == names
    assert "255" in seen.refused[0]


def test_only_the_last_class_without_pixels_is_removed(seen: Seen) -> None:
    seen.widget.set_names(("background", "nucleus", "debris"))
    seen.widget.set_counts((9, 312, 1), (1, 3, 1))
    seen.widget.pick(3)
    seen.bot.mouseClick(seen.remove, LEFT)
    assert seen.refused == [
        "Class debris has 1 painted pixel. Erase them first; the others can be renamed."
    ]
    seen.widget.set_counts((9, 312, 0), (1, 3, 0))
    seen.bot.mouseClick(seen.remove, LEFT)
    assert seen.changed == [("background", "nucleus")]
    assert seen.picked == [2]  # class 3, which was painted with, is gone
    seen.bot.mouseClick(seen.remove, LEFT)
    assert len(seen.refused) == 2
    assert seen.widget.names() == ("background", "nucleus")


def test_nothing_is_removed_while_it_is_forbidden(seen: Seen) -> None:
    seen.widget.set_names(("a", "b", "c"))
    seen.widget.set_removable(False)
    seen.bot.mouseClick(seen.remove, LEFT)
    assert seen.widget.names() == ("a", "b", "c")


@pytest.mark.parametrize(
    ("pixels", "text"), [(0, "0"), (12345, "12,345"), (1_234_567, "1.2 M")]
)
def test_pixels_are_short_to_read(seen: Seen, pixels: int, text: str) -> None:
    seen.widget.set_counts((pixels,), (1,))
    assert seen.text(0)[2] == text
    assert seen.text(1)[2] == "0"


def test_counts_leave_an_edit_alone(seen: Seen) -> None:
    editor = seen.double_click(1)
    editor.selectAll()
    seen.bot.keyClicks(editor, "nuc")
    seen.widget.set_counts((5, 6), (1, 1))
    seen.bot.keyClicks(editor, "leus")
    seen.bot.keyClick(editor, Qt.Key.Key_Return)
    seen.bot.waitUntil(lambda: seen.widget.names()[1] == "nucleus")


def test_a_name_is_never_markup(seen: Seen) -> None:
    name = '<img src="file:///x">'
    seen.widget.set_names(("background", name))
    assert seen.text(1)[1] == name
    assert "<img" not in seen.table.item(1, 1).toolTip()


def test_tab_leaves_the_table(seen: Seen) -> None:
    seen.widget.activateWindow()
    seen.table.setFocus()
    seen.bot.waitUntil(seen.table.hasFocus)
    for control in (seen.add, seen.remove):
        seen.bot.keyClick(QApplication.focusWidget(), Qt.Key.Key_Tab)
        assert QApplication.focusWidget() is control


def test_nothing_keeps_it_alive(qtbot: QtBot) -> None:  # noqa: ARG001
    alive = weakref.ref(ClassTable())
    gc.collect()
    assert alive() is None


def test_every_control_says_what_it_is(seen: Seen) -> None:
    for control in (seen.table, seen.add, seen.remove):
        assert control.accessibleName()
        assert control.toolTip()
