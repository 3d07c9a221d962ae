"""The commands that train: on the user's images, and the demo on a sample."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp import batch, io, parallel
from napari_unetpp.checkpoint import Rolling
from napari_unetpp.cli import jobs, learning, projects, recipes, running
from napari_unetpp.cli.console import REPLACE, count, plain, quoted, score, table
from napari_unetpp.config import TrainConfig

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from napari_unetpp.api import Model
    from napari_unetpp.cli.comparison import Comparison
    from napari_unetpp.cli.console import Console
    from napari_unetpp.config import NetConfig
    from napari_unetpp.samples import Sample

_DEMO_NETWORK = "unet"  # learns most in half a minute


def train(options: Namespace, console: Console) -> int:
    """Learn from annotated images and write the model; torchrun starts several."""
    if options.project:
        return projects.train(options, console)
    if options.images is None or options.annotations is None:
        raise ValueError(
            "train needs IMAGES and ANNOTATIONS, or --project FOLDER. Add them."
        )
    if not parallel.asked():
        return (
            running.run(options, console) if options.run else _train(options, console)
        )
    if options.run:
        raise ValueError("--run trains in one process. Leave out torchrun, or --run.")
    with parallel.together(options.device) as options.device:
        console.quiet = console.quiet or parallel.team().rank > 0
        return _train(options, console)


def _train(options: Namespace, console: Console) -> int:
    config = recipes.config_of(options)
    files = _training_files(options, console)
    path = options.checkpoint or options.out.with_suffix(".checkpoint.safetensors")
    batch.check_output(path, _inputs(options, files[0]), overwrite=True)
    with ExitStack() as locks:
        if not parallel.team().rank:  # the one that writes
            locks.enter_context(io.lock(options.out))
            io.sweep(options.out)
        return _learn(options, console, config, files, _checkpoint(options, path))


def _inputs(options: Namespace, pairs: Sequence[tuple[Path, Path]]) -> list[Path]:
    """Return the files that no checkpoint may replace."""
    return [options.out, options.base or pairs[0][0], *(f for p in pairs for f in p)]


def _learn(
    options: Namespace,
    console: Console,
    config: TrainConfig,
    files: tuple[list[tuple[Path, Path]], list[batch.Picture], list[Any]],
    rolling: Rolling,
) -> int:
    pairs, pictures, coded = files
    from napari_unetpp import api

    base = api.load_model(options.base) if options.base else None
    annotations = jobs.code(coded, options.unlabelled, base)
    classes = options.classes
    if annotations.note:
        console.note(annotations.note)
        if classes is None and base is None:
            classes = ("background", "foreground")
    _tell_channels(pictures, console)
    limit = learning.limits(options.seconds, options.steps)
    with learning.stoppable() as stop, learning.resumable(console, options, rolling):
        training = api.train_steps(
            [p.pixels for p in pictures],
            annotations.arrays,
            model=base,
            network=_network(options, pictures, annotations, classes),
            classes=classes,
            unlabelled=annotations.unlabelled,
            channel_axis=pictures[0].channel_axis,
            config=config,
            seed=options.seed,
            device=options.device,
            stop=stop,
            checkpoint=rolling.path,
            checkpoint_seconds=options.checkpoint_seconds,
            resume=options.resume,
            changed_data=options.changed_data,
            **limit,
        )
        console.note(
            f"training on {count(len(pairs), 'image')}; Ctrl-C stops and saves"
        )
        model = learning.learn(console, training, stop, **limit)
        if parallel.team().rank:
            return stop.code  # the first process writes and prints
        learning.save(model, options.out, overwrite=options.overwrite)
        if stop.is_set():
            learning.tell_resume(console, options, rolling)
        else:
            rolling.remove()
    facts = {"model": str(options.out), **learning.summary(model)}
    console.result(
        {**facts, "images": len(pairs), "stopped": stop.is_set()},
        [
            learning.trained(model),
            learning.estimated(model),
            f"classes: {learning.class_list(model)}",
            f"model: {learning.size_of(options.out)}",
            f"next: napari-unetpp predict {quoted(options.out)} IMAGES -o LABELS",
        ],
    )
    return stop.code


def _training_files(
    options: Namespace, console: Console
) -> tuple[list[tuple[Path, Path]], list[batch.Picture], list[Any]]:
    """Check everything that can be checked without torch, cheapest first."""
    if options.out is None:
        raise ValueError(
            "-o MODEL.safetensors says where the model goes; a long training with a "
            "report takes --run FOLDER instead. Add one of them."
        )
    if any((options.groups, options.instances, options.trunk, options.tile)):
        raise ValueError(
            "--groups, --instances, --trunk and --tile belong to a long training. Add "
            "--run FOLDER, or leave them out."
        )
    if options.out.suffix != ".safetensors":
        raise ValueError(
            "The model's file must end in .safetensors, got "
            f"`{io.shown(options.out)}`. Add the ending."
        )
    given = [options.width, options.levels, options.network, options.preset]
    if options.base and (options.from_scratch or any(v is not None for v in given)):
        raise ValueError(
            "--from goes on with a model and its network. Leave out --network, "
            "--preset, --width, --levels and --from-scratch."
        )
    pairs = jobs.find_pairs(
        options.images, options.annotations, "IMAGES and ANNOTATIONS"
    )
    inputs = [file for pair in pairs for file in pair]
    batch.check_output(
        options.out,
        [*inputs, options.base or inputs[0]],
        overwrite=options.overwrite,
        remedy=REPLACE,
    )
    console.note(f"reading {count(len(pairs), 'image')}")
    pictures = [batch.read_picture(image, options.channel_axis) for image, _ in pairs]
    if len({p.channels for p in pictures}) > 1:
        odd = next(p for p in pictures if p.channels != pictures[0].channels)
        raise ValueError(
            "All images must have as many channels: "
            f"`{io.shown(pictures[0].path)}` has {pictures[0].channels}, "
            f"`{io.shown(odd.path)}` {odd.channels}."
        )
    return pairs, pictures, jobs.read_annotations(pairs, pictures)


def _checkpoint(options: Namespace, path: Path) -> Rolling:
    """Return where checkpoints go; a training that did not end is never lost."""
    if options.changed_data and not options.resume:
        raise ValueError("--changed-data says how to go on: add --resume.")
    rolling = Rolling(path)
    if rolling.exists() and not options.resume:
        if not options.overwrite:
            raise ValueError(
                f"`{io.shown(path)}` is the checkpoint of a training that did not end. "
                "Pass --resume to go on with it, or --overwrite to begin anew."
            )
        rolling.remove()
    return rolling


def _network(
    options: Namespace,
    pictures: Sequence[batch.Picture],
    annotations: jobs.Coded,
    classes: Sequence[str] | None,
) -> str | NetConfig:
    """Return the network's name, or all its settings if some are given."""
    name: str = options.network or recipes.DEFAULT
    sizes = options.width is not None or options.levels is not None
    if not (sizes or options.preset or recipes.network_changes(options)):
        return name
    if classes is None:
        top = max(jobs.values_of(annotations.arrays))
        n_classes = max(2, top + (annotations.unlabelled is None))
    else:
        n_classes = len(classes)
    return recipes.network_of(options, pictures[0].channels, n_classes)


