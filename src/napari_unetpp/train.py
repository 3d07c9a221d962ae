"""Learning from strokes: a generator of steps that can be stopped at any of them."""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from napari_unetpp import io, parallel
from napari_unetpp.checkpoint import (
    Checkpoint,
    Rolling,
    data_differences,
    differences,
    not_usable,
    telling,
)
from napari_unetpp.config import (
    NETWORKS,
    NetConfig,
    TrainConfig,
    check_choice,
    check_number,
    working_config,
)
from napari_unetpp.device import guarded, resolve_device
from napari_unetpp.errors import TrainingError
from napari_unetpp.examples import Examples, read_examples
from napari_unetpp.model import (
    Model,
    TrainStep,
    check_classes,
    check_unlabelled,
    create_model,
    from_file,
)
from napari_unetpp.networks import build_network
from napari_unetpp.pretrained import start_from_pretrained
from napari_unetpp.trainer import Trainer, is_scored

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Generator, Sequence

    import torch

_log = logging.getLogger("napari_unetpp")


class Stop(Protocol):
    """Anything that can be asked whether to stop, such as `threading.Event`."""

    def is_set(self) -> bool:
        """Return whether to stop after the current step."""
        ...


def train_steps(
    images: Any,
    annotations: Any,
    *,
    model: Model | None = None,
    network: str | NetConfig = "unet++",
    classes: Sequence[str] | None = None,
    unlabelled: int | None = 0,
    channel_axis: int | None = None,
    config: TrainConfig | None = None,
    max_seconds: float | None = None,
    max_steps: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    stop: Stop | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    resume: bool = False,
    changed_data: bool = False,
    instances: Any = None,
    judge: Callable[[Model, int], float] | None = None,
) -> Generator[TrainStep, None, Model]:
    """Learn from annotated pixels, step by step.

    Parameters
    ----------
    images : array or sequence of arrays of shape (..., Y, X)
        With channels at `channel_axis`. Sizes and dtypes may differ; lazy arrays are
        read where they are annotated.
    annotations : array or sequence of arrays of shape (..., Y, X) and an integer dtype
        One per image: 0 = not annotated, v = ``classes[v - 1]``; with
        ``unlabelled=None`` dense masks, v = ``classes[v]``.
    model : Model or None, optional
        Go on from a copy of this one; `classes` may add names to its own.
    network : str or NetConfig, optional
        One of `NETWORKS` when `model` is None.
    classes : sequence of str or None, optional
        Names; None: "background", "class 2", ... up to the highest number found.
    unlabelled : {0, None}, optional
        Value that means "not annotated"; a given `model` keeps its own coding.
    channel_axis : int or None, optional
        Axis of the channels in every image.
    config : TrainConfig or None, optional
        How to learn.
    max_seconds, max_steps : number or None, optional
        When to end; neither: 30 seconds.
    seed : int, optional
        Of weights, sampling, augmentation and held-out positions.
    device : str, torch.device or None, optional
        None: the fastest there is.
    stop : object with ``is_set()``, optional
        Asked after every step.
    checkpoint : path or None, optional
        A file (``.safetensors``) or folder that always holds what is needed to go on:
        written every `checkpoint_seconds`, at every end and when the generator is
        closed. Two older ones lie beside it, the one before and that of the best
        score. A write that fails is logged; the training goes on.
    checkpoint_seconds : float, optional
        Between two checkpoints.
    resume : bool, optional
        With the same other arguments as before: go on with the training whose
        `checkpoint` this is, or begin it if there is none. Limits count the whole
        training. On the same computer, versions and number of threads, losses and
        weights are on the CPU bit for bit those of a training that was not
        interrupted; what differs is logged, and stands in ``provenance["resumed"]``.
    changed_data : bool, optional
        Whether to resume with other images or annotations than before.
    instances : array or sequence of arrays of shape (..., Y, X), optional
        The objects, numbered from 1, of each image: where ``config.border`` puts its
        weight. None: the connected regions of each class.
    judge : callable, optional
        Takes the model and the step every ``config.score_every`` steps, and gives the
        score in place of the held-out one, such as a mean IoU on other images.

    Yields
    ------
    step : TrainStep

    Returns
    -------
    model : Model
        The generator's return value, also after `stop`; with ``config.patience`` the
        one that scored best.

    Raises
    ------
    ValueError
        If an argument does not fit; before anything is trained.
    TrainingError
        If the loss or a weight is no longer finite; its `model` is the last good one.
    DeviceMemoryError
        If a step does not fit on the device, not even in smaller pieces.
    DeviceError
        If the device has failed, now or earlier in this process.
    SaveError
        If `checkpoint` cannot be written, or is that of another training; InUseError
        if that runs at this moment.
    ModelFileError
        If `resume` finds nothing but damaged checkpoints.
    """
    # Any optimizer imports it at its first step; those seconds would be the user's.
    import torch._dynamo  # noqa: F401

    began = time.perf_counter()
    _check_limits(max_seconds, max_steps, seed)
    if max_seconds is None and max_steps is None:
        max_seconds = 30.0
    rolling = None if checkpoint is None else Rolling(checkpoint, checkpoint_seconds)
    if resume and rolling is None:
        raise ValueError("`resume` needs a `checkpoint` to go on with, got none.")
    target_device = resolve_device(device)
    check_unlabelled(unlabelled)
    if model is not None:
        if unlabelled is None and model.unlabelled == 0:
            raise ValueError(
                "`unlabelled` must be 0 as for the given model, got None. Add 1 to the "
                "dense masks, or train a new model."
            )
        unlabelled = model.unlabelled
    if config is not None and not isinstance(config, TrainConfig):
        raise ValueError(f"`config` must be a TrainConfig, got {config!r}.")
    examples = read_examples(
        images,
        annotations,
        unlabelled=unlabelled,
        channel_axis=channel_axis,
        preprocessing=model.preprocessing if model else None,
        instances=instances,
    )
    names = _class_names(classes, model, examples, 0 if unlabelled is None else 1)
    channels = len(examples.images[0])
    config = config or TrainConfig()
    start = starting_model(
        model, network, names, channels, unlabelled, seed, pretrained=config.pretrained
    )
    with ExitStack() as alone:
        if rolling and not parallel.team().rank:  # the first process writes
            alone.enter_context(rolling.alone())
        found = rolling.begin(resume) if rolling else None
        if found and "held_out" in found.model.provenance:
            # Strokes that have changed since must not choose other places.
            start.provenance["held_out"] = found.model.provenance["held_out"]
        trainer = Trainer(start, examples, config, seed=seed, device=target_device)
        trainer.judge = judge
        history: list[TrainStep] = []
        if rolling and found:
            go_on(trainer, examples, found, rolling, changed_data=changed_data)
            history = history_of(found)
            began -= found.seconds
        if parallel.team().rank:
            rolling = None
        limits = _Limits(began, max_seconds, max_steps, stop)
        best = None
        if config.patience is not None:
            best = _Best(config, rolling, history)
        steps = _loop(trainer, examples, limits, history, rolling, best)
        return _holding(alone.pop_all(), steps)


