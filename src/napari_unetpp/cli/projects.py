"""Projects on the command line: one more round, and what there is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from napari_unetpp import project
from napari_unetpp.cli import learning, recipes
from napari_unetpp.cli.console import count, plain, quoted, score, table
from napari_unetpp.errors import SaveError

if TYPE_CHECKING:
    from argparse import Namespace

    from napari_unetpp.cli.console import Console
    from napari_unetpp.project import Project, Round

_NOT = (
    "images", "annotations", "out", "run", "base", "resume", "checkpoint", "classes",
    "unlabelled", "channel_axis", "changed_data",
)  # fmt: skip


def train(options: Namespace, console: Console) -> int:
    """Train from a project's current model, and add what was learned as a round."""
    if any(getattr(options, name) not in (None, False) for name in _NOT):
        raise ValueError(
            "--project brings images, annotations and model, and keeps what is "
            "learned. Leave out IMAGES, ANNOTATIONS, -o, --run, --from, --resume and "
            "what describes the data."
        )
    found = project.load_project(options.project)
    given = [options.network, options.width, options.levels, options.preset]
    if found.current is not None and any(v is not None for v in given):
        raise ValueError(
            "The project has a network already. Leave out --network, --preset, "
            "--width and --levels, or begin another project."
        )
    config = found.config
    if options.set or options.deterministic or options.preset or options.from_scratch:
        config = recipes.config_of(options)
    console.note(f"reading {count(len(found.images), 'image')}")
    images, annotations = [i.read() for i in found.images], found.read_annotations()
    axes = {
        image.channel_axis if len(image.files) == 1 else -1 for image in found.images
    }
    if len(axes) != 1:
        raise ValueError(
            "All images of a project must have as many channels, or none, to be "
            "trained together. Take the odd ones out in napari."
        )
    axis = axes.pop()
    from napari_unetpp import api

    base = found.load_model()
    network: Any = found.network or recipes.DEFAULT
    if base is None and any(v is not None for v in given):
        channels = 1 if axis is None else images[0].shape[-1]
        network = recipes.network_of(options, channels, max(2, len(found.classes)))
    limit = learning.limits(options.seconds, options.steps)
    with learning.stoppable() as stop:
        training = api.train_steps(
            images,
            annotations,
            model=base,
            network=network,
            classes=found.classes or None,
            unlabelled=found.unlabelled,
            channel_axis=axis,
            config=config,
            seed=options.seed,
            device=options.device,
            stop=stop,
            **limit,
        )
        console.note(
            f"training on {count(len(images), 'image')}; Ctrl-C stops and keeps it"
        )
        model = learning.learn(console, training, stop, **limit)
        try:
            found = api.add_round(options.project, model)
        except SaveError as error:
            raise learning.rescued(model, "model.safetensors", error) from None
    console.result(
        {**_facts(found), **learning.summary(model), "stopped": stop.is_set()},
        [
            learning.trained(model),
            learning.estimated(model),
            f"round {found.current} of the project {quoted(options.project)}",
            *_rows(found),
        ],
    )
    return stop.code


def info(options: Namespace, console: Console) -> int:
    """Tell what a project holds, and its rounds."""
    found = project.load_project(options.model)
    network = found.network.name if found.network else "none yet"
    lines = [
        f"project    {plain(found.folder)}",
        f"network    {network}",
        f"classes    {plain(', '.join(found.classes))}",
        f"images     {len(found.images)}",
    ]
    for image in found.images:
        shape = " x ".join(map(str, image.shape))
        places = [
            str(f) if f and os.path.exists(f) else f"{f} (missing)" for f in image.files
        ]
        lines.append(plain(f"  {image.name}: {shape}, {', '.join(places)}"))
    console.result(_facts(found), [*lines, *_rows(found)])
    return 0


def _facts(found: Project) -> dict[str, Any]:
    return {
        "project": str(found.folder),
        "network": found.network.name if found.network else None,
        "classes": list(found.classes),
        "images": [[str(f) for f in image.files] for image in found.images],
        "current": found.current,
        "rounds": [
            {
                "round": r.number, "score": r.score, "interval": list(r.interval),
                "steps": r.steps, "painted": r.painted, "date": r.date,
            }
            for r in found.rounds
        ],
    }  # fmt: skip


def _rows(found: Project) -> list[str]:
    """Return the rounds as a table; a star marks the current one."""
    if not found.rounds:
        return ["no round yet"]
    head = ["round", "IoU", "90 % interval", "steps", "painted", "date"]
    return table(
        head, [_row(r, current=r.number == found.current) for r in found.rounds]
    )


def _row(r: Round, *, current: bool) -> list[str]:
    interval = "-"
    if len(r.interval) == 2:
        interval = f"{r.interval[0]:.2f} to {r.interval[1]:.2f}"
    return [
        f"{r.number}{' *' if current else ''}",
        "-" if r.score is None else score(r.score),
        interval,
        f"{r.steps:,}",
        f"{r.painted:,}",
        plain(r.date[:16].replace("T", " ")),
    ]
