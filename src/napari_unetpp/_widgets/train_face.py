"""The face of the dock "Annotate and train": its controls, and where they stand."""

from __future__ import annotations

from typing import Any

from qtpy.QtCore import Qt
from qtpy.QtWidgets import (
    QComboBox,
    QHBoxLayout,
    QLabel,
    QProgressBar,
    QPushButton,
    QVBoxLayout,
    QWidget,
)

from napari_unetpp._widgets.advanced import Advanced
from napari_unetpp._widgets.classes import ClassTable
from napari_unetpp._widgets.depths import DepthPanel
from napari_unetpp._widgets.pairs import PairTable
from napari_unetpp._widgets.plot import LossPlot
from napari_unetpp._widgets.room import Scrolled

NETWORKS = {"UNet++": "unet++", "U-Net": "unet", "FCN": "fcn-8s"}
SIZES = {"small": 8, "medium": None, "large": 32}


class TrainFace(QWidget):
    """Controls without behaviour.

    Parameters
    ----------
    viewer : napari.Viewer
        Whose layers are offered.
    """

    def __init__(self, viewer: Any) -> None:
        super().__init__()
        self.viewer = viewer
        self._make_controls()
        self._lay_out()

    def _make_controls(self) -> None:
        self.pairs = PairTable(self.viewer)
        self.classes = ClassTable()
        self.network_box = _combo(
            list(NETWORKS),
            "Network",
            "UNet++ has depths to choose from afterwards; U-Net learns more in the "
            "same time; FCN is coarse.",
        )
        self.size_box = _combo(
            list(SIZES),
            "Size of the network",
            "Channels of the first level: 8, 16 or 32 (FCN: 8, 16, 32). Small is the "
            "fastest, large takes about four times as long as medium.",
        )
        self.size_box.setCurrentText("medium")
        self.depths = DepthPanel()
        self.train_button = _button(
            "Train", "Learn from the strokes, while you go on painting (Alt+T)."
        )
        self.pause_button = _button(
            "Pause", "Stop learning for a moment; go on where it was (Alt+T)."
        )
        self.stop_button = _button(
            "Stop", "End the training, keep the model and label all images with it."
        )
        self.over_button = _button(
            "Start over", "Forget the model. Your strokes stay as they are."
        )
        self.status = _text("")
        self.status.setWordWrap(True)  # a longer line would push the rest out of view
        self.status.setToolTip(
            "The score is estimated for the whole images, from painted pixels that "
            "training never saw, with its 90 % interval."
        )
        self.device = _text("Device: getting ready…")
        self.device.setWordWrap(True)
        self.coach = _text("")
        self.coach.setWordWrap(True)
        self.coach.setMinimumHeight(2 * self.coach.fontMetrics().lineSpacing() + 4)
        self.coach.setAlignment(Qt.AlignmentFlag.AlignTop | Qt.AlignmentFlag.AlignLeft)
        self.bar = QProgressBar()
        self.bar.setTextVisible(False)
        self.bar.setFixedHeight(5)
        self.bar.setToolTip("Share of all tiles that the newest weights have labelled.")
        self.plot = LossPlot()
        self.load_button = _button("Load…", "Go on from a model file.")
        self.save_button = _button("Save…", "Write the model to a file.")
        self.script_button = _button(
            "Copy as script",
            "Put a Python script on the clipboard that trains the same without napari.",
        )
        self.project_button = _button(
            "Project",
            "Save images, strokes, model and settings as a folder, or open one; and go "
            "back to an earlier round: each training that you stopped is one.",
        )
        self.advanced = Advanced()

    def _lay_out(self) -> None:
        content = QWidget()
        layout = QVBoxLayout(content)
        layout.setContentsMargins(6, 4, 6, 4)
        layout.setSpacing(4)
        layout.addWidget(self.pairs)
        layout.addWidget(self.classes)
        layout.addLayout(_row(QLabel("Network"), self.network_box, self.size_box))
        layout.addWidget(self.depths)
        layout.addLayout(
            _row(
                self.train_button, self.pause_button, self.stop_button, self.over_button
            )
        )
        layout.addWidget(self.bar)
        layout.addWidget(self.status)
        layout.addWidget(self.device)
        layout.addWidget(self.coach)
        layout.addWidget(self.plot)
        layout.addLayout(
            _row(
                self.load_button,
                self.save_button,
                self.script_button,
                self.project_button,
            )
        )
        layout.addWidget(self.advanced)
        layout.addStretch(1)
        outer = QVBoxLayout(self)
        outer.setContentsMargins(0, 0, 0, 0)
        outer.addWidget(Scrolled(content))
        self.setMinimumWidth(330)


def _text(text: str) -> QLabel:
    label = QLabel(text)
    label.setTextFormat(Qt.TextFormat.PlainText)
    return label


def _button(text: str, tip: str) -> QPushButton:
    button = QPushButton(text)
    button.setToolTip(tip)
    return button


def _combo(items: list[str], name: str, tip: str) -> QComboBox:
    combo = QComboBox()
    combo.addItems(items)
    combo.setAccessibleName(name)
    combo.setToolTip(tip)
    return combo


def _row(*widgets: QWidget) -> QHBoxLayout:
    row = QHBoxLayout()
    row.setSpacing(4)
    for widget in widgets:
        row.addWidget(widget)
    return row
