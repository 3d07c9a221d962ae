"""Whatever stands in a file of settings or on a command line, an error has its type.

The long tier: `pytest tests/test_fuzz.py --hypothesis-profile=long --timeout=0`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from napari_unetpp import api, cli, cluster, record, recovery
from napari_unetpp.cli.parser import build_parser
from napari_unetpp.config import NetConfig, PredictConfig, TrainConfig
from napari_unetpp.errors import (
    ClusterError,
    ImageFileError,
    ModelFileError,
    RecoveryFileError,
    SaveError,
)
from napari_unetpp.io.unfinished import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

# How many examples a profile tries; the suite's are few, since each costs a run.
MANY = settings().max_examples
few = settings(
    max_examples=MANY if MANY != 100 else 10,
    suppress_health_check=list(HealthCheck),
)

ODD: list[Any] = [
    0, -1, 1, 2, 2**31, 2**53, 2**63, 10**18, 10**400, 1.5, 1e308, -0.0, True, None, "",
    "3", "nan", [], {}, [[]], [0, 4], [10**9] * 6, "\0", "../x", "/", "a" * 300, "<b>",
    "\u202e", "\ud800", "1" * 5000, "unet", "u1", float("nan"), float("inf"),
]  # fmt: skip
LEAVES = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=9)
JUNK = st.recursive(
    LEAVES,
    lambda below: (
        st.lists(below, max_size=3)
        | st.dictionaries(st.text(max_size=5), below, max_size=3)
    ),
    max_leaves=5,
)
EDITS = st.lists(
    st.tuples(st.integers(0, 999), st.sampled_from("srdc"), JUNK), max_size=3
)


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of a tree with every key of it."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], (dict, list)):
            yield from places(node[key])


def edited(tree: Any, edits: list[tuple[int, str, Any]]) -> Any:
    """Return a copy in which values are set, renamed, deleted or copied."""
    tree = copy.deepcopy(tree)
    for number, what, junk in edits:
        found = list(places(tree))
        if not found:
            break
        node, key = found[number % len(found)]
        if what == "d":
            del node[key]
        elif what == "c":
            other, at = found[(number * 7 + 1) % len(found)]
            node[key] = copy.deepcopy(other[at])
        elif what == "r" and isinstance(node, dict):
            node[junk if isinstance(junk, (str, int)) else "x"] = node.pop(key)
        else:
            node[key] = copy.deepcopy(junk)
    return tree


def text_of(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    "known",
    [
        NetConfig("unet++", deep_supervision=True, residual=True),
        TrainConfig(schedule="cosine", schedule_steps=9, patience=3),
        PredictConfig(64, 2, "mean"),
    ],
    ids=lambda known: type(known).__name__,
)
@given(edits=EDITS)
@few
def test_settings(known: Any, edits: list[Any]) -> None:
    values = edited({"": known.to_dict()}, edits).get("")
    try:
        found = type(known).from_dict(values)
    except ValueError as error:
        assert str(error)  # noqa: PT017
    else:
        assert type(known).from_dict(json.loads(found.to_json())) == found


NOTE = recovery.Note(
    "a" * 32, "x", classes=("a", "b"), colours=("#000000",), scale=(1.0, 2.0),
    translate=(0.0, 1.0), session="b" * 32,
)  # fmt: skip
STROKES = recovery.to_bytes(NOTE, recovery.pack(np.eye(300, dtype=np.uint8)))


@given(edits=EDITS, cut=st.none() | st.tuples(st.integers(0, 800), st.binary()))
@few
def test_recovery_files(edits: list[Any], cut: tuple[int, bytes] | None) -> None:
    magic, header, payload = STROKES[:-32].split(b"\n", 2)
    whole = b"\n".join([magic, text_of(edited(json.loads(header), edits)), payload])
    if cut is not None:
        whole = whole[: cut[0]] + cut[1] + whole[cut[0] + 1 :]
    whole += hashlib.sha256(whole).digest()
    try:
        note, labels = recovery.from_bytes(whole)
    except RecoveryFileError:
        return
    assert labels.ndim
    assert recovery.from_bytes(recovery.to_bytes(note, recovery.pack(labels)))


# --- folders ---------------------------------------------------------------------

IMAGE = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32)
PAINT = IMAGE % 3
MODEL = api.create_model("unet", classes=("background", "cell"), width=4, levels=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project with an image of colours and one of two files."""
    folder = tmp_path_factory.mktemp("project")
    tifffile.imwrite(folder / "a.tif", IMAGE)
    api.save_project(folder / "p", [folder / "a.tif", IMAGE], [PAINT, PAINT], MODEL)
    return folder / "p"


