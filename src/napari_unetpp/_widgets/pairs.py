"""The pair table: which image and which annotation train together."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from napari.layers import Image, Labels
from qtpy.QtCore import QEvent, QObject, Qt, Signal
from qtpy.QtGui import QPaintEvent, QPalette, QWheelEvent
from qtpy.QtWidgets import (
    QComboBox,
    QFrame,
    QHBoxLayout,
    QPushButton,
    QScrollArea,
    QSizePolicy,
    QStyle,
    QStyleOptionComboBox,
    QStylePainter,
    QVBoxLayout,
    QWidget,
)

from napari_unetpp._widgets._layers import OURS, may_take, spatial_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from napari.layers import Layer

_ROWS = 3  # visible ones
_LONGEST = 64  # characters of a name that are shown


@dataclass(frozen=True)
class Pair:
    """An image, one layer or several as its channels, and its annotation, if any."""

    images: tuple[Layer, ...]
    annotation: Layer | None


def is_ours(layer: Layer) -> bool:
    """Return whether this plugin made the layer to show what it predicts."""
    return bool(layer.metadata.get(OURS))


def plain(name: str) -> str:
    """Return a name in one line of at most 64 characters, its middle left out."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return name if len(name) <= _LONGEST else f"{name[:31]}…{name[-32:]}"


