"""The weights that ship: what a network knows before it sees the first stroke."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from napari_unetpp.model import load_model

if TYPE_CHECKING:
    from napari_unetpp.model import Model
    from napari_unetpp.networks import SegmentationNet

_FOLDER = Path(__file__).parent / "weights"
_FILES = {"unet++": "unetpp-nuclei.safetensors"}


@torch.no_grad()
def start_from_pretrained(network: SegmentationNet) -> str | None:
    """Give a fresh network the weights that ship for its kind, as far as they fit.

    Parameters
    ----------
    network : SegmentationNet
        Changed in place.

    Returns
    -------
    digest : str or None
        Of the file; None if there is none for this network, which is then not changed.

    Notes
    -----
    The weights know background and nuclei in colour images. The first convolution is
    folded for other numbers of channels: one channel gets the sum of the three. UNet++
    nodes that are deeper than the file's start at random, and their head, a
    correction, at 0. Networks of more than two classes are left alone: on blood cells
    (three classes) classes that all start as nuclei cost more than the weights bring.
    """
    source = _source(network.config.name)
    if source is None:
        return None
    own, theirs = network.config, source.config
    levels = own.levels if own.name == "unet++" else theirs.levels
    channels = own.in_channels
    if theirs.replaced(levels=levels, in_channels=channels) != own:
        return None
    origin = source.copy().network
    origin.add_to_logits([-p for p in source.prior])
    weights = origin.state_dict()
    for name, weight in network.state_dict().items():
        if name in weights:
            given = weights[name]
            if name == "x_0_0.conv1.weight":
                given = _folded(given, theirs.in_channels, channels)
            weight.copy_(given)
    return str(source.provenance["digest"])


@cache
def _source(name: str) -> Model | None:
    return load_model(_FOLDER / _FILES[name]) if name in _FILES else None


def _folded(weight: torch.Tensor, given: int, wanted: int) -> torch.Tensor:
    """Return the first convolution (F, C s s, k, k) for another number of channels."""
    if given == wanted:
        return weight
    split = weight.view(len(weight), given, -1, *weight.shape[2:])  # (F, C, s s, k, k)
    mean = split.sum(1, keepdim=True) / wanted
    return mean.repeat(1, wanted, 1, 1, 1).flatten(1, 2)
