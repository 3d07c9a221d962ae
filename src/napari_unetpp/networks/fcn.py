"""FCN-32s, FCN-16s and FCN-8s: a VGG16 that scores pixels at three strides."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from napari_unetpp.networks.blocks import (
    SegmentationNet,
    Span,
    conv_span,
    deconv_span,
    dropout_layer,
    join_spans,
)
from napari_unetpp.networks.vgg import VGG16, vgg_features, vgg_widths

if TYPE_CHECKING:
    from napari_unetpp.config import NetConfig

# Per network: (name, kernel, stride, crop of the paper) of each upsampling. What is
# cropped is the next skip (pool4, then pool3), or in the end the logits.
_UPS = {
    "fcn-32s": (("upscore", 64, 32, 19),),
    "fcn-16s": (("upscore2", 4, 2, 5), ("upscore16", 32, 16, 27)),
    "fcn-8s": (
        ("upscore2", 4, 2, 5),
        ("upscore_pool4", 4, 2, 9),
        ("upscore8", 16, 8, 31),
    ),
}
_FC6 = 7


class FCN(SegmentationNet):
    """FCN: scores at stride 32, plus those of pool4 and pool3, upsampled bilinearly.

    Parameters
    ----------
    config : NetConfig
        "fcn-32s", "fcn-16s" or "fcn-8s". `dropout` follows fc6 and fc7.

    Notes
    -----
    The layers have the names of the authors' network. With `published` so has the
    geometry: 100 pixels of zeros around the image, poolings that round up, fc6 without
    padding, crops; inputs of any size. Else all layers keep the size, fc6 and fc7 have
    a quarter of the channels, and sides are multiples of 32. In both the upsampling
    stays bilinear (the authors' code; the paper lets the middle ones learn), and score
    layers start at 0, the trunk as He et al., not at 0.

    References
    ----------
    .. [1] Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR
           2015, :DOI:`10.1109/CVPR.2015.7298965`
    """

    def __init__(self, config: NetConfig) -> None:
        super().__init__(config)
        self.ups = _UPS[config.name]
        classes = config.out_channels
        widths = vgg_widths(config.width)
        hidden = config.width * (64 if config.published else 16)
        self.features = vgg_features(
            config,
            VGG16,
            padding=100 if config.published else 1,
            ceil_mode=config.published,
        )
        padding = 0 if config.published else _FC6 // 2
        self.fc6 = nn.Conv2d(widths[4], hidden, _FC6, padding=padding)
        self.drop6 = dropout_layer(config.dropout)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.drop7 = dropout_layer(config.dropout)
        self.score_fr = nn.Conv2d(hidden, classes, 1)
        for name, level in self._skips():
            self.add_module(name, nn.Conv2d(widths[level - 1], classes, 1))
        for name, kernel, stride, _ in self.ups:
            padding = 0 if config.published else (kernel - stride) // 2
            up = nn.ConvTranspose2d(
                classes, classes, kernel, stride, padding=padding, bias=False
            )
            self.add_module(name, up.requires_grad_(False))

    def _skips(self) -> list[tuple[str, int]]:
        """Return the names of the skips' score layers and the poolings they read."""
        return [("score_pool4", 4), ("score_pool3", 3)][: len(self.ups) - 1]

    def score_biases(self) -> list[nn.Parameter]:
        """Return the biases of the coarsest scores."""
        return [cast("nn.Parameter", self.score_fr.bias)]

    @torch.no_grad()
    def draw_weights(self, generator: torch.Generator) -> None:
        """Draw the trunk as He et al.; scores 0, upsampling bilinear."""
        super().draw_weights(generator)
        for name, module in self.named_children():
            if name.startswith("score"):
                cast("nn.Conv2d", module).weight.zero_()
            elif name.startswith("upscore"):
                weight = cast("nn.ConvTranspose2d", module).weight
                kernel = bilinear_kernel(weight.shape[-1]).to(weight)
                same = torch.eye(len(weight)).to(weight)  # each class from itself
                weight.copy_(same[..., None, None] * kernel)

    def forward(
        self, x: Tensor, depth: int | None = None, *, last_only: bool = False
    ) -> list[Tensor]:
        """Return the logits, in a list of one; see `SegmentationNet`."""
        del last_only  # there is only one head
        self.check_input(x, self.checked_depth(depth))
        height, width = x.shape[-2:]
        pools: list[Tensor] = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(x)  # (N, F, H/2^i, W/2^i)
        x = self.drop6(F.relu(self.fc6(x), inplace=True))
        x = self.drop7(F.relu(self.fc7(x), inplace=True))
        x = self.score_fr(x)  # (N, K, H/32, W/32)
        skips = self._skips()
        for i, (name, _, _, crop) in enumerate(self.ups):
            x = getattr(self, name)(x)
            crop = crop if self.config.published else 0
            if i < len(skips):
                skip, level = skips[i]
                scores = getattr(self, skip)(pools[level - 1])
                x = x + _cropped(scores, crop, *x.shape[-2:])
            else:
                x = _cropped(x, crop, height, width)
        return [x]

    def reach(self, span: Span, depth: int) -> Span:
        """Return which input pixels the output pixels `span` read, along one axis."""
        published = self.config.published
        needs: dict[int, Span] = {}
        levels = [level for _, level in self._skips()] + [0]
        for (_, kernel, stride, crop), level in zip(
            reversed(self.ups), reversed(levels), strict=True
        ):
            cropped = _shifted(span, crop if published else 0)
            if level:
                needs[level] = cropped
            else:
                span = cropped
            padding = 0 if published else (kernel - stride) // 2
            span = deconv_span(span, kernel, stride, padding)
        span = conv_span(span, _FC6, padding=0 if published else _FC6 // 2)
        for level in range(depth, 0, -1):
            span = conv_span(join_spans(span, needs.get(level, span)), 2, 2)
            count = VGG16[level - 1]
            span = conv_span(span, 2 * count + 1, padding=count)
        return _shifted(span, -99 if published else 0)

    def check_size(self, height: int, width: int, depth: int) -> None:
        """Raise ValueError unless the network takes images of this size, in pixels."""
        if not self.config.published:
            super().check_size(height, width, depth)


def bilinear_kernel(size: int) -> Tensor:
    """Return the (size, size) kernel of bilinear upsampling by size / 2, float32.

    Each phase of the kernel sums to 1.
    """
    factor = (size + 1) // 2
    middle = factor - 1 if size % 2 else factor - 0.5
    line = 1 - (torch.arange(size, device="cpu") - middle).abs() / factor
    return torch.outer(line, line)


def _cropped(x: Tensor, offset: int, height: int, width: int) -> Tensor:
    return x[..., offset : offset + height, offset : offset + width]


def _shifted(span: Span, offset: int) -> Span:
    return span[0] + offset, span[1] + offset
