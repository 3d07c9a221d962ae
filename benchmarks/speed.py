"""Prediction and networks beside MONAI and segmentation-models-pytorch.

    python benchmarks/speed.py tiles [--sides 512x512 1000x1300 4096x4096]
    python benchmarks/speed.py networks
    python benchmarks/speed.py depths

A and B alternate in one process after two warm-ups; the figures are ratios of medians.
`tiles` needs MONAI; the same network, with the same fixed norms, is tiled by both, and
MONAI's overlap is the smallest tried whose seams are no larger than ours (the largest
difference of a probability from the whole image's), else the largest. `networks` needs
both peers; `depths` needs neither. On Linux set GOMP_SPINCOUNT=2000.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import math
import time
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from predict import textured
from torch.utils.flop_counter import FlopCounterMode

from napari_unetpp.api import create_model, predict, predict_proba
from napari_unetpp.budget import tile_side
from napari_unetpp.config import published_config
from napari_unetpp.device import peak_bytes
from napari_unetpp.networks import SegmentationNet, build_network
from napari_unetpp.networks.blocks import GroupNorm
from napari_unetpp.predict import Geometry, PlanePredictor, default_tile, working_copy
from napari_unetpp.preprocess import Planes

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")
OVERLAPS = (0.25, 0.5, 0.75)
WINDOWS = ((256, 4), (512, 1), (512, 4))  # side and batch


def alternated(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of calls that take turns, after two warm-ups."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for n in range(rounds + 2):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if n >= 2:
                times[name].append(time.perf_counter() - began)
    return {name: float(np.median(t)) for name, t in times.items()}


# --- tiled prediction -----------------------------------------------------------------


def measured(model: Any, image: np.ndarray, depth: int) -> SegmentationNet:
    """Return the network with the norms that prediction takes for this image."""
    network = working_copy(model.network, CPU)
    plane = Planes(image).plane(0)
    PlanePredictor(network, plane, model.preprocessing, depth=depth, tile=16)
    return network


def tiles(side: str, rounds: int, budgets: list[float], wanted: list[int]) -> None:
    """Print how prediction compares on one image, for every network and depth."""
    from monai.inferers import sliding_window_inference

    height, width = map(int, side.split("x"))
    image = textured(height, width)
    few = 1 if height * width > 4e6 else rounds
    for name, depth in (("unet", 3), *(("unet++", d) for d in wanted)):
        model = create_model(name)
        network = measured(model, image, depth)
        settings = model.preprocessing
        scaled = settings.apply(image[None], settings.limits(image[None]))
        x = torch.from_numpy(scaled)[None].to(memory_format=torch.channels_last)

        def slid(
            roi: int, batch: int, overlap: float, net: Any = network, d: int = depth,
            of: torch.Tensor = x,
        ) -> torch.Tensor:  # fmt: skip
            with torch.inference_mode():
                logits = sliding_window_inference(
                    of, roi, batch, lambda w: net(w, d, last_only=True)[-1], overlap,
                    mode="gaussian", padding_mode="reflect",
                )  # fmt: skip
            return logits

        overlap, told = matched(model, image[:1300, :1300], depth, slid)
        calls: dict[str, Callable[[], object]] = {
            f"ours {m} GB": lambda m=m, d=depth, o=model: predict(
                o, image, depth=d, memory=m
            )
            for m in budgets
        }
        for roi, batch in WINDOWS if few > 1 else WINDOWS[1:2]:
            calls[f"MONAI {roi}, {batch}"] = lambda r=roi, b=batch, f=slid, o=overlap: (
                f(r, b, o).argmax(1)
            )
        bound, call = bare(network, depth, (height, width), budgets[-1])
        calls["bare"] = call
        found = alternated(calls, few) if few > 1 else once(calls)
        best = min(v for k, v in found.items() if k.startswith("MONAI"))
        print(f"{name} L{depth} {side}: {told}")
        for key, seconds in found.items():
            if key != "bare":
                print(f"    {key:14s} {height * width / seconds / 1e6:6.2f} Mpx/s")
        ours = found[f"ours {budgets[-1]} GB"]
        share = found["bare"] * height * width / bound / ours
        print(
            f"    {best / ours:.2f} times MONAI's best; {share:.3f} of what the bare "
            f"network does on a tile of {bound} useful pixels",
            flush=True,
        )


def once(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the seconds of single calls, without a warm-up."""
    found = {}
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        found[name] = time.perf_counter() - began
    return found


