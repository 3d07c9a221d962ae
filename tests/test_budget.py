"""Tiles are as large as pays and as the memory allows."""

from __future__ import annotations

import pytest
import torch

from napari_unetpp.budget import bytes_per_pixel, free_bytes, tile_side
from napari_unetpp.config import NETWORKS, published_config, working_config
from napari_unetpp.device import peak_bytes
from napari_unetpp.networks import build_network


@pytest.mark.parametrize("all_heads", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_maps_are_counted_without_computing_them(depth: int, all_heads: bool) -> None:
    network = build_network(working_config("unet++")).eval()
    x = torch.randn(1, 1, 256, 320)
    with torch.inference_mode():
        peak = peak_bytes(lambda: network(x, depth, last_only=not all_heads))
    expected = (peak + x.nbytes) / (256 * 320)
    assert bytes_per_pixel(network.config, depth, all_heads) == pytest.approx(
        expected, rel=0.02
    )


def test_maps_that_no_node_reads_any_more_are_freed() -> None:
    config = published_config("unet++").replaced(width=8)
    f = 4 * config.width  # bytes per pixel of a map at full resolution
    # X^{0,4} reads five maps at once, beside the four of its row and the ones below.
    everything = f * (5 + 5 + 1 + 2 * (1 + 1 / 2 + 1 / 4 + 1 / 8))
    assert bytes_per_pixel(config, 4, False) < everything + f


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_a_tile(name: str) -> None:
    network = build_network(working_config(name, width=4))
    depth = network.depths[-1]
    sides = [
        tile_side(network, depth, (5000, 9000), memory=m) for m in (1e6, 1e8, 1e9, 1e12)
    ]
    assert sides == sorted(sides)
    assert sides[0] == 128
    assert sides[-1] + 2 * network.halo(depth) <= 2**10.5 + 1
    assert tile_side(network, depth, (700, 900), memory=1e12) == 900


def test_the_window_of_a_tile_takes_what_it_may() -> None:
    network = build_network(working_config("unet++")).eval()
    for depth in (1, 2, 3):
        side = tile_side(network, depth, (4000, 4000), memory=2e8)
        window = side + 2 * network.halo(depth)
        x = torch.empty(1, 1, window, window)
        with torch.inference_mode():
            peak = peak_bytes(lambda x=x, d=depth: network(x, d, last_only=True))
        assert 0.4e8 < peak < 2e8


def test_the_memory_that_is_free_is_known() -> None:
    assert 1e6 < free_bytes(torch.device("cpu")) <= 4e9
