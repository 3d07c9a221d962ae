"""The face of the Predict dock: what is asked of the user, and nothing that works."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qtpy.QtCore import Qt, Signal
from qtpy.QtWidgets import (
    QButtonGroup,
    QCheckBox,
    QFileDialog,
    QHBoxLayout,
    QLabel,
    QPlainTextEdit,
    QProgressBar,
    QPushButton,
    QRadioButton,
    QSizePolicy,
    QStackedWidget,
    QVBoxLayout,
    QWidget,
)

from ._image_list import ImageList, PathEdit
from ._layers import safe
from ._predict_run import default_out
from .depths import DepthSlider

if TYPE_CHECKING:
    from collections.abc import Sequence

NO_MODEL = "Choose a .safetensors file, or drop it here."
_FILTER = "Models (*.safetensors);;All files (*)"


class PredictForm(QWidget):
    """All controls of the dock, in the order in which they are filled in.

    Attributes
    ----------
    model_chosen, predict, cancel : Signal
        What the user has done.
    """

    model_chosen = Signal()
    predict = Signal()
    cancel = Signal()

    def __init__(self, viewer: Any, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self._depths: tuple[int, ...] = ()
        layout = QVBoxLayout(self)
        layout.setContentsMargins(6, 6, 6, 6)
        layout.setSpacing(8)
        layout.addWidget(self._model_part())
        layout.addWidget(self._target_part(viewer))
        layout.addWidget(self._depth_part())
        layout.addWidget(self._output_part())
        layout.addWidget(self._run_part())
        layout.addStretch(1)
        self._arrange()

    # --- parts -------------------------------------------------------------------

    def _model_part(self) -> QWidget:
        self.model = PathEdit("The file of a trained model.")
        self.model.chosen.connect(self.model_chosen)
        browse = _browse("&Browse…", "Choose the file of a trained model.")
        browse.clicked.connect(self._browse_model)
        self.facts = _text(NO_MODEL)
        return _column(
            _label("&Model file", self.model), _row(self.model, browse), self.facts
        )

    def _target_part(self, viewer: Any) -> QWidget:
        self.on_layers = QRadioButton("&Image layers")
        self.on_layers.setToolTip("Predict images that are open in napari.")
        self.on_folder = QRadioButton("F&older")
        self.on_folder.setToolTip("Predict all image files of a folder.")
        self.on_layers.setChecked(True)
        self.on_folder.toggled.connect(self._arrange)
        self.images = ImageList(viewer)
        self.images.changed.connect(self._arrange)
        self.folder = PathEdit("The folder of the images (without its subfolders).")
        self.folder.setPlaceholderText("folder of images")
        self.folder.setAccessibleName("Folder of images")
        self.folder.textChanged.connect(self._arrange)
        browse = _browse("Browse…", "Choose the folder of the images.")
        browse.clicked.connect(lambda: self._browse_folder(self.folder))
        self._stack = QStackedWidget()
        self._stack.addWidget(self.images)
        self._stack.addWidget(_row(self.folder, browse))
        self._stack.setSizePolicy(
            QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Fixed
        )
        choice = self._choice(self.on_layers, self.on_folder)
        return _column(choice, self._stack)

    def _depth_part(self) -> QWidget:
        self._slider = DepthSlider()
        self._slider.setToolTip(
            "How deep the network is computed: L1 is the fastest. The arrow keys move "
            "it."
        )
        self._slider.valueChanged.connect(self._show_depth)
        self._depth_name = _text("")
        self._depth_name.setWordWrap(False)
        self._depth_name.setMinimumWidth(
            self._depth_name.fontMetrics().horizontalAdvance("L4 accurate  ")
        )
        self.mean = QCheckBox("Mea&n of all depths")
        self.mean.setToolTip(
            "Average the outputs of every depth up to the chosen one: steadier, and "
            "as slow as the chosen depth."
        )
        self._depth_part_ = _column(
            _row(_label("D&epth", self._slider), self._slider, self._depth_name),
            self.mean,
        )
        return self._depth_part_

    def _output_part(self) -> QWidget:
        self.as_layers = QRadioButton("As la&yers")
        self.as_layers.setToolTip("Show each result as a new labels layer.")
        self.as_files = QRadioButton("&As label TIFFs")
        self.as_files.setToolTip(
            "Write one 8-bit TIFF per image, never over another file."
        )
        self.as_layers.setChecked(True)
        self.as_files.toggled.connect(self._arrange)
        self.out = PathEdit("The folder of the label TIFFs; it is made if missing.")
        self.out.setAccessibleName("Folder of the label TIFFs")
        browse = _browse("Browse…", "Choose the folder of the label TIFFs.")
        browse.clicked.connect(lambda: self._browse_folder(self.out))
        self.skip = QCheckBox("&Skip images that are done")
        self.skip.setChecked(True)
        self.skip.setToolTip(
            "Leave out images whose label TIFF exists, so that a run that was stopped "
            "goes on where it ended."
        )
        self._files = _column(_row(self.out, browse), self.skip)
        return _column(self._choice(self.as_layers, self.as_files), self._files)

    def _run_part(self) -> QWidget:
        self.busy = _text("")
        self.start = QPushButton("P&redict")
        self.start.setToolTip("Label all images that are chosen, one after another.")
        self.start.clicked.connect(self.predict)
        self.stop = QPushButton("&Cancel")
        self.stop.setToolTip(
            "Stop within a second. Images that are done stay, a file is never left "
            "half written."
        )
        self.stop.clicked.connect(self.cancel)
        self.progress = _text("")
        self.bar = QProgressBar()
        self.bar.setRange(0, 1000)
        self.bar.setTextVisible(False)
        self.bar.setAccessibleName("Progress")
        self.bar.setToolTip("Share of all pixels that are labelled.")
        self.bar.setFixedHeight(8)
        self.result = _text("")
        self.result.setTextInteractionFlags(
            Qt.TextInteractionFlag.TextSelectableByMouse
            | Qt.TextInteractionFlag.TextSelectableByKeyboard
        )
        self.result.setAccessibleName("Result")
        self.failures = QPlainTextEdit()
        self.failures.setReadOnly(True)
        self.failures.setTabChangesFocus(True)
        self.failures.setAccessibleName("Images that failed")
        self.failures.setToolTip("Images that failed, and why.")
        self.failures.setFixedHeight(12 * self.fontMetrics().height())
        for widget in (self.busy, self.progress, self.bar, self.result, self.failures):
            widget.hide()
        buttons = _row(self.start, self.stop)
        return _column(
            self.busy, buttons, self.progress, self.bar, self.result, self.failures
        )

    def _choice(self, *buttons: QRadioButton) -> QWidget:
        group = QButtonGroup(self)
        for button in buttons:
            group.addButton(button)
        row = _row(*buttons)
        row.layout().addStretch(1)
        return row

    # --- what it shows -----------------------------------------------------------

    def set_offer(self, offered: bool) -> None:
        """Tell what an empty field of the model means."""
        text = "the model that was just trained" if offered else "none yet"
        self.model.setPlaceholderText(text)

    def set_depths(self, depths: Sequence[int]) -> None:
        """Offer these depths, the deepest first chosen; nothing for a single one."""
        if tuple(depths) == self._depths:
            return
        self._depths = tuple(depths)
        several = len(self._depths) > 1
        self._depth_part_.setVisible(several)
        if several:
            self._slider.setRange(0, len(self._depths) - 1)
            self._slider.setValue(len(self._depths) - 1)
        else:
            self.mean.setChecked(False)
        self._show_depth()

    def depth(self) -> int | None:
        """Return the chosen depth, None where there is no choice."""
        if len(self._depths) < 2:
            return None
        return self._depths[int(self._slider.value())]

    def heads(self) -> Literal["last", "mean"]:
        """Return whether the heads up to the depth are averaged."""
        mean = len(self._depths) > 1 and self.mean.isChecked()
        return "mean" if mean else "last"

    def out_folder(self) -> Path | None:
        """Return where label TIFFs go: as typed, or beside the images."""
        return self.out.path() or self._default_out()

    def show_text(self, label: QLabel, text: str) -> None:
        """Show text that may come from anywhere; no text, no line."""
        label.setText(text)
        label.setVisible(bool(text))

    def _show_depth(self) -> None:
        depth = self.depth()
        end = {self._depths[0]: " fast", self._depths[-1]: " accurate"} if depth else {}
        self._depth_name.setText(f"L{depth}{end.get(depth, '')}" if depth else "")
        self._slider.setAccessibleDescription(self._depth_name.text())

    def _arrange(self) -> None:
        """Show the controls that the choices need."""
        folder = self.on_folder.isChecked()
        self._stack.setCurrentIndex(int(folder))
        self._stack.setFixedHeight(self._stack.currentWidget().sizeHint().height())
        self._files.setVisible(self.as_files.isChecked())
        self._depth_part_.setVisible(len(self._depths) > 1)
        default = self._default_out()
        self.out.setPlaceholderText(default.name if default else "folder of labels")
        self.out.setToolTip(
            safe(
                "The folder of the label TIFFs; it is made if missing."
                + (f" Left empty: {default}" if default else "")
            )
        )

    def _default_out(self) -> Path | None:
        if self.on_folder.isChecked():
            folder = self.folder.path()
            return default_out(folder) if folder and folder.name else None
        sources = [layer.source.path for layer in self.images.ticked()]
        known = [Path(path) for path in sources if path]
        return default_out(known[0].absolute().parent) if known else None

    def _browse_model(self) -> None:
        start = self.model.path()
        name, _ = QFileDialog.getOpenFileName(
            self, "Model file", str(start.parent if start else ""), _FILTER
        )
        if name:
            self.model.again()
            self.model.set_path(name)

    def _browse_folder(self, field: PathEdit) -> None:
        start = field.path() or self.folder.path()
        name = QFileDialog.getExistingDirectory(self, "Folder", str(start or ""))
        if name:
            field.set_path(name)


def _text(text: str) -> QLabel:
    """Return a label that shows any text as it is, in as many lines as it needs."""
    label = QLabel(text)
    label.setTextFormat(Qt.TextFormat.PlainText)
    label.setWordWrap(True)
    label.setSizePolicy(QSizePolicy.Policy.Preferred, QSizePolicy.Policy.Minimum)
    return label


def _label(text: str, buddy: QWidget) -> QLabel:
    label = QLabel(text)
    label.setBuddy(buddy)
    buddy.setAccessibleName(text.replace("&", ""))
    return label


def _browse(text: str, tip: str) -> QPushButton:
    button = QPushButton(text)
    button.setToolTip(tip)
    button.setAccessibleName(tip)
    return button


def _row(*widgets: QWidget) -> QWidget:
    row = QWidget()
    layout = QHBoxLayout(row)
    layout.setContentsMargins(0, 0, 0, 0)
    for widget in widgets:
        layout.addWidget(widget)
    return row


def _column(*widgets: QWidget) -> QWidget:
    column = QWidget()
    layout = QVBoxLayout(column)
    layout.setContentsMargins(0, 0, 0, 0)
    layout.setSpacing(3)
    for widget in widgets:
        layout.addWidget(widget)
    return column
