"""The live plot: loss and held-out score over the steps of a training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtCore import Qt, QTimer
from qtpy.QtGui import QColor, QPalette, QShowEvent
from qtpy.QtWidgets import QLabel, QSizePolicy, QVBoxLayout, QWidget

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEIGHT = 110  # px
MOST = 2000  # points kept of each curve
_DRAWN = 500  # points drawn of each curve
_PAUSE = 50  # ms in which further points wait for one redraw
_DECADE = 10.0  # a loss that spans more is drawn on a logarithmic axis
_HEADROOM = 0.3  # of the height, for the legend
# Okabe and Ito's blue and vermillion, which differ for every kind of colour vision,
# and their lighter sky blue and orange on a dark background.
_ON_LIGHT = ("#0072b2", "#d55e00")
_ON_DARK = ("#56b4e9", "#e69f00")


class _Curve:
    """Points of one curve; when there are too many, every second is dropped."""

    def __init__(self) -> None:
        self.x: list[float] = []
        self.y: list[float] = []

    def add(self, x: float, y: float) -> None:
        self.x.append(x)
        self.y.append(y)
        if len(self.x) > MOST:
            del self.x[1:-1:2], self.y[1:-1:2]

    def clear(self) -> None:
        self.x.clear()
        self.y.clear()


class LossPlot(QWidget):
    """Loss (left axis) and held-out score from 0 to 1 (right axis) over the steps.

    pyqtgraph is imported with the first point, so that a dock opens at once.
    """

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._loss, self._score = _Curve(), _Curve()
        self._colours: tuple[str, str] | None = None
        self._plot: _Plot | None = None
        self._timer = QTimer(self)
        self._timer.setSingleShot(True)
        self._timer.setInterval(_PAUSE)
        self._timer.timeout.connect(self._draw)
        self._empty = QLabel("Loss and held-out score: shown when training starts.")
        self._empty.setTextFormat(Qt.TextFormat.PlainText)
        self._empty.setWordWrap(True)
        self._empty.setAlignment(Qt.AlignmentFlag.AlignCenter)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._empty)
        self.setFixedHeight(HEIGHT)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)
        self.setAccessibleName("Loss and held-out score over the steps")
        self.setToolTip(
            "Solid: mean loss over annotated pixels (left axis; logarithmic once it "
            "spans a factor of ten). Dashed: estimated mean IoU on the whole images, "
            "from painted pixels that training never saw, 0 to 1 (right axis). Below: "
            "optimizer steps."
        )

    def add(self, step: int, loss: float, score: float | None) -> None:
        """Add the figures of a step; an earlier step than the last starts anew."""
        if self._loss.x and step < self._loss.x[-1]:
            self.clear()
        if math.isfinite(loss):
            self._loss.add(step, loss)
        if score is not None and math.isfinite(score):
            self._score.add(step, score)
        if not self._timer.isActive():
            self._timer.start()

    def clear(self) -> None:
        """Forget every point."""
        self._timer.stop()
        self._loss.clear()
        self._score.clear()
        self._draw()

    def set_theme(self, background: str, foreground: str) -> None:
        """Draw in these colours, "#rrggbb" or by name."""
        self._colours = (background, foreground)
        if self._plot is not None:
            self._plot.set_colours(background, foreground)

    def showEvent(self, event: QShowEvent) -> None:
        """Catch up with what came while nobody looked."""
        super().showEvent(event)
        self._draw()

    def _draw(self) -> None:
        empty = not self._loss.x
        if not self.isVisible() or (empty and self._plot is None):
            return
        if self._plot is None:
            self._plot = _Plot(self)
            self.layout().addWidget(self._plot.widget)
            self._plot.set_colours(*(self._colours or self._of_palette()))
        self._plot.widget.setVisible(not empty)
        self._empty.setVisible(empty)
        if empty:
            self.setAccessibleDescription("")
            return
        self._plot.draw(self._loss, self._score)
        spoken = f"step {self._loss.x[-1]:.0f}: loss {self._loss.y[-1]:.3g}"
        if self._score.y:
            spoken += f", held-out score {self._score.y[-1]:.2f}"
        self.setAccessibleDescription(spoken)

    def _of_palette(self) -> tuple[str, str]:
        palette = self.palette()
        return (
            palette.color(QPalette.ColorRole.Window).name(),
            palette.color(QPalette.ColorRole.WindowText).name(),
        )


class _Plot:
    """What pyqtgraph draws: two curves with an axis each, and nothing to click."""

    def __init__(self, parent: QWidget) -> None:
        import pyqtgraph

        self._pg: Any = pyqtgraph
        self.widget: Any = pyqtgraph.PlotWidget(parent)
        self.widget.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self.widget.setAttribute(Qt.WidgetAttribute.WA_TransparentForMouseEvents)
        self._item = self.widget.getPlotItem()
        self._item.setMenuEnabled(False)
        self._item.hideButtons()
        self._left = self._item.getViewBox()
        self._right = pyqtgraph.ViewBox(enableMenu=False)
        for box in (self._left, self._right):
            box.setMouseEnabled(False, False)
            box.disableAutoRange()
            box.setDefaultPadding(0)
        self._item.scene().addItem(self._right)
        self._item.showAxis("right")
        self._item.getAxis("right").linkToView(self._right)
        self._left.sigResized.connect(self._fit)
        self._loss = pyqtgraph.PlotCurveItem()
        self._score = pyqtgraph.PlotCurveItem()
        self._left.addItem(self._loss)
        self._right.addItem(self._score)
        self._right.setYRange(0, 1 + _HEADROOM)
        self._legend = pyqtgraph.LegendItem(
            colCount=2, horSpacing=4, verSpacing=0, labelTextSize="8pt"
        )
        self._legend.setParentItem(self._left)
        self._legend.anchor(itemPos=(0.5, 0), parentPos=(0.5, 0), offset=(0, -9))
        self._legend.addItem(self._loss, "loss")
        self._legend.addItem(self._score, "held-out IoU")
        self._make_axes()

    def _make_axes(self) -> None:
        for side, text in (("left", "loss"), ("right", "IoU"), ("bottom", "step")):
            axis = self._item.getAxis(side)
            axis.enableAutoSIPrefix(False)
            axis.setLabel(text)
            font = self.widget.font()
            font.setPointSizeF(max(6.0, font.pointSizeF() - 2))
            axis.setStyle(
                tickFont=font, tickTextOffset=3, tickLength=-3, maxTickLevel=0
            )
            axis.label.setFont(font)
        self._item.getAxis("left").setWidth(46)
        self._item.getAxis("right").setWidth(34)
        self._item.getAxis("bottom").setHeight(28)
        self._item.getAxis("right").setTicks([[(0, "0"), (0.5, "0.5"), (1, "1")]])

    def _fit(self, *_: object) -> None:
        self._right.setGeometry(self._left.sceneBoundingRect())

    def set_colours(self, background: str, foreground: str) -> None:
        dark = QColor(background).lightnessF() < 0.5
        loss, score = _ON_DARK if dark else _ON_LIGHT
        pen = self._pg.mkPen
        self.widget.setBackground(background)
        self._loss.setPen(pen(loss, width=1))
        self._score.setPen(pen(score, width=2, style=Qt.PenStyle.DashLine))
        for side in ("left", "right", "bottom"):
            axis = self._item.getAxis(side)
            axis.setPen(foreground)
            axis.setTextPen(foreground)
        self._legend.setLabelTextColor(foreground)
        for _, label in self._legend.items:
            label.setText(label.text)  # takes the new colour

    def draw(self, loss: _Curve, score: _Curve) -> None:
        x, y = np.asarray(loss.x), np.asarray(loss.y)
        low, high = float(y.min()), float(y.max())
        logarithmic = low > 0 and high / low > _DECADE
        if logarithmic:
            y, low, high = np.log10(y), math.log10(low), math.log10(high)
        elif low > 0:
            low = 0.0
        room = _HEADROOM * ((high - low) or 1.0)
        self._left.setYRange(low, high + room)
        self._item.getAxis("left").setTicks(_ticks(low, high, logarithmic))
        first, last = float(x[0]), float(x[-1])
        for box in (self._left, self._right):
            box.setXRange(first, max(last, first + 1))
        self._loss.setData(_few(x), _few(y))
        self._score.setData(_few(np.asarray(score.x)), _few(np.asarray(score.y)))


def _few(values: NDArray[Any]) -> NDArray[Any]:
    """Return values evenly spread up to the last: the plot has no more pixels."""
    stride = -(-len(values) // _DRAWN)
    return values[::-1][:: max(stride, 1)][::-1]


def _ticks(
    low: float, high: float, logarithmic: bool
) -> list[list[tuple[float, str]]] | None:
    """Return few ticks for an axis of logarithms, None where pyqtgraph may choose."""
    if not logarithmic:
        return None
    decades = range(math.floor(low), math.ceil(high) + 1)
    digits = (1,) if high - low > 2 else (1, 3)
    values = [digit * 10.0**decade for decade in decades for digit in digits]
    return [[(math.log10(value), f"{value:g}") for value in values]]
