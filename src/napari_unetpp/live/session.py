"""The turns of a live training: take what is new, train a step, or predict a tile."""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp import io
from napari_unetpp.checkpoint import Rolling, check_whole, not_usable, telling
from napari_unetpp.config import TrainConfig
from napari_unetpp.device import describe, guarded, is_out_of_memory, resolve_device
from napari_unetpp.errors import DeviceMemoryError
from napari_unetpp.examples import ExampleBook, Examples
from napari_unetpp.heldout import HeldOut, count
from napari_unetpp.live.preview import Preview
from napari_unetpp.messages import Message, Progress, Snapshot, Started, Waiting
from napari_unetpp.model import Model, TrainStep, check_classes, from_file
from napari_unetpp.train import go_on, history_of, starting_model, train_steps
from napari_unetpp.trainer import Trainer

if TYPE_CHECKING:
    import os
    from collections.abc import Generator, Iterator, Sequence

    import torch

    from napari_unetpp.checkpoint import Checkpoint
    from napari_unetpp.config import NetConfig
    from napari_unetpp.messages import Mailbox, Strokes, Wishes
    from napari_unetpp.train import Stop

_log = logging.getLogger("napari_unetpp")

_FIRST = 0.6  # s of training before the first prediction
_SHARE = 0.12  # of the time since new weights are shown is prediction's, ...
_HALF = 0.5  # ... and while what it shows is urgent
_URGENT = 4.0  # s of training after new strokes in which the view is shown often
_SOON = 0.5  # s of training after new strokes in which little is to be seen of them
_STALE = 8.0  # s of training after which even a costly view gets newer weights
_BEAT = 0.25  # s between two signs of life while there is nothing to do


def live_steps(
    images: Sequence[Any],
    mailbox: Mailbox,
    *,
    channel_axes: Sequence[int | None] | None = None,
    names: Sequence[str] | None = None,
    model: Model | None = None,
    network: str | NetConfig = "unet++",
    config: TrainConfig | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    stop: Stop | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
) -> Generator[Message, None, Model | None]:
    """Learn from strokes while they are painted, and predict what is looked at.

    Parameters
    ----------
    images : sequence of arrays of shape (..., Y, X)
        With channels at their `channel_axes`; lazy ones are read where needed.
    mailbox : Mailbox
        Brings the newest strokes, view, depth and whether to train.
    channel_axes : sequence of int or None, optional
        One per image; None: no image has channels.
    names : sequence of str or None, optional
        What messages call the images.
    model : Model or None, optional
        Go on from a copy of this one.
    network : str or NetConfig, optional
        What to make when `model` is None.
    config : TrainConfig or None, optional
        How to learn.
    seed : int, optional
        From strokes that do not change, the same is learned as by `train_steps` with
        this seed in as many steps.
    device : str, torch.device or None, optional
        None: the fastest there is.
    stop : object with ``is_set()``, optional
        Asked after every step and tile.
    checkpoint, checkpoint_seconds
        As for `train_steps`; also written when the training pauses.
    resume : bool, optional
        Go on with the training whose `checkpoint` this is: with its network, settings
        and seed in place of `model`, `network`, `config` and `seed`, from the strokes
        as they are now. Where they are the same, what is learned is bit for bit what
        would have been learned; where classes were added, the optimizer starts anew.

    Yields
    ------
    message : Started, Waiting, Progress, Prediction, Coverage, DepthCost or Snapshot
        At least four times a second while there is nothing to do.

    Returns
    -------
    model : Model or None
        As it stands when `stop` is set, or, where nothing has been trained, when no
        training is wished and all is predicted; None if there is no model.

    Raises
    ------
    ValueError, TrainingError, DeviceMemoryError, DeviceError, SaveError, ModelFileError
        As `train_steps`.
    """
    import torch._dynamo  # noqa: F401  # any optimizer imports it at its first step

    rolling = None if checkpoint is None else Rolling(checkpoint, checkpoint_seconds)
    with rolling.alone() if rolling else nullcontext():
        found = rolling.begin(resume) if rolling else None
        if rolling and found:
            model = from_file(found.model, io.shown(rolling.path))
            model.provenance["digest"] = found.run.get("parent")
            config, seed = _run_of(found, rolling)
        axes = [None] * len(images) if channel_axes is None else list(channel_axes)
        scaling = model.preprocessing if model is not None else None
        book = ExampleBook(images, axes, names=names, preprocessing=scaling)
        showing = not mailbox.latest().training
        session = _Session(
            book, model, network, config or TrainConfig(), seed, resolve_device(device)
        )
        if rolling:
            session.keep_in(rolling, found)
        while stop is None or not stop.is_set():
            wishes = mailbox.latest()
            try:
                with telling(rolling), guarded(session.device):
                    yield from session.advance(wishes)
                session.keep()
                if session.idle:
                    if showing and not wishes.training and session.untrained:
                        break
                    mailbox.wait(_BEAT)
                    yield session.waiting
            except GeneratorExit:
                session.keep(last=True)
                raise
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise DeviceMemoryError(
                    "The device has no memory left for this. Choose a smaller network "
                    "or depth, close other programs, or choose the CPU."
                ) from None
        session.keep(last=True)
        return session.result()


