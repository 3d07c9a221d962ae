"""Room on a small screen: docks share a place as tabs, and scroll what is too tall."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtpy.QtCore import QEvent, QObject, QSize, Qt, QTimer
from qtpy.QtWidgets import (
    QAbstractSpinBox,
    QComboBox,
    QDockWidget,
    QFrame,
    QMainWindow,
    QScrollArea,
    QSlider,
    QWidget,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = "napari-unetpp dock"  # property of the widgets that this is about


def share(widget: QWidget) -> None:
    """Put the dock around a widget in one place with another of ours, as a tab.

    Called once napari has docked it. Docks of other plugins stay where they are.
    """
    widget.setProperty(_MARK, True)
    dock = next(_docks_around(widget), None)
    window = dock.parentWidget() if dock is not None else None
    if dock is None or not isinstance(window, QMainWindow) or dock.isFloating():
        return
    area = window.dockWidgetArea(dock)
    together = window.tabifiedDockWidgets(dock)
    for other in window.findChildren(QDockWidget):
        same = window.dockWidgetArea(other) == area and not other.isFloating()
        if other is dock or other in together or other.isHidden() or not same:
            continue
        if any(child.property(_MARK) for child in other.findChildren(QWidget)):
            window.tabifyDockWidget(other, dock)
            QTimer.singleShot(0, dock.raise_)  # once the tab is there
            return


def _docks_around(widget: QWidget | None) -> Iterator[QDockWidget]:
    while widget is not None:
        if isinstance(widget, QDockWidget):
            yield widget
        widget = widget.parentWidget()


class Scrolled(QScrollArea):
    """Controls that scroll up and down, and are never cut at the side."""

    def __init__(self, content: QWidget) -> None:
        super().__init__()
        self.setWidgetResizable(True)
        self.setFrameShape(QFrame.Shape.NoFrame)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setWidget(content)
        for kind in (QComboBox, QAbstractSpinBox, QSlider):
            for control in content.findChildren(kind):
                control.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
                control.installEventFilter(self)

    def minimumSizeHint(self) -> QSize:
        """Return the width of the content with the bar; any height will do."""
        width = self.widget().minimumSizeHint().width()
        return QSize(width + self.verticalScrollBar().sizeHint().width(), 60)

    def sizeHint(self) -> QSize:
        """Return the size at which nothing scrolls."""
        return self.widget().sizeHint().expandedTo(self.minimumSizeHint())

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        """Scroll rather than change a value by accident."""
        wheel = event.type() == QEvent.Type.Wheel
        if wheel and isinstance(watched, QWidget) and not watched.hasFocus():
            event.ignore()
            return True
        if watched is self.widget() and event.type() == QEvent.Type.LayoutRequest:
            self.updateGeometry()
        return bool(super().eventFilter(watched, event))
