"""Bad images, models and names, given to the commands as a user would."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile

from napari_unetpp import cli, io, modelfile
from napari_unetpp.config import working_config
from napari_unetpp.model import create_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from napari_unetpp.model import Model


def of(module: str, name: str) -> Any:
    """Return what another test module has under a name."""
    spec = importlib.util.spec_from_file_location(
        module, Path(__file__).with_name(f"{module}.py")
    )
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return getattr(found, name)


BAD = of("test_io", "BAD")
HOSTILE = of("test_modelfile", "HOSTILE")
GOOD = modelfile.encode(
    of("test_modelfile", "tensors")(), config={"levels": 4}, provenance={}
)
IMAGE = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)


@pytest.fixture(scope="module")
def network() -> Model:
    config = working_config("unet++", 1, 2, width=4, levels=2)
    return create_model(config, classes=("background", "cell"))


@pytest.fixture
def work(tmp_path: Path, network: Model) -> Path:
    network.save(tmp_path / "m.safetensors")
    tifffile.imwrite(tmp_path / "good.tif", IMAGE)
    io.write_labels(tmp_path / "paint.tif", IMAGE % 3)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], code: int, word: str, *call: Any
) -> None:
    """Run a command; it must end with the code in three lines and change nothing."""
    before = content(folder)
    capsys.readouterr()
    assert cli.main([str(part) for part in call]) == code
    err = capsys.readouterr().err
    lines = err.splitlines()
    start = next(i for i, x in enumerate(lines) if "napari-unetpp: error: " in x)
    assert len(lines) - start <= 3, err
    assert "Traceback" not in err
    assert "unexpected" not in err
    assert word in err
    assert content(folder) == before


@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_by_command(
    case: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = work / "bad.tif"
    bad.write_bytes(BAD[case]())
    model, out = work / "m.safetensors", work / "out.tif"
    check_refused(work, capsys, 3, "bad.tif", "predict", model, bad, "-o", out)
    new = work / "new.safetensors"
    paint = work / "paint.tif"
    check_refused(work, capsys, 3, "bad.tif", "train", bad, paint, "-o", new)
    good = work / "good.tif"
    check_refused(work, capsys, 3, "bad.tif", "train", good, bad, "-o", new)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_bad_model_by_command(
    case: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = work / "bad.safetensors"
    bad.write_bytes(HOSTILE[case](GOOD))
    good, out = work / "good.tif", work / "out.tif"
    check_refused(work, capsys, 3, "bad.safetensors", "predict", bad, good, "-o", out)


def test_a_command_that_changes_something_is_found_out(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = work / "bad.tif"
    bad.write_bytes(b"")
    call = ("predict", work / "m.safetensors", bad, "-o", work / "out.tif")

    def careless(arguments: list[str]) -> int:
        (work / "out.tif").touch()
        return main(arguments)

    main: Callable[[list[str]], int] = cli.main
    monkeypatch.setattr(cli, "main", careless)
    with pytest.raises(AssertionError):
        check_refused(work, capsys, 3, "bad.tif", *call)


@pytest.mark.skipif(os.name == "nt", reason="POSIX links, pipes and devices")
def test_what_is_no_file_by_command(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "loop.tif").symlink_to(work / "loop.tif")
    os.mkfifo(work / "pipe.tif")
    (work / "zero.tif").symlink_to("/dev/zero")
    (work / "empty").mkdir()
    model, out, good = work / "m.safetensors", work / "out.tif", work / "good.tif"
    for name in ("loop.tif", "pipe.tif", "zero.tif", "none.tif", "empty"):
        bad = work / name
        check_refused(work, capsys, 3, name, "predict", model, bad, "-o", out)
        check_refused(work, capsys, 3, name, "predict", bad, good, "-o", out)


def test_results_in_the_folder_of_the_images_are_not_eaten(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = work / "images"
    images.mkdir()
    tifffile.imwrite(images / "a.tif", IMAGE)
    command = ["predict", str(work / "m.safetensors"), str(images), "-o"]
    assert cli.main([*command, str(images / "labels")]) == 0
    assert cli.main([*command, str(images / "labels"), "--skip-existing"]) == 0
    assert len(list(images.rglob("*.tif"))) == 2
    check_refused(work, capsys, 2, "images", *command, images, "--overwrite")


NAMES = [
    "<img src='file:a'>.tif",
    "a\nb.tif",
    "a\x1b[31mb.tif",
    "\u202etif.exe.tif",
    "CON.tif",
    "👩\u200d🔬.tif",
    "-o.tif",
    "a" * 251 + ".tif",
]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_are_plain_text_and_stay_inside(
    name: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = work / "images", work / "out"
    images.mkdir()
    tifffile.imwrite(images / "plain.tif", IMAGE)
    (images / "plain.tif").rename(images / name)
    before = content(work)
    command = ["predict", str(work / "m.safetensors"), str(images), "-o", str(out)]
    assert cli.main(command) == 0
    told = "".join(capsys.readouterr())
    assert all(c.isprintable() or c == "\n" for c in told)
    after = content(work)
    new = set(after) - set(before)
    assert len(new) == 1
    assert all(path.startswith(f"out{os.sep}") for path in new)
    assert {k: after[k] for k in before} == before
    (images / name).write_bytes(b"")
    check_refused(work, capsys, 3, "", *command, "--overwrite")
