"""A training that was killed goes on bit for bit, or says what differs."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
import torch

from napari_unetpp import checkpoint, io, modelfile
from napari_unetpp import trainer as trainer_room
from napari_unetpp.checkpoint import Checkpoint, Rolling, State, differences
from napari_unetpp.cli import main
from napari_unetpp.config import NetConfig, TrainConfig
from napari_unetpp.errors import ModelFileError, SaveError, TrainingError
from napari_unetpp.examples import ExampleBook, Examples, read_examples
from napari_unetpp.live import live_steps
from napari_unetpp.messages import Mailbox, Progress, Waiting, Wishes
from napari_unetpp.model import Model, create_model, load_model
from napari_unetpp.score import Score, Scorer
from napari_unetpp.train import train, train_steps
from napari_unetpp.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")
NET = NetConfig("unet++", width=4, levels=2, deep_supervision=True, stem=2)
NETS = {
    "unet++": NetConfig(
        "unet++", width=4, levels=3, deep_supervision=True, stem=2, residual=True,
        dropout=0.3,
    ),
    "unet": NetConfig("unet", width=4, levels=2, norm="batch"),
    "fcn-8s": NetConfig("fcn-8s", width=4, levels=5),
}  # fmt: skip
QUICK = TrainConfig(patch=32, batch=2, warp_after=3, held_out=0.3, noise=0.05)
NAME = "training.checkpoint.safetensors"


def scene(side: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return an image with a bright square, and strokes of both classes."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (side, side)).astype(np.uint8)
    image[side // 4 : -side // 4, side // 4 : -side // 4] += 150
    strokes = np.zeros((side, side), np.uint8)
    strokes[4:8, 4 : side - 8] = 1
    strokes[side // 3 : -side // 3 : 4, side // 3 : -side // 3] = 2
    return image, strokes


IMAGE, PAINT = scene()


def correction() -> np.ndarray:
    paint = PAINT.copy()
    paint[-6:-3, 8:80] = 1
    return paint


def run(folder: Path | None = None, **settings: Any) -> Model:
    settings = {"network": NET, "config": QUICK, "max_steps": 8, **settings}
    images, paint = settings.pop("images", IMAGE), settings.pop("paint", PAINT)
    return train(images, paint, checkpoint=folder, device="cpu", **settings)


def interrupted(folder: Path, steps: int, **settings: Any) -> None:
    """Train some steps, then close the generator."""
    settings = {"network": NET, "config": QUICK, "max_steps": 8, **settings}
    training = train_steps(IMAGE, PAINT, checkpoint=folder, device="cpu", **settings)
    for _ in range(steps):
        next(training)
    training.close()


def same(a: Model, b: Model) -> bool:
    mine, theirs = a.network.state_dict(), b.network.state_dict()
    return all(torch.equal(v, theirs[k]) for k, v in mine.items())


def curve(model: Model) -> list[tuple[Any, ...]]:
    return [(s.step, s.loss, s.score) for s in model.history]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rolling, "due", due)


def due(rolling: Rolling, steps: int) -> bool:
    """Whether a checkpoint is due, where time plays no part."""
    return rolling.lacks(steps)


@pytest.fixture
def often_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score every third step, by a number that changes with every step."""

    def measure(_: Scorer, network: Any, *__: Any, **___: Any) -> dict[int, Score]:
        value = float(next(network.parameters()).detach().sum().sigmoid())
        return {d: scored(value / d) for d in network.depths}

    monkeypatch.setattr(trainer_room, "_SCORE_EVERY", 3)
    monkeypatch.setattr(Scorer, "measure", measure)


def scored(mean: float) -> Score:
    """Return a score whose parts all depend on its mean."""
    return Score(mean, mean / 2, (1 + mean) / 2, (mean, np.nan), int(mean * 1000))


# --- bit for bit -----------------------------------------------------------------


@pytest.mark.usefixtures("every_step", "often_scored")
@pytest.mark.parametrize("net", NETS)
def test_a_training_goes_on_bit_for_bit(net: str, tmp_path: Path) -> None:
    whole = run(network=NETS[net])
    assert any(s.score is not None for s in whole.history)
    for steps in (1, 4, 2):  # closed after 1, 5 and 7 steps
        interrupted(tmp_path, steps, network=NETS[net], resume=True)
    found = checkpoint.read(tmp_path / NAME)
    assert found.steps == 7
    resumed = run(tmp_path, network=NETS[net], resume=True)
    assert curve(resumed) == curve(whole)
    assert same(resumed, whole)
    assert resumed.prior == whole.prior
    assert [r["step"] for r in resumed.provenance["resumed"]] == [1, 5, 7]
    assert all(r["differs"] == [] for r in resumed.provenance["resumed"])
    times = [s.seconds for s in resumed.history]
    assert times == sorted(times)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_every_optimizer_goes_on(optimizer: str, tmp_path: Path) -> None:
    config = QUICK.replaced(optimizer=optimizer, averaging=0.0, loss="dice")
    interrupted(tmp_path, 5, config=config)
    resumed = run(tmp_path, config=config, resume=True)
    assert same(resumed, run(config=config))


