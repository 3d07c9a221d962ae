"""The held-out score against the truth that it estimates, over simulated sessions.

    python benchmarks/heldout.py --data ../shared/data --out benchmarks/heldout.jsonl
    python benchmarks/heldout.py --print benchmarks/heldout.jsonl

A session takes some of a task's images and some of their strokes, trains a UNet++ for a
fixed number of steps, and notes the score beside the mean IoU (of pooled pixels, all
classes) on the whole annotated images, which is what it estimates, and on images that
were never seen. "Raw" is the IoU on the held-out painted pixels alone. The constants of
the estimate were chosen on the first four tasks; the last two only report.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
import torch
from skimage.measure import label
from strokes import NUCLEI, Task, load_task

from napari_unetpp import api
from napari_unetpp.config import TrainConfig, working_config
from napari_unetpp.evaluate import confusion_matrix, from_confusion
from napari_unetpp.examples import read_examples
from napari_unetpp.model import create_model
from napari_unetpp.trainer import Trainer

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHOSEN_ON = ("isbi2012_em", "dsb2018", "glas", "wbc")
TASKS = (*CHOSEN_ON, "monuseg", "sandstone")
TESTS = 4
CROP = 512  # px


def session(task: Task, seed: int) -> tuple[list[int], list[NDArray[np.uint8]]]:
    """Return which images are annotated and with what; seed 0 takes everything."""
    rng = np.random.default_rng(seed + 1000)
    n = len(task.images)
    used = sorted(rng.permutation(n)[: 2 if n > 1 and seed % 2 else n].tolist())
    strokes = []
    for i in used:
        kept = np.zeros_like(task.strokes[i])
        for value in range(1, task.n_classes + 1):
            parts = label(task.strokes[i] == value)
            chosen = np.flatnonzero((rng.random(parts.max()) < 0.75) | (seed == 0))
            if parts.max() and not len(chosen):
                chosen = rng.integers(parts.max(), size=1)
            kept[np.isin(parts, chosen + 1)] = value
        strokes.append(kept)
    return used, strokes


def mean_iou(
    model: Any, images: list[Any], truths: list[NDArray[np.uint8]], task: Task
) -> float:
    """Return the mean IoU of the pooled pixels over the classes that are present."""
    total = 0
    for image, truth in zip(images, truths, strict=True):
        labels = api.predict(model, image, channel_axis=task.channel_axis)
        total = total + confusion_matrix(labels, truth, task.n_classes)
    return float(from_confusion(total).mean_iou)


def run(
    task: Task, own: list[NDArray[np.uint8]], seed: int, steps: int
) -> dict[str, Any]:
    """Train one session and return its score and both truths."""
    used, strokes = session(task, seed)
    images = [task.images[i] for i in used]
    examples = read_examples(images, strokes, channel_axis=task.channel_axis)
    start = create_model(
        working_config("unet++", len(examples.images[0]), task.n_classes),
        classes=[str(i + 1) for i in range(task.n_classes)],
        seed=seed,
    )
    device = torch.device("cpu")
    trainer = Trainer(start, examples, TrainConfig(), seed=seed, device=device)
    for _ in range(steps):
        trainer.step()
    model = trainer.model()
    order = np.random.default_rng(7).permutation(len(task.tests))[:TESTS]
    tests = [task.tests[i][:CROP, :CROP] for i in order]
    truths = [task.truths[i][:CROP, :CROP] for i in order]
    row: dict[str, Any] = {"task": task.name, "seed": seed}
    _, scoring = trainer.held_out.split(examples.targets, examples.numbers)
    row["raw"] = mean_iou(model, images, scoring, task)
    row["images"] = mean_iou(model, images, [own[i] for i in used], task)
    row["unseen"] = mean_iou(model, tests, truths, task)
    found = list(trainer.estimates.values())[-1:]
    if found:
        row |= {"mean": found[0].mean, "low": found[0].low, "high": found[0].high}
        row["pixels"] = found[0].pixels
    return row


def own_truths(data: Path, task: Task) -> list[NDArray[np.uint8]]:
    """Return the truth of the images that are annotated."""
    folder = data / task.name
    names = sorted(p.stem for p in (folder / "scribbles").glob("*.tif"))
    names = list(NUCLEI) if task.name == "dsb2018" else names[: len(task.images)]
    return [tifffile.imread(folder / "semantic" / f"{n}.tif") for n in names]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print error, bias and coverage, on the annotated and on unseen images."""
    for truth, title in (
        ("images", "the annotated images, whole"),
        ("unseen", "unseen images"),
    ):
        print(f"\nagainst {title}")
        print(
            f"{'task':14s} {'sessions':>8s} {'scored':>6s} {'truth':>6s} {'error':>6s} "
            f"{'bias':>6s} {'inside':>6s} {'raw error':>9s} {'raw bias':>8s}"
        )
        groups = [(t, [t]) for t in TASKS]
        groups += [
            ("chosen on", [*CHOSEN_ON]),
            ("others", [*TASKS[4:]]),
            ("all", [*TASKS]),
        ]
        for name, tasks in groups:
            of = [r for r in rows if r["task"] in tasks]
            scored = [r for r in of if "mean" in r]
            line = f"{name:14s} {len(of):8d} {len(scored):6d} "
            if scored:
                error = np.array([r["mean"] - r[truth] for r in scored])
                plain = np.array([r["raw"] - r[truth] for r in scored])
                inside = np.mean([r["low"] <= r[truth] <= r["high"] for r in scored])
                line += (
                    f"{np.mean([r[truth] for r in scored]):6.3f} "
                    f"{np.abs(error).mean():6.3f} {error.mean():+6.3f} {inside:6.0%} "
                    f"{np.abs(plain).mean():9.3f} {plain.mean():+8.3f}"
                )
            print(line)


def main() -> None:
    """Run what is missing in the output file, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/heldout.jsonl"))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--print", dest="only_print", type=Path)
    args = parser.parse_args()
    out = args.only_print or args.out
    lines = out.read_text().splitlines() if out.exists() else []
    rows = [json.loads(line) for line in lines]
    if args.only_print is None:
        torch.set_num_threads(1)
        done = {(r["task"], r["seed"]) for r in rows}
        for name in args.tasks.split(","):
            task = load_task(args.data, name)
            own = own_truths(args.data, task)
            for seed in range(args.seeds):
                if (name, seed) in done:
                    continue
                rows.append(run(task, own, seed, args.steps))
                with out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(rows[-1], flush=True)
    print_table(rows)


if __name__ == "__main__":
    main()
