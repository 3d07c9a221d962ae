"""The viewer's images as a list to tick, and a field for a path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.layers import Image
from qtpy.QtCore import QSize, Qt, Signal
from qtpy.QtWidgets import QLineEdit, QListWidget, QListWidgetItem, QWidget

from ._layers import safe
from .pairs import is_ours, plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from napari.components import LayerList
    from napari.layers import Layer
    from qtpy.QtGui import QDragEnterEvent, QDragMoveEvent, QDropEvent

_ROWS = 4  # visible ones
# napari styles the boxes of check boxes only; in its dark themes those of a list are
# black on black. The grey and the blue are seen on both grounds, the check is white.
_STYLE = """
QListView::indicator { width: 12px; height: 12px; border: 1px solid #8a929d;
                       border-radius: 2px; }
QListView::indicator:checked { background-color: #3b8fd0; border-color: #3b8fd0;
                               image: url("theme_dark:/check.svg"); }
"""


class ImageList(QListWidget):
    """The image layers of a viewer, each with a box to tick.

    The ticks follow what is selected in napari's layer list until the user sets one.

    Parameters
    ----------
    viewer : napari.Viewer
        Whose layers are offered; a proxy of it will do.

    Attributes
    ----------
    changed : Signal
        `ticked()` now returns something else, whoever changed it.
    """

    changed = Signal()

    def __init__(self, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        # napari hands a proxy to plugins, and a proxy's layers are proxies, too.
        self._layers = getattr(viewer, "__wrapped__", viewer).layers
        self._shown: list[Image] = []
        self._named: list[Image] = []
        self._own_choice = False
        self._connected = False
        slots = (self._on_layers, self._on_selection)
        layers, named = self._layers, self._named
        self.destroyed.connect(lambda: _disconnect(layers, named, *slots))
        self.setAccessibleName("Image layers")
        self.setToolTip(
            "Tick the images to predict, each plane by plane. The space bar ticks, the "
            "arrow keys move. A model with several channels takes as many grey layers "
            "as the channels of one image."
        )
        self.setStyleSheet(_STYLE)
        self.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self.setTextElideMode(Qt.TextElideMode.ElideMiddle)
        self.itemChanged.connect(self._on_item)
        self.open()

    def sizeHint(self) -> QSize:
        row = max(self.sizeHintForRow(0), self.fontMetrics().height() + 6)
        return QSize(200, _ROWS * row + 2 * self.frameWidth() + 2)

    def open(self) -> None:
        """Follow the viewer's layers."""
        if not self._connected:
            self._connected = True
            for emitter in _emitters(self._layers):
                emitter.connect(self._on_layers)
            self._layers.selection.events.changed.connect(self._on_selection)
        self._on_layers()
        self._on_selection()

    def close_list(self) -> None:
        """Follow the viewer's layers no more."""
        self._connected = False
        _disconnect(self._layers, self._named, self._on_layers, self._on_selection)

    def _listen(self, layers: list[Image]) -> None:
        """Hear of new names of these layers, and of no other's."""
        _unname(self._named, self._on_layers)
        for layer in layers:
            layer.events.name.connect(self._on_layers)
        self._named += layers

    def ticked(self) -> list[Image]:
        """Return the layers that are ticked, from the bottom up, as channels count."""
        return [
            layer
            for row, layer in enumerate(self._shown)
            if self.item(row).checkState() == Qt.CheckState.Checked
        ][::-1]

    def tick(self, layers: list[Layer]) -> None:
        """Tick these layers and no other."""
        self.blockSignals(True)
        for row, layer in enumerate(self._shown):
            on = any(layer is other for other in layers)
            state = Qt.CheckState.Checked if on else Qt.CheckState.Unchecked
            self.item(row).setCheckState(state)
        self.blockSignals(False)
        self.changed.emit()

    def _on_layers(self, _event: Any = None) -> None:
        ticked = self.ticked()
        # The topmost first, as napari lists them.
        images = [x for x in self._layers if isinstance(x, Image) and not is_ours(x)]
        images.reverse()
        self.blockSignals(True)
        self.clear()
        self._shown = images
        for layer in images:
            item = QListWidgetItem(plain(layer.name))
            item.setFlags(
                Qt.ItemFlag.ItemIsUserCheckable
                | Qt.ItemFlag.ItemIsEnabled
                | Qt.ItemFlag.ItemIsSelectable
            )
            item.setCheckState(Qt.CheckState.Unchecked)
            shape = tuple(layer.data[0].shape if layer.multiscale else layer.data.shape)
            tip = f"{plain(layer.name)}: {' x '.join(map(str, shape))} pixels"
            item.setToolTip(safe(tip))
            self.addItem(item)
        self.blockSignals(False)
        self._listen(images)
        alone = len(images) == 1 and not self._own_choice
        self.tick(images if alone else ticked)

    def _on_selection(self, _event: Any = None) -> None:
        selected = [x for x in self._shown if x in self._layers.selection]
        if selected and not self._own_choice:
            self.tick(selected)

    def _on_item(self, _item: QListWidgetItem) -> None:
        self._own_choice = True
        self.changed.emit()


def _emitters(layers: LayerList) -> list[Any]:
    return [layers.events.inserted, layers.events.removed, layers.events.reordered]


def _disconnect(
    layers: LayerList,
    named: list[Image],
    on_layers: Callable[..., None],
    on_selection: Callable[..., None],
) -> None:
    """Follow the layers no more; done without the widget, which may be gone."""
    for emitter in _emitters(layers):
        emitter.disconnect(on_layers)
    layers.selection.events.changed.disconnect(on_selection)
    _unname(named, on_layers)


def _unname(named: list[Image], on_layers: Callable[..., None]) -> None:
    for layer in named:
        layer.events.name.disconnect(on_layers)
    named.clear()


class PathEdit(QLineEdit):
    """A field for the path of a file or folder, which can be dropped on it.

    Attributes
    ----------
    chosen : Signal
        The user has finished with another path than before.
    """

    chosen = Signal()

    def __init__(self, tip: str, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._last = ""
        self._tip = tip
        self.setToolTip(safe(tip))
        self.setAcceptDrops(True)
        self.editingFinished.connect(self._on_finished)

    def path(self) -> Path | None:
        """Return the absolute path, None if the field is empty."""
        text = self.text().strip()
        return Path(text).expanduser().absolute() if text else None

    def set_path(self, path: Path | str) -> None:
        """Show a path as if it had been typed."""
        self.setText(str(path))
        self.setCursorPosition(len(self.text()))
        self._on_finished()

    def again(self) -> None:
        """Take the next path for another one, whatever it is."""
        self._last = ""

    def _on_finished(self) -> None:
        text = self.text().strip()
        self.setToolTip(safe(f"{self._tip} {text}"))
        if text != self._last:
            self._last = text
            self.chosen.emit()

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        if dropped(event) is not None:
            event.acceptProposedAction()

    def dragMoveEvent(self, event: QDragMoveEvent) -> None:
        event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        path = dropped(event)
        if path is not None:
            event.acceptProposedAction()
            self.set_path(path)


def dropped(event: QDropEvent) -> Path | None:
    """Return the one local file or folder that is dragged, else None."""
    urls = event.mimeData().urls()
    local = [url.toLocalFile() for url in urls if url.isLocalFile()]
    return Path(local[0]) if len(local) == 1 == len(urls) else None
