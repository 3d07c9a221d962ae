"""Tiles join without a seam, in the wished order, in bounded memory."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from napari_unetpp.config import NETWORKS, NetConfig
from napari_unetpp.device import peak_bytes
from napari_unetpp.errors import DeviceMemoryError
from napari_unetpp.model import Model, create_model
from napari_unetpp.networks.blocks import GroupNorm, measure_norms
from napari_unetpp.networks.unet import UNet
from napari_unetpp.predict import (
    Tile,
    most_likely,
    predict,
    predict_proba,
    predict_tiles,
)
from napari_unetpp.preprocess import reflect

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = ("background", "wall", "lumen")


@cache
def model_of(
    name: str, *, channels: int = 1, norm: Any = None, **settings: Any
) -> Model:
    """Return a network whose logits are anything but uniform."""
    model = create_model(
        name, classes=CLASSES, in_channels=channels, width=4, norm=norm, **settings
    )
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=rng))
    return model


@cache
def small() -> Model:
    """Return a network of short context, so that little images have inner tiles."""
    return model_of("unet", levels=1, norm="none")


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape[-2:])
    waves = 60 * np.sin(y / 9) * np.cos(x / 13) + 90
    return (waves + rng.normal(0, 30, shape)).clip(0, 255).astype(np.uint8)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare probabilities (K, ...), and labels where the best class is clear."""
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    best = np.sort(expected, 0)[-2:]
    clear = best[1] - best[0] > 1e-3
    np.testing.assert_array_equal(found.argmax(0)[clear], expected.argmax(0)[clear])
    assert clear.mean() > 0.9


# --- tiles and the whole ---------------------------------------------------------

KINDS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NETWORKS),
    *(("unet++", {"depth": d}) for d in (1, 2, 3)),
    ("unet++", {"heads": "mean"}),
    ("unet++", {"heads": "mean", "depth": 2}),
]
# The long ones have tiles that touch neither end, the last more than 768 pixels.
SIZES = [
    ((1, 1), (16,)),
    ((7, 33), (16,)),
    ((97, 100), (48,)),
    ((761, 33), (100, 512)),
    ((21, 1031), (96, 640)),
]


@pytest.mark.parametrize(("shape", "tiles"), SIZES, ids=lambda v: str(v))
@pytest.mark.parametrize(("name", "settings"), KINDS, ids=lambda v: str(v))
def test_tiles_equal_the_whole(
    name: str, settings: dict[str, Any], shape: tuple[int, int], tiles: tuple[int, ...]
) -> None:
    model, image = model_of(name), picture(*shape)
    whole = predict_proba(model, image, tile=16384, **settings)
    assert whole.shape == (3, *shape)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole.sum(0), 1, atol=1e-5)
    if min(shape) > 1:
        assert whole.std((1, 2)).max() > 0.02
    for tile in tiles:
        assert_same(predict_proba(model, image, tile=tile, **settings), whole)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("name", ["unet", "unet-valid", "unet++"])
def test_other_norms_do_not_depend_on_the_tile_either(name: str, norm: Any) -> None:
    model, image = model_of(name, norm=norm, levels=3), picture(23, 300)
    whole = predict_proba(model, image)
    assert_same(predict_proba(model, image, tile=64), whole)


