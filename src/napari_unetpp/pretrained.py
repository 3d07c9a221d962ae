"""The weights that ship, or a trunk's: what a network knows before it is trained."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from napari_unetpp import io
from napari_unetpp.errors import ModelFileError
from napari_unetpp.model import load_model

if TYPE_CHECKING:
    import os

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


@torch.no_grad()
def load_trunk(model: Model, path: str | os.PathLike[str]) -> Model:
    """Return a copy of a model whose VGG trunk has the weights of a file.

    Parameters
    ----------
    model : Model
        Of an FCN or the VGG19 U-Net, in the width of the file (64) and without norm.
    path : path
        A .safetensors file with ``features.N.weight`` and ``features.N.bias`` as
        torchvision's VGG16 and VGG19 have them; whatever else it holds is ignored.

    Returns
    -------
    Model
        The first convolution is folded for other numbers of channels than three.

    Raises
    ------
    ValueError
        If the model has no such trunk, or the file's does not fit it.
    ModelFileError
        If the file is missing or no safetensors file.

    Notes
    -----
    The published weights expect ImageNet's mean and deviation; here images are scaled
    by their percentiles, which the first layers have to make up for.
    """
    copy = model.copy()
    trunk, config = getattr(copy.network, "features", None), model.config
    if not isinstance(trunk, nn.Module) or config.norm != "none":
        raise ValueError(
            "`model` must have a VGG trunk without norm (fcn-32s, fcn-16s, fcn-8s, "
            f"vgg19-unet), got {config.name} with norm {config.norm!r}."
        )
    name = io.shown(path)
    try:
        with safe_open(path, "pt") as file:
            known = set(file.keys())
            for key, own in trunk.state_dict().items():
                if f"features.{key}" not in known:
                    raise ValueError(
                        f"`{name}` has no `features.{key}`, so it is not the trunk of "
                        f"{config.name}. Choose the weights of another VGG."
                    )
                given = file.get_tensor(f"features.{key}")
                if key == "0.weight" and given.ndim == 4:
                    given = _folded(given, given.shape[1], config.in_channels)
                if given.shape != own.shape:
                    raise ValueError(
                        f"`features.{key}` of `{name}` must have the shape "
                        f"{tuple(own.shape)}, got {tuple(given.shape)}. Give the "
                        "network the width of the file, mostly 64."
                    )
                own.copy_(given)
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"`{name}` cannot be read as a safetensors file: {error!s:.100}. Check its "
            "name, or convert the weights to safetensors."
        ) from None
    copy.provenance["digest"] = hashlib.sha256(
        b"".join(v.numpy().tobytes() for v in trunk.state_dict().values())
    ).hexdigest()
    return copy


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
