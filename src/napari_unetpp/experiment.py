"""One long training: validation chooses, the test is scored once, a folder keeps it."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp import io, record, report
from napari_unetpp.device import deterministic, environment, resolve_device
from napari_unetpp.evaluate import confusion_matrix, from_confusion
from napari_unetpp.examples import fingerprint
from napari_unetpp.model import TrainStep
from napari_unetpp.predict import predict
from napari_unetpp.train import train_steps

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from napari_unetpp.config import NetConfig, TrainConfig
    from napari_unetpp.model import Model
    from napari_unetpp.train import Stop

_EXAMPLES = 3  # test images that are shown: worst, middle, best


@dataclass(frozen=True, eq=False)
class Part:
    """Images with their dense masks.

    Attributes
    ----------
    names : sequence of str
        Of the images.
    images : sequence of arrays of shape (..., Y, X)
        With channels at the run's `channel_axis`.
    masks : sequence of ndarray of shape (..., Y, X)
        Class numbers in the run's coding.
    instances : sequence of ndarray of shape (..., Y, X)
        Objects, numbered from 1; empty where they are not known.
    """

    names: Sequence[str]
    images: Sequence[Any]
    masks: Sequence[NDArray[Any]]
    instances: Sequence[NDArray[Any]] = ()


@dataclass(frozen=True)
class Plan:
    """What a run does with its parts.

    Attributes
    ----------
    network : NetConfig
        What is trained.
    config : TrainConfig
        How; without `patience` it is trained to the end, and the best is kept anyway.
    classes : tuple of str
        Names, the background first.
    unlabelled : {0, None}
        Coding of the masks, see `train_steps`.
    channel_axis : int or None
        Of every image.
    max_steps, max_seconds : number or None
        When to end at the latest; neither: 30 seconds.
    seed : int
        Of all chance.
    tile : int or None
        Side in pixels of a tile in validation and test, see `predict`.
    title : str
        Of the report.
    """

    network: NetConfig
    config: TrainConfig
    classes: tuple[str, ...] = ("background", "object")
    unlabelled: int | None = None
    channel_axis: int | None = None
    max_steps: int | None = None
    max_seconds: float | None = None
    seed: int = 0
    tile: int | None = None
    title: str = "Training"


@dataclass
class _Judge:
    """Scores the validation images, and keeps a picture of one of them."""

    part: Part
    plan: Plan
    device: torch.device
    frames: Path
    shown: int = field(init=False)

    def __post_init__(self) -> None:
        first = 0 if self.plan.unlabelled is None else 1
        shares = [float(np.mean(np.asarray(m) > first)) for m in self.part.masks]
        self.shown = int(np.argsort(shares, kind="stable")[len(shares) // 2])

    def __call__(self, model: Model, step: int) -> float:
        """Return the mean score of the images."""
        scores = []
        for i, image in enumerate(self.part.images):
            labels = label(model, image, self.plan, self.device)
            scores.append(_score(judged(labels, self.part.masks[i], self.plan)))
            if i == self.shown:
                plane = labels.reshape(-1, *labels.shape[-2:])[0]
                path = self.frames / f"step_{step:08d}.png"
                io.write_labels(path, plane, overwrite=True)
        return _mean(scores)


def label(
    model: Model, image: Any, plan: Plan, device: torch.device | str | None = None
) -> NDArray[np.uint8]:
    """Return a model's labels as validation and test see them."""
    with deterministic(plan.config.deterministic):
        return predict(
            model, image, channel_axis=plan.channel_axis, tile=plan.tile, device=device
        )


def judged(
    labels: NDArray[np.uint8], truth: NDArray[Any], plan: Plan
) -> NDArray[np.int64]:
    """Return the confusion counts of an image."""
    return confusion_matrix(labels, truth, len(plan.classes), plan.unlabelled)


def _score(counts: NDArray[np.int64]) -> float:
    """Mean IoU of the classes but the background that occur in labels or truth."""
    return from_confusion(counts).foreground_iou


def _mean(scores: Sequence[float]) -> float:
    """Mean over the images that have something to find or to invent."""
    known = [s for s in scores if not math.isnan(s)]
    return sum(known) / len(known) if known else math.nan


