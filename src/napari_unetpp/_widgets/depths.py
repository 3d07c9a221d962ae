"""The depth panel: which head of a UNet++ is shown, and what each depth costs."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

from qtpy.QtCore import QSize, Qt, Signal
from qtpy.QtGui import QMouseEvent, QPainter, QPaintEvent
from qtpy.QtWidgets import (
    QAbstractItemView,
    QCheckBox,
    QHBoxLayout,
    QHeaderView,
    QLabel,
    QPushButton,
    QSizePolicy,
    QSlider,
    QStyle,
    QStyleOptionSlider,
    QTableWidget,
    QTableWidgetItem,
    QVBoxLayout,
    QWidget,
)

from napari_unetpp._widgets.tables import set_up

if TYPE_CHECKING:
    from collections.abc import Sequence

UNKNOWN = "\N{EN DASH}"
_HEADER = (
    ("depth", "How deep the network is computed: L1 is the fastest."),
    ("ms/Mpx", "Milliseconds per megapixel, measured on this image and device."),
    ("MB", "Peak memory in megabytes, measured on this image and device."),
    (
        "score",
        "Estimated mean IoU on the whole images, 0 to 1, from painted pixels that "
        "training never saw; more is better.",
    ),
)


class DepthPanel(QWidget):
    """A slider over the depths of a network, with a table of what each is worth.

    Attributes
    ----------
    changed : Signal
        The user chose another depth or whether heads are averaged.
    keep : Signal of int
        The user wants the model that ends at this depth.
    """

    changed = Signal()
    keep = Signal(int)

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._depths: tuple[int, ...] = ()
        self._wish: int | None = None  # outlives networks of one depth
        self._cost: dict[int, tuple[float, float]] = {}
        self._score: dict[int, float | None] = {}
        self._words: dict[int, str] = {}
        self._single = QLabel("This network has one depth.")
        self._single.setTextFormat(Qt.TextFormat.PlainText)
        self._face = QWidget()
        self._make_controls()
        self._table = _table()
        self._table.currentCellChanged.connect(self._on_row)
        left = QVBoxLayout()
        left.setSpacing(1)
        left.addLayout(_line(QLabel("fast"), QLabel("accurate")))
        left.addWidget(self._slider)
        left.addWidget(self._ticks)
        left.addWidget(self._mean)
        left.addWidget(self._keep)
        left.addStretch(1)
        face = QHBoxLayout(self._face)
        face.setContentsMargins(0, 0, 0, 0)
        face.addLayout(left, 2)
        face.addWidget(self._table, 3, Qt.AlignmentFlag.AlignTop)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._single)
        layout.addWidget(self._face)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)
        self.set_depths(())

    def _make_controls(self) -> None:
        self._slider = DepthSlider()
        self._slider.setToolTip(
            "Depth of the network that is shown: L1 is the fastest. Nothing is trained "
            "again. Left and right arrow keys move it."
        )
        self._slider.setAccessibleName("Depth")
        self._slider.valueChanged.connect(self._on_slider)
        self._ticks = _Ticks(self._slider)
        self._mean = QCheckBox("mean of all")
        self._mean.setToolTip(
            "Average the outputs of every depth up to the chosen one: steadier, and "
            "as slow as the chosen depth."
        )
        self._mean.setAccessibleName("Mean of all depths up to the chosen one")
        self._mean.toggled.connect(self._on_mean)
        self._keep = QPushButton("Keep this depth…")
        self._keep.setToolTip(
            "Save a smaller model that ends at the chosen depth; it predicts the same "
            "and needs less memory."
        )
        self._keep.clicked.connect(self._on_keep)

    def set_depths(self, depths: Sequence[int]) -> None:
        """Offer these depths, without a signal.

        The chosen depth stays if it is among them, else the deepest is chosen. Of a
        single depth, or none, the panel says in one line that there is no choice.
        """
        self._depths = tuple(sorted(depths))
        choice = len(self._depths) > 1
        self._single.setVisible(not choice)
        self._face.setVisible(choice)
        if not choice:
            return
        if self._wish not in self._depths:
            self._wish = self._depths[-1]
        self._slider.blockSignals(True)
        self._slider.setRange(0, len(self._depths) - 1)
        self._slider.setValue(self._depths.index(self._wish))
        self._slider.blockSignals(False)
        self._table.setRowCount(len(self._depths))
        row = self._table.verticalHeader().defaultSectionSize()
        self._table.setFixedHeight((len(self._depths) + 1) * row + 4)
        self._show()

    def depth(self) -> int | None:
        """Return the chosen depth, None for a network without a choice."""
        return self._wish if len(self._depths) > 1 else None

    def heads(self) -> str:
        """Return "mean" if the heads up to the chosen depth are averaged, or "last"."""
        mean = len(self._depths) > 1 and self._mean.isChecked()
        return "mean" if mean else "last"

    def set_cost(self, depth: int, ms_per_megapixel: float, megabytes: float) -> None:
        """Show what a depth was measured to need."""
        self._cost[depth] = (ms_per_megapixel, megabytes)
        self._show()

    def set_score(self, depth: int, score: float | None, words: str = "") -> None:
        """Show the held-out score of a depth, None while it is unknown.

        The `words` say more about it; they are shown as they are, never as markup.
        """
        self._score[depth], self._words[depth] = score, words
        self._show()

    def clear_scores(self) -> None:
        """Forget all scores."""
        self._score.clear()
        self._words.clear()
        self._show()

    def clear_costs(self) -> None:
        """Forget what was measured, for another image, device or network."""
        self._cost.clear()
        self._show()

    def set_keep_enabled(self, enabled: bool) -> None:
        """Allow to keep a depth once there is a model."""
        self._keep.setEnabled(enabled)

    def _on_slider(self, index: int) -> None:
        self._wish = self._depths[index]
        self._show()
        self.changed.emit()

    def _on_row(self, row: int, *_: int) -> None:
        if row >= 0:
            self._slider.setValue(row)

    def _on_mean(self, _checked: bool) -> None:
        self.changed.emit()

    def _on_keep(self) -> None:
        depth = self.depth()
        if depth is not None:
            self.keep.emit(depth)

    def _show(self) -> None:
        if len(self._depths) < 2:
            return
        for row, depth in enumerate(self._depths):
            ms, megabytes = self._cost.get(depth, (math.nan, math.nan))
            score = self._score.get(depth)
            texts = (
                f"L{depth}",
                _figure(ms, 1 if ms < 10 else 0),
                _figure(megabytes, 0),
                _figure(math.nan if score is None else score, 2),
            )
            for column, text in enumerate(texts):
                item = self._table.item(row, column)
                if item is None:
                    item = QTableWidgetItem()
                    item.setTextAlignment(_alignment(column))
                    item.setToolTip(_HEADER[column][1])
                    self._table.setItem(row, column, item)
                item.setText(text)
                if column == len(_HEADER) - 1:
                    words = self._words.get(depth)
                    item.setToolTip(html.escape(words) if words else _HEADER[column][1])
                font = item.font()
                font.setBold(depth == self._wish)
                item.setFont(font)
        self._table.blockSignals(True)
        self._table.setCurrentCell(self._depths.index(self._wish or 0), 0)
        self._table.blockSignals(False)
        self._ticks.set_texts([f"L{depth}" for depth in self._depths])
        self._slider.setAccessibleDescription(f"L{self._wish} of L{self._depths[-1]}")


class DepthSlider(QSlider):
    """A horizontal slider that knows where its handle stops."""

    def __init__(self) -> None:
        super().__init__(Qt.Orientation.Horizontal)
        self.setPageStep(1)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)

    def mousePressEvent(self, event: QMouseEvent) -> None:
        """Jump to the value under the mouse, from where it can be dragged on."""
        if event.button() == Qt.MouseButton.LeftButton and self.isEnabled():
            x = event.position().x()
            distances = [abs(x - stop) for stop in self.stops()]
            self.setValue(self.minimum() + distances.index(min(distances)))
        super().mousePressEvent(event)

    def stops(self) -> list[int]:
        """Return the x of the handle's middle at every value, in px."""
        option = QStyleOptionSlider()
        self.initStyleOption(option)
        groove, handle = (
            self.style().subControlRect(
                QStyle.ComplexControl.CC_Slider, option, part, self
            )
            for part in (
                QStyle.SubControl.SC_SliderGroove,
                QStyle.SubControl.SC_SliderHandle,
            )
        )
        low, high = self.minimum(), self.maximum()
        span = groove.width() - handle.width()
        first = groove.x() + handle.width() // 2
        return [
            first + QStyle.sliderPositionFromValue(low, high, value, span)
            for value in range(low, high + 1)
        ]