def test_writing_changes_nothing(tmp_path: Path) -> None:
    kept = run(tmp_path, checkpoint_seconds=0)
    assert same(kept, run())
    assert "resumed" not in kept.provenance


def test_limits_count_the_whole_training(tmp_path: Path) -> None:
    interrupted(tmp_path, 5)
    path = tmp_path / NAME
    late = checkpoint.read(path)
    late.history[:, 2] += 1000.0
    path.write_bytes(late.encode())
    timed = run(tmp_path, resume=True, max_steps=None, max_seconds=900)
    assert len(timed.history) == 5
    assert len(run(tmp_path, resume=True, max_steps=5).history) == 5
    ended = run(tmp_path, resume=True, max_steps=7)
    assert len(ended.history) == 7
    assert ended.history[-1].seconds > 1000


def test_the_end_of_a_training_can_be_extended(tmp_path: Path) -> None:
    run(tmp_path, max_steps=4)
    assert same(run(tmp_path, resume=True), run())


def test_nothing_to_resume_begins_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert same(run(tmp_path, resume=True), run())
    assert "from step 1" in caplog.text
    with pytest.raises(ValueError, match="needs a `checkpoint`"):
        run(resume=True)


def test_the_model_of_a_checkpoint_can_be_loaded(tmp_path: Path) -> None:
    run(tmp_path, max_steps=4)
    model, expected = load_model(tmp_path / NAME), run(max_steps=4)
    assert same(model, expected)
    assert model.prior == expected.prior
    assert [s.step for s in model.history] == [1, 2, 3, 4]
    model.save(tmp_path / "m.safetensors")
    assert same(load_model(tmp_path / "m.safetensors"), expected)
    small = (tmp_path / "m.safetensors").stat().st_size
    assert small < (tmp_path / NAME).stat().st_size / 2


# --- every item of the state is needed -------------------------------------------


def painted(trainer: Trainer, paint: np.ndarray, book: ExampleBook) -> None:
    trainer.learn_from(book.read([{0: paint}]))


def scenario() -> tuple[Trainer, Examples, ExampleBook]:
    """Return a trainer that has just been shown new strokes."""
    book = ExampleBook([IMAGE], [None])
    config = QUICK.replaced(learning_rate=1e-2, batch=4)
    model = create_model(NETS["unet++"], seed=1)
    trainer = Trainer(model, book.read([{0: PAINT}]), config, seed=3, device=CPU)
    for _ in range(15):
        trainer.step()
    paint = correction()
    painted(trainer, paint, book)
    for _ in range(4):
        trainer.step()
    return trainer, book.read([{0: paint}]), book


def goes_on(trainer: Trainer) -> list[Any]:
    """Return what is seen of two more steps, to the last bit."""
    score = {d: score.to_list() for d, score in trainer.estimates.items()}
    losses = [trainer.step() for _ in range(2)]
    state = trainer.state()
    weights = [
        (k, v.tobytes())
        for k, v in state.tensors.items()
        if k.startswith(("network.", "shown."))
    ]
    return [score, losses, weights]


def blank(state: State, item: str) -> State:
    """Return a state that has forgotten one item."""
    kind, _, name = item.partition(" ")
    tensors, rows, values = (dict(part) for part in state)
    if kind == "tensors":
        fresh = create_model(NETS["unet++"], seed=1).network.state_dict()
        for key, value in tensors.items():
            if key.startswith(name):
                start = fresh.get(key.partition(".")[2])
                tensors[key] = np.zeros_like(value) if start is None else start.numpy()
    elif kind == "rows":
        empty = torch.Generator().manual_seed(3).get_state().numpy().view(np.int64)
        rows[name] = empty if name == "generator" else np.zeros(0, np.int64)
    elif name == "rng":
        values["rng"] = checkpoint.chance(np.random.default_rng(3))
    else:
        values[name] = {"estimates": [], "frequency": [0.0, 0.0]}.get(name, 0)
    return State(tensors, rows, values)


ITEMS = [
    "tensors network.", "tensors shown.", "tensors optimizer.exp_avg.",
    "tensors optimizer.exp_avg_sq.", "tensors optimizer.step.", "rows generator",
    "rows fresh", "values rng", "values steps", "values averaged_from",
    "values fresh_until", "values frequency", "values estimates", "values lesson_at",
]  # fmt: skip


@pytest.mark.usefixtures("often_scored")
@pytest.mark.parametrize("item", ["nothing", *ITEMS])
def test_without_any_one_item_it_is_another_training(item: str) -> None:
    trainer, examples, _ = scenario()
    state = trainer.state()
    expected = goes_on(trainer)
    other = Trainer(
        create_model(NETS["unet++"], seed=1),
        examples,
        QUICK.replaced(learning_rate=1e-2, batch=4),
        seed=3,
        device=CPU,
    )
    if item == "nothing":
        other.restore(state)
        assert goes_on(other) == expected
        return
    if item == "values steps":  # the average cannot have begun later
        state.values["averaged_from"] = 0
    other.restore(blank(state, item))
    assert goes_on(other) != expected