def run_steps(
    parts: Mapping[str, Part],
    folder: Path,
    plan: Plan,
    *,
    model: Model | None = None,
    device: str | torch.device | None = None,
    stop: Stop | None = None,
    resume: bool = False,
    changed_data: bool = False,
    checkpoint_seconds: float = 60.0,
) -> Generator[TrainStep, None, Model]:
    """Train on one part, let another choose, score a third once, and write it all down.

    Parameters
    ----------
    parts : mapping of str to Part
        "train" and "validation", and "test" if there is one.
    folder : Path
        Of the run; made if there is none. It gets config.json, environment.json,
        history.csv, scores.json, curves.png, film.png, model.safetensors and
        report.html.
    plan : Plan
        What is done.
    model : Model or None, optional
        Start from a copy of this one, of the plan's network and classes.
    device : str, torch.device or None, optional
        None: the fastest there is.
    stop : object with ``is_set()``, optional
        Asked after every step. A run that is stopped is not tested.
    resume : bool, optional
        Go on with the run that the folder holds.
    changed_data : bool, optional
        Whether to resume with other training images than before.
    checkpoint_seconds : float, optional
        Between two checkpoints.

    Yields
    ------
    step : TrainStep
        Its `score` is that of the newest validation.

    Returns
    -------
    model : Model
        The generator's return value: the one that scored best.

    Raises
    ------
    ValueError
        If a part is missing or an image lies in two.
    SaveError
        If the folder holds another run or cannot be written.
    TrainingError, DeviceMemoryError, ModelFileError
        As `train_steps`.
    """
    if not parts["train"].images or not parts["validation"].images:
        raise ValueError(
            "A run needs images to train on and others to choose by, got "
            f"{len(parts['train'].images)} and {len(parts['validation'].images)}."
        )
    place = resolve_device(device)
    prints = _fingerprints(parts)
    with record.open_folder(folder, resume) as rolling:
        config = _always_choosing(plan, parts)
        facts = _facts(plan, config, parts, prints, place)
        for kind, values in facts.items():
            record.write_json(folder / record.FILES[kind], values)
        judge = _Judge(parts["validation"], plan, place, folder / "frames")
        training = train_steps(
            list(parts["train"].images),
            list(parts["train"].masks),
            model=model,
            network=plan.network,
            classes=plan.classes,
            unlabelled=plan.unlabelled,
            channel_axis=plan.channel_axis,
            config=config,
            max_steps=plan.max_steps,
            max_seconds=plan.max_seconds,
            seed=plan.seed,
            device=place,
            stop=stop,
            checkpoint=rolling.path,
            checkpoint_seconds=checkpoint_seconds,
            resume=resume and rolling.exists(),
            changed_data=changed_data,
            instances=list(parts["train"].instances) or None,
            judge=judge,
        )
        history = record.read_history(folder) if resume else []
        result = yield from _drained(training, history, folder, config)
        result.save(folder / record.FILES["model"], overwrite=True)
        stopped = stop is not None and stop.is_set()
        scores = _scores(history, result, plan)
        if parts.get("test") and parts["test"].images and not stopped:
            scores["test"] = _test(result, parts["test"], plan, place)
        record.write_json(folder / record.FILES["scores"], scores)
        report.write(
            folder,
            {**facts, "scores": scores, "history": history, "stopped": stopped},
            _pictures(result, parts, judge, scores, plan, place),
        )
        if not stopped:
            rolling.remove()
        return result


def _always_choosing(plan: Plan, parts: Mapping[str, Part]) -> TrainConfig:
    """Return the config with all images training and validation choosing."""
    config = plan.config.replaced(held_out=0.0)
    if config.patience is None:
        config = config.replaced(patience=10**9)
    if config.score_every is None:
        # About one look after each half of an epoch, but not at every other step.
        steps = len(parts["train"].images) // (2 * config.batch)
        config = config.replaced(score_every=min(max(steps, 20), 500))
    if plan.max_steps is not None and plan.max_steps < (config.score_every or 1):
        config = config.replaced(score_every=plan.max_steps)
    return config


def _drained(
    training: Generator[TrainStep, None, Model],
    history: list[TrainStep],
    folder: Path,
    config: TrainConfig,
) -> Generator[TrainStep, None, Model]:
    """Pass the steps on, and write them down at each validation."""
    every = config.score_every or 1
    first = True
    while True:
        try:
            step = next(training)
        except StopIteration as end:
            record.write_history(folder, history)
            return end.value  # type: ignore[no-any-return]
        if first:
            # What came after the checkpoint is done again.
            history[:] = [s for s in history if s.step < step.step]
            first = False
        scored = step.step % every == 0
        history.append(
            step if scored else TrainStep(step.step, step.loss, step.seconds, None)
        )
        if scored:
            record.write_history(folder, history)
        try:
            yield step
        except GeneratorExit:
            training.close()
            record.write_history(folder, history)
            raise