class _Ticks(QWidget):
    """The names of a slider's values, each under its place; the chosen one is bold."""

    def __init__(self, slider: DepthSlider) -> None:
        super().__init__()
        self._slider = slider
        self._texts: list[str] = []
        slider.valueChanged.connect(self._on_value)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)

    def _on_value(self, _value: int) -> None:
        self.update()

    def set_texts(self, texts: list[str]) -> None:
        self._texts = texts
        self.update()

    def sizeHint(self) -> QSize:
        return QSize(80, self.fontMetrics().height() + 3)

    def paintEvent(self, _event: QPaintEvent | None) -> None:
        painter = QPainter(self)
        font = self.font()
        for i, (text, x) in enumerate(
            zip(self._texts, self._slider.stops(), strict=False)
        ):
            font.setBold(i == self._slider.value())
            painter.setFont(font)
            width = painter.fontMetrics().horizontalAdvance(text)
            left = max(0, min(x - width // 2, self.width() - width))
            painter.drawLine(x, 0, x, 2)
            painter.drawText(left, 3 + painter.fontMetrics().ascent(), text)
        painter.end()


def _table() -> QTableWidget:
    table = QTableWidget(0, len(_HEADER))
    table.setAccessibleName("Cost and score of each depth")
    table.setToolTip("Click a row to choose its depth.")
    set_up(table, _HEADER, _alignment)
    table.setEditTriggers(QAbstractItemView.EditTrigger.NoEditTriggers)
    table.setVerticalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
    header = table.horizontalHeader()
    header.setMinimumSectionSize(30)
    header.setSectionResizeMode(QHeaderView.ResizeMode.Stretch)
    header.setSectionResizeMode(1, QHeaderView.ResizeMode.ResizeToContents)
    return table


def _alignment(column: int) -> Qt.AlignmentFlag:
    side = Qt.AlignmentFlag.AlignRight if column else Qt.AlignmentFlag.AlignLeft
    return side | Qt.AlignmentFlag.AlignVCenter


def _figure(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}" if math.isfinite(value) else UNKNOWN


def _line(left: QLabel, right: QLabel) -> QHBoxLayout:
    line = QHBoxLayout()
    line.addWidget(left)
    line.addStretch(1)
    line.addWidget(right)
    return line
