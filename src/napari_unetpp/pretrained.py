"""The weights that ship, or a trunk's: what a network knows before it is trained."""

from __future__ import annotations

import hashlib
import os
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pooch
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from napari_unetpp import io
from napari_unetpp.errors import ModelFileError
from napari_unetpp.model import load_model

if TYPE_CHECKING:
    from napari_unetpp.model import Model
    from napari_unetpp.networks import SegmentationNet

_FOLDER = Path(__file__).parent / "weights"
_FILES = {"unet++": "unetpp-nuclei.safetensors"}

_PUBLISHER = "https://download.pytorch.org/models/"
# Their names end with the first digits of the file's SHA-256.
_PUBLISHED = {"vgg16": "vgg16-397923af.pth", "vgg19": "vgg19-dcbb9e9d.pth"}
_VGG_WIDTH = 64
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean, deviation of 0 to 1
_DENSE = {
    f"classifier.{n}.{kind}": f"{layer}.{kind}"
    for n, layer in ((0, "fc6"), (3, "fc7"))
    for kind in ("weight", "bias")
}


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


def load_trunk(model: Model, path: str | os.PathLike[str]) -> Model:
    """Return a copy of a model whose VGG trunk has the weights of a file.

    Parameters
    ----------
    model : Model
        Of an FCN or the VGG19 U-Net, in the width of the file (64) and without norm.
    path : path or "imagenet"
        A .safetensors file with ``features.N.weight`` and ``features.N.bias`` as
        torchvision's VGG16 and VGG19 have them, and for a published FCN perhaps
        ``classifier.0`` and ``classifier.3`` (fc6 and fc7); whatever else it holds is
        ignored. "imagenet": the weights that torchvision publishes [1]_, fetched once
        (about 550 MB) and kept in the user's cache.

    Returns
    -------
    Model
        The first convolution is folded for other numbers of channels than three.

    Raises
    ------
    ValueError
        If the model has no such trunk, or the file's does not fit it.
    ModelFileError
        If the file is missing, damaged or no safetensors file, or cannot be fetched.

    Notes
    -----
    "imagenet" scales the first convolution so that it reads images in 0 to 1, as here
    (percentiles), instead of ImageNet's mean and deviation. A file is taken as it is.

    References
    ----------
    .. [1] Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale
           Image Recognition, ICLR 2015, :DOI:`10.48550/arXiv.1409.1556`
    """
    copy = model.copy()
    trunk, config = getattr(copy.network, "features", None), model.config
    if not isinstance(trunk, nn.Module) or config.norm != "none":
        raise ValueError(
            "`model` must have a VGG trunk without norm (fcn-32s, fcn-16s, fcn-8s, "
            f"vgg19-unet), got {config.name} with norm {config.norm!r}."
        )
    if os.fspath(path) == "imagenet":
        if config.width != _VGG_WIDTH:
            raise ValueError(
                f"ImageNet's trunk has the width {_VGG_WIDTH}, got {config.width}. "
                f"Create the model from `published_config({config.name!r})`."
            )
        path = _fetched("vgg19" if config.name == "vgg19-unet" else "vgg16")
    _fill_trunk(copy, trunk, path)
    copy.provenance["digest"] = hashlib.sha256(
        b"".join(v.numpy().tobytes() for v in trunk.state_dict().values())
    ).hexdigest()
    return copy


@torch.no_grad()
def _fill_trunk(model: Model, trunk: nn.Module, path: str | os.PathLike[str]) -> None:
    name = io.shown(path)
    try:
        with safe_open(path, "pt") as file:
            known = set(file.keys())
            for key, own in trunk.state_dict().items():
                if f"features.{key}" not in known:
                    raise ValueError(
                        f"`{name}` has no `features.{key}`, so it is not the trunk of "
                        f"{model.config.name}. Choose the weights of another VGG."
                    )
                given = file.get_tensor(f"features.{key}")
                if key == "0.weight" and given.ndim == 4:
                    given = _folded(given, given.shape[1], model.config.in_channels)
                if given.shape != own.shape:
                    raise ValueError(
                        f"`features.{key}` of `{name}` must have the shape "
                        f"{tuple(own.shape)}, got {tuple(given.shape)}. Give the "
                        "network the width of the file, mostly 64."
                    )
                own.copy_(given)
            for key, layer in _DENSE.items():
                own = model.network.state_dict().get(layer)
                if own is not None and key in known:
                    given = file.get_tensor(key)
                    # The FCN for work has fewer channels here than VGG16.
                    if given.numel() == own.numel():
                        own.copy_(given.view_as(own))
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"`{name}` cannot be read as a safetensors file: {error!s:.100}. Check its "
            "name, or convert the weights to safetensors."
        ) from None


def _fetched(vgg: str) -> Path:
    """Return the file with ImageNet's weights, made from torchvision's where needed."""
    folder = Path(pooch.os_cache("napari-unetpp"))
    published = _PUBLISHED[vgg]
    kept = folder / f"{published.removesuffix('.pth')}.safetensors"
    if kept.exists():
        return kept
    source = Path(torch.hub.get_dir()) / "checkpoints" / published
    if not source.exists():
        url = _PUBLISHER + published
        try:
            source = Path(
                pooch.retrieve(
                    url,
                    known_hash=None,  # published are the first digits alone: below
                    fname=published,
                    path=folder,
                    progressbar=sys.stderr is not None and sys.stderr.isatty(),
                )
            )
        except OSError as error:
            raise ModelFileError(
                f"ImageNet's weights must be fetched once, but `{url}` did not answer "
                f"({type(error).__name__}). Connect to the network, or bring the file "
                f"to `{folder}`."
            ) from None
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(published.split("-")[1].removesuffix(".pth")):
        if source.parent == folder:
            source.unlink()
        raise ModelFileError(
            f"`{io.shown(source)}` is not the published file: its SHA-256 begins with "
            f"{digest[:8]}. Delete it where it is still there, and try again."
        )
    weights = torch.load(source, map_location="cpu", weights_only=True, mmap=False)
    found = {
        key: value.contiguous()
        for key, value in weights.items()
        if key.startswith("features.") or (vgg == "vgg16" and key in _DENSE)
    }
    first, mean, deviation = found["features.0.weight"], *map(torch.tensor, _IMAGENET)
    first = first / deviation[:, None, None]
    found["features.0.weight"] = first
    found["features.0.bias"] = found["features.0.bias"] - first.sum((2, 3)) @ mean
    folder.mkdir(parents=True, exist_ok=True)
    io.atomic_write(kept, save(found), overwrite=True)
    if source.parent == folder:
        source.unlink()
    return kept


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