@given(edits=EDITS, score=EDITS, tail=st.none() | st.binary(max_size=9))
@few
def test_projects(
    folder: Path, edits: list[Any], score: list[Any], tail: bytes | None
) -> None:
    files = {folder / "project.json": edits, folder / "rounds/001/score.json": score}
    before = {path: path.read_bytes() for path in files}
    try:
        for path, changes in files.items():
            text = text_of(edited(json.loads(before[path]), changes))
            path.write_bytes(text if tail is None else text + tail)
        found = api.load_project(folder)
        found.read_annotations()
        found.load_model()
        for image in found.images:
            image.read()
    except (ModelFileError, ImageFileError) as error:
        assert str(error).isprintable()  # noqa: PT017
    finally:
        for path, text in before.items():
            path.write_bytes(text)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prediction that was stopped after two of its four chunks."""
    path = tmp_path_factory.mktemp("begun") / "labels.zarr"
    steps = api.predict_to_zarr_steps(MODEL, IMAGE, path, tile=16, device="cpu")
    for step in steps:
        if step.done >= 512:
            break
    steps.close()
    return path


PLAN = {"version": "1", "chunk": 16, "labels": hashlib.sha256().hexdigest()}
LINES = st.binary() | st.from_regex(r"(\d+ [0-9a-f]{8}\n)*").map(str.encode)
ROWS = st.lists(st.tuples(*[LEAVES.map(str)] * 4), max_size=3).map(
    lambda rows: "\n".join(
        map(",".join, [("step", "loss", "seconds", "validation"), *rows])
    )
)


@given(plan=EDITS | st.binary(), lines=LINES, rows=ROWS | st.binary())
@few
def test_manifests(
    tmp_path_factory: pytest.TempPathFactory,
    plan: list[Any] | bytes,
    lines: bytes,
    rows: str | bytes,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "x.zarr.part"
    folder.mkdir(exist_ok=True)
    text = plan if isinstance(plan, bytes) else text_of(edited(PLAN, plan))
    (folder / "plan.json").write_bytes(text)
    (folder / "manifest.txt").write_bytes(lines)
    rows = rows if isinstance(rows, bytes) else rows.encode(errors="surrogatepass")
    (folder / "history.csv").write_bytes(rows)
    part = Part(folder.with_suffix(""))
    found = part.plan()
    assert found is None or "labels" not in found
    assert all(n >= 0 <= crc < 2**32 for n, crc in part.done().items())
    try:
        record.read_history(folder)
    except ImageFileError as error:
        assert "history" in str(error)  # noqa: PT017


@given(plan=EDITS, lines=st.none() | LINES, array=EDITS)
@settings(few, max_examples=max(5, few.max_examples // 20))
def test_unfinished_results(
    begun: Path,
    tmp_path_factory: pytest.TempPathFactory,
    plan: list[Any],
    lines: bytes | None,
    array: list[Any],
) -> None:
    path = tmp_path_factory.getbasetemp() / "labels.zarr"
    part = path.with_name("labels.zarr.part")
    shutil.copytree(begun.with_name("labels.zarr.part"), part)
    try:
        for file, edits in {
            "plan.json": plan,
            "labels.zarr/0/zarr.json": array,
        }.items():
            text = json.loads((part / file).read_text())
            (part / file).write_bytes(text_of(edited(text, edits)))
        if lines is not None:
            (part / "manifest.txt").write_bytes(lines)
        api.predict_to_zarr(MODEL, IMAGE, path, tile=16, device="cpu")
        made = np.asarray(zarr.open_array(path, path="0", mode="r")[:])
        np.testing.assert_array_equal(made, api.predict(MODEL, IMAGE, device="cpu"))
    except SaveError:
        pass
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)


# --- the command line ------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    MODEL.save(work / "m.safetensors")
    (work / "bad.tif").write_bytes(b"II*\0")
    (work / "groups.csv").write_text("name,group\na,1\nb,2\nc,3\n")
    for name, data in {"images": IMAGE, "paint": PAINT, "masks": PAINT > 0}.items():
        (work / name).mkdir()
        for stem in "abc":
            tifffile.imwrite(work / name / f"{stem}.tif", data.astype(np.uint8))
    tifffile.imwrite(work / "rgb.tif", np.stack([IMAGE] * 3, -1))
    api.save_project(work / "p", work / "images" / "a.tif", PAINT, MODEL)
    return work


COMMANDS = [
    "train images/a.tif paint/a.tif -o n.safetensors --steps 1 --device cpu",
    "train images paint -o n.safetensors --steps 1 --set batch=1",
    "train images paint -o n.safetensors --from m.safetensors --seconds 1",
    "train images masks --run run --groups groups.csv --split 40,30,30 --seed 1",
    "train --project p --steps 1",
    "predict m.safetensors images/a.tif -o out.tif --depth 1",
    "predict m.safetensors images -o out --heads mean --probabilities",
    "predict m.safetensors images/a.tif -o out.zarr --tile 64",
    "evaluate paint paint --classes a,b --unlabelled none",
    "info m.safetensors",
    "info p --json",
    "demo --sample coins -o demo --steps 1",
]
WORDS = [
    "", "-", "--", "0", "1", "-1", "2", "7", "64", "1e999", "nan", "1e-9", "x", "cpu",
    "cuda:9", "\0", "\ud800", "a" * 300, "9" * 30, "9" * 5000, "images", "paint/a.tif",
    "rgb.tif", "bad.tif", "none", "m.safetensors", "p", "p/project.json", "groups.csv",
    "n.safetensors", "n.SAFETENSORS", "out/a/b.tif", "unet", "fcn-8s", "mean", "last",
    "tcp://1:x", "a,b", "a,a", ",", "1,2,3", "0,0,0", "1,nan,1", "(", "(a|b)",
    "batch=0", "batch=1e999", "patch=16", "width=4", "x=[[[[", "=", "loss=dice",
    "gamma=NaN",
    "unet-2015", "[" * 3000, "x=" + "[" * 30_000,
]  # fmt: skip


def options() -> list[str]:
    """Return what any command has, except a trunk that would be fetched."""
    (commands,) = (a for a in build_parser()._actions if a.dest == "command")
    assert isinstance(commands.choices, dict)
    found = {o for c in commands.choices.values() for o in c._option_string_actions}
    return sorted(found - {"-h", "--help"})


TOKENS = st.sampled_from(options()) | st.sampled_from(WORDS) | st.text(max_size=5)
CHANGES = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from("iird"), TOKENS, TOKENS), max_size=4
)


def stopped(real: Callable[..., Any]) -> Callable[..., Any]:
    """Let a verb check its arguments, and end as if by Ctrl-C before its first step."""

    def verb(*arguments: Any, **named: Any) -> Generator[Any, Any, Any]:
        real(*arguments, **named).close()
        raise KeyboardInterrupt

    return verb


@contextmanager
def nobody(_: Any) -> Iterator[Any]:
    raise ClusterError("No worker answers.")
    yield


@given(command=st.sampled_from(COMMANDS), changes=CHANGES)
@few
def test_command_lines(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    changes: list[tuple[int, str, str, str]],
) -> None:
    arguments = command.split()
    for at, what, first, second in changes:
        at = 1 + at % len(arguments)
        new = {"i": [first, second], "r": [first], "d": []}[what]
        arguments[at : at + (what != "i")] = new
    before = {p: p.read_bytes() for p in work.rglob("*") if p.is_file()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.chdir(work)
        patch.setattr(api, "train_steps", stopped(api.train_steps))
        patch.setattr(api, "run_steps", stopped(api.run_steps))
        patch.setattr(cluster.Wanted, "client", nobody)
        code = cli.main(arguments)
    err = capsys.readouterr().err
    after = {p: p.read_bytes() for p in work.rglob("*") if p.is_file()}
    for path in work.iterdir():
        if not any(path == p or path in p.parents for p in before):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path, content in before.items():
        if after.get(path) != content:
            path.write_bytes(content)
    assert code in (0, 2, 3, 4, 130), err
    assert "unexpected" not in err
    assert "Traceback" not in err or {"-v", "--verbose"} & set(arguments)
    if "--overwrite" not in arguments:
        assert {p: after.get(p) for p in before} == before
