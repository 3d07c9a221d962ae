"""A project comes back as it was saved, goes back a round, and survives any crash."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from napari_unetpp import api, io
from napari_unetpp.cli import main
from napari_unetpp.errors import ImageFileError, InUseError, ModelFileError, SaveError
from napari_unetpp.model import Model, TrainStep
from napari_unetpp.project import KEPT

CLASSES = ("background", "cell")


def model(seed: int = 0, score: float | None = 0.5, steps: int = 3) -> Model:
    """Return a small model that says it was trained."""
    made = api.create_model("unet", classes=CLASSES, width=4, levels=2, seed=seed)
    made.history = (TrainStep(steps, 0.25, 1.5, score),)
    made.provenance = {"held_out": {"key": 5, "fraction": 0.15}}
    if score is not None:
        made.provenance["held_out_interval"] = [score - 0.1, score + 0.1]
    return made


def strokes(row: int = 4) -> np.ndarray:
    marks = np.zeros((48, 64), np.uint8)
    marks[row : row + 4], marks[row + 20 : row + 24] = 1, 2
    return marks


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "a b.tif"
    path.parent.mkdir()
    rng = np.random.default_rng(0)
    tifffile.imwrite(path, (rng.random((48, 64)) * 200).astype(np.uint8))
    return path


@pytest.fixture
def folder(image: Path) -> Path:
    """Return a project of two rounds; the first one scored better."""
    folder = image.parent / "project"
    api.save_project(folder, image, strokes(0), model(0, 0.8), depth=None)
    api.add_round(folder, model(1, 0.3, 7), strokes(2))
    return folder


def same(a: Model, b: Model) -> bool:
    left, right = a.network.state_dict(), b.network.state_dict()
    return all(bool((left[k] == right[k]).all()) for k in left)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_all_comes_back(tmp_path: Path, image: Path) -> None:
    stack = np.random.default_rng(1).random((1, 20, 24, 3)).astype(np.float32)
    marks = np.zeros((1, 20, 24), np.uint16)
    marks[0, 3], marks[0, 9] = 1, 2
    colours = api.ProjectImage(
        "stained", (None,), channel_axis=-1, scale=(1.0, 0.5, 0.5), translate=(0, 1, 2),
        units=("pixel", "micrometer", "micrometer"), data=(stack,),
    )  # fmt: skip
    config = api.TrainConfig(patch=64, held_out=0.2)
    made = model()
    folder = tmp_path / "new" / "project"
    api.save_project(
        folder, [image, colours], [strokes(), marks], made, config=config, depth=1
    )
    found = api.load_project(folder / "project.json")
    assert found.classes == CLASSES
    assert (found.config, found.depth, found.unlabelled) == (config, 1, 0)
    assert found.network == made.config
    assert found.held_out is not None
    assert found.held_out.to_dict() == made.provenance["held_out"]
    first, second = found.images
    assert first.files == (image,) or os.path.samefile(str(first.files[0]), image)
    assert np.array_equal(first.read(), tifffile.imread(image))
    assert np.array_equal(second.read(), stack)
    assert second.files[0] is not None
    assert second.files[0].parent == Path(os.path.realpath(folder)) / "images"
    assert (second.scale, second.units) == (colours.scale, colours.units)
    assert second.translate == (0, 1, 2)
    for kept, given in zip(found.read_annotations(), [strokes(), marks], strict=True):
        assert np.array_equal(kept, given)
    back = found.load_model()
    assert back is not None
    assert same(back, made)
    (only,) = found.rounds
    assert (only.number, only.steps, only.score) == (1, 3, 0.5)
    assert only.interval == pytest.approx((0.4, 0.6))
    assert only.painted == 4 * 64 * 2 + 48


def test_saving_again_keeps_the_rounds_and_adds_none_of_the_same_model(
    folder: Path, image: Path
) -> None:
    found = api.save_project(folder, image, strokes(9), model(1, 0.3, 7))
    assert [r.number for r in found.rounds] == [1, 2]
    assert np.array_equal(found.read_annotations()[0], strokes(9))
    assert len(list((folder / "annotations").iterdir())) == 1


def test_classes_that_the_model_has_not_learned_yet_are_kept(
    folder: Path, image: Path
) -> None:
    names = (*CLASSES, "debris")
    api.save_project(folder, image, strokes(), model(1, 0.3, 7), classes=names)
    assert api.load_project(folder).classes == names
    new = folder.with_name("new")
    found = api.save_project(new, image, strokes())
    assert found.classes == ("background", "class 2")
    assert (found.rounds, found.current, found.load_model()) == ((), None, None)


def test_one_goes_back_and_forth_and_no_stroke_is_lost(folder: Path) -> None:
    found = api.go_back(folder, 1)
    assert found.current == 1
    assert [r.number for r in found.rounds] == [1, 2]  # nothing new to keep
    assert same(found.load_model() or model(9), model(0))
    assert np.array_equal(found.read_annotations()[0], strokes(0))
    found = api.go_back(folder, 2)
    assert same(found.load_model() or model(9), model(1))
    assert np.array_equal(found.read_annotations()[0], strokes(2))


def test_strokes_newer_than_any_round_become_one(folder: Path, image: Path) -> None:
    api.save_project(folder, image, strokes(11))
    found = api.go_back(folder, 1)
    assert [r.number for r in found.rounds] == [1, 2, 3]
    assert np.array_equal(found.read_annotations(3)[0], strokes(11))
    assert same(found.round(3).load_model(), model(1))
    assert np.array_equal(found.read_annotations()[0], strokes(0))
    with pytest.raises(ValueError, match=r"\(1, 2, 3\), got 7"):
        api.go_back(folder, 7)


def test_the_best_of_the_old_rounds_stays(folder: Path) -> None:
    for n in range(KEPT + 3):
        found = api.add_round(folder, model(2 + n, 0.1 + 0.01 * n))
    numbers = [r.number for r in found.rounds]
    assert len(numbers) == KEPT
    assert numbers[0] == 1  # of score 0.8
    assert numbers[1:] == list(range(KEPT + 5 - len(numbers[1:]) + 1, KEPT + 6))
    kept = sorted(p.name for p in (folder / "rounds").iterdir())
    assert kept == [f"{n:03d}" for n in numbers]


class _Crash(BaseException):
    """The process ends here."""


def crash_at(monkeypatch: pytest.MonkeyPatch, which: int) -> list[Any]:
    """Let the write of this number, from 0, be the last thing that happens."""
    done: list[Any] = []
    real = io.files._replace

    def replace(part: Path, target: Path) -> None:
        if len(done) == which:
            raise _Crash
        done.append(target)
        real(part, target)

    monkeypatch.setattr(io.files, "_replace", replace)
    return done


@pytest.mark.parametrize("action", ["save", "round", "back"])
def test_a_crash_at_any_write_leaves_the_old_project_or_the_new(
    folder: Path, image: Path, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.save_project(folder, image, strokes(11))

    def act(where: Path) -> None:
        if action == "save":
            api.save_project(where, image, strokes(7), model(5))
        elif action == "round":
            api.add_round(where, model(5), strokes(7))
        else:
            api.go_back(where, 1)

    def told(where: Path) -> tuple[Any, ...]:
        found = api.load_project(where)
        now = found.load_model()
        assert now is not None
        for r in found.rounds:
            r.load_model()
        marks = [a.tobytes() for n in found.rounds for a in
                 found.read_annotations(n.number)]  # fmt: skip
        weights = [v.numpy().tobytes() for v in now.network.state_dict().values()]
        mine = [a.tobytes() for a in found.read_annotations()]
        return found.current, [r.number for r in found.rounds], marks, weights, mine

    whole = folder.with_name("whole")
    shutil.copytree(folder, whole)
    old = told(whole)
    act(whole)
    new = told(whole)
    assert old != new
    for n in range(20):
        copy = folder.with_name(f"copy {n}")
        shutil.copytree(folder, copy)
        with monkeypatch.context() as patch:
            done = crash_at(patch, n)
            try:
                act(copy)
            except _Crash:
                assert told(copy) == old
            else:
                assert told(copy) == new
                assert len(done) == n
                break
        act(copy)  # what was left half-done is in nobody's way
        again = told(copy)
        assert again[3:] == new[3:]
    assert n >= 4


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "project.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "{}", '{"format": "napari-unetpp project"}',
        '{"format": 1, "format": "napari-unetpp project"}', "\xff", "[" * 10**5,
    ],
)  # fmt: skip
def test_what_is_no_project_is_refused(folder: Path, text: str) -> None:
    (folder / "project.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFileError, match="damaged"):
        api.load_project(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": ["../../etc"]}, {"rounds": [1, 1]}, {"rounds": [-1]}, {"current": 9},
        {"rounds": [1e3]}, {"classes": ["a\nb"]}, {"classes": "ab"},
        {"classes": []}, {"classes": ["a", "a"]}, {"settings": None},
        {"unlabelled": False}, {"held_out": {"key": -1}}, {"images": [{}]},
        {"settings": {"network": None, "training": {"evil": 1}, "depth": None}},
        {"settings": {"network": {"name": "x"}, "training": {}, "depth": None}},
    ],
)  # fmt: skip
def test_a_lying_project_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(ModelFileError, match="damaged"):
        api.load_project(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("annotation", "../../secret.tif"), ("annotation", "/etc/passwd"),
        ("annotation", "a.tif"), ("annotation", "..\\x.000001.strokes.tif"),
        ("scale", [0]), ("scale", ["1"]), ("translate", [1e301]), ("shape", [True, 2]),
        ("files", []), ("channel_axis", 1), ("units", ["\u202e"]), ("rgb", True),
        ("channel_axis", -1), ("shape", [48, 65]), ("shape", [3072]),
    ],
)  # fmt: skip
def test_a_lying_image_is_refused(folder: Path, key: str, value: Any) -> None:
    values = json.loads((folder / "project.json").read_text(encoding="utf-8"))
    values["images"][0][key] = value
    edit(folder, images=values["images"])
    with pytest.raises(ModelFileError, match="damaged"):
        api.load_project(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("score", 1.5), ("score", "0.5"), ("score", True), ("interval", [0.1, -1]),
        ("date", "yesterday"), ("date", 5), ("weights", "0"), ("steps", -1),
        ("strokes", ["../x.000001.strokes.tif"]), ("painted", None),
    ],
)  # fmt: skip
def test_a_lying_round_is_refused(folder: Path, key: str, value: Any) -> None:
    path = folder / "rounds" / "001" / "score.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, key: value}), encoding="utf-8")
    with pytest.raises(ModelFileError, match="damaged"):
        api.load_project(folder)


def test_no_link_leads_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    found = api.load_project(folder)
    own = folder / "annotations" / found.images[0].annotation
    own.rename(tmp_path / "secret.tif")
    own.symlink_to(tmp_path / "secret.tif")
    with pytest.raises(ModelFileError, match="leads out"):
        found.read_annotations()
    shutil.move(folder / "rounds", tmp_path / "rounds")
    (folder / "rounds").symlink_to(tmp_path / "rounds")
    with pytest.raises(ModelFileError, match="leads out"):
        api.load_project(folder)


def test_a_moved_folder_finds_its_images(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder.parent, tmp_path / "elsewhere")
    found = api.load_project(tmp_path / "elsewhere" / "project")
    assert found.images[0].read().shape == (48, 64)


def test_a_missing_or_changed_image_is_told(folder: Path, image: Path) -> None:
    found = api.load_project(folder)
    pixels = tifffile.imread(image)
    tifffile.imwrite(image, pixels[::-1])
    with pytest.raises(ImageFileError, match=r"other pixels.*Put the old file back"):
        found.images[0].read()
    image.unlink()
    with pytest.raises(ImageFileError, match=r"`a b.tif`.*not in.*Put it back"):
        api.load_project(folder).images[0].read()
    assert main(["info", str(folder)]) == 0  # what needs no image still works


def test_of_two_that_write_the_second_is_refused(folder: Path) -> None:
    before = files(folder)
    with io.lock(folder), pytest.raises(InUseError):
        api.add_round(folder, model(4))
    assert files(folder) == before


def test_a_folder_of_somebody_else_is_not_mixed_with(image: Path) -> None:
    folder = image.parent
    (folder / "rounds" / "001").mkdir(parents=True)
    with pytest.raises(SaveError, match="is no project"):
        api.save_project(folder, image, strokes())
    with pytest.raises(ModelFileError, match="no project"):
        api.load_project(folder)


def test_annotations_must_fit(folder: Path, image: Path) -> None:
    before = files(folder)
    for wrong in (strokes()[1:], strokes().astype(float)):
        with pytest.raises(ValueError, match="must hold whole numbers"):
            api.save_project(folder, image, wrong)
    with pytest.raises(ValueError, match="shape"):
        api.add_round(folder, model(4), strokes()[1:])
    with pytest.raises(ValueError, match="one annotation for each"):
        api.save_project(folder, [image, image], strokes())
    odd = api.ProjectImage("a", (image,), units=("1+", "?"))
    with pytest.raises(ValueError, match="unit"):
        api.save_project(folder, odd, strokes())
    shutil.rmtree(folder / "annotations")  # written first, under a new name
    (folder / "annotations").mkdir()
    for name, data in before.items():
        if name.startswith("annotations"):
            (folder / name).write_bytes(data)
    assert files(folder) == before


# --- the command line ----------------------------------------------------------


def test_a_command_adds_a_round_and_tells_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--project", str(folder), "--steps", "2", "--device", "cpu"]
    assert main([*command, "-q", "--set", "patch=32", "--set", "batch=1"]) == 0
    assert "round 3 of the project" in capsys.readouterr().out
    found = api.load_project(folder)
    assert found.current == 3
    assert found.rounds[-1].steps == 2
    assert found.held_out is not None
    assert found.held_out.key == 5  # as the first round decided
    newest = found.load_model()
    assert newest is not None
    assert not same(newest, model(1))
    assert main(["info", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [r["score"] for r in told["rounds"][:2]] == [0.8, 0.3]
    assert main(["info", str(folder / "project.json")]) == 0
    text = capsys.readouterr().out
    assert "0.70 to 0.90" in text
    assert "3 *" in text


@pytest.mark.parametrize(
    "extra", [["-o", "m.safetensors"], ["--network", "unet"], ["--classes", "a,b"]]
)
def test_a_command_refuses_what_a_project_has(
    folder: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(folder)
    assert main(["train", "--project", str(folder), *extra]) == 2
    assert "Leave out" in capsys.readouterr().err
    assert files(folder) == before


def test_what_is_learned_is_kept_although_the_project_is_in_use(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--project", str(folder), "--steps", "1", "--device", "cpu"]
    with io.lock(folder):
        assert main([*command, "-q", "--set", "patch=32"]) == 4
    error = capsys.readouterr().err
    spare = Path(error.partition("saved as ")[2].partition(" instead")[0])
    assert api.load_model(spare).classes == CLASSES
