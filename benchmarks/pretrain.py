"""Train the starting weights that ship, on nuclei of every kind.

    python benchmarks/pretrain.py --data ../shared/data --out unetpp-nuclei.safetensors

The images are the CC0 nuclei of the 2018 Data Science Bowl [1]_ (`dsb2018_bench/train`
alone, so that every table may use the weights). Colours and grey values change so
strongly that a nucleus may be dark, bright or of any colour. What else was tried (mean
IoU of four tasks at 2, 5 and 10 s, two seeds): about 8,000 steps .575 .627 .643; maps
that must also tell a filter bank's responses .570 .604 .635; 16,000 steps .542 .608
.609.

.. [1] Caicedo et al., Nucleus segmentation across imaging experiments, Nature Methods
       2019, :DOI:`10.1038/s41592-019-0612-7`
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from napari_unetpp import __version__, augment
from napari_unetpp.config import working_config
from napari_unetpp.device import autocast
from napari_unetpp.model import Model
from napari_unetpp.networks import build_network
from napari_unetpp.preprocess import Preprocessing

CLASSES = ("background", "nucleus")
PATCH, BATCH = 128, 4
BALANCE = (0.6, 1.4)  # weights of the classes
DEPTHS = (1, 2, 3, 2)  # UNet++: of the steps in turn
WARP = augment.Warp(
    flip=True,
    right_angles=True,
    rotation=23,
    scale=0.5,
    elastic_sigma=2.0,
    elastic_spacing=32,
)


class Nuclei:
    """The images, three channels each, and where patches are drawn."""

    def __init__(self, folder: Path, seed: int) -> None:
        with (folder / "manifest.csv").open() as file:
            rows = list(csv.DictReader(file))
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.images: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.nuclei: list[NDArray[np.int64]] = []
        digest = hashlib.sha256()
        scaling = Preprocessing()
        for row in rows:
            raw = tifffile.imread(folder / "images" / f"{row['name']}.tif")
            image = raw[None] if raw.ndim == 2 else np.moveaxis(raw[..., :3], -1, 0)
            image = scaling.apply(image, scaling.limits(image, name="image"))
            target = tifffile.imread(folder / "semantic" / f"{row['name']}.tif")
            digest.update(raw.tobytes())
            digest.update(target.tobytes())
            whole = np.broadcast_to(image, (3, *target.shape))
            self.images.append(torch.from_numpy(np.array(whole, np.float32)))
            self.targets.append(torch.from_numpy(target.astype(np.uint8)))
            self.nuclei.append(np.argwhere(target == 2))
        self.digest = digest.hexdigest()
        # The rare kinds of microscopy are drawn more often than they occur.
        kinds = [row["modality"] for row in rows]
        share = np.array([Counter(kinds)[kind] ** -0.5 for kind in kinds])
        self.share = share / share.sum()

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draw patches (N, 3, P, P) and class numbers (N, P, P), -1 outside."""
        index = self.rng.choice(len(self.images), BATCH, p=self.share)
        centres = [self._centre(i) for i in index]
        window = WARP.window(PATCH)
        windows, annotation = augment.cut_windows(
            self.images, self.targets, index.tolist(), centres, window
        )
        grid = augment.sampling_grid(BATCH, PATCH, window, self.generator, WARP)
        patches, annotation = augment.warp(windows, annotation, grid)
        patches = torch.stack([self._recoloured(p) for p in patches])
        patches = augment.grey_values(
            patches,
            self.generator,
            gain=0.5,
            offset=0.3,
            gamma=0.6,
            noise=0.15,
            channel_share=0.3,
        )
        return patches, annotation.long() - 1

    def _centre(self, i: int) -> list[int]:
        nuclei = self.nuclei[i]
        if len(nuclei) and self.rng.random() < 0.6:
            place = nuclei[self.rng.integers(len(nuclei))]
            return (place + self.rng.integers(-50, 51, 2)).tolist()
        return [int(self.rng.integers(n)) for n in self.targets[i].shape]

    def _recoloured(self, patch: Tensor) -> Tensor:
        """Mix the channels into one, or swap and bleed them; invert; blur."""
        drawn = torch.rand(4, generator=self.generator)
        weights = torch.rand((3, 3), generator=self.generator)
        if drawn[0] < 0.5:
            share = weights[0] + 0.05
            patch = torch.einsum("c,chw->hw", share / share.sum(), patch).repeat(
                3, 1, 1
            )
        else:
            order = torch.randperm(3, generator=self.generator)
            mix = torch.eye(3)[order] + 0.3 * (weights - 0.5)
            mix = mix / mix.sum(1, keepdim=True).clamp_min(0.5)
            patch = torch.einsum("dc,chw->dhw", mix, patch)
        if drawn[1] < 0.5:
            patch = patch.amax() + patch.amin() - patch
        if drawn[2] < 0.3:
            patch = blurred(patch[:, None], 0.5 + 1.5 * float(drawn[3]))[:, 0]
        return patch


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Return (N, 1, H, W), blurred by a Gaussian."""
    reach = math.ceil(3 * sigma)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    x = functional.pad(x, (reach, reach, reach, reach), "reflect")
    x = functional.conv2d(x, kernel.view(1, 1, -1, 1))
    return functional.conv2d(x, kernel.view(1, 1, 1, -1))


def pretrain(nuclei: Nuclei, network: str, steps: int, seed: int) -> Model:
    """Train for so many steps and return the averaged weights as a model."""
    config = working_config(network, 3, len(CLASSES), levels=3)
    net = build_network(config, seed=seed).to(memory_format=torch.channels_last)
    shown = build_network(config, seed=seed)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=2e-3, weight_decay=1e-4, fused=True
    )
    device, balance = torch.device("cpu"), torch.tensor(BALANCE)
    began, told = time.perf_counter(), []
    for step in range(1, steps + 1):
        rate = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate * min(1, step / 200)
        patches, target = nuclei.batch()
        depth = DEPTHS[step % len(DEPTHS)] if len(net.depths) > 1 else None
        with autocast(device, True):
            heads = net(patches.to(memory_format=torch.channels_last), depth)
        losses = [
            functional.cross_entropy(h.float(), target, balance, ignore_index=-1)
            for h in heads
        ]
        loss = torch.stack(losses).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            kept = (1 - 1 / (step + 1)) ** 8
            torch._foreach_lerp_(
                list(shown.parameters()), list(net.parameters()), 1 - kept
            )
        told.append(float(loss.detach()))
        if step % 1000 == 0:
            mean = np.mean(told[-1000:])
            passed = time.perf_counter() - began
            print(f"{passed:6.0f} s, step {step}: loss {mean:.4f}", flush=True)
    provenance = {
        "napari_unetpp": __version__,
        "torch": torch.__version__,
        "trained_on": "2018 Data Science Bowl stage 1 (BBBC038, CC0), 292 tiles",
        "sha256_of_data": nuclei.digest,
        "script": "benchmarks/pretrain.py",
        "seed": seed,
        "steps": steps,
    }
    prior = tuple(-math.log(w) for w in BALANCE)
    shown.add_to_logits(prior)
    return Model(shown.eval(), CLASSES, prior=prior, provenance=provenance)


def main() -> None:
    """Pre-train and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--network", default="unet++")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args: Any = parser.parse_args()
    torch.set_num_threads(1)
    nuclei = Nuclei(args.data / "dsb2018_bench" / "train", args.seed)
    model = pretrain(nuclei, args.network, args.steps, args.seed)
    model.save(args.out, overwrite=True, half=True)


if __name__ == "__main__":
    main()