def _scores(history: Sequence[TrainStep], model: Model, plan: Plan) -> dict[str, Any]:
    best = max(
        (s for s in history if s.score is not None),
        key=lambda s: s.score or 0.0,
        default=None,
    )
    last = history[-1] if history else None
    return {
        "measure": "mean over the images of the mean IoU of "
        + ", ".join(plan.classes[1:]),
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "steps": last.step if last else 0,
        "seconds": last.seconds if last else 0.0,
        "best_step": best.step if best else None,
        "validation": best.score if best else None,
    }


def _test(model: Model, part: Part, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Score every image of the test once."""
    counts = [
        judged(label(model, image, plan, device), truth, plan)
        for image, truth in zip(part.images, part.masks, strict=True)
    ]
    each = [_score(c) for c in counts]
    total = from_confusion(
        np.sum(counts, axis=0), classes=plan.classes, unlabelled=plan.unlabelled
    )
    return {
        "score": _mean(each),
        "images": dict(zip(part.names, each, strict=True)),
        "iou": total.iou,
        "dice": total.dice,
        "accuracy": total.accuracy,
    }


def _pictures(
    model: Model,
    parts: Mapping[str, Part],
    judge: _Judge,
    scores: Mapping[str, Any],
    plan: Plan,
    device: torch.device,
) -> report.Pictures:
    """Return what the report shows beside figures."""
    part = parts["validation"]
    film = report.Scene(
        part.names[judge.shown],
        _seen(part.images[judge.shown], plan),
        _plane(part.masks[judge.shown], plan),
    )
    examples = []
    test = parts.get("test")
    if test is not None and "test" in scores:
        each = list(scores["test"]["images"].values())
        order = [i for i in np.argsort(each, kind="stable") if not math.isnan(each[i])]
        places = {0: "worst", len(order) // 2: "middle", len(order) - 1: "best"}
        for place, word in places.items():
            if not 0 <= place < len(order):
                continue
            i = int(order[place])
            scene = report.Scene(
                test.names[i],
                _seen(test.images[i], plan),
                _plane(test.masks[i], plan),
                _plane(label(model, test.images[i], plan, device), plan),
                f"{word} of the test, IoU {each[i]:.3f}",
            )
            examples.append(scene)
    return report.Pictures(film, judge.frames, tuple(examples[:_EXAMPLES]))


def _plane(values: Any, plan: Plan) -> NDArray[np.uint8]:
    """Return the first plane of masks or labels, the background as 1, 0 unlabelled."""
    array = np.asarray(values)
    plane: NDArray[np.uint8] = array.reshape(-1, *array.shape[-2:])[0].astype(np.uint8)
    return plane if plan.unlabelled == 0 else plane + np.uint8(1)


def _seen(image: Any, plan: Plan) -> NDArray[np.uint8]:
    """Return the first plane of an image as RGB."""
    array = np.asarray(image)
    if plan.channel_axis is not None:
        array = np.moveaxis(array, plan.channel_axis, -1)
        array = array.reshape(-1, *array.shape[-3:])[0]
    else:
        array = array.reshape(-1, *array.shape[-2:])[0]
    return report.visible(array)


def _fingerprints(parts: Mapping[str, Part]) -> dict[str, dict[str, str]]:
    """Return of each image its fingerprint; none may lie in two parts."""
    found = {
        kind: {
            name: fingerprint(np.asarray(image))
            for name, image in zip(part.names, part.images, strict=True)
        }
        for kind, part in parts.items()
    }
    seen: dict[str, tuple[str, str]] = {}
    for kind, prints in found.items():
        for name, value in prints.items():
            other = seen.setdefault(value, (kind, name))
            if other[0] != kind:
                raise ValueError(
                    f"No image may lie in two parts, but `{io.shown(name)}` "
                    f"({kind}) is the same as `{io.shown(other[1])}` ({other[0]}). "
                    "Delete one, or give both the same group."
                )
    return found


def _facts(
    plan: Plan,
    config: TrainConfig,
    parts: Mapping[str, Part],
    prints: Mapping[str, Any],
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Return what is decided before the first step: config and environment."""
    around = {
        "python": platform.python_version(),
        **environment(device),
        "seed": plan.seed,
        "tile": plan.tile,
        "deterministic": config.deterministic,
        "data": prints,
    }
    chosen = {
        "title": plan.title,
        "network": plan.network.to_dict(),
        "training": config.to_dict(),
        "classes": list(plan.classes),
        "unlabelled": plan.unlabelled,
        "channel_axis": plan.channel_axis,
        "max_steps": plan.max_steps,
        "max_seconds": plan.max_seconds,
        "parts": {kind: list(part.names) for kind, part in parts.items()},
    }
    return {"config": chosen, "environment": around}
