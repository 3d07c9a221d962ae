"""The demo compares fairly, draws a picture, and tells the next step."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from napari_unetpp import api, io, samples
from napari_unetpp.cli import comparison, main

if TYPE_CHECKING:
    from pathlib import Path


def crop(name: str, rows: slice, columns: slice) -> samples.Sample:
    whole = samples.load(name)
    parts = {
        key: np.ascontiguousarray(getattr(whole, key)[rows, columns])
        for key in ("image", "strokes", "truth")
    }
    return dataclasses.replace(whole, **parts)


@pytest.fixture
def glands(monkeypatch: pytest.MonkeyPatch) -> samples.Sample:
    small = crop("immunohistochemistry", slice(180, 308), slice(0, 160))
    assert set(np.unique(small.strokes)) == {0, 1, 2, 3}
    monkeypatch.setattr("napari_unetpp.samples.load", lambda _: small)
    return small


@pytest.fixture
def grey() -> samples.Sample:
    truth = np.ones((40, 40), np.uint8)
    truth[10:30, 10:30] = 2
    strokes = np.zeros_like(truth)
    strokes[2, 5:35], strokes[20, 12:28] = 1, 2
    image = np.where(truth == 2, 200, 20).astype(np.uint8)
    return samples.Sample(
        "square", "A square", image, None, strokes, truth, ("ground", "square"), ""
    )


def demo(tmp_path: Path, *more: str) -> int:
    out = ["--steps", "2", "--device", "cpu", "-o", str(tmp_path / "d"), "--json"]
    return main(["demo", *out, *more])


def test_demo_writes_and_tells(
    tmp_path: Path, glands: samples.Sample, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(tmp_path, "--network", "unet++") == 0
    facts = json.loads(capsys.readouterr().out)
    ours = [f"unet++, depth {d}" for d in (1, 2, 3, 4)]
    assert list(facts["iou"]) == [*ours, "random forest", "Otsu's threshold"]
    assert all(0 <= x <= 1 for row in facts["iou"].values() for x in row.values())
    assert facts["iou"]["random forest"]["mean"] > 0.6
    judged = (glands.truth > 0) & (glands.strokes == 0)
    assert facts["pixels"] == np.count_nonzero(judged)
    files = facts["files"]
    assert io.read_labels(files["labels"]).shape == glands.strokes.shape
    np.testing.assert_array_equal(io.read_image(files["image"]), glands.image)
    assert io.read_image(files["picture"]).shape[2] == 3
    model = api.load_model(files["model"])
    again = api.predict(model, glands.image, channel_axis=-1, device="cpu")
    np.testing.assert_array_equal(again, io.read_labels(files["labels"]))


@pytest.mark.usefixtures("glands")
def test_demo_replaces_only_in_its_own_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "d").mkdir()
    old = tmp_path / "d" / "immunohistochemistry-labels.tif"
    old.write_bytes(b"old")
    assert demo(tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert old.read_bytes() == b"old"
    monkeypatch.chdir(tmp_path)
    arguments = ["demo", "--steps", "1", "--network", "fcn-32s", "--device", "cpu"]
    for _ in range(2):
        assert main([*arguments, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "fcn-32s" in captured.out
    commands = [x for x in captured.out.splitlines() if x.startswith("  napari-unetpp")]
    assert "napari-unetpp-demo" in commands[0]
    assert main([*commands[0].split()[1:], "--device", "cpu"]) == 0


@pytest.mark.parametrize("name", ["human_mitosis", "nothing"])
def test_samples_without_strokes_are_refused(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(samples, "_read", lambda *_: np.zeros((512, 512), np.uint8))
    assert demo(tmp_path, "--sample", name) == 2
    err = capsys.readouterr().err
    assert err.startswith("napari-unetpp: error: ")
    assert "immunohistochemistry" in err
    assert not (tmp_path / "d").exists()


def test_the_threshold_may_take_either_side(grey: samples.Sample) -> None:
    for image in (grey.image, 255 - grey.image):
        sample = dataclasses.replace(grey, image=image)
        row = comparison._thresholded(sample, comparison.unseen_truth(sample))
        assert row.iou == {"square": 1.0}


def test_pixels_under_strokes_are_not_judged(grey: samples.Sample) -> None:
    unseen = comparison.unseen_truth(grey)
    assert not unseen[grey.strokes > 0].any()
    np.testing.assert_array_equal(
        unseen[grey.strokes == 0], grey.truth[grey.strokes == 0]
    )


def test_the_picture_shows_the_labels(grey: samples.Sample) -> None:
    row = comparison.Row("perfect", {"square": 1.0}, 1.0, grey.truth)
    none = comparison.Row("none", {"square": 0.0}, 0.0, None)
    result = comparison.Comparison((row, none), 1)
    sheet = comparison.picture(grey, result)
    factor = round(512 / 40)
    for value in (1, 2):
        shown = (sheet == comparison.COLOURS[value - 1]).all(axis=-1)
        expected = np.count_nonzero(grey.truth == value) * factor**2
        assert np.count_nonzero(shown) >= 2 * expected  # truth and labels
    assert sheet.shape[1] < 5 * 40 * factor


def test_other_kinds_of_image_become_visible(grey: samples.Sample) -> None:
    wide: Any = grey.image.astype(np.uint16) * 100
    seen = comparison.visible(dataclasses.replace(grey, image=wide))
    assert (seen.min(), seen.max(), seen.shape) == (0, 255, (40, 40, 3))
    two = np.stack([wide, wide], axis=-1)
    seen = comparison.visible(dataclasses.replace(grey, image=two, channel_axis=-1))
    assert seen.shape == (40, 40, 3)
