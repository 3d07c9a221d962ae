"""ISBI 2012 membranes as in U-Net's table 1: pixel, Rand and warping error.

    python benchmarks/isbi.py --data ../shared/data --out isbi.json
    python benchmarks/isbi.py --data ../shared/data --gpu --seeds 3

Slices 0-13 train, 14-15 choose the best step and the threshold, 16-19 are scored once;
all are from one stack. With `--gpu` it is the paper's network and recipe
(`api.preset("unet-2015")`). Without, it is SHORT: an eighth of the channels, smaller
tiles and a time limit, which compares nothing with the paper.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from napari_unetpp import api
from napari_unetpp.losses import regions

# The cells are the objects between which the border weights lie.
CLASSES = ("membrane", "interior")
THRESHOLDS = np.arange(0.1, 0.95, 0.1).round(1)


def read(folder: Path, slices: range) -> tuple[list[Any], list[Any]]:
    """Return images, and 1 inside the cells."""
    names = [f"slice{i:02}.tif" for i in slices]
    images = [tifffile.imread(folder / "images" / n) for n in names]
    inside = [tifffile.imread(folder / "semantic" / n) == 1 for n in names]
    return images, [mask.astype(np.uint8) for mask in inside]


def probability(
    model: api.Model, image: NDArray[Any], device: str, *, turns: bool
) -> NDArray[np.float32]:
    """Return the probability of the interior, perhaps the mean of 8 turned images."""
    found = []
    for quarter in range(4 if turns else 1):
        for mirrored in (False, True) if turns else (False,):
            view = np.rot90(image, quarter)
            view = view[:, ::-1] if mirrored else view
            p = api.predict_proba(model, np.ascontiguousarray(view), device=device)[1]
            p = p[:, ::-1] if mirrored else p
            found.append(np.rot90(p, -quarter))
    return np.mean(found, axis=0, dtype=np.float32)


def scored(
    found: list[NDArray[Any]], truth: list[NDArray[Any]], threshold: float
) -> dict[str, float]:
    """Return the mean of the three errors over the slices."""
    measures = {
        "pixel": api.pixel_error,
        "rand": api.rand_error,
        "warping": api.warping_error,
    }
    return {
        name: float(
            np.mean([e(p > threshold, t) for p, t in zip(found, truth, strict=True)])
        )
        for name, e in measures.items()
    }


def run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train, choose a threshold and score."""
    folder = options.data / "isbi2012_em"
    images, truth = read(folder, range(14))
    choosing, chosen = read(folder, range(14, 16))
    testing, tested = read(folder, range(16, 20))
    network, config, _ = api.preset("unet-2015", 1, CLASSES)
    if not options.gpu:
        network = network.replaced(width=8)
        config = config.replaced(patch=196, score_every=100)

    def judge(model: api.Model, _step: int) -> float:
        found = [api.predict(model, image, device=options.device) for image in choosing]
        pairs = zip(found, chosen, strict=True)
        return float(
            np.mean([api.evaluate(a, b, unlabelled=None).mean_iou for a, b in pairs])
        )

    began = time.perf_counter()
    steps = api.train_steps(
        images,
        truth,
        network=network,
        classes=CLASSES,
        unlabelled=None,
        config=config,
        max_seconds=options.seconds,
        seed=seed,
        device=options.device,
        # Masks have no 0 for "not annotated": interiors are numbered, membranes are 0.
        instances=[regions(mask + np.uint8(1)) for mask in truth],
        judge=judge,
    )
    last = 0
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            model: api.Model = end.value
            break
        last = step.step
        if last % 200 == 0:
            print(f"    {last} {step.loss:.3f} {step.score:.4f}", flush=True)
    row: dict[str, Any] = {
        "seed": seed,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "steps": last,
        "best_step": len(model.history),
        "seconds": time.perf_counter() - began,
    }
    for turns in (False, True):
        known, new = (
            [probability(model, i, options.device, turns=turns) for i in some]
            for some in (choosing, testing)
        )
        rand = [scored(known, chosen, t)["rand"] for t in THRESHOLDS]
        best = float(THRESHOLDS[int(np.argmin(rand))])
        for cut in sorted({0.5, best}):
            kind = f"{'mean of 8 turns' if turns else 'as it is'}, threshold {cut}"
            row[kind] = scored(new, tested, cut)
    return row


def main() -> None:
    """Print the errors, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gpu", action="store_true", help="full sizes and schedule")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.device = "cuda" if options.gpu else "cpu"
    options.seconds = options.seconds or (36_000 if options.gpu else 1000)
    kind = "full" if options.gpu else "SHORT: says nothing about the paper's table"
    print(f"{options.seconds:.0f} s at most, {kind}", flush=True)
    rows = []
    for seed in range(options.seeds):
        rows.append(run(options, seed))
        print(json.dumps(rows[-1], indent=1), flush=True)
        if options.out:
            options.out.write_text(json.dumps({"kind": kind, "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
