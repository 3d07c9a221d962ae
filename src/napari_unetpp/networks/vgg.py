"""The convolutions of VGG16 and VGG19, and a U-Net on VGG19."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from napari_unetpp.networks.blocks import (
    Block,
    SegmentationNet,
    Span,
    conv_span,
    join_spans,
    norm_layer,
    up_layer,
    up_span,
)

if TYPE_CHECKING:
    from napari_unetpp.config import NetConfig

VGG16 = (2, 2, 3, 3, 3)
VGG19 = (2, 2, 4, 4, 4)
"""3x3 convolutions per level."""


def vgg_widths(width: int) -> tuple[int, ...]:
    """Return the channels of the five levels."""
    return width, 2 * width, 4 * width, 8 * width, 8 * width


def vgg_features(
    config: NetConfig,
    convolutions: tuple[int, ...],
    *,
    padding: int = 1,
    ceil_mode: bool = False,
) -> nn.Sequential:
    """Return VGG's trunk, numbered as torchvision's ``vggNN.features`` (or ``_bn``).

    Parameters
    ----------
    config : NetConfig
        Input channels, width, norm.
    convolutions : tuple of int
        3x3 convolutions per level; a 2x2 pooling ends each level.
    padding : int
        Zeros around the image in the very first convolution; 1 elsewhere.
    ceil_mode : bool
        Whether the poolings keep an odd last row and column.

    References
    ----------
    .. [1] Simonyan and Zisserman, Very Deep Convolutional Networks for Large-Scale
           Image Recognition, ICLR 2015, :DOI:`10.48550/arXiv.1409.1556`
    """
    layers: list[nn.Module] = []
    inputs = config.in_channels
    for count, outputs in zip(convolutions, vgg_widths(config.width), strict=True):
        for _ in range(count):
            first = not layers
            layers.append(
                nn.Conv2d(inputs, outputs, 3, padding=padding if first else 1)
            )
            if config.norm != "none":
                layers.append(norm_layer(config.norm, outputs))
            layers.append(nn.ReLU(inplace=True))
            inputs = outputs
        layers.append(nn.MaxPool2d(2, ceil_mode=ceil_mode))
    return nn.Sequential(*layers)


class VGG19UNet(SegmentationNet):
    """VGG19's levels on the way down, U-Net's on the way up, and a 3x3 head.

    ``features`` is VGG19 without its last pooling; level i (0 to 3) has ``up_i``, from
    the level below, and ``block_i``, which reads [up, skip].

    Parameters
    ----------
    config : NetConfig
        "vgg19-unet"; `dropout` drops whole channels after each block on the way up.
    """

    def __init__(self, config: NetConfig) -> None:
        super().__init__(config)
        self.features = cast("nn.Sequential", vgg_features(config, VGG19)[:-1])
        widths = vgg_widths(config.width)
        for i in reversed(range(config.levels)):
            self.add_module(f"up_{i}", up_layer(config, widths[i + 1], widths[i]))
            up = widths[i if config.up == "transposed" else i + 1]
            self.add_module(
                f"block_{i}", Block(up + widths[i], widths[i], norm=config.norm)
            )
        self.drop = nn.Dropout2d(config.dropout)
        self.head = nn.Conv2d(config.width, config.out_channels, 3, padding=1)

    def score_biases(self) -> list[nn.Parameter]:
        """Return the bias of the head."""
        return [cast("nn.Parameter", self.head.bias)]

    def forward(
        self, x: Tensor, depth: int | None = None, *, last_only: bool = False
    ) -> list[Tensor]:
        """Return the logits, in a list of one; see `SegmentationNet`."""
        del last_only  # there is only one head
        self.check_input(x, self.checked_depth(depth))
        skips: list[Tensor] = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                skips.append(x)  # (N, F_i, H/2^i, W/2^i)
            x = layer(x)
        for i in reversed(range(self.config.levels)):
            x = torch.cat([getattr(self, f"up_{i}")(x), skips[i]], 1)
            x = self.drop(getattr(self, f"block_{i}")(x))  # (N, F_i, H/2^i, W/2^i)
        return [self.head(x)]

    def reach(self, span: Span, depth: int) -> Span:
        """Return which input pixels the output pixels `span` read, along one axis."""
        span = conv_span(span, 3, padding=1)
        skips = []
        for _ in range(depth):
            span = conv_span(span, 5, padding=2)
            skips.append(span)
            span = up_span(span, self.config.up)
        span = _level_span(span, VGG19[depth])
        for i in reversed(range(depth)):
            span = join_spans(conv_span(span, 2, 2), skips[i])
            span = _level_span(span, VGG19[i])
        return span


def _level_span(span: Span, convolutions: int) -> Span:
    return conv_span(span, 2 * convolutions + 1, padding=convolutions)