@pytest.mark.parametrize("steps", [1, 5])
def test_what_a_forest_has_taught_is_learned_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    monkeypatch.setattr("napari_unetpp.trainer._ASK", 1)
    monkeypatch.setattr("napari_unetpp.trainer._LISTEN", 3)
    run(tmp_path, max_steps=steps)
    taught = run()
    assert same(run(tmp_path, resume=True), taught)
    assert not same(run(config=QUICK.replaced(forest=0.0)), taught)


def test_the_items_are_all_there_are() -> None:
    state = scenario()[0].state()
    starts = {k.rpartition(".")[0].split(".")[0] for k in state.tensors}
    assert starts == {"network", "shown", "optimizer"}
    listed = {i.split()[1] for i in ITEMS}
    assert set(state.rows) | set(state.values) <= listed
    kinds = {k.split(".")[1] for k in state.tensors if k.startswith("optimizer.")}
    assert {f"optimizer.{k}." for k in kinds} <= listed


# --- what differs is told --------------------------------------------------------


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """Return the checkpoint of a training that was interrupted after 4 steps."""
    interrupted(tmp_path, 4)
    return tmp_path / NAME


def edited(path: Path, **changes: Any) -> None:
    path.write_bytes(dataclasses.replace(checkpoint.read(path), **changes).encode())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("napari-unetpp", "0.0.1"), ("torch", "2.9.0"), ("numpy", "1.0"),
        ("system", "BeOS"), ("processor", "m68k"), ("device", "Tesla"),
        ("threads", 64), ("bfloat16", "maybe"),
    ],
)  # fmt: skip
def test_another_environment_goes_on_and_says_so(
    left: Path, caplog: pytest.LogCaptureFixture, name: str, value: Any
) -> None:
    there = checkpoint.read(left).environment
    edited(left, environment={**there, name: value})
    model = run(left.parent, resume=True)
    line = f"{name}: {value} then, {there[name]} now"
    assert f"not bit-identical: {line}." in caplog.text
    assert model.provenance["resumed"] == [{"step": 4, "differs": [line]}]
    assert same(model, run())  # it was the same computer after all


def test_another_number_of_threads_is_seen(
    left: Path, caplog: pytest.LogCaptureFixture
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(left.parent, resume=True, max_steps=5)
    finally:
        torch.set_num_threads(threads)
    assert f"threads: {threads} then, {threads + 1} now" in caplog.text


OTHER = scene(seed=1)[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"images": OTHER}, "images: 1 of 1 changed"),
        ({"paint": correction()}, "annotations: 1 of 1 changed"),
        (
            {"images": [IMAGE, OTHER], "paint": [PAINT, PAINT]},
            "annotated planes: 1 then, 2 now",
        ),
        (
            {
                "images": np.stack([OTHER, IMAGE]),
                "paint": np.stack([PAINT * 0, PAINT]),
            },
            "positions: 1 of 1 changed",
        ),
    ],
)
def test_other_data_are_refused_or_allowed(
    left: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, Any],
    told: str,
) -> None:
    before = left.read_bytes()
    with pytest.raises(ValueError, match=told) as error:
        run(left.parent, resume=True, **changes)
    assert "changed_data=True" in str(error.value)
    assert left.read_bytes() == before
    model = run(left.parent, resume=True, changed_data=True, **changes)
    assert [s.step for s in model.history] == list(range(1, 9))
    assert told in caplog.text
    assert model.provenance["resumed"][0]["differs"] == [told]
    if "positions" not in told:
        assert not same(model, run())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"network": NET.replaced(width=8)}, "network.width: 4 then, 8 now"),
        ({"network": "unet"}, "network.name: unet.. then, unet now"),
        ({"classes": ("ground", "square")}, "classes: background, class 2 then"),
        ({"config": QUICK.replaced(patch=48)}, "settings.patch: 32 then, 48 now"),
        ({"seed": 5}, "seed: 0 then, 5 now"),
        (
            {"paint": (PAINT == 2).astype(np.uint8), "unlabelled": None},
            "unlabelled: 0 then, None now",
        ),
        (
            {"model": create_model(NET, classes=("background", "class 2"))},
            "parent: None then, abc now",
        ),
    ],
)
def test_another_training_is_refused(
    left: Path, changes: dict[str, Any], told: str
) -> None:
    if "model" in changes:
        changes["model"].provenance["digest"] = "abc"
    before = left.read_bytes()
    with pytest.raises(ValueError, match=told) as error:
        run(left.parent, resume=True, **changes)
    assert NAME in str(error.value)
    assert left.read_bytes() == before


