"""Images larger than memory: read by regions, written by chunks, resumed bit by bit."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import dask.array
import numpy as np
import pytest
import tifffile
import yaozarrs
import zarr

from napari_unetpp import api
from napari_unetpp.cli import main
from napari_unetpp.errors import ImageFileError, MissingPackageError, SaveError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TILE = 64


@cache
def model_of(channels: int = 1, unlabelled: int | None = 0) -> api.Model:
    return api.create_model(
        "unet++",
        classes=("background", "cell"),
        in_channels=channels,
        width=4,
        levels=1,
        unlabelled=unlabelled,
    )


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape[-2:])
    waves = 60 * np.sin(y / 9) * np.cos(x / 13) + 90
    return (waves + rng.normal(0, 30, shape)).clip(0, 255).astype(np.uint8)


def to_zarr(path: Path, image: np.ndarray, chunk: int = 50) -> Path:
    chunks = (*(1,) * (image.ndim - 2), chunk, chunk)
    array = zarr.create_array(path, shape=image.shape, chunks=chunks, dtype=image.dtype)
    array[:] = image
    return path


def to_ome(
    path: Path, image: np.ndarray, axes: list[dict[str, str]], form: int
) -> Path:
    """Write an OME-Zarr image of 0.4 (Zarr 2) or 0.5 (Zarr 3) with a second level."""
    group = zarr.create_group(path, zarr_format=form)
    datasets = []
    for n in range(2):
        level = image[..., :: 2**n, :: 2**n]
        group.create_array(f"s{n}", shape=level.shape, chunks=(32,) * image.ndim,
                           dtype=level.dtype)[:] = level  # fmt: skip
        scale = [1.0] * (image.ndim - 2) + [0.5 * 2**n, 0.25 * 2**n]
        datasets.append(
            {
                "path": f"s{n}",
                "coordinateTransformations": [
                    {"type": "scale", "scale": scale},
                    {"type": "translation", "translation": [3.0] * image.ndim},
                ],
            }
        )
    first: dict[str, Any] = {"axes": axes, "datasets": datasets, "name": "image"}
    if form == 2:
        group.attrs["multiscales"] = [{**first, "version": "0.4"}]
    else:
        group.attrs["ome"] = {"version": "0.5", "multiscales": [first]}
    return path


def axes_of(names: str) -> list[dict[str, str]]:
    kinds = {"t": "time", "c": "channel"}
    found = []
    for name in names:
        axis = {"name": name, "type": kinds.get(name, "space")}
        if axis["type"] == "space":
            axis["unit"] = "micrometer"
        found.append(axis)
    return found


def stored(path: Path, level: int = 0) -> np.ndarray:
    return np.asarray(zarr.open_array(path, path=str(level), mode="r")[:])


# --- reading ---------------------------------------------------------------------


def tiff_cases() -> dict[str, Callable[[Path, np.ndarray], None]]:
    return {
        "plain": lambda p, a: tifffile.imwrite(p, a, photometric="minisblack"),
        "tiled": lambda p, a: tifffile.imwrite(
            p, a, tile=(32, 48), compression="zlib", photometric="minisblack"
        ),
        "strips": lambda p, a: tifffile.imwrite(
            p, a, rowsperstrip=7, compression="zlib", photometric="minisblack"
        ),
        "big-endian": lambda p, a: tifffile.imwrite(
            p, a, byteorder=">", photometric="minisblack"
        ),
    }


@pytest.mark.parametrize("case", tiff_cases())
@pytest.mark.parametrize("shape", [(101, 130), (3, 70, 55)])
def test_regions_of_a_tiff(case: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    image = picture(*shape).astype(np.uint16) * 257
    tiff_cases()[case](tmp_path / "a.tif", image)
    lazy = api.open_image(tmp_path / "a.tif")
    assert (lazy.shape, lazy.dtype, lazy.channel_axis) == (shape, np.uint16, None)
    rng = np.random.default_rng(1)
    for _ in range(12):
        lead = tuple(int(rng.integers(n)) for n in shape[:-2])
        key = (*lead, *(slice(*sorted(rng.integers(0, n, 2))) for n in shape[-2:]))
        np.testing.assert_array_equal(lazy[key], image[key])
        assert lazy[key].dtype.isnative
    np.testing.assert_array_equal(lazy[..., ::3, ::5], image[..., ::3, ::5])
    np.testing.assert_array_equal(np.asarray(lazy), image)


def test_a_tile_of_a_tiff_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(256, 256), tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as tif:
        offsets = tif.pages.first.dataoffsets
        counts = tif.pages.first.databytecounts
    data = bytearray(path.read_bytes())
    data[offsets[5] : offsets[5] + counts[5]] = bytes(counts[5])
    path.write_bytes(data)
    lazy = api.open_image(path)
    np.testing.assert_array_equal(lazy[:64, :64], picture(256, 256)[:64, :64])
    with pytest.raises(ImageFileError, match="cannot be read"):
        lazy[64:128, 64:128]


def test_colours_and_pixel_sizes_of_tiffs(tmp_path: Path) -> None:
    colour = np.stack([picture(40, 50, seed=s) for s in range(3)], -1)
    tifffile.imwrite(tmp_path / "c.tif", colour, photometric="rgb", tile=(16, 16))
    assert api.open_image(tmp_path / "c.tif").channel_axis == 2
    tifffile.imwrite(
        tmp_path / "o.ome.tif",
        picture(40, 50),
        metadata={"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm",
                  "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"},
    )  # fmt: skip
    tifffile.imwrite(
        tmp_path / "j.tif",
        picture(40, 50),
        imagej=True,
        resolution=(4.0, 2.0),
        metadata={"unit": "um"},
    )
    for name in ("o.ome.tif", "j.tif"):
        y, x = api.open_image(tmp_path / name).axes
        assert y == api.Axis("y", "space", "micrometer", 0.5)
        assert x == api.Axis("x", "space", "micrometer", 0.25)


@pytest.mark.parametrize("form", [2, 3])
def test_an_ome_zarr_keeps_its_axes(form: int, tmp_path: Path) -> None:
    image = picture(2, 3, 60, 70)
    path = to_ome(tmp_path / "a.zarr", image, axes_of("tcyx"), form)
    lazy = api.open_image(path)
    assert lazy.channel_axis == 1
    assert lazy.version == {2: "0.4", 3: "0.5"}[form]
    assert [a.name for a in lazy.axes] == ["t", "c", "y", "x"]
    assert lazy.axes[3] == api.Axis("x", "space", "micrometer", 0.25, 3.0)
    np.testing.assert_array_equal(lazy[1, :, 5:9, 7:60], image[1, :, 5:9, 7:60])


def test_what_is_no_image(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "group.zarr")
    (tmp_path / "empty.zarr").mkdir()
    to_zarr(tmp_path / "one.zarr", np.zeros(9, np.uint8)[None])
    wide = tmp_path / "wide.zarr"
    zarr.create_array(wide, shape=(10**5, 10**5), chunks=(10**5, 10**5), dtype="u1")
    for name, told in {
        "group": "multiscale", "empty": "no Zarr image", "wide": "1024 x 1024",
    }.items():  # fmt: skip
        with pytest.raises(ImageFileError, match=told):
            api.open_image(tmp_path / f"{name}.zarr")


def damaged(path: Path, how: str) -> Path:
    """Write an image of four chunks and spoil the last one, or the codec of all."""
    to_zarr(path, picture(100, 100))
    if how == "foreign codec":
        text = (path / "zarr.json").read_text(encoding="utf-8")
        (path / "zarr.json").write_text(text.replace('"zstd"', '"jpeg2000"'))
        return path
    chunk = path / "c" / "1" / "1"
    if how == "missing":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:30] if how == "cut" else bytes(50))
    return path


@pytest.mark.parametrize("how", ["cut", "zeros", "foreign codec"])
def test_a_damaged_zarr_image_is_told(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = damaged(tmp_path / "a.zarr", how), tmp_path / "out.zarr"
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    with pytest.raises(ImageFileError, match=r"`a\.zarr` .*(damaged|jpeg2000)"):
        api.predict_to_zarr(model_of(), path, out, tile=TILE)
    model_of().save(tmp_path / "m.safetensors")
    call = ["predict", str(tmp_path / "m.safetensors"), str(path), "-o", str(out)]
    assert main(call) == 3
    assert "`a.zarr`" in capsys.readouterr().err
    if how != "foreign codec":  # which zarr itself refuses to open
        array = zarr.open_array(path, mode="r")
        with pytest.raises(ImageFileError, match="cannot be read from its file"):
            api.predict(model_of(), array)
        paint = np.ones((100, 100), np.uint8)
        for pair in ((array, paint), (picture(100, 100), array)):
            with pytest.raises(ImageFileError, match="cannot be read from its file"):
                api.train(*pair, max_steps=1)
    assert not out.exists()  # what is done is kept beside it, to go on with
    assert {p: p.read_bytes() for p in path.rglob("*") if p.is_file()} == before


def test_a_chunk_that_is_not_stored_has_the_fill_value(tmp_path: Path) -> None:
    lazy = api.open_image(damaged(tmp_path / "a.zarr", "missing"))
    assert not lazy[50:, 50:].any()  # as Zarr says; empty chunks are stored so
    np.testing.assert_array_equal(lazy[:50], picture(100, 100)[:50])


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_a_tiff_that_is_cut_between_two_regions(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    options = {"compression": "zlib", "tile": (32, 32)} if kind == "packed" else {}
    tifffile.imwrite(path, picture(200, 200), **options)
    lazy = api.open_image(path)
    lazy[:10]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ImageFileError, match=r"`a\.tif` is damaged: a part of it"):
        lazy[150:]


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = to_zarr(tmp_path / "a.zarr", picture(9, 9))
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(MissingPackageError, match=r"napari-unetpp\[big\]"):
        api.open_image(path)


def test_limits_of_a_large_plane_come_from_squares_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from napari_unetpp import preprocess

    image = picture(2000, 3000)[None]
    expected = api.Preprocessing().limits(image)
    monkeypatch.setattr(preprocess, "_LARGE", 10**6)

    class Counted:
        shape = image.shape
        read = 0

        def __getitem__(self, key: Any) -> np.ndarray:
            assert image[key].shape[1:] == (32, 32)
            assert key[1].start % 32 == key[2].start % 32 == 0
            self.read += 1
            return image[key]

    plane = Counted()
    found = api.Preprocessing().limits(plane)  # type: ignore[arg-type]
    assert plane.read == 1024
    np.testing.assert_allclose(found, expected, atol=2)
    np.testing.assert_array_equal(found, api.Preprocessing().limits(image))


# --- writing ---------------------------------------------------------------------


SOURCES: dict[str, Callable[[Path, np.ndarray], Any]] = {
    "numpy": lambda _, a: a,
    "dask": lambda _, a: dask.array.from_array(a, chunks=40),
    "zarr": lambda p, a: zarr.open_array(to_zarr(p / "i.zarr", a), mode="r"),
    "path": lambda p, a: str(to_zarr(p / "i.zarr", a)),
}


@pytest.mark.parametrize("source", SOURCES)
def test_the_labels_are_those_of_predict(source: str, tmp_path: Path) -> None:
    image = picture(2, 150, 170)
    out = tmp_path / "out.zarr"
    given = SOURCES[source](tmp_path, image)
    steps = list(api.predict_to_zarr_steps(model_of(), given, out, tile=TILE))
    expected = api.predict(model_of(), image, tile=TILE)
    assert len(np.unique(expected)) == 2
    np.testing.assert_array_equal(stored(out), expected)
    states = [s.state for s in steps]
    assert states == ["started", *["tile"] * 18, "done"]
    covered = np.zeros(image.shape, int)
    for step in steps[1:-1]:
        assert step.slices is not None
        covered[step.slices] += 1
    assert (covered == 1).all()
    assert steps[-2].done == steps[-1].done == steps[-1].total == image.size
    assert steps[-1].labels == out
    assert [p.name for p in tmp_path.glob("out*")] == ["out.zarr"]
    assert zarr.open_array(out, path="0").chunks == (1, TILE, TILE)


def test_channels_heads_and_a_lazy_image(tmp_path: Path) -> None:
    image = np.stack([picture(150, 170, seed=s) for s in range(3)], -1)
    tifffile.imwrite(tmp_path / "i.tif", image, tile=(32, 32), photometric="rgb")
    model = model_of(3)
    settings: dict[str, Any] = {"heads": "mean", "tile": TILE}
    expected = api.predict(model, image, channel_axis=-1, **settings)
    lazy = api.open_image(tmp_path / "i.tif")
    found = api.predict(model, lazy, channel_axis=lazy.channel_axis, **settings)
    np.testing.assert_array_equal(found, expected)
    out = api.predict_to_zarr(model, lazy, tmp_path / "o.zarr", **settings)
    np.testing.assert_array_equal(stored(out), expected)
    assert [a.name for a in api.open_image(out).axes] == ["y", "x"]


def test_a_full_disk_is_told_and_the_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, out = picture(200, 200), tmp_path / "o.zarr"
    steps = api.predict_to_zarr_steps(model_of(), image, out, tile=TILE)
    next(steps), next(steps)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", full)
        with pytest.raises(SaveError, match="No space left"):
            next(steps)
    again = list(api.predict_to_zarr_steps(model_of(), image, out, tile=TILE))
    assert [s.state for s in again].count("tile") == 15
    np.testing.assert_array_equal(
        stored(out), api.predict(model_of(), image, tile=TILE)
    )


@pytest.mark.parametrize(
    "call", ["zarr.create_group", "pathlib.Path.unlink", "shutil.rmtree"]
)
def test_whatever_the_disk_refuses_is_told(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, out = picture(100, 100), tmp_path / "o.zarr"
    api.predict_to_zarr(model_of(), image, out, tile=TILE)
    before = stored(out)

    def refused(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    other = api.create_model(model_of().config, classes=("a", "b"), seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(call, refused)
        with pytest.raises(SaveError, match=r"Input/output.*same command"):
            api.predict_to_zarr(other, image, out, tile=TILE, overwrite=True)
    np.testing.assert_array_equal(stored(out), before)
    api.predict_to_zarr(other, image, out, tile=TILE, overwrite=True)
    np.testing.assert_array_equal(stored(out), api.predict(other, image, tile=TILE))
    assert [p.name for p in tmp_path.iterdir()] == ["o.zarr"]


@pytest.mark.parametrize("form", [2, 3])
def test_the_pyramid_keeps_axes_and_scales(
    form: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("napari_unetpp.io.labels._TOP", 64)
    image = picture(2, 1, 175, 249)
    path = to_ome(tmp_path / "a.zarr", image, axes_of("tcyx"), form)
    out = api.predict_to_zarr(model_of(), path, tmp_path / "out.zarr", tile=TILE)
    yaozarrs.validate_zarr_store(str(out))
    full = stored(out)
    assert full.shape == (2, 175, 249)
    shapes = []
    for n in range(3):
        level = stored(out, n)
        np.testing.assert_array_equal(level, full[..., :: 2**n, :: 2**n])
        shapes.append(level.shape)
    assert shapes == [(2, 175, 249), (2, 88, 125), (2, 44, 63)]
    lazy = api.open_image(out)
    source = api.open_image(path).axes
    assert lazy.axes == (source[0], *source[2:])
    assert lazy.version == ("0.4" if form == 2 else "0.5")
    attributes = zarr.open_group(out, mode="r").attrs.asdict()
    told = attributes.get("ome", attributes)
    assert told["image-label"]["properties"] == [
        {"label-value": 1, "class": "background"}, {"label-value": 2, "class": "cell"},
    ]  # fmt: skip
    last = told["multiscales"][0]["datasets"][2]["coordinateTransformations"]
    assert last[0]["scale"] == [1.0, 2.0, 1.0]


def test_a_chunk_of_zeros_is_written(tmp_path: Path) -> None:
    model = model_of(unlabelled=None)
    out = api.predict_to_zarr(
        model, np.zeros((130, 130), np.uint8), tmp_path / "o.zarr", tile=TILE
    )
    assert set(np.unique(stored(out))) == {0}
    assert len([p for p in (out / "0" / "c").rglob("*") if p.is_file()]) == 9


def test_a_stop_keeps_what_is_done(tmp_path: Path) -> None:
    image, out = to_zarr(tmp_path / "i.zarr", picture(200, 200)), tmp_path / "o.zarr"
    stop = threading.Event()
    seen = []
    for step in api.predict_to_zarr_steps(model_of(), image, out, tile=TILE, stop=stop):
        seen.append(step)
        if len(seen) == 4:
            stop.set()
    assert [s.state for s in seen] == ["started", "tile", "tile", "tile"]
    assert not out.exists()
    again = list(api.predict_to_zarr_steps(model_of(), image, out, tile=TILE))
    assert again[0].done == seen[-1].done > 0
    assert [s.state for s in again].count("tile") == 16 - 3
    expected = api.predict(model_of(), picture(200, 200), tile=TILE)
    np.testing.assert_array_equal(stored(out), expected)


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    image, out = picture(200, 200), tmp_path / "o.zarr"
    first = api.predict_to_zarr_steps(model_of(), image, out, tile=TILE)
    next(first)
    second = api.predict_to_zarr_steps(model_of(), image, out, tile=TILE)
    with pytest.raises(SaveError, match="by another process"):
        next(second)
    first.close()
    assert list(api.predict_to_zarr_steps(model_of(), image, out, tile=TILE))


def test_damage_to_what_was_done_is_found(tmp_path: Path) -> None:
    image, out = picture(200, 200), tmp_path / "o.zarr"
    steps = api.predict_to_zarr_steps(model_of(), image, out, tile=TILE)
    for _ in range(6):
        next(steps)
    steps.close()
    part = tmp_path / "o.zarr.part"
    chunks = part / "labels.zarr" / "0" / "c" / "0"
    (chunks / "0").write_bytes(b"torn")
    (chunks / "1").unlink()
    (chunks / "2.0123456789abcdef.partial").write_bytes(b"left by a kill")
    with open(part / "manifest.txt", "a") as file:
        file.write("9 0000")
    again = api.predict_to_zarr_steps(model_of(), image, out, tile=TILE)
    assert next(again).done == 64 * (64 + 8 + 64)  # of tiles 0 to 4, the last three
    list(again)
    np.testing.assert_array_equal(
        stored(out), api.predict(model_of(), image, tile=TILE)
    )
    assert not list(tmp_path.rglob("*.part*"))


def test_other_settings_do_not_mix(tmp_path: Path) -> None:
    image, out = picture(200, 200), tmp_path / "o.zarr"
    steps = api.predict_to_zarr_steps(model_of(), image, out, tile=TILE)
    next(steps), next(steps)
    steps.close()
    other = dataclasses.replace(model_of(), classes=("background", "nucleus"))
    for model, pixels, tile, told in (
        (model_of(), image, 96, "chunk"),
        (other, image, TILE, "model"),
        (model_of(), image // 2, TILE, "limits"),
    ):
        with pytest.raises(SaveError, match=rf"something else \({told}\)"):
            list(api.predict_to_zarr_steps(model, pixels, out, tile=tile))
    begun = api.predict_to_zarr_steps(model_of(), image, out, tile=96, overwrite=True)
    assert next(begun).done == 0
    list(begun)
    np.testing.assert_array_equal(stored(out), api.predict(model_of(), image, tile=96))


def test_what_could_not_be_deleted_stays_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, out = picture(100, 100), tmp_path / "o.zarr"

    real = type(out).unlink

    def unlink(path: Path, **options: bool) -> None:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied")
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(out), "unlink", unlink)
        api.predict_to_zarr(model_of(), image, out, tile=TILE)
    assert (tmp_path / "o.zarr.part" / "lock").exists()
    api.predict_to_zarr(model_of(), image, out, tile=TILE, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["o.zarr"]


def test_only_labels_are_replaced(tmp_path: Path) -> None:
    image = to_zarr(tmp_path / "i.zarr", picture(80, 80))
    out = api.predict_to_zarr(model_of(), image, tmp_path / "o.zarr")
    with pytest.raises(SaveError, match="exists"):
        api.predict_to_zarr(model_of(), image, out)
    other = picture(80, 80, seed=5)
    api.predict_to_zarr(model_of(), other, out, overwrite=True)
    np.testing.assert_array_equal(stored(out), api.predict(model_of(), other))
    for bad, error, told in (
        (image, ValueError, "same or lie in"),
        (image / "o.zarr", ValueError, "same or lie in"),
        (tmp_path / "o.tif", ValueError, "end in .zarr"),
        (tmp_path / "no" / "o.zarr", SaveError, "no folder"),
    ):
        with pytest.raises(error, match=told):
            api.predict_to_zarr(model_of(), image, bad, overwrite=True)
    mine = to_zarr(tmp_path / "mine.zarr", picture(9, 9))
    with pytest.raises(SaveError, match="no label image"):
        api.predict_to_zarr(model_of(), image, mine, overwrite=True)
    np.testing.assert_array_equal(zarr.open_array(mine, mode="r")[:], picture(9, 9))


def test_a_kill_between_the_last_renames(tmp_path: Path) -> None:
    image = picture(80, 80)
    out = api.predict_to_zarr(model_of(), image, tmp_path / "o.zarr")
    part = tmp_path / "o.zarr.part"
    part.mkdir()
    (part / "manifest.txt").write_text("0 00000000\n")
    with pytest.raises(SaveError, match="none of ours"):
        api.predict_to_zarr(model_of(), image, out, overwrite=True)
    (part / "lock").touch()
    with pytest.raises(SaveError, match="exists"):
        api.predict_to_zarr(model_of(), image, out)
    assert not part.exists()
    again = api.predict_to_zarr(model_of(), image, out, overwrite=True)
    np.testing.assert_array_equal(stored(again), api.predict(model_of(), image))
    assert not part.exists()


KILLED = """
import os, sys
from napari_unetpp import api
model = api.load_model(sys.argv[1])
steps = api.predict_to_zarr_steps(model, sys.argv[2], sys.argv[3], tile=64)
for n, _ in enumerate(steps):
    if n == 5:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no kill -9")
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    image, out = to_zarr(tmp_path / "i.zarr", picture(200, 200)), tmp_path / "o.zarr"
    file = tmp_path / "m.safetensors"
    model_of().save(file)
    command = [sys.executable, "-c", KILLED, str(file), str(image), str(out)]
    assert subprocess.run(command, timeout=240).returncode == -9
    assert (tmp_path / "o.zarr.part").is_dir()
    steps = list(
        api.predict_to_zarr_steps(api.load_model(file), str(image), out, tile=TILE)
    )
    assert [s.state for s in steps].count("tile") == 16 - 5
    np.testing.assert_array_equal(
        stored(out), api.predict(model_of(), picture(200, 200), tile=TILE)
    )
    assert not (tmp_path / "o.zarr.part").exists()


