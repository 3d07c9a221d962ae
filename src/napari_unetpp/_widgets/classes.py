"""The class table: names and colours of the classes, and what is painted of each."""

from __future__ import annotations

import html
import unicodedata
from typing import TYPE_CHECKING, Any

from qtpy.QtCore import QModelIndex, QSize, Qt, Signal
from qtpy.QtGui import QColor, QIcon, QKeyEvent, QPixmap
from qtpy.QtWidgets import (
    QAbstractItemView,
    QHBoxLayout,
    QHeaderView,
    QLabel,
    QLineEdit,
    QPushButton,
    QSizePolicy,
    QStyledItemDelegate,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_unetpp._widgets._layers import colour_of
from napari_unetpp._widgets.tables import set_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LONGEST = 64  # characters of a name, as in a model file
MOST = 255  # classes, as in a uint8 annotation
_ROWS = 3  # visible ones
_SWATCH = 12  # px
_NUMBER, _NAME, _PIXELS, _STROKES = range(4)
_HEADER = (
    ("key", "The number of the class: press this key in the table to paint with it."),
    ("class", "Double click or press F2 to rename."),
    ("pixels", "Annotated pixels of the class, all images together."),
    ("strokes", "Annotated regions of the class: connected pixels count as one."),
)


def problem_of(name: str, others: Iterable[str]) -> str | None:
    """Return why `name` cannot be the name of a class, None if it can."""
    if not name.strip():
        return "A class needs a name of 1 to 64 characters, got none. Type one."
    if len(name) > LONGEST:
        return (
            f"A class name has at most {LONGEST} characters, got {len(name)}. "
            "Choose a shorter one."
        )
    # The two joiners are letters of Persian, Hindi and of composed emoji.
    letters = name.replace("\u200c", "").replace("\u200d", "")
    if {"Cc", "Cf", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, letters)):
        return (
            "A class name has only characters that can be seen, got hidden ones. "
            "Type it again."
        )
    if name in others:
        return f"Another class is called {name}. Choose a name of its own."
    return None


def are_names(names: object) -> bool:
    """Return whether these can be the names of all classes."""
    if not isinstance(names, (list, tuple)) or not 2 <= len(names) <= 255:
        return False
    return all(
        isinstance(n, str) and problem_of(n, names[:i]) is None
        for i, n in enumerate(names)
    )


def shown(count: int) -> str:
    """Return a number of pixels in few characters."""
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"


