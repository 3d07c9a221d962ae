"""Settings that fold away: maps, device, seed, and how to learn."""

from __future__ import annotations

from typing import Any

from qtpy.QtCore import Signal
from qtpy.QtWidgets import (
    QCheckBox,
    QComboBox,
    QDoubleSpinBox,
    QFormLayout,
    QSpinBox,
    QVBoxLayout,
    QWidget,
)
from superqt import QCollapsible

from napari_unetpp.config import TrainConfig

_DEVICES = {"auto": "auto", "CPU": "cpu", "NVIDIA GPU": "cuda", "Apple GPU": "mps"}


class Advanced(QWidget):
    """Settings for those who look for them; the defaults suit most images.

    Signals
    -------
    maps_changed : the user wants other maps beside the labels
    """

    maps_changed = Signal()

    def __init__(self, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        default = TrainConfig()
        self._uncertainty = _check(
            "Show uncertainty",
            "A further layer, 0 to 1: how much the depths of UNet++ disagree (of other "
            "networks: the entropy). Paint where it is bright.",
        )
        self._probabilities = _check(
            "Show probabilities",
            "A further layer with one map per class, 0 to 1.",
        )
        self._device = QComboBox()
        self._device.addItems(list(_DEVICES))
        self._device.setCurrentText(_preferred())
        self._device.setToolTip("Where the next training computes; auto: the fastest.")
        self._seed = QSpinBox()
        self._seed.setRange(0, 2**31 - 1)
        self._seed.setToolTip(
            "Of all random choices: the same strokes and the same seed learn the same."
        )
        self._rate = QDoubleSpinBox()
        self._rate.setDecimals(5)
        self._rate.setRange(0.00001, 1)
        self._rate.setSingleStep(0.0005)
        self._rate.setValue(default.learning_rate)
        self._rate.setToolTip("Step width of the optimizer (AdamW).")
        self._patch = QSpinBox()
        self._patch.setRange(32, 1024)
        self._patch.setSingleStep(32)
        self._patch.setSuffix(" px")
        self._patch.setValue(default.patch)
        self._patch.setToolTip("Side of the patches that are trained on, in pixels.")
        self._pretrained = _check(
            "Start from pre-trained weights",
            "UNet++ of the default size and two classes starts with weights that have "
            "seen nuclei of many kinds; everything else from random ones.",
        )
        self._pretrained.setChecked(default.pretrained)
        self._forest = _check(
            "Learn from a random forest, too",
            "A random forest on your strokes, which is right about grey values and "
            "colours at once, tells the network what it is sure of elsewhere.",
        )
        self._forest.setChecked(default.forest > 0)
        self._elastic = _check(
            "Elastic deformation",
            "Bend, turn and scale the patches after the first steps.",
        )
        self._elastic.setChecked(default.elastic_sigma > 0)
        self._edges = QDoubleSpinBox()
        self._edges.setRange(0, 10)
        self._edges.setSingleStep(0.5)
        self._edges.setValue(default.edges)
        self._edges.setToolTip(
            "How strongly borders between strokes are drawn to edges of the image."
        )
        form = QFormLayout()
        form.setContentsMargins(4, 0, 4, 0)
        form.setVerticalSpacing(2)
        form.addRow(self._uncertainty)
        form.addRow(self._probabilities)
        form.addRow("Device", self._device)
        form.addRow("Seed", self._seed)
        form.addRow("Learning rate", self._rate)
        form.addRow("Patch", self._patch)
        form.addRow("Draw to edges", self._edges)
        form.addRow(self._forest)
        form.addRow(self._elastic)
        form.addRow(self._pretrained)
        self._learning = QWidget()
        self._learning.setLayout(form)
        self._fold = QCollapsible("Advanced")
        self._fold.layout().setContentsMargins(0, 0, 0, 0)
        self._fold.setDuration(0)
        self._fold.addWidget(self._learning)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.addWidget(self._fold)
        self._uncertainty.toggled.connect(lambda _: self.maps_changed.emit())
        self._probabilities.toggled.connect(lambda _: self.maps_changed.emit())

    def maps(self) -> tuple[bool, bool]:
        """Return whether probabilities, and whether the uncertainty, are wished."""
        return self._probabilities.isChecked(), self._uncertainty.isChecked()

    def device(self) -> str:
        """Return the device's name for the core."""
        return _DEVICES[self._device.currentText()]

    def seed(self) -> int:
        """Return the seed."""
        return int(self._seed.value())

    def changes(self) -> dict[str, Any]:
        """Return what differs from the defaults of `TrainConfig`."""
        default = TrainConfig()
        chosen: dict[str, Any] = {
            "learning_rate": round(self._rate.value(), 5),
            "patch": int(self._patch.value()),
            "edges": round(self._edges.value(), 2),
            "pretrained": self._pretrained.isChecked(),
        }
        if not self._forest.isChecked():
            chosen["forest"] = 0.0
        if not self._elastic.isChecked():
            chosen |= {"elastic_sigma": 0.0, "rotation": 0.0, "scale": 0.0}
        return {k: v for k, v in chosen.items() if v != getattr(default, k)}

    def set_running(self, running: bool) -> None:
        """Lock what a running training cannot change."""
        for widget in (
            self._device,
            self._seed,
            self._rate,
            self._patch,
            self._edges,
            self._forest,
            self._elastic,
            self._pretrained,
        ):
            widget.setEnabled(not running)


def _check(text: str, tip: str) -> QCheckBox:
    box = QCheckBox(text)
    box.setToolTip(tip)
    return box


def _preferred() -> str:
    """Return the device of napari's preferences, where this napari has such pages."""
    try:
        from napari.settings import get_plugin_settings

        wished = get_plugin_settings("napari-unetpp").training.device
    except (ImportError, AttributeError, KeyError, ValueError):
        return "auto"
    names = {value: name for name, value in _DEVICES.items()}
    return names.get(str(getattr(wished, "value", wished)), "auto")
