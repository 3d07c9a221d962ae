"""A run trains, chooses, tests once, and leaves a folder that tells all of it."""

from __future__ import annotations

import csv
import html.parser
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from napari_unetpp import experiment, pictures
from napari_unetpp.config import NetConfig, TrainConfig
from napari_unetpp.errors import SaveError
from napari_unetpp.evaluate import evaluate
from napari_unetpp.experiment import Part, Plan, run_steps
from napari_unetpp.model import Model, TrainStep, load_model
from napari_unetpp.predict import predict

if TYPE_CHECKING:
    from pathlib import Path

EVIL = "<script>alert(1)</script>\u202e"
CONFIG = TrainConfig(
    patch=32, batch=2, edges=0, averaging=0, pretrained=False, score_every=4,
    warp_after=0, border=10.0, balance=0,
)  # fmt: skip
PLAN = Plan(
    NetConfig("unet", width=4, levels=1),
    CONFIG,
    max_steps=12,
    title=f"Run {EVIL}",
)


def scene(seed: int, side: int = 48) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    instances = np.zeros((side, side), np.uint16)
    y, x = rng.integers(4, 16, 2)
    instances[y : y + 14, x : x + 10] = 1
    instances[y : y + 14, x + 10 : x + 22] = 2
    image = np.where(instances > 0, 160, 60) + rng.normal(0, 8, (side, side))
    return image.clip(0, 255).astype(np.uint8), instances


def part(*seeds: int) -> Part:
    scenes = [scene(s) for s in seeds]
    return Part(
        [f"{s}{EVIL}" for s in seeds],
        [image for image, _ in scenes],
        [(found > 0).astype(np.uint8) for _, found in scenes],
        [found for _, found in scenes],
    )


PARTS = {"train": part(0, 1, 2), "validation": part(10, 11), "test": part(20, 21, 22)}


def drain(
    folder: Path, plan: Plan = PLAN, parts: Any = PARTS, **more: Any
) -> tuple[list[TrainStep], Model]:
    steps, seen = run_steps(parts, folder, plan, device="cpu", **more), []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return seen, end.value


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainStep]]:
    folder = tmp_path_factory.mktemp("runs") / "first"
    return folder, drain(folder)[0]


