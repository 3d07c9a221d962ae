"""Trainings that are killed again and again, against undisturbed ones.

    python benchmarks/resume.py [--networks fcn-8s unet unet++] [--runs 1] [--kills 10]
    python benchmarks/resume.py --cost

Each run trains a network with the default settings on the sample "coins", in a process
of its own that is killed (SIGKILL) at random moments and started again, then compares
losses, weights, averaged weights and the optimizer's memory with those of a run that
was left alone: bit for bit.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from napari_unetpp import checkpoint, modelfile
from napari_unetpp.errors import ModelFileError

NAME = "training.checkpoint.safetensors"


def child(network: str, steps: int, seed: int, folder: str, seconds: float) -> None:
    """Train, or go on."""
    from napari_unetpp import api, samples

    sample = samples.load("coins")
    api.train(
        sample.image,
        sample.strokes,
        network=network,
        max_steps=steps,
        seed=seed,
        device="cpu",
        checkpoint=folder,
        checkpoint_seconds=seconds,
        resume=True,
    )


def start(
    network: str, steps: int, seed: int, folder: Path, seconds: float
) -> subprocess.Popen[str]:
    """Let a process train."""
    values = (network, steps, seed, folder, seconds)
    return subprocess.Popen(
        [sys.executable, __file__, "--child", *map(str, values)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def step_of(path: Path) -> int:
    """Return the step of the newest checkpoint."""
    try:
        return modelfile.describe(path).extra["training"]["values"]["steps"]
    except ModelFileError:
        return 0  # not there yet, or between two renames


def killed(
    network: str, steps: int, seed: int, folder: Path, kills: int, pause: float
) -> list[int]:
    """Train with kills, and return the steps at which it went on.

    Each kill comes up to `pause` seconds after a checkpoint was seen.
    """
    chance, path = random.Random(seed), folder / NAME
    for _ in range(kills):
        before = step_of(path)
        process = start(network, steps, seed, folder, 0.3)
        while step_of(path) <= before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(chance.random() * pause)
        process.kill()
        process.communicate()
    finish(start(network, steps, seed, folder, 60))
    found = checkpoint.read(path).model.provenance.get("resumed", [])
    assert all(entry["differs"] == [] for entry in found), found
    return [entry["step"] for entry in found]


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a process that must succeed."""
    told = process.communicate()[1]
    if process.returncode:
        raise SystemExit(told)


def differing(a: checkpoint.Checkpoint, b: checkpoint.Checkpoint) -> list[str]:
    """Return what is not the same to the last bit."""
    told = []
    if a.history[:, :2].tobytes() != b.history[:, :2].tobytes():
        told.append("loss curve")
    if not np.array_equal(a.history[:, 3], b.history[:, 3], equal_nan=True):
        told.append("scores")
    for kind in ("tensors", "rows"):
        mine, theirs = getattr(a.state, kind), getattr(b.state, kind)
        told += sorted(
            name
            for name in {*mine, *theirs}
            if mine[name].tobytes() != theirs[name].tobytes()
        )
    if a.state.values != b.state.values:
        told.append("values")
    return told


def cost(network: str) -> None:
    """Print what one checkpoint takes, in the loop and beside it (median of 12)."""
    import torch

    from napari_unetpp import samples
    from napari_unetpp.config import TrainConfig
    from napari_unetpp.examples import read_examples
    from napari_unetpp.model import TrainStep, create_model
    from napari_unetpp.trainer import Trainer

    sample = samples.load("coins")
    examples = read_examples(sample.image, sample.strokes)
    trainer = Trainer(
        create_model(network), examples, TrainConfig(), seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    for _ in range(9):
        trainer.step()
    history = [TrainStep(i, 0.1, 0.1) for i in range(1, 10_001)]
    loop, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        rolling = checkpoint.Rolling(folder)
        for _ in range(12):
            began = time.perf_counter()
            found = trainer.checkpoint(trainer.model(history), examples)
            loop.append(time.perf_counter() - began)
            rolling.keep(found, wait=True)
            whole.append(time.perf_counter() - began)
        size = Path(folder, NAME).stat().st_size
    print(
        f"{network}: {size / 1e6:.1f} MB, {1e3 * np.median(loop):.0f} ms in the loop, "
        f"{1e3 * np.median(whole):.0f} ms until it is safe"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["fcn-8s", "unet", "unet++"])
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--cost", action="store_true", help="what one of them takes")
    parser.add_argument("--pause", type=float, default=2.0, metavar="S")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        network, steps, seed, folder, seconds = options.child
        child(network, int(steps), int(seed), folder, float(seconds))
        return
    if options.cost:
        for network in options.networks:
            cost(network)
        return
    failed = 0
    for network in options.networks:
        for seed in range(options.runs):
            with tempfile.TemporaryDirectory() as name:
                whole, parts = Path(name, "whole"), Path(name, "parts")
                whole.mkdir()
                parts.mkdir()
                began = time.perf_counter()
                at = killed(
                    network, options.steps, seed, parts, options.kills, options.pause
                )
                finish(start(network, options.steps, seed, whole, 60))
                other = differing(
                    checkpoint.read(whole / NAME), checkpoint.read(parts / NAME)
                )
                failed += bool(other)
                print(
                    f"{network} run {seed}: {options.steps} steps, went on at {at}, "
                    f"{time.perf_counter() - began:.0f} s: "
                    f"{'equal' if not other else 'DIFFERS: ' + ', '.join(other[:5])}",
                    flush=True,
                )
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
