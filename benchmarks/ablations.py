"""What each default is worth: every one changed alone, learning from strokes.

    python benchmarks/ablations.py --data ../shared/data --out ablations.jsonl
    python benchmarks/ablations.py --print ablations.jsonl
    python benchmarks/ablations.py --time

Tasks, strokes and scores are those of strokes.py, on at most six unseen images of at
most 512 px. Everything starts from random weights but what says otherwise, so that
networks for which no weights ship can be compared. Time is counted in steps: `--time`
measures what a step of each network costs beside the default's, which counts `--ms`.
Only the first four tasks may choose a default. Every run appends one line of JSON, so
that a broken off benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from strokes import Task, load_task, run_network

from napari_unetpp import losses
from napari_unetpp.config import TrainConfig, working_config
from napari_unetpp.trainer import Trainer

if TYPE_CHECKING:
    from torch import Tensor

TASKS = ("isbi2012_em", "dsb2018", "glas", "wbc", "ctc_dic_hela")
CHOOSING = TASKS[:4]
TIMES = (5.0, 10.0)
TESTS = 6
SIDE = 512  # px


class WithDice(Trainer):
    """Dice loss beside the cross-entropy."""

    def _loss(self, heads: list[Tensor], target: Tensor) -> Tensor:
        overlap = losses.deep_supervision(heads, target, losses.dice)
        return super()._loss(heads, target) + overlap


@dataclass(frozen=True)
class Variant:
    """One change of the default, and what its step costs beside the default's."""

    group: str
    train: dict[str, Any] = field(default_factory=dict)
    net: dict[str, Any] = field(default_factory=dict)
    network: str = "unet++"
    pretrained: bool = False
    images: int = 3
    trainer: type[Trainer] = Trainer
    beside: str = "default"
    cost: float = 1.0  # from `--time`


VARIANTS = {
    "default": Variant("from scratch"),
    "no elastic": Variant("deformation", {"elastic_sigma": 0.0}),
    "no deformation": Variant(
        "deformation", {"elastic_sigma": 0.0, "rotation": 0.0, "scale": 0.0}
    ),
    "from step 0": Variant("deformation", {"warp_after": 0}),
    "batch norm": Variant("norm", net={"norm": "batch"}),
    "no norm": Variant("norm", net={"norm": "none"}),
    "1 image": Variant("norm", images=1),
    "1 image not pooled": Variant(
        "norm", {"pooled_norms": False}, images=1, beside="1 image"
    ),
    "no forest": Variant("loss", {"forest": 0.0}),
    "no edge term": Variant("loss", {"edges": 0.0}),
    "plain cross-entropy": Variant("loss", {"edges": 0.0, "balance": 0.0}),
    "plus Dice": Variant("loss", trainer=WithDice),
    "one head": Variant(
        "supervision",
        net={"deep_supervision": False},
        cost=2.19,  # the whole network at every step, not depth by depth
    ),
    "U-Net": Variant("supervision", network="unet", cost=0.87),
    "starting weights": Variant("start", pretrained=True),
    "no averaging": Variant("averaging", {"averaging": 0.0}),
}


