"""What is held out stays held out: no event, save or fine-tuning lets it train."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unetpp import losses
from napari_unetpp import trainer as trainer_room
from napari_unetpp._widgets.coach import advice
from napari_unetpp.config import NetConfig, TrainConfig
from napari_unetpp.examples import read_examples
from napari_unetpp.heldout import BLOCK, HeldOut
from napari_unetpp.live import live_steps
from napari_unetpp.live.session import missing
from napari_unetpp.messages import Mailbox, Progress, Started, Waiting, Wishes
from napari_unetpp.model import create_model, load_model
from napari_unetpp.train import train, train_steps, with_classes
from napari_unetpp.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU = torch.device("cpu")
NET = NetConfig("unet++", width=4, levels=1, deep_supervision=True, stem=2)
SIDE = 130
# Nothing but flips, so that each pixel's grey values tell where it comes from.
PLAIN = TrainConfig(
    patch=48, batch=3, gain=0, offset=0, rotation=0, scale=0, elastic_sigma=0
)
PLACES = np.stack(np.indices((SIDE, SIDE))).astype(np.float32)


class Spy(Trainer):
    """Notes the places and classes of all pixels that a loss was computed on."""

    seen: list[np.ndarray]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        patches, target = super().batch()
        self._given = patches, target
        return patches, target

    def _loss(self, heads: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        patches, given = self._given
        assert target is given
        low, high = np.percentile(PLACES.reshape(2, -1), (1, 99.8), axis=1)
        place = patches.numpy() * (high - low)[:, None, None] + low[:, None, None]
        rows, columns = np.moveaxis(np.rint(place).astype(int), 1, 0)
        known = (target != losses.IGNORE).numpy()
        found = [rows[known], columns[known], target.numpy()[known] + 1]
        self.seen.append(np.stack(found, axis=1))
        return super()._loss(heads, target)


def spy(model: Any, paint: np.ndarray, fraction: float, seed: int) -> Spy:
    examples = read_examples(PLACES, paint, channel_axis=0)
    config = PLAIN.replaced(held_out=fraction)
    own = Spy(model, examples, config, seed=seed, device=CPU)
    own.seen = []
    return own


spots = st.tuples(
    st.integers(0, SIDE - 1), st.integers(0, SIDE - 1), st.integers(2, 30),
    st.integers(2, 30),
)  # fmt: skip
events = st.one_of(
    st.tuples(st.just("paint"), spots, st.integers(1, 4)),
    st.tuples(st.just("erase"), spots, st.just(0)),
    st.tuples(st.just("merge"), spots, st.integers(1, 4)),
    st.tuples(st.just("add class"), spots, st.just(0)),
)


def change(paint: np.ndarray, event: tuple[Any, ...], classes: int) -> np.ndarray:
    """Return what is painted after an event."""
    kind, (y, x, height, width), value = event
    new = paint.copy()
    if kind == "paint":
        new[y : y + height, x : x + width] = min(value, classes)
    elif kind == "erase":
        new[y : y + height, x : x + width] = 0
    elif kind == "merge":
        new[new == min(value, classes)] = 1 + value % classes
    else:
        new[y : y + height, x : x + width] = classes
    return new


@settings(max_examples=25, deadline=None)
@given(
    first=st.lists(spots, min_size=2, max_size=5),
    story=st.lists(events, max_size=6),
    seed=st.integers(0, 2**32),
    fraction=st.sampled_from([0.1, 0.3, 0.5]),
)
def test_no_held_out_pixel_ever_enters_a_loss(
    first: list[tuple[int, ...]],
    story: list[tuple[Any, ...]],
    seed: int,
    fraction: float,
) -> None:
    paint = np.zeros((SIDE, SIDE), np.uint8)
    for n, spot in enumerate(first):
        paint = change(paint, ("paint", spot, 1 + n % 2), 2)
    model = create_model(NET.replaced(in_channels=2), classes=["a", "b"], seed=0)
    own = spy(model, paint, fraction, seed)
    frozen = own.held_out
    mask = frozen.mask((SIDE, SIDE))
    seen = []
    for event in [None, *story]:
        if event is not None:
            n = len(model.classes) + (event[0] == "add class")
            new = change(paint, event, n)
            targets = read_examples(PLACES, new, channel_axis=0) if new.any() else None
            if targets is None or frozen.starved(targets.targets, [0], n):
                continue  # refused in words, see below
            paint = new
            if n > len(model.classes):
                seen += own.seen
                model = own.model()
                model.provenance = own.provenance(targets)
                model = with_classes(model, (*model.classes, f"new {n}"), seed)
                # Another seed and fraction: what is frozen stays.
                own = spy(model, paint, 0.4, seed + 1)
            else:
                own.learn_from(targets)
        for _ in range(2):
            own.step()
        for rows, columns, values in (part.T for part in own.seen[-2:]):
            np.testing.assert_array_equal(paint[rows, columns], values)
        assert own.held_out == frozen
    touched = np.concatenate([*seen, *own.seen])
    assert len(touched)
    assert not mask[touched[:, 0], touched[:, 1]].any()


@given(
    shape=st.tuples(st.integers(16, 70), st.integers(16, 70)),
    corners=st.lists(
        st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=2, max_size=5
    ),
    seed=st.integers(0, 2**63 - 1),
)
@settings(max_examples=40, deadline=None)
def test_a_first_training_on_a_tiny_image_never_fails(
    shape: tuple[int, int], corners: list[tuple[int, int]], seed: int
) -> None:
    image = np.random.default_rng(0).random(shape)
    paint = np.zeros(shape, np.uint8)
    for n, (y, x) in enumerate(corners):
        paint[y % shape[0], x % shape[1] :][:5] = 1 + n % 2
    values = np.unique(paint[paint > 0])
    model = create_model(NET, classes=["a", "b"], seed=0)
    config = TrainConfig(patch=16, batch=1, held_out=0.5)
    own = Trainer(model, read_examples(image, paint), config, seed=seed, device=CPU)
    assert np.isfinite(own.step())
    trained = np.unique(np.concatenate([t[t > 0] for t in own._training]))
    np.testing.assert_array_equal(trained, values)


# --- the key travels with the model ----------------------------------------------


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    paint = np.zeros((256, 256), np.uint8)
    paint[20::64, 10:240] = 1
    paint[50::64, 10:240] = 2
    image = rng.normal(0, 0.2, paint.shape) + (np.arange(256)[:, None] // 32) % 2
    return image, paint


QUICK = TrainConfig(patch=32, batch=2)


def run(image: np.ndarray, paint: np.ndarray, **settings_: Any) -> Any:
    settings_ = {"network": NET, "config": QUICK, "max_steps": 1, **settings_}
    return train(image, paint, **settings_)


def test_the_key_survives_saving_fine_tuning_and_another_seed(tmp_path: Path) -> None:
    image, paint = scene()
    first = run(image, paint, seed=4)
    held = HeldOut.of(first.provenance)
    assert held is not None
    assert held.fraction == QUICK.held_out
    first.save(tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    # Mirrored strokes and another seed would choose another key.
    other = run(image, paint[::-1].T.copy(), seed=9)
    assert HeldOut.of(other.provenance) != held
    later = run(
        image, paint[::-1].T.copy(), model=loaded, seed=9,
        config=QUICK.replaced(held_out=0.4),
    )  # fmt: skip
    assert HeldOut.of(later.provenance) == held
    pruned = create_model(NET.replaced(levels=2), classes=["a", "b"])
    pruned.provenance = dict(first.provenance)
    assert HeldOut.of(pruned.pruned(1).provenance) == held


def test_the_same_seed_holds_out_the_same() -> None:
    image, paint = scene()
    a, b, c = (HeldOut.of(run(image, paint, seed=s).provenance) for s in (1, 1, 2))
    assert a == b != c


def test_nothing_held_out_stays_so() -> None:
    image, paint = scene()
    none = run(image, paint, config=QUICK.replaced(held_out=0.0))
    assert HeldOut.of(none.provenance).fraction == 0
    later = run(image, paint, model=none)
    assert HeldOut.of(later.provenance).fraction == 0


def only_held_out(held: HeldOut, shape: tuple[int, int]) -> np.ndarray:
    """Return strokes of class 1 that train, and of class 2 that do not."""
    mask = held.mask(shape)
    paint = np.zeros(shape, np.uint8)
    paint[10::20][~mask[10::20]] = 1
    row, column = np.argwhere(held.blocks(shape))[0] * BLOCK
    paint[row + 8 : row + 11, column + 4 : column + 28] = 2
    return paint


def test_a_class_that_only_scores_is_refused_in_words() -> None:
    image, paint = scene()
    model = run(image, paint, classes=("sky", "cell"))
    held = HeldOut.of(model.provenance)
    bad = only_held_out(held, image.shape)
    with pytest.raises(ValueError, match="those of cell lie only in places"):
        next(train_steps(image, bad, model=model, config=QUICK, max_steps=1))


def test_live_training_waits_for_a_stroke_somewhere_else() -> None:
    image, paint = scene()
    model = run(image, paint, classes=("sky", "cell"))
    held = HeldOut.of(model.provenance)
    bad = only_held_out(held, image.shape)
    box = Mailbox(Wishes(({0: bad},), ("sky", "cell")))
    stop = threading.Event()
    steps = live_steps([image], box, model=model, config=QUICK, device="cpu", stop=stop)
    told = next(m for m in steps if isinstance(m, Waiting) and m.reason)
    assert told.reason == (
        "Class cell has strokes only in places that are kept for the score: paint one "
        "more stroke somewhere else."
    )
    good = np.where(paint == 2, 2, bad).astype(np.uint8)
    box.put(Wishes(({0: good},), ("sky", "cell")))
    heard = []
    for message in steps:
        heard.append(message)
        if isinstance(message, Progress):
            break
    assert any(isinstance(m, Started) for m in heard)
    # The other way round while it trains.
    box.put(Wishes(({0: bad},), ("sky", "cell")))
    told = next(m for m in steps if isinstance(m, Waiting))
    assert told.reason.startswith("Class cell has strokes only in places")
    stop.set()

    def result() -> Iterator[Any]:
        yield (yield from steps)

    *_, last = result()
    assert HeldOut.of(last.provenance) == held


def test_a_model_that_holds_nothing_out_says_that_it_has_no_score() -> None:
    def told(**state: bool) -> str:
        return advice(
            ["a", "b"], [900, 900], [9, 9], training=True, predicted=True, **state
        )

    assert "no held-out score" in told(scored=False, holds_out=False)
    assert "score comes with strokes" in told(scored=False, holds_out=True)
    assert "score" not in told(scored=True, holds_out=True)
    image, paint = scene()
    box = Mailbox(Wishes(({0: paint},), ("sky", "cell")))
    config = QUICK.replaced(held_out=0.0)
    steps = live_steps([image], box, network=NET, config=config, device="cpu")
    assert not next(m for m in steps if isinstance(m, Progress)).holds_out


def test_what_is_missing_names_the_plane_that_is_held_out() -> None:
    held = HeldOut(1, 0.5)
    plane = np.zeros((64, 64), np.uint8)
    y, x = np.argwhere(held.blocks((64, 64), 3) & ~held.blocks((64, 64), 0))[0] * BLOCK
    plane[y + 3, x + 3] = 2
    free = np.argwhere(~held.blocks((64, 64), 3))[0] * BLOCK
    plane[tuple(free)] = 1
    names = ("a", "b")
    assert "Class b" in missing(({3: plane},), names, fresh=True, held_out=held)
    assert not missing(({3: plane},), names, fresh=True)
    # A stroke of it that trains, in another plane.
    other = np.where(plane == 2, plane, 0).astype(np.uint8)
    both = ({3: plane, 0: other},)
    assert not missing(both, names, fresh=True, held_out=held)


def test_every_depth_gets_its_score_with_an_interval(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer_room, "_SCORE_EVERY", 2)
    image, paint = scene()
    box = Mailbox(Wishes(({0: paint},), ("sky", "cell")))
    stop = threading.Event()
    net = NET.replaced(levels=3)
    heard = []
    for message in live_steps(
        [image], box, network=net, config=QUICK, device="cpu", stop=stop
    ):
        if isinstance(message, Progress):
            heard.append(message)
            if message.last.step == 2:
                stop.set()
    assert heard[0].scores == heard[0].estimates == ()
    assert heard[0].last.score is None
    assert heard[0].holds_out
    found = dict(heard[1].estimates)
    assert set(found) == {1, 2, 3}
    assert dict(heard[1].scores) == {d: s.mean for d, s in found.items()}
    assert heard[1].last.score == found[3].mean
    for score in found.values():
        assert 0 <= score.low <= score.mean <= score.high <= 1
        assert len(score.per_class) == 2
        assert score.pixels > 0