class PairTable(QWidget):
    """One row for each image and annotation that train one model together.

    Parameters
    ----------
    viewer : napari.Viewer
        Whose layers are offered; a proxy of it will do.

    Attributes
    ----------
    changed : Signal
        `pairs()` now returns something else, whoever changed it.
    annotation_wanted : Signal of int
        The user wants a new annotation layer for the image of this row.
    """

    changed = Signal()
    annotation_wanted = Signal(int)

    def __init__(self, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        # napari hands a proxy to plugins, and a proxy's layers are proxies, too.
        self._layers = getattr(viewer, "__wrapped__", viewer).layers
        self._exclude: Callable[[Layer], bool] = is_ours
        self._rows: list[_Row] = []
        self._known: list[Layer] = []
        self._last: list[Pair] = []
        content = QWidget()
        self._column = QVBoxLayout(content)
        self._column.setContentsMargins(0, 0, 0, 0)
        self._column.setSpacing(2)
        self._scroll = QScrollArea()
        self._scroll.setFrameShape(QFrame.Shape.NoFrame)
        self._scroll.setFocusPolicy(Qt.FocusPolicy.NoFocus)
        self._scroll.setHorizontalScrollBarPolicy(Qt.ScrollBarPolicy.ScrollBarAlwaysOff)
        self._scroll.setWidgetResizable(True)
        self._scroll.setWidget(content)
        content.installEventFilter(self)
        self._scroll.verticalScrollBar().rangeChanged.connect(self._to_end)
        self._add = QPushButton("+ Add pair")
        self._add.setFlat(True)
        self._add.setStyleSheet(
            "QPushButton { background: transparent; padding: 1px 4px; }"
            "QPushButton:hover, QPushButton:focus { text-decoration: underline; }"
        )
        self._add.setAccessibleName("Add pair")
        self._add.setToolTip(
            "Train on a further image with its annotation, too: one model for all."
        )
        self._add.clicked.connect(self._add_row)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addWidget(self._scroll)
        layout.addWidget(self._add, 0, Qt.AlignmentFlag.AlignLeft)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)
        for emitter in self._emitters():
            emitter.connect(self._on_layers)
        self._add_row()

    def _emitters(self) -> list[Any]:
        events = self._layers.events
        selection = self._layers.selection.events.changed
        return [events.inserted, events.removed, events.reordered, selection]

    @property
    def exclude(self) -> Callable[[Layer], bool]:
        """Tells which layers are not offered, our own predictions if left as it is."""
        return self._exclude

    @exclude.setter
    def exclude(self, function: Callable[[Layer], bool]) -> None:
        self._exclude = function
        self._on_layers()

    def pairs(self) -> list[Pair]:
        """Return the pairs; rows without an image are left out."""
        return [Pair(row.images, row.annotation) for row in self._rows if row.images]

    def images(self, row: int) -> tuple[Layer, ...]:
        """Return the image layers of a row, none if it is empty."""
        return self._rows[row].images

    def set_annotation(self, row: int, layer: Layer) -> None:
        """Choose the annotation of a row; another row that has it loses it."""
        layer = getattr(layer, "__wrapped__", layer)
        for i, other in enumerate(self._rows):
            if i == row:
                other.annotation = layer
            elif other.annotation == layer:
                other.annotation = None
        self._show()

    def set_pairs(self, pairs: Sequence[Pair]) -> None:
        """Choose these pairs; rows that are left over are emptied."""
        while len(self._rows) < len(pairs):
            self._add_row()
        for i, row in enumerate(self._rows):
            row.images = pairs[i].images if i < len(pairs) else ()
            row.annotation = pairs[i].annotation if i < len(pairs) else None
        self._show()

    def undecided(self) -> bool:
        """Return whether an image has no annotation and the user could choose one."""
        return any(
            row.images and row.annotation is None and self._fitting(row)
            for row in self._rows
        )

    def want_annotations(self) -> None:
        """Ask for an annotation for every row that has an image and none yet."""
        for i, row in enumerate(self._rows):
            if row.images and row.annotation is None:
                self.annotation_wanted.emit(i)

    def close_events(self) -> None:
        """Listen no more to the viewer."""
        for emitter in self._emitters():
            emitter.disconnect(self._on_layers)
        for layer in self._known:
            layer.events.name.disconnect(self._on_layers)
        self._known = []

    def _on_layers(self, _event: object = None) -> None:
        """Follow the viewer: forget what is gone, and fill gaps with what is new."""
        now = list(self._layers)
        for layer in [layer for layer in self._known if layer not in now]:
            layer.events.name.disconnect(self._on_layers)
        new = [layer for layer in now if layer not in self._known]
        for layer in new:
            layer.events.name.connect(self._on_layers)
        self._known = now
        for row in self._rows:
            if not all(layer in now for layer in row.images):
                row.images = ()
            if row.annotation not in now:
                row.annotation = None
        if new:
            for row in self._rows:
                self._fill(row)
        self._show()

    def _offered(self, kind: type) -> list[Layer]:
        return [
            layer
            for layer in self._known
            if isinstance(layer, kind) and not self._exclude(layer)
        ]

    def _fill(self, row: _Row) -> None:
        """Choose for a row what it lacks, where there is a sensible choice."""
        others = [other for other in self._rows if other is not row]
        if not row.images:
            taken = [layer for other in others for layer in other.images]
            free = [layer for layer in self._offered(Image) if layer not in taken]
            row.images = tuple(free[:1])
        if row.images and row.annotation is None:
            row.annotation = next(filter(may_take, self._fitting(row)), None)

    def _fitting(self, row: _Row) -> list[Layer]:
        """Return the free annotations that have the shape of a row's image."""
        shape = spatial_shape(row.images)
        used = [other.annotation for other in self._rows if other is not row]
        return [
            layer
            for layer in self._offered(Labels)
            if layer not in used and _shape(layer) == shape
        ]

    def _channels(self) -> tuple[Layer, ...]:
        """Return the selected images if they could be channels of one."""
        chosen = self._layers.selection
        images = [layer for layer in self._offered(Image) if layer in chosen]
        shapes = {_shape(layer) for layer in images}
        fit = len(images) > 1 and len(shapes) == 1
        return tuple(images) if fit and not any(i.rgb for i in images) else ()

    def _show(self) -> None:
        """Bring the combo boxes up to date; tell if the pairs have changed."""
        images = [(layer,) for layer in self._offered(Image)]
        notes = [(layer,) for layer in self._offered(Labels)]
        channels = self._channels()
        for i, row in enumerate(self._rows):
            more = [c for c in (channels, row.images) if len(c) > 1]
            row.image.offer([*images, *dict.fromkeys(more)], row.images)
            note = () if row.annotation is None else (row.annotation,)
            row.note.offer(notes, note)
            row.new.setEnabled(bool(row.images))
            row.number(i, len(self._rows))
        self._fit()
        pairs = self.pairs()
        if pairs != self._last:
            self._last = pairs
            self.changed.emit()

    def _fit(self) -> None:
        height = self._rows[0].sizeHint().height() if self._rows else 0
        n = min(len(self._rows), _ROWS)
        inner = n * height + (n - 1) * self._column.spacing()
        self._scroll.setFixedHeight(inner + 2 * self._scroll.frameWidth())

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        """Keep the rows visible when a theme or a font changes their height."""
        if event.type() == QEvent.Type.LayoutRequest:
            self._fit()
        return bool(super().eventFilter(watched, event))

    def _add_row(self) -> None:
        row = _Row()
        row.image.activated.connect(self._on_image)
        row.note.activated.connect(self._on_note)
        row.new.clicked.connect(self._on_new)
        row.remove.clicked.connect(self._on_remove)
        self._rows.append(row)
        self._column.addWidget(row)
        self._on_layers()
        self._fill(row)
        self._show()
        controls = [c for r in self._rows for c in r.controls()]
        for before, after in zip(controls, [*controls[1:], self._add], strict=True):
            QWidget.setTabOrder(before, after)

    def _to_end(self, _start: int, end: int) -> None:
        """Scroll to a new row."""
        self._scroll.verticalScrollBar().setValue(end)

    def _touched(self) -> _Row:
        """Return the row of the control that the user touched.

        A function that remembered its row would keep this widget alive.
        """
        return next(row for row in self._rows if self.sender() in row.controls())

    def _on_new(self) -> None:
        self.annotation_wanted.emit(self._rows.index(self._touched()))

    def _on_remove(self) -> None:
        row = self._touched()
        self._rows.remove(row)
        self._column.removeWidget(row)
        row.hide()
        row.deleteLater()
        self._add.setFocus()
        self._show()

    def _on_image(self) -> None:
        row = self._touched()
        images = row.image.choice()
        if images != row.images:
            row.images = images
            note = row.annotation
            if note is not None and _shape(note) != spatial_shape(images):
                row.annotation = None  # it was drawn on another image
            self._fill(row)
            self._show()

    def _on_note(self) -> None:
        row = self._touched()
        choice = row.note.choice()
        row.annotation = choice[0] if choice else None
        self._show()