def few_tests(task: Task, most: int = TESTS, side: int = SIDE) -> Task:
    """Return the task with a few of its tests, spread over all, and their middles."""
    n = len(task.tests)
    chosen = np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int))

    def middle(image: Any) -> Any:
        y, x = (max(0, (size - side) // 2) for size in image.shape[:2])
        return image[y : y + side, x : x + side]

    return replace(
        task,
        tests=[middle(task.tests[i]) for i in chosen],
        truths=[middle(task.truths[i]) for i in chosen],
    )


def run(
    task: Task, name: str, seed: int, ms: float, times: tuple[float, ...] = TIMES
) -> dict[str, Any]:
    """Train one variant and score it."""
    variant = VARIANTS[name]
    channels = 1 if task.channel_axis is None else task.images[0].shape[-1]
    found = run_network(
        replace(
            task,
            images=task.images[: variant.images],
            strokes=task.strokes[: variant.images],
        ),
        variant.network + ("" if variant.pretrained else "-scratch"),
        seed,
        times,
        TrainConfig(**variant.train),
        ms * variant.cost,
        net=working_config(variant.network, channels, task.n_classes).replaced(
            **variant.net
        ),
        trainer_class=variant.trainer,
    )
    return {**found, "method": name}


def time_steps(task: Task, rounds: int = 3, steps: int = 16) -> None:
    """Print what a step costs beside the default's, medians of alternating rounds.

    Sixteen steps are two rounds of the depths that UNet++ trains at in turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    bare = replace(task, tests=task.tests[:1], truths=task.truths[:1])
    for _ in range(rounds):
        for name, taken in seconds.items():
            began = run(bare, name, 0, 1.0, times=(0.008, 0.008 + steps / 1000))["rows"]
            taken.append(began[1]["seconds"] - began[0]["seconds"])
    for name, taken in seconds.items():
        ratio = np.median(np.divide(taken, seconds["default"]))
        print(f"{name:20s} {1000 * np.median(taken) / steps:6.1f} ms {ratio:5.2f}")


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print each variant's IoU by task, and how far it is ahead of its default."""
    value = {
        (r["task"], r["method"], r["seed"], row["time"]): row["foreground"]
        for r in lines
        for row in r["rows"]
    }
    for t in TIMES:
        print(f"\n{t:g} s: foreground IoU, mean over seeds; then the mean difference")
        print("to the default, +- its standard deviation over seeds (seeds ahead)")
        print(
            f"{'':20s} "
            + " ".join(f"{task[:9]:>9s}" for task in TASKS)
            + f" {'first four':>21s} {'all':>21s}"
        )
        for name, variant in VARIANTS.items():
            cells = [
                [value[k] for k in value if k[:2] == (task, name) and k[3] == t]
                for task in TASKS
            ]
            shown = [f"{np.mean(c):9.3f}" if c else f"{'-':>9s}" for c in cells]
            print(
                f"{name:20s} "
                + " ".join(shown)
                + "".join(
                    f" {_ahead(value, name, variant.beside, tasks, t):>21s}"
                    for tasks in (CHOOSING, TASKS)
                )
            )


def _ahead(
    value: dict[tuple[str, str, int, float], float],
    name: str,
    beside: str,
    tasks: tuple[str, ...],
    t: float,
) -> str:
    """Return the mean over tasks of the paired differences, and their spread."""
    if name == beside:
        return ""
    ahead = []
    for seed in sorted({k[2] for k in value}):
        paired = [
            value[task, name, seed, t] - value[task, beside, seed, t]
            for task in tasks
            if (task, name, seed, t) in value and (task, beside, seed, t) in value
        ]
        if paired:
            ahead.append(np.mean(paired))
    if not ahead:
        return "-"
    better = sum(a > 0 for a in ahead)
    spread = np.std(ahead, ddof=1) if len(ahead) > 1 else np.nan
    return f"{np.mean(ahead):+.3f} +- {spread:.3f} ({better}/{len(ahead)})"


def main() -> None:
    """Run what is missing in the output file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("ablations.jsonl"))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ms", type=float, default=46.0, help="of the default's step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--print", dest="only_print", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.time:
        time_steps(few_tests(load_task(args.data, TASKS[0]), side=64))
        return
    out = args.only_print or args.out
    lines = (
        [json.loads(row) for row in out.read_text().splitlines()]
        if out.exists()
        else []
    )
    done = {(r["task"], r["method"], r["seed"]) for r in lines}
    tasks: dict[str, Task] = {}
    for seed in range(0 if args.only_print else args.seeds):
        for task in args.tasks.split(","):
            for name in args.variants.split(","):
                if (task, name, seed) in done:
                    continue
                if task not in tasks:
                    tasks[task] = few_tests(load_task(args.data, task))
                if VARIANTS[name].pretrained and tasks[task].n_classes > 2:
                    continue  # no weights ship for these
                began = time.perf_counter()
                lines.append(run(tasks[task], name, seed, args.ms))
                with out.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
                scores = [round(r["foreground"], 3) for r in lines[-1]["rows"]]
                steps = [r["steps"] for r in lines[-1]["rows"]]
                taken = f"{time.perf_counter() - began:.0f} s"
                print(task, name, seed, scores, steps, taken, flush=True)
    print_table(lines)


if __name__ == "__main__":
    main()
