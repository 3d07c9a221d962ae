"""Learning from strokes, ours against a random forest: the table of PROTOCOL section 1.

    python benchmarks/strokes.py --data ../shared/data --out benchmarks/strokes.jsonl
    python benchmarks/strokes.py --print benchmarks/strokes.jsonl

A method with "-scratch" at its end starts from random weights, the others from those
that ship, where a network has some. Every run appends one line of JSON, so that a
broken off benchmark goes on where it was. Seconds are wall seconds of training:
reading of arrays, normalisation, sampling and steps included, imports, prediction and
scoring not. On a machine that others share, `--ms` lets a step count as that long, as
measured on the same machine at rest.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As the command line does, and before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from skimage.feature import multiscale_basic_features
from sklearn.ensemble import RandomForestClassifier

from napari_unetpp import api
from napari_unetpp.config import NetConfig, TrainConfig
from napari_unetpp.examples import read_examples
from napari_unetpp.model import Model
from napari_unetpp.train import starting_model
from napari_unetpp.trainer import Trainer

TASKS = (
    "isbi2012_em",
    "dsb2018",
    "glas",
    "wbc",
    "ctc_dic_hela",
    "cvc_clinicdb",
    "monuseg",
    "drosophila_vnc",
    "fluo_nuclei",
    "usiigaci_phc",
    "sandstone",
)
TIMES = (2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
NUCLEI = ("08ae2741df2f5ac8", "20b20ab049372d18", "4d40de30a3db3bc4")
RIM = {"ctc_dic_hela": 50}
FORESTS: tuple[dict[str, Any], ...] = (
    {"min_samples_leaf": 1},
    {"min_samples_leaf": 5},
    {"min_samples_leaf": 1, "max_features": 0.3},
)


@dataclass
class Task:
    """Images with strokes to learn from, and images with truth to be judged on."""

    name: str
    images: list[NDArray[Any]]
    strokes: list[NDArray[np.uint8]]
    tests: list[NDArray[Any]]
    truths: list[NDArray[np.uint8]]

    @property
    def n_classes(self) -> int:
        """Classes in the strokes, numbered from 1."""
        return int(max(s.max() for s in self.strokes))

    @property
    def channel_axis(self) -> int | None:
        """Where the channels are."""
        return -1 if self.images[0].ndim == 3 else None


def load_task(data: Path, name: str, *, tests: list[str] | None = None) -> Task:
    """Read a task; `tests` names other images than the protocol's to be judged on."""
    folder = data / name
    with (folder / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    painted = sorted(p.stem for p in (folder / "scribbles").glob("*.tif"))
    train = painted[: 1 if name == "sandstone" else 3]
    others = [r["name"] for r in rows]
    if name == "dsb2018":
        train = list(NUCLEI)
        others = [r["name"] for r in rows if r["modality"].startswith("fluo_")]
    others = tests if tests is not None else others
    others = [
        n
        for n in others
        if n not in train and (folder / "semantic" / f"{n}.tif").exists()
    ]

    def read(kind: str, names: list[str]) -> list[NDArray[Any]]:
        return [tifffile.imread(folder / kind / f"{n}.tif") for n in names]

    test_images = read("images", others)
    if name == "dsb2018":
        grey = [i for i, image in enumerate(test_images) if image.ndim == 2]
        others = [others[i] for i in grey]
        test_images = [test_images[i] for i in grey]
    return Task(
        name,
        read("images", train),
        read("scribbles", train),
        test_images,
        read("semantic", others),
    )


def score(task: Task, labels: list[NDArray[np.uint8]]) -> dict[str, float]:
    """Return the protocol's means over images: without and with the background."""
    rim = RIM.get(task.name, 0)
    without, with_background = [], []
    for found, truth in zip(labels, task.truths, strict=True):
        inner = tuple(slice(rim, n - rim) for n in truth.shape)
        names = [str(i) for i in range(1, task.n_classes + 1)]
        result = api.evaluate(found[inner], truth[inner], classes=names)
        values = np.array(list(result.iou.values()))
        without.append(
            np.nanmean(values[1:]) if np.isfinite(values[1:]).any() else np.nan
        )
        with_background.append(np.nanmean(values))
    return {
        "foreground": float(np.nanmean(without)),
        "mean": float(np.nanmean(with_background)),
    }


def run_network(
    task: Task,
    network: str,
    seed: int,
    times: tuple[float, ...],
    config: TrainConfig,
    ms: float | None = None,
    *,
    net: NetConfig | None = None,
    trainer_class: type[Trainer] = Trainer,
) -> dict[str, Any]:
    """Train once and score what a user would be shown at each time.

    `net` and `trainer_class` stand in for the network's default and for how it learns.
    """
    clock = time.perf_counter()
    examples = read_examples(task.images, task.strokes, channel_axis=task.channel_axis)
    name = network.removesuffix("-scratch")
    start = starting_model(
        None,
        net or name,
        tuple(str(i + 1) for i in range(task.n_classes)),
        len(examples.images[0]),
        0,
        seed,
        pretrained=name == network,
    )
    trainer = trainer_class(
        start, examples, config, seed=seed, device=torch.device("cpu")
    )
    outside = 0.0
    rows = []

    def over(limit: float) -> bool:
        if ms is not None:
            return trainer.steps * ms >= limit * 1000
        return time.perf_counter() - clock - outside >= limit

    for limit in times:
        while not over(limit):
            trainer.step()
        began = time.perf_counter()
        seconds = began - clock - outside
        model = trainer.model()
        labels, predicting = _predict(model, task)
        rows.append(
            {
                "time": limit,
                "seconds": seconds,
                "steps": trainer.steps,
                "predict_seconds": predicting,
                "held_out": trainer.score,
                **score(task, labels),
            }
        )
        outside += time.perf_counter() - began
    return {"task": task.name, "method": network, "seed": seed, "rows": rows}


def _predict(model: Model, task: Task) -> tuple[list[NDArray[np.uint8]], float]:
    began = time.perf_counter()
    labels = [
        api.predict(model, image, channel_axis=task.channel_axis)
        for image in task.tests
    ]
    return labels, time.perf_counter() - began


def features(
    image: NDArray[Any], channel_axis: int | None, *, scaled: bool
) -> NDArray[np.float32]:
    """Return the forest's features of the image as it is, or scaled as our input is."""
    if scaled:
        low, high = np.percentile(image, (1, 99.8))
        image = (image.astype(np.float32) - low) / max(high - low, 1e-6)
    found = multiscale_basic_features(
        image,
        intensity=True,
        edges=True,
        texture=True,
        sigma_min=0.7,
        sigma_max=16,
        channel_axis=channel_axis,
    )
    return np.asarray(found, np.float32)


def run_forest(task: Task, seed: int, *, scaled: bool) -> dict[str, Any]:
    """Fit three settings of the forest and keep the best on the truth."""
    axis = task.channel_axis
    began = time.perf_counter()
    found = [features(i, axis, scaled=scaled) for i in task.images]
    x = np.concatenate([f[s > 0] for f, s in zip(found, task.strokes, strict=True)])
    y = np.concatenate([s[s > 0] for s in task.strokes])
    shared = time.perf_counter() - began
    tests = [features(i, axis, scaled=scaled) for i in task.tests]
    best: dict[str, Any] = {}
    for setting in FORESTS:
        began = time.perf_counter()
        forest = RandomForestClassifier(
            100, class_weight="balanced", n_jobs=2, random_state=seed, **setting
        )
        forest.fit(x, y)
        seconds = shared + time.perf_counter() - began
        labels = [
            forest.predict(t.reshape(-1, t.shape[-1]))
            .reshape(t.shape[:2])
            .astype(np.uint8)
            for t in tests
        ]
        row = {"time": 0.0, "seconds": seconds, "setting": setting}
        row.update(score(task, labels))
        if not best or row["foreground"] > best["foreground"]:
            best = row
    method = "forest" if scaled else "forest-raw"
    return {"task": task.name, "method": method, "seed": seed, "rows": [best]}


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print mean and spread over the seeds, and how far we are ahead of the forest."""
    value: dict[tuple[str, str, float], list[float]] = {}
    for line in lines:
        for row in line["rows"]:
            value.setdefault((line["task"], line["method"], row["time"]), []).append(
                row["foreground"]
            )
    tasks = [t for t in TASKS if any(k[0] == t for k in value)]
    for method in dict.fromkeys(
        line["method"] for line in lines if line["method"] != "forest"
    ):
        times = sorted({k[2] for k in value if k[1] == method})
        print(
            f"\n{method}: foreground IoU, mean over seeds (spread), beside the forest"
        )
        print(
            f"{'task':16s} {'forest':>7s} "
            + " ".join(f"{f'{t:g} s':>14s}" for t in times)
        )
        ahead = {t: [] for t in times}
        for task in tasks:
            forest = float(np.mean(value.get((task, "forest", 0.0), [np.nan])))
            cells = []
            for t in times:
                seeds = value.get((task, method, t), [])
                if seeds:
                    ahead[t].append(np.mean(seeds) - forest)
                    cells.append(f"{np.mean(seeds):.3f} ({np.std(seeds):.3f})")
                else:
                    cells.append("-")
            print(f"{task:16s} {forest:7.3f} " + " ".join(f"{c:>14s}" for c in cells))
        print(
            f"{'ahead of forest':24s} "
            + " ".join(
                f"{np.mean(a):+.3f}, {sum(d > 0 for d in a)}/{len(a)}".rjust(14)
                for a in ahead.values()
            )
        )


def main() -> None:
    """Run what is missing in the output file, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/strokes.jsonl"))
    parser.add_argument("--methods", default="forest,unet,unet++,unet++-scratch,fcn-8s")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--ms", type=float, help="milliseconds that a step counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--print", dest="only_print", type=Path)
    args = parser.parse_args()
    out = args.only_print or args.out
    lines = (
        [json.loads(row) for row in out.read_text().splitlines()]
        if out.exists()
        else []
    )
    if args.only_print is None:
        torch.set_num_threads(args.threads)
        done = {(r["task"], r["method"], r["seed"]) for r in lines}
        times = tuple(t for t in TIMES if t <= args.seconds)
        for seed in range(args.seeds):
            for name in args.tasks.split(","):
                todo = [
                    m for m in args.methods.split(",") if (name, m, seed) not in done
                ]
                task = load_task(args.data, name) if todo else None
                for method in todo:
                    run = (
                        run_forest(task, seed, scaled=method == "forest")
                        if method.startswith("forest")
                        else run_network(
                            task, method, seed, times, TrainConfig(), args.ms
                        )
                    )
                    lines.append(run)
                    with out.open("a") as file:
                        file.write(json.dumps(run) + "\n")
                    print(
                        name,
                        method,
                        seed,
                        [round(r["foreground"], 3) for r in run["rows"]],
                        [r.get("steps") for r in run["rows"]],
                        flush=True,
                    )
    print_table(lines)


if __name__ == "__main__":
    main()
