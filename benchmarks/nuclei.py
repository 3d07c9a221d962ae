"""Nuclei as in the UNet++ paper's table 3 and figure 3: four networks, then L1 to L4.

    python benchmarks/nuclei.py --data ../shared/data --out nuclei.json
    python benchmarks/nuclei.py --data ../shared/data --gpu --seeds 3

A fifth of `dsb2018_bench/train`, whole groups at a time, chooses the best step; `val`
is scored once. The score is the IoU of nuclei at 0.5, per image, mean over images. With
`--gpu` the networks, batch and schedule are `api.preset("unetpp-2018")`. Without, all
is SHORT so that a CPU core finishes in minutes: half the channels, no dropout (which
narrow networks do not survive), batch 8, a rate of 1e-3 and a few hundred steps. Those
figures compare nothing with the paper.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from skimage.transform import resize

from napari_unetpp import api
from napari_unetpp.folders import split

# Name, width, deep supervision; the paper's U-Net has the wide one's units and dropout.
NETWORKS = {
    "U-Net": ("wide-unet", 32, False),
    "wide U-Net": ("wide-unet", 35, False),
    "UNet++ without deep supervision": ("unet++", 32, False),
    "UNet++ with deep supervision": ("unet++", 32, True),
}
CLASSES = ("background", "nucleus")
SIDE = 96
ROUNDS = 7


class Part(NamedTuple):
    """Images (Y, X, 3) and masks of 0 and 1."""

    images: list[NDArray[Any]]
    masks: list[NDArray[np.uint8]]


def read(folder: Path, names: list[str], variant: str) -> Part:
    """Read images as colours; resized ones are all 96 x 96."""
    images, masks = [], []
    for name in names:
        image = tifffile.imread(folder / "images" / f"{name}.tif")
        if image.ndim == 2:
            image = np.stack([image] * 3, axis=-1)
        image = image[..., :3]
        mask = (tifffile.imread(folder / "semantic" / f"{name}.tif") == 2).astype(
            np.uint8
        )
        if variant == "resized":
            image = resize(image, (SIDE, SIDE), anti_aliasing=True, preserve_range=True)
            image = image.astype(np.float32)
            mask = resize(mask, (SIDE, SIDE), order=0, anti_aliasing=False)
            mask = (mask > 0).astype(np.uint8)
        images.append(image)
        masks.append(mask)
    return Part(images, masks)


def manifest(folder: Path) -> dict[str, str]:
    """Return the group of each image."""
    with (folder / "manifest.csv").open(newline="") as file:
        return {row["name"]: row["group"] for row in csv.DictReader(file)}


def score(model: api.Model, part: Part, device: str | None, depth: int | None) -> float:
    """Return the mean IoU of nuclei over the images that have any, or get any."""
    found = []
    for image, mask in zip(part.images, part.masks, strict=True):
        labels = api.predict(model, image, channel_axis=-1, device=device, depth=depth)
        result = api.evaluate(labels, mask, classes=CLASSES, unlabelled=None)
        found.append(result.iou["nucleus"])
    return float(np.nanmean(found))


def recipe(
    name: str, width: int, supervised: bool, *, gpu: bool
) -> tuple[api.NetConfig, api.TrainConfig]:
    """Return the paper's network and training, or the short version."""
    network = api.published_config(name, 3, 2)
    network = network.replaced(width=width, deep_supervision=supervised)
    config = api.preset("unetpp-2018").config
    if gpu:
        return network, config
    network = network.replaced(width=width // 2, dropout=0.0)
    return network, config.replaced(batch=8, learning_rate=1e-3, score_every=40)


def fit(
    parts: dict[str, Part], options: argparse.Namespace, name: str, seed: int
) -> tuple[api.Model, dict[str, Any]]:
    """Train one network and score it on `val` once."""
    network, config = recipe(*NETWORKS[name], gpu=options.gpu)
    best = 0.0

    def judge(model: api.Model, _step: int) -> float:
        nonlocal best
        value = score(model, parts["choose"], options.device, None)
        best = max(best, value)
        return value

    began = time.perf_counter()
    model = api.train(
        parts["train"].images,
        parts["train"].masks,
        network=network,
        classes=CLASSES,
        unlabelled=None,
        channel_axis=-1,
        config=config,
        max_steps=options.steps,
        seed=seed,
        device=options.device,
        judge=judge,
    )
    return model, {
        "network": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "best_step": len(model.history),
        "seconds": time.perf_counter() - began,
        "chosen_by": best,
        "iou": score(model, parts["test"], options.device, None),
    }


def depths(model: api.Model, part: Part, device: str | None) -> list[dict[str, Any]]:
    """Return parameters, MACs, time and IoU of L1 to L4 of one trained network."""
    found = model.network.depths
    side = 256
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    small = {d: model.pruned(d).network.to(device or "cpu") for d in found}
    x = x.to(device or "cpu")
    times: dict[int, list[float]] = {d: [] for d in found}
    for _ in range(ROUNDS + 2):
        for d, network in small.items():
            times[d].append(timed(lambda network=network: network(x), device))
    return [
        {
            "depth": d,
            "parameters": sum(p.numel() for p in small[d].parameters()),
            "macs": model.network.macs(side, side, depth=d),
            "milliseconds": 1000 * median(times[d][2:]),
            "iou": score(model, part, device, d),
        }
        for d in found
    ]


@torch.inference_mode()
def timed(work: Callable[[], object], device: str | None) -> float:
    """Return the seconds that something takes, on a GPU until it is done."""
    if device and device.startswith("cuda"):
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device and device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Print the tables, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gpu", action="store_true", help="full sizes and schedule")
    parser.add_argument("--variant", choices=("resized", "native"), default="resized")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.device = "cuda" if options.gpu else "cpu"
    options.steps = options.steps or (20_000 if options.gpu else 400)
    folder = options.data / "dsb2018_bench"
    groups = manifest(folder / "train")
    names = split(list(groups), groups=groups, shares=(0.8, 0.2, 0.0), seed=0)
    parts = {
        "train": read(folder / "train", names["train"], options.variant),
        "choose": read(folder / "train", names["validation"], options.variant),
        "test": read(folder / "val", sorted(manifest(folder / "val")), options.variant),
    }
    kind = "full" if options.gpu else "SHORT: says nothing about the paper's table"
    print(f"{options.variant}, {options.steps} steps at most, {kind}")
    print({k: len(p.images) for k, p in parts.items()}, flush=True)
    rows, pruned = [], []
    for seed in range(options.seeds):
        for name in NETWORKS:
            model, row = fit(parts, options, name, seed)
            rows.append(row)
            print(json.dumps(row), flush=True)
            if NETWORKS[name][2]:
                pruned.append(depths(model, parts["test"], options.device))
                for line in pruned[-1]:
                    print("   ", json.dumps(line), flush=True)
            if options.out:
                table = {"kind": kind, "networks": rows, "depths": pruned}
                options.out.write_text(json.dumps(table, indent=1))
    for name in NETWORKS:
        values = [r["iou"] for r in rows if r["network"] == name]
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        print(f"{name:<34} {np.mean(values):.3f}{spread}  ({len(values)} seeds)")


if __name__ == "__main__":
    main()
