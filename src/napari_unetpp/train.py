"""Learning from strokes: a generator of steps that can be stopped at any of them."""

from __future__ import annotations

import math
import platform
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from napari_unetpp import __version__, augment, heldout, losses
from napari_unetpp.config import (
    NETWORKS,
    NetConfig,
    TrainConfig,
    check_choice,
    check_number,
    working_config,
)
from napari_unetpp.device import autocast, is_out_of_memory, resolve_device
from napari_unetpp.errors import DeviceMemoryError, TrainingError
from napari_unetpp.evaluate import evaluate
from napari_unetpp.examples import Examples, read_examples
from napari_unetpp.model import (
    Model,
    TrainStep,
    check_classes,
    check_unlabelled,
    create_model,
)
from napari_unetpp.networks import build_network
from napari_unetpp.sampling import PatchSampler

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from numpy.typing import NDArray

_SCORE_EVERY = 25  # steps; the crops that are scored cost about as much as one step
_SCORE_CROPS = 16


class Stop(Protocol):
    """Anything that can be asked whether to stop, such as `threading.Event`."""

    def is_set(self) -> bool:
        """Return whether to stop after the current step."""
        ...


class Trainer:
    """Everything a training needs from one step to the next.

    Parameters
    ----------
    model : Model
        Where it starts; not changed.
    examples : Examples
        What it learns from.
    config : TrainConfig
        How.
    seed : int
        Of sampling, augmentation and the held-out positions.
    device : torch.device
        Where it computes.
    """

    def __init__(
        self,
        model: Model,
        examples: Examples,
        config: TrainConfig,
        *,
        seed: int,
        device: torch.device,
    ) -> None:
        self._start = model
        self._config = config
        self._seed = seed
        self._device = device
        self._n_classes = len(model.classes)
        self.steps = 0
        self.score: float | None = None
        self._rng = np.random.default_rng(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._read(examples)
        self.network = model.copy().network.to(
            device, memory_format=torch.channels_last
        )  # type: ignore[call-overload]
        self.network.add_to_logits([-p for p in model.prior])
        self._shown = model.copy().network.to(device)
        self._shown.load_state_dict(self.network.state_dict())
        self._optimizer = self._make_optimizer()
        self._frequency = np.zeros(self._n_classes)

    def _read(self, examples: Examples) -> None:
        training, scoring = heldout.split(
            examples.targets,
            examples.numbers,
            self._n_classes,
            seed=self._seed,
            fraction=self._config.held_out,
        )
        self._images = [torch.from_numpy(i).to(self._device) for i in examples.images]
        self._targets = [torch.from_numpy(t).to(self._device) for t in training]
        self._sampler = PatchSampler(training, self._config.patch, self._rng)
        self.painted = heldout.count(examples.targets, self._n_classes)
        self._scored = self._scored_crops(scoring)

    def _scored_crops(
        self, scoring: list[NDArray[np.uint8]]
    ) -> list[tuple[Tensor, NDArray[np.uint8]]]:
        """Cut the crops whose held-out pixels give the score."""
        if not any(s.any() for s in scoring):
            return []
        rng = np.random.default_rng(self._seed)
        draw = PatchSampler(scoring, 16, rng).draw(_SCORE_CROPS)
        windows, truths = augment.cut_windows(
            self._images,
            [torch.from_numpy(s).to(self._device) for s in scoring],
            draw.image.tolist(),
            draw.centres.tolist(),
            self._score_side(),
        )
        return [
            (w[None], t.cpu().numpy()) for w, t in zip(windows, truths, strict=True)
        ]

    def _score_side(self) -> int:
        network = self._start.network
        multiple = network.multiple()
        if network.margin:
            return network.valid_size(self._config.patch)
        return -(-self._config.patch // multiple) * multiple

    def _make_optimizer(self) -> torch.optim.Optimizer:
        c = self._config
        learned = [p for p in self.network.parameters() if p.requires_grad]
        if c.optimizer == "sgd":
            return torch.optim.SGD(
                learned,
                lr=c.learning_rate,
                momentum=c.momentum,
                nesterov=c.momentum > 0,
                weight_decay=c.weight_decay,
            )
        kind = torch.optim.AdamW if c.optimizer == "adamw" else torch.optim.Adam
        return kind(
            learned, lr=c.learning_rate, weight_decay=c.weight_decay, foreach=True
        )

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw patches: images (N, C, H, W) and class numbers (N, h, w)."""
        c = self._config
        side = self._score_side()
        draw = self._sampler.draw(c.batch)
        warped = self.steps >= c.warp_after
        spec = augment.Warp(
            flip=c.flip,
            right_angles=c.right_angles,
            rotation=c.rotation if warped else 0.0,
            scale=c.scale if warped else 0.0,
            elastic_sigma=c.elastic_sigma if warped else 0.0,
            elastic_spacing=c.elastic_spacing,
        )
        window = spec.window(side)
        windows, annotation = augment.cut_windows(
            self._images,
            self._targets,
            draw.image.tolist(),
            draw.centres.tolist(),
            window,
        )
        grid = augment.sampling_grid(
            c.batch, side, window, self._generator, spec, self._device
        )
        patches, annotation = augment.warp(windows, annotation, grid)
        patches = augment.grey_values(
            patches,
            self._generator,
            gain=c.gain,
            offset=c.offset,
            gamma=c.gamma,
            noise=c.noise,
            channel_share=c.channel_share if patches.shape[1] > 1 else 0.0,
        )
        target = annotation.long() - 1
        margin = self.network.margin
        if margin:
            target = target[:, margin : side - margin, margin : side - margin]
        return patches.to(memory_format=torch.channels_last), target

    def step(self) -> float:
        """Take one optimizer step and return its loss."""
        self.network.train()
        patches, target = self.batch()
        with autocast(self._device, self._config.mixed_precision), self._dropout():
            heads = self.network(patches)
        loss = self._loss(heads, target)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self.steps += 1
        self._average()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"The loss must stay finite, got {value} at step {self.steps}. Start "
                "over with a smaller `learning_rate`."
            )
        if self._scored and self.steps % _SCORE_EVERY == 0:
            self.score = self._measure_score()
        return value

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Let dropout follow our seed, and leave the caller's random numbers alone."""
        if not self.network.config.dropout:
            yield
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed((self._seed * 1_000_003 + self.steps) % 2**63)
            yield

    def _loss(self, heads: list[Tensor], target: Tensor) -> Tensor:
        name = self._config.loss
        if name != "cross_entropy":
            return losses.deep_supervision(heads, target, losses.LOSSES[name])
        weights = self._class_weights(target)
        return losses.deep_supervision(
            heads,
            target,
            lambda logits, t: losses.cross_entropy(logits, t, class_weights=weights),
        )

    def _class_weights(self, target: Tensor) -> Tensor | None:
        """Inverse of the classes' running frequency in the batches."""
        if self._config.balance == 0:
            return None
        counts = torch.bincount(target.flatten() + 1, minlength=self._n_classes + 1)
        counts_np = counts[1:].cpu().numpy().astype(float)
        decay = 0.98
        self._frequency = decay * self._frequency + (1 - decay) * counts_np
        share = self._frequency / max(self._frequency.sum(), 1e-9)
        weights = np.maximum(share, 1e-3) ** -self._config.balance
        return torch.as_tensor(weights / weights.mean(), dtype=torch.float32).to(
            self._device
        )

    @torch.no_grad()
    def _average(self) -> None:
        """Follow the weights with a window that grows with the steps."""
        power = self._config.averaging + 1
        keep = (1 - 1 / (self.steps + 1)) ** power if self._config.averaging else 0.0
        shown: list[Tensor] = list(self._shown.parameters())
        torch._foreach_lerp_(shown, list(self.network.parameters()), 1 - keep)
        for mine, theirs in zip(
            self._shown.buffers(), self.network.buffers(), strict=True
        ):
            mine.copy_(theirs)

    @torch.inference_mode()
    def _measure_score(self) -> float | None:
        self._shown.eval()
        truths, labels = [], []
        margin = self._shown.margin
        for window, truth in self._scored:
            logits = self._shown(window, last_only=True)[-1][0]
            inner = truth[
                margin : truth.shape[0] - margin, margin : truth.shape[1] - margin
            ]
            labels.append((logits.argmax(0) + 1).cpu().numpy()[inner > 0])
            truths.append(inner[inner > 0])
        result = evaluate(np.concatenate(labels), np.concatenate(truths))
        return float(result.mean_iou)

    def model(self, history: Sequence[TrainStep] = ()) -> Model:
        """Return the model as it stands, its own copy on the CPU."""
        model = self._start.copy()
        weights = {
            k: v.detach().cpu().clone() for k, v in self._shown.state_dict().items()
        }
        model.network.load_state_dict(weights)
        model.network.eval()
        model.prior = self._prior()
        model.network.add_to_logits(list(model.prior))
        model.history = tuple(history)
        return model

    def provenance(self, examples: Examples) -> dict[str, Any]:
        """Return how this training can be told from any other."""
        return {
            "napari_unetpp": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "seed": self._seed,
            "steps": self.steps,
            "held_out_score": self.score,
            "settings": self._config.to_dict(),
            "data": examples.fingerprints[:64],
            "parent": self._start.provenance.get("digest"),
        }

    def _prior(self) -> tuple[float, ...]:
        """Log of the painted share of each class, damped, less that of equal shares."""
        if self._config.loss != "cross_entropy":
            return (0.0,) * self._n_classes
        share = self.painted / self.painted.sum()
        # A class without strokes (yet) keeps what the network thinks of it.
        log = np.log(np.where(share > 0, share, 1 / self._n_classes) * self._n_classes)
        return tuple(float(v) for v in self._config.prior * self._config.balance * log)


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

    Yields
    ------
    step : TrainStep

    Returns
    -------
    model : Model
        The generator's return value, also after `stop`.

    Raises
    ------
    ValueError
        If an argument does not fit; before anything is trained.
    TrainingError
        If the loss is no longer finite.
    DeviceMemoryError
        If a step does not fit on the device.
    """
    # Any optimizer imports it at its first step; those seconds would be the user's.
    import torch._dynamo

    began = time.perf_counter()
    _check_limits(max_seconds, max_steps, seed)
    if max_seconds is None and max_steps is None:
        max_seconds = 30.0
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
    )
    names = _class_names(classes, model, examples, 0 if unlabelled is None else 1)
    start = _starting_model(model, network, names, examples, unlabelled, seed)
    trainer = Trainer(
        start, examples, config or TrainConfig(), seed=seed, device=target_device
    )
    return _loop(trainer, examples, began, max_seconds, max_steps, stop)


def _loop(
    trainer: Trainer,
    examples: Examples,
    began: float,
    max_seconds: float | None,
    max_steps: int | None,
    stop: Stop | None,
) -> Generator[TrainStep, None, Model]:
    history: list[TrainStep] = []
    while True:
        try:
            loss = trainer.step()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise DeviceMemoryError(
                "The device has no memory left for a training step. Choose a smaller "
                "`batch` or `patch`, close other programs, or use device='cpu'."
            ) from None
        seconds = time.perf_counter() - began
        history.append(TrainStep(trainer.steps, loss, seconds, trainer.score))
        yield history[-1]
        over = max_seconds is not None and time.perf_counter() - began >= max_seconds
        if over or trainer.steps == max_steps or (stop is not None and stop.is_set()):
            break
    result = trainer.model(history)
    result.provenance = trainer.provenance(examples)
    return result


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
        check_number("max_steps", max_steps, 1, 10**12, whole=True)
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


def _starting_model(
    model: Model | None,
    network: str | NetConfig,
    names: tuple[str, ...],
    examples: Examples,
    unlabelled: int | None,
    seed: int,
) -> Model:
    channels = len(examples.images[0])
    if model is None:
        if not isinstance(network, NetConfig):
            check_choice("network", network, NETWORKS)
            network = working_config(network, channels, len(names))
        if network.in_channels != channels:
            raise ValueError(
                f"`network` takes {network.in_channels} channel(s), the images have "
                f"{channels}."
            )
        return create_model(network, classes=names, unlabelled=unlabelled, seed=seed)
    if model.config.in_channels != channels:
        raise ValueError(
            f"`images` must have {model.config.in_channels} channel(s) for this model, "
            f"got {channels}."
        )
    return _with_classes(model, names, seed)


def _with_classes(model: Model, names: tuple[str, ...], seed: int) -> Model:
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
            wide[k:] = wide[k:] if len(rest) else 0
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
