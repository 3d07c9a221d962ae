"""Many images through one model: each by itself, none over another file."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from napari_unetpp import api, batch, io
from napari_unetpp.errors import ImageFileError, SaveError

if TYPE_CHECKING:
    from collections.abc import Iterator


def grey(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> api.Model:
    return api.create_model("unet++", classes=("a", "b", "c"), width=4, levels=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    tifffile.imwrite(path / "a.tif", grey(40, 48))
    (path / "b.tif").write_bytes(b"II*\0" + bytes(20))
    tifffile.imwrite(
        path / "c.tif",
        grey(3, 40, 48),
        photometric="minisblack",
        metadata={"axes": "ZYX"},
    )
    return path


def states(steps: Iterator[api.BatchStep]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for step in steps:
        entry = (step.target.title, step.state)
        if entry not in found:
            found.append(entry)
    return found


def test_a_folder_with_a_damaged_file(model: api.Model, folder: Path) -> None:
    out = folder.parent / "new" / "labels"
    targets = api.plan_files(folder, out)
    assert not out.exists()
    steps = list(api.predict_files(model, targets, tile=32, device="cpu"))
    assert states(iter(steps)) == [
        ("a.tif", "started"), ("a.tif", "tile"), ("a.tif", "done"),
        ("b.tif", "started"), ("b.tif", "failed"),
        ("c.tif", "started"), ("c.tif", "tile"), ("c.tif", "done"),
    ]  # fmt: skip
    assert sorted(p.name for p in out.iterdir()) == ["a.tif", "c.tif"]
    for name in ("a.tif", "c.tif"):
        expected = api.predict(model, io.read_image(folder / name), tile=32)
        np.testing.assert_array_equal(io.read_labels(out / name), expected)
    (failed,) = (s for s in steps if s.state == "failed")
    assert isinstance(failed.error, ImageFileError)
    assert failed.error.__traceback__ is None
    assert "b.tif" in str(failed.error)
    assert {(s.number, s.count) for s in steps} == {(1, 3), (2, 3), (3, 3)}


def test_tiles_tell_how_far_it_is(model: api.Model, folder: Path) -> None:
    target = api.Target(folder / "c.tif")
    steps = list(api.predict_files(model, [target], tile=32))
    tiles = [s for s in steps if s.tile is not None]
    assert [s.plane for s in tiles] == sorted(s.plane for s in tiles)
    assert {s.planes for s in tiles} == {3}
    assert {s.shape for s in tiles} == {(3, 40, 48)}
    assert tiles[-1].pixels == 3 * 40 * 48
    assert steps[-1].state == "done"
    assert not list(folder.glob("*_*"))


def test_arrays_as_tiles_and_as_files(model: api.Model, tmp_path: Path) -> None:
    image = grey(2, 40, 48)
    before = image.copy()
    target = api.Target(image, tmp_path / "x.tif", tmp_path / "p.tif", name="two")
    labels = np.zeros(image.shape, np.uint8)
    for step in api.predict_files(model, [target], depth=1):
        assert step.target.title == "two"
        if step.tile is not None:
            labels[step.tile.slices] = step.tile.labels
    np.testing.assert_array_equal(labels, api.predict(model, image, depth=1))
    np.testing.assert_array_equal(io.read_labels(tmp_path / "x.tif"), labels)
    assert tifffile.imread(tmp_path / "p.tif").shape == (3, 2, 40, 48)
    np.testing.assert_array_equal(image, before)


def test_a_lazy_image_with_channels_is_read_window_by_window(model: api.Model) -> None:
    class Lazy:
        shape, ndim, dtype = (2400, 3000, 1), 3, np.dtype(np.uint8)
        largest = 0

        def __getitem__(self, key: Any) -> np.ndarray:
            part = grey(1)[0] + np.zeros(self.shape, np.uint8)[key]
            self.largest = max(self.largest, part[..., 0].size)
            return part

    lazy = Lazy()
    steps = api.predict_files(model, [api.Target(lazy, channel_axis=-1)], depth=1)
    assert states(steps)[-1] == ("image", "done")
    assert 0 < lazy.largest < 2400 * 3000 / 2


def test_what_is_done_is_skipped_and_what_failed_is_tried_again(
    model: api.Model, folder: Path
) -> None:
    targets = api.plan_files([folder], folder.parent / "x")
    list(api.predict_files(model, targets))
    before = targets[0].labels.stat().st_mtime_ns  # type: ignore[union-attr]
    tifffile.imwrite(folder / "b.tif", grey(40, 48))
    found = states(api.predict_files(model, targets, skip_existing=True))
    assert [f for f in found if f[1] != "tile"] == [
        ("a.tif", "skipped"), ("b.tif", "started"), ("b.tif", "done"),
        ("c.tif", "skipped"),
    ]  # fmt: skip
    assert targets[0].labels.stat().st_mtime_ns == before  # type: ignore[union-attr]


def test_a_missing_half_is_made_again(model: api.Model, tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", grey(40, 48))
    targets = api.plan_files(tmp_path, tmp_path / "x", probabilities=True)
    list(api.predict_files(model, targets))
    targets[0].probabilities.unlink()  # type: ignore[union-attr]
    found = states(api.predict_files(model, targets, skip_existing=True))
    assert ("a.tif", "done") in found
    assert all(f.exists() for f in targets[0].files)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"depth": 9}, "depth"), ({"tile": 3}, "tile"), ({"device": "abacus"}, "device")],
)
def test_options_fail_before_anything_is_made(
    model: api.Model, folder: Path, options: dict[str, Any], word: str
) -> None:
    out = folder.parent / "x"
    with pytest.raises(ValueError, match=word):
        api.predict_files(model, api.plan_files(folder, out), **options)
    assert not out.exists()


def test_no_output_takes_the_place_of_another_file(
    model: api.Model, folder: Path, tmp_path: Path
) -> None:
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(ValueError, match="folder of the images"):
        api.plan_files(folder, folder)
    own = [api.Target(folder / "a.tif", folder / "a.tif")]
    kept = [api.Target(grey(8, 8), folder / "c.tif")]
    twice = [api.Target(grey(8, 8), tmp_path / n, name=n) for n in ("X.tif", "x.tif")]
    for targets, word in ((own, "input"), (kept, "input"), (twice, "both")):
        with pytest.raises(ValueError, match=word):
            api.predict_files(model, targets, overwrite=True, keep=[folder / "c.tif"])
    there = [api.Target(folder / "a.tif", folder / "b.tif")]
    with pytest.raises(ValueError, match=r"exists.*overwrite=True"):
        api.predict_files(model, there)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_planning_tells_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ImageFileError, match="no file or folder"):
        api.plan_files(tmp_path / "none", tmp_path / "x")
    with pytest.raises(ImageFileError, match="has no image"):
        api.plan_files(tmp_path, tmp_path / "x")
    tifffile.imwrite(tmp_path / "a.tif", grey(8, 8))
    with pytest.raises(ValueError, match="no folder"):
        api.plan_files(tmp_path / "a.tif", tmp_path / "none" / "x.tif")
    with pytest.raises(ValueError, match="is a file"):
        api.plan_files(tmp_path, tmp_path / "a.tif")


def test_images_that_do_not_fit_fail_alone(model: api.Model, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "colour.png")
    hole = grey(2, 40, 40).astype(np.float32)
    hole[1, 3, 3] = np.nan
    np.save(tmp_path / "hole.npy", hole)
    np.save(tmp_path / "ok.npy", grey(40, 40))
    targets = api.plan_files(tmp_path, tmp_path / "x")
    steps = list(api.predict_files(model, targets))
    told = [str(s.error) for s in steps if s.state == "failed"]
    assert "3 channels" in told[0]
    assert "the model takes 1" in told[0]
    assert "NaN" in told[1]
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["ok.tif"]


def test_a_disk_that_refuses_ends_the_run(
    model: api.Model, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SaveError("the disk is full.")

    monkeypatch.setattr("napari_unetpp.io.write_labels", full)
    steps = list(api.predict_files(model, api.plan_files(folder, folder.parent / "x")))
    assert (steps[-1].state, steps[-1].number) == ("failed", 1)
    assert not list((folder.parent / "x").iterdir())


def test_stop_between_tiles_leaves_no_file(model: api.Model, folder: Path) -> None:
    stop = threading.Event()
    out = folder.parent / "x"
    targets = api.plan_files(folder / "c.tif", out)
    for step in api.predict_files(model, targets, tile=16, stop=stop):
        assert step.state in ("started", "tile")
        if step.tile is not None:
            stop.set()
    assert not list(out.iterdir())


def test_stop_within_a_tile(model: api.Model) -> None:
    class Later:
        asked = 0

        def is_set(self) -> bool:
            self.asked += 1
            return self.asked > 8

    stop = Later()
    before = {k: v.clone() for k, v in model.network.state_dict().items()}
    targets = [api.Target(grey(64, 64))]
    assert states(api.predict_files(model, targets, stop=stop)) == [
        ("image", "started")
    ]
    assert stop.asked == 9
    assert all(torch.equal(v, before[k]) for k, v in model.network.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.network.modules())


@pytest.mark.bench
def test_stop_takes_less_than_a_second() -> None:
    large = api.create_model("vgg19-unet", in_channels=1)
    stop = threading.Event()
    steps = api.predict_files(large, [api.Target(grey(768, 768))], stop=stop)
    next(steps)
    threading.Timer(0.5, stop.set).start()
    start = time.perf_counter()
    assert list(steps) == []
    assert time.perf_counter() - start < 0.5 + 1


def test_the_titles_are_short_plain_text() -> None:
    assert batch.Target(Path("a\n\u202eb.tif")).title == "a??b.tif"
    assert len(batch.Target(grey(2, 2), name="x" * 300).title) <= 64