def _holding(
    alone: ExitStack, steps: Generator[TrainStep, None, Model]
) -> Generator[TrainStep, None, Model]:
    with alone:
        return (yield from steps)


class _Limits(NamedTuple):
    """When a training ends."""

    began: float
    max_seconds: float | None
    max_steps: int | None
    stop: Stop | None

    def reached(self, steps: int) -> bool:
        """Return whether there is no step to take any more."""
        if self.max_seconds is not None and self.seconds >= self.max_seconds:
            return True
        return self.max_steps is not None and steps >= self.max_steps

    @property
    def seconds(self) -> float:
        """Since the training began."""
        return time.perf_counter() - self.began


def _loop(
    trainer: Trainer,
    examples: Examples,
    limits: _Limits,
    history: list[TrainStep],
    rolling: Rolling | None,
    best: _Best | None,
) -> Generator[TrainStep, None, Model]:
    team = parallel.team()
    over = bool(history) and limits.reached(trainer.steps)
    over = team.any(over, trainer.device)
    while not over:
        try:
            with telling(rolling), guarded(trainer.device):
                loss = trainer.step()
                now, score = limits.seconds, trainer.score
                history.append(TrainStep(trainer.steps, loss, now, score, trainer.note))
                if rolling and rolling.due(trainer.steps):
                    model = _result(trainer, examples, history)
                    rolling.keep(trainer.checkpoint(model, examples))
        except TrainingError as error:
            error.model = _result(trainer, examples, history)
            raise
        if best is not None and trainer.scored_now:
            over = best.is_over(trainer, history, examples)
        try:
            yield history[-1]
        except GeneratorExit:
            _end(trainer, examples, history, rolling)
            raise
        over = over or limits.reached(trainer.steps)
        over = over or (limits.stop is not None and limits.stop.is_set())
        with telling(rolling):
            over = team.any(over, trainer.device)
    result = _end(trainer, examples, history, rolling)
    return result if best is None else best.model or result