def table(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_a_run_leaves_its_files(done: tuple[Path, list[TrainStep]]) -> None:
    folder, seen = done
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.json", "environment.json", "history.csv", "scores.json", "curves.png",
        "film.png", "frames", "model.safetensors", "report.html",
        *(f"test_{i}_{kind}.png" for i in range(3) for kind in ("image", "labels")),
    }  # fmt: skip
    assert [s.step for s in seen] == list(range(1, 13))
    with (folder / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [s.loss for s in seen]
    assert [bool(row["validation"]) for row in rows] == [
        s % 4 == 0 for s in range(1, 13)
    ]
    config = table(folder, "config.json")
    assert config["training"] == CONFIG.replaced(held_out=0.0, patience=10**9).to_dict()
    assert config["parts"]["test"] == list(PARTS["test"].names)
    around = table(folder, "environment.json")
    assert around["seed"] == 0
    assert around["deterministic"] is False
    assert {"torch", "numpy", "device", "threads", "tile"} <= set(around)
    assert {k: len(v) for k, v in around["data"].items()} == {
        "train": 3, "validation": 2, "test": 3,
    }  # fmt: skip


def test_the_best_step_is_kept_and_the_test_is_its_score(
    done: tuple[Path, list[TrainStep]],
) -> None:
    folder, seen = done
    scores = table(folder, "scores.json")
    told = {s.step: s.score for s in seen if s.step % 4 == 0}
    assert scores["validation"] == max(told.values())  # type: ignore[type-var]
    assert told[scores["best_step"]] == scores["validation"]
    model = load_model(folder / "model.safetensors")
    assert model.history[-1].step == scores["best_step"]
    each = [
        evaluate(predict(model, image), mask, unlabelled=None).iou.get(1, np.nan)
        for image, mask in zip(PARTS["test"].images, PARTS["test"].masks, strict=True)
    ]
    assert list(scores["test"]["images"].values()) == pytest.approx(each)
    assert scores["test"]["score"] == pytest.approx(np.mean(each))


class Tags(html.parser.HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_runs_nothing_and_needs_no_other_file(
    done: tuple[Path, list[TrainStep]],
) -> None:
    page = (done[0] / "report.html").read_text(encoding="utf-8")
    read = Tags()
    read.feed(page)
    assert "script" not in read.tags
    assert "\u202e" not in page
    assert "Run <script>alert(1)</script>" in read.text  # as text
    sources = [v for k, v in read.attributes if k in ("src", "href")]
    assert len(sources) == 8
    assert all(v is not None and v.startswith("data:image/png") for v in sources)
    assert not [k for k, _ in read.attributes if k.startswith("on")]


def test_the_film_grows_with_the_steps(done: tuple[Path, list[TrainStep]]) -> None:
    folder, _ = done
    names = sorted(p.name for p in (folder / "frames").iterdir())
    assert names == [f"step_{n:08d}.png" for n in (4, 8, 12)]
    with Image.open(folder / "film.png") as film:
        assert film.n_frames == 3
        assert film.is_animated


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, done: Any) -> None:
    class Stop:
        left = 6

        def is_set(self) -> bool:
            self.left -= 1
            return self.left <= 0

    folder = tmp_path / "run"
    seen, _ = drain(folder, stop=Stop())
    assert len(seen) == 6
    assert "test" not in table(folder, "scores.json")
    assert "not tested" in (folder / "report.html").read_text(encoding="utf-8")
    with pytest.raises(SaveError, match="holds a run that did not end"):
        drain(folder)
    more, model = drain(folder, resume=True)
    assert [s.step for s in more] == list(range(7, 13))
    whole = load_model(done[0] / "model.safetensors")
    assert (folder / "frames" / "step_00000004.png").exists()
    for name, value in model.network.state_dict().items():
        assert np.array_equal(value, whole.network.state_dict()[name])
    first, second = (
        [line.split(",")[:2] for line in (f / "history.csv").read_text().splitlines()]
        for f in (done[0], folder)
    )
    assert first == second
    assert not list(folder.glob("*checkpoint*"))


def test_a_test_is_never_scored_twice(done: tuple[Path, list[TrainStep]]) -> None:
    for resume in (False, True):
        with pytest.raises(SaveError, match="scored once and stays so"):
            drain(done[0], resume=resume)


def test_a_run_that_was_killed_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    steps = run_steps(PARTS, folder, PLAN, device="cpu")
    next(steps)
    steps.close()
    before = (folder / "config.json").read_text()
    with pytest.raises(SaveError, match="holds a run that did not end"):
        drain(folder, Plan(PLAN.network, PLAN.config, max_steps=3))
    assert (folder / "config.json").read_text() == before
    assert [s.step for s in drain(folder, resume=True)[0]] == list(range(2, 13))


def test_patience_ends_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([0.5, 0.4, float("nan"), 0.9])
    monkeypatch.setattr(experiment, "_mean", lambda _: next(told))
    plan = Plan(PLAN.network, CONFIG.replaced(patience=2), max_steps=99)
    seen, model = drain(tmp_path / "run", plan, {**PARTS, "test": Part((), (), ())})
    assert len(seen) == 12
    assert model.history[-1].step == 4
    scores = table(tmp_path / "run", "scores.json")
    assert (scores["best_step"], scores["validation"]) == (4, 0.5)
    assert "test" not in scores


def test_an_image_in_two_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No image may lie in two parts"):
        drain(tmp_path / "run", parts={**PARTS, "test": part(0)})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("missing", ["train", "validation"])
def test_a_run_needs_images_to_train_and_to_choose(
    tmp_path: Path, missing: str
) -> None:
    with pytest.raises(ValueError, match="images to train on and others to choose by"):
        drain(tmp_path / "run", parts={**PARTS, missing: Part((), (), ())})


def test_stacks_of_colours_with_strokes_are_understood(tmp_path: Path) -> None:
    def stack(seed: int) -> Part:
        planes = [scene(seed), scene(seed + 1)]
        image = np.stack([np.stack([a] * 3, axis=-1) for a, _ in planes])
        mask = np.stack([np.where(b > 0, 2, 1).astype(np.uint8) for _, b in planes])
        mask[:, :5] = 0  # not annotated
        return Part((f"stack{seed}",), (image,), (mask,))

    plan = Plan(
        NetConfig("unet", 3, width=4, levels=1),
        CONFIG.replaced(deterministic=True),
        unlabelled=0,
        channel_axis=-1,
        max_steps=3,  # fewer than one validation takes: the last one is looked at
        tile=32,
    )
    parts = {"train": stack(0), "validation": stack(10), "test": stack(20)}
    seen, model = drain(tmp_path / "run", plan, parts)
    assert seen[-1].score is not None
    scores = table(tmp_path / "run", "scores.json")
    assert scores["best_step"] == 3
    image, mask = parts["test"].images[0], parts["test"].masks[0]
    labels = predict(model, image, channel_axis=-1, tile=32)
    expected = evaluate(labels, mask, unlabelled=0).iou[2]
    assert scores["test"]["iou"]["object"] == pytest.approx(expected)
    with Image.open(tmp_path / "run" / "test_0_image.png") as shown:
        assert shown.size == (7 * 48, 7 * 48)


# --- pictures --------------------------------------------------------------------


def test_tints_say_what_agrees() -> None:
    image = np.zeros((1, 6, 3), np.uint8)
    labels = np.array([[2, 1, 2, 2, 1, 2]], np.uint8)
    truth = np.array([[2, 2, 1, 3, 1, 0]], np.uint8)
    tinted = pictures.compared(image, labels, truth)[0]
    half = [
        tuple(round(c / 2) for c in colour)
        for colour in (
            pictures.RIGHT, pictures.MISSED, pictures.INVENTED, pictures.MIXED,
        )
    ]  # fmt: skip
    assert [tuple(v) for v in tinted[:4].tolist()] == half
    assert not tinted[4:].any()
    assert not image.any()


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.31, 0.94), (0, 12345), (0.5, 0.5), (1e-5, 2e-5)]
)
def test_ticks_are_round_and_span_the_values(low: float, high: float) -> None:
    ticks = pictures._ticks(low, high)
    assert ticks[0] <= low + 1e-9
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 8


@pytest.mark.parametrize("scores", [[None, None], [0.5, 0.7], [0.0, 0.0]])
def test_curves_are_drawn_whatever_is_known(scores: list[float | None]) -> None:
    history = [TrainStep(i + 1, 1.0, 0.1 * i, s) for i, s in enumerate(scores)]
    drawn = pictures.curves(history)
    assert drawn.dtype == np.uint8
    assert drawn.min() < 100 < drawn.max()
    assert pictures.curves([]).shape == drawn.shape