def matched(
    model: Any, image: np.ndarray, depth: int, slid: Callable[..., torch.Tensor]
) -> tuple[float, str]:
    """Return MONAI's overlap, and how large the seams are at each that was tried."""
    network = measured(model, image, depth)
    settings = model.preprocessing
    scaled = settings.apply(image[None], settings.limits(image[None]))
    x = torch.from_numpy(scaled)[None].to(memory_format=torch.channels_last)
    halo = min(network.halo(depth), min(image.shape) // 4)
    inner = (slice(None), slice(halo, -halo), slice(halo, -halo))
    whole = predict_proba(model, image, depth=depth, tile=16384)[inner]
    ours = np.abs(predict_proba(model, image, depth=depth, tile=256)[inner] - whole)
    seams, limit = [], max(float(ours.max()), 1e-4)
    for overlap in OVERLAPS:
        found = slid(256, 4, overlap, net=network, of=x).softmax(1)[0].numpy()[inner]
        seams.append(float(np.abs(found - whole).max()))
        if seams[-1] <= limit:
            break
    shown = ", ".join(f"{s:.1e} at {o}" for s, o in zip(seams, OVERLAPS, strict=False))
    taken = OVERLAPS[len(seams) - 1]
    return taken, f"seams {ours.max():.1e} ours, MONAI {shown}: overlap {taken}"


def bare(
    network: SegmentationNet, depth: int, shape: tuple[int, int], memory: float
) -> tuple[int, Callable[[], object]]:
    """Return the pixels of a tile and the forward of its window."""
    side = default_tile(shape)
    if side < max(shape):
        side = tile_side(network, depth, shape, memory=1e9 * memory)
    geometry = Geometry(network, depth, shape)
    core = max(geometry.cores(side), key=lambda c: math.prod(b - a for a, b in c))
    spans = [geometry.window(span, axis)[0] for axis, span in enumerate(core)]
    window = torch.randn(1, 1, *(b - a for a, b in spans))
    window = window.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def call() -> object:
        return network(window, depth, last_only=True)

    return math.prod(b - a for a, b in core), call


# --- networks -------------------------------------------------------------------------


@cache
def peers() -> dict[str, torch.nn.Module]:
    """Return the UNet++ of the paper's width and those of two libraries."""
    library = torch.library.Library("torchvision", "DEF")  # a torch for CPUs lacks them
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor a, Tensor b, float c) -> Tensor")
    import segmentation_models_pytorch as smp
    from monai.networks.nets import BasicUNetPlusPlus

    config = published_config("unet++").replaced(dropout=0.0)
    found: dict[str, torch.nn.Module] = {"ours": build_network(config, seed=0)}
    with contextlib.redirect_stdout(io.StringIO()):
        found["MONAI"] = BasicUNetPlusPlus(2, 1, 1, (32, 64, 128, 256, 512, 32))
    for encoder in ("resnet18", "resnet34"):
        found[f"smp {encoder}"] = smp.UnetPlusPlus(
            encoder, encoder_weights=None, in_channels=1, classes=1
        )
    return found