class _Row(QWidget):
    """The controls of one pair, and what is chosen there."""

    def __init__(self) -> None:
        super().__init__()
        self.images: tuple[Layer, ...] = ()
        self.annotation: Layer | None = None
        self.image = _Combo(
            "image…",
            "Image layer to train on. Select several of one shape in the layer list to "
            "take them as channels of one image.",
        )
        self.note = _Combo(
            "annotation…",
            "Labels layer with the strokes painted on this image: value 1 is the first "
            "class; 0, not painted, is ignored.",
        )
        self.new = QPushButton("New")
        self.new.setToolTip(
            "Make an empty annotation layer of this image's shape, scale and place."
        )
        self.remove = QPushButton("✕")
        self.remove.setFixedWidth(22)
        self.remove.setToolTip("Train no longer on this pair; the layers stay.")
        layout = QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(3)
        layout.addWidget(self.image, 1)
        layout.addWidget(self.note, 1)
        layout.addWidget(self.new)
        layout.addWidget(self.remove)
        self.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed)

    def controls(self) -> list[QWidget]:
        """Return the controls in the order of the Tab key."""
        return [self.image, self.note, self.new, self.remove]

    def number(self, row: int, rows: int) -> None:
        """Tell the row its place, for screen readers, and that the first one stays."""
        self.image.setAccessibleName(f"Image of pair {row + 1}")
        self.note.setAccessibleName(f"Annotation of pair {row + 1}")
        self.new.setAccessibleName(f"New annotation for pair {row + 1}")
        self.remove.setAccessibleName(f"Remove pair {row + 1}")
        policy = self.remove.sizePolicy()
        policy.setRetainSizeWhenHidden(rows > 1)  # columns stay in line
        self.remove.setSizePolicy(policy)
        self.remove.setVisible(row > 0)


class _Combo(QComboBox):
    """A combo box over groups of layers; what does not fit is elided in the middle."""

    def __init__(self, empty: str, tip: str) -> None:
        super().__init__()
        self._groups: list[tuple[Layer, ...]] = []
        self._tip = tip
        self.setPlaceholderText(empty)
        self.setStyleSheet(
            "QComboBox { padding-left: 6px; padding-right: 0px; }"
            "QComboBox::drop-down { width: 18px; }"
        )
        self.setMinimumWidth(50)  # whatever the names are
        self.setSizePolicy(QSizePolicy.Policy.Ignored, QSizePolicy.Policy.Fixed)
        self.setFocusPolicy(Qt.FocusPolicy.StrongFocus)
        self.view().setTextElideMode(Qt.TextElideMode.ElideMiddle)

    def offer(
        self, groups: Sequence[tuple[Layer, ...]], chosen: tuple[Layer, ...]
    ) -> None:
        """Show these choices and that one, without a signal."""
        texts = [
            " + ".join(plain(layer.name) for layer in group)
            + (" (channels)" if len(group) > 1 else "")
            for group in groups
        ]
        index = list(groups).index(chosen) if chosen in groups else -1
        self.blockSignals(True)
        if texts != [self.itemText(i) for i in range(self.count())]:
            self.clear()
            self.addItems(texts)
        self.setCurrentIndex(index)
        self.blockSignals(False)
        self._groups = list(groups)
        name = html.escape(texts[index]) if index >= 0 else ""
        self.setToolTip(f"<p>{name}</p><p>{self._tip}</p>" if name else self._tip)

    def choice(self) -> tuple[Layer, ...]:
        """Return the chosen layers."""
        index = self.currentIndex()
        return self._groups[index] if index >= 0 else ()

    def paintEvent(self, _event: QPaintEvent | None) -> None:
        """Paint as Qt does, with a text that fits."""
        painter = QStylePainter(self)
        option = QStyleOptionComboBox()
        self.initStyleOption(option)
        text = option.currentText
        if self.currentIndex() < 0:
            text = self.placeholderText()
            faint = option.palette.placeholderText()
            option.palette.setBrush(QPalette.ColorRole.ButtonText, faint)
        field = self.style().subControlRect(
            QStyle.ComplexControl.CC_ComboBox,
            option,
            QStyle.SubControl.SC_ComboBoxEditField,
            self,
        )
        option.currentText = self.fontMetrics().elidedText(
            text, Qt.TextElideMode.ElideMiddle, field.width() - 4
        )
        painter.drawComplexControl(QStyle.ComplexControl.CC_ComboBox, option)
        painter.drawControl(QStyle.ControlElement.CE_ComboBoxLabel, option)
        painter.end()

    def wheelEvent(self, event: QWheelEvent) -> None:
        """Scroll the dock rather than change the choice by accident."""
        event.ignore()


def _shape(layer: Layer) -> tuple[int, ...]:
    """Return the shape of a layer at full resolution."""
    data = layer.data[0] if layer.multiscale else layer.data
    return tuple(int(n) for n in data.shape)
