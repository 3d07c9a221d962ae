"""The long training of a folder: three parts, one report."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp import batch, folders, io
from napari_unetpp.cli import jobs, learning, recipes
from napari_unetpp.cli.console import count, plain, quoted, score
from napari_unetpp.errors import DeviceMemoryError, SaveError, TrainingError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from napari_unetpp.api import Part
    from napari_unetpp.cli.console import Console

STEPS = 100_000  # without --seconds and --steps: patience ends it long before


def run(options: Namespace, console: Console) -> int:
    """Train on one part of a folder, choose by another, test on the third."""
    config = recipes.config_of(options)
    pairs = _files(options)
    pictures = {
        part: [batch.read_picture(image, options.channel_axis) for image, _ in found]
        for part, found in pairs.items()
    }
    every = [picture for found in pictures.values() for picture in found]
    if len({(p.channels, p.channel_axis) for p in every}) > 1:
        raise ValueError(
            "All images must have as many channels on the same axis, got "
            f"{sorted({p.channels for p in every})}. Convert or leave out the odd ones."
        )
    masks = {
        part: jobs.read_annotations(pairs[part], found)
        for part, found in pictures.items()
    }
    coded, instances = _coded(masks, options, console)
    classes = options.classes or _names(coded)
    steps = options.steps
    if steps is None and options.seconds is None:
        steps = STEPS
    limit = {"max_seconds": options.seconds, "max_steps": steps}
    from napari_unetpp import api

    parts = {
        part: api.Part(
            [image.stem for image, _ in found],
            [p.pixels for p in pictures[part]],
            coded.arrays[part],
            instances[part],
        )
        for part, found in pairs.items()
    }
    plan = api.Plan(
        recipes.network_of(options, every[0].channels, len(classes)),
        config,
        classes=tuple(classes),
        unlabelled=coded.unlabelled,
        channel_axis=every[0].channel_axis,
        seed=options.seed,
        tile=options.tile,
        title=options.run.resolve().name,
        **limit,
    )
    console.note(
        f"{count(len(every), 'image')}: "
        + ", ".join(f"{len(p.names)} {kind}" for kind, p in parts.items())
    )
    start = None
    if options.trunk:
        start = api.create_model(
            plan.network, classes=plan.classes, unlabelled=plan.unlabelled,
            seed=options.seed,
        )  # fmt: skip
        start = api.load_trunk(start, options.trunk)
    with learning.stoppable() as stop, _resumable(console, options):
        training = api.run_steps(
            parts,
            options.run,
            plan,
            model=start,
            device=options.device,
            stop=stop,
            resume=options.resume,
            changed_data=options.changed_data,
            checkpoint_seconds=options.checkpoint_seconds,
        )
        model = learning.learn(console, training, stop, **limit)
    if options.out:
        learning.save(model, options.out, overwrite=options.overwrite)
    if stop.is_set():
        _tell_resume(console, options)
    _tell(options, console, parts, stopped=stop.is_set())
    return stop.code


def _files(options: Namespace) -> dict[str, list[folders.Pair]]:
    """Check what can be checked without reading an image."""
    if options.base or options.checkpoint:
        raise ValueError(
            "--run starts a network of its own and keeps its checkpoint in the run's "
            "folder. Leave out --from and --checkpoint."
        )
    pairs = folders.find_parts(
        options.images,
        options.annotations,
        groups=options.groups,
        shares=options.split or folders.SHARES,
        seed=options.seed,
    )
    inputs = [file for found in pairs.values() for pair in found for file in pair]
    if options.out:
        if options.out.suffix != ".safetensors":
            raise ValueError(
                "The model's file must end in .safetensors, got "
                f"`{io.shown(options.out)}`. Add the ending."
            )
        batch.check_output(options.out, inputs, overwrite=options.overwrite)
    return pairs


class _Masks:
    """Masks of each part in one coding."""

    def __init__(
        self, arrays: dict[str, list[NDArray[Any]]], unlabelled: int | None
    ) -> None:
        self.arrays, self.unlabelled = arrays, unlabelled


def _coded(
    masks: Mapping[str, list[NDArray[Any]]], options: Namespace, console: Console
) -> tuple[_Masks, dict[str, list[NDArray[Any]]]]:
    """Return class masks, and the instances where the masks are such."""
    if options.instances:
        objects = {part: list(found) for part, found in masks.items()}
        arrays = {
            part: [(m > 0).astype(np.uint8) for m in found]
            for part, found in masks.items()
        }
        console.note("the masks number objects: 0 = background, others = object")
        return _Masks(arrays, None), objects
    flat = [mask for found in masks.values() for mask in found]
    asked = options.unlabelled
    if asked is None and 0 in jobs.values_of(flat):
        asked = None if jobs.values_of(flat) == {0, 255} else "none"
    coded = jobs.code(flat, asked)
    if coded.note:
        console.note(coded.note)
    elif asked == "none" and options.unlabelled is None:
        console.note("every pixel of the masks counts: 0 is the first class")
    left = iter(coded.arrays)
    arrays = {part: [next(left) for _ in found] for part, found in masks.items()}
    return _Masks(arrays, coded.unlabelled), {part: [] for part in masks}


def _names(coded: _Masks) -> tuple[str, ...]:
    top = max(jobs.values_of(a for found in coded.arrays.values() for a in found))
    n = max(2, top + (coded.unlabelled is None))
    return ("background", "object") if n == 2 else (
        "background", *(f"class {i}" for i in range(2, n + 1))
    )  # fmt: skip


@contextmanager
def _resumable(console: Console, options: Namespace) -> Iterator[None]:
    """Tell how to go on with a run that something has ended too early."""
    try:
        yield
    except (KeyboardInterrupt, DeviceMemoryError, TrainingError, SaveError):
        if any(options.run.glob("*.checkpoint*.safetensors")):
            _tell_resume(console, options)
        raise


def _tell_resume(console: Console, options: Namespace) -> None:
    console.tell(
        f"the run is kept in {quoted(options.run)}; to go on, give the same command "
        "with --resume."
    )


def _tell(
    options: Namespace, console: Console, parts: Mapping[str, Part], *, stopped: bool
) -> None:
    facts = json.loads((options.run / "scores.json").read_text(encoding="utf-8"))
    report = options.run / "report.html"
    lines = [
        f"{facts['steps']:,} steps in {facts['seconds']:.0f} s; best validation "
        f"{_score(facts['validation'])} at step {facts['best_step']}",
    ]
    if "test" in facts:
        lines.append(
            f"test, scored once on {count(len(parts['test'].names), 'image')}: "
            f"{_score(facts['test']['score'])} ({facts['measure']})"
        )
    lines += [f"model: {plain(options.run / 'model.safetensors')}"]
    lines += [f"report: {plain(report)}"]
    values = {**facts, "run": str(options.run), "report": str(report)}
    console.result({**values, "stopped": stopped}, lines)


def _score(value: float | None) -> str:
    return score(float("nan") if value is None else value)
