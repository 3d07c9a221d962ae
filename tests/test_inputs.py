"""Bad images, models and names, given to the commands as a user would."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from napari_unetpp import cli, io, modelfile
from napari_unetpp.config import working_config
from napari_unetpp.model import create_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


FLOAT = IMAGE.astype(np.float32)
PAINT = (IMAGE % 3).astype(np.int64)
ARRAYS: dict[str, np.ndarray] = {
    "21": np.full_like(FLOAT, np.nan),
    "22": np.where(IMAGE == 5, np.nan, FLOAT),
    "23": np.zeros_like(IMAGE),
    "24": np.array([[3]], np.uint8),
    "30": 0 * PAINT,
    "31": (PAINT == 1) * 1,
    "32": np.where(PAINT == 2, 7, PAINT),
    "33": PAINT * 200,
    "34": -PAINT,
    "35": PAINT * 1.5,
}
TRAIN = "train good.tif paint.tif -o new.safetensors"
CALLS = {
    "21 all NaN": (2, "finite", "train 21.npy paint.tif -o new.safetensors"),
    "22 one NaN": (2, "finite", "train 22.npy paint.tif -o new.safetensors"),
    "22 one NaN to label": (2, "NaN", "predict m.safetensors 22.npy -o out.tif"),
    "23 constant": (2, "contrast", "train 23.npy paint.tif -o new.safetensors"),
    "24 1 x 1": (2, "contrast", "train 24.npy one.npy -o n.safetensors --classes a,b"),
    "30 nothing painted": (2, "annotated", "train good.tif 30.npy -o new.safetensors"),
    "31 one class": (2, "two classes", "train good.tif 31.npy -o new.safetensors"),
    "32 a gap": (2, "without a gap", "train good.tif 32.npy -o new.safetensors"),
    "33 above 255": (2, "0 to 255", "train good.tif 33.npy -o new.safetensors"),
    "34 below 0": (2, "0 to 255", "train good.tif 34.npy -o new.safetensors"),
    "35 fractions": (3, "fractions", "train good.tif 35.npy -o new.safetensors"),
    "80 levels 99": (2, "`levels`", f"{TRAIN} --levels 99"),
    "80 levels 0": (2, "`levels`", f"{TRAIN} --levels 0"),
    "81 width 10^6": (2, "`width`", f"{TRAIN} --width 1000000"),
    "83 one class": (2, "`classes`", f"{TRAIN} --classes a"),
    "84 patch 0": (2, "`patch`", f"{TRAIN} --set patch=0"),
    "86 batch 0": (2, "`batch`", f"{TRAIN} --set batch=0"),
    "87 rate 0": (2, "`learning_rate`", f"{TRAIN} --set learning_rate=0"),
    "87 rate NaN": (2, "`learning_rate`", f"{TRAIN} --set learning_rate=NaN"),
    "88 10^12 steps": (2, "`max_steps`", f"{TRAIN} --steps 1000000000000"),
    "88 10^12 seconds": (2, "`max_seconds`", f"{TRAIN} --seconds 1e12"),
    "89 alpha 10^6": (2, "`elastic_sigma`", f"{TRAIN} --set elastic_sigma=1000000"),
    "92 names twice": (2, "differ", f"{TRAIN} --classes a,a,b"),
    "92 an empty name": (2, "plain text", f"{TRAIN} --classes a,,b"),
    "93 seed -1": (2, "`seed`", f"{TRAIN} --seed -1"),
    "93 seed 2^70": (2, "`seed`", f"{TRAIN} --seed {2**70}"),
    "94 4301 digits": (2, "`batch`", f"{TRAIN} --set batch={'1' * 4301}"),
    "98 unknown setting": (2, "no setting", f"{TRAIN} --set colour=1"),
    "72 sparse 1 TB": (3, "sparse", "predict sparse.safetensors good.tif -o out.tif"),
    "106 a folder below a file": (
        4,
        "cannot be made",
        "predict m.safetensors good.tif -o good.tif/out",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_bad_call(
    case: str,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(work)
    code, word, call = CALLS[case]
    if case[:2] in ARRAYS:
        np.save(f"{case[:2]}.npy", ARRAYS[case[:2]])
    np.save("one.npy", np.ones((1, 1), np.uint8))
    sparse = case.startswith("72")
    if sparse:
        with open("sparse.safetensors", "wb") as file:
            try:
                file.truncate(2**40)
            except OSError:
                pytest.skip("this file system has no such files")
        monkeypatch.setitem(
            globals(), "content", lambda folder: sorted(folder.iterdir())
        )
    check_refused(work, capsys, code, word, *call.split())


def test_odd_inputs_that_simply_work(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    Image.fromarray(IMAGE).save("png.tif", "PNG")  # 15
    two = np.zeros_like(IMAGE)
    two[0, :2], two[9, 3:5] = 1, 2
    io.write_labels("two.tif", two)  # 36
    options = ["--steps", "1", "--width", "4", "--device", "cpu"]
    assert (
        cli.main(["train", "png.tif", "two.tif", "-o", "n.safetensors", *options]) == 0
    )
    assert cli.main(["predict", "n.safetensors", "png.tif", "-o", "out.tif"]) == 0
    assert io.read_labels("out.tif").all()


@pytest.fixture
def closed_folder(work: Path) -> Iterator[Path]:
    """Return a folder in which nothing can be made, by root neither."""
    folder = work / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    locked = os.access(folder, os.W_OK) and shutil.which("chattr") is not None
    if locked:
        subprocess.run(["chattr", "+i", folder], check=False, capture_output=True)
    try:
        (folder / "a").touch()
    except OSError:
        yield folder
    else:
        pytest.skip("root writes into any folder of this file system")
    finally:
        if locked:
            subprocess.run(["chattr", "-i", folder], check=False, capture_output=True)
        folder.chmod(0o755)


@pytest.mark.parametrize("name", ["labels", "out.tif", "labels/a.zarr", "out.zarr"])
def test_a_closed_folder_by_command(
    name: str, work: Path, closed_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, good = work / "m.safetensors", work / "good.tif"
    out = closed_folder / name
    check_refused(work, capsys, 4, "", "predict", model, good, "-o", out)
    new = out.with_suffix(".safetensors")
    call = ("train", good, work / "paint.tif", "-o", new, "--steps", "1")
    if "/" not in name:
        check_refused(work, capsys, 4, "write-protected", *call)


@pytest.mark.parametrize("what", ["cut", "replaced by another", "gone"])
def test_a_file_that_changes_while_it_is_read(
    what: str,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good, model = work / "good.tif", work / "m.safetensors"
    tifffile.imwrite(good, np.tile(IMAGE, (9, 9)))  # more than is read ahead
    old = {path: path.read_bytes() for path in (good, model)}

    def change(path: Path) -> None:
        if what == "gone":
            path.unlink()
        elif what == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.write_bytes(old[model] if path == good else old[good])

    def image(*arguments: Any) -> Any:
        found, load = opener(*arguments)
        return found, lambda: (change(good), load())[1]

    def header(*arguments: Any) -> Any:
        found = reader(*arguments)
        change(model)
        return found

    opener, reader = io.images.open_image, modelfile._read_header
    for bad, room, name, hook in (
        (good, io.images, "open_image", image),
        (model, modelfile, "_read_header", header),
    ):
        out = work / f"{bad.stem}-out.tif"
        with monkeypatch.context() as patch:
            patch.setattr(room, name, hook)
            code = cli.main(["predict", str(model), str(good), "-o", str(out)])
        err = capsys.readouterr().err
        if what == "gone" and os.name != "nt":  # what is open stays readable
            assert code == 0
        else:
            assert code == 3
            assert f"`{bad.name}` is damaged" in err
            assert not out.exists()
        bad.write_bytes(old[bad])


@pytest.mark.skipif(os.name == "nt", reason="POSIX places")
def test_no_display_no_home_and_no_room_for_temporary_files(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = str(work / "good.tif" / "nowhere")  # under a file nothing can be made
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.setattr("tempfile.tempdir", nowhere)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.chdir(work)
    before = set(content(work))
    call = [*TRAIN.split(), "--steps", "1", "--device", "cpu"]
    assert cli.main(call) == 0
    assert cli.main(["predict", "new.safetensors", "good.tif", "-o", "out.tif"]) == 0
    new = {name for name in content(work) if not name.endswith(".lock")}
    assert new - before == {"new.safetensors", "out.tif"}


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