@pytest.mark.usefixtures("every_step")
def test_a_damaged_checkpoint_leaves_the_one_before(
    left: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = bytearray(left.read_bytes())
    data[-5] ^= 1
    left.write_bytes(data)
    with pytest.raises(ModelFileError, match="checksum"):
        checkpoint.read(left)
    model = run(left.parent, resume=True)
    assert "is damaged" in caplog.text
    assert model.provenance["resumed"] == [{"step": 3, "differs": []}]
    assert same(model, run())


@pytest.mark.usefixtures("every_step")
def test_a_kill_between_the_renames_loses_nothing(left: Path) -> None:
    old, new = (
        left.with_name(f"training.checkpoint.{kind}.safetensors")
        for kind in ("previous", "new")
    )
    os.replace(left, new)  # `old` is there, and `left` not yet
    assert old.exists()
    assert run(left.parent, resume=True).provenance["resumed"][0]["step"] == 4


def test_nothing_but_damaged_ones_is_an_error(left: Path) -> None:
    for path in left.parent.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="is damaged"):
        run(left.parent, resume=True)


def test_a_model_is_no_checkpoint(left: Path, tmp_path: Path) -> None:
    load_model(left).save(left, overwrite=True)
    for path in set(left.parent.iterdir()) - {left}:
        path.unlink()
    with pytest.raises(ModelFileError, match=r"is a model, not.*--from"):
        run(tmp_path, resume=True)


def test_a_running_training_is_not_overwritten(left: Path) -> None:
    before = left.read_bytes()
    with pytest.raises(SaveError, match=r"earlier training.*resume=True"):
        run(left.parent)
    assert left.read_bytes() == before


def test_words_of_a_file_are_plain() -> None:
    then = {"a\n\x1b[31m": "<b>\u202e" + "x" * 200, "same": 1}
    (line,) = differences(then, {"same": 1})
    assert line.isprintable()
    assert len(line) < 150


# --- files that lie --------------------------------------------------------------


def builders() -> Any:
    """Return the hostile files that the tests of the model file build."""
    place = Path(__file__).with_name("test_modelfile.py")
    spec = importlib.util.spec_from_file_location("modelfile_builders", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses and annotations ask for it
    spec.loader.exec_module(module)
    return module


BUILDERS = builders()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("good")
    interrupted(folder, 2)
    # the builders change a tensor of this name
    found = checkpoint.read(folder / NAME)
    found.state.tensors["half"] = np.array([1.5, -2.0], np.float16)
    header, body = BUILDERS.split(found.encode())
    header["half"] = header.pop("training.half")
    data: bytes = BUILDERS.sealed(header, body)
    modelfile.decode(data)
    return data


@pytest.mark.parametrize("case", BUILDERS.HOSTILE)
def test_a_hostile_file_is_refused(case: str, good: bytes, tmp_path: Path) -> None:
    path = tmp_path / NAME
    content = BUILDERS.HOSTILE[case](good)
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as error:
        run(tmp_path, resume=True)
    assert str(error.value).startswith(f"`{NAME}` ")
    assert path.read_bytes() == content


def table(good: Checkpoint, **changes: Any) -> bytes:
    """Return the file with changes in its table, its checksum right."""
    header, body = BUILDERS.split(good.encode())
    extra = json.loads(header["__metadata__"]["extra"])
    extra["training"].update(changes)
    header["__metadata__"]["extra"] = json.dumps(extra)
    return BUILDERS.sealed(header, body)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2}, {"version": 0}, {"version": True}, {"version": "1"},
        {"run": []}, {"environment": None}, {"values": []}, {"rows": []},
        {"rows": {"history": 8}}, {"rows": {"history": 10**9, "data": 3}},
        {"rows": {"history": 6, "data": 3}}, {"rows": {"history": 8, "data": 4}},
        {"rows": {"history": -8, "data": 3}}, {"rows": {"history": 8.0, "data": 3}},
        {"rows": {"history": 8, "data": 3, "network.": 1}},
    ],
)  # fmt: skip
def test_a_table_that_makes_no_sense_is_refused(
    left: Path, changes: dict[str, Any]
) -> None:
    left.write_bytes(table(checkpoint.read(left), **changes))
    with pytest.raises(ModelFileError, match=r"newer|cannot go on"):
        checkpoint.read(left)


