"""The menu "Project": saved and opened as a folder, with the rounds to go back to."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from napari.layers import Image, Labels
from napari.utils.notifications import show_info
from qtpy.QtCore import QObject
from qtpy.QtWidgets import QFileDialog, QMenu

from napari_unetpp._widgets import _layers
from napari_unetpp._widgets._worker import Aside, Outcome
from napari_unetpp._widgets.pairs import Pair, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from napari_unetpp.api import Project, ProjectImage

PATH = "napari-unetpp path"  # key in an image's metadata: the file that a project named
KEPT = 10  # rounds in the menu; the best one stays, whatever its age

Planes = dict[int, Any]  # the painted planes of an annotation by number; never changed


@dataclass(eq=False)
class Step:
    """A round: what a training has learned, and from which strokes."""

    number: int
    steps: int
    painted: int
    when: datetime
    score: float | None = None
    model: Any = None  # None: on the disk alone
    strokes: list[tuple[Labels, Planes]] = field(default_factory=list)
    disk: int | None = None  # its number in the project's folder

    @property
    def text(self) -> str:
        """What it is, in words."""
        score = "no score" if self.score is None else f"IoU {self.score:.2f}"
        return (
            f"{self.number}: {score}, {self.steps:,} steps, {self.painted:,} px "
            f"painted, {self.when.day} {self.when:%b %H:%M}"
        )


class Projects(QObject):
    """Keeps the rounds of a dock, and its project on the disk.

    Files are read and written in a thread, one after another; layers and models are
    taken and put in place on the GUI thread.

    Parameters
    ----------
    dock : TrainDock
        Whose pairs, model and settings these are.
    """

    def __init__(self, dock: Any) -> None:
        super().__init__(dock)
        self._dock = dock
        self.rounds: list[Step] = []
        self.current: Step | None = None
        self.folder: Path | None = None
        self._saved: list[Pair] = []  # of the project as it is on the disk
        self._number = 0
        self._aside = Aside(self)
        self._turn = threading.Lock()
        self._closed = False
        self._wanted: Callable[[], None] | None = None  # once the labelling has ended
        self.menu = QMenu("Project", dock)
        self.menu.setToolTipsVisible(True)
        self.menu.aboutToShow.connect(self.fill)
        dock.project_button.setMenu(self.menu)
        dock.link.learned.connect(self.learned)
        dock.link.changed.connect(self._on_state)
        self.fill()

    def close(self) -> None:
        """Hear no more of what is under way; it is written all the same."""
        self._closed = True

    def fill(self) -> None:
        """Bring the menu up to date."""
        idle = self._dock.link.state in ("idle", "showing")
        self.menu.clear()
        save = self.menu.addAction("Save project", self.save)
        save.setEnabled(idle and self.folder is not None)
        ask = self.menu.addAction("Save project as…", self.ask_save)
        ask.setEnabled(idle)
        self.menu.addAction("Open project…", self.ask_open).setEnabled(idle)
        self.menu.addSeparator()
        head = self.menu.addAction(
            "Go back to round:"
            if self.rounds
            else "Each training that you stop becomes a round to go back to."
        )
        head.setEnabled(False)
        for step in reversed(self.rounds):
            action = self.menu.addAction(step.text)
            action.setCheckable(True)
            action.setChecked(step is self.current)
            action.setEnabled(idle)
            action.setToolTip(
                "Take its model and strokes again. What you have now is kept as a "
                "round first, and Ctrl+Z takes the strokes back."
            )
            action.triggered.connect(lambda _=False, s=step: self.go_back(s))

    # --- rounds ----------------------------------------------------------------------

    def learned(self) -> None:
        """Keep what a training has learned."""
        strokes = self._dock.link.strokes_now(budget=0.05)
        if strokes:
            self._add(self._dock.link.named(), strokes, self._dock.link.steps)

    def _add(
        self, model: Any, strokes: list[tuple[Labels, Planes]], steps: int
    ) -> Step:
        self._number += 1
        last = model.history[-1] if model.history else None
        step = Step(
            self._number,
            steps,
            sum(int(np.count_nonzero(p)) for _, s in strokes for p in s.values()),
            datetime.now().astimezone(),
            last.score if last else None,
            model,
            strokes,
        )
        self.rounds.append(step)
        self.current = step
        best = max(self.rounds, key=lambda s: -1.0 if s.score is None else s.score)
        for old in list(self.rounds):
            if len(self.rounds) > KEPT and old not in (best, step):
                self.rounds.remove(old)
        self._write_round(step)
        return step

    def _write_round(self, step: Step) -> None:
        folder, pairs = self.folder, self._dock.pairs.pairs()
        if folder is None:
            return
        if pairs != self._saved:  # others than the project knows
            self.save()
            return
        arrays = [(tuple(a.data.shape), planes) for a, planes in step.strokes]

        def work() -> Any:
            from napari_unetpp.api import add_round

            return add_round(folder, step.model, [_whole(*a) for a in arrays])

        def then(project: Project) -> None:
            step.disk = project.current
            self._dock.unsaved.saved()

        self._work(work, then)

    def go_back(self, step: Step) -> None:
        """Take the model and the strokes of a round; the present ones are kept."""
        self._when_idle(lambda: self._go_back(step))

    def _go_back(self, step: Step) -> None:
        link = self._dock.link
        now = link.strokes_now(budget=60)
        known = self.current
        model = link.model or (known and known.model)
        same = known is not None and model is not None and _alike(known.strokes, now)
        if now and model is not None and not same:
            self._add(link.named() if link.model else model, now, link.steps)
        if step.model is not None:
            self._take(step)
            return
        folder, number = self.folder, step.disk
        layers = [pair.annotation for pair in self._saved]

        def work() -> Any:
            from napari_unetpp.api import load_project

            project = load_project(str(folder))
            found = project.round(int(number or 0))
            return found.load_model(), project.read_annotations(found.number)

        def then(result: Any) -> None:
            step.model = result[0]
            step.strokes = [
                (layer, _planes(a)) for layer, a in zip(layers, result[1], strict=False)
            ]
            self._when_idle(lambda: self._take(step))

        self._work(work, then)

    def _when_idle(self, call: Callable[[], None]) -> None:
        """Call now, or once the labelling has ended; never into a training."""
        state = self._dock.link.state
        if state == "idle":
            call()
        elif state == "showing":
            self._wanted = call
            self._dock.link.stop()
        else:
            self._dock._tell("A training is under way. Stop it, then try again.")

    def _on_state(self) -> None:
        if self._dock.link.state == "idle" and self._wanted is not None:
            call, self._wanted = self._wanted, None
            call()

    def _take(self, step: Step) -> None:
        layers = list(self._dock.viewer.layers)
        lost = 0
        for layer, planes in step.strokes:
            if layer in layers:
                put(layer, planes)
            else:
                lost += 1
        self._dock.take_round(step.model, step.steps, step.score)
        self.current = step
        text = f"Back at round {step.number}."
        if lost:
            text += f" The strokes of {lost} removed layer(s) were left out."
        show_info(_layers.safe(text))
        if self.folder is not None and step.disk is not None:
            folder, number = self.folder, step.disk

            def work() -> Any:
                from napari_unetpp.api import go_back

                return go_back(folder, number)

            self._work(work, lambda _: None)

    # --- the folder ------------------------------------------------------------------

    def ask_save(self) -> None:
        """Ask for a folder and save the project there."""
        start = str(self.folder or "")
        path = QFileDialog.getExistingDirectory(
            self._dock, "Save the project: make or choose an empty folder", start
        )
        folder = Path(path).resolve()
        if path and folder != self.folder and (folder / "project.json").exists():
            self._dock._tell(
                f"{plain(folder.name)} holds another project. Choose an empty folder, "
                "or open that project instead."
            )
        elif path:
            self._save_in(folder)

    def save(self) -> None:
        """Save the project where it is."""
        if self.folder is not None:
            self._save_in(self.folder)

    def _save_in(self, folder: Path) -> None:
        """Save images by reference, strokes, settings and what is new of the rounds."""
        pairs, link = self._dock.pairs.pairs(), self._dock.link
        if not pairs or any(pair.annotation is None for pair in pairs):
            self._dock._tell(
                "A project needs images, each with its annotation. Press New first."
            )
            return
        told = [_told(pair) for pair in pairs]
        arrays = [np.array(p.annotation.data) for p in pairs]  # the user paints on
        shapes = [a.shape for a in arrays]
        model = link.named() if link.model is not None else None
        new = folder != self.folder
        fresh = [
            step
            for step in self.rounds
            if (new or step.disk is None) and step.model is not None
            if [a.data.shape for a, _ in step.strokes] == shapes
        ]
        strokes = [[_whole(a.data.shape, p) for a, p in s.strokes] for s in fresh]
        rest: dict[str, Any] = {
            "classes": self._dock.classes.names(),
            "depth": self._dock.depths.depth(),
        }
        changes = self._dock._settings().changes

        def work() -> Any:
            from napari_unetpp.api import (
                ProjectImage,
                TrainConfig,
                add_round,
                save_project,
            )

            images = [ProjectImage(**values) for values in told]
            rest["config"] = TrainConfig(**changes)
            numbers = []
            if fresh:
                save_project(folder, images, arrays, **rest)
            for step, notes in zip(fresh, strokes, strict=True):
                numbers.append(add_round(folder, step.model, notes).current)
            return save_project(folder, images, arrays, model, **rest), numbers

        def then(result: Any) -> None:
            project, numbers = result
            if new:  # what is in the other folder alone stays there
                self.rounds = [step for step in self.rounds if step.model is not None]
                for step in self.rounds:
                    step.disk = None
            for step, number in zip(fresh, numbers, strict=True):
                step.disk = number
            self.folder, self._saved = folder, pairs
            self._tell_saved(project)

        self._work(work, then)

    def _tell_saved(self, project: Project) -> None:
        own = project.folder / "images"
        stored = sum(f.parent == own for i in project.images for f in i.files if f)
        text = f"Saved the project {plain(project.folder.name)}."
        if stored:
            text += (
                f" {stored} image(s) are in no file of their own, so they were stored "
                "in its folder."
            )
        show_info(_layers.safe(text))
        self._dock._tell("")
        self._dock.unsaved.saved()

    def ask_open(self) -> None:
        """Ask for a project's folder and open it."""
        path = QFileDialog.getExistingDirectory(self._dock, "Open a project", "")
        if path:
            self.read(Path(path))

    def read(self, folder: Path) -> None:
        """Open a project: its images and annotations become layers."""

        def work() -> Any:
            from napari_unetpp.api import load_project

            project = load_project(folder)
            images = [image.read_files() for image in project.images]
            notes, kept = project.read_annotations(), []
            if project.current is not None:
                kept = project.read_annotations(project.current)
            return project, images, notes, kept, project.load_model()

        def then(result: Any) -> None:
            self._when_idle(lambda: self._show(*result))

        self._work(work, then)

    def _show(
        self,
        project: Project,
        images: list[Any],
        notes: list[Any],
        kept: list[Any],
        model: Any,
    ) -> None:
        viewer, pairs = self._dock.viewer, []
        for image, parts, note in zip(project.images, images, notes, strict=True):
            shown = _image_layers(image, parts)
            layer = _layers.new_annotation(shown, len(project.classes))
            layer.data = note
            layer.metadata["classes"] = list(project.classes)
            layer.brush_size = 6
            for each in (*shown, layer):
                viewer.add_layer(each)
            pairs.append(Pair(tuple(shown), layer))
        self._dock.pairs.set_pairs(pairs)
        self.folder, self._saved = project.folder, self._dock.pairs.pairs()
        self.rounds = [
            Step(
                r.number,
                r.steps,
                r.painted,
                datetime.fromisoformat(r.date),
                r.score,
                disk=r.number,
            )
            for r in project.rounds
        ]
        self._number = max((r.number for r in project.rounds), default=0)
        self.current = next((s for s in self.rounds if s.disk == project.current), None)
        if self.current is not None:
            self.current.model = model
            self.current.strokes = [
                (pair.annotation, _planes(a))
                for pair, a in zip(pairs, kept, strict=False)
            ]
            self._dock.take_round(model, self.current.steps, self.current.score)
        if self.current is None or len(project.classes) > len(model.classes):
            self._dock.classes.set_names(project.classes)
            self._dock._on_classes()
        show_info(_layers.safe(f"Opened the project {plain(project.folder.name)}."))

    # --- the thread ------------------------------------------------------------------

    def _work(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        turn = self._turn

        def alone() -> Any:
            with turn:
                return work()

        def tell(outcome: Outcome) -> None:
            if self._closed:
                return
            if outcome.failure is not None:
                self._dock._tell(outcome.failure.message)
            else:
                then(outcome.result)

        self._aside.start(alone, tell)


def put(layer: Labels, planes: Planes) -> None:
    """Give an annotation these strokes, as one step that Ctrl+Z takes back."""
    new = _whole(tuple(layer.data.shape), planes).astype(layer.data.dtype)
    places = np.nonzero(layer.data != new)
    if len(places[0]):
        layer.data_setitem(places, new[places])


def _whole(shape: tuple[int, ...], planes: Planes) -> Any:
    """Return an annotation as one array."""
    whole = np.zeros((int(np.prod(shape[:-2], dtype=np.int64)), *shape[-2:]), np.uint8)
    for number, plane in planes.items():
        whole[number] = plane
    return whole.reshape(shape)


def _planes(whole: Any) -> Planes:
    flat = whole.reshape(-1, *whole.shape[-2:])
    return {n: plane.astype(np.uint8) for n, plane in enumerate(flat) if plane.any()}


def _alike(
    kept: Sequence[tuple[Labels, Planes]], now: Sequence[tuple[Labels, Planes]]
) -> bool:
    return len(kept) == len(now) and all(
        a is b and x.keys() == y.keys() and all(np.array_equal(x[n], y[n]) for n in x)
        for (a, x), (b, y) in zip(kept, now, strict=True)
    )


def _told(pair: Pair) -> dict[str, Any]:
    """Return a pair's images as a ProjectImage has them."""
    first = pair.images[0]
    paths = [layer.source.path or layer.metadata.get(PATH) for layer in pair.images]
    return {
        "name": first.name[:200],
        "files": tuple(Path(p) if isinstance(p, str) else None for p in paths),
        "channel_axis": -1 if first.rgb else None,
        "rgb": bool(first.rgb),
        "scale": tuple(float(v) for v in first.scale),
        "translate": tuple(float(v) for v in first.translate),
        "units": tuple(str(u) for u in first.units),
        "data": tuple(x.data[0] if x.multiscale else x.data for x in pair.images),
    }


def _image_layers(image: ProjectImage, parts: list[Any]) -> list[Image]:
    """Return the layers of an image; channels that are no colours get one each."""
    rgb = image.rgb or (image.channel_axis == -1 and parts[0].shape[-1] == 3)
    paths = [str(path) for path in image.files]
    if image.channel_axis == -1 and not rgb:
        parts = [parts[0][..., n] for n in range(parts[0].shape[-1])]
        paths = [""] * len(parts)
    ndim = parts[0].ndim - rgb
    place = {
        key: values
        for key in ("scale", "translate", "units")
        if len(values := getattr(image, key)) == ndim
    }
    layers = []
    for n, (data, path) in enumerate(zip(parts, paths, strict=True)):
        name = image.name if len(parts) == 1 else f"{image.name} {n + 1}"
        try:
            layer = Image(data, name=name, rgb=rgb, **place)
        except (AttributeError, ValueError):  # a unit that napari does not know
            place.pop("units", None)
            layer = Image(data, name=name, rgb=rgb, **place)
        if len(parts) > 1:
            layer.blending = "additive"
        layer.metadata[PATH] = path or None
        layers.append(layer)
    return layers