def _result(trainer: Trainer, examples: Examples, history: list[TrainStep]) -> Model:
    result = trainer.model(history)
    result.provenance = trainer.provenance(examples)
    return result


class _Best:
    """The model that scored best so far, and how often none was better since."""

    def __init__(
        self, config: TrainConfig, rolling: Rolling | None, history: Sequence[TrainStep]
    ) -> None:
        self._patience = config.patience or 1
        self._rolling = rolling
        self._score = -math.inf
        self._failures = 0
        self.model: Model | None = None
        for step in history:  # of earlier processes
            if is_scored(step.step, config.score_every):
                self._is_better(step.score)
        if history and rolling and (found := rolling.best()):
            self.model = from_file(found.model, io.shown(rolling.path))

    def is_over(
        self, trainer: Trainer, history: list[TrainStep], examples: Examples
    ) -> bool:
        """Take a new score into account, and return whether to end."""
        if self._is_better(trainer.score):
            self.model = _result(trainer, examples, history)
            if self._rolling:
                self._rolling.keep(trainer.checkpoint(self.model, examples))
        return self._failures >= self._patience

    def _is_better(self, score: float | None) -> bool:
        if score is None:
            return False
        if score > self._score:
            self._score, self._failures = score, 0
            return True
        self._failures += 1  # of NaN, too
        return False


def _end(
    trainer: Trainer,
    examples: Examples,
    history: list[TrainStep],
    rolling: Rolling | None,
) -> Model:
    """Return the model, after its checkpoint is written."""
    result = _result(trainer, examples, history)
    if rolling:
        rolling.wait()
        if rolling.lacks(trainer.steps, retry=True):
            with telling(rolling):
                rolling.keep(trainer.checkpoint(result, examples), wait=True)
    return result


def go_on(
    trainer: Trainer,
    examples: Examples,
    found: Checkpoint,
    rolling: Rolling,
    *,
    changed_data: bool,
    free: Collection[str] = (),
) -> None:
    """Bring a new trainer to where another one stood, or say why that cannot be.

    Parameters
    ----------
    trainer, examples : Trainer, Examples
        What goes on.
    found : Checkpoint
        Where the other one stood.
    rolling : Rolling
        Where that was found.
    changed_data : bool
        Whether the examples may be others.
    free : collection of str, optional
        What of the checkpoint's `identity` may differ.

    Raises
    ------
    ValueError
        If this is not the same training.
    ModelFileError
        If the checkpoint does not fit its own description.
    """
    now = trainer.checkpoint(trainer.model(), examples)
    then, mine = (
        {k: v for k, v in c.identity.items() if k not in free} for c in (found, now)
    )
    if isinstance(then.get("settings"), dict):  # an older version knew fewer
        then["settings"] = {**TrainConfig().to_dict(), **then["settings"]}
    if other := differences(then, mine):
        raise ValueError(
            f"`resume` must get the arguments that `{io.shown(rolling.path)}` began "
            f"with, but this differs: {'; '.join(other)}. Pass the same ones, or begin "
            "another training: with model=load_model(checkpoint) from its weights."
        )
    data = data_differences(found.data, now.data)
    if data and not changed_data:
        raise ValueError(
            f"`resume` must get the data that `{io.shown(rolling.path)}` began with, "
            f"but this differs: {'; '.join(data)}. Pass the same ones, or allow "
            "others with changed_data=True (--changed-data)."
        )
    try:
        trainer.restore(found.state, same_data=not data)
        earlier = list(found.model.provenance.get("resumed", []))
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise not_usable(io.shown(rolling.path), error) from None
    other = data + differences(found.environment, now.environment)
    trainer.resumed = [*earlier, {"step": found.steps, "differs": other}]
    if other:
        _log.warning(
            "The training continues from step %d, not bit-identical: %s.",
            found.steps, "; ".join(other),
        )  # fmt: skip


def history_of(found: Checkpoint) -> list[TrainStep]:
    """Return the steps that led to a checkpoint."""
    return [
        TrainStep(int(step), loss, seconds, None if score != score else score)
        for step, loss, seconds, score in found.history.tolist()
    ]


