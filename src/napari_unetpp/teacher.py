"""What a random forest makes of the strokes: soft labels where nothing is painted."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from napari_unetpp.heldout import HeldOut

SOFT = 256  # in an annotation: from here on soft labels, less is painted

_SIGMAS = (0.7, 16.0)  # px, of the finest and the coarsest feature
_TREES = 50
_MOST = 2000  # painted pixels of a class that the forest looks at; neighbours repeat
_EVERY = 32  # one of so many pixels may get a soft label, ...
_SURE = 0.9  # ... if so large a share of the trees agrees
_REACH = 64  # px around a block that its features see: four of the coarsest sigma
_SMALLEST = 16  # px, side of a block; texture needs some pixels
_PER_CHANNEL = 20  # features
_BLOCK = 2**24  # values of features in one block, ...
_VALUES = 2**26  # ... and in all blocks: 134 MB in half precision


class Lesson(NamedTuple):
    """Soft labels of some pixels that nobody has painted.

    Attributes
    ----------
    places : list of ndarray of shape (n,) and dtype int64
        For each image the pixels, numbered along its rows.
    beliefs : list of ndarray of shape (n, K) and dtype float32
        How likely each class is there; sums to 1 over K.
    """

    places: list[NDArray[np.int64]]
    beliefs: list[NDArray[np.float32]]

    def onto(
        self, targets: Sequence[NDArray[np.uint8]]
    ) -> tuple[list[NDArray[np.int32]], NDArray[np.float32]]:
        """Write the soft labels between what is painted.

        Parameters
        ----------
        targets : sequence of ndarray of shape (Y, X) and dtype uint8
            One for each image; not changed.

        Returns
        -------
        merged : list of ndarray of shape (Y, X) and dtype int32
            As `targets`, and where there is a soft label `SOFT` + its row of `table`.
        table : ndarray of shape (R, K) and dtype float32
        """
        merged, row = [], SOFT
        for target, places in zip(targets, self.places, strict=True):
            both = target.astype(np.int32)
            both.flat[places] = np.arange(row, row + len(places))
            merged.append(both)
            row += len(places)
        return merged, np.concatenate(self.beliefs)


class _Block(NamedTuple):
    image: NDArray[np.float32]  # kept, so that its id stays its own
    top: int
    left: int
    features: NDArray[np.float16]  # (Y, X, F)
    places: NDArray[np.int64]  # (n, 2), row and column in the block


class Teacher:
    """Fits random forests to strokes, in a thread of its own.

    Parameters
    ----------
    n_classes : int
        K.
    held_out : HeldOut
        Places that get no soft labels.
    seed : int
        Of the forest and of the pixels that get soft labels.

    Notes
    -----
    A forest on intensity, edges and texture at several scales, as pixel classifiers
    have it, is right about grey values and colours after a second, where a network
    still guesses. A network that learns beside the strokes what the forest is sure of
    knows as much, and what a forest cannot see; where the trees do not agree they are
    often wrong, and not heard. Features are those of blocks around the
    strokes, at most 134 MB of them. This is model compression [1]_ with a forest of
    extremely randomised trees [2]_ as the model.

    References
    ----------
    .. [1] Bucila et al., Model Compression, KDD 2006, :DOI:`10.1145/1150402.1150464`
    .. [2] Geurts et al., Extremely Randomized Trees, Machine Learning 2006,
           :DOI:`10.1007/s10994-006-6226-1`
    """

    def __init__(self, n_classes: int, held_out: HeldOut, seed: int) -> None:
        self._n_classes = n_classes
        self._held_out = held_out
        self._seed = seed
        self._blocks: dict[tuple[int, int, int], _Block] = {}
        self._thread = ThreadPoolExecutor(1, "napari-unetpp forest")
        self._asked: Future[Lesson | None] | None = None

    def ask(
        self,
        images: Sequence[NDArray[np.float32]],
        targets: Sequence[NDArray[np.uint8]],
        numbers: Sequence[int],
    ) -> None:
        """Begin to learn from strokes; an earlier question is forgotten.

        Parameters
        ----------
        images : sequence of ndarray of shape (C, Y, X)
            Scaled as the network sees them.
        targets : sequence of ndarray of shape (Y, X) and dtype uint8
            What may be learned: 0 = nothing, v = class v - 1.
        numbers : sequence of int
            Each one's number in its stack.
        """
        if self._asked is not None:
            self._asked.cancel()
        self._asked = self._thread.submit(self.teach, images, targets, numbers)

    def answer(self) -> Lesson | None:
        """Wait for what was asked last; None if nothing can be told."""
        return None if self._asked is None else self._asked.result()

    def teach(
        self,
        images: Sequence[NDArray[np.float32]],
        targets: Sequence[NDArray[np.uint8]],
        numbers: Sequence[int],
    ) -> Lesson | None:
        """Return the soft labels.

        Parameters
        ----------
        images, targets, numbers
            As for `ask`.

        Returns
        -------
        Lesson or None
            None where a class has no strokes, of which a forest would be sure that
            it is nowhere, or where no pixel is left.
        """
        blocks = self._around(images, targets)
        forest = self._fit(blocks, targets)
        if forest is None:
            return None
        lesson = Lesson(
            [np.zeros(0, np.int64) for _ in images],
            [np.zeros((0, self._n_classes), np.float32) for _ in images],
        )
        for i, block in blocks:
            y, x = block.places.T
            place = np.ravel_multi_index(
                (y + block.top, x + block.left), targets[i].shape
            )
            held = self._held_out.mask(targets[i].shape, numbers[i])
            free = (targets[i].ravel()[place] == 0) & ~held.ravel()[place]
            if free.any():
                seen = block.features[y[free], x[free]].astype(np.float32)
                belief = forest.predict_proba(seen).astype(np.float32)
                sure = belief.max(1) >= _SURE
                lesson.places[i] = np.append(lesson.places[i], place[free][sure])
                lesson.beliefs[i] = np.append(lesson.beliefs[i], belief[sure], axis=0)
        return lesson if any(len(p) for p in lesson.places) else None

    def _fit(
        self, blocks: list[tuple[int, _Block]], targets: Sequence[NDArray[np.uint8]]
    ) -> Any:
        """Return a forest, or None if a class has no strokes in the blocks."""
        from sklearn.ensemble import ExtraTreesClassifier

        painted = [targets[i][_region(block)] for i, block in blocks]
        classes = np.concatenate([np.zeros(0, np.uint8), *(p[p > 0] for p in painted)])
        found = np.unique(classes)
        if len(found) < self._n_classes:
            return None
        features = np.concatenate(
            [b.features[p > 0] for (_, b), p in zip(blocks, painted, strict=True)]
        )
        rng = np.random.default_rng(self._seed)
        chosen = np.concatenate(
            [rng.permutation(np.flatnonzero(classes == c))[:_MOST] for c in found]
        )
        forest = ExtraTreesClassifier(
            _TREES, class_weight="balanced", random_state=self._seed % 2**32
        )
        return forest.fit(features[chosen].astype(np.float32), classes[chosen])

    def _around(
        self,
        images: Sequence[NDArray[np.float32]],
        targets: Sequence[NDArray[np.uint8]],
    ) -> list[tuple[int, _Block]]:
        """Return the blocks that hold the most strokes, made anew or as they were."""
        wanted = []
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            side = int((_BLOCK / (_PER_CHANNEL * len(image))) ** 0.5)
            rows, columns = (_edges(size, side) for size in target.shape)
            for top, bottom in itertools.pairwise(rows):
                for left, right in itertools.pairwise(columns):
                    painted = np.count_nonzero(target[top:bottom, left:right])
                    if painted and min(bottom - top, right - left) >= _SMALLEST:
                        wanted.append((-painted, i, top, bottom, left, right))
        kept: dict[tuple[int, int, int], _Block] = {}
        blocks: list[tuple[int, _Block]] = []
        values = 0
        for _, i, top, bottom, left, right in sorted(wanted):
            values += _PER_CHANNEL * len(images[i]) * (bottom - top) * (right - left)
            if blocks and values > _VALUES:
                break
            key = (id(images[i]), top, left)
            block = self._blocks.get(key)
            if block is None:
                block = self._block(images[i], top, bottom, left, right)
            kept[key] = block
            blocks.append((i, block))
        self._blocks = kept
        return blocks

    def _block(
        self, image: NDArray[np.float32], top: int, bottom: int, left: int, right: int
    ) -> _Block:
        y, x = max(0, top - _REACH), max(0, left - _REACH)
        window = image[:, y : bottom + _REACH, x : right + _REACH]
        features = pixel_features(window, 0)
        features = features[top - y : bottom - y, left - x : right - x]
        rng = np.random.default_rng((self._seed, top, left))
        height, width = features.shape[:2]
        number = -(-height * width // _EVERY)
        drawn = rng.choice(height * width, number, replace=False)
        places = np.stack(np.unravel_index(drawn, (height, width)), axis=1)
        return _Block(image, top, left, features.astype(np.float16), places)


def pixel_features(
    image: NDArray[Any], channel_axis: int | None
) -> NDArray[np.float32]:
    """Return a random forest's features of each pixel.

    Parameters
    ----------
    image : ndarray of shape (Y, X), with or without channels
        Any numeric dtype.
    channel_axis : int or None
        Where its channels are.

    Returns
    -------
    features : ndarray of shape (Y, X, F) and dtype float32
        Intensity, edges and texture at 0.7 to 16 px.
    """
    from skimage.feature import multiscale_basic_features

    found = multiscale_basic_features(  # type: ignore[no-untyped-call]
        image, sigma_min=_SIGMAS[0], sigma_max=_SIGMAS[1], channel_axis=channel_axis
    )
    return np.asarray(found, np.float32)


def _edges(size: int, side: int) -> list[int]:
    """Divide `size` pixels into equal parts of at most about `side`."""
    parts = max(1, round(size / side))
    return [size * n // parts for n in range(parts + 1)]


def _region(block: _Block) -> tuple[slice, slice]:
    height, width = block.features.shape[:2]
    return (
        slice(block.top, block.top + height),
        slice(block.left, block.left + width),
    )