class ClassTable(QWidget):
    """The classes of a model, with what is painted of each.

    Attributes
    ----------
    changed : Signal
        A class was added, renamed or removed by the user.
    picked : Signal of int
        The user chose a class value to paint with, from 1.
    refused : Signal of str
        Why an edit was not taken, in words.
    """

    changed = Signal()
    picked = Signal(int)
    refused = Signal(str)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._names: list[str] = []
        self._pixels: list[int] = []
        self._strokes: list[int] = []
        self._value = 1
        self._removable = True
        self._table = _Table(self)
        self._table.chosen.connect(self._choose)
        self._table.setItemDelegateForColumn(_NAME, _NameDelegate(self))
        self._add = QPushButton("Add")
        self._add.setToolTip(f"Add a class and name it (at most {MOST} classes).")
        self._add.setAccessibleName("Add a class")
        self._add.clicked.connect(self._add_and_name)
        self._remove = QPushButton("Remove")
        self._remove.setAccessibleName("Remove the last class")
        self._remove.clicked.connect(self._remove_last)
        title = QLabel("Classes")
        title.setTextFormat(Qt.TextFormat.PlainText)
        title.setBuddy(self._table)
        line = QHBoxLayout()
        line.setContentsMargins(0, 0, 0, 0)
        line.addWidget(title, 1)
        line.addWidget(self._add)
        line.addWidget(self._remove)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(2)
        layout.addLayout(line)
        layout.addWidget(self._table)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)
        QWidget.setTabOrder(self._table, self._add)
        QWidget.setTabOrder(self._add, self._remove)
        self.set_names(("background", "foreground"))
        self.set_removable(True)

    def names(self) -> tuple[str, ...]:
        """Return the names; class value v is called `names()[v - 1]`."""
        return tuple(self._names)

    def set_names(self, names: Sequence[str]) -> None:
        """Show other classes, without a signal."""
        self._names = list(names)
        n = len(self._names)
        self._pixels = (self._pixels + [0] * n)[:n]
        self._strokes = (self._strokes + [0] * n)[:n]
        self._value = min(self._value, max(n, 1))
        self._show()

    def set_counts(self, pixels: Sequence[int], strokes: Sequence[int]) -> None:
        """Show the annotated pixels and strokes of each class."""
        n = len(self._names)
        self._pixels = (list(map(int, pixels)) + [0] * n)[:n]
        self._strokes = (list(map(int, strokes)) + [0] * n)[:n]
        self._show()

    def pick(self, value: int) -> None:
        """Mark the class that is painted with, without a signal."""
        if 1 <= value <= len(self._names):
            self._value = value
            self._show()
            self._table.setCurrentCell(value - 1, _NAME)

    def add(self, name: str | None = None) -> None:
        """Add a class as the user does; without a name it gets one to be changed."""
        n = len(self._names)
        if n >= MOST:
            self.refused.emit(f"A model has at most {MOST} classes, and these are.")
            return
        if name is None:
            name = next(
                new
                for i in range(n + 1, 2 * n + 2)
                if (new := f"class {i}") not in self._names
            )
        name = name.strip()
        if problem := problem_of(name, self._names):
            self.refused.emit(problem)
            return
        self.set_names([*self._names, name])
        self._table.scrollToBottom()
        self.changed.emit()

    def set_removable(self, removable: bool) -> None:
        """Allow or forbid to remove classes, for example while training runs."""
        self._removable = removable
        self._remove.setEnabled(removable)
        self._remove.setToolTip(
            "Remove the last class; it must have no painted pixels."
            if removable
            else "Classes can be removed after Start over, while nothing is learned."
        )

    def _choose(self, value: int) -> None:
        if value <= len(self._names):
            self.pick(value)
            self.picked.emit(value)

    def _add_and_name(self) -> None:
        n = len(self._names)
        self.add()
        if len(self._names) > n:
            self._table.setCurrentCell(n, _NAME)
            self._table.editItem(self._table.item(n, _NAME))

    def _remove_last(self) -> None:
        if len(self._names) <= 2:
            self.refused.emit("A model needs two classes. Rename these instead.")
            return
        name, pixels = self._names[-1], self._pixels[-1]
        if pixels:
            self.refused.emit(
                f"Class {name} has {pixels:,} painted pixel{'s' * (pixels != 1)}. "
                "Erase them first; the others can be renamed."
            )
            return
        gone = len(self._names)
        was_picked = self._value == gone
        self.set_names(self._names[:-1])
        self.changed.emit()
        if was_picked:  # nobody may go on painting with a class that is gone
            self._choose(gone - 1)

    def rename(self, row: int, name: str) -> None:
        """Give a class another name as the user does, or tell why not."""
        name = name.strip()
        if name == self._names[row]:
            return
        others = self._names[:row] + self._names[row + 1 :]
        if problem := problem_of(name, others):
            self.refused.emit(problem)
            return
        self._names[row] = name
        self._show()
        self.changed.emit()

    def _show(self) -> None:
        self._table.setRowCount(len(self._names))
        for row, name in enumerate(self._names):
            pixels, strokes = self._pixels[row], self._strokes[row]
            picked = row + 1 == self._value
            number = f"{row + 1} ◂" if picked else str(row + 1)
            texts = (number, name, shown(pixels), f"{strokes:,}")
            spoken = f"class {row + 1}, {name}, {pixels} pixels, {strokes} strokes"
            spoken += ", painted with now" if picked else ""
            for column, text in enumerate(texts):
                item = self._table.cell(row, column)
                item.setText(text if len(text) <= LONGEST else text[:63] + "…")
                item.setData(Qt.ItemDataRole.AccessibleTextRole, spoken)
                font = item.font()
                font.setBold(picked)
                item.setFont(font)
            self._table.cell(row, _NUMBER).setIcon(_swatch(row + 1))
            self._table.cell(row, _NAME).setToolTip(
                f"<p>{html.escape(name[:LONGEST])}</p>"
                "<p>Click to paint with it; double click or F2 to rename.</p>"
            )
            self._table.cell(row, _PIXELS).setToolTip(f"{pixels:,} annotated pixels")


