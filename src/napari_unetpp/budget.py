"""How large a tile or a step may be: what maps take, and the memory there is."""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import TYPE_CHECKING

import psutil
import torch

from napari_unetpp.device import peak_bytes
from napari_unetpp.networks import build_network

if TYPE_CHECKING:
    from napari_unetpp.config import NetConfig
    from napari_unetpp.networks import SegmentationNet

# Measured at sides of 384 to 2432 px on a CPU: beyond about 1408 a pixel takes longer
# again, since each map's memory is new to the process.
_MOST_PIXELS = 2**21
_LEAST_SIDE = 128  # px; a tile that still does not fit is halved when memory runs out
_SPARE = 2.0  # measured: what operators need for themselves, and the result
_MOST_BYTES = 4e9  # of what is free, a fourth at most is taken
_STEP_SPARE = 1.25  # of a step, and ...
_AT_MOST = 512  # ... bytes per pixel and channel of width that no step reaches


def available_bytes(device: torch.device) -> float:
    """Return how much memory of a device this process can still get."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    available = float(psutil.virtual_memory().available)
    if sys.platform == "linux":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)  # `ulimit -v`
        if limit != resource.RLIM_INFINITY:
            available = min(available, limit - psutil.Process().memory_info().vms)
    return available


def free_bytes(device: torch.device) -> float:
    """Return how much memory of a device tiles may take unless the user says."""
    return min(available_bytes(device) / 4, _MOST_BYTES)


def step_fits(config: NetConfig, batch: int, side: int, device: torch.device) -> bool:
    """Return whether the memory that is free is enough for a training step.

    Parameters
    ----------
    config : NetConfig
        The network.
    batch, side : int
        Patches of a step, and their side in pixels.
    device : torch.device
        Where it is computed.
    """
    free = available_bytes(device)
    if batch * side**2 * max(config.width, 16) * _AT_MOST < free:
        return True  # counting takes a tenth of a second
    return _STEP_SPARE * step_bytes(config, batch, side) < free


@cache
def step_bytes(config: NetConfig, batch: int, side: int) -> int:
    """Return the peak of all maps and gradients of a training step, in bytes.

    Notes
    -----
    At full depth and in full precision, which takes about twice what half of it does.
    """
    with torch.device("meta"):
        twin = build_network(config).train()
        windows = torch.empty(batch, config.in_channels, side, side)

        def step() -> None:
            loss = torch.stack([h.log_softmax(1).mean() for h in twin(windows)]).sum()
            loss.backward()  # type: ignore[no-untyped-call]

        return peak_bytes(step)


@cache
def bytes_per_pixel(config: NetConfig, depth: int, all_heads: bool) -> float:
    """Return the peak of all maps of a forward, in bytes per pixel of its input."""
    with torch.device("meta"), torch.inference_mode():
        twin = build_network(config).eval()
        side = twin.valid_size(1024, depth)
        window = torch.empty(1, config.in_channels, side, side)
        peak = peak_bytes(lambda: twin(window, depth, last_only=not all_heads))
    return (peak + window.nbytes) / side**2


def tile_side(
    network: SegmentationNet,
    depth: int,
    shape: tuple[int, int],
    *,
    memory: float,
    all_heads: bool = False,
) -> int:
    """Return the side in pixels of the tiles of a plane.

    Parameters
    ----------
    network : SegmentationNet
        Tells the halo, and what its maps take.
    depth : int
        The deepest head that is needed.
    shape : tuple of int
        Height and width of the plane.
    memory : float
        What a tile may take, in bytes.
    all_heads : bool, optional
        Whether the heads 1 to `depth` are needed, not `depth` alone.

    Returns
    -------
    int
        The longer side of the plane where all of it may be one tile.
    """
    cost = _SPARE * bytes_per_pixel(network.config, depth, all_heads)
    pixels = min(_MOST_PIXELS, memory / cost)
    halo, step = network.halo(depth), network.multiple(depth)
    if math.prod(n + 2 * min(halo, 32) for n in shape) <= pixels:
        return max(shape)
    side = int(math.sqrt(pixels)) - 2 * halo
    return max(side // step * step, _LEAST_SIDE)
