"""One training from step to step: batch, loss, optimizer, average, held-out score."""

from __future__ import annotations

import logging
import math
import platform
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from napari_unetpp import (
    __version__,
    augment,
    budget,
    heldout,
    losses,
    parallel,
    schedule,
)
from napari_unetpp.checkpoint import (
    Checkpoint,
    State,
    chance,
    check_whole,
    data_table,
    set_chance,
)
from napari_unetpp.config import check_number
from napari_unetpp.device import (
    autocast,
    deterministic,
    environment,
    is_out_of_memory,
    release_memory,
)
from napari_unetpp.errors import DeviceMemoryError, TrainingError
from napari_unetpp.heldout import HeldOut
from napari_unetpp.networks.blocks import pool_norms
from napari_unetpp.sampling import Draw, PatchSampler
from napari_unetpp.score import Score, Scorer
from napari_unetpp.teacher import SOFT, Lesson, Teacher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from napari_unetpp.config import TrainConfig
    from napari_unetpp.examples import Examples
    from napari_unetpp.model import Model, TrainStep

_log = logging.getLogger("napari_unetpp")

_SCORE_EVERY = 50  # steps; a score of a UNet++ takes as long as about five
_RAMP = 50  # steps in which the energy between strokes reaches its weight
_FRESH = 40  # steps in which half of each batch comes from what was painted last
_SEVERAL, _LONG = 4, 64  # steps that one average stands for, once it is so old
_RECALL = 10  # steps that the averaged weights remember when new strokes arrive
_ASK, _LISTEN = 4, 25  # steps after new strokes: a forest learns them meanwhile, ...
_LATER = 15  # ... those of a correction only from here on: it is to be seen soon
_TRIES = 6  # of a step, with half the patches or half their side each time
_LEAST = 32  # px, side of the smallest patch that is tried
_ADAM = frozenset({"step", "exp_avg", "exp_avg_sq"})  # what it remembers of a weight
_SGD = frozenset({"momentum_buffer"})


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
        Of sampling, augmentation and, at a model's first training, of what is held out.
    device : torch.device
        Where it computes.

    Attributes
    ----------
    device : torch.device
        Where it computes.
    held_out : HeldOut
        What never trains: the model's own, or chosen now and frozen.
    estimates : dict of int to Score
        The newest score at each depth; empty while there are too few strokes.
    judge : callable or None
        Takes the model and the step, and gives the score in place of the held-out one.
    note : str
        What the user should know of the last step, or "".

    Raises
    ------
    ValueError
        If a class has strokes only where they are held out.
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
        self._config = self._wished = config
        self._seed = seed
        self.device = device
        self._n_classes = len(model.classes)
        self._team = parallel.team()
        self._team.share(config.batch)
        if self._team.size > 1 and model.config.norm == "batch":
            raise ValueError(
                "`norm` must not be 'batch' where several processes train, whose "
                "statistics would be of one process's patches. Choose 'group', or one "
                "process."
            )
        self.steps = 0
        self.note = ""
        self.estimates: dict[int, Score] = {}
        self.held_out = HeldOut.of(model.provenance) or heldout.choose(
            examples.targets,
            examples.numbers,
            self._n_classes,
            seed=seed,
            fraction=config.held_out,
        )
        self._averaged_from = 0
        self._arrays: list[NDArray[np.float32]] = []
        self._images: list[Tensor] = []
        self._fresh: PatchSampler | None = None
        self._fresh_strokes: list[NDArray[np.uint8]] = []
        self._fresh_until = 0
        self.resumed: list[dict[str, Any]] = []
        self.judge: Callable[[Model, int], float] | None = None
        self._pixel_weights: Tensor | None = None  # of the batch that was drawn last
        self._rows: Tensor | None = None  # of it, too: of the soft labels' table
        self._fitted = False
        self._rng = np.random.default_rng(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._teacher = None
        if config.forest and _is_taught(model, examples):
            self._teacher = Teacher(self._n_classes, self.held_out, seed)
        self._lesson: Lesson | None = None
        self._ask_at, self._lesson_at, self._asked = _ASK, _LISTEN, False
        self._read(examples)
        self.network = model.copy().network.to(
            device, memory_format=torch.channels_last
        )  # type: ignore[call-overload]
        self.network.add_to_logits([-p for p in model.prior])
        self._shown = model.copy().network.to(device)
        self._shown.load_state_dict(self.network.state_dict())
        schedule.freeze(self.network, config, 0)
        self._optimizer = self._make_optimizer()
        self._frequency = np.zeros(self._n_classes)

    @property
    def scores(self) -> dict[int, float]:
        """Mean IoU at each depth, when it was last measured."""
        return {depth: score.mean for depth, score in self.estimates.items()}

    @property
    def score(self) -> float | None:
        """The same of the deepest head; None while there are too few strokes."""
        return self.scores.get(self._shown.depths[-1])

    @property
    def scored_now(self) -> bool:
        """Whether the last step was one after which the score is measured."""
        return is_scored(self.steps, self._config.score_every)

    def _read(self, examples: Examples) -> None:
        self._examples = examples
        targets, numbers = examples.targets, examples.numbers
        starved = self.held_out.starved(targets, numbers, self._n_classes)
        if starved:
            raise ValueError(
                "`annotations` must have strokes of every class where something is "
                "learned, but those of "
                f"{', '.join(self._start.classes[i] for i in starved)} lie only in "
                "places that are kept for the score. Paint one more stroke of it "
                "somewhere else."
            )
        training, scoring = self.held_out.split(targets, numbers)
        there = {id(a): t for a, t in zip(self._arrays, self._images, strict=True)}
        self._images = [
            there[id(i)] if id(i) in there else torch.from_numpy(i).to(self.device)
            for i in examples.images
        ]
        self._weighed = self._images
        if self._config.border:
            self._weighed = self._with_weights(examples)
        self._arrays, self._training = examples.images, training
        self._put_targets()
        self._sampler = PatchSampler(training, self._config.patch, self._rng)
        self.painted = heldout.count(training, self._n_classes)
        self._scorer = Scorer(
            self._images,
            scoring,
            heldout.count(targets, self._n_classes) > 0,
            side=self._score_side(),
            margin=self._start.network.margin,
            seed=self._seed,
        )

    def _put_targets(self) -> None:
        """Bring the annotation to the device, with the soft labels if there are any."""
        targets: Sequence[NDArray[Any]] = self._training
        self._table: Tensor | None = None
        if self._lesson is not None:
            targets, table = self._lesson.onto(self._training)
            self._table = torch.from_numpy(table).to(self.device)
        self._targets = [torch.from_numpy(t).to(self.device) for t in targets]

    def _attend(self) -> None:
        """Let a forest learn from new strokes, and take over what it made of them."""
        if self._teacher is None or self._lesson_at < 0:
            return
        if not self._asked and self.steps >= self._ask_at:
            self._asked = True
            self._teacher.ask(self._arrays, self._training, self._examples.numbers)
        if self.steps >= self._lesson_at:
            self._lesson_at = -1
            try:
                self._lesson = self._teacher.answer()
            except MemoryError:
                _log.warning("No memory is left for a random forest: it is left out.")
            self._put_targets()

    def _with_weights(self, examples: Examples) -> list[Tensor]:
        """Return the images with their border weights as one more channel."""
        objects = examples.instances or [losses.regions(t) for t in examples.targets]
        w0, sigma = self._config.border, self._config.border_sigma
        weights = [losses.border_weights(o, w0=w0, sigma=sigma) for o in objects]
        return [
            torch.cat([image, torch.from_numpy(w)[None].to(self.device)])
            for image, w in zip(self._images, weights, strict=True)
        ]

    def learn_from(self, examples: Examples) -> None:
        """Go on with other annotations, and look at what is new in them first.

        The weights that are shown forget what they were before, so that a correction
        is seen within a second or two.
        """
        old = {id(i): t for i, t in zip(self._arrays, self._training, strict=True)}
        self._lesson = None
        self._read(examples)
        fresh = []
        for image, target in zip(self._arrays, self._training, strict=True):
            before = old.get(id(image))
            new = target if before is None else np.where(target != before, target, 0)
            fresh.append(new.astype(np.uint8))
        self._look_at(fresh)  # the image numbers of the last ones were the old list's
        if self._fresh is not None:
            self._fresh_until = self.steps + _FRESH
        if self._asked:
            self._ask_at, self._asked = self.steps + _LATER, False
        self._lesson_at = self.steps + _LISTEN
        self._averaged_from = max(self._averaged_from, self.steps - _RECALL)

    def _look_at(self, fresh: list[NDArray[np.uint8]]) -> None:
        """Draw half of the next batches from these strokes, if there are any."""
        self._fresh, self._fresh_strokes = None, []
        if any(f.any() for f in fresh):
            self._fresh = PatchSampler(fresh, self._config.patch, self._rng)
            self._fresh_strokes = fresh

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
                nesterov=c.nesterov and c.momentum > 0,
                weight_decay=c.weight_decay,
            )
        kind = torch.optim.AdamW if c.optimizer == "adamw" else torch.optim.Adam
        return kind(
            learned, lr=c.learning_rate, weight_decay=c.weight_decay, fused=True
        )

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw patches: images (N, C, H, W) and class numbers (N, h, w)."""
        c = self._config
        side = self._score_side()
        draw = self._draw(c.batch)
        self._drawn = draw.image
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
            self._weighed,
            self._targets,
            draw.image.tolist(),
            draw.centres.tolist(),
            window,
        )
        grid = augment.sampling_grid(
            c.batch, side, window, self._generator, spec, self.device
        )
        patches, annotation = augment.warp(windows, annotation, grid)
        if c.border:
            patches, weights = patches[:, :-1], patches[:, -1]
            self._pixel_weights = _inner(weights, self.network.margin)
        annotation = _inner(annotation, self.network.margin)
        if self._table is not None:
            self._rows = (annotation.long() - SOFT).clamp_min(losses.IGNORE)
            annotation = torch.where(annotation < SOFT, annotation, 0)
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
        return patches.to(memory_format=torch.channels_last), target

    def _draw(self, n: int) -> Draw:
        """Draw places; half of them where something has just been painted."""
        if self._fresh is None or self.steps >= self._fresh_until:
            return self._sampler.draw(n)
        parts = [self._fresh.draw(n // 2), self._sampler.draw(n - n // 2)]
        return Draw(*(np.concatenate(values) for values in zip(*parts, strict=True)))

    def step(self) -> float:
        """Take one optimizer step and return its loss.

        Where memory runs out, the step is begun again from the same weights and random
        numbers with half the batch, then with half the patch; `note` tells it.

        Raises
        ------
        TrainingError
            If the loss or a weight is not finite: the weights that are shown are still
            finite ones.
        DeviceMemoryError
            If memory runs out six times.
        """
        self.note = ""
        self._fit()
        self._attend()
        before = self._mark()
        with deterministic(self._config.deterministic):
            value: float = self._within_memory(self._learn, lambda: self._undo(before))
        self.steps += 1
        self._average()
        if self.scored_now:
            self.estimates = self._within_memory(self._measure, lambda: None)
        return value

    def _within_memory(self, work: Callable[[], Any], undo: Callable[[], None]) -> Any:
        """Do some work, with less at once each time that memory runs out."""
        for left in reversed(range(_TRIES)):
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Only out here are the error's frames gone, which hold the tensors.
            self._optimizer.zero_grad(set_to_none=True)
            undo()
            release_memory()
            # Alone, one of several processes cannot begin anew.
            if not left or self._team.size > 1 or not self._take_less():
                break
        raise DeviceMemoryError(
            "The device has no memory left for a training step, not even for "
            f"{self._config.batch} patch(es) of {self._config.patch} px. Choose a "
            "smaller network, close other programs, or use device='cpu'."
        )

    def _fit(self) -> None:
        """Begin with less where the first step could not but run out of memory.

        An operator that finds no memory may end the process instead of telling it.
        """
        if self._fitted or self._team.size > 1:
            return
        self._fitted = True
        network = self._start.config
        while not budget.step_fits(
            network, self._config.batch, self._score_side(), self.device
        ):
            if not self._take_less("Memory is short"):
                break

    def _take_less(self, why: str = "Memory ran out") -> bool:
        """Halve the batch, or else the patch; False if there is no less."""
        c, least = self._config, max(_LEAST, self._start.network.multiple())
        if c.batch > 1:
            c = c.replaced(batch=c.batch // 2)
        elif c.patch // 2 >= least:
            c = c.replaced(patch=c.patch // 2)
        else:
            return False
        self._use(c)
        self.note = (
            f"{why}: from step {self.steps + 1} on, the batch is "
            f"{c.batch} x {c.patch} px."
        )
        return True

    def _use(self, config: TrainConfig) -> None:
        """Go on with another batch or patch."""
        self._config = config
        self._read(self._examples)
        if self._fresh is not None:
            self._look_at(self._fresh_strokes)

    def _mark(self) -> tuple[Any, ...]:
        """Return what a step changes before it changes the weights for good."""
        learned = [p for _, p in self._learned()]
        memory = {p: dict(self._optimizer.state.get(p, {})) for p in learned}
        # Adam's fused update is done as a whole or not at all, all but its counter.
        kept = [s["step"] for s in memory.values() if "step" in s]
        if self._config.optimizer == "sgd":
            kept = [*learned, *(v for s in memory.values() for v in s.values())]
        kept += list(self.network.buffers())
        return (
            chance(self._rng),
            self._generator.get_state(),
            self._frequency,
            memory,
            [(t, t.detach().clone()) for t in kept if t is not None],
        )

    @torch.no_grad()
    def _undo(self, mark: tuple[Any, ...]) -> None:
        rng, generator, frequency, memory, kept = mark
        set_chance(self._rng, rng)
        self._generator.set_state(generator)
        self._frequency = frequency
        self._optimizer.state.clear()
        for weight, remembered in memory.items():
            if remembered:
                self._optimizer.state[weight].update(remembered)
        for tensor, value in kept:
            tensor.copy_(value)

    def _measure(self) -> dict[int, Score]:
        if self.judge:
            told = self.judge(self.model(), self.steps)
            known = Score.known(told if math.isfinite(told) else 0.0)
            return {self._shown.depths[-1]: known}
        return self._scorer.measure(
            self._shown, self._prior(), half=self._config.mixed_precision
        )

    def _learn(self) -> float:
        """Change the weights once and return the loss."""
        if schedule.thaws(self._config, self.steps):
            schedule.freeze(self.network, self._config, self.steps)
            self._optimizer = self._make_optimizer()
        schedule.train_mode(self.network, self._config, self.steps)
        alone = len(self._images) == 1 and self._team.size == 1
        pool_norms(self.network, alone and self._config.pooled_norms)
        patches, target = self.batch()
        with autocast(self.device, self._config.mixed_precision), self._dropout():
            own = patches[self._team.share(len(patches))]
            heads = self._team.joined(self.network(own, self._depth()))
        loss = self._loss(heads, target)
        total = loss + self._between_strokes(heads, patches) + self._taught(heads)
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        weights = [p for _, p in self._learned()]
        self._team.add_up([p.grad for p in weights if p.grad is not None])
        # The device is asked only now, when it has the whole step to work on.
        self._check_finite("loss", float(total.detach()), patches)
        if self._config.clip:
            torch.nn.utils.clip_grad_norm_(weights, self._config.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = schedule.rate(self._config, self.steps)
        self._optimizer.step()
        if self._averages(self.steps + 1):
            # Before they reach what is shown; all else is caught by the next loss.
            self._check_finite("weights", _size(weights), patches)
        return float(loss.detach())

    def _check_finite(self, what: str, value: float, patches: Tensor) -> None:
        if math.isfinite(value):
            return
        bad = ~torch.isfinite(patches).flatten(1).all(1).cpu().numpy()
        remedy = "Start over with a smaller `learning_rate`."
        if bad.any():
            remedy = (
                f"Image {int(self._drawn[bad][0]) + 1} holds values that are not: "
                "repair it or leave it out."
            )
        raise TrainingError(
            f"The {what} must stay finite, got {value} at step {self.steps + 1}. "
            f"{remedy}"
        )

    def _depth(self) -> int:
        """Return how deep this step goes: 1, 2, 1, 3, 1, 2, 1, 4, 1, ...

        Where the heads build on one another, the shallow nodes, which all depths
        share, learn at every step and the deep ones as often as they are cheap: in the
        same time a UNet++ takes 2.3 times the steps.
        """
        depths: tuple[int, ...] = self.network.depths
        if not self.network.config.residual or len(depths) == 1:
            return depths[-1]
        turn = self.steps % 2 ** (len(depths) - 1) + 1
        return depths[int(turn & -turn).bit_length() - 1]

    @contextmanager
    def _dropout(self) -> Iterator[None]:
        """Let dropout follow our seed, and leave the caller's random numbers alone."""
        if not self.network.config.dropout:
            yield
            return
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(
                (self._seed * 1_000_003 + self.steps + (self._team.rank << 40)) % 2**63
            )
            yield

    def _loss(self, heads: list[Tensor], target: Tensor) -> Tensor:
        name = self._config.loss
        if name != "cross_entropy":
            return losses.deep_supervision(heads, target, losses.LOSSES[name])
        weights = self._class_weights(target)
        return losses.deep_supervision(
            heads,
            target,
            lambda logits, t: losses.cross_entropy(
                logits, t, pixel_weights=self._pixel_weights, class_weights=weights
            ),
        )

    def _between_strokes(self, heads: list[Tensor], patches: Tensor) -> Tensor | float:
        """Return the weighted energy that draws borders to edges of the image."""
        if not self._config.edges:
            return 0.0
        # One label for all pixels would please this term most: it comes in slowly,
        # and weighs on the deepest head what the annotation does.
        weight = self._config.edges * min(1, self.steps / _RAMP) / len(heads)
        image = _inner(patches, self.network.margin)
        return weight * losses.edge_aware(heads[-1], image)

    def _taught(self, heads: list[Tensor]) -> Tensor | float:
        """Return how far the heads are from what the forest believes."""
        table = self._table
        if table is None or self._rows is None:
            return 0.0
        apart = losses.deep_supervision(
            heads,
            self._rows,
            lambda logits, rows: losses.soft_cross_entropy(logits, rows, table),
        )
        return self._config.forest * apart

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
            self.device
        )

    def _averages(self, step: int) -> int:
        """Return for how many steps the average moves after this one.

        A pass over all weights costs a tenth of a step of UNet++; once the window is
        long, one for several steps moves the average as far as one for each did.
        """
        age = step - self._averaged_from
        several = _SEVERAL if self._config.averaging and age > _LONG else 1
        return 0 if age % several else several

    @torch.no_grad()
    def _average(self) -> None:
        """Follow the weights with a window that grows with the steps."""
        several = self._averages(self.steps)
        if not several:
            return
        power = self._config.averaging + 1
        steps = self.steps - self._averaged_from
        keep = (1 - several / (steps + 1)) ** power if self._config.averaging else 0.0
        shown: list[Tensor] = list(self._shown.parameters())
        torch._foreach_lerp_(shown, list(self.network.parameters()), 1 - keep)
        for mine, theirs in zip(
            self._shown.buffers(), self.network.buffers(), strict=True
        ):
            mine.copy_(theirs)

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
        estimate = self.estimates.get(self._shown.depths[-1])
        return {
            "napari_unetpp": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "seed": self._seed,
            "steps": self.steps,
            "held_out": self.held_out.to_dict(),
            "held_out_score": self.score,
            "held_out_interval": None
            if estimate is None
            else [estimate.low, estimate.high],
            "settings": self._config.to_dict(),
            "data": examples.fingerprints[:64],
            "parent": self._start.provenance.get("digest"),
            "taught": self._teacher is not None,
            **({"resumed": self.resumed[-64:]} if self.resumed else {}),
        }

    # --- to and from a checkpoint -------------------------------------------------

    def checkpoint(self, model: Model, examples: Examples) -> Checkpoint:
        """Return all that is needed to go on from here.

        Parameters
        ----------
        model : Model
            As `model` has returned it, with its history and provenance.
        examples : Examples
            What is learned from.

        Raises
        ------
        TrainingError
            If anything is not finite: there is no way to go on from there.
        """
        steps = [(s.step, s.loss, s.seconds, s.score) for s in model.history]
        return Checkpoint(
            model.contents(),
            {
                "settings": self._wished.to_dict(),
                "seed": self._seed,
                "parent": self._start.provenance.get("digest"),
            },
            environment(self.device),
            data_table(examples.fingerprints, examples.numbers),
            np.array(steps, np.float64).reshape(-1, 4),
            self.state(),
        )

    def state(self) -> State:
        """Return a copy of what changes from step to step."""
        tensors = {
            **{f"network.{k}": v for k, v in self.network.state_dict().items()},
            **{f"shown.{k}": v for k, v in self._shown.state_dict().items()},
            **{
                f"optimizer.{key}.{name}": value
                for name, weight in self._learned()
                for key, value in self._optimizer.state.get(weight, {}).items()
                if value is not None
            },
        }
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"All weights must stay finite, but {name} is not at step "
                    f"{self.steps}. Start over with a smaller `learning_rate`."
                )
        values = {
            "steps": self.steps,
            "averaged_from": self._averaged_from,
            "fresh_until": self._fresh_until,
            "estimates": [[d, score.to_list()] for d, score in self.estimates.items()],
            "frequency": self._frequency.tolist(),
            "lesson_at": self._lesson_at if self._lesson_at >= 0 else self.steps,
            "rng": chance(self._rng),
        }
        if self._config != self._wished:  # memory has run out
            values["less"] = [self._config.batch, self._config.patch]
        return State(
            {k: v.detach().cpu().clone().numpy() for k, v in tensors.items()},
            {
                "generator": self._generator.get_state().numpy().view(np.int64),
                "fresh": self._fresh_points(),
            },
            values,
        )

    def _fresh_points(self) -> NDArray[np.int64]:
        """Return image, row, column and value of what was painted last, flat."""
        if self.steps >= self._fresh_until:
            return np.zeros(0, np.int64)
        points = [
            np.column_stack([np.full(np.count_nonzero(f), i), *np.nonzero(f), f[f > 0]])
            for i, f in enumerate(self._fresh_strokes)
        ]
        return np.concatenate([np.zeros((0, 4), np.int64), *points]).ravel()

    def restore(self, state: State, *, same_data: bool = True) -> None:
        """Go on where another trainer of the same arguments stood.

        Parameters
        ----------
        state : State
            As `state` has returned it.
        same_data : bool, optional
            False: the examples are others than they were.

        Raises
        ------
        ValueError
            If it is not the state of such a trainer.
        """
        values, tensors = state.values, dict(state.tensors)
        if "less" in values:
            batch, patch = values["less"]
            check_whole(batch, 1, self._wished.batch)
            check_whole(patch, 1, self._wished.patch)
            self._use(self._wished.replaced(batch=batch, patch=patch))
        for start, network in (("network.", self.network), ("shown.", self._shown)):
            own = {k: tensors.pop(start + k) for k in network.state_dict()}
            _load(network, own)
        self.steps = check_whole(values["steps"], 0)
        # The step that thaws makes a new optimizer before anything is changed.
        schedule.freeze(self.network, self._config, max(0, self.steps - 1))
        self._optimizer = self._make_optimizer()
        self._restore_optimizer(tensors)
        self._averaged_from = check_whole(values["averaged_from"], 0, self.steps)
        self._fresh_until = check_whole(values["fresh_until"], 0)
        self._lesson_at = self.steps + _LISTEN
        if same_data:
            self._lesson_at = check_whole(values["lesson_at"], 0)
        self.estimates = {
            check_whole(depth, 1, 6): Score.from_list(score)
            for depth, score in values["estimates"]
        }
        if len(values["frequency"]) != self._n_classes:
            raise ValueError("it has another number of classes.")
        for value in values["frequency"]:
            check_number("frequency", value, 0, 1e15)
        self._frequency = np.array(values["frequency"], np.float64)
        set_chance(self._rng, values["rng"])
        generator = torch.from_numpy(state.rows["generator"].view(np.uint8).copy())
        try:
            self._generator.set_state(generator)
        except RuntimeError as error:
            raise ValueError(f"its random numbers cannot be used: {error}") from None
        if same_data:
            self._look_at(self._strokes_of(state.rows["fresh"].reshape(-1, 4)))
        else:
            self._averaged_from = max(self._averaged_from, self.steps - _RECALL)

    def _learned(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(n, p) for n, p in self.network.named_parameters() if p.requires_grad]

    def _restore_optimizer(self, tensors: dict[str, NDArray[Any]]) -> None:
        keys = _SGD if self._config.optimizer == "sgd" else _ADAM
        self._optimizer.state.clear()
        for name, weight in self._learned():
            found = {
                key: tensors.pop(f"optimizer.{key}.{name}")
                for key in sorted(keys)
                if f"optimizer.{key}.{name}" in tensors
            }
            if not found:
                continue  # a weight that has not learned yet
            if set(found) != keys:
                raise ValueError(f"what the optimizer knows of {name} is not complete.")
            for key, array in found.items():
                # The layout in memory is the weight's, as the optimizer makes it.
                like = weight if key != "step" else torch.zeros((), device=self.device)
                self._optimizer.state[weight][key] = _copied(array, like)
        if tensors:
            raise ValueError(f"it holds more than its network: {min(tensors)[:64]}.")

    def _strokes_of(self, points: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        fresh = [np.zeros_like(target) for target in self._training]
        for image, row, column, value in points.tolist():
            check_whole(image, 0, len(fresh) - 1)
            check_whole(row, 0, fresh[image].shape[0] - 1)
            check_whole(column, 0, fresh[image].shape[1] - 1)
            fresh[image][row, column] = check_whole(value, 1, self._n_classes)
        return fresh

    def _prior(self) -> tuple[float, ...]:
        """Log of the painted share of each class, damped, less that of equal shares."""
        if self._config.loss != "cross_entropy":
            return (0.0,) * self._n_classes
        share = self.painted / self.painted.sum()
        # A class without strokes (yet) keeps what the network thinks of it.
        log = np.log(np.where(share > 0, share, 1 / self._n_classes) * self._n_classes)
        return tuple(float(v) for v in self._config.prior * self._config.balance * log)


def _is_taught(model: Model, examples: Examples) -> bool:
    """Return whether a forest may teach it: what knows more than one would forget it.

    That is a new network, or one that goes on with images that it learned so.
    """
    known = model.provenance
    if "steps" not in known or not known.get("taught"):
        return "steps" not in known
    learned = known.get("data")
    before = {str(d)[:16] for d in learned} if isinstance(learned, list) else set()
    return any(f[:16] in before for f in examples.fingerprints)


def is_scored(step: int, every: int | None = None) -> bool:
    """Return whether the held-out score is measured after this step."""
    return step > 0 and step % (every or _SCORE_EVERY) == 0


@torch.no_grad()
def _size(tensors: Sequence[Tensor]) -> float:
    """Return one number that is finite where all these are."""
    if not tensors:
        return 0.0
    return float(torch.stack([t.sum() for t in tensors]).sum())  # a norm takes longer


def _load(network: torch.nn.Module, arrays: dict[str, NDArray[Any]]) -> None:
    with torch.no_grad():
        for name, own in network.state_dict().items():
            own.copy_(_copied(arrays[name], own))


@torch.no_grad()
def _copied(array: NDArray[Any], like: Tensor) -> Tensor:
    """Return a tensor of these values in the type and layout of `like`."""
    value = torch.from_numpy(np.array(array))
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError("its weights do not fit its network.")
    return torch.empty_like(like).copy_(value)


def _inner(x: Tensor, margin: int) -> Tensor:
    """Cut off what a valid network's output does not cover."""
    bottom, right = x.shape[-2] - margin, x.shape[-1] - margin
    return x[..., margin:bottom, margin:right]
