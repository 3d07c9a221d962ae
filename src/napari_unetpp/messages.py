"""What a viewer and a live training tell each other, without torch."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from napari_unetpp.model import Model, TrainStep
    from napari_unetpp.score import Score

Strokes = tuple[Mapping[int, "NDArray[np.uint8]"], ...]


@dataclass(frozen=True)
class View:
    """What is on screen: a region of a plane of one of the images.

    Attributes
    ----------
    image : int
        Number of the image.
    plane : int
        Number of the plane, in C order over the leading axes.
    rows, columns : tuple of int
        First pixel and one past the last.
    """

    image: int
    plane: int
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Wishes:
    """What the user wants now.

    Attributes
    ----------
    strokes : tuple of mapping of int to ndarray of shape (Y, X) and dtype uint8
        For each image the annotated planes by number: 0 = not annotated, v =
        ``classes[v - 1]``. Never changed once given; a plane that has not changed is
        the same object as before.
    classes : tuple of str
        Names, the background first.
    view : View or None
        What is predicted first.
    depth : int or None
        Head to show; None is the deepest, and so is one that the network lacks.
    heads : {"last", "mean"}
        "mean" averages the heads up to `depth`.
    training : bool
        False: only predict, with the weights as they are.
    probabilities, uncertainty : bool
        Whether predictions carry them.
    """

    strokes: Strokes
    classes: tuple[str, ...]
    view: View | None = None
    depth: int | None = None
    heads: Literal["last", "mean"] = "last"
    training: bool = True
    probabilities: bool = False
    uncertainty: bool = False


class Mailbox:
    """Hands the newest wishes to the thread that works."""

    def __init__(self, wishes: Wishes) -> None:
        self._wishes = wishes
        self._new = threading.Event()

    def put(self, wishes: Wishes) -> None:
        """Replace the wishes."""
        self._wishes = wishes
        self._new.set()

    def latest(self) -> Wishes:
        """Return the newest wishes."""
        self._new.clear()
        return self._wishes

    def wait(self, seconds: float) -> None:
        """Wait until there are new ones, at most `seconds`."""
        self._new.wait(seconds)


@dataclass(frozen=True)
class Started:
    """The network is there: which, where it computes, and the depths it has."""

    network: str
    device: str
    depths: tuple[int, ...]


@dataclass(frozen=True)
class Waiting:
    """Why nothing is learned, in words; "" where nothing is missing."""

    reason: str


@dataclass(frozen=True)
class Progress:
    """How the training goes.

    Attributes
    ----------
    last : TrainStep
        The newest step.
    rate : float
        Steps per second of late, with the predictions in between.
    scores : tuple of (int, float)
        Held-out mean IoU by depth, as far as known.
    estimates : tuple of (int, Score)
        The same with its interval and the values of the classes.
    holds_out : bool
        Whether the model keeps any place for the score.
    note : str
        What the user should know of the training so far, in words, or "".
    """

    last: TrainStep
    rate: float
    scores: tuple[tuple[int, float], ...] = ()
    estimates: tuple[tuple[int, Score], ...] = ()
    holds_out: bool = True
    note: str = ""


@dataclass(frozen=True, eq=False)
class Prediction:
    """A finished part of a prediction.

    Attributes
    ----------
    image : int
        Number of the image.
    slices : tuple of int and slice
        Where it belongs: an int per leading axis, then two slices.
    labels : ndarray of shape (h, w) and dtype uint8
        1 to K.
    probabilities : ndarray of shape (K, h, w) and dtype float16, or None
        Of each class.
    uncertainty : ndarray of shape (h, w) and dtype float16, or None
        0 to 1: how much the heads disagree (their Jensen-Shannon divergence [1]_ over
        its maximum); of a network with one head, the entropy over its maximum.
    step : int
        Training step of the weights.

    References
    ----------
    .. [1] Lin, Divergence Measures Based on the Shannon Entropy, IEEE Trans. Inf.
           Theory 1991, :DOI:`10.1109/18.61115`
    """

    image: int
    slices: tuple[int | slice, ...]
    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float16] | None
    uncertainty: NDArray[np.float16] | None
    step: int

    @property
    def key(self) -> Any:
        """The same for all predictions of one place."""
        place = [(s.start, s.stop) if isinstance(s, slice) else s for s in self.slices]
        return self.image, *place


@dataclass(frozen=True)
class Coverage:
    """How many tiles of all images the newest weights have labelled.

    Attributes
    ----------
    done, total : int
        Tiles.
    view_done : bool
        Whether what is on screen is among them.
    step : int
        Training step of the weights.
    """

    done: int
    total: int
    view_done: bool
    step: int


@dataclass(frozen=True)
class DepthCost:
    """What a depth costs on this image and device, as measured.

    Attributes
    ----------
    depth : int
    ms_per_megapixel : float
        Milliseconds per million labelled pixels, the tiles' context included.
    megabytes : float
        Peak of the tensors of one tile, 10^6 bytes.
    """

    depth: int
    ms_per_megapixel: float
    megabytes: float

    @property
    def key(self) -> Any:
        """The same for all costs of one depth."""
        return DepthCost, self.depth


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The model as it stands, not changed by what follows."""

    model: Model


Message = Started | Waiting | Progress | Prediction | Coverage | DepthCost | Snapshot