@pytest.mark.parametrize("name", [*NETWORKS, "depth 1", "mean"])
@pytest.mark.parametrize("shape", [(1, 1), (40, 75)])
def test_the_whole_is_the_network_on_the_mirrored_image(
    name: str, shape: tuple[int, int]
) -> None:
    mean, depth = name == "mean", 1 if name == "depth 1" else None
    model = model_of(name if name in NETWORKS else "unet++", channels=2)
    net = model.network
    image = np.stack([picture(*shape), picture(*shape, seed=1)]).astype(float)
    windows, before = [], []
    step = net.multiple(depth)
    for n in shape:
        if net.margin:
            low, high = net.margin, net.valid_size(n) - net.margin
        else:
            border = -(-32 // step) * step
            low = min(border, net.halo(depth))
            high = min(-(-(n + 2 * border) // step) * step - border,
                       -(-(n + net.halo(depth)) // step) * step)  # fmt: skip
        windows.append(reflect(np.arange(-low, high), n))
        before.append(0 if net.margin else low)
    padded = model.preprocessing.apply(image, model.preprocessing.limits(image))
    padded = padded[:, windows[0][:, None], windows[1]]
    with torch.inference_mode():
        heads = net(torch.from_numpy(padded)[None], depth)
    heads = [h.softmax(1)[0].numpy() for h in (heads if mean else heads[-1:])]
    expected = np.mean(heads, 0)[
        :, before[0] : before[0] + shape[0], before[1] : before[1] + shape[1]
    ]
    found = predict_proba(
        model, image, channel_axis=0, depth=depth, heads="mean" if mean else "last"
    )
    # Flat maps divide by almost nothing, which magnifies rounding.
    np.testing.assert_allclose(found, expected, atol=1e-3 if shape == (1, 1) else 2e-5)
    labels = predict(
        model, image, channel_axis=0, depth=depth, heads="mean" if mean else "last"
    )
    np.testing.assert_array_equal(labels, found.argmax(0) + 1)
    assert labels.dtype == np.uint8


@pytest.mark.parametrize(
    ("name", "shape"),
    [("unet", (769, 70)), ("unet", (300, 800)), ("unet-valid", (70, 769))],
)
def test_a_large_images_norms_come_from_nine_crops(
    name: str, shape: tuple[int, int]
) -> None:
    model = model_of(name, levels=2)
    image = picture(*shape)[None]
    settings = model.preprocessing
    scaled = settings.apply(image, settings.limits(image))
    margin, side = model.network.margin, model.network.valid_size(256)

    def crop(y: int, x: int) -> np.ndarray:
        rows = reflect(np.arange(y - margin, y - margin + side), shape[0])
        columns = reflect(np.arange(x - margin, x - margin + side), shape[1])
        return scaled[:, rows[:, None], columns]

    starts = [
        [int(s) for s in (0, max(0, n - 256) / 2, max(0, n - 256))] for n in shape
    ]
    crops = np.stack([crop(y, x) for y in starts[0] for x in starts[1]])
    own = model.copy().network
    measure_norms(own, torch.from_numpy(crops))
    pads = [(margin, own.valid_size(n) - margin - n) if margin else
            (32, -(-(n + 64) // own.multiple()) * own.multiple() - 32 - n)
            for n in shape]  # fmt: skip
    padded = np.pad(scaled, ((0, 0), *pads), mode="reflect")
    with torch.inference_mode():
        expected = own(torch.from_numpy(padded)[None])[-1].softmax(1)[0].numpy()
    top = 0 if margin else 32
    expected = expected[:, top : top + shape[0], top : top + shape[1]]
    for tile in (None, 16384):
        found = predict_proba(model, image[0], tile=tile)
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("shape", "tile", "sides"),
    [
        ((768, 9), None, [768]),
        ((9, 769), None, [769]),
        ((9, 40), 16, [16, 16, 8]),
        ((9, 40), 17, [20, 20]),
        ((9, 40), 40, [40]),
    ],
)
def test_the_sides_of_tiles(
    shape: tuple[int, int], tile: int | None, sides: list[int]
) -> None:
    assert small().network.multiple() == 4
    parts = list(predict_tiles(small(), picture(*shape), tile=tile))
    spans = sorted(
        (s.start, s.stop) for t in parts for s in [t.slices[int(shape[0] < 99)]]
    )
    assert [b - a for a, b in spans] == sides
    assert spans[0][0] == 0


@pytest.mark.parametrize("heads", ["last", "mean"])
def test_less_memory_makes_smaller_tiles_of_the_same_result(heads: Any) -> None:
    model, image = model_of("unet++", levels=2, norm="none"), picture(400, 900)
    whole = predict_proba(model, image, heads=heads)
    parts = list(
        predict_tiles(model, image, heads=heads, memory=0.01, probabilities=True)
    )
    assert len(parts) > 2
    assert (covered(parts, image.shape) == 1).all()
    found = np.zeros_like(whole)
    for part in parts:
        found[(slice(None), *part.slices)] = part.probabilities
    assert_same(found, whole)
    assert peak_bytes(
        lambda: list(predict_tiles(model, image, heads=heads, memory=0.01))
    ) < peak_bytes(lambda: predict(model, image, heads=heads))


@pytest.mark.parametrize("memory", [0, 0.001, -1, 2000, float("nan"), "much"])
def test_a_budget_that_is_none_is_refused(memory: Any) -> None:
    with pytest.raises(ValueError, match="`memory` must"):
        predict(small(), picture(9, 9), memory=memory)


def test_a_shallow_depth_has_finer_tiles() -> None:
    tiles = predict_tiles(model_of("unet++"), picture(40, 50), depth=1, tile=20)
    assert {t.labels.shape for t in tiles} == {(20, 20), (20, 10)}


# --- what comes out --------------------------------------------------------------


def test_dense_models_count_from_zero() -> None:
    sparse, dense = small(), small().copy()
    dense.unlabelled = None
    labels = predict(sparse, picture(20, 30))
    np.testing.assert_array_equal(predict(dense, picture(20, 30)), labels - 1)
    assert set(np.unique(labels)) <= {1, 2, 3}
    assert len(np.unique(labels)) > 1


def test_the_255th_class_can_be_told() -> None:
    model = create_model(
        "unet", classes=[f"c{i}" for i in range(255)], width=4, levels=1
    )
    model.network.add_to_logits([0.0] * 254 + [99.0])
    assert (predict(model, picture(5, 6)) == 255).all()


@pytest.mark.parametrize("probabilities", [True, False])
def test_tiles_carry_labels_and_probabilities_if_asked(probabilities: bool) -> None:
    image = picture(2, 40, 50)
    labels = predict(small(), image, tile=16)
    proba = predict_proba(small(), image, tile=16)
    np.testing.assert_array_equal(labels, proba.argmax(0) + 1)
    for part in predict_tiles(small(), image, tile=16, probabilities=probabilities):
        assert isinstance(part, Tile)
        assert part.labels.dtype == np.uint8
        np.testing.assert_array_equal(part.labels, labels[part.slices])
        if not probabilities:
            assert part.probabilities is None
            continue
        assert part.probabilities is not None
        assert part.probabilities.dtype == np.float32
        np.testing.assert_array_equal(
            part.probabilities, proba[(slice(None), *part.slices)]
        )


def test_planes_of_a_stack_are_predicted_one_by_one() -> None:
    model = model_of("unet++", levels=2)
    stack = picture(2, 3, 30, 41)
    stack[1, 2] = 7  # no contrast: still labelled
    stack[0, 1] //= 3
    found = predict_proba(model, stack)
    assert found.shape == (3, 2, 3, 30, 41)
    for index in np.ndindex(2, 3):
        np.testing.assert_array_equal(
            found[(slice(None), *index)], predict_proba(model, stack[index])
        )
    np.testing.assert_array_equal(predict(model, stack), found.argmax(0) + 1)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
def test_channels_may_be_anywhere(axis: int) -> None:
    model = model_of("unet", channels=3, levels=1)
    image = np.stack([picture(2, 18, 25, seed=s) for s in range(3)])
    expected = predict_proba(model, image, channel_axis=0)
    moved = np.moveaxis(image, 0, axis)
    np.testing.assert_array_equal(
        predict_proba(model, moved, channel_axis=axis), expected
    )
    np.testing.assert_array_equal(
        predict(model, moved, channel_axis=axis), expected.argmax(0) + 1
    )


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_pruned_network_gives_the_same_bits(depth: int) -> None:
    model, image = model_of("unet++"), picture(50, 61)
    pruned = model.pruned(depth)
    assert pruned.network.depths == tuple(range(1, depth + 1))
    for heads in ("last", "mean"):
        np.testing.assert_array_equal(
            predict_proba(pruned, image, heads=heads),  # type: ignore[arg-type]
            predict_proba(model, image, depth=depth, heads=heads),  # type: ignore[arg-type]
        )


def test_depths_and_modes_differ() -> None:
    model, image = model_of("unet++"), picture(30, 30)
    cases: list[dict[str, Any]] = [
        *({"depth": d} for d in (1, 2, 3, 4)),
        {"heads": "mean"},
        {"heads": "mean", "depth": 3},
    ]
    found = [predict_proba(model, image, **case) for case in cases]
    for i, a in enumerate(found):
        assert all(np.abs(a - b).max() > 1e-3 for b in found[:i])
    np.testing.assert_array_equal(predict_proba(model, image), found[3])


# --- what goes in ----------------------------------------------------------------


def test_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, image = model_of("unet++").copy(), picture(20, 30)
    model.network.train()
    weights = {k: (v, v.clone()) for k, v in model.network.state_dict().items()}
    before, state = image.copy(), torch.get_rng_state()
    calls = []
    monkeypatch.setattr(
        "napari_unetpp.predict.resolve_device",
        lambda device: calls.append(device) or torch.device("cpu"),
    )
    predict(model, image, device="cuda")
    assert calls == ["cuda"]
    assert model.network.training
    for name, value in model.network.state_dict().items():
        assert value.data_ptr() == weights[name][0].data_ptr()
        assert torch.equal(value, weights[name][1])
    norms = [m for m in model.network.modules() if isinstance(m, GroupNorm)]
    assert norms
    assert all(n.fixed is None and not n.measuring for n in norms)
    np.testing.assert_array_equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off() -> None:
    model = create_model(NetConfig("unet", width=4, levels=2, dropout=0.9), seed=4)
    expected = predict_proba(model, picture(20, 20))
    model.network.train()
    np.testing.assert_array_equal(predict_proba(model, picture(20, 20)), expected)


@pytest.mark.parametrize("dtype", ["?", "u1", "u2", ">i4", "f2", "f4", "f8"])
def test_any_dtype_is_taken(dtype: str) -> None:
    image = picture(20, 30).astype(dtype)
    labels = predict(small(), image)
    np.testing.assert_array_equal(labels, predict(small(), image.astype("f8")))


class Lazy:
    """An image that cannot be read at once, and remembers what was read."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self.read: list[tuple[int, ...]] = []

    def __getitem__(self, key: tuple[Any, ...]) -> np.ndarray:
        found = self._array[key]
        self.read.append(found.shape)
        return found

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("read as a whole")


@pytest.mark.parametrize("axis", [None, 1, 3])
def test_a_lazy_image_is_read_window_by_window(axis: int | None) -> None:
    model = model_of("unet", levels=1, norm="none", channels=1 if axis is None else 2)
    image = picture(2, 250, 330) if axis is None else picture(2, 2, 300, 200)
    if axis == 3:
        image = np.moveaxis(image, 1, 3)
    lazy = Lazy(image)
    halo = model.network.halo()
    labels = predict(model, lazy, channel_axis=axis, tile=64)
    sizes = [np.delete(s, axis - 1) if axis else s for s in lazy.read]
    side = 64 + 2 * halo
    limits = [s for s in sizes if max(s) > side]
    assert len(limits) == 2, "one thin reading per plane for the percentiles"
    tiles = -(-labels.shape[1] // 64) * -(-labels.shape[2] // 64)
    assert len(sizes) == 2 + 2 * tiles
    if axis is not None:
        np.testing.assert_array_equal(labels, predict(model, image, channel_axis=axis))


def test_only_the_planes_asked_for_are_read() -> None:
    lazy = Lazy(picture(3, 20, 30))
    tiles = predict_tiles(small(), lazy, first=(2, slice(None), slice(None)))
    assert lazy.read == []
    assert next(tiles).slices[0] == 2
    assert len(lazy.read) == 2


# --- the order -------------------------------------------------------------------


def covered(tiles: list[Tile], shape: tuple[int, ...]) -> np.ndarray:
    times = np.zeros(shape, int)
    for tile in tiles:
        assert times[tile.slices].shape == tile.labels.shape
        times[tile.slices] += 1
    return times


@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((60, 90), None),
        ((60, 90), (slice(20, 33), slice(40, 70))),
        ((60, 90), (slice(32, 48), slice(16, 32))),
        ((60, 90), (59, -1)),
        ((60, 90), (slice(-10, None), slice(None, 5))),
        ((60, 90), (slice(50, 20, -1), slice(30, 1, -7))),
        ((60, 90), (np.int64(3), slice(np.int64(80), None))),
        ((60, 90), [slice(0, 0), slice(None)]),
        ((3, 40, 50), (slice(20, 33), slice(20, 40))),
        ((3, 40, 50), (1, slice(20, 33), slice(20, 40))),
        ((3, 40, 50), (-1, slice(None), slice(None))),
        ((3, 40, 50), (slice(1, 3), slice(20, 33), slice(20, 40))),
        ((3, 40, 50), (slice(1, 1), slice(20, 33), slice(20, 40))),
        ((2, 3, 20, 34), (1, slice(None, None, 2), 0, 33)),
    ],
)
def test_the_region_comes_first_and_every_pixel_once(
    shape: tuple[int, ...], first: Any
) -> None:
    tiles = list(predict_tiles(small(), picture(*shape), first=first, tile=16))
    assert (covered(tiles, shape) == 1).all()
    region = np.zeros(shape, bool)
    key = (slice(None),) * 2 if first is None else tuple(first)
    region[(..., *key) if len(key) == 2 else key] = True
    hits = [bool(region[tile.slices].any()) for tile in tiles]
    assert hits == sorted(hits, reverse=True)
    assert any(hits) == bool(region.any())
    for tile in tiles:
        assert len(tile.slices) == len(shape)
        assert all(type(s) is int for s in tile.slices[:-2])


def test_the_middle_of_the_region_leads_and_then_its_neighbours() -> None:
    tiles = list(
        predict_tiles(
            small(), picture(80, 80), first=(slice(32, 48), slice(16, 64)), tile=16
        )
    )
    starts = [(t.slices[0].start, t.slices[1].start) for t in tiles]  # type: ignore[union-attr]
    assert starts[0] == (32, 32)
    assert set(starts[1:3]) == {(32, 16), (32, 48)}
    ring = {(y, x) for y in (16, 32, 48) for x in range(0, 80, 16)}
    assert set(starts[3:6]) <= ring - set(starts[:3])
    assert starts[3] in {(16, 32), (48, 32)}
    assert starts[-1] in {(0, 0), (0, 64), (64, 0), (64, 64)}
    square = (slice(16, 64), slice(16, 64))
    first = next(predict_tiles(small(), picture(80, 80), first=square, tile=16))
    assert first.slices == (slice(32, 48), slice(32, 48))


def test_a_region_on_several_planes_comes_before_the_rest_of_them() -> None:
    tiles = list(
        predict_tiles(
            small(), picture(3, 32, 32), first=(slice(1, 3), 0, slice(0, 4)), tile=16
        )
    )
    assert [t.slices[0] for t in tiles] == [1, 2, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0]


def test_one_plane_in_view_is_finished_before_the_others() -> None:
    tiles = list(predict_tiles(small(), picture(3, 32, 32), first=(1, 20, 20), tile=16))
    assert [t.slices[0] for t in tiles] == [1] * 4 + [0] * 4 + [2] * 4
    assert tiles[0].slices == (1, slice(16, 32), slice(16, 32))


@pytest.mark.parametrize(
    "first",
    [
        (slice(None),), (slice(None),) * 4, 3, "ab", (0.5, 1), (None, None), (0, 30),
        (20, 0), (-21, 0), (slice(0.5, 3), slice(None)), (slice(0, 9, 0), 1), (),
    ],
)  # fmt: skip
def test_a_region_that_does_not_exist_is_refused(first: Any) -> None:
    with pytest.raises(
        ValueError, match=r"`first` must be 2 or 3 whole .*\(4, 20, 30\), got "
    ):
        predict_tiles(small(), picture(4, 20, 30), first=first)


# --- memory ----------------------------------------------------------------------

SHORT = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, ...]]]:
    """Return a function that lets U-Nets fail on inputs of more pixels than given."""
    real = UNet.forward

    def limit(
        most: int, error: Exception, *, measuring: bool = True
    ) -> list[tuple[int, ...]]:
        seen: list[tuple[int, ...]] = []

        def forward(self: UNet, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if x.is_meta:  # counts bytes, and takes none
                return real(self, x, *args, **kwargs)
            seen.append(tuple(x.shape))
            norms = (m for m in self.modules() if isinstance(m, GroupNorm))
            free = not measuring and any(n.measuring for n in norms)
            if x[:, 0].numel() > most and not free:
                raise error
            return real(self, x, *args, **kwargs)

        monkeypatch.setattr(UNet, "forward", forward)
        return seen

    return limit


@pytest.mark.parametrize("error", SHORT, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("norm", ["none", "group"])
def test_smaller_tiles_are_tried_and_give_the_same(
    limit: Callable[..., Any], error: Exception, norm: str
) -> None:
    model = model_of("unet", levels=1, norm=norm)
    image = picture(300, 310)
    expected = predict_proba(model, image)
    region = (slice(290, 300), slice(0, 10))
    seen = limit(165 * 165, error, measuring=False)
    tiles = list(
        predict_tiles(model, image, probabilities=True, first=region, tile=256)
    )
    assert (covered(tiles, image.shape) == 1).all()
    sizes = sorted(t.labels.shape for t in tiles)
    assert sizes == [(44, 54), (44, 256), *[(128, 128)] * 4, (256, 54)]
    assert len(seen) == (norm == "group") + 1 + len(tiles)
    assert tiles[0].slices == (slice(256, 300), slice(0, 256))
    found = np.zeros_like(expected)
    for tile in tiles:
        found[(slice(None), *tile.slices)] = tile.probabilities
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("shape", "corners"),
    [
        ((256, 200), [(0, 0), (0, 100), (128, 0), (128, 100)]),
        ((128, 256), [(0, 0), (0, 128), (64, 0), (64, 128)]),
        ((127, 256), [(0, 0), (0, 128), (64, 0), (64, 128)]),
        ((120, 256), [(0, 0), (0, 128)]),
    ],
)
def test_parts_of_a_tile_come_in_reading_order(
    limit: Callable[..., Any], shape: tuple[int, int], corners: list[tuple[int, int]]
) -> None:
    limit(180 * 160, SHORT[0])
    tiles = list(predict_tiles(small(), picture(*shape), tile=256))
    assert [tuple(s.start for s in t.slices) for t in tiles] == corners  # type: ignore[union-attr]
    assert (covered(tiles, shape) == 1).all()


def test_norms_are_measured_on_less_when_memory_is_short(
    limit: Callable[..., Any],
) -> None:
    model, image = model_of("unet", levels=1), picture(400, 400)
    expected = predict_proba(model, image)
    seen = limit(9 * 128 * 128, SHORT[0])
    found = predict_proba(model, image)
    assert [s[0] for s in seen[:3]] == [1, 9, 9]
    assert [s[-1] for s in seen[:3]] == [400 + 2 * model.network.halo(), 256, 128]
    np.testing.assert_allclose(found, expected, atol=0.25)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("error", SHORT, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("norm", ["none", "group"])
@pytest.mark.parametrize("shape", [(300, 200), (20, 900)])
def test_no_memory_at_all_is_told(
    limit: Callable[..., Any], error: Exception, norm: str, shape: tuple[int, int]
) -> None:
    model = model_of("unet", levels=1, norm=norm)
    seen = limit(0, error)
    with pytest.raises(DeviceMemoryError, match="no memory left even for a small tile"):
        predict(model, picture(*shape))
    assert len(seen) <= 6


def test_no_memory_for_the_tiles_alone_is_told(limit: Callable[..., Any]) -> None:
    limit(0, SHORT[0], measuring=False)
    with pytest.raises(DeviceMemoryError, match="no memory left even for a small tile"):
        predict(model_of("unet", levels=1), picture(127, 127), tile=64)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_other_failures_go_on_as_they_are(limit: Callable[..., Any], norm: str) -> None:
    limit(0, RuntimeError("a kernel broke"))
    with pytest.raises(RuntimeError, match="a kernel broke"):
        predict(model_of("unet", levels=1, norm=norm), picture(200, 200))


# --- bad input -------------------------------------------------------------------

NAN = picture(20, 20).astype(float)
NAN[3, 4] = np.nan


@pytest.mark.parametrize("verb", [predict, predict_proba, predict_tiles])
@pytest.mark.parametrize(
    ("image", "settings", "message"),
    [
        (picture(20, 20, 3), {}, "looks like colour. Pass channel_axis=-1"),
        (
            picture(3, 20, 20),
            {"channel_axis": 0},
            r"must have 1 channel\(s\) for this model, got 3 \(shape \(3, 20, 20\),"
            r" channel_axis=0\)",
        ),
        (np.zeros((0, 5)), {}, "none of them empty"),
        (np.zeros(5), {}, "at least 2 axes"),
        (picture(9, 9).astype(complex), {}, "real numbers"),
        (None, {}, "real numbers, got dtype object"),
        (picture(9, 9), {"depth": 0}, "`depth` must lie between 1 and 6, got 0"),
        (picture(9, 9), {"depth": 3}, "`depth` must be one of 2 for this unet, got 3"),
        (picture(9, 9), {"depth": 99}, "`depth` must"),
        (picture(9, 9), {"depth": True}, "`depth` must be a whole number"),
        (picture(9, 9), {"depth": "3"}, "`depth` must be a whole number"),
        (
            picture(9, 9),
            {"heads": "all"},
            "`heads` must be one of last, mean, got 'all'",
        ),
        (picture(9, 9), {"tile": 0}, "`tile` must lie between 16 and 16384, got 0"),
        (picture(9, 9), {"tile": 64.0}, "`tile` must be a whole number"),
        (picture(9, 9), {"device": "cuda:99"}, "`device` must be one that"),
        (picture(9, 9), {"channel_axis": 2}, "at least 3 axes"),
    ],
)
def test_bad_input_is_refused_before_the_first_tile(
    verb: Callable[..., Any], image: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verb(model_of("unet", levels=2), image, **settings)


def test_nan_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`image` must hold finite numbers only, got 1"
    ):
        predict(small(), NAN)


def test_depth_may_be_named_where_there_is_one() -> None:
    model, image = model_of("unet", levels=2), picture(9, 9)
    np.testing.assert_array_equal(predict(model, image, depth=2), predict(model, image))


@pytest.mark.parametrize("n_classes", [1, 2, 5, 255])
def test_the_most_likely_class_is_the_first_of_the_largest(n_classes: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (n_classes, 9, 11)).astype(np.float32)  # many are equal
    labels = most_likely(torch.from_numpy(values), 1)
    assert labels.dtype == torch.uint8
    np.testing.assert_array_equal(labels.numpy(), values.argmax(0) + 1)
