from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from napari_unetpp.config import NETWORKS, NetConfig, published_config, working_config
from napari_unetpp.networks import SegmentationNet, build_network, prune
from napari_unetpp.networks.blocks import (
    Block,
    GroupNorm,
    measure_norms,
    release_norms,
)
from napari_unetpp.networks.fcn import FCN, bilinear_kernel
from napari_unetpp.networks.vgg import VGG19UNet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from napari_unetpp.networks.unet import UNet

SAME = ("unet", "wide-unet", "unet++")
FCNS = ("fcn-32s", "fcn-16s", "fcn-8s")


@pytest.fixture(autouse=True)
def _one_thread_one_seed():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_meta(config: NetConfig) -> SegmentationNet:
    """Build without memory for the weights."""
    with torch.device("meta"):
        return build_network(config)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def trainable(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def paper(name: str, inputs: int = 1, outputs: int = 1, **changes) -> NetConfig:
    return published_config(name, inputs, outputs).replaced(**changes)


def plain(name: str, **changes) -> NetConfig:
    """Return a tiny network without norms and dropout."""
    settings = {"width": 2, "norm": "none", "dropout": 0.0} | changes
    return published_config(name).replaced(**settings)


def built(config: NetConfig, dtype: torch.dtype = torch.float32) -> SegmentationNet:
    return build_network(config, seed=0).eval().to(dtype)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=dtype)


# --- Sizes of the networks, against the papers -------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (paper("unet", 1, 2), 31_030_658),
        (paper("unet-valid", 1, 2), 31_030_658),
        (paper("unet", 1, 1), 31_030_593),
        (paper("unet", 3, 1), 31_031_745),
        (paper("unet", 3, 2), 31_031_810),
        (paper("unet", 3, 21), 31_033_045),
        (paper("unet", 1, 2, norm="batch"), 31_042_434),
        (paper("unet", width=32), 7_759_521),
        (paper("unet", 3, width=32), 7_760_097),
        (paper("unet", width=32, up="bilinear"), 7_846_081),
        (paper("wide-unet"), 9_282_246),
        (paper("wide-unet", 3), 9_282_876),
        (paper("unet++", deep_supervision=False), 9_041_601),
        (paper("unet++"), 9_041_700),
        (paper("unet++", 3, deep_supervision=False), 9_042_177),
        (paper("unet++", 3), 9_042_276),
        (paper("unet++", deep_supervision=False, norm="batch"), 9_048_897),
        (paper("unet++", deep_supervision=False, up="bilinear"), 9_155_457),
        (paper("unet++", 3, deep_supervision=False, up="bilinear", norm="batch"),
         9_163_329),
        (paper("vgg19-unet", 3), 31_164_865),
        (paper("vgg19-unet", 3, 35), 31_184_483),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_paper(config, expected):
    assert parameters(on_meta(config)) == expected


@pytest.mark.parametrize(
    ("name", "inputs", "classes", "every", "learned"),
    [
        ("fcn-32s", 3, 21, 136_152_917, 134_346_581),
        ("fcn-16s", 3, 21, 134_815_994, 134_357_354),
        ("fcn-8s", 3, 21, 134_489_759, 134_362_751),
        ("fcn-8s", 3, 2, 134_271_430, 134_270_278),
        ("fcn-8s", 1, 2, 134_270_278, 134_269_126),
    ],
)
def test_fcn_parameters(name, inputs, classes, every, learned):
    network = on_meta(paper(name, inputs, classes))
    assert (parameters(network), trainable(network)) == (every, learned)


def test_fcn_parts():
    network = on_meta(paper("fcn-8s", 3, 21))
    parts = {name: parameters(part) for name, part in network.named_children()}
    assert parts["features"] == 14_714_688
    assert parts["fc6"] == 102_764_544
    assert parts["fc7"] == 16_781_312
    assert parts["score_fr"] == 86_037
    assert parts["score_pool4"] == 10_773
    assert parts["score_pool3"] == 5_397


def test_vgg19_unet_parts():
    network = on_meta(paper("vgg19-unet", 3))
    assert parameters(network.features) == 20_024_384
    network.features.requires_grad_(False)
    assert trainable(network) == 11_140_481
    network.features[34:].requires_grad_(True)
    assert trainable(network) == 13_500_289


NODES = {
    "x_0_0": 9_568, "x_1_0": 55_424, "x_2_0": 221_440, "x_3_0": 885_248,
    "x_4_0": 3_539_968, "x_0_1": 27_712, "up_0_1": 8_224, "x_1_1": 110_720,
    "up_1_1": 32_832, "x_2_1": 442_624, "up_2_1": 131_200, "x_3_1": 1_769_984,
    "up_3_1": 524_544, "x_0_2": 36_928, "up_0_2": 8_224, "x_1_2": 147_584,
    "up_1_2": 32_832, "x_2_2": 590_080, "up_2_2": 131_200, "x_0_3": 46_144,
    "up_0_3": 8_224, "x_1_3": 184_448, "up_1_3": 32_832, "x_0_4": 55_360,
    "up_0_4": 8_224, "head_1": 33, "head_2": 33, "head_3": 33, "head_4": 33,
}  # fmt: skip


def test_unetpp_nodes():
    network = on_meta(paper("unet++"))
    assert {name: parameters(m) for name, m in network.named_children()} == NODES