def test_short_memory_makes_smaller_parts_of_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from napari_unetpp.predict import PlanePredictor

    whole = PlanePredictor.probabilities

    def picky(self: Any, core: Any) -> Any:
        if core.rows[1] - core.rows[0] > 64:
            raise MemoryError
        return whole(self, core)

    image = picture(300, 200)
    expected = api.predict(model_of(), image, tile=128)
    monkeypatch.setattr(PlanePredictor, "probabilities", picky)
    out = api.predict_to_zarr(model_of(), image, tmp_path / "o.zarr", tile=128)
    np.testing.assert_array_equal(stored(out), expected)


def test_wrong_arguments_are_told_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "o.zarr"
    for settings, told in (
        ({"tile": 3}, "tile"),
        ({"depth": 4}, "depth"),
        ({"workers": 0}, "workers"),
        ({"workers": 1, "scheduler": "tcp://x:1"}, "not both"),
        ({"workers": 1}, "in memory"),
        ({"channel_axis": 0}, "channel"),
    ):
        with pytest.raises(ValueError, match=told):
            api.predict_to_zarr_steps(model_of(), picture(9, 9, 9), out, **settings)
    with pytest.raises(ValueError, match="at most 5 axes"):
        api.predict_to_zarr_steps(model_of(), picture(2, 1, 1, 1, 9, 9), out)
    assert not list(tmp_path.iterdir())
