"""Tiled prediction beside the bare network: how much of its time is the network's.

    python benchmarks/predict.py [--device cuda] [--sides 512x512 1000x1300]

A and B alternate in one process; the figures are medians and the ratio of medians.
Efficiency is the bare forward of one tile with its halo, times the tiles that cover
the image, times the useful share of a tile, over what the prediction takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from napari_unetpp.api import create_model, predict
from napari_unetpp.budget import free_bytes, tile_side
from napari_unetpp.config import published_config
from napari_unetpp.device import resolve_device
from napari_unetpp.networks.blocks import GroupNorm, measure_norms
from napari_unetpp.predict import Geometry, default_tile, working_copy


def alternate(
    a: Callable[[], object],
    b: Callable[[], object],
    rounds: int,
    device: torch.device | None = None,
) -> tuple[float, float]:
    """Return the median seconds of a and b, called in turn after two warm-ups."""
    times: tuple[list[float], list[float]] = ([], [])
    for n in range(rounds + 2):
        for which, call in enumerate((a, b)):
            began = time.perf_counter()
            call()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            if n >= 2:
                times[which].append(time.perf_counter() - began)
    return float(np.median(times[0])), float(np.median(times[1]))


def textured(height: int, width: int) -> np.ndarray:
    """Return an image with structure at every scale, so that no map is constant."""
    noise = torch.randn(4, height, width, generator=torch.Generator().manual_seed(0))
    coarse = [
        torch.nn.functional.avg_pool2d(n[None], k, 1, k // 2)[0] * k
        for n, k in zip(noise, (1, 3, 9, 27), strict=True)
    ]
    return torch.stack(coarse).sum(0).numpy()


def efficiency(
    label: str, config: object, depth: int | None, side: str, rounds: int, where: str
) -> None:
    """Print the efficiency of one network on one image."""
    height, width = map(int, side.split("x"))
    device = resolve_device(where)
    model = create_model(config)  # type: ignore[arg-type]
    image = textured(height, width)
    network = working_copy(model.network, device)
    depth = network.checked_depth(depth)
    geometry = Geometry(network, depth, (height, width))
    tile = default_tile((height, width))
    if tile < max(height, width):
        memory = free_bytes(device)
        tile = tile_side(network, depth, (height, width), memory=memory)
    core = geometry.round_up(min(tile, max(height, width)))
    window = core + 2 * network.halo(depth)
    batch = torch.randn(1, 1, window, window).to(
        device, memory_format=torch.channels_last
    )
    if any(isinstance(m, GroupNorm) for m in network.modules()):
        with torch.inference_mode():
            measure_norms(network, batch, depth)

    @torch.inference_mode()
    def bare() -> None:
        network(batch, depth, last_only=True)

    whole, alone = alternate(
        lambda: predict(model, image, depth=depth, device=device), bare, rounds, device
    )
    tiles = height * width / core**2  # the fraction of a tile counts as a fraction
    ideal = alone * tiles * (core / window) ** 2
    print(
        f"{label:16s} {side:>10s} tile {core}+2x{network.halo(depth)}: {whole:7.3f} s, "
        f"{height * width / whole / 1e6:6.2f} Mpx/s, efficiency {ideal / whole:.3f}, "
        f"without the halo's share {alone * tiles / whole:.3f}",
        flush=True,
    )


def main() -> None:
    """Print every figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", nargs="+", default=["512x512", "1000x1300"])
    parser.add_argument("--published", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("no NVIDIA GPU here: nothing measured")
        return
    runs: list[tuple[str, object, int | None]] = [("unet", "unet", None)]
    runs += [(f"unet++ L{d}", "unet++", d) for d in (1, 2, 3, 4)]
    if args.published:
        runs = [(f"{n} paper", published_config(n), None) for n in ("unet", "unet++")]
    for label, config, depth in runs:
        for side in args.sides:
            efficiency(label, config, depth, side, args.rounds, args.device)


if __name__ == "__main__":
    main()
