"""The live loop: newest strokes, what is seen first, depth at once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from napari_unetpp import api
from napari_unetpp.config import NetConfig, TrainConfig
from napari_unetpp.examples import ExampleBook
from napari_unetpp.live import live_steps, preview, warm_up
from napari_unetpp.live.preview import Preview, disagreement, live_tile
from napari_unetpp.live.session import _Clock, missing
from napari_unetpp.messages import (
    Coverage,
    DepthCost,
    Mailbox,
    Prediction,
    Progress,
    Snapshot,
    Started,
    View,
    Waiting,
    Wishes,
)
from napari_unetpp.networks import build_network
from napari_unetpp.preprocess import Planes
from napari_unetpp.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator

CLASSES = ("background", "disc")
SMALL = NetConfig("unet++", width=4, levels=3, deep_supervision=True, stem=2)
FAST = TrainConfig(patch=32, batch=2, held_out=0.0)


def picture(size: int = 64, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a bright disc on noise, and a stroke on each."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    inside = np.hypot(y - size / 2, x - size / 2) < size / 4
    image = inside + 0.2 * rng.standard_normal((size, size))
    strokes = np.zeros((size, size), np.uint8)
    strokes[4:7, 4:40] = 1
    strokes[size // 2 - 1 : size // 2 + 2, size // 2 - 8 : size // 2 + 8] = 2
    return image.astype(np.float32), strokes


class Talk:
    """A live run, driven message by message."""

    def __init__(self, images: list[Any], wishes: Wishes, **settings: Any) -> None:
        self.box = Mailbox(wishes)
        self.wishes = wishes
        self.stop = threading.Event()
        settings = {"network": SMALL, "config": FAST, "device": "cpu", **settings}
        self.steps = live_steps(images, self.box, stop=self.stop, **settings)
        self.heard: list[Any] = []
        self.result: Any = None
        self.over = False

    def wish(self, **changes: Any) -> None:
        values = {**vars(self.wishes), **changes}
        self.wishes = Wishes(**values)
        self.box.put(self.wishes)

    def until(self, *kinds: type, limit: int = 400) -> Any:
        """Go on until a message of one of these kinds, and return it."""
        for _ in range(limit):
            try:
                message = next(self.steps)
            except StopIteration as end:
                self.over, self.result = True, end.value
                return None
            self.heard.append(message)
            if isinstance(message, kinds):
                return message
        raise AssertionError(f"no {kinds} among {limit} messages")

    def waits(self) -> str:
        """Go on until what is waited for changes, and return it."""
        known = [m.reason for m in self.of(Waiting)][-1:]
        while [self.until(Waiting).reason] == known:
            pass
        return str(self.heard[-1].reason)

    def steps_taken(self, n: int) -> None:
        while (last := self.until(Progress)) is not None and last.last.step < n:
            pass

    def end(self) -> Any:
        self.stop.set()
        while not self.over:
            self.until(Progress, Prediction, Waiting)
        return self.result

    def of(self, kind: type) -> list[Any]:
        return [m for m in self.heard if isinstance(m, kind)]


def whole(predictions: list[Prediction], shape: tuple[int, ...]) -> np.ndarray:
    labels = np.zeros(shape, np.uint8)
    for tile in predictions:
        labels[tile.slices] = tile.labels
    return labels


def same_weights(a: Any, b: Any) -> bool:
    other = b.network.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.network.state_dict().items())


def test_unchanged_strokes_are_learned_as_headless() -> None:
    image, strokes = picture()
    talk = Talk([image], Wishes(({0: strokes},), CLASSES), seed=3)
    talk.steps_taken(12)
    live = talk.end()
    n = len(live.history)
    alone = api.train(
        image,
        strokes,
        network=SMALL,
        classes=CLASSES,
        config=FAST,
        max_steps=n,
        seed=3,
        device="cpu",
    )
    assert same_weights(live, alone)
    assert [s.loss for s in live.history] == [s.loss for s in alone.history]
    assert live.classes == CLASSES
    assert live.provenance["steps"] == n
    assert talk.of(Started)[0].depths == (1, 2, 3)
    assert talk.of(Started)[0].network == "unet++"


def test_it_waits_and_says_for_what_and_goes_on_by_itself() -> None:
    image, strokes = picture()
    talk = Talk([image], Wishes(({},), CLASSES))
    assert "each class" in talk.waits()
    only = np.where(strokes == 1, strokes, 0).astype(np.uint8)
    talk.wish(strokes=({0: only},))
    assert talk.waits() == "Paint some disc: nothing of it is painted yet."
    assert not talk.of(Progress)
    talk.wish(strokes=({0: strokes},))
    assert talk.until(Progress).last.step == 1
    assert talk.of(Waiting)[-1].reason == ""
    talk.wish(strokes=({0: only},))  # erased again
    assert "disc" in talk.waits()
    steps = len(talk.of(Progress))
    for _ in range(3):
        talk.until(Waiting)
    assert len(talk.of(Progress)) == steps
    assert talk.end() is not None


@pytest.mark.parametrize(
    ("values", "classes", "fresh", "says"),
    [
        ((), CLASSES, True, "each class"),
        ((1, 2), CLASSES, True, ""),
        ((1, 3), CLASSES, True, "Label 3 is painted, but the highest class is 2"),
        ((1, 2), ("a", "b", "c"), True, "Paint some c"),
        ((1,), ("a", "b", "c"), True, "Paint some b, c"),
        ((1, 2), ("a", "b", "c"), False, ""),
        ((1,), ("a", "b", "c"), False, "Paint some b, c"),
        ((1,), ("a", "b", "c", "d", "e"), True, "b, c, d and 1 more"),
    ],
)
def test_what_is_missing_is_said(
    values: tuple[int, ...], classes: tuple[str, ...], fresh: bool, says: str
) -> None:
    plane = np.zeros((8, 8), np.uint8)
    plane[0, : len(values)] = values
    found = missing(({0: plane},), classes, fresh=fresh)
    assert (says in found) if says else not found


def test_the_view_comes_first_then_its_plane_then_the_others() -> None:
    rng = np.random.default_rng(0)
    stack = rng.random((3, 900, 800)).astype(np.float32)
    model = api.create_model(SMALL, classes=CLASSES)
    view = View(0, 1, (600, 700), (10, 90))
    talk = Talk([stack], Wishes(({},), CLASSES, view=view, training=False), model=model)
    while not talk.over:
        talk.until(Prediction)
    places = [
        (m.slices[0], m.slices[1].start, m.slices[2].start) for m in talk.of(Prediction)
    ]
    assert places[0] == (1, 512, 0)
    per_plane = len(places) // 3
    assert {p[0] for p in places[:per_plane]} == {1}
    assert len(set(places)) == len(places)
    covered = np.zeros(stack.shape, np.uint8)
    for tile in talk.of(Prediction):
        covered[tile.slices] += 1
    assert (covered == 1).all()
    last = talk.of(Coverage)[-1]
    assert (last.done, last.total, last.view_done) == (len(places), len(places), True)


def test_a_moved_view_is_next() -> None:
    image = np.random.default_rng(0).random((1600, 1600)).astype(np.float32)
    model = api.create_model(SMALL, classes=CLASSES)
    talk = Talk(
        [image],
        Wishes(({},), CLASSES, view=View(0, 0, (0, 99), (0, 99)), training=False),
        model=model,
    )
    first = talk.until(Prediction)
    assert first.slices == (slice(0, 256), slice(0, 256))
    talk.wish(view=View(0, 0, (1500, 1600), (1000, 1020)))
    moved = talk.until(Prediction)
    assert moved.slices[0].start < 1600
    assert moved.slices[0].stop > 1500
    assert moved.slices[1].start <= 1010 < moved.slices[1].stop


def test_the_depth_changes_at_once_without_training_and_skips_the_deeper_nodes() -> (
    None
):
    image, strokes = picture()
    talk = Talk([image], Wishes(({0: strokes},), CLASSES))
    talk.steps_taken(6)
    talk.wish(training=False)
    while talk.until(Waiting, Prediction, DepthCost) and not isinstance(
        talk.heard[-1], Waiting
    ):
        pass
    steps = len(talk.of(Progress))
    model = talk.of(Snapshot)[-1].model
    for depth in (1, 3, 2):
        talk.wish(depth=depth)
        tile = talk.until(Prediction)
        expected = api.predict(model, image, depth=depth, device="cpu")
        np.testing.assert_array_equal(tile.labels, expected)
    talk.wish(depth=3, heads="mean")
    tile = talk.until(Prediction)
    np.testing.assert_array_equal(
        tile.labels, api.predict(model, image, heads="mean", device="cpu")
    )
    assert len(talk.of(Progress)) == steps


def test_the_work_of_a_depth_is_what_the_network_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, _ = picture(96)
    model = api.create_model(SMALL, classes=CLASSES)
    done: list[float] = []

    def count(layer: Any, inputs: Any, output: Any) -> None:
        spread = inputs[0] if isinstance(layer, torch.nn.ConvTranspose2d) else output
        done[-1] += layer.weight.numel() * spread.shape[-1] * spread.shape[-2]

    real = preview.working_copy

    def counted(network: Any, device: Any) -> Any:
        copy = real(network, device)
        for module in copy.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                module.register_forward_hook(count)
        return copy

    monkeypatch.setattr(preview, "working_copy", counted)
    source = Planes(image)
    for depth in model.network.depths:
        done.append(0.0)
        wishes = Wishes(({},), CLASSES, depth=depth)
        shown = Preview([source], model, wishes, torch.device("cpu"), 0, None)
        job = shown.next_job(None)
        assert job is not None
        shown.predict(job)
    # The norms are measured with all heads up to the depth, on the mirrored image.
    network = model.network
    sides = [96 + 2 * min(32, network.halo(d)) for d in network.depths]
    expected = [
        network.macs(side, side, d, last_only=False)
        for side, d in zip(sides, network.depths, strict=True)
    ]
    assert done == expected
    assert done == sorted(done)


def test_what_is_shown_after_the_stop_is_what_predict_gives() -> None:
    image, strokes = picture(96)
    big = np.tile(image, (9, 9))  # 864: tiles
    marks = np.zeros(big.shape, np.uint8)
    marks[:96, :96] = strokes
    talk = Talk([big], Wishes(({0: marks},), CLASSES))
    talk.steps_taken(8)
    model = talk.end()
    show = Talk([big], Wishes(({0: marks},), CLASSES, training=False), model=model)
    while not show.over:
        show.until(Prediction)
    labels = whole(show.of(Prediction), big.shape)
    tile = live_tile(model.network, 3, big.shape)
    expected = api.predict(model, big, tile=tile, device="cpu")
    assert (labels != expected).sum() == 0
    assert same_weights(show.result, model)
    assert not show.of(Progress)


def test_new_strokes_fill_half_of_the_next_batches() -> None:
    image, strokes = picture(256)
    config = FAST.replaced(batch=8)
    book = ExampleBook([image], [None])
    model = api.create_model(SMALL, classes=CLASSES)
    trainer = Trainer(
        model, book.read([{0: strokes}]), config, seed=0, device=torch.device("cpu")
    )
    for _ in range(30):
        trainer.step()
    corrected = strokes.copy()
    corrected[240:244, 220:250] = 1
    trainer.learn_from(book.read([{0: corrected}]))
    near = [(trainer._draw(8).centres > 200).all(1).sum() for _ in range(20)]
    assert min(near) >= 4
    assert max(near) < 8
    assert trainer.steps - trainer._averaged_from == 10
    for _ in range(40):
        trainer.step()
    near = [(trainer._draw(8).centres > 200).all(1).sum() for _ in range(20)]
    assert min(near) < 4


def test_a_class_added_later_keeps_what_is_known() -> None:
    image, strokes = picture()
    talk = Talk([image], Wishes(({0: strokes},), CLASSES))
    talk.steps_taken(8)
    more = strokes.copy()
    more[50:54, 4:40] = 3
    talk.wish(strokes=({0: more},), classes=(*CLASSES, "rim"))
    talk.steps_taken(12)
    model = talk.end()
    assert model.classes == (*CLASSES, "rim")
    assert len(model.history) >= 12
    assert [s.step for s in model.history] == list(range(1, len(model.history) + 1))


def test_a_renamed_class_changes_the_name_alone() -> None:
    image, strokes = picture()
    talk = Talk([image], Wishes(({0: strokes},), CLASSES))
    talk.steps_taken(6)
    talk.wish(classes=("ground", "nucleus"))
    talk.steps_taken(9)
    model = talk.end()
    assert model.classes == ("ground", "nucleus")
    assert len(talk.of(Started)) == 1


def test_fewer_classes_than_the_model_has_are_refused() -> None:
    image, strokes = picture()
    model = api.create_model(SMALL, classes=("a", "b", "c"))
    talk = Talk([image], Wishes(({0: strokes},), CLASSES), model=model)
    with pytest.raises(ValueError, match="3 classes, the table 2"):
        talk.until(Progress)


def test_a_given_model_is_a_start_and_stays_as_it_is() -> None:
    image, strokes = picture()
    model = api.create_model(SMALL, classes=CLASSES, unlabelled=None)
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    talk = Talk([image], Wishes(({0: strokes},), CLASSES), model=model)
    talk.steps_taken(5)
    result = talk.end()
    assert all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())
    assert not same_weights(result, model)
    assert (model.unlabelled, result.unlabelled) == (None, 0)


def test_several_images_train_one_model_and_planes_are_found() -> None:
    image, strokes = picture()
    other, _ = picture(48, seed=1)
    stack = np.stack([other * 0 + 1, other, other])
    marks = np.zeros((48, 48), np.uint8)
    marks[3:6, 3:40] = 1
    talk = Talk([image, stack], Wishes(({0: strokes}, {2: marks}), CLASSES))
    talk.steps_taken(6)
    talk.wish(training=False)
    while {(p.image, *p.slices[:-2]) for p in talk.of(Prediction)} < {
        (0,),
        (1, 0),
        (1, 1),
        (1, 2),
    }:
        talk.until(Prediction)
    model = talk.end()
    assert len(model.provenance["data"]) == 2


def test_maps_are_given_when_wished() -> None:
    image, strokes = picture()
    wishes = Wishes(({0: strokes},), CLASSES, probabilities=True, uncertainty=True)
    talk = Talk([image], wishes)
    tile = talk.until(Prediction)
    assert tile.probabilities.shape == (2, 64, 64)
    np.testing.assert_allclose(tile.probabilities.sum(0), 1, atol=2e-3)
    np.testing.assert_array_equal(tile.labels, tile.probabilities.argmax(0) + 1)
    assert tile.uncertainty.shape == (64, 64)
    assert 0 <= tile.uncertainty.min() <= tile.uncertainty.max() <= 1
    talk.wish(probabilities=False, uncertainty=False)
    tile = talk.until(Prediction)
    assert tile.probabilities is None
    assert tile.uncertainty is None
    talk.end()


def test_disagreement_is_0_for_equal_heads_and_1_for_opposite_ones() -> None:
    sure = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    other = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    half = torch.tensor([0.5, 0.5]).view(2, 1, 1)
    assert disagreement([half, half]).item() == pytest.approx(0, abs=1e-6)
    assert disagreement([sure, other]).item() == pytest.approx(1)
    assert disagreement([half]).item() == pytest.approx(1)  # one head: entropy
    assert disagreement([sure]).item() == 0
    # H(3/4, 1/4) - H(1/2, 1/2) / 2, in units of log 2
    expected = (-0.75 * np.log2(0.75) - 0.25 * np.log2(0.25)) - 0.5
    assert disagreement([sure, half]).item() == pytest.approx(expected)


def test_every_depth_is_priced_once_and_deeper_costs_more() -> None:
    image, strokes = picture()
    talk = Talk([image], Wishes(({0: strokes},), CLASSES))
    talk.steps_taken(6)
    talk.wish(training=False)
    for _ in range(3):
        talk.until(DepthCost)
    talk.until(Waiting)
    costs = {c.depth: c for c in talk.of(DepthCost)}
    assert len(talk.of(DepthCost)) == 3
    assert set(costs) == {1, 2, 3}
    assert costs[1].megabytes < costs[2].megabytes < costs[3].megabytes
    assert all(c.ms_per_megapixel > 0 for c in costs.values())
    assert len({c.key for c in costs.values()}) == 3
    talk.end()


def test_a_tile_that_does_not_fit_is_done_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = np.random.default_rng(0).random((300, 260)).astype(np.float32)
    model = api.create_model(SMALL, classes=CLASSES)
    expected = api.predict(model, image, device="cpu")
    real = preview.PlanePredictor.softmaxes

    def short(self: Any, core: Any) -> Any:
        if core.rows[1] - core.rows[0] > 200:
            raise torch.OutOfMemoryError("no")
        return real(self, core)

    monkeypatch.setattr(preview.PlanePredictor, "softmaxes", short)
    talk = Talk([image], Wishes(({},), CLASSES, training=False), model=model)
    tile = talk.until(Prediction)
    np.testing.assert_array_equal(tile.labels, expected)


def test_out_of_memory_in_training_is_our_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, strokes = picture()
    talk = Talk([image], Wishes(({0: strokes},), CLASSES))
    talk.until(Progress)

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("napari_unetpp.trainer.Trainer.step", fail)
    with pytest.raises(api.DeviceMemoryError, match="smaller network"):
        talk.until(Prediction, limit=50)


def test_nothing_to_show_ends_at_once_and_no_model_is_none() -> None:
    image, _ = picture()
    talk = Talk([image], Wishes(({},), CLASSES, training=False))
    assert talk.until(Prediction) is None
    assert talk.over
    assert talk.result is None


def test_stop_before_the_first_step_gives_none() -> None:
    image, strokes = picture()
    talk = Talk([image], Wishes(({0: strokes},), CLASSES))
    assert talk.end() is None


def test_the_clock_gives_prediction_its_share() -> None:
    clock = _Clock()
    clock.urgent()
    clock.shown()
    assert not clock.due(0.1)
    clock._train = 0.4
    assert clock.due(0.1)
    assert not clock.due(0.5)
    clock._train = 5.0  # the urgent seconds are over
    clock._shown_at = 4.5
    assert not clock.due(0.1)
    clock._train = 5.6
    assert clock.due(0.1)
    assert not clock.due(1.0)
    assert not clock.is_urgent
    clock._spent = 0.275
    assert clock.share == pytest.approx(0.2)
    clock.shown()
    assert clock.share == 0


def test_warming_up_tells_the_device() -> None:
    told: list[str] = []

    def relay() -> Iterator[None]:
        told.append((yield from warm_up("cpu")))

    assert len(list(relay())) >= 2
    assert told[0].startswith("CPU, ")


def test_small_planes_are_one_tile_and_wide_halos_get_large_ones() -> None:
    small = build_network(NetConfig("unet", levels=3, stem=2))
    deep = build_network(SMALL.replaced(levels=4))
    assert live_tile(small, 3, (300, 700)) == 700
    assert live_tile(small, 3, (300, 900)) == 256
    assert deep.halo(4) > 96
    assert live_tile(deep, 4, (900, 900)) == 512
    assert live_tile(deep, 1, (900, 900)) == 256


def test_an_undone_stroke_on_another_plane_leaves_the_training_alive() -> None:
    image, strokes = picture()
    stack = np.stack([image, image])
    talk = Talk([stack], Wishes(({0: strokes},), CLASSES))
    talk.steps_taken(4)
    talk.wish(strokes=({0: strokes, 1: strokes},))
    talk.steps_taken(8)
    talk.wish(strokes=({0: strokes},))
    talk.steps_taken(16)
    assert talk.end() is not None


def test_a_class_added_while_something_is_missing_is_learned_after() -> None:
    image, strokes = picture()
    talk = Talk([image], Wishes(({0: strokes},), CLASSES))
    talk.steps_taken(4)
    only = np.where(strokes == 1, strokes, 0).astype(np.uint8)
    talk.wish(strokes=({0: only},))
    assert "disc" in talk.waits()
    talk.wish(classes=(*CLASSES, "rim"))
    assert "rim" in talk.waits()
    assert talk.of(Snapshot) == [] or len(talk.of(Snapshot)[-1].model.classes) == 2
    full = strokes.copy()
    full[50:54, 4:40] = 3
    talk.wish(strokes=({0: full},))
    talk.steps_taken(8)
    model = talk.end()
    assert model.classes == (*CLASSES, "rim")
    assert model.config.out_channels == 3


def test_names_changed_while_it_pauses_are_kept() -> None:
    image, strokes = picture()
    talk = Talk([image], Wishes(({0: strokes},), CLASSES))
    talk.steps_taken(4)
    talk.wish(training=False, classes=("ground", "nucleus"))
    talk.until(Waiting)
    assert talk.end().classes == ("ground", "nucleus")


def test_a_pause_before_the_first_step_is_no_end() -> None:
    image, strokes = picture()
    talk = Talk([image], Wishes(({},), CLASSES))
    talk.waits()
    talk.wish(training=False)
    for _ in range(3):
        talk.until(Waiting)
    talk.wish(training=True, strokes=({0: strokes},))
    assert talk.until(Progress).last.step == 1
    talk.end()


def test_a_model_with_other_channels_is_refused_in_words() -> None:
    image, _ = picture()
    model = api.create_model(SMALL.replaced(in_channels=3), classes=CLASSES)
    talk = Talk([image], Wishes(({},), CLASSES, training=False), model=model)
    with pytest.raises(ValueError, match=r"takes 3 channel\(s\), the image has 1"):
        talk.until(Prediction)