def _run_of(found: Checkpoint, rolling: Rolling) -> tuple[TrainConfig, int]:
    """Return the settings and the seed of a checkpoint."""
    try:
        seed = check_whole(found.run["seed"], 0, 2**63 - 1)
        return TrainConfig.from_dict(found.run["settings"]), seed
    except (ValueError, TypeError, KeyError) as error:
        raise not_usable(io.shown(rolling.path), error) from None


def warm_up(device: str | torch.device | None = None) -> Generator[None, None, str]:
    """Pay the first-call costs of torch before they keep anybody waiting.

    Parameters
    ----------
    device : str, torch.device or None, optional
        As for `train_steps`.

    Yields
    ------
    None
        Between the parts.

    Returns
    -------
    text : str
        The device in words.
    """
    rng = np.random.default_rng(0)
    image = rng.random((64, 64))
    strokes = np.zeros((64, 64), np.uint8)
    strokes[10:20, 10:50], strokes[40:50, 10:50] = 1, 2
    yield
    for _ in train_steps(
        image,
        strokes,
        network="unet",
        config=TrainConfig(patch=32, batch=2),
        max_steps=2,
        device=device,
    ):
        yield
    return describe(resolve_device(device))


class _Session:
    """What `live_steps` knows from one turn to the next."""

    def __init__(
        self,
        book: ExampleBook,
        model: Model | None,
        network: str | NetConfig,
        config: TrainConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self._book = book
        self._base = _with_coding(model)
        self._network = network
        self._config = config
        self._seed = seed
        self.device = device
        self._trainer: Trainer | None = None
        self._examples: Examples | None = None
        self._seen: Strokes = ()
        self._behind = False  # strokes came while something was missing
        self._told: tuple[str, ...] = ()  # the classes that were looked at last
        self._classes: tuple[str, ...] = ()  # those that are learned
        self._history: list[TrainStep] = []
        self._clock = _Clock()
        self._preview: Preview | None = None
        self._unpriced: list[int] = []
        self._rolling: Rolling | None = None
        self._found: Checkpoint | None = None  # until its training goes on
        self._before = 0.0  # s of training in earlier processes
        self._note = ""  # news can be dropped on their way: the newest one is repeated
        self.waiting = Waiting("")
        self.idle = False
        channels = book.sources[0].channels
        if model is not None and channels != model.config.in_channels:
            raise ValueError(
                f"This model takes {model.config.in_channels} channel(s), the image "
                f"has {channels}. Choose another image, or another model."
            )

    @property
    def untrained(self) -> bool:
        """Whether no training has begun."""
        return self._trainer is None

    def advance(self, wishes: Wishes) -> Iterator[Message]:
        """Do one piece of work, or none (`idle`)."""
        self.idle = False
        yield from self._take(wishes)
        training = (
            wishes.training and self._trainer is not None and not self.waiting.reason
        )
        if training and not self._shows(wishes):
            yield self._train()
        elif self._base is not None and (training or self._has_more(wishes)):
            yield from self._show(wishes, training)
        else:
            self.idle = True

    # --- strokes and classes ------------------------------------------------------

    def _take(self, wishes: Wishes) -> Iterator[Message]:
        """Take over strokes and classes where they have changed."""
        same = _same(wishes.strokes, self._seen)
        if same and wishes.classes == self._told:
            return
        if len(wishes.classes) == len(self._classes):
            self._classes = check_classes(wishes.classes)  # a new name is no new class
        if not wishes.training:
            return  # taken over when it goes on
        classes = check_classes(wishes.classes)
        reason = missing(
            wishes.strokes,
            classes,
            fresh=self._base is None,
            held_out=self._held_out(),
        )
        if reason != self.waiting.reason:
            self.waiting = Waiting(reason)
            yield self.waiting
        if not reason:
            yield from self._learn(wishes.strokes, classes, same)
            self._classes = classes
        self._behind = bool(reason)
        self._seen, self._told = wishes.strokes, classes

    def _held_out(self) -> HeldOut | None:
        if self._trainer is not None:
            return self._trainer.held_out
        return None if self._base is None else HeldOut.of(self._base.provenance)

    def _learn(
        self, strokes: Strokes, classes: tuple[str, ...], same: bool
    ) -> Iterator[Message]:
        if self._trainer is not None and len(classes) == len(self._classes):
            if not same or self._behind:
                self._examples = self._book.read(strokes)
                self._trainer.learn_from(self._examples)
                self._clock.urgent()
            return
        self._examples = self._book.read(strokes)
        base = self.result()
        resumed = self._trainer.resumed if self._trainer is not None else []
        if base is not None and len(base.classes) > len(classes):
            raise ValueError(
                f"The model has {len(base.classes)} classes, the table "
                f"{len(classes)}. Add the missing ones, or start over."
            )
        channels = len(self._examples.images[0])
        self._base = starting_model(
            base,
            self._network,
            classes,
            channels,
            0,
            self._seed,
            pretrained=self._config.pretrained,
        )
        self._base.classes = classes
        self._trainer = Trainer(
            self._base,
            self._examples,
            self._config,
            seed=self._seed,
            device=self.device,
        )
        self._trainer.resumed = resumed
        self._go_on(base)
        self._clock.urgent()
        yield self._started(self._base)

    def _started(self, model: Model) -> Started:
        self._unpriced = list(model.network.depths)
        return Started(
            model.config.name, describe(self.device), tuple(model.network.depths)
        )

    # --- checkpoints --------------------------------------------------------------

    def keep_in(self, rolling: Rolling, found: Checkpoint | None) -> None:
        """Write checkpoints there, and go on with the one that was found there."""
        self._rolling, self._found = rolling, found
        if found is not None and self._base is not None:
            self._history = history_of(found)
            self._before = found.seconds
            self._base.history = tuple(self._history)

    def keep(self, *, last: bool = False) -> None:
        """Write a checkpoint if it is time, if training pauses, or if it ends."""
        rolling, trainer = self._rolling, self._trainer
        if rolling is None or trainer is None or self._examples is None:
            return
        if last:
            rolling.wait()
        steps = len(self._history)
        ends = (last or self.idle) and rolling.lacks(steps, retry=last)
        if rolling.due(steps) or ends:
            model = self.result()
            with telling(rolling):
                if model is not None:
                    found = trainer.checkpoint(model, self._examples)
                    rolling.keep(found, wait=last)

    def _go_on(self, base: Model | None) -> None:
        """Give a new trainer what the checkpoint of `base` knows, while that fits."""
        found, self._found = self._found, None
        trainer, examples = self._trainer, self._examples
        if not (found and base and self._rolling and trainer and examples):
            return
        now = len(self._base.classes) if self._base else 0
        if now == len(base.classes):
            go_on(
                trainer,
                examples,
                found,
                self._rolling,
                changed_data=True,
                free={"classes"},
            )
            return
        other = f"classes: {len(base.classes)} then, {now} now"
        trainer.resumed = [{"step": found.steps, "differs": [other]}]
        _log.warning(
            "The training continues from the weights of step %d; the optimizer starts "
            "anew (%s).", found.steps, other,
        )  # fmt: skip

    # --- training -----------------------------------------------------------------

    def _train(self) -> Progress:
        if self._trainer is None:
            raise ValueError("There is nothing to train: no strokes were taken over.")
        with self._clock.training(), telling(self._rolling):
            loss = self._trainer.step()
        self._note = self._trainer.note or self._note
        self._history.append(
            TrainStep(
                len(self._history) + 1,
                loss,
                self._before + self._clock.seconds,
                self._trainer.score,
                self._trainer.note,
            )
        )
        estimates = tuple(self._trainer.estimates.items())
        scores = tuple((depth, score.mean) for depth, score in estimates)
        return Progress(
            self._history[-1],
            self._clock.rate,
            scores,
            estimates,
            self._trainer.held_out.fraction > 0,
            self._note,
        )

    def result(self) -> Model | None:
        """Return the model as it stands."""
        if self._trainer is None or self._examples is None:
            return self._base
        model = self._trainer.model(self._history)
        model.classes = self._classes or model.classes
        model.provenance = self._trainer.provenance(self._examples)
        return model

    # --- prediction ---------------------------------------------------------------

    def _shows(self, wishes: Wishes) -> bool:
        """Return whether it is prediction's turn while a training runs."""
        preview = self._preview
        if preview is None:
            return self._clock.trained >= _FIRST
        if preview.outdated(wishes) or self._clock.overtaken:
            return True
        if not preview.done_in(wishes.view):
            return self._clock.share < (_HALF if self._clock.is_urgent else _SHARE)
        if self._clock.due(preview.cost(wishes.view)):
            return True
        if self._unpriced and not self._clock.is_urgent:
            return True  # once for each depth
        return not preview.complete and self._clock.share < _SHARE

    def _has_more(self, wishes: Wishes) -> bool:
        """Return whether there is something to predict while nothing is trained."""
        preview = self._preview
        return (
            preview is None
            or preview.step != len(self._history)
            or preview.fast
            or preview.outdated(wishes)
            or bool(self._unpriced)
            or not preview.complete
        )

    def _show(self, wishes: Wishes, training: bool) -> Iterator[Message]:
        """Predict one tile, with newer weights where it is time for them."""
        with self._clock.predicting():
            preview = self._preview
            if training:
                new = (
                    preview is None
                    or self._clock.overtaken
                    or (
                        preview.done_in(wishes.view)
                        and self._clock.due(preview.cost(wishes.view))
                    )
                )
            else:
                new = (
                    preview is None
                    or preview.fast
                    or preview.step != len(self._history)
                )
            if new:
                model = self.result()
            elif preview is not None and preview.outdated(wishes):
                model = preview.model
            else:
                model = None
            if model is not None:
                preview = self._preview = Preview(
                    self._book.sources,
                    model,
                    wishes,
                    self.device,
                    len(self._history) if new or preview is None else preview.step,
                    preview,
                    fast=training,
                )
                if self._trainer is None and not self._unpriced:
                    yield self._started(model)
                yield Snapshot(model)
            if new:
                self._clock.shown()
            if preview is not None:
                yield from self._tile(preview, wishes)

    def _tile(self, preview: Preview, wishes: Wishes) -> Iterator[Message]:
        seen = preview.done_in(wishes.view)
        if self._unpriced and seen:
            yield preview.price(self._unpriced.pop(0))
            return
        job = preview.next_job(wishes.view)
        if job is not None:
            yield preview.predict(job)
            yield preview.coverage(wishes.view)


class _Clock:
    """Shares the time between training and prediction."""

    def __init__(self) -> None:
        self._train = self._predict = 0.0
        self._urgent_from = self._shown_at = self._spent = 0.0
        self._recent: deque[float] = deque(maxlen=30)

    @contextmanager
    def training(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._recent.append(time.perf_counter())
        self._train += self._recent[-1] - began

    @contextmanager
    def predicting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self._predict += spent
        self._spent += spent

    @property
    def trained(self) -> float:
        """Seconds of training."""
        return self._train

    @property
    def seconds(self) -> float:
        """Of work since the start."""
        return self._train + self._predict

    @property
    def share(self) -> float:
        """Part of the time since new weights are shown that predictions took."""
        trained = self._train - self._shown_at
        return self._spent / max(self._spent + trained, 1e-9)

    @property
    def is_urgent(self) -> bool:
        """Whether something has changed that the user waits to see."""
        return self._train - self._urgent_from < _URGENT

    @property
    def rate(self) -> float:
        """Steps per second."""
        if len(self._recent) < 2:
            return 0.0
        return (len(self._recent) - 1) / (self._recent[-1] - self._recent[0])

    @property
    def overtaken(self) -> bool:
        """Whether what is shown does not know the newest strokes, though it could."""
        learned = self._train - self._urgent_from
        return self._shown_at < self._urgent_from and learned >= _SOON

    def urgent(self) -> None:
        """Note that something has changed that the user waits to see."""
        self._urgent_from = self._train

    def shown(self) -> None:
        """Note that new weights are being shown."""
        self._shown_at, self._spent = self._train, 0.0

    def due(self, cost: float) -> bool:
        """Return whether newer weights should be shown, at a cost in seconds."""
        since = self._train - self._shown_at
        if self.is_urgent:
            return since >= min(1.5, max(0.35, cost))
        return since >= min(_STALE, max(1.0, cost / _SHARE))


def missing(
    strokes: Strokes,
    classes: tuple[str, ...],
    *,
    fresh: bool,
    held_out: HeldOut | None = None,
) -> str:
    """Return what must be painted before anything can be learned, in words; or "".

    Parameters
    ----------
    strokes, classes
        As in `Wishes`.
    fresh : bool
        Whether the network knows nothing yet; one that does needs any two classes.
    held_out : HeldOut or None, optional
        What never trains, once that is decided.
    """
    planes = [plane for image in strokes for plane in image.values()]
    pixels = count(planes, 255)
    too_high = np.flatnonzero(pixels[len(classes) :])
    if len(too_high):
        return (
            f"Label {too_high[0] + len(classes) + 1} is painted, but the highest class "
            f"is {len(classes)}. Add a class, or erase it."
        )
    bare = [n for n, painted in zip(classes, pixels, strict=False) if not painted]
    if len(bare) == len(classes):
        return "Paint a few strokes of each class on the image."
    if bare and (fresh or len(classes) - len(bare) < 2):
        return f"Paint some {_listed(bare)}: nothing of it is painted yet."
    numbers = [number for image in strokes for number in image]
    starved = held_out.starved(planes, numbers, len(classes)) if held_out else []
    if starved:
        return (
            f"Class {_listed([classes[i] for i in starved])} has strokes only in "
            "places that are kept for the score: paint one more stroke somewhere else."
        )
    return ""


def _same(new: Strokes, old: Strokes) -> bool:
    """Return whether these are the very same planes."""
    return len(new) == len(old) and all(
        a.keys() == b.keys() and all(a[n] is b[n] for n in a)
        for a, b in zip(new, old, strict=True)
    )


def _listed(names: Sequence[str]) -> str:
    shown = [name if len(name) <= 24 else name[:23] + "…" for name in names[:3]]
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(shown) + rest


def _with_coding(model: Model | None) -> Model | None:
    """Return a copy whose labels are 1 to K, as a layer's are."""
    if model is None:
        return None
    copy = model.copy()
    copy.unlabelled = 0
    return copy
