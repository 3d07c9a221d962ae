"""Workers share one large image, or many files; one that dies changes nothing."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import dask.array
import distributed
import numpy as np
import psutil
import pytest
import tifffile
import zarr

from napari_unetpp import api, cluster, io
from napari_unetpp.cli import main
from napari_unetpp.errors import ClusterError, ImageFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Sockets and event loops of distributed's, closed when its threads have ended.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TILE = 64


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.indices(shape[-2:])
    waves = 60 * np.sin(y / 9) * np.cos(x / 13) + 90
    return (waves + rng.normal(0, 30, shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def model() -> api.Model:
    return api.create_model("unet++", classes=("a", "b"), width=4, levels=1)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = picture(2, 180, 200)
    array = zarr.create_array(
        tmp_path / "i.zarr", shape=pixels.shape, chunks=(1, 70, 70), dtype=pixels.dtype
    )
    array[:] = pixels
    return tmp_path / "i.zarr"


@pytest.fixture(scope="module")
def two() -> Iterator[distributed.LocalCluster]:
    """Return a cluster that runs already, as a user's."""
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        worker_dashboard_address="127.0.0.1:0",
    ) as processes:
        yield processes


@pytest.fixture(autouse=True)
def swept() -> Iterator[None]:
    """Have what is left of sockets warn here, where it is ignored."""
    yield
    gc.collect()


def stored(path: Path) -> np.ndarray:
    return np.asarray(zarr.open_array(path, path="0", mode="r")[:])


def test_two_workers_label_as_one_process(
    model: api.Model, image: Path, two: distributed.LocalCluster, tmp_path: Path
) -> None:
    expected = api.predict(model, picture(2, 180, 200), tile=TILE)
    for n, given in enumerate((image, dask.array.from_zarr(str(image)))):
        out = tmp_path / f"o{n}.zarr"
        states = [
            step.state
            for step in api.predict_to_zarr_steps(
                model, given, out, tile=TILE, scheduler=two.scheduler_address
            )
        ]
        assert states == ["started", *["tile"] * 24, "done"]
        np.testing.assert_array_equal(stored(out), expected)
    with distributed.Client(two) as client:
        done = client.run(lambda: os.getpid() and 1)
    assert sum(done.values()) == 2  # nobody's workers were ended


def test_a_worker_takes_the_model_of_each_run(
    model: api.Model, image: Path, two: distributed.LocalCluster, tmp_path: Path
) -> None:
    other = api.create_model("unet", classes=("a", "b"), width=4, levels=1, seed=3)
    results = []
    for each in (model, other):
        out = api.predict_to_zarr(
            each, image, tmp_path / "o.zarr", tile=TILE, overwrite=True,
            scheduler=two.scheduler_address,
        )  # fmt: skip
        expected = api.predict(each, picture(2, 180, 200), tile=TILE)
        np.testing.assert_array_equal(stored(out), expected)
        results.append(expected)
    assert (results[0] != results[1]).any()


@pytest.mark.skipif(sys.platform == "win32", reason="has no kill -9")
def test_a_worker_that_is_killed_changes_nothing(
    model: api.Model, image: Path, two: distributed.LocalCluster, tmp_path: Path
) -> None:
    pids = [w.pid for w in two.workers.values()]
    out = tmp_path / "o.zarr"
    steps = api.predict_to_zarr_steps(
        model, image, out, tile=TILE, scheduler=two.scheduler_address
    )
    tiles = 0
    for step in steps:
        tiles += step.state == "tile"
        if tiles == 3 and step.state == "tile":
            os.kill(pids[0], signal.SIGKILL)
    assert tiles == 24
    expected = api.predict(model, picture(2, 180, 200), tile=TILE)
    np.testing.assert_array_equal(stored(out), expected)
    assert not list(tmp_path.rglob("*.part*"))


def test_workers_of_our_own_listen_to_this_computer_alone(
    model: api.Model, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    each = cluster.each

    def watched(client: Any, *rest: Any, **settings: Any) -> Any:
        ours = psutil.Process()
        for process in (ours, *ours.children(recursive=True)):
            for socket in process.net_connections():
                if socket.status == psutil.CONN_LISTEN:
                    seen.append((socket.laddr.ip, process.pid == ours.pid))
        return each(client, *rest, **settings)

    monkeypatch.setattr(cluster, "each", watched)
    out = api.predict_to_zarr(model, image, tmp_path / "o.zarr", tile=TILE, workers=1)
    assert {address for address, _ in seen} == {"127.0.0.1"}
    assert {own for _, own in seen} == {True, False}  # the scheduler and its worker
    expected = api.predict(model, picture(2, 180, 200), tile=TILE)
    np.testing.assert_array_equal(stored(out), expected)


def test_a_damaged_image_is_told_as_by_one_process(
    model: api.Model, image: Path, two: distributed.LocalCluster, tmp_path: Path
) -> None:
    (image / "c" / "1" / "2" / "2").write_bytes(b"torn")
    with pytest.raises(ImageFileError, match="cannot be read"):
        api.predict_to_zarr(
            model,
            image,
            tmp_path / "o.zarr",
            tile=TILE,
            scheduler=two.scheduler_address,
        )
    assert (tmp_path / "o.zarr.part").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="has no kill -9")
