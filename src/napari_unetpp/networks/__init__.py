"""The networks: (N, C, H, W) to a list of logits; each knows its sizes and its cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from napari_unetpp.networks.blocks import GroupNorm, SegmentationNet
from napari_unetpp.networks.fcn import FCN
from napari_unetpp.networks.unet import UNet
from napari_unetpp.networks.unetpp import UNetPlusPlus
from napari_unetpp.networks.vgg import VGG19UNet

if TYPE_CHECKING:
    from napari_unetpp.config import NetConfig

__all__ = ["SegmentationNet", "build_network", "prune"]

_CLASSES: dict[str, type[SegmentationNet]] = {
    "fcn-32s": FCN,
    "fcn-16s": FCN,
    "fcn-8s": FCN,
    "unet": UNet,
    "unet-valid": UNet,
    "wide-unet": UNet,
    "unet++": UNetPlusPlus,
    "vgg19-unet": VGG19UNet,
}


def build_network(config: NetConfig, *, seed: int | None = None) -> SegmentationNet:
    """Build a network with fresh weights.

    Parameters
    ----------
    config : NetConfig
        The network.
    seed : int, optional
        The same seed draws the same weights; None draws others each time. The global
        random state of torch is neither read nor changed.

    Returns
    -------
    SegmentationNet
        In training mode, float32, on the current default device; on the meta device
        nothing is drawn.
    """
    generator = torch.Generator(device="cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # torch's own layers draw at first
        network = _CLASSES[config.name](config)
    network.draw_weights(generator)
    return network


def prune(network: SegmentationNet, depth: int) -> SegmentationNet:
    """Cut a UNet++ at a depth.

    Parameters
    ----------
    network : SegmentationNet
        A UNet++ with deep supervision; not modified.
    depth : int
        One of ``network.depths``.

    Returns
    -------
    SegmentationNet
        A network with own weights, heads 1 to `depth` and nothing else; same output
        as ``network(x, depth)``, bit for bit.

    Raises
    ------
    ValueError
        If `network` has no head at `depth`.
    """
    config = network.config.replaced(levels=network.checked_depth(depth))
    with torch.device("meta"):
        small = _CLASSES[config.name](config)
    weights = network.state_dict()
    small.load_state_dict(
        {name: weights[name].clone() for name in small.state_dict()}, assign=True
    )
    for name, module in small.named_modules():
        if isinstance(module, GroupNorm):
            module.fixed = network.get_submodule(name).fixed  # type: ignore[assignment]
    return small.train(network.training)
