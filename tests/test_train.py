"""Training yields steps, stops when told, learns from strokes alone, repeatably."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from napari_unetpp import losses
from napari_unetpp import train as room
from napari_unetpp import trainer as trainer_room
from napari_unetpp.config import NETWORKS, NetConfig, TrainConfig, working_config
from napari_unetpp.errors import DeviceMemoryError, TrainingError
from napari_unetpp.evaluate import evaluate
from napari_unetpp.examples import read_examples
from napari_unetpp.model import Model, TrainStep, create_model, load_model
from napari_unetpp.networks import build_network
from napari_unetpp.networks.blocks import GroupNorm
from napari_unetpp.predict import predict, predict_proba
from napari_unetpp.score import Score
from napari_unetpp.train import Trainer, train, train_steps, with_classes

if TYPE_CHECKING:
    from pathlib import Path

NET = NetConfig("unet++", width=4, levels=2, deep_supervision=True, stem=2)
PLAIN = NetConfig("unet", width=4, levels=1)
QUICK = TrainConfig(patch=32, batch=2, warp_after=1)
CPU = torch.device("cpu")


def textures(side: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of stripes beside dots of one mean, and its classes 1 and 2."""
    y, x = np.indices((side, side))
    truth = np.where((x - side / 2) > 12 * np.sin(y / 15), 2, 1).astype(np.uint8)
    stripes = 40 * (-1.0) ** (y // 3)
    dots = 40 * (-1.0) ** (y // 3 + x // 3)
    noise = np.random.default_rng(seed).normal(0, 8, (side, side))
    image = np.where(truth == 1, stripes, dots) + 120 + noise
    return image.clip(0, 255).astype(np.uint8), truth


def strokes(truth: np.ndarray, thick: int = 4) -> np.ndarray:
    """Return a stroke down the middle of either half."""
    annotation = np.zeros_like(truth)
    height, width = truth.shape
    for start in (width // 8, width - width // 8 - thick):
        inner = np.s_[height // 6 : height - height // 6, start : start + thick]
        annotation[inner] = truth[inner]
    return annotation


IMAGE, TRUTH = textures()
PAINT = strokes(TRUTH)


def run(**settings: Any) -> Model:
    settings = {"network": NET, "config": QUICK, "max_steps": 2, **settings}
    return train(
        settings.pop("images", IMAGE), settings.pop("paint", PAINT), **settings
    )


def drain(steps: Any) -> tuple[list[TrainStep], Model]:
    found = []
    while True:
        try:
            found.append(next(steps))
        except StopIteration as end:
            return found, end.value


def weights(model: Model) -> dict[str, torch.Tensor]:
    return model.network.state_dict()


def same(a: Model, b: Model) -> bool:
    return all(torch.equal(v, weights(b)[k]) for k, v in weights(a).items())


def trainer(
    model: Model | None = None,
    paint: np.ndarray = PAINT,
    image: np.ndarray = IMAGE,
    seed: int = 0,
    **settings: Any,
) -> Trainer:
    model = model or create_model(NET)
    config = QUICK.replaced(**settings)
    return Trainer(model, read_examples(image, paint), config, seed=seed, device=CPU)


# --- steps, ends and the returned model ------------------------------------------


def test_steps_count_from_one_and_the_model_comes_last() -> None:
    steps, model = drain(
        train_steps(IMAGE, PAINT, network=NET, config=QUICK, max_steps=4)
    )
    assert [s.step for s in steps] == [1, 2, 3, 4]
    assert all(type(s.loss) is float and 0 < s.loss < 10 for s in steps)
    times = [s.seconds for s in steps]
    assert times[0] > 0
    assert times == sorted(set(times))
    assert all(s.score is None for s in steps)
    assert isinstance(model, Model)
    assert model.history == tuple(steps)
    assert not model.network.training
    assert model.classes == ("background", "class 2")
    assert model.config == NET
    assert same(model, run(max_steps=4))


class StopAfter:
    """Answers yes from a number of questions on."""

    def __init__(self, questions: int) -> None:
        self.left = questions

    def is_set(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("steps", [1, 3])
def test_stopping_keeps_the_model(steps: int) -> None:
    model = run(stop=StopAfter(steps), max_steps=None)
    assert len(model.history) == steps
    assert same(model, run(max_steps=steps))


def test_an_event_stops() -> None:
    event = threading.Event()
    generator = train_steps(IMAGE, PAINT, network=NET, config=QUICK, stop=event)
    next(generator)
    next(generator)
    event.set()
    steps, model = drain(generator)
    assert steps == []
    assert [s.step for s in model.history] == [1, 2]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every step last ten seconds."""
    now = [100.0]

    def step(self: Trainer) -> float:
        now[0] += 10
        self.steps += 1
        return 0.5

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(room, "time", SimpleNamespace(perf_counter=lambda: now[0]))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({}, 3), ({"max_seconds": 30}, 3), ({"max_seconds": 31}, 4),
        ({"max_seconds": 0}, 1), ({"max_seconds": 0.5}, 1), ({"max_steps": 1}, 1),
        ({"max_steps": 50}, 50), ({"max_steps": 5, "max_seconds": 35}, 4),
        ({"max_steps": 3, "max_seconds": 500}, 3),
        ({"max_seconds": 500, "stop": 7}, 7),
    ],
)  # fmt: skip
def test_time_and_steps_end_it_and_thirty_seconds_if_nothing_else(
    limits: dict[str, Any], steps: int
) -> None:
    if "stop" in limits:
        limits = {**limits, "stop": StopAfter(limits["stop"])}
    found, model = drain(train_steps(IMAGE, PAINT, network=NET, config=QUICK, **limits))
    assert [s.seconds for s in found] == [10.0 * i for i in range(1, steps + 1)]
    assert len(model.history) == steps


def test_a_generator_may_be_closed() -> None:
    generator = train_steps(IMAGE, PAINT, network=NET, config=QUICK)
    next(generator)
    generator.close()
    assert list(generator) == []


# --- repeatable ------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights() -> None:
    config = QUICK.replaced(patch=48, gamma=0.2, noise=0.05)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1]  # noqa: NPY002
    a, b, c = (run(config=config, max_steps=6, seed=s) for s in (1, 1, 2))
    assert same(a, b)
    assert [s.loss for s in a.history] == [s.loss for s in b.history]
    assert not same(a, c)
    assert a.history[0].loss != c.history[0].loss
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()  # noqa: NPY002


@pytest.mark.parametrize(
    "steps",
    [
        5,
        pytest.param(20, marks=pytest.mark.slow),
        pytest.param(200, marks=pytest.mark.slow),
    ],
)
def test_the_defaults_are_repeatable(steps: int) -> None:
    a, b = (train(IMAGE, PAINT, max_steps=steps) for _ in range(2))
    assert a.config == working_config("unet++")
    assert same(a, b)
    assert a.history[-1].loss == b.history[-1].loss


def test_dropout_follows_the_seed_too() -> None:
    net = NET.replaced(dropout=0.5)
    state = torch.get_rng_state()
    a = run(network=net, max_steps=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert same(a, run(network=net, max_steps=3))
    losses = [run(network=net, max_steps=2, seed=s).history[1].loss for s in (0, 1)]
    assert losses[0] != losses[1]


def test_dropout_differs_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    own = trainer(create_model(NetConfig("unet", width=4, levels=1, dropout=0.5)))
    drawn = []
    monkeypatch.setattr(own, "_loss", lambda *_: torch.zeros((), requires_grad=True))
    real = own.network.forward
    monkeypatch.setattr(
        own.network, "forward", lambda x, *_: drawn.append(torch.rand(4)) or real(x)
    )
    own.step()
    own.step()
    assert not torch.equal(*drawn)


def test_nothing_is_changed() -> None:
    start = run()
    image, paint = IMAGE.astype(np.float32), PAINT.copy()
    before = {k: v.clone() for k, v in weights(start).items()}
    state = (start.prior, start.history, dict(start.provenance), start.classes)
    run(images=image, paint=paint, model=start, classes=("background", "class 2", "c"))
    np.testing.assert_array_equal(image, IMAGE)
    np.testing.assert_array_equal(paint, PAINT)
    assert all(torch.equal(v, before[k]) for k, v in weights(start).items())
    assert state == (start.prior, start.history, start.provenance, start.classes)
    assert not start.network.training


# --- bad input -------------------------------------------------------------------


def with_value(value: float, dtype: Any = np.int64) -> np.ndarray:
    paint = PAINT.astype(dtype)
    paint[0, 0] = value
    return paint


NAN = IMAGE.astype(float)
NAN[3, 3] = np.nan
RGB = np.stack([IMAGE] * 3, -1)
MODEL = create_model(PLAIN, classes=("background", "b"))
GAP = PAINT.copy()
GAP[GAP == 2] = 7


@pytest.mark.parametrize(
    ("images", "paint", "settings", "message"),
    [
        (
            IMAGE,
            PAINT[1:],
            {},
            r"`annotation` must have the image's shape \(96, 96\), got \(95, 96\)",
        ),
        (IMAGE, PAINT / 1, {}, "`annotation` must hold whole numbers .*float64"),
        (IMAGE, with_value(-3), {}, "must hold values from 0 to 255, got -3 to 2"),
        (IMAGE, with_value(999), {}, "must hold values from 0 to 255, got 0 to 999"),
        (IMAGE, 0 * PAINT, {}, "must have annotated pixels, got none"),
        (IMAGE, PAINT > 0, {}, r"at least two classes, got only the value\(s\) \[1\]"),
        (
            IMAGE,
            2 * (PAINT == 2),
            {},
            r"at least two classes, got only the value\(s\) \[2\]",
        ),
        (
            IMAGE,
            0 * PAINT,
            {"unlabelled": None},
            r"at least two classes, got only .* \[0\]",
        ),
        (IMAGE, GAP, {}, "numbers 1, 2, ... without a gap .* nothing has the number 2"),
        (
            IMAGE,
            GAP,
            {"unlabelled": None},
            "numbers 0, 1, ... without .* has the number 2",
        ),
        (NAN, PAINT, {}, "must hold finite numbers only, got 1 NaN"),
        (0 * IMAGE + 5, PAINT, {}, "must have contrast .* only the value 5"),
        ([], [], {}, "at least one, got 0 and 0"),
        ([IMAGE], [], {}, "got 1 and 0"),
        ([IMAGE], PAINT, {}, "must both be arrays or both be sequences"),
        (RGB, PAINT, {}, "looks like colour. Pass channel_axis=-1"),
        (
            RGB,
            PAINT,
            {"channel_axis": 5},
            "`channel_axis` must lie between -3 and 2, got 5",
        ),
        (
            np.stack([IMAGE] * 17),
            PAINT,
            {"channel_axis": 0},
            "at most 16 channels, got 17",
        ),
        (
            IMAGE,
            PAINT,
            {"network": "resnet"},
            "`network` must be one of .*, got 'resnet'",
        ),
        (IMAGE, PAINT, {"network": None}, "`network` must be one of .*, got None"),
        (
            IMAGE,
            PAINT,
            {"network": NetConfig("unet", 3)},
            "takes 3 channel.* images have 1",
        ),
        (
            RGB,
            PAINT,
            {"channel_axis": 2, "model": MODEL},
            r"have 1 channel\(s\) .*, got 3",
        ),
        (IMAGE, PAINT, {"classes": ("a",)}, "`classes` must be 2 to 255 names, got 1"),
        (IMAGE, PAINT, {"classes": "ab"}, "`classes` must be a sequence of names"),
        (IMAGE, PAINT, {"classes": ("a", "a")}, "`classes` must differ"),
        (
            IMAGE,
            with_value(3),
            {"classes": ("a", "b")},
            r"classes 1 to 2 \(a, b\), got 3",
        ),
        (
            IMAGE,
            with_value(3) + 0,
            {"classes": ("a", "b", "c"), "unlabelled": None},
            r"classes 0 to 2 \(a, b, c\), got 3",
        ),
        (
            IMAGE,
            with_value(3),
            {"model": MODEL},
            r"classes 1 to 2 \(background, b\), got 3",
        ),
        (
            IMAGE,
            PAINT,
            {"model": MODEL, "classes": ("b", "background")},
            r"begin with the model's own \('background', 'b'\), got \('b', 'backg",
        ),
        (IMAGE, PAINT, {"model": MODEL, "classes": ("b", "c", "d")}, "must begin with"),
        (
            IMAGE,
            PAINT,
            {"model": MODEL, "unlabelled": None},
            "`unlabelled` must be 0 as",
        ),
        (IMAGE, PAINT, {"unlabelled": 255}, "`unlabelled` must be 0 .*, got 255"),
        (IMAGE, PAINT, {"config": {"patch": 64}}, "`config` must be a TrainConfig"),
        (
            IMAGE,
            PAINT,
            {"max_steps": 0},
            "`max_steps` must lie between 1 and .*, got 0",
        ),
        (
            IMAGE,
            PAINT,
            {"max_steps": 1.5},
            "`max_steps` must be a whole number, got 1.5",
        ),
        (
            IMAGE,
            PAINT,
            {"max_steps": 10**12},
            "`max_steps` must lie between 1 and 1000000000, got 1000000000000",
        ),
        (
            np.ones((1, 1)),
            np.ones((1, 1), np.uint8),
            {"classes": ("a", "b")},
            "must have contrast",
        ),
        (IMAGE, PAINT, {"max_seconds": -1}, "`max_seconds` must lie between 0 and"),
        (IMAGE, PAINT, {"max_seconds": float("inf")}, "`max_seconds` must lie between"),
        (IMAGE, PAINT, {"max_seconds": "5"}, "`max_seconds` must be a number, got '5'"),
        (IMAGE, PAINT, {"seed": -1}, "`seed` must lie between 0 and .*, got -1"),
        (IMAGE, PAINT, {"seed": 2**70}, "`seed` must lie between 0 and"),
        (
            IMAGE,
            PAINT,
            {"device": "cuda:99"},
            "`device` must be one that this computer",
        ),
        (None, None, {}, "real numbers, got dtype object"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    images: Any,
    paint: Any,
    settings: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "__init__", lambda *_, **__: pytest.fail("began"))
    with pytest.raises(ValueError, match=message):
        train_steps(images, paint, **settings)
    with pytest.raises(ValueError, match=message):
        train(images, paint, **settings)


# --- images of all kinds ---------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_trains_and_its_model_predicts(name: str) -> None:
    config = working_config(name, width=4)
    model = run(network=config, max_steps=3)
    assert model.config == config
    assert not same(model, create_model(config, classes=model.classes))
    proba = predict_proba(model, IMAGE)
    assert np.isfinite(proba).all()
    assert proba.std() > 1e-4


@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (2, 2), (5, 40), (33, 31)])
def test_images_may_be_smaller_than_a_patch(shape: tuple[int, int]) -> None:
    image = np.arange(np.prod(shape)).reshape(shape)
    paint = np.zeros(shape, np.uint8)
    paint[0, 0], paint[-1, -1] = 1, 2
    model = run(images=image, paint=paint)
    assert predict(model, image).shape == shape


def test_two_pixels_per_class_in_a_file_that_is_read_only(tmp_path: Path) -> None:
    paint = np.zeros_like(PAINT)
    paint[0, :2], paint[9, 3:5] = 1, 2
    np.save(tmp_path / "paint.npy", paint)
    own = run(paint=np.load(tmp_path / "paint.npy", mmap_mode="r"))
    assert same(own, run(paint=paint))
    np.testing.assert_array_equal(np.load(tmp_path / "paint.npy"), paint)


def test_sizes_and_dtypes_may_be_mixed() -> None:
    images = [
        IMAGE, IMAGE[:20, :50].astype(np.uint16) * 100, IMAGE[:50] / 255, IMAGE > 120,
        np.stack([IMAGE[:30]] * 2),
    ]  # fmt: skip
    paints = [PAINT, PAINT[:20, :50], PAINT[:50], PAINT, np.stack([PAINT[:30]] * 2)]
    paints[1] = paints[1].copy()
    paints[1][0, 0] = 1
    own = run(images=images, paint=paints, max_steps=4)
    assert len(own.provenance["data"]) == 6
    again = run(images=tuple(images), paint=tuple(paints), max_steps=4)
    assert same(own, again)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_colour_and_many_channels(axis: int) -> None:
    image = np.stack([IMAGE, IMAGE[::-1], IMAGE.T, IMAGE // 2, 0 * IMAGE])
    model = run(
        images=np.moveaxis(image, 0, axis),
        channel_axis=axis,
        network="unet",
        max_steps=1,
    )
    assert model.config.in_channels == 5
    assert predict(model, image, channel_axis=0).shape == IMAGE.shape


def test_planes_of_a_stack_without_strokes_need_no_sense() -> None:
    stack = np.stack([NAN, IMAGE, NAN])
    paint = np.zeros(stack.shape, np.uint8)
    paint[1] = PAINT
    model = run(images=stack, paint=paint)
    assert len(model.provenance["data"]) == 1


def test_classes_without_strokes_are_allowed_when_named() -> None:
    names = ("background", "cell", "vein")
    model = run(paint=(PAINT == 1).astype(int), classes=names)
    assert model.classes == names
    assert predict_proba(model, IMAGE).shape == (3, *IMAGE.shape)
    both = run(paint=with_value(3), network="unet", max_steps=1)
    assert both.classes == ("background", "class 2", "class 3")


# --- what is learned from --------------------------------------------------------


def exact(**settings: Any) -> dict[str, Any]:
    """Return settings without any change of grey values and position but flips."""
    return {
        "patch": 64, "batch": 16, "gain": 0, "offset": 0, "rotation": 0, "scale": 0,
        "elastic_sigma": 0, **settings,
    }  # fmt: skip


@pytest.mark.parametrize("held_out", [0.0, 0.25])
@pytest.mark.parametrize("name", ["unet++", "unet-valid"])
def test_only_annotated_pixels_that_are_not_held_out_enter_the_loss(
    held_out: float, name: str
) -> None:
    # Channels that tell each pixel's row and column.
    image = np.stack(np.indices((170, 150))).astype(np.float32)
    paint = np.random.default_rng(0).integers(0, 3, (170, 150)).astype(np.uint8)
    paint[60:100, 60:100] = 0
    paint[:, 149] = 0
    config = working_config(name, 2, 2, width=4, levels=2)
    examples = read_examples(image, paint, channel_axis=0)
    own = Trainer(
        create_model(config), examples, QUICK.replaced(**exact(held_out=held_out)),
        seed=3, device=CPU,
    )  # fmt: skip
    mask = own.held_out.mask(paint.shape)
    assert mask.any() == (held_out > 0)
    trained = np.where(mask, 0, paint)
    low, high = np.percentile(image.reshape(2, -1), (1, 99.8), axis=1)
    seen = np.zeros(paint.shape, bool)
    for _ in range(6):
        patches, target = own.batch()
        assert patches.shape[-1] - target.shape[-1] == 2 * own.network.margin
        m = own.network.margin
        inner = patches[:, :, m : patches.shape[-1] - m, m : patches.shape[-1] - m]
        place = inner.numpy() * (high - low)[:, None, None] + low[:, None, None]
        rows, columns = np.moveaxis(np.rint(place).astype(int), 1, 0)
        known = (target != losses.IGNORE).numpy()
        # Mirrored pixels look like the inside but must never be annotated.
        np.testing.assert_array_equal(
            trained[rows, columns][known], (target + 1).numpy()[known]
        )
        seen[rows[known], columns[known]] = True
        assert (known.mean((1, 2)) > 0).all()
    assert not seen[trained == 0].any()
    assert seen.sum() > 0.5 * (trained > 0).sum()


def test_soft_labels_lie_where_the_forest_put_them() -> None:
    image = np.stack(np.indices((170, 150))).astype(np.float32)
    paint = np.zeros((170, 150), np.uint8)
    paint[20:30, 10:130], paint[100:110, 10:130] = 1, 2
    own = Trainer(
        create_model(working_config("unet++", 2, 2, width=4, levels=2)),
        read_examples(image, paint, channel_axis=0),
        QUICK.replaced(**exact(held_out=0.25), forest=1.0),
        seed=3,
        device=CPU,
    )
    own.steps = 25
    own.step()
    lesson, table = own._lesson, own._table
    assert lesson is not None
    assert table is not None
    low, high = np.percentile(image.reshape(2, -1), (1, 99.8), axis=1)
    belief = np.full((*paint.shape, 2), np.nan, np.float32)
    belief.reshape(-1, 2)[lesson.places[0]] = lesson.beliefs[0]
    belief[own.held_out.mask(paint.shape) | (paint > 0)] = np.nan
    patches, target = own.batch()
    place = patches.numpy() * (high - low)[:, None, None] + low[:, None, None]
    rows, columns = np.moveaxis(np.rint(place).astype(int), 1, 0)
    known = (own._rows >= 0).numpy()
    assert 0.002 < known.mean() < 0.04
    assert not (known & (target >= 0).numpy()).any()
    np.testing.assert_array_equal(
        table[own._rows[own._rows >= 0]].numpy(), belief[rows[known], columns[known]]
    )


def test_a_forest_teaches_what_is_new_or_goes_on_with_its_images() -> None:
    fresh = run(max_steps=1, config=QUICK.replaced(forest=1.0))
    alone = run(max_steps=1, config=QUICK.replaced(forest=0.0))
    assert fresh.provenance["taught"]
    assert not alone.provenance["taught"]
    again = QUICK.replaced(forest=1.0)
    assert run(max_steps=1, model=fresh, config=again).provenance["taught"]
    assert not run(max_steps=1, model=alone, config=again).provenance["taught"]
    other = run(max_steps=1, model=fresh, config=again, images=IMAGE[::-1].copy())
    assert not other.provenance["taught"]


def test_without_memory_for_a_forest_it_trains_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def teach(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("napari_unetpp.teacher.Teacher.teach", teach)
    config = QUICK.replaced(forest=1.0)
    assert run(max_steps=27, config=config).provenance["steps"] == 27
    assert "forest" in caplog.text


def test_the_warped_annotation_lies_on_the_warped_image() -> None:
    # Class 1 is dark, class 2 is bright, what is not annotated is between.
    image = np.full((120, 120), 50.0, np.float32)
    paint = np.zeros((120, 120), np.uint8)
    image[10:50, 10:70], paint[14:46, 14:66] = 0, 1
    image[60:110, 50:110], paint[64:106, 54:106] = 100, 2
    own = trainer(image=image, paint=paint, patch=64, batch=16, gain=0, offset=0,
                  warp_after=0, rotation=45, scale=0.3, elastic_sigma=2)  # fmt: skip
    patches, target = own.batch()
    dark, bright = (patches[:, 0][target == k] for k in (0, 1))
    assert min(len(dark), len(bright)) > 1000
    assert (dark < 0.25).float().mean() > 0.98
    assert (bright > 0.75).float().mean() > 0.98


def test_warps_begin_after_their_step() -> None:
    batches = []
    for warp_after in (0, 1, 2):
        own = trainer(warp_after=warp_after, rotation=45)
        own.steps = 1
        batches.append(own.batch()[0])
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[1], batches[2])


@pytest.mark.parametrize(
    "loss", ["cross_entropy", "dice", "jaccard", "bce_dice", "focal"]
)
def test_every_loss_has_no_gradient_where_nothing_is_annotated(loss: str) -> None:
    own = trainer(loss=loss)
    patches, target = own.batch()
    logits = own.network(patches)[-1].detach().requires_grad_()
    own._loss([logits], target).backward()
    assert logits.grad is not None
    grad = logits.grad.abs().amax(1)
    assert (grad[target == losses.IGNORE] == 0).all()
    assert (grad[target != losses.IGNORE] > 0).any()
    changed = logits.detach() + 5 * torch.randn(logits.shape) * (
        target == losses.IGNORE
    ).unsqueeze(1)
    fresh = [trainer(loss=loss)._loss([x], target) for x in (logits, changed)]
    assert torch.equal(*fresh)


def test_the_loss_is_the_mean_over_the_heads() -> None:
    own = trainer(balance=0)
    patches, target = own.batch()
    heads = own.network(patches)
    assert len(heads) == 2
    expected = [losses.cross_entropy(h, target) for h in heads]
    torch.testing.assert_close(
        own._loss(heads, target), (expected[0] + expected[1]) / 2
    )


def test_classes_are_weighted_by_their_running_frequency() -> None:
    own = trainer(create_model(NET, classes=("a", "b", "c")), balance=0.5)
    batches = torch.tensor([[0] * 6 + [1] * 2 + [-1] * 4, [0] * 3 + [2] * 9])
    frequency = np.zeros(3)
    for target, counts in zip(batches, ([6, 2, 0], [3, 0, 9]), strict=True):
        frequency = 0.98 * frequency + 0.02 * np.array(counts)
        share = np.maximum(frequency / frequency.sum(), 1e-3)
        expected = share**-0.5
        found = own._class_weights(target.view(1, 3, 4))
        assert found is not None
        np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-5)
    assert trainer(balance=0)._class_weights(batches) is None
    nothing = trainer()._class_weights(torch.full((1, 3, 4), -1))
    assert nothing is not None
    assert torch.equal(nothing, torch.ones(2))


@pytest.mark.parametrize(
    ("optimizer", "momentum"), [("adam", 0.9), ("adamw", 0.9), ("sgd", 0.9), ("sgd", 0)]
)
def test_optimizers_take_the_settings(optimizer: Any, momentum: float) -> None:
    own = trainer(optimizer=optimizer, momentum=momentum, learning_rate=0.02,
                  weight_decay=0.03)  # fmt: skip
    (group,) = own._optimizer.param_groups
    assert type(own._optimizer).__name__.lower() == optimizer
    assert (group["lr"], group["weight_decay"]) == (0.02, 0.03)
    if optimizer == "sgd":
        assert (group["momentum"], group["nesterov"]) == (momentum, momentum > 0)
    assert own.step() > 0


def test_what_is_fixed_in_a_network_is_not_learned() -> None:
    model = run(network=working_config("fcn-8s", width=4), max_steps=2)
    fresh = create_model(model.config, classes=model.classes)
    assert torch.equal(
        weights(model)["upscore8.weight"], weights(fresh)["upscore8.weight"]
    )
    assert not model.network.upscore8.weight.requires_grad  # type: ignore[union-attr]


# --- averaging, prior, score -----------------------------------------------------


@pytest.mark.parametrize("averaging", [0, 2.5])
def test_the_shown_weights_follow_the_learned_ones(averaging: float) -> None:
    own = trainer(averaging=averaging)
    expected = {k: p.detach().double() for k, p in own.network.named_parameters()}
    for step in (1, 2, 3):
        own.step()
        keep = (step / (step + 1)) ** (averaging + 1) if averaging else 0
        for name, p in own.network.named_parameters():
            expected[name] = keep * expected[name] + (1 - keep) * p.detach().double()
    shown = dict(own.model().network.named_parameters())
    prior = own.model().prior
    own.model().network.add_to_logits([-p for p in prior])
    for name, value in expected.items():
        if "score.bias" in name:
            value = value + torch.tensor(prior).repeat_interleave(len(value) // 2)
        torch.testing.assert_close(
            shown[name].detach(), value.float(), atol=2e-6, rtol=1e-5
        )


@pytest.mark.parametrize(("images", "pooled"), [(1, True), (2, False)])
def test_norms_are_pooled_where_there_is_a_single_image(
    images: int, pooled: bool
) -> None:
    examples = read_examples([IMAGE] * images, [PAINT] * images)
    model = create_model(NetConfig("unet", width=8, levels=1, norm="group"))
    own = Trainer(model, examples, QUICK, seed=0, device=CPU)
    own.step()
    assert norms(own.network) == {pooled}
    assert norms(own.model().network) == {False}
    alone = Trainer(
        model, examples, QUICK.replaced(pooled_norms=False), seed=0, device=CPU
    )
    alone.step()
    assert norms(alone.network) == {False}
    assert same(own.model(), alone.model()) != pooled


def norms(network: torch.nn.Module) -> set[bool]:
    return {m.pooled for m in network.modules() if isinstance(m, GroupNorm)}


def test_a_late_average_stands_for_several_steps() -> None:
    own = trainer(averaging=2.5)
    name, learned = next(iter(own.network.named_parameters()))
    expected = learned.detach().double()
    with torch.no_grad():
        learned.add_(1)
    moved = []
    for step in range(1, 81):
        own.steps = step
        before = own.state().tensors[f"shown.{name}"]
        own._average()
        shown = own.state().tensors[f"shown.{name}"]
        moved.append(not np.array_equal(before, shown))
        keep = (step / (step + 1)) ** 3.5
        expected = keep * expected + (1 - keep) * learned.detach().double()
    assert moved == [step <= 64 or step % 4 == 0 for step in range(1, 81)]
    np.testing.assert_allclose(shown, expected.numpy(), atol=2e-6, rtol=1e-5)


def test_batch_norms_statistics_are_shown_as_they_are() -> None:
    own = trainer(create_model(NET.replaced(norm="batch")))
    own.step()
    for (name, shown), mine in zip(
        own.model().network.named_buffers(), own.network.buffers(), strict=True
    ):
        assert torch.equal(shown, mine), name
        assert shown.ndim == 0 or shown.std() > 0


def test_the_models_weights_are_its_own() -> None:
    own = trainer()
    own.step()
    model = own.model()
    before = {k: v.clone() for k, v in weights(model).items()}
    own.step()
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    assert not same(model, own.model())


PRIOR_PAINT = np.zeros((96, 96), np.uint8)
PRIOR_PAINT[:10, :9], PRIOR_PAINT[50:60, 50:53] = 1, 2  # 90 and 30 pixels


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"prior": 0.5, "balance": 1}, 0.5 * np.log([1.5, 0.5])),
        ({"prior": 1, "balance": 0.5}, 0.5 * np.log([1.5, 0.5])),
        ({"prior": 0, "balance": 1}, [0, 0]),
        ({"prior": 1, "balance": 0}, [0, 0]),
        ({"prior": 1, "loss": "dice"}, [0, 0]),
    ],
)
def test_the_prior_is_the_log_of_the_painted_shares(
    settings: dict[str, Any], expected: Any
) -> None:
    own = trainer(paint=PRIOR_PAINT, **settings)
    model = own.model()
    np.testing.assert_allclose(model.prior, expected, atol=1e-12)
    x = torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        for found, raw in zip(model.network(x), own._shown.eval()(x), strict=True):
            added = (found - raw).mean((0, 2, 3))
            np.testing.assert_allclose(added, expected, atol=1e-5)


def test_a_class_without_strokes_has_no_prior() -> None:
    model = create_model(NET, classes=("a", "b", "c"))
    prior = trainer(model, paint=PRIOR_PAINT, prior=1, balance=1).model().prior
    np.testing.assert_allclose(prior, np.log([0.75 * 3, 0.25 * 3, 1]), atol=1e-12)


@pytest.mark.parametrize("name", ["unet++", "fcn-8s"])
def test_the_prior_is_taken_off_before_training_goes_on(name: str) -> None:
    start = create_model(working_config(name, width=4))
    first = trainer(start, paint=PRIOR_PAINT)
    for a, b in zip(
        first.network.parameters(), start.network.parameters(), strict=True
    ):
        assert torch.equal(a, b)
    model = first.model()
    assert any(model.prior)
    for _ in range(5):
        model = trainer(model, paint=PRIOR_PAINT).model()
    for (key, found), value in zip(
        weights(model).items(), weights(first.model()).values(), strict=True
    ):
        torch.testing.assert_close(found, value, atol=1e-5, rtol=0, msg=key)
    other = trainer(model, paint=PAINT)
    for (key, found), value in zip(
        other.network.state_dict().items(), weights(start).values(), strict=True
    ):
        torch.testing.assert_close(found, value, atol=1e-5, rtol=0, msg=key)
    assert other.model().prior != model.prior


def test_held_out_strokes_give_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_room, "_SCORE_EVERY", 2)
    image, paint = textures(side=192)
    config = QUICK.replaced(patch=64)
    start = create_model(NET, seed=1)
    own = trainer(start, paint=paint, image=image, patch=64, seed=1)
    _, (scoring,) = own.held_out.split([paint], [0])
    assert own._scorer.enough
    assert sum(len(w.truth) for w in own._scorer._held) <= np.count_nonzero(scoring)
    assert own.score is None
    own.step()
    assert own.score is None
    own.step()
    # It is of what the user gets: the averaged weights, with the shares of the classes.
    model = own.model()
    found = own._scorer.measure(model.network, (0.0, 0.0), half=True)
    assert own.score == pytest.approx(found[2].mean, abs=0.01)
    assert set(own.scores) == {1, 2}
    steps, model = drain(
        train_steps(image, paint, network=NET, config=config, max_steps=4, seed=1)
    )
    assert steps[0].score is None
    assert steps[1].score == steps[2].score == own.score
    assert 0 <= steps[3].score <= 1
    assert model.provenance["held_out_score"] == steps[3].score


def scored(mean: float) -> Score:
    """Return a score that is sure of itself."""
    return Score(mean, mean, mean, (mean, mean), 100)


@pytest.mark.parametrize(
    ("values", "patience", "ends_at", "best_at"),
    [([0.3, 0.5, 0.4, 0.5, 0.9], 2, 4, 2), ([0.3, float("nan"), 0.4, 0.2], 2, 5, 3),
     ([float("nan")] * 5, 2, 2, None), ([None, None, None, 0.2, 0.1], 1, 5, 4),
     ([None] * 5, 1, 5, None), ([0.1, 0.2, 0.3, 0.4, 0.5], 1, 5, 5)],
)  # fmt: skip
def test_patience_ends_it_and_keeps_the_best(
    values: list[float | None],
    patience: int,
    ends_at: int,
    best_at: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure(*_: Any, **__: Any) -> dict[int, Score]:
        value = values[min(len(asked), len(values) - 1)]
        asked.append(value)
        return {} if value is None else {1: scored(value), 2: scored(value)}

    asked: list[float | None] = []
    monkeypatch.setattr(trainer_room, "_SCORE_EVERY", 1)
    monkeypatch.setattr(trainer_room.Scorer, "measure", measure)
    config = QUICK.replaced(patience=patience)
    steps, model = drain(
        train_steps(IMAGE, PAINT, network=NET, config=config, max_steps=5)
    )
    assert len(steps) == ends_at
    assert len(model.history) == model.provenance["steps"] == (best_at or ends_at)
    monkeypatch.undo()
    same_steps = run(max_steps=best_at or ends_at)
    assert same(model, same_steps)


def test_the_valid_network_is_scored_on_its_inner_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer_room, "_SCORE_EVERY", 1)
    config = NetConfig("unet-valid", width=4, levels=1)
    image, paint = textures(side=192)
    model = run(images=image, paint=paint, network=config, seed=1)
    assert model.history[0].score is not None
    assert 0 <= model.history[0].score <= 1


# --- learning --------------------------------------------------------------------


FAST = TrainConfig(patch=64, batch=4, learning_rate=5e-3, warp_after=10**6)


@pytest.fixture(scope="module")
def learned() -> Model:
    net = NetConfig("unet", width=8, levels=2, residual=True)
    return train(IMAGE, PAINT, network=net, config=FAST, max_steps=60)


def test_two_textures_are_told_apart(learned: Model) -> None:
    image, truth = textures(seed=9)
    labels = predict(learned, image)
    assert evaluate(labels, truth).mean_iou > 0.9
    losses = [s.loss for s in learned.history]
    # A batch of one texture alone is a surprise to norms that are pooled over it.
    assert np.median(losses[-10:]) < 0.3 * losses[0]


def test_dense_masks_come_back_with_their_own_values() -> None:
    mask = TRUTH - 1
    net = NetConfig("unet", width=8, levels=2, residual=True)
    config = TrainConfig(patch=64, batch=4, learning_rate=5e-3, prior=0.0)
    model = train(
        IMAGE, mask, unlabelled=None, network=net, config=config, max_steps=30
    )
    assert model.unlabelled is None
    assert model.classes == ("background", "class 2")
    labels = predict(model, IMAGE)
    assert set(np.unique(labels)) == {0, 1}
    assert evaluate(labels, mask, unlabelled=None).mean_iou > 0.7
    more = train(IMAGE, mask, model=model, config=config, max_steps=1)
    assert more.unlabelled is None


# --- going on from a model -------------------------------------------------------


def test_fine_tuning_goes_on_where_the_model_is(learned: Model) -> None:
    more = train(IMAGE, PAINT, model=learned, config=FAST, max_steps=2)
    assert more.history[0].loss < 0.3 * learned.history[0].loss
    assert [s.step for s in more.history] == [1, 2]
    assert more.classes == learned.classes
    assert not same(more, learned)


def test_the_models_own_preprocessing_is_kept() -> None:
    start = create_model(PLAIN)
    start.preprocessing = start.preprocessing.replaced(low=10.0, clip_high=1.0)
    more = run(model=start)
    assert more.preprocessing == start.preprocessing
    own = Trainer(
        start,
        read_examples(IMAGE, PAINT, preprocessing=start.preprocessing),
        QUICK.replaced(gain=0.0, offset=0.0), seed=0, device=CPU,
    )  # fmt: skip
    assert own.batch()[0].max() <= 1


@pytest.mark.parametrize("name", NETWORKS)
def test_more_classes_leave_the_old_ones_as_they_were(name: str) -> None:
    model = create_model(working_config(name, 1, 2, width=4), classes=("a", "b"))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.network.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=rng))
    model.prior = (0.25, -0.5)
    model.history = (TrainStep(1, 0.5, 2.0),)
    more = with_classes(model, ("a", "b", "c", "d"), seed=1)
    assert more.classes == ("a", "b", "c", "d")
    assert more.config == model.config.replaced(out_channels=4)
    assert more.prior == (0.25, -0.5, 0.0, 0.0)
    assert (more.history, more.provenance) == (model.history, model.provenance)
    assert same(more, with_classes(model, more.classes, seed=1))
    if not name.startswith("fcn"):  # whose scores begin at 0
        assert not same(more, with_classes(model, more.classes, seed=2))
    side = model.network.valid_size(64)
    x = torch.randn(1, 1, side, side, generator=rng)
    with torch.inference_mode():
        for old, new in zip(model.network(x), more.network(x), strict=True):
            torch.testing.assert_close(new[:, :2], old, atol=1e-5, rtol=1e-5)
            assert old.std() > 1e-3
            # New classes begin without a preference.
            assert not torch.allclose(new[:, 2], old[:, 0])
    for key, p in more.network.named_parameters():
        assert p.requires_grad == model.network.get_parameter(key).requires_grad
    assert not more.network.training


def test_classes_can_be_added_while_fine_tuning() -> None:
    start = run(max_steps=4)
    names = (*start.classes, "vein")
    paint = PAINT.copy()
    paint[40:50, 40:50] = 3
    more = run(model=start, paint=paint, classes=names)
    assert more.classes == names
    assert len(more.prior) == 3
    assert predict_proba(more, IMAGE).shape[0] == 3
    kept = run(model=more, classes=None)
    assert kept.classes == names
    alone = run(model=more, paint=(PAINT == 2) * 3)
    assert alone.classes == names


def test_same_names_give_a_copy() -> None:
    model = create_model(PLAIN)
    copy = with_classes(model, model.classes, seed=0)
    assert same(model, copy)
    assert copy.network is not model.network
    assert with_classes(model, (*model.classes, "c"), seed=0).prior == ()


def test_the_origin_is_written_down(tmp_path: Path) -> None:
    model = run(seed=5)
    found = model.provenance
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        "napari_unetpp", "torch", "python", "device", "threads", "seed", "steps",
        "held_out", "held_out_score", "held_out_interval", "settings", "data", "parent",
        "taught",
    }  # fmt: skip
    assert found["seed"] == 5
    assert found["steps"] == 2
    assert found["device"] == "cpu"
    assert found["torch"] == torch.__version__
    assert found["settings"] == QUICK.to_dict()
    assert found["data"] == read_examples(IMAGE, PAINT).fingerprints
    assert found["parent"] is None
    model.save(tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    assert run(model=loaded).provenance["parent"] == loaded.provenance["digest"]


# --- what can go wrong -----------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_it(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Trainer._loss, []

    def broken(self: Trainer, heads: Any, target: Any) -> torch.Tensor:
        calls.append(1)
        loss = real(self, heads, target)
        return loss * value if len(calls) == 3 else loss

    monkeypatch.setattr(Trainer, "_loss", broken)
    steps = train_steps(IMAGE, PAINT, network=NET, config=QUICK)
    assert [next(steps).step, next(steps).step] == [1, 2]
    with pytest.raises(
        TrainingError, match=rf"finite, got {value} at step 3\. Start over"
    ):
        next(steps)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_no_memory_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Trainer, "_loss", full)
    with pytest.raises(DeviceMemoryError, match="no memory left for a training step"):
        run()


def test_other_failures_go_on_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a kernel broke")

    monkeypatch.setattr(Trainer, "_loss", broken)
    with pytest.raises(RuntimeError, match="a kernel broke"):
        run()


def test_a_batch_without_annotated_pixels_changes_nothing_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = trainer(weight_decay=0)
    before = {k: v.clone() for k, v in own.network.state_dict().items()}
    patches, target = own.batch()
    empty = torch.full_like(target, losses.IGNORE)
    monkeypatch.setattr(own, "batch", lambda: (patches, empty))
    assert own.step() == 0
    for name, value in own.network.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_energy_between_strokes_comes_in_slowly_and_is_no_part_of_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[torch.Size] = []

    def energy(logits: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        asked.append(image.shape)
        assert image.shape[2:] == logits.shape[2:]
        return 0 * logits.sum() + 10.0

    monkeypatch.setattr(trainer_room.losses, "edge_aware", energy)
    image, truth = textures(seed=3)
    examples = read_examples(image, truth)
    for name in ("unet++", "unet-valid"):
        model = create_model(name, width=4, levels=2)
        config = TrainConfig(patch=32, batch=1, edges=2.0)
        trainer = Trainer(model, examples, config, seed=0, device=torch.device("cpu"))
        patches, _ = trainer.batch()
        heads = trainer.network(patches)
        weights = []
        for steps in (0, 25, 50, 5000):
            trainer.steps = steps
            term = torch.as_tensor(trainer._between_strokes(heads, patches))
            weights.append(float(term.detach()) / 10)
        full = 2.0 / len(heads)
        np.testing.assert_allclose(weights, [0, full / 2, full, full], rtol=1e-6)
        trainer.steps = 5000
        assert trainer.step() < 5  # the energy alone would be 10 or more
    quiet = Trainer(
        create_model("unet", width=4, levels=1),
        examples,
        TrainConfig(patch=32, batch=1, edges=0.0),
        seed=0,
        device=torch.device("cpu"),
    )
    count = len(asked)
    quiet.step()
    assert len(asked) == count


def test_unetpp_learns_shallow_nodes_at_every_step_and_deep_ones_in_turn() -> None:
    image = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    strokes = np.zeros((64, 64), np.uint8)
    strokes[5:9, 5:40], strokes[40:44, 5:40] = 1, 2
    examples = read_examples(image, strokes)
    config = TrainConfig(patch=32, batch=2)

    def depths(net: NetConfig) -> list[int]:
        model = Model(build_network(net, seed=0), ("a", "b"))
        one = Trainer(model, examples, config, seed=0, device=torch.device("cpu"))
        found = []
        for one.steps in range(10):
            found.append(one._depth())
        return found

    assert depths(working_config("unet++", width=4)) == [1, 2, 1, 3, 1, 2, 1, 4, 1, 2]
    assert depths(working_config("unet", width=4)) == [3] * 10
    assert depths(working_config("unet++", width=4, levels=2)) == [1, 2] * 5
    plain = NetConfig("unet++", width=4, levels=3, deep_supervision=True)
    assert depths(plain) == [3] * 10