def kinds(network: nn.Module) -> tuple[int, int, int]:
    """Return the numbers of 3x3, transposed and 1x1 convolutions."""
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    ups = [m for m in network.modules() if isinstance(m, nn.ConvTranspose2d)]
    sizes = [c.kernel_size[0] for c in convs]
    return sizes.count(3), len(ups), sizes.count(1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet", (18, 4, 1)),
        ("unet-valid", (18, 4, 1)),
        ("wide-unet", (18, 4, 1)),
        ("unet++", (30, 10, 4)),
    ],
)
def test_numbers_of_convolutions(name, expected):
    network = on_meta(paper(name))
    assert kinds(network) == expected
    blocks = [m for m in network.modules() if isinstance(m, Block)]
    assert len(blocks) == expected[0] // 2


@pytest.mark.parametrize(
    ("up", "expected"),
    [("transposed", [64, 96, 128, 160]), ("bilinear", [96, 128, 160, 192])],
)
def test_channels_that_a_node_reads(up, expected):
    network = on_meta(paper("unet++", up=up))
    read = [getattr(network, f"x_0_{j}").conv1.in_channels for j in range(1, 5)]
    assert read == expected
    for i in range(4):
        for j in range(1, 5 - i):
            below = 2**i if up == "transposed" else 2 ** (i + 1)
            node = getattr(network, f"x_{i}_{j}")
            assert node.conv1.in_channels == 32 * (2**i * j + below)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_trunk_has_torchvision_names(norm):
    numbers = {
        ("vgg16", "none"): [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
        ("vgg16", "batch"): [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40],
        ("vgg19", "none"): [0, 2, 5, 7, *range(10, 17, 2), *range(19, 26, 2),
                            *range(28, 35, 2)],
        ("vgg19", "batch"): [0, 3, 7, 10, *range(14, 24, 3), *range(27, 37, 3),
                             *range(40, 50, 3)],
    }  # fmt: skip
    for trunk, name in (("vgg16", "fcn-8s"), ("vgg19", "vgg19-unet")):
        network = on_meta(working_config(name, norm=norm))
        convs = [
            int(key)
            for key, layer in network.features.named_children()
            if isinstance(layer, nn.Conv2d)
        ]
        assert convs == numbers[trunk, norm]
        keys = network.state_dict()
        assert f"features.{convs[-1]}.weight" in keys
        assert (f"features.{convs[-1] + 1}.running_mean" in keys) == (norm == "batch")


# --- Cost ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "weights", "per_pixel", "small", "middle", "large"),
    [
        (1, 100_961, 53_056, 488_964_096, 3_477_078_016, 13_908_312_064),
        (2, 511_105, 135_488, 1_248_657_408, 8_879_341_568, 35_517_366_272),
        (3, 2_204_961, 266_048, 2_451_898_368, 17_435_721_728, 69_742_886_912),
        (4, 9_041_601, 453_952, 4_183_621_632, 29_750_198_272, 119_000_793_088),
    ],
)
def test_pruned_cost(depth, weights, per_pixel, small, middle, large):
    network = on_meta(paper("unet++"))
    sizes = (96, 256, 512)
    assert [network.macs(n, n, depth) for n in sizes] == [small, middle, large]
    assert small == per_pixel * 96**2
    single = on_meta(paper("unet++", deep_supervision=False, levels=depth))
    assert parameters(single) == weights
    assert single.macs(96, 96) == small
    assert network.multiple(depth) == 2**depth


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        (paper("unet-valid", 1, 2), 572, 150_428_424_448),
        (paper("unet", 1, 2), 512, 192_384_335_872),
        (paper("unet", 1, 2), 256, 48_096_083_968),
        (paper("unet", width=32), 96, 1_692_205_056),
        (paper("wide-unet"), 96, 2_024_064_000),
    ],
)
def test_macs_of_the_paper(config, size, expected):
    assert on_meta(config).macs(size, size) == expected


def test_macs_of_all_heads():
    network = on_meta(paper("unet++"))
    found = [network.macs(n, n, last_only=False) for n in (96, 256, 512)]
    assert found == [4_184_506_368, 29_756_489_728, 119_025_958_912]


