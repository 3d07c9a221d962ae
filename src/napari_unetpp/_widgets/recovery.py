"""Annotations saved by themselves, and offered again after a crash."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Labels
from qtpy.QtCore import QEvent, QObject, Qt, QTimer, Signal
from qtpy.QtWidgets import (
    QApplication,
    QHBoxLayout,
    QLabel,
    QMessageBox,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from napari_unetpp._widgets import _layers
from napari_unetpp._widgets._worker import Inbox
from napari_unetpp._widgets.pairs import is_ours, plain
from napari_unetpp.errors import UnetppError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from napari_unetpp.recovery import Note, Offer, Training

_log = logging.getLogger("napari_unetpp")
PERIOD = 15_000  # ms
_CANNOT = (
    "An annotation that is not in memory (zarr, dask, several resolutions) cannot be "
    "saved by itself: save it yourself."
)


class _Kept:
    """One annotation that is looked after."""

    def __init__(self, layer: Labels, known: Callable[[str], bool]) -> None:
        self.layer = layer
        self.id = layer.unique_id.hex
        from_file = layer.source.path or layer.source.sample
        painted = known(self.id) or getattr(layer, "_undo_history", False)
        self.safe = bool(from_file and not painted)  # a file holds what it holds
        self.dirty = True
        self.digest = ""  # of what is safe; only the thread touches it
        self.replaces = ""  # a layer of an ended session whose work this is
        for emitter in self._emitters():
            emitter.connect(self._on_change)

    def _emitters(self) -> list[Any]:
        # Undo and direct writes emit set_data alone; slicing does, too.
        events = self.layer.events
        return [events.paint, events.set_data, events.data]

    def _on_change(self, *_: object) -> None:
        self.dirty = True

    def close(self) -> None:
        for emitter in self._emitters():
            emitter.disconnect(self._on_change)


class Autosave(QObject):
    """Saves the annotations of a viewer every 15 s where they have changed.

    The thread reads the layer's array itself, which costs the GUI thread nothing: a
    stroke that it catches half-drawn makes the layer dirty again when it ends.

    Parameters
    ----------
    dock : QWidget
        With `viewer`, `pairs` and `classes`.

    Attributes
    ----------
    found : Signal of list of Training and Offer, and list of str
        What ended sessions left, and the names of damaged files.
    trouble : Signal of str
        Why a save failed, once.
    """

    found = Signal(list, list)
    trouble = Signal(str)

    def __init__(self, dock: Any) -> None:
        super().__init__(dock)
        from napari_unetpp.recovery import Store

        self._dock = dock
        self.layers = dock.viewer.layers
        self.store = Store()
        self._kept: list[_Kept] = []
        self._told = False
        self._closed = False
        self._thread = ThreadPoolExecutor(1, "napari-unetpp autosave")
        self._news = Inbox(self)
        self._timer = QTimer(self)
        self._timer.setInterval(PERIOD)
        self._timer.timeout.connect(self.save)
        self._timer.start()
        self.layers.events.inserted.connect(self._on_layers)
        self.layers.events.removed.connect(self._on_layers)
        # napari tells nobody what it has written: its one way to do so is followed.
        self._napari_save = self.layers.save
        object.__setattr__(self.layers, "save", self._save_as)
        dock.installEventFilter(self)
        QApplication.instance().aboutToQuit.connect(self.flush)
        self._on_layers()

    def look(self) -> None:
        """Find what ended sessions left; `found` follows."""
        self._thread.submit(self._look)

    def _look(self) -> None:
        try:
            offers, bad = self.store.offers()
            both = [*offers, *self.store.trainings()]
            self._news.put(lambda: self.found.emit(both, bad))
        except OSError as error:
            _log.warning("Recovery files cannot be listed: %s", error)

    def _on_layers(self, event: Any = None) -> None:
        now = [x for x in self.layers if isinstance(x, Labels) and not is_ours(x)]
        if event is not None and event.type == "removed":
            self.save()  # a removed layer's last strokes, too
        for kept in self._kept:
            if kept.layer not in now:
                kept.close()
        known = [kept for kept in self._kept if kept.layer in now]
        new = [x for x in now if all(x is not kept.layer for kept in known)]
        self._kept = known + [_Kept(x, self.store.has) for x in new if can_keep(x)]
        lazy = any(not can_keep(x) for x in now)
        self._dock.pairs.setToolTip(_CANNOT if lazy else "")
        if new:
            self.save()

    def restored(self, layer: Labels, replaces: str) -> None:
        """Look after a layer that has been restored; then its old file may go."""
        for kept in self._kept:
            if kept.layer is layer:
                kept.replaces, kept.dirty = replaces, True
        self.save()

    def save(self) -> None:
        """Save what has changed, in the thread."""
        for kept in self._kept:
            # An undo in a hidden layer announces nothing.
            if kept.dirty or not kept.layer.visible:
                kept.dirty = False  # before the thread reads
                self._submit(kept, safe=kept.safe)
                kept.safe = False

    def training(self) -> Path | None:
        """Return where a training that begins keeps its checkpoints, if anywhere."""
        try:
            return self.store.new_training()
        except OSError as error:
            self._tell(str(error))
            return None

    def flush(self) -> None:
        """Save what has changed and wait until it is on the disk."""
        if not self._closed:
            self.save()
            self._thread.submit(int).result()

    def _submit(self, kept: _Kept, *, safe: bool) -> None:
        data = kept.layer.data
        if safe:  # a stroke drawn meanwhile must not pass for what the file has
            data = data.copy()
        self._thread.submit(self._write, kept, data, self._note(kept), safe)

    def _write(self, kept: _Kept, data: Any, note: Note, safe: bool) -> None:
        """Write a layer unless what it holds is safe already."""
        from napari_unetpp.recovery import pack

        try:
            packed = pack(data)
            if safe:
                self.store.forget(note.layer)
            elif packed.digest != kept.digest and (packed.painted or kept.digest):
                self.store.save(note, packed)
            kept.digest = packed.digest
            if kept.replaces and not safe:
                self.store.forget(kept.replaces)
                kept.replaces = ""
        except (UnetppError, OSError, MemoryError) as error:
            kept.dirty = True
            why = str(error) or type(error).__name__
            self._news.put(lambda: self._tell(why))

    def _tell(self, why: str) -> None:
        if not self._told:
            self._told = True
            self.trouble.emit(
                f"Annotations are not being saved by themselves: {why} Save them "
                "yourself with File > Save Selected Layers."
            )

    def _note(self, kept: _Kept) -> Note:
        from napari_unetpp.recovery import Note

        layer, image = kept.layer, None
        for pair in self._dock.pairs.pairs():
            if pair.annotation is layer:
                image = pair.images[0]
        names = tuple(self._dock.classes.names())
        return Note(
            kept.id,
            layer.name[:1000],
            "" if image is None else image.name[:1000],
            "" if image is None else str(image.source.path or "")[:4000],
            names,
            tuple(_layers.colour_of(v) for v in range(1, len(names) + 1)),
            tuple(float(v) for v in layer.scale),
            tuple(float(v) for v in layer.translate),
        )

    def _save_as(self, path: str, *, selected: bool = False, **rest: Any) -> Any:
        """Save as napari does; what it has written need not be offered."""
        chosen = [x for x in self.layers if not selected or x in self.layers.selection]
        written = self._napari_save(path, selected=selected, **rest)
        for kept in self._kept:
            if written and kept.layer in chosen:
                kept.dirty = False
                self._submit(kept, safe=True)
        return written

    def eventFilter(self, watched: QObject, event: QEvent) -> bool:
        """Save when the dock or its viewer closes: napari only hides it."""
        if event.type() in (QEvent.Type.Hide, QEvent.Type.Close):
            self.flush()
        return bool(super().eventFilter(watched, event))

    def close(self) -> None:
        """Save a last time and end the session."""
        if self._closed:
            return
        self.flush()
        self._closed = True
        self._timer.stop()
        self._news.close()
        self._thread.shutdown()
        self.store.close()
        for kept in self._kept:
            kept.close()
        self.layers.events.inserted.disconnect(self._on_layers)
        self.layers.events.removed.disconnect(self._on_layers)
        self.layers.__dict__.pop("save", None)
        self._dock.removeEventFilter(self)


def can_keep(layer: Labels) -> bool:
    """Return whether a layer can be saved by itself; else its tooltip says so."""
    return isinstance(layer.data, np.ndarray)


class OfferRow(QWidget):
    """Offers what was not saved; hidden while there is nothing.

    Parameters
    ----------
    dock : QWidget
        The dock "Annotate and train".
    """

    def __init__(self, dock: Any) -> None:
        super().__init__(dock)
        self._dock = dock
        self.offers: list[Offer | Training] = []
        self._taken: list[Path] = []  # trainings that were restored
        self.text = QLabel()
        self.text.setTextFormat(Qt.TextFormat.PlainText)
        self.text.setWordWrap(True)
        self.restore = _button(
            "Restore",
            "Strokes become a new layer, no other layer changes; a model becomes the "
            "one that Train goes on with.",
            self._restore,
        )
        self.later = _button(
            "Later", "Keep it and offer it at the next start.", self._later
        )
        self.discard = _button("Discard…", "Delete it for ever.", self._discard)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(8, 0, 8, 2)
        layout.setSpacing(2)
        layout.addWidget(self.text)
        line = QHBoxLayout()
        before: QWidget = dock  # on top for the Tab key, too
        for button in (self.restore, self.later, self.discard):
            line.addWidget(button)
            QWidget.setTabOrder(before, button)
            before = button
        layout.addLayout(line)
        self.setVisible(False)
        self.autosave = Autosave(dock)
        self.autosave.found.connect(self._on_found)
        self.autosave.trouble.connect(dock._tell)
        self.autosave.look()

    def _on_found(self, offers: list[Offer | Training], bad: list[str]) -> None:
        open_ = {layer.unique_id.hex for layer in self._dock.viewer.layers}
        self.offers = [
            o for o in offers if (n := _note(o)) is None or n.layer not in open_
        ]
        if bad:
            self._dock._tell(
                f"{len(bad)} recovery file(s) were damaged and are set aside, such as "
                f"{bad[0]} in {self.autosave.store.folder}."
            )
        self._show()

    def _show(self) -> None:
        self.setVisible(bool(self.offers))
        if self.offers:
            self.text.setText(described(self.offers[0], len(self.offers) - 1))

    def _restore(self) -> None:
        from napari_unetpp.recovery import read

        offer = self.offers[0]
        if _note(offer) is None:
            self._taken.append(offer.path)
            self._dock.files.read(str(offer.path))
            self._next()
            return
        try:
            note, labels = read(offer.path)
        except UnetppError as error:
            self._dock._tell(str(error))
            return
        layer = Labels(
            labels,
            name=note.name or "annotation",
            scale=note.scale or None,
            translate=note.translate or None,
            colormap=_layers.colormap(len(note.classes)),
            metadata={"classes": list(note.classes)},
        )
        self._dock.viewer.add_layer(layer)
        for row, pair in enumerate(self._dock.pairs.pairs()):
            if pair.images[0].name == note.image:
                if _layers.spatial_shape(pair.images) == labels.shape:
                    self._dock.pairs.set_annotation(row, layer)
        self.autosave.restored(layer, note.layer)
        self._next()

    def _later(self) -> None:
        self._next()

    def _discard(self) -> None:
        offer = self.offers[0]
        box = QMessageBox(self._dock)
        box.setTextFormat(Qt.TextFormat.PlainText)
        box.setText(f"Delete for ever?\n{described(offer, 0)}")
        box.setStandardButtons(
            QMessageBox.StandardButton.Discard | QMessageBox.StandardButton.Cancel
        )
        box.setDefaultButton(QMessageBox.StandardButton.Cancel)
        if box.exec() == QMessageBox.StandardButton.Discard:
            kept = _note(offer)
            if kept is not None:
                self.autosave.store.forget(kept.layer)
            else:
                self.autosave.store.forget_training(offer.path)
            self._next()

    def saved(self) -> None:
        """Take note that the model is safe: no checkpoint of it need be offered."""
        if self._dock.link.state in ("idle", "showing"):
            self.autosave.store.forget_trainings()
            for path in self._taken:
                self.autosave.store.forget_training(path)

    def _next(self) -> None:
        self.offers = self.offers[1:]
        self._show()


def _note(offer: Offer | Training) -> Note | None:
    return getattr(offer, "note", None)


def described(offer: Any, more: int) -> str:
    """Return what an offer is, in words."""
    rest = f" ({more} more)" if more else ""
    note = _note(offer)
    if note is None:
        when = datetime.fromtimestamp(offer.time).astimezone()
        return (
            f"Unsaved model, {when.day} {when:%b %H:%M}, trained for {offer.steps:,} "
            f"steps{rest}"
        )
    when = datetime.fromtimestamp(note.time).astimezone()
    of = f" of image '{plain(note.image)}'" if note.image else ""
    return (
        f"Unsaved annotation '{plain(note.name)}'{of}, {when.day} {when:%b %H:%M}, "
        f"{note.painted:,} painted pixels{rest}"
    )


def _button(text: str, tip: str, slot: Callable[[], None]) -> QPushButton:
    button = QPushButton(text)
    button.setToolTip(tip)
    button.clicked.connect(slot)
    return button
