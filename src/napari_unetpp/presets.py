"""The papers' recipes by name: a network and how it is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from napari_unetpp.config import (
    NetConfig,
    TrainConfig,
    check_choice,
    published_config,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

# Nothing of what suits strokes: the papers learn from dense masks.
_DENSE = TrainConfig(
    pretrained=False,
    edges=0.0,
    forest=0.0,
    balance=0.0,
    prior=0.0,
    averaging=0.0,
    held_out=0.0,
    warp_after=0,
    right_angles=False,
    rotation=0.0,
    scale=0.0,
    elastic_sigma=0.0,
    gain=0.0,
    offset=0.0,
)
_RECIPES: dict[str, tuple[str, TrainConfig, str]] = {
    "fcn-2015": (
        "fcn-8s",
        # A rate of 1e-4 is the paper's, for a trunk that already knows ImageNet.
        _DENSE.replaced(
            optimizer="sgd",
            learning_rate=1e-4,
            momentum=0.9,
            nesterov=False,
            weight_decay=5e-4,
            batch=20,
            patch=256,
            score_every=100,
            patience=20,
        ),
        "FCN-8s: SGD with momentum 0.9, batch 20, no class balance",
    ),
    "unet-2015": (
        "unet-valid",
        _DENSE.replaced(
            optimizer="sgd",
            learning_rate=1e-3,
            momentum=0.99,
            nesterov=False,
            weight_decay=0.0,
            clip=1.0,
            batch=1,
            patch=388,
            balance=1.0,
            border=10.0,
            border_sigma=5.0,
            right_angles=True,
            rotation=180.0,
            elastic_sigma=10.0,
            elastic_spacing=150.0,
            gain=0.2,
            offset=0.1,
            score_every=100,
            patience=30,
        ),
        "U-Net: SGD with momentum 0.99, one tile of 572 px, border weights, dropout",
    ),
    "unetpp-2018": (
        "unet++",
        _DENSE.replaced(
            optimizer="adam",
            learning_rate=3e-4,
            weight_decay=2e-4,  # the gradient of the authors' L2 penalty of 1e-4
            loss="bce_dice",
            batch=16,
            patch=96,
            right_angles=True,
            score_every=100,
            patience=30,
        ),
        "UNet++: Adam 3e-4, BCE and Dice at every head, early stopping",
    ),
    "vgg19-frozen": (
        "vgg19-unet",
        _DENSE.replaced(
            optimizer="adam",
            learning_rate=1e-3,
            weight_decay=0.0,
            batch=16,
            patch=224,
            frozen_steps=2000,
            thawed=1,
            thaw_rate=0.1,
            score_every=100,
            patience=20,
        ),
        "VGG19 U-Net: the trunk is frozen first, then its last convolution learns",
    ),
}
PRESETS = tuple(_RECIPES)


class Preset(NamedTuple):
    """A recipe: `network` and `config` as `train` takes them.

    Attributes
    ----------
    network : NetConfig
        The published network.
    config : TrainConfig
        How it is trained.
    summary : str
        Both in a few words.
    """

    network: NetConfig
    config: TrainConfig
    summary: str


def preset(name: str, in_channels: int = 1, classes: int | Sequence[str] = 2) -> Preset:
    """Return the recipe of a paper, to train as it is or `replaced` in parts.

    Parameters
    ----------
    name : str
        One of `PRESETS`.
    in_channels : int, optional
        Channels of the images, 1 to 16.
    classes : int or sequence of str, optional
        The classes, the background first, or how many they are.

    Returns
    -------
    Preset

    Raises
    ------
    ValueError
        If there is no such recipe or a number is out of range.

    Notes
    -----
    What a paper does not say is ours: U-Net's learning rate (1e-3 for a mean over
    pixels) and the limit 1 of its gradient's norm; the UNet++ paper's batch (16) and
    patience; all intervals between two scores; mirrored and turned patches in UNet++.
    U-Net's deformation has control points every 150 px, as its authors' code. FCN's and
    VGG19's trunks start at random; FCN's rate of 1e-4 is meant for ImageNet weights.

    References
    ----------
    .. [1] Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR
           2015, :DOI:`10.1109/CVPR.2015.7298965`
    .. [2] Ronneberger et al., U-Net, MICCAI 2015, :DOI:`10.1007/978-3-319-24574-4_28`
    .. [3] Zhou et al., UNet++, DLMIA 2018, :DOI:`10.1007/978-3-030-00889-5_1`
    .. [4] Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale
           Image Recognition, ICLR 2015, :DOI:`10.48550/arXiv.1409.1556`
    """
    check_choice("name", name, PRESETS)
    network, config, summary = _RECIPES[name]
    outputs = classes if isinstance(classes, int) else len(classes)
    return Preset(published_config(network, in_channels, outputs), config, summary)
