"""Of two that write to one place the second is refused, until the first has ended."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile

from napari_unetpp import api, io
from napari_unetpp.checkpoint import Rolling
from napari_unetpp.cli import main
from napari_unetpp.errors import InUseError
from napari_unetpp.io import files
from napari_unetpp.live import live_steps
from napari_unetpp.messages import Mailbox, Wishes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOLD = """
import sys
from napari_unetpp import io
with io.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(path: Path) -> subprocess.Popen[str]:
    """Return another process, which holds the lock."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def other(out: Path) -> Iterator[subprocess.Popen[str]]:
    with start(out) as child:
        yield child
        child.kill()


@pytest.fixture
def work(tmp_path: Path) -> tuple[Path, Path]:
    """Return a model and a folder of two images."""
    model = tmp_path / "m.safetensors"
    api.create_model("unet", classes=("a", "b"), width=4, levels=2).save(model)
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.tif", "b.tif"):
        tifffile.imwrite(images / name, np.zeros((32, 32), np.uint8))
    return model, images


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_the_second_is_refused_and_a_kill_gives_the_lock_back(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "m.safetensors"
    with start(path) as child:
        with pytest.raises(InUseError, match=r"written by another.*Wait"):
            with io.lock(path):
                pass
        child.kill()
        child.wait()
    with io.lock(path):  # although the killed one left its file
        assert list(tmp_path.iterdir()) != []
    assert list(tmp_path.iterdir()) == []


def test_one_process_holds_a_lock_once(tmp_path: Path) -> None:
    with io.lock(tmp_path), pytest.raises(InUseError), io.lock(tmp_path):
        pass


def test_predict_refuses_a_folder_in_use(
    work: tuple[Path, Path],
    out: Path,
    other: subprocess.Popen[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["predict", *map(str, work), "-o", str(out)]
    before = sorted(out.iterdir())
    assert main(command) == 4
    error = capsys.readouterr().err
    assert "is being written by another" in error
    assert len(error.splitlines()) <= 3
    assert sorted(out.iterdir()) == before
    other.kill()
    other.wait()
    assert main(command) == 0
    assert sorted(p.name for p in out.iterdir()) == ["a.tif", "b.tif"]


def test_jobs_of_one_image_each_share_a_folder(
    work: tuple[Path, Path], out: Path, other: subprocess.Popen[str]
) -> None:
    assert other.poll() is None  # it holds the folder
    model, image = work[0], work[1] / "a.tif"
    with io.lock(out / "a.tif"):
        assert main(["predict", str(model), str(image), "-o", str(out)]) == 4
    assert main(["predict", str(model), str(image), "-o", str(out)]) == 0


def test_a_window_is_refused_as_the_command_is(
    work: tuple[Path, Path], out: Path, other: subprocess.Popen[str]
) -> None:
    assert other.poll() is None
    model = api.load_model(work[0])
    targets = api.plan_files(work[1], out)
    with pytest.raises(InUseError):
        list(api.predict_files(model, targets))


@pytest.mark.parametrize("locked", ["m.safetensors", "c.safetensors", None])
def test_two_trainings_of_one_model_or_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], locked: str | None
) -> None:
    strokes = np.zeros((32, 32), np.uint8)
    strokes[4:8], strokes[20:24] = 1, 2
    tifffile.imwrite(tmp_path / "a.tif", strokes * 50)
    io.write_labels(tmp_path / "b.tif", strokes)
    command = ["train", *(str(tmp_path / n) for n in ("a.tif", "b.tif"))]
    command += ["-o", str(tmp_path / "m.safetensors"), "--steps", "1", "-q"]
    command += ["--network", "unet", "--width", "4", "--levels", "2"]
    command += ["--checkpoint", str(tmp_path / "c.safetensors")]
    with io.lock(tmp_path / locked) if locked else nullcontext():
        code = main(command)
    assert code == (4 if locked else 0)
    assert ("written by another" in capsys.readouterr().err) == bool(locked)
    model = ["m.safetensors"] * (not locked)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tif", "b.tif", *model]


def test_what_a_killed_write_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    mine = tmp_path / ".a.tif.4711.0123abcd.part"
    others = [
        tmp_path / ".b.tif.4711.0123abcd.part", tmp_path / "a.tif",
        tmp_path / ".a.tif.part",
    ]  # fmt: skip
    for file in (mine, *others):
        file.touch()
    io.sweep(tmp_path / "a.tif")
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_what_ended_processes_left_goes_with_the_next_write(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getpid()):
        (tmp_path / f".a.tif.{pid}.{files._HOST}01ab.part").touch()
        (tmp_path / f".a.tif.{pid}.{int(files._HOST, 16) ^ 1:04x}01ab.part").touch()
    gone = tmp_path / f".a.tif.{ended.pid}.{files._HOST}01ab.part"
    others = set(tmp_path.iterdir()) - {gone}
    io.write_text(tmp_path / "a.tif", "new")
    assert set(tmp_path.iterdir()) == {*others, tmp_path / "a.tif"}


STROKES = np.zeros((32, 32), np.uint8)
STROKES[4:8], STROKES[20:24] = 1, 2
TINY = api.NetConfig("unet", width=4, levels=2)


@pytest.mark.parametrize("resume", [False, True])
def test_a_checkpoint_in_use_is_refused_before_it_is_read(
    tmp_path: Path, resume: bool
) -> None:
    path = tmp_path / "c.safetensors"
    ask: dict[str, Any] = {"network": TINY, "checkpoint": path, "device": "cpu"}
    first = api.train_steps(STROKES * 50, STROKES, max_steps=3, **ask)
    next(first)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InUseError, match="written by another"):
        api.train_steps(STROKES * 50, STROKES, resume=resume, **ask)
    mailbox = Mailbox(Wishes(({0: STROKES},), ("a", "b"), training=True))
    live = live_steps([STROKES * 50], mailbox, checkpoint=path, resume=resume)
    with pytest.raises(InUseError, match="written by another"):
        next(live)
    with pytest.raises(InUseError):
        Rolling(path).remove()
    assert sorted(tmp_path.iterdir()) == before
    first.close()
    found = api.train(STROKES * 50, STROKES, max_steps=3, resume=True, **ask)
    assert [s.step for s in found.history] == [1, 2, 3]


def test_a_training_that_never_begins_gives_its_lock_back(tmp_path: Path) -> None:
    ask: dict[str, Any] = {"network": TINY, "checkpoint": tmp_path, "device": "cpu"}
    api.train_steps(STROKES * 50, STROKES, **ask)
    with pytest.raises(ValueError, match="strokes"):
        api.train_steps(STROKES * 50, STROKES * 0, **ask)
    assert api.train(STROKES * 50, STROKES, max_steps=1, **ask).history


def test_a_run_in_use_is_refused(tmp_path: Path) -> None:
    parts = {
        kind: api.Part([kind], [STROKES * 50 + n], [STROKES])
        for n, kind in enumerate(("train", "validation"))
    }
    plan = api.Plan(TINY, api.TrainConfig(patch=32, batch=1), max_steps=2)
    with io.lock(tmp_path), pytest.raises(InUseError):
        next(api.run_steps(parts, tmp_path, plan, device="cpu"))
    assert [p.name for p in tmp_path.iterdir()] == ["frames"]
