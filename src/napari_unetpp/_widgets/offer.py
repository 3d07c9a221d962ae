"""The model that was trained, saved or loaded last: one dock tells the other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qtpy.QtCore import QObject, Signal

if TYPE_CHECKING:
    from napari_unetpp.api import Model


class Offer(QObject):
    """The newest model: in memory while it is not saved, else its file.

    Attributes
    ----------
    changed : Signal
        There is another one.
    """

    changed = Signal()

    def __init__(self) -> None:
        super().__init__()
        self.model: Model | None = None
        self.path: Path | None = None

    def put(self, what: Model | Path | None) -> None:
        """Offer a model or the file of one instead of the last, None: nothing."""
        self.path = what if isinstance(what, Path) else None
        self.model = None if isinstance(what, Path) else what
        self.changed.emit()


newest = Offer()
