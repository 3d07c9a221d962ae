"""The Predict dock: any model on any images, as layers or as label files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.utils.notifications import show_error, show_info
from qtpy.QtCore import QEvent, QTimer
from qtpy.QtWidgets import QVBoxLayout, QWidget

from . import _results, offer, room
from ._image_list import dropped
from ._layers import OURS, image_of, safe
from ._predict_form import NO_MODEL, PredictForm
from ._predict_run import (
    Begun,
    Facts,
    Piece,
    Progress,
    Request,
    Source,
    Summary,
    facts_of,
    read_model,
    run,
)
from ._worker import Failure, Outcome, Runner, busy_with
from .pairs import plain

if TYPE_CHECKING:
    from napari.layers import Image, Labels
    from qtpy.QtGui import QDragEnterEvent, QDropEvent

_WIDTH = 320  # px; nothing is cut at this width
_WARMING = "getting ready"  # a short run, for whose end the next one waits
_POLL = 300  # ms between two looks whether the thread is free


class PredictDock(QWidget):
    """Label images with a model that was trained before.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        The viewer whose images are offered and that gets the results.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__()
        self._viewer = getattr(napari_viewer, "__wrapped__", napari_viewer)
        self._facts: Facts | None = None
        self._unread: Path | None = None  # the model file that waits to be read
        self._taken = ""  # the model file that was offered, not chosen by the user
        self._predicting = False
        self._begun: Begun | None = None
        self._provenance: dict[str, Any] = {}
        self._layers: list[Image] = []  # what is predicted, the same order
        self._folder: Path | None = None  # what is predicted instead of layers
        self._results: dict[int, _results.Result] = {}
        self._touched: set[int] = set()
        self._made: list[tuple[Image | None, Labels]] = []
        self._runner = Runner(self)
        self._runner.received.connect(self._on_value)
        self._runner.drained.connect(self._on_drained)
        self._runner.ended.connect(self._on_ended)
        self.form = PredictForm(self._viewer)
        self.form.model_chosen.connect(self._on_model)
        self.form.predict.connect(self._start)
        self.form.cancel.connect(self._cancel)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(room.Scrolled(self.form))
        self.setMinimumWidth(_WIDTH)
        self.setAcceptDrops(True)
        self._timer = QTimer(self)
        self._timer.setInterval(_POLL)
        self._timer.timeout.connect(self._poll)
        self._timer.start()
        offer.newest.changed.connect(self._on_offer)
        self._on_offer()

    # --- the model ---------------------------------------------------------------

    def _on_offer(self) -> None:
        """Follow what the other dock offers until the user chooses a model."""
        if not self._timer.isActive():
            return  # closed
        field, path = self.form.model, offer.newest.path
        if field.text() == self._taken:
            self._taken = str(path or "")
            field.again()  # the same file may hold another model now
            field.set_path(self._taken)
            if not self._taken:
                self._on_model()
        self.form.set_offer(offer.newest.model is not None)

    def _on_model(self) -> None:
        path = self.form.model.path()
        self._facts = None
        self._unread = path
        self.form.set_depths(())
        self.form.show_text(self.form.facts, "Reading…" if path else NO_MODEL)
        self.form.facts.setToolTip("")
        if path is None and offer.newest.model is not None:
            self._show_facts(facts_of(offer.newest.model, None))
        self._poll()

    def _poll(self) -> None:
        """Say who has the thread; read the model file once it is free."""
        path = self._unread
        if path is not None and not self._runner.busy:
            self._predicting = False
            if self._runner.start(read_model(path), title="Read a model", short=True):
                self._unread = None
        taken = None if self._runner.busy else busy_with()
        taken = None if taken == _WARMING else taken
        text = f"{taken} is running. Stop it before you predict." if taken else ""
        if text != self.form.busy.text():
            self.form.show_text(self.form.busy, text)
        running = self._runner.busy and self._predicting
        self.form.start.setEnabled(taken is None and not self._runner.busy)
        self.form.stop.setEnabled(running and not self._runner.stopping)

    # --- a run -------------------------------------------------------------------

    def _start(self) -> None:
        try:
            request, layers = self._asked()
        except ValueError as error:
            self._tell_failure(str(error))
            return
        self._predicting = True
        if not self._runner.start(run(request), title="Predict"):
            self._predicting = False
            self._poll()
            return
        self._layers, self._folder, self._begun = layers, request.folder, None
        self._provenance = {
            "model": getattr(request.model, "name", ""),
            "depth": request.depth,
            "heads": request.heads,
        }
        self._results, self._touched = {}, set()
        self.form.show_text(self.form.result, "")
        self.form.failures.clear()
        self.form.failures.hide()
        self.form.bar.setValue(0)
        self.form.bar.show()
        self.form.show_text(self.form.progress, "reading the model")
        self._poll()

    def _asked(self) -> tuple[Request, list[Image]]:
        """Return the settings as they are now, with the layers they speak of."""
        form = self.form
        model = form.model.path() or offer.newest.model
        if model is None:
            raise ValueError("A model file is needed. Press Browse, or drop one here.")
        folder, layers = None, []
        if form.on_folder.isChecked():
            folder = form.folder.path()
            if folder is None:
                raise ValueError("A folder of images is needed. Press Browse.")
        else:
            layers = form.images.ticked()
            if not layers:
                raise ValueError("No image is ticked. Tick one, or open an image.")
        out = None
        if form.as_files.isChecked():
            out = form.out_folder()
            if out is None:
                raise ValueError(
                    "A folder for the label TIFFs is needed: these images were not "
                    "read from files. Press Browse."
                )
        request = Request(
            model,
            tuple(_source(layer) for layer in layers),
            folder,
            out,
            form.depth(),
            form.heads(),
            form.skip.isChecked(),
        )
        return request, layers

    def _cancel(self) -> None:
        self._runner.stop()
        self.form.show_text(self.form.progress, "stopping…")
        self._poll()

    # --- what comes back ---------------------------------------------------------

    def _on_value(self, value: Any) -> None:
        if isinstance(value, Piece):
            self._on_piece(value)
        elif isinstance(value, Progress):
            if not self._runner.stopping:
                self.form.show_text(self.form.progress, value.text)
            self.form.bar.setValue(round(1000 * value.share))
        elif isinstance(value, Summary):
            self._show_failures(value)
        elif isinstance(value, Begun):
            self._begun = value
            self._show_facts(value.facts)
        elif isinstance(value, Facts):
            self._show_facts(value)

    def _show_facts(self, facts: Facts) -> None:
        self._facts = facts
        self.form.show_text(self.form.facts, facts.text())
        saved = f"The file was saved on {facts.saved}." if facts.saved else ""
        self.form.facts.setToolTip(saved)
        self.form.set_depths(facts.depths)

    def _show_failures(self, summary: Summary) -> None:
        text = "\n\n".join(f"• {reason}" for reason in summary.reasons())
        if text != self.form.failures.toPlainText():
            self.form.failures.setPlainText(text)
            self.form.failures.setVisible(bool(text))

    def _on_piece(self, piece: Piece) -> None:
        if self._begun is None:
            return
        if piece.number not in self._results:
            self._results[piece.number] = self._result_of(piece, self._begun.facts)
        if self._results[piece.number].write(self._viewer, piece):
            self._touched.add(piece.number)

    def _on_drained(self) -> None:
        for number in self._touched:
            layer = self._results[number].layer
            layer.refresh(extent=False, thumbnail=False, highlight=False)
        self._touched.clear()

    def _result_of(self, piece: Piece, facts: Facts) -> _results.Result:
        """Return where a result goes: to our own earlier one, else to a new layer."""
        image = self._layers[piece.number - 1] if self._layers else None
        source = f"{self._folder}/{piece.title}" if image is None else image.unique_id
        layer = _results.earlier(self._viewer, str(source), piece.shape)
        if layer is not None:
            _results.clear(layer, facts, image)
        else:
            layer = self._add(_results.new(piece, facts, image), image)
        layer.metadata[OURS] = {
            "kind": "prediction",
            "source": str(source),
            "self": str(layer.unique_id),
            **self._provenance,
        }
        return _results.Result(layer)

    def _add(self, layer: Labels, image: Image | None) -> Labels:
        """Add a layer; those that are there are left as they are."""
        for other, old in self._made:  # one result over an image is seen at a time
            if other is image and old in self._viewer.layers:
                old.visible = False
        self._made = [m for m in self._made if m[1] in self._viewer.layers]
        self._made.append((image, layer))
        layers = self._viewer.layers
        selected, active = set(layers.selection), layers.selection.active
        self._viewer.add_layer(layer)
        if selected:  # who paints goes on painting
            layers.selection = selected
            layers.selection.active = active
        return layer

    def _on_ended(self, outcome: Outcome) -> None:
        if not self._predicting:
            self._on_model_read(outcome)
        else:
            self._predicting = False
            self._finish_layers(outcome.result)
            self.form.progress.hide()
            self.form.bar.hide()
            self._tell_outcome(outcome)
        self._poll()

    def _on_model_read(self, outcome: Outcome) -> None:
        if outcome.failure is not None and self._unread is None:
            self.form.show_text(self.form.facts, "This file cannot be used.")
            self.form.model.again()
            self._tell_failure(outcome.failure.message)
        elif outcome.failure is None:
            self.form.show_text(self.form.result, "")

    def _finish_layers(self, summary: Summary | None) -> None:
        done = set(summary.done) if summary else set()
        for number, result in self._results.items():
            if result.layer not in self._viewer.layers:
                continue
            result.finish(complete=number in done)
        self._results, self._layers = {}, []

    def _tell_outcome(self, outcome: Outcome) -> None:
        failure: Failure | None = outcome.failure
        if failure is not None:
            self._tell_failure(failure.message)
        elif outcome.result is None:
            self.form.show_text(self.form.result, "The run was given up.")
        else:
            self._tell_summary(outcome.result)

    def _tell_summary(self, summary: Summary) -> None:
        text = summary.text()
        self._show_failures(summary)
        if len(summary.failures) == 1:
            self.form.failures.hide()  # the line below the buttons says it all
        if summary.failures:
            self._tell_failure(text)
        else:
            self.form.show_text(self.form.result, text)
            show_info(safe(text))

    def _tell_failure(self, text: str) -> None:
        self.form.show_text(self.form.result, text)
        show_error(safe(text[:400]))

    # --- Qt ----------------------------------------------------------------------

    def dragEnterEvent(self, event: QDragEnterEvent) -> None:
        path = dropped(event)
        if path is not None and (path.is_dir() or path.suffix == ".safetensors"):
            event.acceptProposedAction()

    def dropEvent(self, event: QDropEvent) -> None:
        path = dropped(event)
        if path is None:
            return
        event.acceptProposedAction()
        if path.is_dir():
            self.form.on_folder.setChecked(True)
            self.form.folder.set_path(path)
        else:
            self.form.model.again()
            self.form.model.set_path(path)

    def event(self, event: QEvent) -> bool:
        # napari takes a dock's widget out of the window without closing it.
        if event.type() == QEvent.Type.ParentChange:
            if self.parent() is None:
                self._close()
            else:
                self._open()
                QTimer.singleShot(0, self._share_room)
        return bool(super().event(event))

    def _share_room(self) -> None:
        room.share(self)

    def _close(self) -> None:
        self._timer.stop()
        self._runner.abandon()
        self.form.images.close_list()
        self._predicting = False
        self._results, self._layers, self._made = {}, [], []

    def _open(self) -> None:
        if not self._timer.isActive():
            self.form.images.open()
            self._timer.start()
            self._on_offer()
            self.form.bar.hide()
            self.form.progress.hide()


def _source(layer: Image) -> Source:
    data, axis = image_of(layer)
    path = layer.source.path
    return Source(plain(layer.name), data, axis, Path(path) if path else None)