def train(images: Any, annotations: Any, **settings: Any) -> Model:
    """Learn from annotated pixels and return the model.

    Parameters
    ----------
    images, annotations, **settings
        As for `train_steps`.

    Returns
    -------
    model : Model

    Raises
    ------
    ValueError, TrainingError, DeviceMemoryError
        As `train_steps`.
    """
    steps = train_steps(images, annotations, **settings)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def _check_limits(max_seconds: Any, max_steps: Any, seed: Any) -> None:
    if max_seconds is not None:
        check_number("max_seconds", max_seconds, 0, 1e9)
    if max_steps is not None:
        check_number("max_steps", max_steps, 1, 10**9, whole=True)
    check_number("seed", seed, 0, 2**63 - 1, whole=True)


def _class_names(
    classes: Sequence[str] | None, model: Model | None, examples: Examples, base: int
) -> tuple[str, ...]:
    """Return all names; `base` is the first class's value in the annotation."""
    found = np.flatnonzero(
        np.sum(
            [np.bincount(t.ravel(), minlength=256) for t in examples.targets], axis=0
        )[1:]
    )
    if classes is None and model is None:
        if len(found) < 2:
            raise ValueError(
                "`annotations` must hold at least two classes, got only the value(s) "
                f"{[int(v) + base for v in found]}. Paint some of another class, or "
                "name all classes with classes=(...)."
            )
        empty = sorted(set(range(examples.n_classes)) - {int(v) for v in found})
        if empty:
            raise ValueError(
                f"`annotations` must use the numbers {base}, {base + 1}, ... without a "
                f"gap unless `classes` names them all; nothing has the number "
                f"{empty[0] + base}."
            )
        rest = (f"class {i}" for i in range(2, examples.n_classes + 1))
        return ("background", *rest)
    names = model.classes if model is not None else ()
    if classes is not None:
        wished = check_classes(classes)
        if wished[: len(names)] != names:
            raise ValueError(
                f"`classes` must begin with the model's own {names}, got {wished}. Add "
                "new names at the end."
            )
        names = wished
    if examples.n_classes > len(names):
        raise ValueError(
            f"`annotations` must hold classes {base} to {len(names) - 1 + base} "
            f"({', '.join(names)}), got {examples.n_classes - 1 + base}. Name more "
            "`classes`."
        )
    return names


def starting_model(
    model: Model | None,
    network: str | NetConfig,
    names: tuple[str, ...],
    channels: int,
    unlabelled: int | None,
    seed: int,
    *,
    pretrained: bool,
) -> Model:
    """Return what a training starts from, its own copy; ValueError if it cannot."""
    if model is None:
        if not isinstance(network, NetConfig):
            check_choice("network", network, NETWORKS)
            network = working_config(network, channels, len(names))
        if network.in_channels != channels:
            raise ValueError(
                f"`network` takes {network.in_channels} channel(s), the images have "
                f"{channels}."
            )
        fresh = create_model(network, classes=names, unlabelled=unlabelled, seed=seed)
        if pretrained:
            fresh.provenance["digest"] = start_from_pretrained(fresh.network)
        return fresh
    if model.config.in_channels != channels:
        raise ValueError(
            f"`images` must have {model.config.in_channels} channel(s) for this model, "
            f"got {channels}."
        )
    return with_classes(model, names, seed)


def with_classes(model: Model, names: tuple[str, ...], seed: int) -> Model:
    """Return a copy with outputs for more classes; the old ones keep their weights."""
    if names == model.classes:
        return model.copy()
    config = model.config.replaced(out_channels=len(names))
    network = build_network(config, seed=seed).eval()
    fresh, old = network.state_dict(), model.network.state_dict()
    k = len(model.classes)
    for name, value in old.items():
        if fresh[name].shape == value.shape:
            fresh[name] = value
            continue
        rest = value.shape[1:] if fresh[name].shape[1:] == value.shape[1:] else None
        if rest is None:  # score maps that are up-sampled: (K, K, h, w)
            fresh[name][:k, :k] = value
        else:
            wide = fresh[name].reshape(len(names), -1, *rest)
            wide[:k] = value.reshape(k, -1, *rest)
            fresh[name] = wide.reshape(fresh[name].shape)
    network.load_state_dict(fresh)
    prior = (
        model.prior + (0.0,) * (len(names) - len(model.prior)) if model.prior else ()
    )
    return Model(
        network,
        names,
        model.preprocessing,
        model.unlabelled,
        prior,
        model.history,
        dict(model.provenance),
    )