def _tell_channels(pictures: Sequence[batch.Picture], console: Console) -> None:
    for note in sorted({p.note for p in pictures} - {""}):
        which = [p for p in pictures if p.note == note]
        name = f"`{io.shown(which[0].path)}`"
        more = f" and {len(which) - 1} more" if len(which) > 1 else ""
        console.note(f"{name}{more} read as {note}")


def demo(options: Namespace, console: Console) -> int:
    """Train on a sample's strokes and compare; write model, labels and pictures."""
    from napari_unetpp import api, samples
    from napari_unetpp.cli import comparison

    if options.sample not in samples.SAMPLES:
        raise ValueError(
            f"--sample must be one of {', '.join(samples.SAMPLES)}, got "
            f"{options.sample!r}."
        )
    sample = samples.load(options.sample)
    comparison.unseen_truth(sample)
    folder = options.out or Path("napari-unetpp-demo")
    files = {
        kind: folder / f"{sample.name}{ending}"
        for kind, ending in {
            "picture": "-comparison.png",
            "model": ".safetensors",
            "labels": "-labels.tif",
            "image": "-image.png",
        }.items()
    }
    replace = options.overwrite or options.out is None
    batch.make_folder(folder)
    for file in files.values():
        batch.check_output(file, [], overwrite=replace, remedy=REPLACE)
    console.say(f"{sample.title}", "")
    limit = learning.limits(options.seconds, options.steps)
    with learning.stoppable() as stop:
        training = api.train_steps(
            sample.image,
            sample.strokes,
            network=options.network or _DEMO_NETWORK,
            classes=sample.classes,
            channel_axis=sample.channel_axis,
            config=TrainConfig(pretrained=not options.from_scratch),
            seed=options.seed,
            device=options.device,
            stop=stop,
            **limit,
        )
        share = np.count_nonzero(sample.strokes) / sample.strokes.size
        console.note(f"training on the strokes, {share:.1%} of the pixels")
        model = learning.learn(console, training, stop, **limit)
        learning.save(model, files["model"], overwrite=replace)
    console.note("comparing with a random forest and a threshold")
    result = comparison.compare(sample, model, device=options.device, seed=options.seed)
    ours = result.rows[len(model.network.depths) - 1]
    if ours.labels is not None:
        io.write_labels(files["labels"], ours.labels, overwrite=replace)
    io.write_png(files["image"], comparison.visible(sample), overwrite=replace)
    io.write_png(
        files["picture"], comparison.picture(sample, result), overwrite=replace
    )
    _report_demo(console, sample, model, result, files)
    return stop.code


def _report_demo(
    console: Console,
    sample: Sample,
    model: Model,
    result: Comparison,
    files: dict[str, Path],
) -> None:
    rows = [
        [row.name, *(score(row.iou[c]) for c in sample.classes[1:]), score(row.mean)]
        for row in result.rows
    ]
    command = f"predict {quoted(files['model'])} {quoted(files['image'])}"
    console.result(
        {
            "sample": sample.name,
            **learning.summary(model),
            "pixels": result.n_pixels,
            "iou": {row.name: {**row.iou, "mean": row.mean} for row in result.rows},
            "files": {kind: str(path) for kind, path in files.items()},
        },
        [
            learning.trained(model),
            learning.estimated(model),
            "",
            f"IoU on the {result.n_pixels:,} pixels that training did not see:",
            *table(["", *sample.classes[1:], "mean"], rows),
            "The threshold may choose for each class the side and the grey value or",
            "channel that agree best with the truth; the others know only the strokes.",
            "",
            f"written to {plain(files['model'].parent)}:",
            *(f"  {io.shown(path)}" for path in files.values()),
            "",
            "next, this model on an image, and a model of your own:",
            f"  napari-unetpp {command} -o labels",
            "  napari-unetpp train IMAGES ANNOTATIONS -o MODEL.safetensors",
        ],
    )