class _Table(QTableWidget):
    """The rows; tells which class the user chose by click, Enter or its number."""

    chosen = Signal(int)

    def __init__(self, parent: QWidget) -> None:
        super().__init__(0, len(_HEADER), parent)
        self.setAccessibleName("Classes")
        self.setAccessibleDescription("Enter paints with a class, F2 renames it.")
        self.setToolTip("Click a class to paint with it.")
        row = set_up(self, _HEADER, _alignment)
        self.setEditTriggers(
            QAbstractItemView.EditTrigger.DoubleClicked
            | QAbstractItemView.EditTrigger.EditKeyPressed
        )
        self.setIconSize(QSize(_SWATCH, _SWATCH))
        self.setStyleSheet("QLineEdit { min-height: 0px; padding: 0px; }")
        header = self.horizontalHeader()
        header.setSectionResizeMode(QHeaderView.ResizeMode.ResizeToContents)
        header.setSectionResizeMode(_NAME, QHeaderView.ResizeMode.Stretch)
        self.setFixedHeight((_ROWS + 1) * row + 4)
        self.cellClicked.connect(self._on_click)

    def _on_click(self, row: int, _column: int) -> None:
        self.chosen.emit(row + 1)

    def cell(self, row: int, column: int) -> QTableWidgetItem:
        """Return an item, made where there is none; only names can be edited."""
        item = self.item(row, column)
        if item is None:
            item = QTableWidgetItem()
            if column != _NAME:
                item.setFlags(item.flags() & ~Qt.ItemFlag.ItemIsEditable)
            item.setTextAlignment(_alignment(column))
            self.setItem(row, column, item)
        return item

    def keyPressEvent(self, event: QKeyEvent) -> None:
        """Choose by Enter or by number; the rest is Qt's."""
        key = Qt.Key(event.key())
        if self.state() == QAbstractItemView.State.EditingState:
            super().keyPressEvent(event)
        elif key in (Qt.Key.Key_Return, Qt.Key.Key_Enter) and self.currentRow() >= 0:
            self.chosen.emit(self.currentRow() + 1)
        elif event.text() in set("123456789"):
            self.chosen.emit(int(event.text()))
        else:
            super().keyPressEvent(event)


class _NameDelegate(QStyledItemDelegate):
    """Edits the full name, and leaves to the table whether it takes the new one."""

    def __init__(self, table: ClassTable) -> None:
        super().__init__(table)
        self._owner = table

    def createEditor(
        self, parent: QWidget, _option: Any, index: QModelIndex
    ) -> QWidget:
        editor = QLineEdit(parent)
        editor.setFrame(False)
        editor.setAccessibleName(f"Name of class {index.row() + 1}")
        return editor

    def setEditorData(self, editor: QLineEdit, index: QModelIndex) -> None:
        if not editor.isModified():  # new counts must not undo what is being typed
            editor.setText(self._owner.names()[index.row()])

    def setModelData(self, editor: QLineEdit, _model: Any, index: QModelIndex) -> None:
        self._owner.rename(index.row(), editor.text())


def _alignment(column: int) -> Qt.AlignmentFlag:
    left = column in (_NUMBER, _NAME)
    side = Qt.AlignmentFlag.AlignLeft if left else Qt.AlignmentFlag.AlignRight
    return side | Qt.AlignmentFlag.AlignVCenter


def _swatch(value: int) -> QIcon:
    pixmap = QPixmap(_SWATCH, _SWATCH)
    pixmap.fill(QColor(colour_of(value)))
    icon = QIcon(pixmap)
    icon.addPixmap(pixmap, QIcon.Mode.Selected)  # else tinted in the selected row
    return icon
