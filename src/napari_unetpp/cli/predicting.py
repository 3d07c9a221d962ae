"""The command that labels images; one bad file does not stop the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from napari_unetpp import io
from napari_unetpp.cli import jobs
from napari_unetpp.cli.console import Console, count, exit_code, message_of, plain
from napari_unetpp.errors import DeviceMemoryError, ImageFileError, SaveError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from napari_unetpp.api import Model

# What spoils one image and leaves the others be; torch raises RuntimeError.
_BAD_IMAGE = (ImageFileError, DeviceMemoryError, ValueError, MemoryError, RuntimeError)


@dataclass
class _Tally:
    """What became of the images."""

    skipped: list[jobs.Target] = field(default_factory=list)
    done: list[jobs.Target] = field(default_factory=list)
    failed: list[tuple[jobs.Target, Exception]] = field(default_factory=list)


def predict(options: Namespace, console: Console) -> int:
    """Label every image and tell at the end which ones failed."""
    targets = jobs.plan_outputs(
        options.images, options.out, probabilities=options.probabilities
    )
    inputs = [options.model, *(t.image for t in targets)]
    in_folder = targets[0].labels != options.out
    replace = options.overwrite or options.skip_existing
    if not in_folder or options.out.exists():
        for file in (f for t in targets for f in t.files):
            jobs.check_output(file, inputs, overwrite=replace)
    tally = _Tally()
    if options.skip_existing:
        tally.skipped = [t for t in targets if all(f.exists() for f in t.files)]
    todo = [t for t in targets if t not in tally.skipped]
    model = _ready_model(options)
    if in_folder:
        jobs.make_folder(options.out)
    stopped = False
    try:
        _label_all(options, console, model, todo, tally)
    except KeyboardInterrupt:
        stopped = True
        console.tell(
            f"stopped by Ctrl-C after {len(tally.done)} of {len(todo)} images."
        )
    code = _report(console, tally)
    return 130 if stopped else code


def _label_all(
    options: Namespace,
    console: Console,
    model: Model,
    todo: Sequence[jobs.Target],
    tally: _Tally,
) -> None:
    for i, target in enumerate(todo, start=1):
        name = f"[{i}/{len(todo)}] " * (len(todo) > 1) + io.shown(target.image)
        try:
            _label(options, console, model, target, name)
        except (*_BAD_IMAGE, SaveError) as error:
            if len(todo) == 1:
                raise
            tally.failed.append((target, error))
            if isinstance(error, SaveError):  # the next one would fail as well
                return
        else:
            tally.done.append(target)
            console.say(f"{io.shown(target.image)} -> {plain(target.labels)}")


def _ready_model(options: Namespace) -> Model:
    """Load the model and try the options on nothing, so that no image fails by them."""
    from napari_unetpp import api

    model = api.load_model(options.model)
    api.predict_tiles(
        model,
        np.zeros((model.config.in_channels, 1, 1), np.uint8),
        channel_axis=0,
        depth=options.depth,
        heads=options.heads,
        tile=options.tile,
        device=options.device,
    )
    return model


def _label(
    options: Namespace, console: Console, model: Model, target: jobs.Target, name: str
) -> None:
    from napari_unetpp import api

    wanted = model.config.in_channels
    picture = jobs.read_picture(target.image, options.channel_axis, channels=wanted)
    if picture.channels != wanted:
        raise ValueError(
            f"`{io.shown(target.image)}` has {count(picture.channels, 'channel')} "
            f"(shape {picture.pixels.shape}), the model takes {wanted}. "
            "Is another axis the one of the channels? Name it with --channel-axis."
        )
    labels = np.zeros(picture.shape, np.uint8)
    maps = None
    if target.probabilities is not None:
        maps = np.zeros((len(model.classes), *picture.shape), np.float32)
    with console.bar(labels.size, "pixels", name) as bar:
        for tile in api.predict_tiles(
            model,
            picture.pixels,
            probabilities=maps is not None,
            channel_axis=picture.channel_axis,
            depth=options.depth,
            heads=options.heads,
            tile=options.tile,
            device=options.device,
        ):
            labels[tile.slices] = tile.labels
            if maps is not None:
                maps[(slice(None), *tile.slices)] = tile.probabilities
            bar.update(tile.labels.size)
    replace = options.overwrite or options.skip_existing
    io.write_labels(target.labels, labels, overwrite=replace)
    if maps is not None and target.probabilities is not None:
        jobs.write_probabilities(target.probabilities, maps, overwrite=replace)


def _report(console: Console, tally: _Tally) -> int:
    """Tell what became of the images and return the exit code."""
    done, skipped, failed = tally.done, tally.skipped, tally.failed
    counts = f"{count(len(done), 'image')} labelled"
    counts += f", {len(skipped)} skipped" * bool(skipped)
    counts += f", {len(failed)} failed" * bool(failed)
    console.result(
        {
            "written": [str(f) for t in done for f in t.files],
            "skipped": [str(t.image) for t in skipped],
            "failed": [
                {"image": str(t.image), "error": message_of(e)} for t, e in failed
            ],
        },
        [counts],
    )
    if not failed:
        return 0
    lines = [f"error: {count(len(failed), 'image')} could not be labelled:"]
    lines += [f"  {plain(t.image)}: {_one_line(e)}" for t, e in failed]
    console.tell("\n".join(lines))
    return max(3, *(exit_code(error) for _, error in failed))


def _one_line(error: Exception) -> str:
    return " ".join(message_of(error).splitlines())
