"""The command line does what it says, or says in a few lines why not."""

from __future__ import annotations

import errno
import io as stdlib_io
import json
import logging
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from napari_unetpp import __version__, io
from napari_unetpp.cli import learning, main
from napari_unetpp.cli.console import Console, exit_code, message_of, plain
from napari_unetpp.errors import (
    DeviceMemoryError,
    ImageFileError,
    ModelFileError,
    SaveError,
    TrainingError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL = ("--steps", "2", "--width", "4", "--levels", "2", "--device", "cpu")


def scene(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (48, 48) with a bright square, and strokes of both classes."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 60, (48, 48)).astype(np.uint8)
    image[12:36, 12:36] += 150
    strokes = np.zeros((48, 48), np.uint8)
    strokes[4, 4:40] = 1
    strokes[24, 16:32] = 2
    return image, strokes


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    image, strokes = scene()
    tifffile.imwrite(folder / "a.tif", image)
    io.write_labels(folder / "b.tif", strokes)
    path = folder / "m.safetensors"
    inputs = [str(folder / "a.tif"), str(folder / "b.tif")]
    assert main(["train", *inputs, "-o", str(path), "-q", *SMALL]) == 0
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate(("a.tif", "b.png")):
        Image.fromarray(scene(i)[0]).save(folder / name)
    return folder


@pytest.fixture
def strokes(tmp_path: Path) -> Path:
    folder = tmp_path / "strokes"
    folder.mkdir()
    for name in ("a", "b"):
        io.write_labels(folder / f"{name}.tif", scene()[1])
    return folder


def is_short_error(text: str) -> bool:
    lines = text.splitlines()
    start = next(
        i for i, x in enumerate(lines) if x.startswith("napari-unetpp: error: ")
    )
    return len(lines) - start <= 3 and "Traceback" not in text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# --- the outer form --------------------------------------------------------------


def test_version_and_help_need_no_torch_and_no_numpy() -> None:
    code = (
        "import sys\n"
        "from napari_unetpp.cli import main\n"
        "for a in (['--version'], ['--help'], ['train', '--help']):\n"
        "    assert main(a) == 0\n"
        "assert not {'torch', 'numpy', 'skimage'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["train", "a", "b"],
        ["train", "a", "b", "-o", "m.safetensors", "--network", "resnet"],
        ["train", "a", "b", "-o", "m.safetensors", "--steps", "many"],
        ["predict", "m", "a", "-o", "x", "--overwrite", "--skip-existing"],
        ["predict", "m", "a", "-o", "x", "--dep", "2"],
    ],
)
def test_wrong_arguments(run: Callable[..., Any], arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert is_short_error(err)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("x"), 2),
        (ImageFileError("x"), 3),
        (ModelFileError("x"), 3),
        (FileNotFoundError("x"), 3),
        (PermissionError("x"), 3),
        (SaveError("x"), 4),
        (DeviceMemoryError("x"), 4),
        (MemoryError(), 4),
        (OSError(errno.ENOSPC, "No space left"), 4),
        (TrainingError("x"), 1),
        (TypeError("x"), 1),
        (RuntimeError("x"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("verbose", [False, True])
def test_exit_codes(
    run: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    verbose: bool,
) -> None:
    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr("napari_unetpp.cli.reporting.info", fail)
    found, out, err = run("info", "m", *["--verbose"] * verbose)
    assert found == code
    assert out == ""
    assert ("Traceback" in err) == (verbose and code != 130)
    assert code == 130 or len(err.splitlines()) <= 3 or verbose


def test_a_message_is_safe_and_short() -> None:
    error = ValueError("a\x1b[31m\u202eb\n2\n3\n4")
    assert message_of(error) == "a\\x1b[31m\\u202eb\n2\n3"
    assert plain("a\nb\x00\udcff é") == "a\\nb\\x00\\udcff é"
    assert message_of(MemoryError()) == "MemoryError"
    assert exit_code(ValueError()) == 2


def test_a_closed_stdout_is_quiet() -> None:
    code = "import sys; from napari_unetpp.cli.console import Console\n"
    code += "c = Console()\nfor i in range(9): c.say('x' * 10000)\nsys.exit(7)"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (7, b"")


def test_names_that_the_terminal_cannot_show(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = stdlib_io.BytesIO()
    monkeypatch.setattr(sys, "stdout", stdlib_io.TextIOWrapper(raw, encoding="ascii"))
    Console().say("zellkern ü")
    assert raw.getvalue().split() == [b"zellkern", b"\\xfc"]


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"a": float("nan"), "b": (1, True, None), 3: np.float64(0.5)}
    Console(as_json=True).result(values, ["text"])
    assert json.loads(capsys.readouterr().out) == {
        "a": None, "b": [1, True, None], "3": 0.5,
    }  # fmt: skip


def test_warnings_of_the_core_are_shown_and_the_logger_is_left_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("napari_unetpp")
    before = (list(logger.handlers), logger.level)
    with Console():
        logger.warning("careful")
        logger.info("by the way")
    assert capsys.readouterr().err == "napari-unetpp: WARNING: careful\n"
    with Console(verbose=True):
        logger.info("by the way")
    assert "by the way" in capsys.readouterr().err
    assert (list(logger.handlers), logger.level) == before


# --- train -----------------------------------------------------------------------


def test_train_folders(
    run: Callable[..., Any], images: Path, strokes: Path, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    code, out, err = run(
        "train",
        images,
        strokes,
        "-o",
        path,
        "--classes",
        "ground,square",
        *SMALL,
        "--json",
    )
    assert code == 0, err
    facts = json.loads(out)
    assert facts["classes"] == ["ground", "square"]
    assert (facts["steps"], facts["images"], facts["stopped"]) == (2, 2, False)
    assert path.exists()
    code, out, _ = run("info", path)
    assert code == 0
    assert "1 ground, 2 square" in out


def test_train_goes_on_with_a_model(
    run: Callable[..., Any], images: Path, strokes: Path, tmp_path: Path, model: Path
) -> None:
    path = tmp_path / "m2.safetensors"
    arguments = ["train", images, strokes, "-o", path, "--from", model, "--steps", 1]
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 1
    parent = json.loads(run("info", path, "--json")[1])["provenance"]["parent"]
    assert parent == json.loads(run("info", model, "--json")[1])["digest"]
    code, _, err = run(*arguments, "--overwrite", "--width", 8)
    assert (code, is_short_error(err)) == (2, True)


def no_training(*_: object, **__: object) -> None:
    raise AssertionError("training began before everything was checked")


def test_train_checks_before_it_trains(
    run: Callable[..., Any],
    images: Path,
    strokes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("napari_unetpp.api.train_steps", no_training)
    good = tmp_path / "m.safetensors"
    there = tmp_path / "old.safetensors"
    there.write_bytes(b"old")
    mixed = (images / "a.tif", strokes)
    for inputs, out, code, word in [
        ((tmp_path / "none", strokes), good, 3, "none"),
        ((images, tmp_path / "none"), good, 3, "none"),
        (mixed, good, 2, "two folders"),
        ((images, images), good, 2, "twice"),
        ((images, strokes), tmp_path / "m.pt", 2, ".safetensors"),
        ((images, strokes), there, 2, "--overwrite"),
        ((images, strokes), tmp_path / "no" / "m.safetensors", 2, "no folder"),
    ]:
        found, _, err = run("train", *inputs, "-o", out)
        assert (found, is_short_error(err)) == (code, True), err
        assert word in err
    assert there.read_bytes() == b"old"
    (images / "a.tif").write_bytes(b"II*\0" + bytes(20))
    found, _, err = run("train", images, strokes, "-o", good)
    assert (found, is_short_error(err)) == (3, True)
    assert "a.tif" in err
    assert not good.exists()


def test_train_lists_orphans(
    run: Callable[..., Any], images: Path, strokes: Path, tmp_path: Path
) -> None:
    (images / "b.png").rename(images / "c.png")
    code, _, err = run("train", images, strokes, "-o", tmp_path / "m.safetensors")
    assert code == 2
    assert is_short_error(err)
    assert "c.png" in err
    assert "b.tif" in err


def test_train_names_the_file_of_another_shape(
    run: Callable[..., Any], images: Path, strokes: Path, tmp_path: Path
) -> None:
    io.write_labels(strokes / "b.tif", np.ones((40, 48), np.uint8), overwrite=True)
    code, _, err = run("train", images, strokes, "-o", tmp_path / "m.safetensors")
    assert (code, is_short_error(err)) == (2, True)
    assert "b.tif" in err


def test_train_does_not_write_over_an_input(
    run: Callable[..., Any], images: Path, strokes: Path, model: Path
) -> None:
    before = model.read_bytes()
    code, _, err = run(
        "train", images, strokes, "-o", model, "--from", model, "--overwrite"
    )
    assert code == 2
    assert "input" in err
    assert model.read_bytes() == before


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, model: Path) -> dict[str, Any]:
    """Replace training by nothing, and return what it was asked to do."""
    from napari_unetpp import api

    asked: dict[str, Any] = {}
    trained = api.load_model(model)

    def fake(images: Any, annotations: Any, **rest: Any) -> Any:
        asked.update(images=images, annotations=annotations, **rest)
        yield trained.history[0]
        return trained

    monkeypatch.setattr("napari_unetpp.api.train_steps", fake)
    return asked


def test_masks_of_0_and_255_are_two_dense_classes(
    run: Callable[..., Any], images: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    mask = np.zeros((48, 48), np.uint8)
    mask[10:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    arguments = ["train", images / "a.tif", tmp_path / "mask.png", "-o"]
    code, _, err = run(*arguments, tmp_path / "m.safetensors")
    assert code == 0, err
    assert "masks of 0 and 255" in err
    assert settings["unlabelled"] is None
    assert settings["classes"] == ("background", "foreground")
    np.testing.assert_array_equal(settings["annotations"][0], mask // 255)


def test_masks_take_the_coding_of_the_model_that_goes_on(
    run: Callable[..., Any],
    images: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    model: Path,
) -> None:
    mask = np.zeros((48, 48), np.uint8)
    mask[10:20] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "m.safetensors"
    arguments = ["train", images / "a.tif", tmp_path / "mask.png", "-o", out]
    assert run(*arguments, "--from", model)[0] == 0
    assert settings["classes"] is None
    np.testing.assert_array_equal(settings["annotations"][0], mask // 255 + 1)


def test_a_mask_of_0_and_1_is_asked_about(
    run: Callable[..., Any], images: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    mask = np.eye(48, dtype=np.uint8)
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "m.safetensors"
    arguments = ["train", images / "a.tif", tmp_path / "mask.png", "-o", out]
    code, _, err = run(*arguments)
    assert (code, is_short_error(err)) == (2, True)
    assert "--unlabelled none" in err
    assert run(*arguments, "--unlabelled", "none")[0] == 0
    assert settings["unlabelled"] is None
    np.testing.assert_array_equal(settings["annotations"][0], mask)


@pytest.mark.parametrize(
    ("mode", "shape", "axis"),
    [("RGB", (48, 48, 3), -1), ("RGBA", (48, 48, 3), -1), ("LA", (48, 48), None)],
)
def test_colour_is_recognised_and_alpha_is_dropped(
    run: Callable[..., Any],
    strokes: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    mode: str,
    shape: tuple[int, ...],
    axis: int | None,
) -> None:
    Image.new(mode, (48, 48)).save(tmp_path / "a.png")
    out = tmp_path / "m.safetensors"
    code, _, err = run("train", tmp_path / "a.png", strokes / "a.tif", "-o", out)
    assert code == 0, err
    assert "`a.png` read as" in err
    assert settings["images"][0].shape == shape
    assert settings["channel_axis"] == axis


def test_the_channel_axis_may_be_named(
    run: Callable[..., Any], strokes: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    pixels = np.random.default_rng(0).random((2, 48, 48))
    np.save(tmp_path / "a.npy", pixels)
    arguments = ["train", tmp_path / "a.npy", strokes / "a.tif"]
    arguments += ["-o", tmp_path / "m.safetensors", "--channel-axis"]
    assert run(*arguments, 0)[0] == 0
    np.testing.assert_array_equal(settings["images"][0], np.moveaxis(pixels, 0, -1))
    code, _, err = run(*arguments, 3, "--overwrite")
    assert (code, is_short_error(err)) == (2, True)


def test_images_with_different_channels_are_refused(
    run: Callable[..., Any], images: Path, strokes: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (48, 48)).save(images / "b.png")
    code, _, err = run("train", images, strokes, "-o", tmp_path / "m.safetensors")
    assert (code, is_short_error(err)) == (2, True)
    assert "b.png" in err


def fake_steps(model: Path, at_step: Callable[[], None]) -> Callable[..., Any]:
    """Return a training of four steps that asks `stop`, as the real one does."""
    from napari_unetpp import api

    def steps(*_: object, stop: Any, **__: object) -> Any:
        trained = api.load_model(model)
        for number in range(1, 5):
            yield api.TrainStep(number, 1.0, 0.1)
            at_step()
            if stop.is_set():
                break
        else:
            raise AssertionError("it was not stopped")
        return trained

    return steps


@pytest.mark.parametrize(("number", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_first_signal_saves(
    run: Callable[..., Any],
    images: Path,
    strokes: Path,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: str,
    code: int,
) -> None:
    kind = getattr(signal, number)
    before = signal.getsignal(kind)
    steps = fake_steps(model, lambda: signal.raise_signal(kind))
    monkeypatch.setattr("napari_unetpp.api.train_steps", steps)
    out = tmp_path / "m.safetensors"
    found, text, _ = run("train", images, strokes, "-o", out, "--json")
    assert found == code
    assert json.loads(text)["stopped"] is True
    assert run("info", out)[0] == 0
    assert signal.getsignal(kind) is before


def test_the_second_ctrl_c_ends_at_once(
    run: Callable[..., Any],
    images: Path,
    strokes: Path,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("napari_unetpp.api.train_steps", fake_steps(model, twice))
    before = signal.getsignal(signal.SIGINT)
    out = tmp_path / "m.safetensors"
    code, _, err = run("train", images, strokes, "-o", out)
    assert code == 130
    assert "Traceback" not in err
    assert not out.exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_model_that_cannot_be_saved_is_kept_elsewhere(
    run: Callable[..., Any],
    images: Path,
    strokes: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from napari_unetpp import api

    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    out = tmp_path / "m.safetensors"
    real = api.Model.save

    def save(self: Any, path: Path, **rest: Any) -> None:
        if path == out:
            raise SaveError("the disk is full.")
        real(self, path, **rest)

    monkeypatch.setattr(api.Model, "save", save)
    code, _, err = run("train", images, strokes, "-o", out)
    assert (code, is_short_error(err)) == (4, True)
    (kept,) = spare.glob("*/m.safetensors")
    assert str(kept) in err
    assert run("info", kept)[0] == 0
    assert settings


# --- predict ---------------------------------------------------------------------


def test_predict_a_folder(
    run: Callable[..., Any], images: Path, tmp_path: Path, model: Path
) -> None:
    from napari_unetpp import api

    out = tmp_path / "new" / "labels"
    code, text, err = run("predict", model, images, "-o", out, "--tile", 32)
    assert code == 0, err
    assert names(out) == ["a.tif", "b.tif"]
    assert "2 images labelled" in text
    expected = api.predict(
        api.load_model(model), io.read_image(images / "a.tif"), tile=32
    )
    np.testing.assert_array_equal(io.read_labels(out / "a.tif"), expected)


def test_predict_one_file_with_probabilities(
    run: Callable[..., Any], images: Path, tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "x.tif"
    arguments = ["predict", model, images / "a.tif", "-o", out, "--probabilities"]
    code, text, err = run(*arguments, "--depth", 1, "--json")
    assert code == 0, err
    assert len(json.loads(text)["written"]) == 2
    maps = tifffile.imread(tmp_path / "x_probabilities.tif")
    assert (maps.shape, maps.dtype) == ((2, 48, 48), np.float32)
    np.testing.assert_allclose(maps.sum(0), 1, atol=1e-5)
    np.testing.assert_array_equal(maps.argmax(0) + 1, io.read_labels(out))


def test_one_bad_file_does_not_stop_the_others(
    run: Callable[..., Any], images: Path, tmp_path: Path, model: Path
) -> None:
    (images / "aa.tif").write_bytes(b"II*\0" + bytes(20))
    Image.new("RGB", (48, 48)).save(images / "ab.png")
    out = tmp_path / "labels"
    code, text, err = run("predict", model, images, "-o", out, "--json")
    assert code == 3
    assert names(out) == ["a.tif", "b.tif"]
    failed = [entry["image"] for entry in json.loads(text)["failed"]]
    assert failed == [str(images / "aa.tif"), str(images / "ab.png")]
    assert "2 images could not be labelled" in err
    assert "channel" in err
    assert "Traceback" not in err


def test_a_full_disk_ends_the_run_with_4(
    run: Callable[..., Any],
    images: Path,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def full(path: Path, *_: object, **__: object) -> None:
        calls.append(path)
        raise SaveError("the disk is full.")

    monkeypatch.setattr("napari_unetpp.io.write_labels", full)
    code, text, err = run("predict", model, images, "-o", tmp_path / "x", "--json")
    assert (code, len(calls)) == (4, 1)
    assert len(json.loads(text)["failed"]) == 1
    assert "disk is full" in err


def test_existing_outputs_are_kept_skipped_or_replaced(
    run: Callable[..., Any], images: Path, tmp_path: Path, model: Path
) -> None:
    out = tmp_path / "labels"
    out.mkdir()
    (out / "a.tif").write_bytes(b"old")
    arguments = ["predict", model, images, "-o", out]
    code, _, err = run(*arguments)
    assert (code, is_short_error(err)) == (2, True)
    assert names(out) == ["a.tif"]
    code, text, _ = run(*arguments, "--skip-existing", "--json")
    assert (code, len(json.loads(text)["skipped"])) == (0, 1)
    assert (out / "a.tif").read_bytes() == b"old"
    assert names(out) == ["a.tif", "b.tif"]
    assert run(*arguments, "--overwrite")[0] == 0
    assert io.read_labels(out / "a.tif").shape == (48, 48)


def test_predict_never_writes_over_an_input(
    run: Callable[..., Any], images: Path, tmp_path: Path, model: Path
) -> None:
    before = {p: p.read_bytes() for p in images.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(images)
    for inputs, out in [
        ([images], images),
        ([images], link),
        ([images / "a.tif"], images / "a.tif"),
        ([images / "a.tif"], images),
        ([images / "a.tif"], link / "a.tif"),
        ([images / "b.png", images / "a.tif"], images),
        ([images / "b.png"], images / "a.tif" / "x.tif"),
    ]:
        for flag in ([], ["--overwrite"], ["--skip-existing"]):
            code, _, err = run("predict", model, *inputs, "-o", out, *flag)
            assert (code, is_short_error(err)) == (2, True), (inputs, out, flag)
    assert {p: p.read_bytes() for p in images.iterdir()} == before


def test_two_images_of_one_name_are_refused(
    run: Callable[..., Any], images: Path, tmp_path: Path, model: Path
) -> None:
    Image.fromarray(scene()[0]).save(images / "A.png")
    code, _, err = run("predict", model, images, "-o", tmp_path / "x")
    assert (code, is_short_error(err)) == (2, True)
    assert "a.tif" in err
    assert "A.png" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("extra", "code"),
    [
        (["--depth", "5"], 2),
        (["--depth", "0"], 2),
        (["--tile", "-1"], 2),
        (["--device", "cuda:9"], 2),
        (["--device", "abacus"], 2),
    ],
)
def test_options_that_do_not_fit_fail_once_and_leave_no_folder(
    run: Callable[..., Any],
    images: Path,
    tmp_path: Path,
    model: Path,
    extra: list[str],
    code: int,
) -> None:
    found, _, err = run("predict", model, images, "-o", tmp_path / "x", *extra)
    assert (found, is_short_error(err)) == (code, True)
    assert not (tmp_path / "x").exists()


def test_predict_with_missing_or_wrong_files(
    run: Callable[..., Any], images: Path, tmp_path: Path, model: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "x"
    for arguments in (
        [model, tmp_path / "none"],
        [model, empty],
        [tmp_path / "none", images],
        [images / "a.tif", images],
    ):
        code, _, err = run("predict", *arguments, "-o", out)
        assert (code, is_short_error(err)) == (3, True)
        assert not out.exists()


def test_ctrl_c_between_images_tells_what_is_done(
    run: Callable[..., Any],
    images: Path,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = io.read_image

    def read(path: Path) -> np.ndarray:
        if path.name == "b.png":
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr("napari_unetpp.io.read_image", read)
    out = tmp_path / "x"
    code, text, err = run("predict", model, images, "-o", out, "--json")
    assert code == 130
    assert json.loads(text)["written"] == [str(out / "a.tif")]
    assert names(out) == ["a.tif"]
    assert "1 of 2" in err


# --- evaluate and info -----------------------------------------------------------


def test_evaluate_gives_the_known_numbers(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    truth = np.array([[1, 1, 2, 2], [1, 1, 2, 0]], np.uint8)
    labels = np.array([[1, 1, 1, 2], [1, 1, 2, 2]], np.uint8)
    io.write_labels(tmp_path / "l.tif", labels)
    io.write_labels(tmp_path / "t.tif", truth)
    inputs = (tmp_path / "l.tif", tmp_path / "t.tif")
    code, out, err = run("evaluate", *inputs, "--classes", "sky,sea", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["iou"] == pytest.approx({"sky": 4 / 5, "sea": 2 / 3})
    assert facts["dice"] == pytest.approx({"sky": 8 / 9, "sea": 4 / 5})
    assert facts["accuracy"] == pytest.approx(6 / 7)
    assert facts["pixels"] == 7
    code, out, _ = run("evaluate", *inputs)
    assert out.splitlines()[1].split() == ["1", "0.800", "0.889"]


def test_evaluate_folders_together(run: Callable[..., Any], tmp_path: Path) -> None:
    for side, values in (("labels", ([1, 2], [2, 2])), ("truth", ([1, 1], [2, 2]))):
        (tmp_path / side).mkdir()
        for name, row in zip("ab", values, strict=True):
            io.write_labels(tmp_path / side / f"{name}.tif", np.array([row], np.uint8))
    folders = (tmp_path / "labels", tmp_path / "truth")
    facts = json.loads(run("evaluate", *folders, "--json")[1])
    assert facts["iou"] == pytest.approx({"1": 1 / 2, "2": 2 / 3})
    assert [f["accuracy"] for f in facts["files"]] == [0.5, 1]
    (tmp_path / "truth" / "b.tif").unlink()
    code, _, err = run("evaluate", *folders)
    assert (code, is_short_error(err)) == (2, True)
    assert "b.tif" in err


@pytest.mark.parametrize("coding", [(0, 255), (0, 1), (1, 2)])
def test_evaluate_against_a_mask(
    run: Callable[..., Any], tmp_path: Path, coding: tuple[int, int]
) -> None:
    mask = np.array([[0, 0, 255, 255]], np.uint8)
    labels = np.array([[coding[0], coding[0], coding[0], coding[1]]], np.uint8)
    io.write_labels(tmp_path / "l.tif", labels)
    io.write_labels(tmp_path / "t.tif", mask)
    code, out, err = run("evaluate", tmp_path / "l.tif", tmp_path / "t.tif", "--json")
    assert code == 0
    assert list(json.loads(out)["iou"].values()) == pytest.approx([2 / 3, 1 / 2])
    assert "mask" in err


def test_evaluate_other_shapes_and_values(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    io.write_labels(tmp_path / "l.tif", np.ones((4, 4), np.uint8))
    io.write_labels(tmp_path / "t.tif", np.ones((4, 5), np.uint8))
    io.write_labels(tmp_path / "u.tif", np.full((4, 4), 3, np.uint8))
    code, _, err = run("evaluate", tmp_path / "l.tif", tmp_path / "t.tif")
    assert (code, is_short_error(err)) == (2, True)
    code, _, err = run(
        "evaluate", tmp_path / "l.tif", tmp_path / "u.tif", "--classes", "a,b"
    )
    assert (code, is_short_error(err)) == (2, True)


def test_info(run: Callable[..., Any], model: Path) -> None:
    code, out, _ = run("info", model, "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["network"], facts["width"], facts["depths"]) == ("unet++", 4, [1, 2])
    assert facts["classes"] == {"1": "background", "2": "class 2"}
    assert len(facts["digest"]) == 64
    code, out, _ = run("info", model)
    assert facts["digest"] in out
    assert f"{facts['parameters']:,}" in out


def test_info_shows_foreign_text_as_text(
    run: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    from napari_unetpp import api

    made = api.load_model(model)
    made.provenance = {"note": "a\x1b[2Jb\nc", "long": "x" * 500}
    made.save(tmp_path / "m.safetensors")
    code, out, _ = run("info", tmp_path / "m.safetensors")
    assert code == 0
    assert "\x1b" not in out
    assert "a\\x1b[2Jb\\nc" in out
    assert max(map(len, out.splitlines())) < 200


def test_info_of_a_damaged_model(
    run: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    data = bytearray(model.read_bytes())
    data[-5] ^= 1
    (tmp_path / "m.safetensors").write_bytes(data)
    code, _, err = run("info", tmp_path / "m.safetensors")
    assert (code, is_short_error(err)) == (3, True)


def test_the_held_out_score_is_told_with_its_interval() -> None:
    from napari_unetpp import api

    model = api.create_model("unet", width=4, levels=1)
    assert learning.estimated(model).startswith("no held-out score: ")
    model.provenance["held_out_interval"] = ["<b>", {}]  # as a stranger's file may say
    assert learning.estimated(model).startswith("no held-out score: ")
    model.history = (api.TrainStep(50, 0.1, 2.0, 0.567),)
    model.provenance["held_out_interval"] = [0.38, 0.731]
    assert learning.estimated(model) == (
        "held-out estimate: mean IoU 0.57 over all classes of the whole images, "
        "0.38 to 0.73 (90 %)"
    )


# --- long trainings --------------------------------------------------------------


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """Return a folder with images/ and masks/ of instances."""
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i in range(6):
        image, _ = scene(i)
        mask = np.zeros((48, 48), np.uint16)
        mask[12:24, 12:36], mask[24:36, 12:36] = 300, 301
        tifffile.imwrite(tmp_path / "images" / f"p{i // 2}_{i % 2}.tif", image)
        tifffile.imwrite(tmp_path / "masks" / f"p{i // 2}_{i % 2}.tif", mask)
    return tmp_path


SHORT = (
    "--preset", "unet-2015", "--width", "4", "--levels", "2", "--set", "patch=20",
    "--set", "score_every=2", "--steps", "4", "--device", "cpu",
)  # fmt: skip


def test_a_folder_is_trained_chosen_and_tested(run: Any, dense: Path) -> None:
    folder = dense / "run"
    code, out, err = run(
        "train", dense / "images", dense / "masks", "--run", folder, "--instances",
        "--groups", r"^p\d", "--deterministic", *SHORT, "--set", "dropout=0.25",
        "--json",
    )  # fmt: skip
    assert code == 0, err
    told = json.loads(out)
    assert told["stopped"] is False
    assert set(told["test"]["iou"]) == {"background", "object"}
    config = json.loads((folder / "config.json").read_text())
    assert config["training"]["optimizer"] == "sgd"
    assert config["training"]["deterministic"] is True
    assert config["training"]["patch"] == 20
    assert (config["network"]["name"], config["network"]["width"]) == ("unet-valid", 4)
    assert config["network"]["dropout"] == 0.25
    groups = [{name[:2] for name in names} for names in config["parts"].values()]
    assert sum(map(len, groups)) == 3
    assert (folder / "report.html").exists()
    code, _, err = run(
        "train", dense / "images", dense / "masks", "--run", folder, "--instances",
        *SHORT,
    )  # fmt: skip
    assert code == 4
    assert "scored once and stays so" in err


def test_dense_masks_count_every_pixel(run: Any, dense: Path) -> None:
    for path in (dense / "masks").iterdir():
        tifffile.imwrite(path, (tifffile.imread(path) > 0).astype(np.uint8))
    code, _, err = run(
        "train", dense / "images", dense / "masks", "--run", dense / "run", "-o",
        dense / "m.safetensors", *SHORT,
    )  # fmt: skip
    assert code == 0, err
    assert "0 is the first class" in err
    config = json.loads((dense / "run" / "config.json").read_text())
    assert config["classes"] == ["background", "object"]
    assert config["unlabelled"] is None
    assert (dense / "m.safetensors").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ((), "-o MODEL.safetensors says where"),
        (("-o", "m.safetensors", "--groups", "p"), "belong to a long training"),
        (("--run", "r", "--from", "m.safetensors"), "Leave out --from"),
        (("--run", "r", "--set", "batch"), "--set takes NAME=VALUE"),
        (("--run", "r", "--set", "colour=1"), "has no setting 'colour'"),
        (("--run", "r", "--set", "batch=0"), "`batch` must lie between"),
        (("--run", "r", "--preset", "unet-2015", "--network", "unet"), "Leave out"),
        (("--run", "r", "--split", "70,30"), "three numbers such as 70,15,15"),
    ],
)
def test_wrong_orders_for_a_long_training(
    run: Any, dense: Path, more: tuple[str, ...], told: str
) -> None:
    code, _, err = run("train", dense / "images", dense / "masks", *more)
    assert code == 2
    assert told in err


def test_a_preset_trains_without_a_run_as_well(run: Any, dense: Path) -> None:
    image, strokes = scene()
    tifffile.imwrite(dense / "a.tif", image)
    tifffile.imwrite(dense / "b.tif", strokes)
    out = dense / "m.safetensors"
    code, _, err = run(
        "train", dense / "a.tif", dense / "b.tif", "-o", out, *SHORT, "--set",
        "border=0",
    )  # fmt: skip
    assert code == 0, err
    code, text, _ = run("info", out, "--json")
    facts = json.loads(text)
    assert facts["network"] == "unet-valid"
    assert facts["provenance"]["settings"]["momentum"] == 0.99
