"""Model files and scripts: read and written for the dock, in the worker where slow."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from napari.utils.notifications import show_error, show_info
from qtpy.QtCore import QObject, Signal
from qtpy.QtGui import QGuiApplication
from qtpy.QtWidgets import QFileDialog, QWidget

from napari_unetpp._widgets import offer
from napari_unetpp._widgets._layers import safe
from napari_unetpp._widgets._worker import Aside, Outcome, Runner, is_busy

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Generator

_KIND = "Models (*.safetensors)"


class ModelFiles(QObject):
    """Asks for names, reads and writes.

    Signals
    -------
    loaded : Model and the path of its file
    saved : a model is in a file of the user's
    trouble : str, what went wrong; "" after what went well
    """

    loaded = Signal(object, str)
    saved = Signal()
    trouble = Signal(str)

    def __init__(self, dock: QWidget) -> None:
        super().__init__(dock)
        self._dock = dock
        self._then: Callable[[Any], None] = lambda _: None
        self._runner = Runner(self)
        self._runner.ended.connect(self._on_end)
        self._aside = Aside(self)
        self._closed = False

    def close(self) -> None:
        """Hear no more of what is under way."""
        self._closed = True
        self._runner.abandon()

    def load(self) -> None:
        """Ask for a model file and read it."""
        path, _ = QFileDialog.getOpenFileName(self._dock, "Load a model", "", _KIND)
        if path:
            self.read(path)

    def read(self, path: str) -> None:
        """Read a model file; `loaded` follows."""

        def work() -> Any:
            from napari_unetpp.api import load_model

            return load_model(path)

        self._work(work, lambda model: self.loaded.emit(model, path), "reading a model")

    def save(self, model: Any) -> None:
        """Ask for a name and write a model."""
        path, _ = QFileDialog.getSaveFileName(
            self._dock, "Save the model", "model.safetensors", _KIND
        )
        if path:
            self.write(model, path)

    def write(self, model: Any, path: str) -> None:
        """Write a model; the dialog has asked whether to replace this very file."""
        target = path if path.endswith(".safetensors") else path + ".safetensors"

        def work() -> str:
            model.save(target, overwrite=target == path)
            return target

        def then(_: str) -> None:
            offer.newest.put(Path(target).absolute())
            show_info(safe(f"Saved {Path(target).name}."))
            self.saved.emit()

        if not is_busy():
            self._work(work, then, "saving the model")
            return
        # The thread trains; waiting for its end could lose the model.
        self._aside.start(work, lambda outcome: self._tell(outcome, then))

    def copy_script(self, job: dict[str, Any]) -> None:
        """Write the data of a `script.Job` and put the script on the clipboard."""
        folder = Path.home() / "napari-unetpp" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"

        def work() -> Any:
            from napari_unetpp.script import Channel, Job, write_script

            images = [[Channel(*part) for part in parts] for parts in job["images"]]
            return write_script(Job(**{**job, "images": images}), folder)

        def then(text: str) -> None:
            QGuiApplication.clipboard().setText(text)
            show_info(safe(f"The script is on the clipboard; its data: {folder}"))

        self._work(work, then, "writing a script")

    def _work(
        self, work: Callable[[], Any], then: Callable[[Any], None], title: str
    ) -> None:
        def make(_: threading.Event) -> Generator[None, None, Any]:
            yield from ()
            return work()

        if self._runner.start(make, title=title, short=True):
            self._then = then
        else:
            self.trouble.emit("A run is still busy. Stop it, or wait for its end.")

    def _on_end(self, outcome: Outcome) -> None:
        self._tell(outcome, self._then)

    def _tell(self, outcome: Outcome, then: Callable[[Any], None]) -> None:
        if outcome.failure is not None and self._closed:
            show_error(safe(outcome.failure.message))
        elif outcome.failure is not None:
            self.trouble.emit(outcome.failure.message)
        elif outcome.result is not None:
            if not self._closed:
                self.trouble.emit("")
            then(outcome.result)
