"""U-Net, in the original valid form, with "same" padding, and as UNet++'s baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from napari_unetpp.networks.blocks import (
    Block,
    Head,
    SegmentationNet,
    Span,
    Unit,
    conv_span,
    join_spans,
    up_layer,
    up_span,
)

if TYPE_CHECKING:
    from napari_unetpp.config import NetConfig

Node = tuple[int, int]


class UNet(SegmentationNet):
    """U-Net, its blocks named as in UNet++: X^{i,0} goes down, X^{i,levels-i} up.

    ``x_i_j`` is the block of X^{i,j}, ``up_i_j`` brings X^{i+1,j-1} into it, and
    ``head_d`` turns X^{0,d} into logits. Blocks read [up, skips ...].

    Parameters
    ----------
    config : NetConfig
        "unet", "unet-valid" or "wide-unet".

    Notes
    -----
    Dropout: "wide-unet" after each convolution, as UNet++'s authors; the others after
    the two lowest levels, as the released U-Net, where a skip is dropped out, too.
    Valid form: an input of ``2**D * m + 2**(D+2) - 4`` pixels (D = levels) gives an
    output smaller by ``12 * 2**D - 8`` (572 to 388). Here other sizes are refused: the
    pooling would drop rows and shift the map. The up-convolution has no ReLU (the
    paper's text; the released network has one).

    References
    ----------
    .. [1] Ronneberger et al., U-Net, MICCAI 2015, :DOI:`10.1007/978-3-319-24574-4_28`
    """

    def __init__(self, config: NetConfig) -> None:
        super().__init__(config)
        self.valid = config.name == "unet-valid"
        self.depths = self._head_depths()
        for i, j in self.nodes(config.levels):
            if j:
                up = up_layer(config, self._features(i + 1), self._features(i))
                self.add_module(f"up_{i}_{j}", up)
            block = Block(
                self._inputs(i, j),
                self._features(i),
                norm=config.norm,
                padding=0 if self.valid else 1,
                dropout=self._dropout(i, j),
                residual=config.residual,
            )
            self.add_module(f"x_{i}_{j}", block)
        if config.refine:
            self.detail = Unit(config.in_channels, Head.DETAIL, config.norm)
        for d in self.depths:
            corrects = config.residual and d > self.depths[0]
            self.add_module(f"head_{d}", Head(config, corrects=corrects))

    def score_biases(self) -> list[nn.Parameter]:
        """Return the biases of the heads' last convolutions; see the base class."""
        heads = [getattr(self, f"head_{d}") for d in self.depths]
        return [head.score.bias for head in heads if not head.corrects]

    def nodes(self, depth: int) -> list[Node]:
        """Return the nodes (i, j) that X^{0,depth} needs, in computable order."""
        down = [(i, 0) for i in range(depth + 1)]
        return down + [(i, depth - i) for i in reversed(range(depth))]

    def skips(self, i: int, j: int) -> list[Node]:
        """Return the nodes of level `i` that X^{i,j} reads besides the one below."""
        return [(i, 0)] if j else []

    def _head_depths(self) -> tuple[int, ...]:
        return (self.config.levels,)

    def _features(self, i: int) -> int:
        return int(self.config.width * 2**i)

    def _inputs(self, i: int, j: int) -> int:
        """Return the channels that X^{i,j} reads."""
        if j == 0:
            image = self.config.in_channels * self.config.stem**2
            return self._features(i - 1) if i else image
        up = self._features(i if self.config.up == "transposed" else i + 1)
        return up + len(self.skips(i, j)) * self._features(i)

    def _dropout(self, i: int, j: int) -> tuple[float, float]:
        """Return the dropout after the two convolutions of X^{i,j}."""
        rate = self.config.dropout
        if self.config.name not in ("unet", "unet-valid"):
            return rate, rate
        return 0.0, rate if j == 0 and i >= self.config.levels - 1 else 0.0

    def forward(
        self, x: Tensor, depth: int | None = None, *, last_only: bool = False
    ) -> list[Tensor]:
        """Return the logits of the heads 1 to `depth`; see `SegmentationNet`."""
        depth = self.checked_depth(depth)
        self.check_input(x, depth)
        maps: dict[Node, Tensor] = {}
        for i, j in self.nodes(depth):
            maps[i, j] = self._node(i, j, maps, x)  # (N, F 2^i, H/2^i, W/2^i)
            if i + j == depth and i:  # no later node reads what lies beside or below
                maps = {n: m for n, m in maps.items() if n[0] < i or n == (i, j)}
        detail = self.detail(x) if self.config.refine else None
        found: list[Tensor] = []
        for d in [d for d in self.depths if d <= depth]:
            head = getattr(self, f"head_{d}")
            if last_only and d < depth and not self.config.residual:
                continue
            logits = head(maps[0, d], detail)
            found.append(found[-1] + logits if head.corrects else logits)
        return found[-1:] if last_only else found

    def _node(self, i: int, j: int, maps: dict[Node, Tensor], x: Tensor) -> Tensor:
        """Return X^{i,j} from the nodes before it."""
        if j:
            up = getattr(self, f"up_{i}_{j}")(maps[i + 1, j - 1])
            skips = [centre(maps[node], up) for node in self.skips(i, j)]
            inputs = torch.cat([up, *skips], 1)
        elif i:
            inputs = F.max_pool2d(maps[i - 1, 0], 2)
        else:
            inputs = x if self.config.stem == 1 else F.pixel_unshuffle(x, 2)
        result: Tensor = getattr(self, f"x_{i}_{j}")(inputs)
        return result

    def reach(self, span: Span, depth: int) -> Span:
        """Return the input pixels that the output pixels `span` read ("same" only)."""
        config = self.config
        image = span
        if config.refine:
            span = conv_span(span, 3, padding=1)
            image = conv_span(span, 3, padding=1)
        needs = {(0, depth): up_span(span, "transposed") if config.stem == 2 else span}
        for i, j in reversed(self.nodes(depth)):
            inputs = conv_span(needs[i, j], 5, padding=2)  # two 3x3 convolutions
            if j:
                below, read = (i + 1, j - 1), up_span(inputs, config.up)
                needs[below] = join_spans(needs.get(below, read), read)
                for skip in self.skips(i, j):
                    needs[skip] = join_spans(needs.get(skip, inputs), inputs)
            elif i:
                read = conv_span(inputs, 2, 2)
                needs[i - 1, 0] = join_spans(needs.get((i - 1, 0), read), read)
            else:
                image = join_spans(
                    image, conv_span(inputs, 2, 2) if config.stem == 2 else inputs
                )
        return image

    @property
    def margin(self) -> int:
        """Pixels per side by which the output is smaller than the input."""
        return 6 * 2**self.config.levels - 4 if self.valid else 0

    def halo(self, depth: int | None = None) -> int:
        """Return the context of a tile, in pixels per side; valid form: the margin."""
        return self.margin if self.valid else super().halo(depth)

    def valid_size(self, size: int, depth: int | None = None) -> int:
        """Return the smallest input side whose output covers `size` pixels."""
        if not self.valid:
            return super().valid_size(size, depth)
        # Outputs are 4 pixels more than a multiple of 2^levels.
        step = self.multiple(depth)
        return max(-(-(size - 4) // step), 0) * step + 4 + 2 * self.margin

    def check_size(self, height: int, width: int, depth: int) -> None:
        """Raise ValueError unless the network takes images of this size, in pixels."""
        if not self.valid:
            super().check_size(height, width, depth)
            return
        for side in (height, width):
            above = self.valid_size(side - 2 * self.margin)
            if side == above:
                continue
            step, least = self.multiple(), self.valid_size(1)
            fits = f"{above}" if above == least else f"{above - step} or {above}"
            raise ValueError(
                f"The valid U-Net takes sides of {step} m + {least % step} pixels, at "
                f"least {least}, got {side}. Use {fits}."
            )


def centre(x: Tensor, like: Tensor) -> Tensor:
    """Return the centre of `x` with the height and width of `like`."""
    height, width = like.shape[-2:]
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    if not (top or left):
        return x
    return x[..., top : top + height, left : left + width]
