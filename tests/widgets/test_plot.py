"""The plot keeps few points, draws both curves, and is imported late."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
from qtpy.QtCore import QPoint, Qt
from qtpy.QtGui import QColor, QImage
from qtpy.QtWidgets import QLabel

from napari_unetpp._widgets.plot import MOST, LossPlot

if TYPE_CHECKING:
    from pytestqt.qtbot import QtBot


@pytest.fixture
def plot(qtbot: QtBot) -> LossPlot:
    widget = LossPlot()
    qtbot.addWidget(widget)
    widget.resize(338, 110)
    widget.show()
    qtbot.waitExposed(widget)
    return widget


def settle(qtbot: QtBot, plot: LossPlot) -> None:
    """Wait for the redraw."""
    qtbot.waitUntil(lambda: not plot._timer.isActive())


def pixels(plot: LossPlot, colour: str) -> int:
    """Count the pixels of a colour; a screen may have fewer colours."""
    image = QImage(plot.size(), QImage.Format.Format_RGB32)
    plot.render(image, QPoint())
    wanted = QColor(colour).rgb()
    return sum(
        image.pixel(x, y) == wanted
        for y in range(image.height())
        for x in range(image.width())
    )


def test_pyqtgraph_is_imported_with_the_first_point() -> None:
    code = (
        "import sys; from qtpy.QtWidgets import QApplication\n"
        "app = QApplication([])\n"
        "from napari_unetpp._widgets.plot import LossPlot\n"
        "plot = LossPlot(); plot.show(); app.processEvents()\n"
        "before = 'pyqtgraph' in sys.modules\n"
        "plot.add(1, 1.0, None); plot._draw()\n"
        "print(before, 'pyqtgraph' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.stdout.split() == ["False", "True"], result.stderr


def test_a_text_stands_there_until_there_is_a_point(
    qtbot: QtBot, plot: LossPlot
) -> None:
    label = plot.findChild(QLabel)
    assert label.isVisible()
    plot.add(1, 0.7, None)
    settle(qtbot, plot)
    assert not label.isVisible()
    plot.clear()
    assert label.isVisible()


def test_both_curves_are_drawn_in_colours_of_the_theme(
    qtbot: QtBot, plot: LossPlot
) -> None:
    plot.set_theme("#262930", "#f0f1f2")
    for step in range(1, 50):
        plot.add(step, 1 / step, step / 50)
    qtbot.waitUntil(lambda: pixels(plot, "#56b4e9") > 50)
    assert pixels(plot, "#e69f00") > 50
    plot.set_theme("#ebe7e6", "#1e1e21")
    assert pixels(plot, "#56b4e9") == 0
    assert pixels(plot, "#0072b2") > 50
    assert pixels(plot, "#d55e00") > 50


def test_points_are_thinned_and_the_last_one_stays(
    qtbot: QtBot, plot: LossPlot
) -> None:
    for step in range(1, 5 * MOST):
        plot.add(step, 1.0, 0.5)
    settle(qtbot, plot)
    for curve in (plot._loss, plot._score):
        assert MOST / 2 <= len(curve.x) <= MOST
        assert (curve.x[0], curve.x[-1]) == (1, 5 * MOST - 1)
        assert np.all(np.diff(curve.x) > 0)
    assert plot._plot is not None
    drawn = plot._plot._loss.getData()[0]
    assert drawn[-1] == 5 * MOST - 1


def test_the_last_figures_can_be_heard(qtbot: QtBot, plot: LossPlot) -> None:
    plot.add(1, 0.8, None)
    settle(qtbot, plot)
    assert plot.accessibleDescription() == "step 1: loss 0.8"
    plot.add(20, 0.25, 0.875)
    settle(qtbot, plot)
    assert plot.accessibleDescription() == "step 20: loss 0.25, held-out score 0.88"


def left_range(plot: LossPlot) -> list[float]:
    assert plot._plot is not None
    low, high = plot._plot._left.viewRange()[1]
    return [low, high]


def test_a_loss_over_a_decade_is_drawn_logarithmic(
    qtbot: QtBot, plot: LossPlot
) -> None:
    plot.add(1, 1.0, None)
    plot.add(2, 0.5, None)
    settle(qtbot, plot)
    assert left_range(plot)[0] == 0  # linear, from 0
    plot.add(3, 0.01, None)
    settle(qtbot, plot)
    assert left_range(plot)[0] == pytest.approx(-2)  # its logarithm
    ticks = plot._plot._item.getAxis("left")._tickLevels[0]  # type: ignore[union-attr]
    assert (-2, "0.01") in [(round(x, 9), text) for x, text in ticks]


@pytest.mark.parametrize("loss", [0.0, -1.0, 1e-300, float("nan"), float("inf")])
def test_no_figure_breaks_the_plot(qtbot: QtBot, plot: LossPlot, loss: float) -> None:
    plot.add(1, loss, float("nan"))
    plot.add(2, 1.0, 1.0)
    plot.add(3, loss, None)
    settle(qtbot, plot)
    assert np.all(np.isfinite(left_range(plot)))
    assert plot._score.y == [1.0]


def test_an_earlier_step_starts_anew(plot: LossPlot) -> None:
    plot.add(10, 1.0, 0.5)
    plot.add(1, 2.0, None)
    assert (plot._loss.x, plot._score.x) == ([1], [])


def test_a_hidden_plot_catches_up(qtbot: QtBot, plot: LossPlot) -> None:
    plot.hide()
    plot.add(1, 0.8, None)
    settle(qtbot, plot)
    assert plot._plot is None
    plot.show()
    assert plot.accessibleDescription() == "step 1: loss 0.8"


def test_nothing_keeps_it_alive(qtbot: QtBot) -> None:
    plot = LossPlot()
    plot.show()
    qtbot.waitExposed(plot)
    plot.add(1, 1.0, None)
    settle(qtbot, plot)
    assert plot._plot is not None
    alive = weakref.ref(plot)
    del plot
    gc.collect()
    assert alive() is None


def test_the_mouse_changes_nothing(qtbot: QtBot, plot: LossPlot) -> None:
    for step in (1, 2, 3):
        plot.add(step, 1 / step, None)
    settle(qtbot, plot)
    before = left_range(plot)
    under = plot.childAt(QPoint(150, 50))
    assert under is None  # the plot lets the mouse through: no menu, drag or zoom
    qtbot.mouseClick(plot, Qt.MouseButton.RightButton, pos=QPoint(150, 50))
    assert left_range(plot) == before
