"""The command that labels images; one bad file does not stop the others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from napari_unetpp import batch, io
from napari_unetpp.cli.console import (
    REPLACE,
    Console,
    count,
    exit_code,
    message_of,
    plain,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterator

    from napari_unetpp.batch import BatchStep, Target


@dataclass
class _Tally:
    """What became of the images."""

    skipped: list[Target] = field(default_factory=list)
    done: list[Target] = field(default_factory=list)
    failed: list[tuple[Target, Exception]] = field(default_factory=list)


def predict(options: Namespace, console: Console) -> int:
    """Label every image and tell at the end which ones failed."""
    if options.out.suffix.lower() == ".zarr":
        return _one_large(options, console)
    for path in options.images:
        if path.is_dir() and path.suffix.lower() == ".zarr":
            raise ValueError(
                f"`{io.shown(path)}` is a Zarr image. Its labels are one, too: pass "
                "--out NAME.zarr, and one image at a time."
            )
    targets = batch.plan_files(
        options.images, options.out, probabilities=options.probabilities
    )
    replace = options.overwrite or options.skip_existing
    keep = [options.model]
    batch.check_targets(targets, keep=keep, overwrite=replace, remedy=REPLACE)
    from napari_unetpp import api

    steps = api.predict_files(
        api.load_model(options.model),
        targets,
        depth=options.depth,
        heads=options.heads,
        tile=options.tile,
        device=options.device,
        channel_axis=options.channel_axis,
        overwrite=options.overwrite,
        skip_existing=options.skip_existing,
        keep=keep,
        workers=options.workers,
        scheduler=options.scheduler,
    )
    tally = _Tally()
    stopped = False
    try:
        _follow(console, steps, tally)
    except KeyboardInterrupt:
        stopped = True
    todo = len(targets) - len(tally.skipped)
    if stopped:
        console.tell(f"stopped by Ctrl-C after {len(tally.done)} of {todo} images.")
    elif todo == 1 and tally.failed:
        raise tally.failed[0][1]
    code = _report(console, tally)
    return 130 if stopped else code


def _one_large(options: Namespace, console: Console) -> int:
    """Label one image of any size into a Zarr folder."""
    if len(options.images) != 1 or options.probabilities or options.skip_existing:
        raise ValueError(
            f"`{io.shown(options.out)}` is for the labels of one image, without "
            "--probabilities and --skip-existing. Pass a folder as --out."
        )
    from napari_unetpp import api

    (image,) = options.images
    steps = api.predict_to_zarr_steps(
        api.load_model(options.model),
        image,
        options.out,
        depth=options.depth,
        heads=options.heads,
        channel_axis=options.channel_axis,
        tile=options.tile,
        device=options.device,
        overwrite=options.overwrite,
        workers=options.workers,
        scheduler=options.scheduler,
    )
    bar: Any = None
    try:
        for step in steps:
            if step.state == "started":
                if step.done:
                    share = f"{step.done:,} of {step.total:,} pixels"
                    console.note(f"going on: {share} were labelled before")
                bar = console.bar(step.total, "pixels", io.shown(image))
            if step.state in ("started", "tile"):
                bar.update(step.done - bar.n)
            labels = step.labels
    except KeyboardInterrupt:
        console.tell("stopped by Ctrl-C; the same command goes on with what is done.")
        return 130
    finally:
        steps.close()
        if bar is not None:
            bar.close()
    lines = [f"{io.shown(image)} -> {plain(labels)}"]
    console.result({"written": [str(labels)], "skipped": [], "failed": []}, lines)
    return 0


def _follow(console: Console, steps: Iterator[BatchStep], tally: _Tally) -> None:
    """Show how far the run is, and keep what became of the images."""
    bar: Any = None
    try:
        for step in steps:
            target = step.target
            if step.tile is not None:
                if bar is None:
                    name = f"[{step.number}/{step.count}] " * (step.count > 1)
                    pixels = math.prod(step.shape)
                    bar = console.bar(pixels, "pixels", name + target.title)
                bar.update(step.tile.labels.size)
                continue
            if bar is not None:
                bar.close()
                bar = None
            if step.state == "skipped":
                tally.skipped.append(target)
            elif step.error is not None:
                tally.failed.append((target, step.error))
            elif step.state == "done":
                tally.done.append(target)
                console.say(f"{target.title} -> {plain(target.labels)}")
    finally:
        if bar is not None:
            bar.close()


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
