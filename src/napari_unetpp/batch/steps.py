"""How far a run over many images is, and how it is asked to end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from napari_unetpp.batch.files import Target
    from napari_unetpp.predict import Tile


class Stop(Protocol):
    """What is asked whether to end, for example a `threading.Event`."""

    def is_set(self) -> bool:
        """Return whether to end."""


@dataclass(frozen=True, eq=False)
class BatchStep:
    """How far `predict_files` has come.

    Attributes
    ----------
    state : {"started", "tile", "done", "skipped", "failed"}
        What has just happened to `target`; the last three end it.
    number, count : int
        `target` is number `number` (from 1) of `count`.
    target : Target
        The image.
    shape : tuple of int
        Shape of its labels, known from the first tile on.
    plane, planes : int
        The plane of `tile` (from 1) of all its planes.
    pixels : int
        Pixels labelled so far, of those of `shape`.
    tile : Tile or None
        The labels of a part, in the state "tile".
    error : Exception or None
        In the state "failed": why, as an exception without its traceback.
    """

    state: Literal["started", "tile", "done", "skipped", "failed"]
    number: int
    count: int
    target: Target
    shape: tuple[int, ...] = ()
    plane: int = 0
    planes: int = 0
    pixels: int = 0
    tile: Tile | None = None
    error: Exception | None = None