RNG = checkpoint.chance(np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", -1), ("steps", "4"), ("steps", True), ("steps", 10**18),
        ("steps", 4.0), ("averaged_from", 5), ("fresh_until", None), ("estimates", 5),
        ("estimates", [[1]]), ("estimates", [[0, scored(0.5).to_list()]]),
        ("estimates", [[1, 0.5]]), ("estimates", [[1, [0.5, 0.4, 0.6, [2], 3]]]),
        ("estimates", [[1, ["high", 0.4, 0.6, [], 3]]]),
        ("frequency", [0.5]), ("frequency", [-1, 1]),
        ("frequency", ["a", "b"]), ("frequency", 3), ("rng", []), ("rng", {}),
        ("rng", {**RNG, "kind": "MT19937"}), ("rng", {**RNG, "state": "-0x1"}),
        ("rng", {**RNG, "state": "0x" + "f" * 33}), ("rng", {**RNG, "inc": "zz"}),
        ("rng", {**RNG, "inc": "1" * 10**5}), ("rng", {**RNG, "has_uint32": 2}),
        ("rng", {**RNG, "uinteger": 2**32}), ("rng", {**RNG, "uinteger": -1}),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(
    left: Path, name: str, value: Any
) -> None:
    found = checkpoint.read(left)
    values = {**found.state.values, name: value}
    left.write_bytes(table(found, values=values))
    with pytest.raises(ModelFileError, match="cannot go on") as error:
        run(left.parent, resume=True)
    assert len(str(error.value)) < 450
    del values[name]
    left.write_bytes(table(found, values=values))
    with pytest.raises(ModelFileError, match="cannot go on"):
        run(left.parent, resume=True)


def _bad_states() -> dict[str, Callable[[State], None]]:
    def put(part: int, key: str, value: Any) -> Callable[[State], None]:
        return lambda state: state[part].update({key: value})

    def drop(start: str) -> Callable[[State], None]:
        def change(state: State) -> None:
            del state.tensors[next(k for k in state.tensors if k.startswith(start))]

        return change

    def reshape(start: str) -> Callable[[State], None]:
        def change(state: State) -> None:
            key = next(k for k in state.tensors if k.startswith(start))
            state.tensors[key] = state.tensors[key][..., None]

        return change

    def retype(state: State) -> None:
        key = next(k for k in state.tensors if k.startswith("network."))
        state.tensors[key] = state.tensors[key].astype(np.float16)

    points = [(0, 0, 10**6, 1), (9, 0, 0, 1), (0, -1, 0, 1), (0, 0, 0, 300)]
    return {
        "a weight is missing": drop("network."),
        "what a weight remembers is missing": drop("optimizer.exp_avg."),
        "a weight of another shape": reshape("network."),
        "an average of another shape": reshape("shown."),
        "a moment of another shape": reshape("optimizer.exp_avg_sq."),
        "half precision": retype,
        "a weight too many": put(0, "network.more", np.zeros(3, np.float32)),
        "short chance": put(1, "generator", np.zeros(3, np.int64)),
        "wild chance": put(1, "generator", np.full(632, -1, np.int64)),
        "no chance": lambda state: state.rows.clear(),
        "half a point": put(1, "fresh", np.zeros(3, np.int64)),
        **{f"point {p}": put(1, "fresh", np.array(p)) for p in points},
    }


@pytest.mark.parametrize("case", _bad_states())
def test_weights_that_do_not_fit_are_refused(left: Path, case: str) -> None:
    found = checkpoint.read(left)
    _bad_states()[case](found.state)
    left.write_bytes(found.encode())
    with pytest.raises(ModelFileError, match="cannot go on"):
        run(left.parent, resume=True)


def test_every_flipped_bit_is_found(good: bytes, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / NAME
    for at in rng.integers(0, len(good), 300):
        changed = bytearray(good)
        changed[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        with pytest.raises(ModelFileError):
            checkpoint.read(path)


# --- writing ---------------------------------------------------------------------


def at_step(
    monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[Trainer], object]
) -> None:
    """Let something happen right after a step."""
    real = Trainer.step

    def step(self: Trainer) -> float:
        loss = real(self)
        if self.steps == number:
            act(self)
        return loss

    monkeypatch.setattr(Trainer, "step", step)


@pytest.mark.usefixtures("every_step", "often_scored")
def test_the_last_two_and_the_best_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([0.5, 0.2, 0.4])  # the last is not as good as the first part's best
    monkeypatch.setattr(
        Scorer, "measure", lambda *_, **__: {1: scored(0.1), 2: scored(next(found))}
    )
    run(tmp_path)
    kinds = {"": 8, ".previous": 7, ".best": 3}
    files = {k: f"training.checkpoint{k}.safetensors" for k in kinds}
    assert names(tmp_path) == sorted(files.values())
    assert {k: checkpoint.read(tmp_path / f).steps for k, f in files.items()} == kinds
    run(tmp_path, resume=True, max_steps=10)
    assert checkpoint.read(tmp_path / files[".best"]).steps == 3


def test_time_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    rolling = Rolling(tmp_path)
    interrupted(tmp_path, 2)
    found = rolling.begin(resume=True)
    assert found is not None
    assert not rolling.due(3)
    now[0] += 60.0
    assert rolling.due(3)
    assert not rolling.due(2)  # that one is safe
    rolling.keep(dataclasses.replace(found, history=found.history[:1]), wait=True)
    assert not rolling.due(3)
    assert rolling.kept == 1


@pytest.mark.usefixtures("every_step")
@pytest.mark.parametrize("what", ["weight", "buffer", "moment", "loss"])
def test_nothing_that_is_not_finite_is_ever_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def poison(trainer: Trainer) -> None:
        weight = next(trainer.network.parameters())
        if what == "loss":
            raise TrainingError("The loss must stay finite, got nan.")
        if what == "moment":
            trainer._optimizer.state[weight]["exp_avg"].fill_(torch.inf)
        elif what == "weight":
            weight.data.flatten()[0] = torch.nan
        else:
            next(b for b in trainer.network.buffers() if b.ndim).fill_(torch.nan)

    at_step(monkeypatch, 5, poison)
    path = tmp_path / NAME
    with pytest.raises(TrainingError, match="finite") as error:
        run(tmp_path, network=NETS["unet"])
    assert f"`{path}` (step 4)" in str(error.value)
    monkeypatch.undo()
    assert same(load_model(path), run(network=NETS["unet"], max_steps=4))


@pytest.mark.usefixtures("every_step")
def test_a_full_disk_does_not_end_the_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_step(monkeypatch, 4, lambda _: monkeypatch.setattr(os, "fsync", full))
    model = run(tmp_path)
    assert len(model.history) == 8
    assert "No checkpoint of step 8" in caplog.text
    assert "No space left" in caplog.text
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2  # nothing half-written
    steps = checkpoint.read(tmp_path / NAME).steps
    assert steps in (3, 4)
    assert f"(step {steps})" in caplog.text
    assert same(run(tmp_path, resume=True), model)


@pytest.mark.usefixtures("every_step")
def test_what_was_not_written_right_replaces_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    interrupted(tmp_path, 3)
    before = {n: (tmp_path / n).read_bytes() for n in names(tmp_path)}
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"other")
    run(tmp_path, resume=True, max_steps=5)
    monkeypatch.undo()
    assert "damaged on the disk" in caplog.text
    assert {n: (tmp_path / n).read_bytes() for n in before} == before


@pytest.mark.parametrize("place", ["write-protected", "missing"])
def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(Trainer, "step", lambda _: pytest.fail("it has begun"))
    path = tmp_path / "c.safetensors"
    if place == "missing":
        path = tmp_path / "no" / "c.safetensors"
    else:
        monkeypatch.setattr(checkpoint.os, "access", lambda *_: False)
    with pytest.raises(SaveError, match="No checkpoint can be written"):
        run(path)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        run(tmp_path / "c.pt")


def test_a_refused_rename_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("new", "now"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(SaveError, match="`now` could not be renamed: Permission"):
        io.rotate(tmp_path / "new", tmp_path / "now", tmp_path / "old")
    assert names(tmp_path) == ["new", "now"]


# --- the command -----------------------------------------------------------------

TINY = ("--network", "unet++", "--width", "4", "--levels", "2", "--device", "cpu")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    tifffile.imwrite(tmp_path / "image.tif", IMAGE)
    io.write_labels(tmp_path / "paint.tif", PAINT)
    return [str(tmp_path / "image.tif"), str(tmp_path / "paint.tif"), *TINY, "-o"]


def test_the_command_leaves_no_checkpoint_behind(
    tmp_path: Path, files: list[str]
) -> None:
    out = tmp_path / "m.safetensors"
    options = ["--steps", "3", "--checkpoint-seconds", "0"]
    assert main(["train", *files, str(out), *options]) == 0
    assert names(tmp_path) == ["image.tif", "m.safetensors", "paint.tif"]


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_command_tells_how_to_go_on(
    tmp_path: Path,
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: str,
    code: int,
) -> None:
    out, whole = tmp_path / "m.safetensors", tmp_path / "w.safetensors"
    assert main(["train", *files, str(whole), "--steps", "5"]) == 0
    kind = getattr(signal, number)
    at_step(monkeypatch, 2, lambda _: signal.raise_signal(kind))
    command = ["train", *files, str(out), "--steps", "5"]
    assert main(command) == code
    monkeypatch.undo()
    kept = tmp_path / "m.checkpoint.safetensors"
    told = capsys.readouterr().err
    assert str(kept) in told
    assert "--resume --overwrite" in told
    assert len(load_model(out).history) == 2
    out.unlink()
    assert main(command) == 2  # what is not finished is not overwritten
    assert "did not end. Pass --resume" in capsys.readouterr().err
    assert main([*command, "--changed-data"]) == 2
    assert main([*command, "--resume", "--seed", "4"]) == 2
    assert "seed: 0 then, 4 now" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert same(load_model(out), load_model(whole))
    assert not kept.exists()


def test_the_second_ctrl_c_tells_it_too(
    tmp_path: Path,
    files: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def twice(_: Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(monkeypatch, 4, twice)
    monkeypatch.setattr(Rolling, "due", due)
    out = tmp_path / "m.safetensors"
    assert main(["train", *files, str(out), "--steps", "5"]) == 130
    assert "with --resume." in capsys.readouterr().err
    assert checkpoint.read(tmp_path / "m.checkpoint.safetensors").steps == 3


def test_beginning_anew_must_be_wished(tmp_path: Path, files: list[str]) -> None:
    out = tmp_path / "m.safetensors"
    interrupted(tmp_path / "m.checkpoint.safetensors", 2)
    assert main(["train", *files, str(out), "--steps", "2"]) == 2
    assert main(["train", *files, str(out), "--steps", "2", "--overwrite"]) == 0
    assert names(tmp_path) == ["image.tif", "m.safetensors", "paint.tif"]


@pytest.mark.parametrize("wrong", ["m.safetensors", "image.tif", "c.pt"])
def test_a_checkpoint_never_replaces_another_file(
    tmp_path: Path, files: list[str], wrong: str
) -> None:
    before = (tmp_path / "image.tif").read_bytes()
    command = ["train", *files, str(tmp_path / "m.safetensors"), "--steps", "2"]
    assert main([*command, "--checkpoint", str(tmp_path / wrong)]) == 2
    assert (tmp_path / "image.tif").read_bytes() == before


def kept_step(path: Path) -> int:
    try:
        return int(modelfile.describe(path).extra["training"]["values"]["steps"])
    except ModelFileError:
        return 0  # not there yet, or between two renames


def kill_at(command: list[str], path: Path, step: int) -> None:
    """Run the command and kill it, without mercy, once a checkpoint has the step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "napari_unetpp", *command],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        while kept_step(path) < step:
            if process.poll() is not None:
                raise AssertionError(process.communicate()[1])
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def killed_command(tmp_path: Path, files: list[str], kills: int, every: int) -> None:
    out = tmp_path / "m.safetensors"
    path = tmp_path / "m.checkpoint.safetensors"
    command = ["train", *files, str(out), "--checkpoint-seconds", "0"]
    for kill in range(kills):
        endless = [*command, "--steps", "1000000", "--resume"]
        kill_at(endless, path, kept_step(path) + every)
        assert kill or not out.exists()
    steps = str(Rolling(path)._newest().steps + 2)
    assert main([*command, "--steps", steps, "--resume"]) == 0
    whole = tmp_path / "whole.safetensors"
    assert main(["train", *files, str(whole), "--steps", steps]) == 0
    resumed, expected = load_model(out), load_model(whole)
    assert len(resumed.provenance["resumed"]) == kills
    assert same(resumed, expected)
    assert curve(resumed) == curve(expected)
    assert not path.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_killed_command_goes_on_bit_for_bit(tmp_path: Path, files: list[str]) -> None:
    killed_command(tmp_path, files, kills=2, every=4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
@pytest.mark.parametrize("network", ["unet", "fcn-8s", "unet++"])
def test_ten_kills(tmp_path: Path, files: list[str], network: str) -> None:
    files[files.index("unet++")] = network
    if network == "fcn-8s":
        files[files.index("--levels") + 1] = "5"
    killed_command(tmp_path, files, kills=10, every=6)


# --- live ------------------------------------------------------------------------

CLASSES = ("background", "square")


class Live:
    """A live training, driven step by step."""

    def __init__(self, folder: Path | None, paint: np.ndarray = PAINT, **more: Any):
        self.paint = paint
        self.classes = CLASSES
        self.box = Mailbox(self._wishes())
        settings = {"network": NETS["unet++"], "config": QUICK, "seed": 2, **more}
        self.steps = live_steps(
            [IMAGE], self.box, checkpoint=folder, device="cpu", **settings
        )
        self.last = 0

    def _wishes(self, training: bool = True) -> Wishes:
        return Wishes(({0: self.paint},), self.classes, training=training)

    def wish(self, **changes: Any) -> None:
        vars(self).update({k: v for k, v in changes.items() if k != "training"})
        self.box.put(self._wishes(changes.get("training", True)))

    def until(self, step: int) -> Live:
        for message in self.steps:
            if isinstance(message, Progress):
                self.last = message.last.step
                if self.last >= step:
                    break
        return self


def shown(folder: Path) -> Checkpoint:
    return checkpoint.read(folder / NAME)


def weights(found: Checkpoint) -> dict[str, bytes]:
    return {k: v.tobytes() for k, v in found.state.tensors.items()}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    return tmp_path / "whole", tmp_path / "parts"


def test_a_live_training_goes_on_bit_for_bit(folders: tuple[Path, Path]) -> None:
    paint = correction()
    for folder in folders:
        live = Live(folder).until(6)
        live.wish(paint=paint)  # half of the next batches look at what is new
        live.until(9)
        if folder == folders[1]:
            live.steps.close()
            live = Live(folder, paint, resume=True, seed=99, network="unet").until(11)
            live.steps.close()
            live = Live(folder, paint, resume=True)
        live.until(14).steps.close()
    whole, parts = map(shown, folders)
    assert parts.state.rows["fresh"].size
    assert weights(whole) == weights(parts)
    assert whole.state.values == parts.state.values
    np.testing.assert_array_equal(whole.history[:, :2], parts.history[:, :2])
    assert np.all(np.diff(parts.history[:, 2]) > 0)
    resumed = parts.model.provenance["resumed"]
    assert resumed == [{"step": n, "differs": []} for n in (9, 11)]
    assert parts.run["parent"] is None


def test_a_live_training_goes_on_from_other_strokes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Live(tmp_path).until(5).steps.close()
    Live(tmp_path, correction(), resume=True).until(8).steps.close()
    found = shown(tmp_path)
    assert found.steps == 8
    assert found.state.values["steps"] == 8
    assert "annotations: 1 of 1 changed" in caplog.text
    assert found.model.provenance["resumed"][0]["differs"]


def test_a_live_training_goes_on_with_more_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Live(tmp_path).until(5).steps.close()
    paint = correction()
    paint[-20:-16, 8:80] = 3
    live = Live(tmp_path, paint, resume=True)
    live.wish(classes=(*CLASSES, "edge"))
    live.until(8).steps.close()
    found = shown(tmp_path)
    assert found.steps == 8
    assert found.state.values["steps"] == 3  # of the new optimizer
    assert "optimizer starts anew (classes: 2 then, 3 now)" in caplog.text
    assert len(load_model(tmp_path / NAME).classes) == 3


def test_a_class_may_be_renamed(tmp_path: Path) -> None:
    Live(tmp_path).until(3).steps.close()
    live = Live(tmp_path, resume=True)
    live.wish(classes=("ground", "square"))
    live.until(5).steps.close()
    assert shown(tmp_path).state.values["steps"] == 5
    assert load_model(tmp_path / NAME).classes == ("ground", "square")


def test_a_pause_is_safe(tmp_path: Path) -> None:
    live = Live(tmp_path).until(3)
    live.wish(training=False)
    for _ in live.steps:  # predicts what is left, then waits
        if (tmp_path / NAME).exists():
            break
    assert shown(tmp_path).steps == 3


def test_a_pause_on_a_full_disk_tries_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SaveError("The disk is full.")

    monkeypatch.setattr(io, "atomic_write", full)
    live = Live(tmp_path).until(3)
    live.wish(training=False)
    waits = 0
    for message in live.steps:
        waits += isinstance(message, Waiting)
        if waits == 4:
            break
    assert caplog.text.count("No checkpoint of step 3: The disk is full.") == 1
    monkeypatch.undo()
    live.steps.close()  # tries again
    assert shown(tmp_path).steps == 3


def test_what_cannot_be_deleted_is_told(
    left: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    Rolling(left).remove()
    assert f"`{NAME}` was not deleted: Permission denied" in caplog.text


@pytest.mark.usefixtures("every_step", "often_scored")
@pytest.mark.parametrize("refused", ["new", "", "previous", "best"])
def test_a_training_that_is_half_deleted_still_ends_in_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    ask: dict[str, Any] = {"config": QUICK.replaced(patience=9), "max_steps": 7}
    whole = run(tmp_path, **ask)
    rolling, real = Rolling(tmp_path), Path.unlink

    def unlink(path: Path, **options: Any) -> None:
        if path.name == NAME.replace(".saf", f".{refused}.saf" if refused else ".saf"):
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        rolling.remove()
    assert same(run(tmp_path, resume=True, **ask), whole)
    rolling.remove()
    assert names(tmp_path) == []


def test_a_stop_is_safe(tmp_path: Path) -> None:
    class Stop:
        wished = False

        def is_set(self) -> bool:
            return self.wished

    stop = Stop()
    live = Live(tmp_path, stop=stop).until(4)
    stop.wished = True
    assert not [m for m in live.steps if isinstance(m, Progress)]
    assert shown(tmp_path).steps == 4


def test_a_live_training_is_not_overwritten(tmp_path: Path) -> None:
    Live(tmp_path).until(2).steps.close()
    with pytest.raises(SaveError, match="earlier training"):
        Live(tmp_path).until(1)


def test_a_live_training_that_fails_names_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(_: Trainer) -> None:
        raise TrainingError("The loss must stay finite, got nan.")

    at_step(monkeypatch, 4, poison)
    monkeypatch.setattr(Rolling, "due", due)
    with pytest.raises(TrainingError, match=r"finite.*checkpoint is .*\(step 3\)"):
        Live(tmp_path).until(9)


def test_only_a_checkpoint_with_settings_goes_on_live(tmp_path: Path) -> None:
    Live(tmp_path).until(2).steps.close()
    edited(tmp_path / NAME, run={"seed": -1, "settings": {}})
    with pytest.raises(ModelFileError, match="cannot go on"):
        Live(tmp_path, resume=True).until(3)


def test_the_log_is_ours(left: Path, caplog: pytest.LogCaptureFixture) -> None:
    edited(left, environment={})
    with caplog.at_level(logging.WARNING, "napari_unetpp"):
        run(left.parent, resume=True)
    assert {r.name for r in caplog.records} == {"napari_unetpp"}
    assert read_examples(IMAGE, PAINT).fingerprints  # what the data are known by


@pytest.mark.usefixtures("every_step")
def test_the_best_model_outlives_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_room, "_SCORE_EVERY", 3)
    values = {3: 0.5, 6: 0.2, 9: 0.4, 12: 0.3}
    found = iter(values.values())
    monkeypatch.setattr(
        Scorer, "measure", lambda *_, **__: {1: scored(0.1), 2: scored(next(found))}
    )
    patient = QUICK.replaced(patience=3)
    first = run(tmp_path, config=patient, max_steps=7)
    assert [s.step for s in first.history] == [1, 2, 3]
    second = run(tmp_path, config=patient, max_steps=100, resume=True)
    assert same(second, first)
    assert checkpoint.read(tmp_path / "training.checkpoint.safetensors").steps == 12
