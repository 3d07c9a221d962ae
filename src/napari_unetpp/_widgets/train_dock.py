"""The dock "Annotate and train": what its controls do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.utils.notifications import show_error, show_info
from napari.utils.theme import get_theme
from qtpy.QtCore import QEvent, QTimer

from napari_unetpp._widgets import _layers, keys, offer, room
from napari_unetpp._widgets._worker import get_ready
from napari_unetpp._widgets.classes import are_names
from napari_unetpp._widgets.coach import advice
from napari_unetpp._widgets.link import LiveLink, Settings
from napari_unetpp._widgets.model_files import ModelFiles
from napari_unetpp._widgets.projects import Projects
from napari_unetpp._widgets.recovery import OfferRow
from napari_unetpp._widgets.train_face import NETWORKS, SIZES, TrainFace
from napari_unetpp.messages import (
    Coverage,
    DepthCost,
    Message,
    Progress,
    Snapshot,
    Started,
    Waiting,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_DEPTHS = {"unet++": (1, 2, 3, 4)}
_CHOOSE = (
    "Choose the layer with your strokes in the list beside the image, or press New for "
    "an empty one."
)
_UNKNOWN = "\N{EN DASH}"


class TrainDock(TrainFace):
    """Paint a few labels, watch the network learn while you paint, slide the depth.

    Parameters
    ----------
    napari_viewer : napari.Viewer
        The viewer that it is docked in.
    """

    def __init__(self, napari_viewer: Any) -> None:
        super().__init__(getattr(napari_viewer, "__wrapped__", napari_viewer))
        self.link = LiveLink(self.viewer, self)
        self.files = ModelFiles(self)
        self.bound: list[str] = []
        self._trouble = ""
        self._waiting = ""
        self._score: float | None = None
        self._note = ""
        self._held = _UNKNOWN
        self._holds_out = True
        self._loaded: str | None = None
        self._closed = False
        self._first_names = self.classes.names()
        self.unsaved = OfferRow(self)
        self.layout().insertWidget(0, self.unsaved)
        self.projects = Projects(self)
        self._connect()
        keys.bind(self)
        self._on_pairs()
        self._show_state()
        QTimer.singleShot(0, self._get_ready)

    def _connect(self) -> None:
        self.pairs.changed.connect(self._on_pairs)
        self.pairs.annotation_wanted.connect(self._new_annotation)
        self.classes.changed.connect(self._on_classes)
        self.classes.picked.connect(self.pick)
        self.classes.refused.connect(self._tell)
        self.network_box.currentTextChanged.connect(self._on_network)
        self.depths.changed.connect(self._on_depth)
        self.depths.keep.connect(self._keep)
        self.advanced.maps_changed.connect(self._on_maps)
        self.train_button.clicked.connect(self.train)
        self.pause_button.clicked.connect(self.pause)
        self.stop_button.clicked.connect(self.link.stop)
        self.over_button.clicked.connect(self.start_over)
        self.load_button.clicked.connect(self.files.load)
        self.save_button.clicked.connect(lambda: self.files.save(self.link.named()))
        self.script_button.clicked.connect(self.copy_script)
        self.link.message.connect(self._on_message)
        self.link.counted.connect(self._on_counts)
        self.link.changed.connect(self._show_state)
        self.link.trouble.connect(self._tell)
        self.files.loaded.connect(self.take_model)
        self.files.trouble.connect(self._tell)
        self.files.saved.connect(self.unsaved.saved)
        self.link.new_checkpoint = self.unsaved.autosave.training
        self.viewer.events.theme.connect(self._on_theme)
        self._on_theme()
        self._on_network()
        self._on_classes()

    def _on_theme(self, _event: Any = None) -> None:
        theme = get_theme(self.viewer.theme)
        self.plot.set_theme(theme.background.as_hex(), theme.text.as_hex())

    def _get_ready(self) -> None:
        """Import torch in the thread while the user still looks around."""
        if not self._closed:
            get_ready(self.advanced.device(), self._on_ready)

    def _on_ready(self, text: str) -> None:
        if not self._closed and self.link.state == "idle":
            self.device.setText(f"Device: {text}")

    # --- pairs and classes ----------------------------------------------------------

    def _on_pairs(self) -> None:
        pairs = self.pairs.pairs()
        if self.link.state == "idle":  # what is being trained stays what it is
            self.link.watch(pairs)
        names = self.classes.names()
        for pair in pairs:
            if pair.annotation is not None:
                self._attach(pair.annotation, len(names))
        self._on_counts()

    def _attach(self, annotation: Any, n_classes: int) -> None:
        """Give the annotation the colours of the classes; its pixels stay."""
        names = annotation.metadata.get("classes")
        if self.classes.names() == self._first_names and are_names(names):
            self.classes.set_names(names)
            self.link.classes = self.classes.names()
        wanted = _layers.colormap(n_classes)
        if getattr(annotation.colormap, "name", None) != wanted.name:
            annotation.colormap = wanted

    def _new_annotation(self, row: int) -> None:
        layers = self.pairs.images(row)
        if not layers:
            self._tell("Open an image first, then press New for its annotation.")
            return
        layer = _layers.new_annotation(layers, len(self.classes.names()))
        self.viewer.add_layer(layer)
        self.pairs.set_annotation(row, layer)
        layer.brush_size = 6
        self.pick(1)

    def _on_classes(self) -> None:
        self.link.classes = self.classes.names()
        self._trouble = ""
        for pair in self.pairs.pairs():
            if pair.annotation is not None:
                self._attach(pair.annotation, len(self.link.classes))
        self.link.recolour()
        self._on_counts()

    def pick(self, value: int) -> None:
        """Paint this class next, in the annotation that is selected or the first."""
        if value > len(self.classes.names()):
            return
        self.classes.pick(value)
        found = [p.annotation for p in self.pairs.pairs() if p.annotation is not None]
        active = self.viewer.layers.selection.active
        layer = next((a for a in found if a == active), found[0] if found else None)
        if layer is None:
            return
        layer.selected_label = value
        layer.mode = "paint"
        self.viewer.layers.selection.active = layer

    def _on_counts(self) -> None:
        # A label that is the next class makes it one; others are told by the core.
        if self.link.highest == len(self.classes.names()) + 1:
            self.classes.add()
            self.link.classes = self.classes.names()
        pixels, strokes = self.link.counts()
        self.classes.set_counts(pixels, strokes)
        self._show_coach()

    # --- training ---------------------------------------------------------------------

    def train(self) -> None:
        """Start a training, or go on with one that pauses."""
        self._trouble = ""
        if self.link.state == "paused":
            self.link.resume()
            return
        if self.link.state in ("training", "stopping"):
            return
        pairs = self.pairs.pairs()
        if not pairs:
            self._tell(
                "Open an image first: drop a file on the viewer, or take one of "
                "File > Open Sample > napari-unetpp."
            )
            return
        if self.pairs.undecided():
            self._tell(_CHOOSE)
            return
        self.pairs.want_annotations()
        for pair in self.pairs.pairs():
            problem = _layers.check_annotation(pair.annotation, pair.images)
            if problem:
                self._tell(problem)
                return
        if self.link.state == "idle":
            self.link.watch(self.pairs.pairs())
        if self.link.model is None:
            self.plot.clear()
        self.depths.clear_costs()
        self.unsaved.autosave.save()
        self.link.train(self._settings())

    def _settings(self) -> Settings:
        network = NETWORKS[self.network_box.currentText()]
        return Settings(
            network,
            SIZES[self.size_box.currentText()],
            self.advanced.device(),
            self.advanced.seed(),
            self.advanced.changes(),
        )

    def pause(self) -> None:
        """Pause the training, or go on."""
        if self.link.state == "training":
            self.link.pause()
        elif self.link.state == "paused":
            self.link.resume()

    def toggle_training(self) -> None:
        """Train, pause, go on: what one key does."""
        if self.link.state == "training":
            self.link.pause()
        else:
            self.train()

    def start_over(self) -> None:
        """Forget the model; the strokes stay."""
        self.link.forget()
        if offer.newest.model is not None:
            offer.newest.put(None)
        self._loaded = None
        self._score, self._held = None, _UNKNOWN
        self.plot.clear()
        self.depths.clear_costs()
        self.depths.clear_scores()
        self.status.setText("")
        self._show_state()

    def _on_network(self) -> None:
        if self.link.model is None:
            self._offer(_DEPTHS.get(NETWORKS[self.network_box.currentText()], ()))

    def _offer(self, depths: Sequence[int]) -> None:
        """Offer these depths; one is no choice."""
        self.depths.set_depths(depths if len(depths) > 1 else ())
        self._on_depth(show=False)

    def _on_depth(self, *, show: bool = True) -> None:
        self.link.depth = self.depths.depth()
        self.link.heads = self.depths.heads()
        if show:
            self.link.show_again()

    def _on_maps(self) -> None:
        self.link.probabilities, self.link.uncertainty = self.advanced.maps()
        self.link.show_again()

    # --- what the core says -----------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Progress):
            self._on_progress(message)
        elif isinstance(message, Started):
            self._offer(message.depths)
            self.device.setText(f"Device: {message.device}")
        elif isinstance(message, Waiting):
            if message.reason != self._waiting:
                self._waiting, self._trouble = message.reason, ""
                if message.reason:
                    self.status.setText("Waiting for strokes")
                self._show_coach()
        elif isinstance(message, Snapshot):
            self.save_button.setEnabled(True)
            self.depths.set_keep_enabled(True)
        elif isinstance(message, DepthCost):
            self.depths.set_cost(
                message.depth, message.ms_per_megapixel, message.megabytes
            )
        elif isinstance(message, Coverage):
            self.bar.setRange(0, message.total)
            self.bar.setValue(message.done)
            if self.link.state == "showing":
                self.status.setText(
                    f"Labelling all images: {message.done} of {message.total} tiles"
                )

    def _on_progress(self, message: Progress) -> None:
        last = message.last
        self.link.count(last.step)
        known = self._score is not None
        self._score, self._holds_out = last.score, message.holds_out
        estimates = dict(message.estimates)
        self._held = str(list(estimates.values())[-1]) if estimates else _UNKNOWN
        self.plot.add(self.link.steps, last.loss, last.score)
        if not estimates:
            self.depths.clear_scores()
        for depth, estimate in estimates.items():
            words = estimate.words(self.classes.names())
            self.depths.set_score(depth, estimate.mean, words)
        self.status.setText(
            f"Step {self.link.steps:,} · {message.rate:.1f} steps/s · "
            f"{_clock(last.seconds)} · IoU {self._held}"
        )
        if message.note != self._note:
            self._note = message.note
            if message.note:
                self._tell(message.note)
        if known != (last.score is not None):
            self._show_coach()

    def _show_state(self) -> None:
        state = self.link.state
        running = state in ("training", "paused")
        model = self.link.model is not None
        self.train_button.setEnabled(state in ("idle", "paused", "showing"))
        self.train_button.setText("Go on" if model or state == "paused" else "Train")
        self.pause_button.setEnabled(running)
        self.pause_button.setText("Resume" if state == "paused" else "Pause")
        self.stop_button.setEnabled(running or state == "showing")
        self.over_button.setEnabled(state == "idle" and model)
        self.load_button.setEnabled(state == "idle")
        self.save_button.setEnabled(model)
        self.depths.set_keep_enabled(model)
        self.pairs.setEnabled(state == "idle")
        self.network_box.setEnabled(state == "idle" and not model)
        self.size_box.setEnabled(state == "idle" and not model)
        self.advanced.set_running(state != "idle")
        self.classes.set_removable(state == "idle" and not model)
        if state != "training":
            self._waiting = ""
        if state == "stopping":
            self.status.setText("Stopping…")
        elif state == "idle":
            self.link.watch(self.pairs.pairs())
            self._show_result()
        self._show_coach()

    def _show_result(self) -> None:
        if self.link.model is None:
            self.status.setText("")
            return
        steps = f"{self.link.steps:,} steps" if self.link.steps else "loaded"
        self.status.setText(f"Model: {steps}, held-out IoU {self._held}")

    def _show_coach(self) -> None:
        if self._trouble:
            text = self._trouble
        elif self._waiting:
            text = self._waiting
        elif not self.pairs.pairs():
            text = "Open an image: drop a file on the viewer, or take a sample."
        elif self.pairs.undecided():
            text = _CHOOSE
        else:
            pixels, strokes = self.link.counts()
            text = advice(
                self.classes.names(),
                pixels,
                strokes,
                training=self.link.state == "training",
                predicted=self.link.model is not None,
                scored=self._score is not None,
                holds_out=self._holds_out,
            )
        self.coach.setText(text)
        weight = "bold" if self._trouble else "normal"
        self.coach.setStyleSheet(f"QLabel {{ font-weight: {weight}; }}")

    def _tell(self, text: str) -> None:
        """Show a trouble in the dock and as a notification; "" takes it back."""
        self._trouble = text
        self._show_coach()
        if text:
            show_error(_layers.safe(text))

    # --- correcting ------------------------------------------------------------------

    def accept(self, *, whole_class: bool = False) -> None:
        """Annotate the predicted region under the cursor, or its class in view."""
        show_info(_layers.safe(self.link.accept(whole_class=whole_class)))

    def toggle_prediction(self) -> None:
        """Show or hide what is predicted."""
        self.link.toggle_predictions()

    # --- files -----------------------------------------------------------------------

    def take_model(self, model: Any, path: str) -> None:
        """Go on from a model that has been read from a file."""
        self.unsaved.autosave.save()
        self.start_over()
        self.link.model = model
        self._loaded = path
        offer.newest.put(Path(path).absolute())
        self._go_on_from(model)

    def take_round(self, model: Any, steps: int, score: float | None) -> None:
        """Go on from the model of an earlier round."""
        self.start_over()
        self.link.model, self.link.steps = model, steps
        self._score = score
        self._held = _UNKNOWN if score is None else f"{score:.2f}"
        offer.newest.put(model)
        self._go_on_from(model)

    def _go_on_from(self, model: Any) -> None:
        self._trouble = ""
        self.classes.set_names(model.classes)
        self._on_classes()
        shown = {v: k for k, v in NETWORKS.items()}.get(model.config.name)
        if shown is not None:
            self.network_box.setCurrentText(shown)
        self._offer(model.network.depths)
        self._show_state()
        self.link.watch(self.pairs.pairs())
        self.link.show_again()

    def _keep(self, depth: int) -> None:
        if self.link.model is not None:
            self.files.save(self.link.named().pruned(depth))

    def copy_script(self) -> None:
        """Put a script on the clipboard that trains the same."""
        job = self.link.job(self._settings(), self._loaded)
        if job is None:
            self._tell("Choose an image and its annotation first.")
        else:
            self.files.copy_script(job)

    # --- the end ---------------------------------------------------------------------

    def event(self, event: QEvent) -> bool:
        """Clean up when napari takes the dock away: it sends no close event."""
        if event.type() == QEvent.Type.ParentChange:
            if self.parent() is None:
                self.shut_down()
            else:
                QTimer.singleShot(0, self._share_room)
        return bool(super().event(event))

    def _share_room(self) -> None:
        room.share(self)

    def shut_down(self) -> None:
        """End the run, and let go of the viewer."""
        if self._closed:
            return
        self._closed = True
        keys.unbind(self)
        self.viewer.events.theme.disconnect(self._on_theme)
        self.unsaved.autosave.close()
        self.link.close()
        self.files.close()
        self.projects.close()
        self.pairs.close_events()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d} min"