def test_what_kills_its_workers_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_FAILURES", 1)  # each costs the start of a worker

    # Here, not above: to import this module takes a worker longer than all the rest.
    def die(_: bytes, item: int) -> int:
        if item == 1:
            os.kill(os.getpid(), 9)
        return 10 * item

    with cluster.Wanted(workers=2).client() as client:
        found = dict(cluster.each(client, die, None, range(6), keep_going=True))
        poison = found.pop(1)
        assert isinstance(poison, ClusterError)
        assert found == {n: 10 * n for n in (0, 2, 3, 4, 5)}
        assert "the same command goes on" in str(poison)


def test_files_are_shared_and_a_damaged_one_fails_alone(
    model: api.Model, two: distributed.LocalCluster, tmp_path: Path
) -> None:
    images, out = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    for n in range(4):
        tifffile.imwrite(images / f"{n}.tif", picture(90, 80, seed=n))
    (images / "bad.tif").write_bytes(b"II*\0" + bytes(20))
    targets = api.plan_files(images, out, probabilities=True)
    steps = list(
        api.predict_files(model, targets, tile=TILE, scheduler=two.scheduler_address)
    )
    ended = {s.target.title: s for s in steps if s.state != "started"}
    assert {name: s.state for name, s in ended.items()} == {
        "0.tif": "done", "1.tif": "done", "2.tif": "done", "3.tif": "done",
        "bad.tif": "failed",
    }  # fmt: skip
    assert isinstance(ended["bad.tif"].error, ImageFileError)
    for n in range(4):
        expected = api.predict(model, picture(90, 80, seed=n), tile=TILE)
        np.testing.assert_array_equal(io.read_labels(out / f"{n}.tif"), expected)
    assert len(list(out.iterdir())) == 8
    again = api.predict_files(
        model, targets, skip_existing=True, scheduler=two.scheduler_address
    )
    assert [s.state for s in again].count("skipped") == 4


def test_the_command_line(
    model: api.Model,
    image: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.save(tmp_path / "m.safetensors")
    out = tmp_path / "o.zarr"
    command = ["predict", str(tmp_path / "m.safetensors"), str(image), "--tile", "64"]
    assert main([*command, "-o", str(out)]) == 0
    assert "i.zarr ->" in capsys.readouterr().out
    expected = api.predict(model, picture(2, 180, 200), tile=TILE)
    np.testing.assert_array_equal(stored(out), expected)
    assert main([*command, "-o", str(out)]) == 4
    assert "exists" in capsys.readouterr().err
    assert main([*command, "-o", str(tmp_path / "labels")]) == 2
    assert "--out NAME.zarr" in capsys.readouterr().err
    assert main([*command, "-o", str(out), "--overwrite", "--probabilities"]) == 2
    assert main([*command, "-o", str(out), "--overwrite", "--workers", "1"]) == 0
    np.testing.assert_array_equal(stored(out), expected)
    assert not (tmp_path / "o.zarr.part").exists()


def test_files_by_the_command_line(
    model: api.Model,
    two: distributed.LocalCluster,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model.save(tmp_path / "m.safetensors")
    (tmp_path / "images").mkdir()
    for n in range(2):
        tifffile.imwrite(tmp_path / "images" / f"{n}.tif", picture(90, 80, seed=n))
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    command = ["predict", str(tmp_path / "m.safetensors"), str(tmp_path / "images")]
    command += ["-o", str(tmp_path / "labels"), "--scheduler", two.scheduler_address]
    assert main(command) == 3
    told = capsys.readouterr()
    assert "2 images labelled, 1 failed" in told.out
    assert "bad.png" in told.err
    found = io.read_labels(tmp_path / "labels" / "1.tif")
    np.testing.assert_array_equal(found, api.predict(model, picture(90, 80, seed=1)))


def test_a_scheduler_that_is_not_there(
    model: api.Model, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_TIMEOUT", 1)
    with pytest.raises(ClusterError, match="does not answer"):
        api.predict_to_zarr(
            model, image, tmp_path / "o.zarr", scheduler="tcp://127.0.0.1:9"
        )


def test_workers_that_never_come_back_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cluster, "_LOOK", 0.2)
    monkeypatch.setattr(cluster, "_TIMEOUT", 0.5)
    with (
        distributed.LocalCluster(
            n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0"
        ) as empty,
        distributed.Client(empty.scheduler_address) as client,
        pytest.raises(ClusterError, match="no worker is left"),
    ):
        list(cluster.each(client, print, None, [0]))
