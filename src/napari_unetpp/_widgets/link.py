"""Between the layers of a viewer and the live training: strokes in, predictions out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from qtpy.QtCore import QObject, QTimer, Signal

from napari_unetpp._widgets import _layers, offer
from napari_unetpp._widgets._worker import Outcome, Runner, busy_with, is_busy
from napari_unetpp.messages import (
    Mailbox,
    Message,
    Prediction,
    Snapshot,
    View,
    Wishes,
)

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

    from napari.layers import Image, Labels

    from napari_unetpp._widgets.pairs import Pair

_TICK = 100  # ms between two looks at strokes, view and layers


@dataclass(frozen=True)
class Settings:
    """How to train: what the dock's controls said when Train was pressed."""

    network: str = "unet++"
    width: int | None = None
    device: str = "auto"
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)  # of TrainConfig


@dataclass(eq=False)
class _Link:
    """One pair while it is in use."""

    pair: Pair
    strokes: _layers.Strokes
    prediction: Labels | None = None
    probability: Image | None = None
    uncertainty: Image | None = None
    given_up: bool = False  # the user has removed our layer

    @property
    def annotation(self) -> Any:
        return self.pair.annotation

    @property
    def layers(self) -> list[Any]:
        return [*self.pair.images, self.pair.annotation]