@pytest.mark.parametrize(
    "config",
    [
        *[working_config(name) for name in NETWORKS],
        working_config("unet++").replaced(refine=True, up="nearest"),
        paper("fcn-16s", width=2),
        plain("unet-valid", up="nearest"),
    ],
    ids=lambda c: f"{c.name}-{c.up}-{c.refine}-{c.published}",
)
@pytest.mark.parametrize("last_only", [True, False])
def test_macs_agree_with_torch(config, last_only):
    network = on_meta(config).eval()
    height, width = network.valid_size(64), network.valid_size(32)
    x = torch.empty(1, config.in_channels, height, width, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(x, last_only=last_only)
    macs = network.macs(height, width, last_only=last_only)
    assert 2 * macs == counter.get_total_flops()


# --- Sizes of images ----------------------------------------------------------------


@pytest.mark.parametrize("side", [188, 204, 220, 572])
def test_valid_sizes(side):
    network = built(plain("unet-valid", width=1))
    (logits,) = network(noise(1, 1, side, 188))
    assert logits.shape == (1, 2, side - 184, 4)
    assert network.margin == 92
    assert network.valid_size(side - 184) == side
    assert network.valid_size(side - 183) == side + 16


@pytest.mark.parametrize("side", [*range(189, 204), 571, 573])
def test_valid_net_refuses_misaligned_sizes(side):
    network = on_meta(plain("unet-valid"))
    below = side - (side - 12) % 16
    with pytest.raises(ValueError, match=rf"got {side}\. Use {below} or {below + 16}"):
        network(torch.empty(1, 1, 188, side, device="meta"))


def test_valid_net_refuses_small_images():
    with pytest.raises(ValueError, match=r"at least 188, got 172\. Use 188"):
        on_meta(plain("unet-valid"))(torch.empty(1, 1, 172, 188, device="meta"))


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_valid_sizes_at_other_levels(levels):
    network = on_meta(plain("unet-valid", levels=levels))
    assert 2 * network.margin == 12 * 2**levels - 8
    side = network.valid_size(5)
    assert (side - 2 ** (levels + 2) + 4) % 2**levels == 0
    (logits,) = network(torch.empty(1, 1, side, side, device="meta"))
    assert logits.shape[-1] == side - 2 * network.margin >= 5


@pytest.mark.parametrize(
    ("config", "step"),
    [
        (plain("unet"), 16),
        (plain("unet", levels=6), 64),
        (plain("unet++", stem=2), 32),
        (plain("unet++", stem=2, refine=True), 32),
        (plain("vgg19-unet"), 16),
        (plain("fcn-8s", published=False), 32),
    ],
)
def test_same_nets_keep_sizes_that_fit(config, step):
    network = on_meta(config)
    assert network.multiple() == step
    assert network.valid_size(step + 1) == 2 * step
    for logits in network(torch.empty(2, 1, step, 3 * step, device="meta")):
        assert logits.shape == (2, 2, step, 3 * step)
    with pytest.raises(ValueError, match=f"multiples of {step} .* to {step} x"):
        network(torch.empty(1, 1, step - 1, step, device="meta"))


@pytest.mark.parametrize("name", FCNS)
def test_published_fcn_takes_any_size(name):
    network = built(paper(name, width=1, dropout=0.0))
    for size in ((1, 1), (7, 33), (97, 100), (500, 375)):
        assert network(noise(1, 1, *size))[0].shape == (1, 1, *size)


@pytest.mark.parametrize("shape", [(1, 2, 16, 16), (1, 16, 16), (1, 1, 0, 16)])
@pytest.mark.parametrize("name", ["unet", "unet-valid", "fcn-8s"])
def test_wrong_shapes_are_refused(name, shape):
    with pytest.raises(ValueError, match="must be"):
        on_meta(plain(name))(torch.empty(shape, device="meta"))


# --- Which pixels are read ----------------------------------------------------------


def read_by(
    network: SegmentationNet, lines: Sequence[int], length: int, width: int
) -> list[Tensor]:
    """Return per head which output lines read the input `lines`, by NaN.

    Boolean (len(lines), output line): one image per line, in which that line is NaN.
    """
    marks = []
    for part in torch.tensor(lines).split(32):
        x = torch.zeros(len(part), network.config.in_channels, length, width)
        x[torch.arange(len(part)), :, part] = math.nan
        with torch.no_grad():
            marks.append([y.isnan().any(1).any(-1) for y in network(x)])
    return [torch.cat(parts) for parts in zip(*marks, strict=True)]


READERS = {
    "t2": plain("unet++", width=1),
    "nearest": plain("unet++", width=1, up="nearest"),
    "bilinear": plain("unet++", width=1, up="bilinear"),
    "unet": plain("unet", width=1, up="bilinear"),
    "stem": plain("unet++", width=1, levels=3, stem=2),
    "stem-bilinear": plain("unet", width=1, levels=3, stem=2, up="bilinear"),
    "refine": plain("unet++", width=1, levels=3, stem=2, refine=True),
    "vgg19": plain("vgg19-unet", width=1),
    "vgg19-bilinear": plain("vgg19-unet", width=1, up="bilinear"),
    "fcn-32s": plain("fcn-32s", width=1, published=False),
    "fcn-8s": plain("fcn-8s", width=1, published=False),
    "paper-32s": plain("fcn-32s", width=1),
    "paper-16s": plain("fcn-16s", width=1),
    "paper-8s": plain("fcn-8s", width=1),
}
LENGTHS = {"fcn": 576, "paper": 576, "vgg19": 448}


@pytest.mark.parametrize("kind", READERS)
def test_reach_is_exact(kind):
    network = built(READERS[kind])
    length = LENGTHS.get(kind.split("-")[0], 288)
    step = network.multiple()
    start = length // 2 // step * step
    spans = {
        (depth, line): network.reach((line, line + 1), depth)
        for depth in network.depths
        for line in range(start, start + step)
    }
    edges = {n for ends in spans.values() for end in ends for n in (end - 1, end)}
    lines = sorted(edges)
    marks = read_by(network, lines, length, step)
    for (depth, line), (first, stop) in spans.items():
        found = marks[network.depths.index(depth)][:, line].tolist()
        assert found == [first <= n < stop for n in lines]


@pytest.mark.parametrize("kind", READERS)
def test_halo_holds_the_reach(kind):
    network = built(READERS[kind])
    for depth in network.depths:
        step = network.multiple(depth)
        spans = [network.reach((line, line + 1), depth) for line in range(step)]
        reach = (min(a for a, _ in spans), max(b for _, b in spans))
        assert network.reach((0, step), depth) == reach
        context = max(-reach[0], reach[1] - step)
        assert context <= network.halo(depth) < context + step


RECEPTIVE = {  # per depth: smallest and largest field, pixels of context, halo
    "transposed": [(18, 18, 8, 8), (44, 44, 22, 24), (92, 100, 46, 48),
                   (188, 204, 94, 96)],
    "bilinear": [(20, 20, 10, 10), (48, 52, 26, 28), (108, 116, 54, 56),
                 (220, 236, 110, 112)],
}  # fmt: skip
RECEPTIVE["nearest"] = RECEPTIVE["transposed"]


@pytest.mark.parametrize("up", RECEPTIVE)
def test_receptive_fields_and_halos_of_the_paper(up):
    network = on_meta(paper("unet++", up=up))
    single = on_meta(paper("unet", up=up))
    for depth, expected in enumerate(RECEPTIVE[up], 1):
        step = 2**depth
        spans = [network.reach((n, n + 1), depth) for n in range(step)]
        sizes = [stop - first for first, stop in spans]
        first, stop = network.reach((0, step), depth)
        context = max(-first, stop - step)
        found = (min(sizes), max(sizes), context, network.halo(depth))
        assert found == expected
    assert network.reach((5, 6), 4) == single.reach((5, 6), 4)
    far = max(
        max(n - first, stop - 1 - n)
        for n in range(16)
        for first, stop in [network.reach((n, n + 1), 4)]
    )
    assert far == (122 if up == "bilinear" else 107)


def test_receptive_fields_of_vgg16():
    network = built(plain("fcn-32s", width=1, published=False))
    fields: dict[str, list[Tensor]] = {}

    def keep(name):
        def hook(_module, _inputs, output):
            fields.setdefault(name, []).append(output.isnan().any(1).any(-1))

        return hook

    pools = [m for m in network.features if isinstance(m, nn.MaxPool2d)]
    for name, layer in (*enumerate(pools, 1), ("fc6", network.fc6)):
        layer.register_forward_hook(keep(str(name)))
    read_by(network, range(480), 480, 32)
    found = {}
    for name, parts in fields.items():
        marks = torch.cat(parts)
        found[name] = int(marks[:, marks.shape[1] // 2].sum())
    assert found == {"1": 6, "2": 16, "3": 44, "4": 100, "5": 212, "fc6": 404}


def test_receptive_field_of_the_bottleneck():
    network = built(plain("unet", width=1))
    parts = []
    network.x_4_0.register_forward_hook(
        lambda _m, _i, output: parts.append(output.isnan().any(1).any(-1))
    )
    read_by(network, range(256), 256, 16)
    assert int(torch.cat(parts)[:, 8].sum()) == 140


@pytest.mark.parametrize(
    ("up", "halo", "equal"),
    [
        ("transposed", 96, True),
        ("transposed", 80, False),
        ("nearest", 96, True),
        ("bilinear", 112, True),
        ("bilinear", 96, False),
    ],
)
@pytest.mark.parametrize("name", ["unet", "unet++"])
def test_tile_with_halo_equals_whole(name, up, halo, equal):
    network = built(plain(name, up=up), torch.float64)
    assert network.halo() == (112 if up == "bilinear" else 96)
    x = noise(1, 1, 320, 16, dtype=torch.float64)
    core = slice(144, 176)
    whole = network(x)[-1][..., core, :]
    tile = network(x[..., core.start - halo : core.stop + halo, :])[-1]
    difference = (tile[..., halo:-halo, :] - whole).abs().max()
    assert (difference < 1e-12) == equal


@pytest.mark.parametrize(
    "config",
    [
        plain("unet++", levels=2, stem=2, residual=True),
        plain("unet++", levels=2, stem=2, refine=True, norm="batch"),
        plain("vgg19-unet", width=1),
        plain("fcn-8s", width=1, published=False),
        plain("fcn-16s", width=1),
    ],
    ids=lambda c: f"{c.name}-{c.refine}-{c.published}",
)
def test_halo_is_enough_for_every_network(config):
    network = built(config, torch.float64)
    for layer in network.modules():  # scores of 0 and dead ReLUs would hide it all
        if isinstance(layer, nn.Conv2d):
            nn.init.uniform_(layer.weight, 0, 2 / layer.weight[0].numel())
    halo, step = network.halo(), network.multiple()
    x = noise(1, 1, 2 * halo + 3 * step, step, dtype=torch.float64)
    start = halo + step
    whole = network(x)[-1][..., start : start + step, :]

    def error(context: int) -> float:
        tile = network(x[..., start - context : start + step + context, :])[-1]
        inner = tile[..., context : context + step, :]
        return float((inner - whole).detach().abs().max())

    assert error(halo) < 1e-12
    assert error(0) > 1e-6


def test_valid_tiles_equal_the_whole_where_aligned():
    network = built(plain("unet-valid"), torch.float64)
    assert network.halo() == network.margin
    x = noise(1, 1, 252, 188, dtype=torch.float64)
    (whole,) = network(x)
    for start, equal in ((16, True), (48, True), (8, False), (1, False)):
        (tile,) = network(x[..., start : start + 204, :])
        difference = (tile - whole[..., start : start + 20, :]).abs().max()
        assert (difference < 1e-10) == equal


@pytest.mark.parametrize("shift", [16, 8, 1])
def test_shift_equivariance(shift):
    network = built(plain("unet", levels=4), torch.float64)
    x = noise(1, 1, 304, 16, dtype=torch.float64)
    still = network(x[..., :288, :])[0][..., 128:160, :]
    moved = network(x[..., shift : shift + 288, :])[0][
        ..., 128 - shift : 160 - shift, :
    ]
    assert ((still - moved).abs().max() < 1e-10) == (shift == 16)


# --- What is computed ---------------------------------------------------------------


def golden_noise(count: int) -> np.ndarray:
    value = np.arange(count, dtype=np.int64)
    for _ in range(2):
        value = (value * 1103515245 + 12345) % 2**31
    return value / 2**31


@torch.no_grad()
def fill_golden(network: UNet) -> None:
    """Fill with the golden weights, made for blocks that read [skips, up]."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            shape = layer.weight.shape
            fan = layer.in_channels * (shape[-1] ** 2 if shape[-1] != 2 else 1)
            values = (golden_noise(layer.weight.numel()) - 0.5) * math.sqrt(24 / fan)
            layer.weight.copy_(torch.from_numpy(values.reshape(shape)))
            order = torch.arange(1, layer.out_channels + 1, dtype=torch.float64)
            layer.bias.copy_(0.01 * order)
    for i, j in network.nodes(network.config.levels):
        if j:
            conv = getattr(network, f"x_{i}_{j}").conv1
            conv.weight.copy_(conv.weight.roll(conv.out_channels, dims=1))


def golden(name: str, outputs: int, height: int, width: int) -> list[Tensor]:
    config = plain(name).replaced(out_channels=outputs)
    network = built(config, torch.float64)
    fill_golden(network)
    y = torch.arange(height, dtype=torch.float64)[:, None]
    x = torch.arange(width, dtype=torch.float64)
    with torch.no_grad():
        return network((torch.sin(0.3 * y) + torch.cos(0.17 * x))[None, None])


def test_golden_noise():
    expected = [
        0.6551540484651923,
        0.1757413032464683,
        0.6963285580277443,
        0.2169158128020903,
    ]
    assert golden_noise(4).tolist() == pytest.approx(expected, abs=2**-34)


@pytest.mark.parametrize(
    ("name", "size", "sums", "corners", "inner", "deviation"),
    [
        ("unet-valid", (204, 220), (223.772856401, 368.903459338),
         (0.0437529949557, 0.0683163914371), -0.0207792661585, 1.68405654438),
        ("unet", (32, 48), (623.364682013, 1004.74399638),
         (-1.40773581316, -0.208717975951), 0.193365742706, 1.89522429035),
    ],
)  # fmt: skip
def test_unet_golden_values(name, size, sums, corners, inner, deviation):
    assert parameters(on_meta(plain(name))) == 30_534
    (logits,) = golden(name, 2, *size)
    y = logits[0]
    assert y.sum((1, 2)).tolist() == pytest.approx(sums, rel=1e-10)
    found = (y[0, 0, 0].item(), y[0, -1, -1].item())
    assert found == pytest.approx(corners, rel=1e-10)
    assert y[1, 10, 20].item() == pytest.approx(inner, rel=1e-10)
    assert y.std().item() == pytest.approx(deviation, rel=1e-10)


def test_unetpp_golden_values():
    expected = [  # sum, first, [10, 20] and last pixel, standard deviation
        (792.279204107, -0.317057887513, 0.0199888033684, -0.0989226023176,
         0.597114520609),
        (60.0924079324, -0.918376404553, -0.0849095871258, -0.11268783944,
         1.57451918294),
        (32.4724511605, 0.332967982354, 0.976915324937, 0.00878774783312,
         0.722545770577),
        (487.677694427, 0.0654140990697, 0.385896800354, 0.0834583321863,
         0.802698696984),
    ]  # fmt: skip
    heads = golden("unet++", 1, 32, 48)
    for logits, values in zip(heads, expected, strict=True):
        y = logits[0, 0]
        found = (y.sum(), y[0, 0], y[10, 20], y[-1, -1], y.std())
        assert [v.item() for v in found] == pytest.approx(values, rel=1e-9)


@pytest.mark.parametrize("up", ["transposed", "nearest"])
def test_mean_weights_keep_a_constant_image(up):
    network = built(plain("unet-valid", up=up), torch.float64)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.fill_(1 / layer.weight[0].numel())
            elif isinstance(layer, nn.ConvTranspose2d):
                layer.weight.fill_(1 / layer.in_channels)
    (logits,) = network(torch.full((1, 1, 188, 204), 0.7, dtype=torch.float64))
    torch.testing.assert_close(logits, torch.full_like(logits, 0.7))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_head_depends_on_no_later_column(depth):
    network = build_network(plain("unet++"), seed=0)
    network(noise(1, 1, 32, 32), depth, last_only=True)[0].square().sum().backward()
    for name, parameter in network.named_parameters():
        kind, *numbers = name.split(".")[0].split("_")
        place = [int(n) for n in numbers]
        used = place == [depth] if kind == "head" else sum(place) <= depth
        assert (parameter.grad is not None) == used


def test_forward_returns_the_heads_that_are_asked_for():
    network = built(plain("unet++"))
    x = noise(1, 1, 32, 32)
    heads = network(x)
    assert len(heads) == 4
    for depth in network.depths:
        upto = network(x, depth)
        assert len(upto) == depth
        assert all(torch.equal(a, b) for a, b in zip(upto, heads, strict=False))
        (last,) = network(x, depth, last_only=True)
        assert torch.equal(last, heads[depth - 1])


@pytest.mark.parametrize("depth", [0, 5, 2])
def test_depth_without_head_is_refused(depth):
    name = "unet++" if depth != 2 else "unet"
    with pytest.raises(ValueError, match=rf"`depth` must be .* got {depth}"):
        on_meta(plain(name))(torch.empty(1, 1, 16, 16, device="meta"), depth)


def test_residual_adds_the_first_map():
    block = Block(3, 4, residual=True).double()
    twin = Block(3, 4).double()
    twin.load_state_dict(block.state_dict())
    x = noise(2, 3, 8, 8, dtype=torch.float64)
    a = F.relu(block.conv1(x))
    torch.testing.assert_close(block(x), F.relu(a + block.conv2(a)))
    assert not torch.allclose(block(x), twin(x))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet", {"x_3_0.drop2", "x_4_0.drop2"}),
        ("unet-valid", {"x_3_0.drop2", "x_4_0.drop2"}),
        ("fcn-8s", {"drop6", "drop7"}),
        ("vgg19-unet", {"drop"}),
    ],
)
def test_dropout_is_where_the_paper_has_it(name, expected):
    network = on_meta(paper(name))
    found = {
        key: layer.p
        for key, layer in network.named_modules()
        if isinstance(layer, nn.Dropout | nn.Dropout2d)
    }
    assert found == dict.fromkeys(expected, 0.25 if name == "vgg19-unet" else 0.5)


@pytest.mark.parametrize("name", ["wide-unet", "unet++"])
def test_dropout_after_every_convolution(name):
    blocks = [m for m in on_meta(paper(name)).modules() if isinstance(m, Block)]
    rates = [(b.drop1.p, b.drop2.p) for b in blocks]
    assert rates == [(0.5, 0.5)] * len(blocks)


# --- FCN ----------------------------------------------------------------------------


def test_bilinear_kernel():
    line = torch.tensor([1, 3, 3, 1]) / 4
    torch.testing.assert_close(bilinear_kernel(4), torch.outer(line, line))
    for size, stride in ((4, 2), (16, 8), (32, 16), (64, 32)):
        phases = bilinear_kernel(size).unflatten(0, (2, stride)).sum(0)
        phases = phases.unflatten(1, (2, stride)).sum(1)
        torch.testing.assert_close(phases, torch.ones(stride, stride))


@pytest.mark.parametrize("name", FCNS)
def test_upsampling_is_bilinear_inside(name):
    network = built(plain(name, published=False, width=1), torch.float64)
    for key, kernel, stride, _ in network.ups:
        layer = getattr(network, key)
        assert not layer.weight.requires_grad
        assert layer.bias is None
        x = noise(1, 2, 5, 6, dtype=torch.float64)
        expected = F.interpolate(x, scale_factor=stride, mode="bilinear")
        found = layer(x)
        edge = stride // 2
        inner = (..., slice(edge, -edge), slice(edge, -edge))
        assert (found[inner] - expected[inner]).abs().max() < 1e-14
        assert (found - expected).abs().max() > 1e-3  # zeros around the border
        padded = layer(F.pad(x, (1, 1, 1, 1), mode="replicate"))
        cropped = padded[..., stride:-stride, stride:-stride]
        assert (cropped - expected).abs().max() < 1e-14
        assert kernel == 2 * stride


@pytest.mark.parametrize("published", [True, False])
def test_fcn_16s_starts_from_the_coarse_scores_alone(published):
    fcn16 = built(plain("fcn-16s", published=published), torch.float64)
    fcn32 = built(plain("fcn-32s", published=published), torch.float64)
    x = noise(1, 1, 128, 128, dtype=torch.float64)
    assert not fcn16(x)[0].any()  # every score layer starts at 0
    nn.init.normal_(fcn16.score_fr.weight)
    fcn32.score_fr.weight.data.copy_(fcn16.score_fr.weight)
    scores = []
    fcn16.score_fr.register_forward_hook(lambda _m, _i, out: scores.append(out))
    (logits,) = fcn16(x)
    up = fcn16.upscore16(fcn16.upscore2(scores[0]))
    crop = 27 if published else 0
    assert torch.equal(logits, up[..., crop : crop + 128, crop : crop + 128])
    difference = (fcn32(x)[0] - logits)[..., 32:-32, 32:-32].abs().max()
    assert difference > 1e-3 * logits.abs().max()


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("score", ["score_fr", "score_pool4", "score_pool3"])
def test_fcn_scores_are_aligned(published, score, monkeypatch):
    """With averages instead of maxima, every path is centred on what it scores."""

    def average(x, _kernel, *_, ceil_mode, **__):
        return F.avg_pool2d(x, 2, ceil_mode=ceil_mode)

    monkeypatch.setattr(F, "max_pool2d", average)
    network = built(plain("fcn-8s", width=1, published=published), torch.float64)
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d):
            unused = name.startswith("score") and name != score
            nn.init.constant_(layer.weight, 0 if unused else 0.1)
    x = torch.ones(1, 1, 544, 32, dtype=torch.float64, requires_grad=True)
    network(x)[0][..., 256:288, :].sum().backward()
    weights = x.grad.sum((0, 1, 3))
    place = (weights * torch.arange(544)).sum() / weights.sum()
    assert float(place) == pytest.approx(271.5, abs=1e-9)


# --- Pruning ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"up": "bilinear"},
        {"norm": "group", "residual": True, "stem": 2},
        {"norm": "batch", "stem": 2, "refine": True},
    ],
    ids=["t2", "bilinear", "stem", "refine"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pruned_network_is_the_same_bit_for_bit(changes, dtype):
    network = built(plain("unet++", **changes), dtype)
    x = noise(2, 1, 64, 32, dtype=dtype)
    for depth in network.depths:
        small = prune(network, depth)
        assert not small.training
        assert small.depths == tuple(range(1, depth + 1))
        pairs = zip(small(x), network(x, depth), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_pruned_network_is_its_own():
    network = built(plain("unet++"))
    small = prune(network, 2)
    assert small.config == network.config.replaced(levels=2)
    nodes = {k.split(".")[0] for k in small.state_dict()}
    assert nodes == {
        "x_0_0", "x_1_0", "x_2_0", "x_0_1", "x_1_1", "x_0_2",
        "up_0_1", "up_1_1", "up_0_2", "head_1", "head_2",
    }  # fmt: skip
    fresh = build_network(small.config, seed=5)
    fresh.load_state_dict({k: network.state_dict()[k] for k in fresh.state_dict()})
    x = noise(1, 1, 20, 36)
    assert torch.equal(fresh.eval()(x)[-1], small(x)[-1])
    with pytest.raises(ValueError, match="multiples of 16"):
        network(x)
    before = network(noise(1, 1, 16, 16), 2)[-1]
    with torch.no_grad():
        for parameter in small.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert torch.equal(network(noise(1, 1, 16, 16), 2)[-1], before)


def test_pruning_needs_a_head():
    with pytest.raises(ValueError, match="`depth` must be a depth with a head"):
        prune(built(plain("unet++", deep_supervision=False)), 2)
    with pytest.raises(ValueError, match="`depth` must be a depth with a head"):
        prune(built(plain("unet")), 2)


# --- Norms --------------------------------------------------------------------------


def grouped(**changes) -> SegmentationNet:
    network = built(plain("unet++", norm="group", **changes), torch.float64)
    for layer in network.modules():
        if isinstance(layer, GroupNorm):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    return network


@pytest.mark.parametrize("channels", [1, 2, 6, 8, 12, 16, 35])
def test_group_norm_is_torch_s(channels):
    norm = GroupNorm(channels).double()
    assert norm.num_groups == math.gcd(8, channels)
    x = 3 * noise(2, channels, 5, 7, dtype=torch.float64) + 2
    torch.testing.assert_close(
        norm(x), F.group_norm(x, math.gcd(8, channels), norm.weight, norm.bias)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [5, 12, 16, 64, 128])
def test_group_norm_s_gradient_is_torch_s(channels, dtype):
    norm = GroupNorm(channels)
    if dtype == torch.float64:
        norm.double()
    nn.init.normal_(norm.weight)
    x = 3 * noise(2, channels, 6, 5, dtype=torch.float64) + 2
    x = x.to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    wanted = [x, norm.weight, norm.bias]
    y = norm(x)
    twin = F.group_norm(x, norm.num_groups, norm.weight, norm.bias)
    assert torch.equal(y, twin)
    towards = noise(*x.shape, dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(y, wanted, towards)
    expected = torch.autograd.grad(twin, wanted, towards)
    for mine, torchs in zip(found, expected, strict=True):
        assert mine.dtype == torchs.dtype
        torch.testing.assert_close(mine, torchs, atol=1e-4, rtol=1e-4)
    assert found[0].is_contiguous(memory_format=torch.channels_last)


def test_measured_norm_pools_the_crops():
    norm = GroupNorm(16).double()
    nn.init.normal_(norm.weight)
    crops = (
        noise(3, 16, 4, 6, dtype=torch.float64)
        * torch.tensor([1.0, 2, 3])[:, None, None, None]
    )
    norm.measuring = True
    found = norm(crops)
    whole = crops.transpose(0, 1).reshape(1, 16, 12, 6)
    expected = F.group_norm(whole, 8, norm.weight, norm.bias)
    torch.testing.assert_close(found.transpose(0, 1).reshape(whole.shape), expected)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last]
)
@pytest.mark.parametrize("refine", [True, False])
def test_measuring_one_crop_changes_nothing(memory_format, refine):
    network = grouped(residual=True, stem=2, refine=refine)
    x = noise(1, 1, 64, 32, dtype=torch.float64).to(memory_format=memory_format)
    expected = network(x)
    for a, b in zip(measure_norms(network, x), expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(network(x), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_fixed_norms_make_tiles_equal_the_whole():
    network = grouped(levels=2)
    x = noise(1, 1, 128, 64, dtype=torch.float64)
    tile = x[..., 32:96, :]
    whole = measure_norms(network, x)[-1][..., 56:72, :]
    halo = network.halo()
    assert halo == 24
    torch.testing.assert_close(network(tile)[-1][..., halo:-halo, :], whole)
    release_norms(network)
    free = network(tile)[-1][..., halo:-halo, :]
    assert (free - whole).abs().max() > 1e-3


def test_measuring_touches_only_what_the_depth_needs():
    network = grouped()
    measure_norms(network, noise(2, 1, 32, 32, dtype=torch.float64), 2)
    for name, layer in network.named_modules():
        if isinstance(layer, GroupNorm):
            _, i, j = name.split(".")[0].split("_")
            assert (layer.fixed is not None) == (int(i) + int(j) <= 2)
            assert not layer.measuring
    small = prune(network, 2)
    x = noise(1, 1, 32, 32, dtype=torch.float64)
    assert torch.equal(small(x)[-1], network(x, 2)[-1])
    release_norms(network)
    assert all(getattr(m, "fixed", None) is None for m in network.modules())


def test_measuring_ends_after_an_error():
    network = grouped()
    with pytest.raises(ValueError, match="multiples of 16"):
        measure_norms(network, noise(1, 1, 8, 8, dtype=torch.float64))
    assert not any(getattr(m, "measuring", False) for m in network.modules())


def test_half_precision_stays_finite():
    network = built(working_config("unet++"))
    x = 1e4 * noise(2, 1, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        for logits in (*measure_norms(network, x), *network(x)):
            assert logits.isfinite().all()


# --- Weights ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_seed_decides_the_weights_and_nothing_else(name):
    config = working_config(name).replaced(width=4)
    state = torch.get_rng_state()
    a, b, c, d = (build_network(config, seed=s) for s in (3, 3, 4, None))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    first = next(a.parameters())
    assert all(
        torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )
    assert not torch.equal(first, next(c.parameters()))
    assert not torch.equal(first, next(d.parameters()))
    assert a.training


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_are_he_normal(name):
    network = build_network(working_config(name), seed=0)
    for key, layer in network.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            continue
        if layer.bias is not None:
            assert not layer.bias.any()
        if isinstance(network, FCN) and key.startswith("score"):
            assert not layer.weight.any()
        elif "upscore" not in key and layer.weight.numel() > 2000:
            taps = math.prod(layer.kernel_size)
            outputs = isinstance(layer, nn.ConvTranspose2d)
            fan = taps * (layer.out_channels if outputs else layer.in_channels)
            ratio = float(layer.weight.detach().std()) / math.sqrt(2 / fan)
            assert abs(ratio - 1) < 0.1


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_every_network_learns(name, norm):
    config = working_config(name, 3, 3, norm=norm).replaced(width=4)
    network = build_network(config, seed=0)
    side = network.valid_size(8)
    x = noise(2, 3, side, side)
    kept = side - 2 * network.margin
    target = torch.arange(kept).expand(2, kept, kept) * 3 // kept
    for _ in range(2):  # FCN: its scores must leave 0 before the trunk can learn
        network.zero_grad()
        sum(F.cross_entropy(y, target) for y in network(x)).backward()
        torch.optim.SGD(network.parameters(), lr=1e-3).step()
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all()
    assert next(network.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "refine"),
    [*((name, False) for name in NETWORKS), *((name, True) for name in SAME)],
)
def test_a_constant_is_added_to_the_logits(name, refine):
    config = working_config(name).replaced(width=4, refine=refine)
    network = built(config, torch.float64)
    side = network.valid_size(64)
    x = noise(1, 1, side, side, dtype=torch.float64)
    before = network(x)
    network.add_to_logits((0.5, -2.0))
    for a, b in zip(before, network(x), strict=True):
        middle = a.shape[-1] // 2
        shift = (b - a)[0, :, middle, middle].detach()
        torch.testing.assert_close(shift, torch.tensor([0.5, -2.0]).double())


def test_published_up_convolutions_have_no_activation():
    network = built(plain("unet"))
    assert isinstance(network.up_0_4, nn.ConvTranspose2d)
    assert isinstance(on_meta(paper("vgg19-unet")), VGG19UNet)


@pytest.mark.parametrize("name", NETWORKS)
def test_published_config_round_trips(name):
    for config in (published_config(name), working_config(name)):
        assert NetConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("unet", {"deep_supervision": True}, "deep_supervision"),
        ("unet-valid", {"residual": True}, "residual"),
        ("fcn-8s", {"stem": 2}, "stem"),
        ("vgg19-unet", {"stem": 2}, "stem"),
        ("unet", {"refine": True}, "refine"),
        ("unet", {"refine": 1, "stem": 2}, "refine"),
        ("unet", {"published": True}, "published"),
        ("fcn-8s", {"up": "nearest"}, "up"),
        ("unet-valid", {"up": "bilinear"}, "up"),
        ("fcn-8s", {"levels": 4}, "5 levels"),
        ("vgg19-unet", {"levels": 5}, "4 levels"),
    ],
)
def test_what_a_network_does_not_have_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        published_config(name).replaced(**changes)


def test_deeper_heads_of_the_working_unetpp_correct_the_ones_before():
    network = build_network(working_config("unet++", width=4), seed=0).eval()
    x = noise(1, 1, 32, 32)
    heads = network(x)
    assert all(torch.equal(h, heads[0]) for h in heads)  # the corrections start at 0
    with torch.no_grad():
        network.head_3.score.bias += 1
    later = network(x)
    assert torch.equal(later[1], heads[1])
    torch.testing.assert_close(later[2], heads[2] + 1)
    torch.testing.assert_close(later[3], heads[3] + 1)
    assert torch.equal(network(x, 3, last_only=True)[0], later[2])
    network.add_to_logits([2.0, 0.0])
    torch.testing.assert_close(
        network(x)[3], later[3] + torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
    )


def test_heads_of_the_published_unetpp_stand_alone():
    network = build_network(published_config("unet++").replaced(width=4), seed=0).eval()
    heads = network(noise(1, 1, 32, 32))
    assert not torch.equal(heads[0], heads[1])
    assert len(network.score_biases()) == 4


def test_a_pooled_group_norm_takes_the_batch_as_one_image() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((3, 16, 5, 7), generator=generator) * 3 + 1
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    norm = GroupNorm(16)
    norm.pooled = True
    y = norm(x)
    slope = torch.randn(y.shape, generator=generator)
    (y * slope).sum().backward()
    twin = x.detach().double().requires_grad_()
    flat = twin.transpose(0, 1).reshape(1, 16, 15, 7)  # the samples one below another
    expected = torch.nn.functional.group_norm(flat, 8)
    expected = expected.reshape(16, 3, 5, 7).transpose(0, 1)
    (expected * slope.double()).sum().backward()
    torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=1e-5)
    assert x.grad is not None
    assert twin.grad is not None
    torch.testing.assert_close(x.grad, twin.grad.float(), atol=1e-5, rtol=1e-4)
    assert y.is_contiguous(memory_format=torch.channels_last)
