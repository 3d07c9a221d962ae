"""The pieces that the networks are made of, and what every network can tell."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence

    from napari_unetpp.config import NetConfig, Norm

Span = tuple[int, int]
"""The first pixel and one past the last, along one axis; may be negative."""


class SegmentationNet(nn.Module):
    """A network from an image (N, C, H, W) to logits (N, K, H, W), one per head.

    Parameters
    ----------
    config : NetConfig
        The settings that build this network again.

    Attributes
    ----------
    config : NetConfig
        The settings.
    depths : tuple of int
        The depths that have a head, shallow first.
    """

    depths: tuple[int, ...]

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.config = config
        self.depths = (config.levels,)

    def forward(
        self, x: Tensor, depth: int | None = None, *, last_only: bool = False
    ) -> list[Tensor]:
        """Return the logits of the heads 1 to `depth`, shallow first.

        Parameters
        ----------
        x : Tensor
            (N, C, H, W), float.
        depth : int, optional
            One of `depths`; the deepest if None. Only what it needs is computed.
        last_only : bool
            Only the head of `depth`.

        Returns
        -------
        list of Tensor
            Logits (N, K, H, W), smaller by `margin` on each side.

        Raises
        ------
        ValueError
            If there is no head at `depth` or H or W does not fit.
        """
        raise NotImplementedError

    def reach(self, span: Span, depth: int) -> Span:
        """Return which input pixels the output pixels `span` read, along one axis."""
        raise NotImplementedError

    def multiple(self, depth: int | None = None) -> int:
        """Return by what H, W and the offsets of tiles must be divisible, in pixels."""
        return int(self.config.stem * 2 ** self.checked_depth(depth))

    @property
    def margin(self) -> int:
        """Pixels per side by which the output is smaller than the input."""
        return 0

    def valid_size(self, size: int, depth: int | None = None) -> int:
        """Return the smallest input side whose output covers `size` pixels."""
        return round_up(max(size, 1), self.multiple(depth))

    def halo(self, depth: int | None = None) -> int:
        """Return the context, in pixels per side, that makes a tile equal the whole.

        Parameters
        ----------
        depth : int, optional
            One of `depths`; the deepest if None.

        Returns
        -------
        int
            A multiple of `multiple`; exact for tiles whose offset is one, too, and
            for norms with fixed statistics.
        """
        depth = self.checked_depth(depth)
        step = self.multiple(depth)
        first, stop = self.reach((0, step), depth)
        return round_up(max(-first, stop - step), step)

    def macs(
        self,
        height: int,
        width: int,
        depth: int | None = None,
        last_only: bool = True,
    ) -> int:
        """Return the multiply-accumulates of all convolutions for one image.

        Parameters
        ----------
        height, width : int
            Size of the input, in pixels.
        depth : int, optional
            One of `depths`; the deepest if None.
        last_only : bool
            Only the head of `depth`, else all heads up to it.
        """
        total = 0

        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total
            weight = cast("Tensor", layer.weight)  # transposed: one use per input pixel
            transposed = isinstance(layer, nn.ConvTranspose2d)
            spread = inputs[0] if transposed else output
            total += weight.numel() * spread.shape[-2] * spread.shape[-1]

        with torch.device("meta"), torch.no_grad():
            twin = type(self)(self.config).eval()
            for module in twin.modules():
                if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                    module.register_forward_hook(count)
            twin(
                torch.empty(1, self.config.in_channels, height, width),
                depth,
                last_only=last_only,
            )
        return total

    def score_biases(self) -> list[nn.Parameter]:
        """Return the biases that every logit of a head contains once."""
        raise NotImplementedError

    def add_to_logits(self, values: Sequence[float]) -> None:
        """Add a constant per class to the logits of all heads; nothing if empty."""
        if not values:
            return
        with torch.no_grad():
            for bias in self.score_biases():
                offset = torch.as_tensor(values, dtype=bias.dtype, device=bias.device)
                bias.add_(offset.repeat_interleave(bias.numel() // len(values)))

    @torch.no_grad()
    def draw_weights(self, generator: torch.Generator) -> None:
        """Draw all weights as He et al. for ReLU: N(0, sqrt(2 / fan-in)), biases 0.

        The four pixels that a head unfolds start with the same weights [2]_; drawn on
        their own they would print a checkerboard on early predictions.

        References
        ----------
        .. [1] He et al., Delving Deep into Rectifiers, ICCV 2015,
               :DOI:`10.1109/ICCV.2015.123`
        .. [2] Aitken et al., Checkerboard artifact free sub-pixel convolution, 2017,
               :arXiv:`1707.02937`
        """
        for module in self.modules():
            if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                continue
            # (out, in, k, k) or, transposed, (in, out, k, k): there fan-in is out k k.
            deviation = math.sqrt(2 / module.weight[0].numel())
            if not module.weight.is_meta:
                module.weight.normal_(0, deviation, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        for head in self.modules():
            if isinstance(head, Head) and head.unfold:
                weight = head.score.weight  # (4 K, F, 1, 1), a pixel's four in a row
                weight.copy_(weight[::4].repeat_interleave(4, dim=0))
            if isinstance(head, Head) and head.corrects:
                head.score.weight.zero_()

    def checked_depth(self, depth: int | None) -> int:
        """Return `depth`, or the deepest if None; ValueError if it has no head."""
        if depth is None:
            return self.depths[-1]
        if depth not in self.depths:
            heads = ", ".join(map(str, self.depths))
            raise ValueError(
                f"`depth` must be a depth with a head ({heads}), got {depth!r}."
            )
        return depth

    def check_input(self, x: Tensor, depth: int) -> None:
        """Raise ValueError unless the network can take `x` (N, C, H, W)."""
        if x.ndim != 4 or x.shape[1] != self.config.in_channels or not x.numel():
            raise ValueError(
                f"The input must be (N, {self.config.in_channels}, H, W), not empty, "
                f"got shape {tuple(x.shape)}."
            )
        height, width = x.shape[-2:]
        self.check_size(height, width, depth)

    def check_size(self, height: int, width: int, depth: int) -> None:
        """Raise ValueError unless the network takes images of this size, in pixels."""
        step = self.multiple(depth)
        if height % step or width % step:
            fits = [self.valid_size(side, depth) for side in (height, width)]
            raise ValueError(
                f"Height and width must be multiples of {step} at depth {depth}, got "
                f"{height} x {width}. Pad the image to {fits[0]} x {fits[1]}."
            )


class _GroupNormCPU(torch.autograd.Function):
    """Group norm whose gradient is made of a few whole passes over memory.

    torch's own walks the groups one by one, which costs six times as much where a
    group is two channels of a channels-last map, and more in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        """Normalise (N, C, H, W)."""
        n, c, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(
            x, weight, bias, n, c, h * w, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients by x, weight and bias."""
        x, weight, mean, rstd = ctx.saved_tensors
        (n, c), groups = x.shape[:2], mean.shape[1]
        shape, pixels = (n, groups, c // groups), x.shape[2] * x.shape[3]
        weight, mean, rstd = (
            weight.view(1, *shape[1:]),
            mean[..., None],
            rstd[..., None],
        )
        values, g = x.to(mean.dtype), grad.to(mean.dtype)
        by_bias = g.sum((2, 3)).view(shape)
        by_weight = ((g * values).sum((2, 3)).view(shape) - mean * by_bias) * rstd
        # What the gradient has in common with the normalised values and with 1.
        along, level = (
            (v * weight).sum(2, keepdim=True) * (rstd / (pixels * shape[2]))
            for v in (by_weight, by_bias)
        )
        slope = (-along * rstd).expand(shape).reshape(n, c, 1, 1)
        shift = (along * rstd * mean - level).expand(shape).reshape(n, c, 1, 1)
        by_x = torch.addcmul(shift, values, slope)
        by_x.addcmul_(g, (weight * rstd).view(n, c, 1, 1))
        sums = (v.sum(0).flatten() for v in (by_weight, by_bias))
        return by_x.to(x.dtype), *sums, None, None


class GroupNorm(nn.GroupNorm):
    """Group norm over gcd(8, channels) groups, whose statistics can be held fixed.

    Attributes
    ----------
    fixed : tuple of Tensor or None
        Scale and shift per channel, (1, C, 1, 1), used instead of the statistics of
        the input; None: as in torch.
    pooled : bool
        Whether a batch has one set of statistics instead of one for each sample.

    References
    ----------
    .. [1] Wu and He, Group Normalization, ECCV 2018, :DOI:`10.1007/978-3-030-01261-8_1`
    """

    fixed: tuple[Tensor, Tensor] | None

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(8, channels), channels)
        self.fixed = None
        self.measuring = False
        self.pooled = False

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        if self.pooled and len(x) > 1 and self.fixed is None and not self.measuring:
            n, c, h, w = x.shape
            rows = x.permute(0, 2, 3, 1)  # as channels-last maps lie in memory
            one = self(rows.reshape(1, n * h, w, c).permute(0, 3, 1, 2))
            back: Tensor = one.permute(0, 2, 3, 1).reshape(n, h, w, c)
            return back.permute(0, 3, 1, 2)
        if self.measuring:
            self.fixed = self._measured(x)
        if self.fixed is None:
            wide = self.num_channels >= 16 * self.num_groups
            if wide or x.device.type != "cpu" or not torch.is_grad_enabled():
                return super().forward(x)
            y: Tensor = _GroupNormCPU.apply(
                x, self.weight, self.bias, self.num_groups, self.eps
            )  # type: ignore[no-untyped-call]
            return y
        scale, shift = self.fixed
        return torch.addcmul(shift, x, scale)

    def _measured(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scale and shift from the statistics of the whole batch together."""
        if self.weight.dtype == torch.float32:
            x = x.float()  # half precision (autocast) would overflow in the sums
        mean = self._pooled(x.mean((0, 2, 3)))  # (C,), equal within a group
        # Two passes: torch.var_mean over several axes is ten times slower (CPU).
        var = self._pooled((x - mean.view(1, -1, 1, 1)).square_().mean((0, 2, 3)))
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return scale.view(1, -1, 1, 1), shift.view(1, -1, 1, 1)

    def _pooled(self, values: Tensor) -> Tensor:
        """Return the mean over each group, for each of its channels (C,)."""
        groups = values.view(self.num_groups, -1).mean(1)
        return groups.repeat_interleave(self.num_channels // self.num_groups)


def normed(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Convolve and normalise: in one pass where the norm's statistics are fixed."""
    if not isinstance(norm, GroupNorm) or norm.fixed is None or norm.measuring:
        return cast("Tensor", norm(conv(x)))
    scale, shift = norm.fixed
    bias = cast("Tensor", conv.bias) * scale.flatten() + shift.flatten()
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return F.conv2d(x, weight, bias, padding=cast("tuple[int, int]", conv.padding))


@torch.no_grad()
def measure_norms(
    network: SegmentationNet, x: Tensor, depth: int | None = None
) -> list[Tensor]:
    """Fix the statistics of every group norm to those of the batch `x`.

    Parameters
    ----------
    network : SegmentationNet
        Changed in place: `GroupNorm.fixed` of every norm that `depth` needs.
    x : Tensor
        (S, C, H, W), crops of one image; their statistics are pooled.
    depth : int, optional
        As in the network's forward.

    Returns
    -------
    list of Tensor
        The logits of `x`, normalised with the new statistics. One crop: those of a
        plain forward.
    """
    norms = [m for m in network.modules() if isinstance(m, GroupNorm)]
    for norm in norms:
        norm.measuring = True
    try:
        return cast("list[Tensor]", network(x, depth))
    finally:
        for norm in norms:
            norm.measuring = False


def release_norms(network: nn.Module) -> None:
    """Let every group norm take the statistics of its own input again."""
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.fixed = None


def pool_norms(network: nn.Module, pooled: bool) -> None:
    """Let every group norm take its statistics over whole batches, or not."""
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.pooled = pooled


def norm_layer(norm: Norm, channels: int) -> nn.Module:
    """Return the layer that follows a 3x3 convolution with `channels` outputs."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return GroupNorm(channels) if norm == "group" else nn.Identity()


def dropout_layer(rate: float) -> nn.Module:
    """Return a dropout, or nothing at all for the rate 0."""
    return nn.Dropout(rate) if rate else nn.Identity()


class Unit(nn.Module):
    """3x3 convolution, norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = norm_layer(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, F, H, W)."""
        return F.relu(normed(self.conv, self.norm, x), inplace=True)


class Block(nn.Module):
    """Two 3x3 convolutions, each with norm, ReLU and dropout.

    Parameters
    ----------
    inputs, outputs : int
        Channels.
    norm : {"none", "batch", "group"}
        Norm after each convolution.
    padding : {0, 1}
        1 keeps the size, 0 takes two pixels off each side.
    dropout : tuple of float
        Probabilities after the first and after the second ReLU.
    residual : bool
        Add the first ReLU's output to what enters the second ReLU.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        norm: Norm = "none",
        padding: int = 1,
        dropout: tuple[float, float] = (0.0, 0.0),
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=padding)
        self.norm1 = norm_layer(norm, outputs)
        self.drop1 = dropout_layer(dropout[0])
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=padding)
        self.norm2 = norm_layer(norm, outputs)
        self.drop2 = dropout_layer(dropout[1])
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, F, H, W)."""
        a = self.drop1(F.relu(normed(self.conv1, self.norm1, x), inplace=True))
        b = normed(self.conv2, self.norm2, a)
        if self.residual:
            b = a + b
        return cast("Tensor", self.drop2(F.relu(b, inplace=True)))


def up_layer(config: NetConfig, inputs: int, outputs: int) -> nn.Module:
    """Return what doubles H and W; only "transposed" changes the channels."""
    if config.up == "transposed":
        return nn.ConvTranspose2d(inputs, outputs, 2, 2)
    # Aligned corners would make a tile differ from the whole, whatever its halo.
    corners = False if config.up == "bilinear" else None
    return nn.Upsample(scale_factor=2, mode=config.up, align_corners=corners)


class Head(nn.Module):
    """From the map X^{0,d} to logits at full resolution.

    Without a stem: a 1x1 convolution. With the stem's half resolution: the same with
    four logits per pixel, unfolded; with `refine`: a doubled map beside `Unit`
    features of the full-resolution image, shared by all heads, and two convolutions.
    A head that `corrects` is added to the one before it, and starts at 0.
    """

    DETAIL = 8

    def __init__(self, config: NetConfig, *, corrects: bool = False) -> None:
        super().__init__()
        self.corrects = corrects
        self.unfold = config.stem == 2 and not config.refine
        inputs, outputs = config.width, config.out_channels
        if config.refine:
            self.up = nn.ConvTranspose2d(inputs, self.DETAIL, 2, 2)
            inputs = 2 * self.DETAIL
            self.fuse = Unit(inputs, inputs, config.norm)
        self.score = nn.Conv2d(inputs, outputs * (4 if self.unfold else 1), 1)

    def forward(self, x: Tensor, detail: Tensor | None = None) -> Tensor:
        """Map (N, F, H/stem, W/stem) to (N, K, H, W)."""
        if detail is not None:
            x = self.fuse(torch.cat([self.up(x), detail], 1))  # (N, 2 * DETAIL, H, W)
        x = self.score(x)
        return F.pixel_shuffle(x, 2) if self.unfold else x


def round_up(value: int, step: int) -> int:
    """Return the smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step


def conv_span(span: Span, kernel: int, stride: int = 1, padding: int = 0) -> Span:
    """Return what a convolution or pooling reads for the outputs `span`."""
    first, stop = span
    return first * stride - padding, (stop - 1) * stride - padding + kernel


def deconv_span(span: Span, kernel: int, stride: int, padding: int = 0) -> Span:
    """Return what a transposed convolution reads for the outputs `span`."""
    first, last = span[0] + padding, span[1] - 1 + padding
    return -((kernel - 1 - first) // stride), last // stride + 1


def up_span(span: Span, up: str) -> Span:
    """Return what `up_layer` reads for the outputs `span`."""
    # Bilinear x2 weighs the same pixels as a transposed convolution of size 4.
    return deconv_span(span, 4, 2, 1) if up == "bilinear" else deconv_span(span, 2, 2)


def join_spans(a: Span, b: Span) -> Span:
    """Return the smallest span that holds both."""
    return min(a[0], b[0]), max(a[1], b[1])
