"""Whatever is pressed in whatever order, no stroke changes and no button lies.

The long tier: `pytest tests/widgets/test_sequences.py --hypothesis-profile=sequences
--timeout=0`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from napari.layers import Image, Labels
from qtpy.QtWidgets import QApplication

from napari_unetpp import api
from napari_unetpp._widgets import _worker, link, offer
from napari_unetpp._widgets._layers import OURS
from napari_unetpp._widgets.predict_dock import PredictDock
from napari_unetpp._widgets.train_dock import TrainDock
from napari_unetpp.messages import Prediction, Progress, Snapshot, Started

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

MODEL = api.create_model("unet", width=4, levels=1)
ANY = st.integers(0, 99)


def three_steps(
    images: Any, mailbox: Any, *, stop: threading.Event, **_: Any
) -> Generator[Any, None, Any]:
    """Stand for `live_steps`: begin, predict all, and train until it is stopped."""
    yield Started("unet", "CPU", (1,))
    for number, image in enumerate(images):
        whole = tuple(slice(0, n) for n in image.shape[-2:])
        labels = np.full(image.shape[-2:], 2, np.uint8)
        yield Prediction(number, whole, labels, None, None, 1)
    step = 0
    while mailbox.latest().training and not stop.is_set():
        step += 1
        yield Snapshot(MODEL)
        yield Progress(api.TrainStep(step, 0.5, 0.1, None), 1.0)
        while not (mailbox.latest().training or stop.is_set()):
            mailbox.wait(0.002)
        mailbox.wait(0.002)
    return MODEL


class Docks(RuleBasedStateMachine):
    """A viewer with both docks, and a copy of every annotation as it was painted."""

    viewer: Any
    folder: Path
    told: list[str]

    @initialize()
    def begin(self) -> None:
        self.painted: dict[Labels, np.ndarray] = {}
        self.train: TrainDock | None = None
        self.predict: PredictDock | None = None
        self.open_train()
        self.open_predict()
        self.add_image(0)
        self.want_annotation()

    # --- what a user does in the viewer -------------------------------------------

    def pick(self, kind: type, number: int) -> Any:
        found = [layer for layer in self.viewer.layers if isinstance(layer, kind)]
        return found[number % len(found)] if found else None

    def settle(self, seconds: float = 0.0) -> None:
        QApplication.processEvents()
        if seconds:
            threading.Event().wait(seconds)
            QApplication.processEvents()

    @rule(number=ANY)
    def add_image(self, number: int) -> None:
        if len(self.viewer.layers) > 8:
            return
        shape = [(16, 16), (12, 20), (2, 16, 16)][number % 3]
        pixels = np.random.default_rng(number).integers(0, 255, shape)
        self.viewer.add_image(pixels.astype(np.uint8), name="ab<b>"[number % 5])

    @rule(number=ANY)
    def add_labels(self, number: int) -> None:
        if len(self.viewer.layers) > 8:
            return
        marks = np.zeros([(16, 16), (12, 20)][number % 2], np.uint8)
        marks[number % 12] = 1
        self.painted[self.viewer.add_labels(marks)] = marks.copy()

    @rule(number=ANY, value=st.integers(1, 2), y=st.integers(0, 15), x=ANY)
    def paint(self, number: int, value: int, y: int, x: int) -> None:
        layer = self.pick(Labels, number)
        if layer in self.painted:
            place = (0,) * (layer.ndim - 2) + (y % layer.data.shape[-2], x % 12)
            layer.paint(place, value)
            self.painted[layer] = layer.data.copy()
            assert layer.data[place] == value

    @rule(number=ANY)
    def undo(self, number: int) -> None:
        layer = self.pick(Labels, number)
        if layer in self.painted:
            layer.undo()
            self.painted[layer] = layer.data.copy()

    @rule(number=ANY, name=st.sampled_from(["a", "b", "<b>x</b>", ""]))
    def rename(self, number: int, name: str) -> None:
        layer = self.pick((Image, Labels), number)
        if layer is not None:
            layer.name = name

    @rule(number=ANY)
    def delete(self, number: int) -> None:
        layer = self.pick((Image, Labels), number)
        if layer is not None:
            self.viewer.layers.remove(layer)
            self.painted.pop(layer, None)

    @rule(number=ANY)
    def reload_image(self, number: int) -> None:
        layer = self.pick(Image, number)
        if layer is not None:
            layer.data = 255 - layer.data

    # --- what a user does in the docks --------------------------------------------

    @precondition(lambda self: self.train is None)
    @rule()
    def open_train(self) -> None:
        self.train = TrainDock(self.viewer)
        self.viewer.window.add_dock_widget(self.train, name="train")
        self.train.advanced._device.setCurrentText("CPU")
        self.train.network_box.setCurrentText("U-Net")

    @precondition(lambda self: self.train is not None)
    @rule(surely=st.sampled_from([False, False, False, True]))
    def close_train(self, surely: bool = True) -> None:
        if not surely:
            return
        self.viewer.window.remove_dock_widget(self.train)
        self.train.deleteLater()
        self.train = None

    @precondition(lambda self: self.predict is None)
    @rule()
    def open_predict(self) -> None:
        self.predict = PredictDock(self.viewer)
        self.viewer.window.add_dock_widget(self.predict, name="predict")

    @precondition(lambda self: self.predict is not None)
    @rule(surely=st.sampled_from([False, False, False, True]))
    def close_predict(self, surely: bool = True) -> None:
        if not surely:
            return
        self.viewer.window.remove_dock_widget(self.predict)
        self.predict.deleteLater()
        self.predict = None

    @precondition(lambda self: self.train is not None)
    @rule()
    def want_annotation(self) -> None:
        self.train.pairs.want_annotations()
        for pair in self.train.pairs.pairs():
            if pair.annotation is not None and pair.annotation not in self.painted:
                assert not pair.annotation.data.any()
                self.painted[pair.annotation] = pair.annotation.data.copy()

    @precondition(lambda self: self.train is not None)
    @rule(number=ANY)
    def choose_annotation(self, number: int) -> None:
        layer = self.pick(Labels, number)
        if layer in self.painted and self.train.pairs.isEnabled():
            if self.train.pairs.pairs():
                self.train.pairs.set_annotation(0, layer)

    def press(self, button: Any) -> None:
        before = {layer for layer in self.viewer.layers if layer in self.painted}
        button.click()
        # Train makes the annotations that are missing, empty.
        for layer in self.viewer.layers:
            if isinstance(layer, Labels) and layer not in before:
                if not layer.metadata.get(OURS):
                    assert not layer.data.any()
                    self.painted[layer] = layer.data.copy()

    @precondition(lambda self: self.train is not None)
    @rule(name=st.sampled_from(["train", "train", "pause", "stop", "over"]))
    def press_train(self, name: str) -> None:
        self.press(getattr(self.train, f"{name}_button"))

    @precondition(lambda self: self.train is not None)
    @rule()
    def reload_model(self) -> None:
        if self.train.load_button.isEnabled():
            self.train.files.read(str(self.folder / "m.safetensors"))

    @precondition(lambda self: self.train is not None)
    @rule()
    def save_model(self) -> None:
        if self.train.save_button.isEnabled():
            model = self.train.link.named()
            self.train.files.write(model, str(self.folder / "own.safetensors"))

    @precondition(lambda self: self.predict is not None)
    @rule(name=st.sampled_from(["start", "start", "stop"]))
    def press_predict(self, name: str) -> None:
        self.predict._poll()
        for layer in self.predict.form.images.ticked():
            assert layer in self.viewer.layers
        getattr(self.predict.form, name).click()

    @rule(long=st.booleans())
    def wait(self, long: bool) -> None:
        self.settle(0.05 if long else 0.005)

    # --- what always holds --------------------------------------------------------

    @invariant()
    def strokes_change_by_paint_alone(self) -> None:
        self.settle()
        for layer, marks in self.painted.items():
            np.testing.assert_array_equal(layer.data, marks)

    @invariant()
    def buttons_tell_the_truth(self) -> None:
        if self.train is not None:
            state, run = self.train.link.state, self.train.link._runner
            assert run.busy is (state != "idle")
            assert not run.busy or run in _worker._active or _worker._queue
            assert run.stopping is (state == "stopping")
            for name, states in {
                "train": ("idle", "paused", "showing"),
                "pause": ("training", "paused"),
                "stop": ("training", "paused", "showing"),
                "load": ("idle",),
            }.items():
                button = getattr(self.train, f"{name}_button")
                assert button.isEnabled() is (state in states)
            assert self.train.coach.text()
        if self.predict is not None:
            self.predict._poll()
            form, run = self.predict.form, self.predict._runner
            going = run.busy and self.predict._predicting
            assert form.stop.isEnabled() is (going and not run.stopping)
            assert not (form.start.isEnabled() and run.busy)
        assert not [text for text in self.told if "Unexpected" in text]

    def teardown(self) -> None:
        if not hasattr(self, "painted"):
            return
        if self.train is not None:
            self.close_train()
        if self.predict is not None:
            self.close_predict()
        for _ in range(2000):
            self.settle()
            if not (_worker._active or _worker._queue):
                break
            threading.Event().wait(0.005)
        assert [*_worker._active, *_worker._queue] == []
        self.strokes_change_by_paint_alone()
        self.viewer.layers.clear()
        offer.newest.put(None)
        self.told.clear()
        aside = [t for t in threading.enumerate() if "aside" in t.name]
        for thread in aside:
            thread.join(5)
            assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:Conversion from CIE-LAB")  # of napari's colours
def test_sequences(
    make_napari_viewer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Docks.viewer, Docks.folder, Docks.told = make_napari_viewer(), tmp_path, []
    MODEL.save(tmp_path / "m.safetensors")
    monkeypatch.setattr("napari_unetpp.live.live_steps", three_steps)
    # Looked at more often than a user could see, so that more happens in a sequence.
    monkeypatch.setattr(_worker, "_TICK", 2)
    monkeypatch.setattr(link, "_TICK", 5)
    for module in ("train_dock", "predict_dock", "model_files", "projects"):
        for name in ("show_error", "show_info"):
            monkeypatch.setattr(
                f"napari_unetpp._widgets.{module}.{name}", Docks.told.append,
                raising=False,
            )  # fmt: skip
    long = settings().max_examples == 300
    run_state_machine_as_test(
        Docks,
        settings=settings(
            max_examples=300 if long else 2,
            stateful_step_count=50 if long else 12,
            suppress_health_check=list(settings().suppress_health_check),
        ),
    )
