"""What a training step costs beyond the network, and our elastic warp beside MONAI's.

    python benchmarks/step.py            (MONAI: pip install --no-deps monai)

A and B alternate in one process; the figures are medians and the ratio of medians.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from predict import alternate
from skimage.data import immunohistochemistry

from napari_unetpp import augment
from napari_unetpp.config import TrainConfig, working_config
from napari_unetpp.device import autocast
from napari_unetpp.examples import Examples
from napari_unetpp.model import create_model
from napari_unetpp.trainer import Trainer


def trainer(network: str) -> Trainer:
    """Return a trainer on three real planes with strokes, past its first steps."""
    planes = immunohistochemistry().transpose(2, 0, 1)
    images = [p[None].astype(np.float32) / 128 - 1 for p in planes]
    rng = np.random.default_rng(0)
    targets = []
    for _ in images:
        target = np.zeros(planes.shape[1:], np.uint8)
        for y, x, v in zip(
            *rng.integers(0, 480, (2, 60)), rng.integers(1, 3, 60), strict=True
        ):
            target[y : y + 3, x : x + 30] = v
        targets.append(target)
    examples = Examples(images, targets, [0, 1, 2], 2, [])
    model = create_model(working_config(network))
    made = Trainer(model, examples, TrainConfig(), seed=0, device=torch.device("cpu"))
    made.steps = TrainConfig().warp_after  # elastic deformation is on from here
    return made


def step_overhead(network: str, rounds: int) -> None:
    """Print the time of whole steps over bare ones on a batch that lies ready.

    Bare: forward, the same losses, backward, optimizer. Whole: a batch is drawn and
    warped as well, classes are weighed and the weights averaged. Scores are not due.
    """
    made, twin = trainer(network), trainer(network)
    twin._attend()  # to the forest, as `made` does at its first step
    patches, target = twin.batch()
    net, optimizer = twin.network.train(), twin._optimizer

    # UNet++ goes through its depths in turn: all of them count, as often as they come.
    turn = 2 ** (len(net.depths) - 1) if net.config.residual else 1

    def bare() -> None:
        with autocast(torch.device("cpu"), True):
            heads = net(patches, twin._depth())
        loss = twin._loss(heads, target) + twin._between_strokes(heads, patches)
        loss = loss + twin._taught(heads)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        twin.steps += 1  # as deep as the whole steps, in turn

    def several(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: [call() for _ in range(turn)]

    whole, alone = (
        seconds / turn
        for seconds in alternate(several(made.step), several(bare), rounds)
    )
    drawing, _ = alternate(made.batch, lambda: None, rounds)
    print(
        f"{network:10s} whole step {whole * 1e3:6.1f} ms, bare {alone * 1e3:6.1f} ms, "
        f"ratio {whole / alone:.3f} (drawing a batch {drawing * 1e3:.1f} ms)"
    )


def elastic(rounds: int, patch: int = 128, n: int = 8) -> None:
    """Print our elastic warp of image and annotation beside MONAI's Rand2DElastic."""
    try:
        from monai.transforms import Rand2DElastic, Rand2DElasticd
    except ImportError:
        print("elastic    MONAI is not installed: not compared")
        return
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 1, patch, patch, generator=generator)
    labels = torch.randint(
        0, 3, (n, patch, patch), generator=generator, dtype=torch.uint8
    )
    spacing, sigma = 24, 3.0
    spec = augment.Warp(elastic_sigma=sigma, elastic_spacing=spacing)

    def ours() -> None:
        grid = augment.sampling_grid(n, patch, patch, generator, spec)
        augment.warp(images, labels, grid)

    # MONAI scales N(0, 1) control points by the magnitude, as we do by sigma.
    theirs_one = Rand2DElasticd(
        keys=("image", "label"),
        spacing=(spacing, spacing),
        magnitude_range=(sigma, sigma),
        prob=1.0,
        mode=("bilinear", "nearest"),
        padding_mode=("reflection", "zeros"),
    )
    data = [{"image": images[i], "label": labels[i][None].float()} for i in range(n)]

    def theirs() -> None:
        for sample in data:
            theirs_one(sample)

    image_only = Rand2DElastic(
        spacing=(spacing, spacing),
        magnitude_range=(sigma, sigma),
        prob=1.0,
        mode="bilinear",
        padding_mode="reflection",
    )

    def theirs_image() -> None:
        for i in range(n):
            image_only(images[i])

    a, b = alternate(ours, theirs, rounds)
    c, d = alternate(ours, theirs_image, rounds)
    rms = (
        augment.elastic_field(200, patch, sigma, spacing, generator)
        .pow(2)
        .sum(-1)
        .mean()
        .sqrt()
    )
    print(
        f"elastic    {n} patches of {patch}: ours {a * 1e3:.2f} ms, MONAI "
        f"{b * 1e3:.2f} ms (image and labels), {b / a:.1f} times; image alone by MONAI "
        f"{d * 1e3:.2f} ms, {d / c:.1f} times (ours does both); rms displacement "
        f"{float(rms):.2f} px"
    )


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for network in ("unet", "unet++", "fcn-8s"):
        step_overhead(network, args.rounds)
    elastic(args.rounds)


if __name__ == "__main__":
    main()