def macs(network: torch.nn.Module, x: torch.Tensor) -> float:
    """Return the multiply-accumulates of a forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x)
    return float(counter.get_total_flops()) / 2


def networks(rounds: int, kinds: list[str]) -> None:
    """Print the multiply-accumulates per second of forwards and training steps."""
    shapes = {"patches": (4, 1, 128, 128), "image": (1, 1, 512, 512)}
    for train, kind in itertools.product((False, True), shapes):
        if ("training" if train else "forward") not in kinds or kind not in kinds:
            continue
        shape = shapes[kind]
        large = train and shape[2] > 128  # three rounds, since each takes a minute
        for half in (False, True):
            calls, work = {}, {}
            for name, network in peers().items():
                cost = macs(network.eval(), torch.randn(shape)) * (3 if train else 1)
                calls[name] = faster_layout(network, shape, train, half)
                work[name] = cost
            seconds = alternated(calls, 3 if large else rounds)
            speed = {k: cost / seconds[k] / 1e9 for k, cost in work.items()}
            title = f"{'training' if train else 'forward'} {shape[0]} x {shape[2]}^2 "
            title += "bfloat16" if half else "float32"
            print(title, ", ".join(f"{k} {v:.0f} GMAC/s" for k, v in speed.items()))
            print("    ours over", ", ".join(
                f"{k} {speed['ours'] / v:.2f}" for k, v in speed.items() if k != "ours"
            ), flush=True)  # fmt: skip


def faster_layout(
    network: torch.nn.Module, shape: tuple[int, ...], train: bool, half: bool
) -> Callable[[], None]:
    """Return the step in the memory format in which it is faster."""
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        twin = copy.deepcopy(network).to(memory_format=layout)  # type: ignore[call-overload]
        call = step(
            twin, torch.randn(shape).contiguous(memory_format=layout), train, half
        )
        call()
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began, len(found), call))
    return min(found)[2]


def step(
    network: torch.nn.Module, x: torch.Tensor, train: bool, half: bool
) -> Callable[[], None]:
    """Return a forward, or a forward and backward of all weights."""
    network.train(train)

    def call() -> None:
        with (
            torch.set_grad_enabled(train),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            out = (
                network(x, None, last_only=True)
                if isinstance(network, SegmentationNet)
                else network(x)
            )
            last = out[-1] if isinstance(out, list) else out
        if train:
            network.zero_grad(set_to_none=True)
            last.float().mean().backward()

    return call


# --- depths ---------------------------------------------------------------------------


def depths(rounds: int, side: int) -> None:
    """Print time, multiply-accumulates and bytes of each depth over the deepest."""
    for label, config in (
        ("published", published_config("unet++").replaced(dropout=0.0)),
        ("default", create_model("unet++").config),
    ):
        network = working_copy(build_network(config, seed=0), CPU)
        x = torch.randn(1, 1, side, side).to(memory_format=torch.channels_last)

        @torch.inference_mode()
        def call(d: int, net: Any = network, of: torch.Tensor = x) -> object:
            return net(of, d, last_only=True)

        for norm in network.modules():
            if isinstance(norm, GroupNorm):  # as prediction has them
                one = torch.ones(1, norm.num_channels, 1, 1)
                norm.fixed = one, 0 * one
        calls: dict[str, Callable[[], object]] = {
            str(d): lambda d=d, c=call: c(d) for d in network.depths
        }
        seconds = alternated(calls, rounds)
        deepest = network.depths[-1]
        most = network.macs(side, side, deepest)
        moved = {d: traffic(network, x, d) for d in network.depths}
        for d in network.depths:
            cost = network.macs(side, side, d)
            print(
                f"{label} L{d} {side}^2: {seconds[str(d)]:.3f} s, "
                f"{cost / seconds[str(d)] / 1e9:.0f} GMAC/s; over L{deepest}: time "
                f"{seconds[str(d)] / seconds[str(deepest)]:.3f}, MACs "
                f"{cost / most:.3f}, bytes {moved[d] / moved[deepest]:.3f} "
                f"({moved[d] / 1e9:.2f} GB); peak of the maps "
                f"{peak_bytes(calls[str(d)]) / 1e6:.0f} MB",
                flush=True,
            )


def traffic(network: SegmentationNet, x: torch.Tensor, depth: int) -> int:
    """Return the bytes that the operators of a forward read and write."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    total = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal total
            out = func(*args, **(kwargs or {}))
            views = func.is_view
            for leaf in () if views else tree_leaves((args, out)):
                if isinstance(leaf, torch.Tensor):
                    total += leaf.nbytes
            return out

    with Count(), torch.no_grad():
        network(x, depth, last_only=True)
    return total


def main() -> None:
    """Print one of the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("tiles", "networks", "depths"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", default=["512x512", "1000x1300"])
    kinds = ["forward", "training", "patches", "image"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--memory", nargs="+", type=float, default=[0.5, 2, 8])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.table == "tiles":
        for side in args.sides:
            tiles(side, args.rounds, args.memory, args.depths)
    elif args.table == "networks":
        networks(args.rounds, args.kinds)
    else:
        depths(args.rounds, args.side)


if __name__ == "__main__":
    main()
