"""The commands that only tell: scores of labels, and what a model file holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp import io
from napari_unetpp.cli import jobs, learning, projects
from napari_unetpp.cli.console import Console, count, plain, score, table
from napari_unetpp.project import FILE

if TYPE_CHECKING:
    from argparse import Namespace


def evaluate(options: Namespace, console: Console) -> int:
    """Score labels, all files together."""
    from napari_unetpp.evaluate import confusion_matrix, from_confusion

    pairs = jobs.find_pairs(options.labels, options.truth, "LABELS and TRUTH")
    labels, truths = ([io.read_labels(p[i]) for p in pairs] for i in (0, 1))
    for (left, right), a, b in zip(pairs, labels, truths, strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"`{io.shown(left)}` must have the shape of its truth "
                f"`{io.shown(right)}`, {b.shape}, got {a.shape}."
            )
    labels, truths, unlabelled = _same_coding(labels, truths, options, console)
    classes = options.classes
    n_classes = len(classes) if classes else 0
    if not classes:
        top = max(jobs.values_of([*labels, *truths]))
        n_classes = max(1, top + (unlabelled is None))
    counts = [
        confusion_matrix(a, b, n_classes, unlabelled)
        for a, b in zip(labels, truths, strict=True)
    ]
    total = from_confusion(
        np.sum(counts, axis=0), classes=classes, unlabelled=unlabelled
    )
    each = [from_confusion(c, classes=classes, unlabelled=unlabelled) for c in counts]
    shown = [k for k, v in total.iou.items() if classes or not np.isnan(v)]
    rows = [[plain(k), score(total.iou[k]), score(total.dice[k])] for k in shown]
    rows.append(["mean", score(total.mean_iou), ""])
    console.result(
        {
            "iou": {k: total.iou[k] for k in shown},
            "dice": {k: total.dice[k] for k in shown},
            "mean_iou": total.mean_iou,
            "foreground_iou": total.foreground_iou,
            "accuracy": total.accuracy,
            "pixels": total.n_pixels,
            "files": [
                {"labels": str(p[0]), "mean_iou": e.mean_iou, "accuracy": e.accuracy}
                for p, e in zip(pairs, each, strict=True)
            ],
        },
        [
            *table(["class", "IoU", "Dice"], rows),
            f"pixel accuracy {score(total.accuracy)} on {total.n_pixels:,} annotated "
            f"pixels of {count(len(pairs), 'image')}",
        ],
    )
    return 0


def _same_coding(
    labels: list[Any], truths: list[Any], options: Namespace, console: Console
) -> tuple[list[Any], list[Any], int | None]:
    """Bring masks of 0 and 255 to the coding of what they are compared with."""
    unlabelled = None if options.unlabelled == "none" else 0
    mask, found = {0, 255}, jobs.values_of(labels)
    if options.unlabelled == "0" or jobs.values_of(truths) != mask:
        return labels, truths, unlabelled
    truths = [(t > 0).astype(np.uint8) for t in truths]
    if found <= mask and 255 in found:
        labels = [(a > 0).astype(np.uint8) for a in labels]
    elif 0 not in found:  # labels that a model learned from strokes: 1 is background
        console.note("the truth is a mask of 0 and 255, compared with labels 1 and 2")
        return labels, [t + np.uint8(1) for t in truths], 0
    console.note("the truth is a mask of 0 and 255: 0 = background, 255 = class 1")
    return labels, truths, None


def info(options: Namespace, console: Console) -> int:
    """Tell what a model file or a project holds."""
    if options.model.is_dir() or options.model.name == FILE:
        return projects.info(options, console)
    from napari_unetpp import api

    model = api.load_model(options.model)
    config, depths = model.config, list(model.network.depths)
    provenance = dict(model.provenance)
    digest = provenance.pop("digest", "")
    first = 1 if model.unlabelled == 0 else 0
    facts = {
        "file": str(options.model),
        "network": config.name,
        "levels": config.levels,
        "depths": depths,
        "width": config.width,
        "norm": config.norm,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "channels": config.in_channels,
        "classes": dict(enumerate(model.classes, start=first)),
        "unlabelled": model.unlabelled,
        "preprocessing": model.preprocessing.to_dict(),
        "training": learning.summary(model),
        "provenance": provenance,
        "digest": digest,
    }
    classes = ", ".join(f"{i} {plain(n)}" for i, n in facts["classes"].items())
    coding = "0 is not annotated" if first else "every pixel is annotated"
    rows = [
        ("file", learning.size_of(options.model)),
        ("network", config.name),
        ("depth", f"{config.levels} levels, heads at {', '.join(map(str, depths))}"),
        ("width", f"{config.width} channels at the first level, norm {config.norm}"),
        ("parameters", f"{facts['parameters']:,}"),
        ("channels", str(config.in_channels)),
        ("classes", f"{classes} ({coding})"),
        ("preprocessing", _flat(facts["preprocessing"])),
        ("score", learning.estimated(model)),
        ("training", learning.trained(model)),
        *((f"  {key}", _flat(value)) for key, value in sorted(provenance.items())),
        ("digest", str(digest)),
    ]
    console.result(facts, [f"{plain(k)[:24]:<15} {plain(v)}" for k, v in rows])
    return 0


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        text = ", ".join(f"{k} {v}" for k, v in value.items())
    else:
        text = value if isinstance(value, str) else json.dumps(value)
        text = f"{value:.4g}" if isinstance(value, float) else text
    return text if len(text) <= 160 else f"{text[:157]}..."