class LiveLink(QObject):
    """Runs a live training for the pairs of a viewer and shows what it yields.

    Signals
    -------
    message : a message of the core, other than a prediction
    counted : () the strokes have changed, see `counts`
    changed : () `state` has
    trouble : str, what went wrong, for the user
    learned : () a training of at least one step has ended
    """

    message = Signal(object)
    learned = Signal()
    counted = Signal()
    changed = Signal()
    trouble = Signal(str)

    def __init__(self, viewer: Any, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._viewer = viewer
        self._links: list[_Link] = []
        self._mailbox: Mailbox | None = None
        self._current = 0
        self._training = False
        self._stale_view = True
        self.model: Any = None  # newest Model, never changed by a run
        self.steps = 0
        self.ran: Settings | None = None  # what the model was trained with
        self._before = 0  # steps of the runs before this one
        self._next: Settings | None = None  # a training that waits for the labelling
        self._kind = ""  # of the run: training or showing
        self._held: list[tuple[Any, Any, bool]] = []  # image layers, data, whether rgb
        self.classes: tuple[str, ...] = ()
        self.depth: int | None = None
        self.heads = "last"
        self.probabilities = False
        self.uncertainty = False
        self.device = "auto"
        self.new_checkpoint: Callable[[], Path | None] = lambda: None
        self.state = "idle"  # training, paused, stopping, showing
        self._runner = Runner(self)
        self._runner.received.connect(self._on_message)
        self._runner.drained.connect(self._refresh)
        self._runner.ended.connect(self._on_end)
        self._touched: dict[int, Any] = {}
        self._timer = QTimer(self)
        self._timer.setInterval(_TICK)
        self._timer.timeout.connect(self._tick)
        self._timer.start()
        viewer.layers.events.removed.connect(self._on_removed)

    # --- what the dock asks for ----------------------------------------------------

    def watch(self, pairs: Sequence[Pair]) -> None:
        """Follow the annotations of these pairs; those that stay keep their layers."""
        old = {_identity(link.pair): link for link in self._links}
        links = []
        for pair in pairs:
            link = old.pop(_identity(pair), None)
            if link is None and self._usable(pair):
                link = _Link(pair, _layers.Strokes(pair.annotation))
                link.prediction = self._earlier(pair)
            if link is not None:
                links.append(link)
        for link in old.values():
            link.strokes.close()
        self._links = links
        self._current = min(self._current, max(0, len(links) - 1))

    @staticmethod
    def _usable(pair: Pair) -> bool:
        return pair.annotation is not None and not _layers.check_annotation(
            pair.annotation, pair.images
        )

    def _earlier(self, pair: Pair) -> Labels | None:
        """Return the prediction that an earlier run has made of the same image."""
        key = _marks(pair)
        shape = _layers.spatial_shape(pair.images)
        for layer in self._viewer.layers:
            mark = layer.metadata.get(_layers.OURS) or {}
            own = mark.get("self") == str(layer.unique_id)  # no copy of ours
            if own and mark.get("pair") == key:
                if tuple(layer.data.shape) == shape:
                    return layer
        return None

    def counts(self) -> tuple[list[int], list[int]]:
        """Return the painted pixels and the strokes of each class."""
        n = len(self.classes)
        found = [link.strokes.counts(n) for link in self._links]
        pixels = sum((f[0] for f in found), np.zeros(n, np.int64))
        strokes = sum((f[1] for f in found), np.zeros(n, np.int64))
        return [int(v) for v in pixels], [int(v) for v in strokes]

    def strokes_now(self, *, budget: float) -> list[tuple[Any, dict[int, Any]]]:
        """Return each annotation with copies of its painted planes, by number.

        `budget` : seconds to spend on planes that were never looked at.
        """
        self._read(budget)
        return [(link.annotation, dict(link.strokes.planes)) for link in self._links]

    def _read(self, budget: float) -> None:
        """Copy the strokes that have changed, and tell that they have."""
        changed = False
        for link in self._links:
            changed |= link.strokes.refresh(self._view(link).plane, budget=budget)
        if changed:
            self.counted.emit()

    @property
    def highest(self) -> int:
        """The highest class value that is painted anywhere."""
        return max((link.strokes.highest for link in self._links), default=0)

    def train(self, settings: Settings) -> bool:
        """Start a training of the watched pairs, from the model if there is one."""
        if self._runner.busy:  # the labelling after the last one gives way
            self._next = settings
            self.stop()
            return True
        for link in self._links:
            link.given_up = False
        self._read(budget=0.05)
        if not self._run(settings, "training"):
            return False
        self.ran, self._before = settings, self.steps
        return True

    def show_again(self) -> None:
        """Predict with the model as it is, after depth or maps have changed."""
        if self._runner.busy:
            self._post()
        elif self.model is not None and self._links:
            self._run(Settings(device=self.device), "showing")

    def pause(self) -> None:
        """Keep the training ready, and only predict."""
        self._training = False
        self._post()
        self._set("paused")

    def resume(self) -> None:
        """Go on training."""
        self._training = True
        self._post()
        self._set("training")

    def stop(self) -> None:
        """End the run; the model stays."""
        if self._runner.busy:
            self._set("stopping")
            self._runner.stop()

    def forget(self) -> None:
        """Drop the model, so that the next training starts over."""
        self.model, self.steps, self.ran = None, 0, None

    def count(self, step: int) -> None:
        """Take note of a step of the run."""
        self.steps = self._before + step

    def close(self) -> None:
        """End everything; nothing is heard of this link any more."""
        self._timer.stop()
        self._runner.abandon()
        for link in self._links:
            link.strokes.close()
        self._links = []
        self._viewer.layers.events.removed.disconnect(self._on_removed)
        self.state = "idle"

    def toggle_predictions(self) -> None:
        """Show all predictions if one is hidden, else hide them."""
        found = [link.prediction for link in self._links if link.prediction is not None]
        show = any(not layer.visible for layer in found)
        for layer in found:
            layer.visible = show

    def accept(self, *, whole_class: bool) -> str:
        """Annotate what is predicted under the cursor; return what was done, in words.

        Parameters
        ----------
        whole_class : bool
            All of that class in view, not the connected region alone.
        """
        link = self._links[self._current] if self._links else None
        if link is None or link.prediction is None:
            return "There is no prediction yet. Train first."
        annotation = link.annotation
        view = self._view(link)
        point = annotation.world_to_data(self._viewer.cursor.position)
        row, column = (round(float(p)) for p in point[-2:])
        if not (
            view.rows.start <= row < view.rows.stop
            and view.columns.start <= column < view.columns.stop
        ):
            return (
                "Point at a part of the prediction that is in view, then press again."
            )
        leading = annotation.data.shape[:-2]
        index = np.unravel_index(view.plane, leading) if leading else ()
        labels = link.prediction.data[tuple(int(i) for i in index)]
        value = int(labels[row, column])
        if not value:
            return "Nothing is predicted here yet."
        if whole_class:
            mask = np.zeros(labels.shape, bool)
            part = labels[view.rows, view.columns] == value
            mask[view.rows, view.columns] = part
        else:
            mask = _layers.region_at(labels, (row, column), view)
        done = _layers.accept(annotation, view.plane, mask, value)
        name = self.classes[value - 1] if value <= len(self.classes) else str(value)
        return f"{done:,} pixels annotated as {name}. Ctrl+Z takes them back."

    def named(self) -> Any:
        """Return the model with the names that the table has now."""
        if len(self.classes) != len(self.model.classes):
            return self.model
        return replace(self.model, classes=self.classes)

    def recolour(self) -> None:
        """Give the predictions colours for all classes."""
        colours = _layers.colormap(len(self.classes), background=False)
        for link in self._links:
            layer = link.prediction
            if layer is not None and layer.colormap.name != colours.name:
                layer.colormap = colours

    def job(self, settings: Settings, start: str | None) -> dict[str, Any] | None:
        """Return what `script.Job` needs, None while nothing is chosen."""
        links = self._links
        if not links:
            return None
        self._read(budget=1.0)
        return {
            "images": [
                [
                    (_layers.image_of(layer)[0], layer.source.path, layer.rgb)
                    for layer in link.pair.images
                ]
                for link in links
            ],
            "annotations": [dict(link.strokes.planes) for link in links],
            "shapes": [tuple(link.annotation.data.shape) for link in links],
            "classes": self.classes,
            "network": (self.ran or settings).network,
            "width": (self.ran or settings).width,
            "settings": (self.ran or settings).changes,
            "seed": (self.ran or settings).seed,
            "steps": self.steps,
            "start": start,
        }

    # --- the run -------------------------------------------------------------------

    def _run(self, settings: Settings, state: str) -> bool:
        if is_busy():
            self.trouble.emit(
                f"Something else is running ({busy_with()}). Stop it, or wait for its "
                "end, then try again."
            )
            return False
        try:
            found = [_layers.images_of(link.pair.images) for link in self._links]
        except ValueError as error:
            self.trouble.emit(str(error))
            return False
        images, axes = [f[0] for f in found], [f[1] for f in found]
        layers = [layer for link in self._links for layer in link.pair.images]
        self._held = [(layer, layer.data, layer.rgb) for layer in layers]
        self._training, self._kind = state == "training", state
        names = [link.pair.images[0].name[:64] for link in self._links]
        mailbox = self._mailbox = Mailbox(self._wishes())
        model, n_classes = self.model, len(self.classes)
        kept = self.new_checkpoint() if self._training else None

        def make(stop: threading.Event) -> Generator[Message, None, Any]:
            from napari_unetpp.config import TrainConfig, working_config
            from napari_unetpp.live import live_steps

            network: Any = settings.network
            if model is None and settings.width is not None:
                shape = images[0].shape
                channels = 1 if axes[0] is None else shape[axes[0]]
                network = working_config(
                    settings.network,
                    channels,
                    max(2, n_classes),
                    width=settings.width,
                )
            return live_steps(
                images,
                mailbox,
                channel_axes=axes,
                names=names,
                model=model,
                network=network,
                config=TrainConfig(**settings.changes),
                seed=settings.seed,
                device=settings.device,
                stop=stop,
                checkpoint=kept,
            )

        title = "training" if self._training else "labelling all images"
        if not self._runner.start(make, title=title):
            return False
        self._set(state)
        return True

    def _set(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self.changed.emit()

    def _wishes(self) -> Wishes:
        view = None
        if self._links:
            link = self._links[self._current]
            seen = self._view(link)
            view = View(
                self._current,
                seen.plane,
                (seen.rows.start, seen.rows.stop),
                (seen.columns.start, seen.columns.stop),
            )
        return Wishes(
            tuple(dict(link.strokes.planes) for link in self._links),
            self.classes,
            view,
            self.depth,
            "mean" if self.heads == "mean" else "last",
            self._training,
            self.probabilities,
            self.uncertainty,
        )

    def _post(self) -> None:
        if self._mailbox is not None:
            self._mailbox.put(self._wishes())

    # --- looking at the viewer -----------------------------------------------------

    def _view(self, link: _Link) -> _layers.View:
        return _layers.view_of(self._viewer, link.annotation)

    def _tick(self) -> None:
        active = self._viewer.layers.selection.active
        for i, link in enumerate(self._links):
            ours = [*link.layers, link.prediction]
            if active is not None and any(active == layer for layer in ours):
                self._current = i
        if self._runner.busy and self._switched():
            self._break(
                "An image was switched between colour and grey (rgb), so the run has "
                "ended; the model is still there. Switch it back, then press Go on."
            )
            return
        if self._runner.busy and any(a.data is not b for a, b, _ in self._held):
            self._break(
                "An image was replaced, so the run has ended. Press Go on to use it."
            )
            return
        changed = False
        for link in self._links:
            problem = _layers.check_annotation(link.annotation, link.pair.images)
            problem = problem or link.strokes.problem
            if problem:
                self._break(problem)
                return
            changed |= link.strokes.refresh(self._view(link).plane)
        if changed:
            self.counted.emit()
        if self._runner.busy:
            self._post()

    def _switched(self) -> bool:
        return any(layer.rgb != rgb for layer, _, rgb in self._held)

    def _break(self, problem: str) -> None:
        """Stop because the layers no longer fit, and say so once."""
        for link in self._links:
            link.strokes.close()
        self._links = []
        if self._runner.busy:
            self.stop()
        self.trouble.emit(problem)

    def _on_removed(self, event: Any) -> None:
        gone = event.value
        for link in self._links:
            for name in ("prediction", "probability", "uncertainty"):
                layer = getattr(link, name)
                if layer is not None and layer == gone:
                    setattr(link, name, None)
                    link.given_up |= name == "prediction"
        if any(layer == gone for link in self._links for layer in link.layers):
            busy = self._runner.busy
            self._break(
                f"The layer {gone.name[:64]} was removed, so the training has ended. "
                "Your other layers and the model are still there."
                if busy
                else ""
            )

    # --- what the core says --------------------------------------------------------

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Prediction):
            if not self._switched():  # else the next tick tells
                self._draw(message)
            return
        if isinstance(message, Snapshot):
            self.model = message.model
        self.message.emit(message)

    def _draw(self, tile: Prediction) -> None:
        if tile.image >= len(self._links):
            return
        link = self._links[tile.image]
        if link.given_up:
            return
        if link.prediction is None:
            layer = _layers.prediction_layer(link.pair.images, len(self.classes))
            mark = layer.metadata[_layers.OURS]
            mark |= {"pair": _marks(link.pair), "self": str(layer.unique_id)}
            link.prediction = self._add(link, layer)
        if link.prediction.data[tile.slices].shape == tile.labels.shape:
            link.prediction.data[tile.slices] = tile.labels
            self._touched[id(link.prediction)] = link.prediction
        self._draw_map(link, "uncertainty", tile.uncertainty, tile.slices, 0)
        if tile.probabilities is not None:
            slices = (slice(None), *tile.slices)
            classes = len(tile.probabilities)
            self._draw_map(link, "probability", tile.probabilities, slices, classes)

    def _draw_map(
        self, link: _Link, kind: str, values: Any, slices: Any, leading: int
    ) -> None:
        if values is None:
            return
        layer = getattr(link, kind)
        if layer is not None and leading and len(layer.data) != leading:
            layer = None  # another number of classes
        if layer is None:
            layer = _layers.map_layer(link.pair.images, kind, leading)
            self._add(link, layer)
            setattr(link, kind, layer)
        layer.data[slices] = values
        self._touched[id(layer)] = layer

    def _add(self, link: _Link, layer: Any) -> Any:
        """Add a layer of ours below the annotation; what is selected stays so."""
        layers = self._viewer.layers
        selected = list(layers.selection)
        active = layers.selection.active
        layers.insert(layers.index(link.annotation), layer)
        layers.selection.clear()
        layers.selection.update(selected)
        layers.selection.active = active
        return layer

    def _refresh(self) -> None:
        """Redraw each layer that was written to, once."""
        touched, self._touched = self._touched, {}
        for layer in touched.values():
            if any(layer == other for other in self._viewer.layers):
                layer.refresh(extent=False, thumbnail=False, highlight=False)

    def _on_end(self, outcome: Outcome) -> None:
        was = self.state
        self._held = []
        if outcome.failure is not None:
            self._next = None
        if outcome.result is not None:
            self.model = outcome.result
        if self._kind == "training" and self.model is not None:
            offer.newest.put(self.named())
            if self.steps > self._before and outcome.failure is None:
                self.learned.emit()
        self._mailbox = None
        self._set("idle")
        if outcome.failure is not None:
            self.trouble.emit(outcome.failure.message)
        elif self._next is not None:
            settings, self._next = self._next, None
            self.train(settings)
        elif was == "stopping" and self._kind == "training":
            self.show_again()  # all of every image, with the final weights


def _marks(pair: Pair) -> list[str]:
    """Return what tells a pair's layers from all others, also after they are gone."""
    return [str(layer.unique_id) for layer in (*pair.images, pair.annotation)]


def _identity(pair: Pair) -> tuple[int, ...]:
    return (*map(id, pair.images), id(pair.annotation))
