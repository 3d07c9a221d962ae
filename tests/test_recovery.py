"""Recovery files: bit for bit, strict, and of ended sessions alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from napari_unetpp import recovery
from napari_unetpp.config import NetConfig
from napari_unetpp.errors import RecoveryFileError, SaveError
from napari_unetpp.recovery import Note, Store, from_bytes, pack, read, to_bytes

if TYPE_CHECKING:
    from pathlib import Path

NOTE = Note("a" * 32, "nuclei", "cell", session="b" * 32, classes=("x", "<b>"))
INTEGERS = st.sampled_from([np.uint8, np.int16, np.uint32, np.int64])


def painted(value: int = 1, size: int = 400) -> np.ndarray:
    labels = np.zeros((size, size), np.uint8)
    labels[300:305, 10:90] = value
    return labels


def forged(**changes: Any) -> bytes:
    """Return a file with another header and a right checksum."""
    whole = to_bytes(NOTE, pack(painted()))[:-32]
    magic, header, payload = whole.split(b"\n", 2)
    text = json.dumps(json.loads(header) | changes).encode()
    whole = b"\n".join([magic, text, changes.get("payload", payload)])
    return whole + hashlib.sha256(whole).digest()


@given(hnp.arrays(INTEGERS, hnp.array_shapes(min_dims=1, max_dims=4)), st.text())
def test_what_is_read_is_what_was_written(labels: np.ndarray, name: str) -> None:
    note = replace(NOTE, name=name)
    found, back = from_bytes(to_bytes(note, pack(labels)))
    assert back.dtype == labels.dtype
    np.testing.assert_array_equal(back, labels)
    assert found == replace(note, painted=np.count_nonzero(labels))


def test_blocks_far_apart_come_back() -> None:
    labels = np.zeros((5, 300, 301), np.int32)
    labels[0, 0, 0], labels[2, 100:150, 7], labels[-1, -1, -1] = 1, -3, 2**30
    data = to_bytes(NOTE, pack(labels))
    assert len(data) < 10_000
    np.testing.assert_array_equal(from_bytes(data)[1], labels)
    np.testing.assert_array_equal(
        from_bytes(to_bytes(NOTE, pack(labels.T)))[1], labels.T
    )


@given(st.data())
def test_a_changed_byte_is_found(data: st.DataObject) -> None:
    whole = bytearray(to_bytes(NOTE, pack(painted())))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(RecoveryFileError):
        from_bytes(bytes(whole))


@given(st.integers(0, 500))
def test_a_cut_file_is_refused(end: int) -> None:
    whole = to_bytes(NOTE, pack(painted()))
    with pytest.raises(RecoveryFileError):
        from_bytes(whole[: min(end, len(whole) - 1)])


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [2**20, 2**20]},
        {"shape": [0, 4]},
        {"shape": [True, 4]},
        {"shape": [400, 400.0]},
        {"shape": []},
        {"shape": [200, 400]},
        {"dtype": "O"},
        {"dtype": ["u1"]},
        {"dtype": "u2"},
        {"runs": [[0, 3], [2, 1]]},
        {"runs": [[0, 10**9]]},
        {"runs": [[-1, 1]]},
        {"runs": []},
        {"runs": None},
        {"shape": [2**15, 2**15], "runs": [[0, 2**14]]},
        {"layer": "../../../etc/passwd"},
        {"session": "/tmp/x"},
        {"name": 3},
        {"colours": ["url(file:///x)"]},
        {"scale": [0.0, 1.0]},
        {"scale": [1.0]},
        {"translate": [float("nan"), 0]},
        {"time": float("inf")},
        {"time": 1e300},
        {"serial": 10**400},
        {"painted": -1},
        {"extra": 1},
    ],
)
def test_a_lie_in_the_header_is_refused(changes: dict[str, Any]) -> None:
    assert from_bytes(forged())[0] == replace(NOTE, painted=400)
    with pytest.raises(RecoveryFileError, match="damaged"):
        from_bytes(forged(**changes))


def test_two_generations_are_kept_and_the_whole_one_is_offered(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "folder")
    for value in (1, 2, 3):
        store.save(NOTE, pack(painted(value)))
    store.close()
    assert len(list(store.folder.glob("*.strokes"))) == 2
    if os.name == "posix":
        assert store.folder.stat().st_mode & 0o077 == 0
    (newest,), bad = Store(store.folder).offers()
    assert not bad
    assert read(newest.path)[1].max() == 3
    newest.path.write_bytes(newest.path.read_bytes()[:-5])
    (older,), bad = Store(store.folder).offers()
    assert read(older.path)[1].max() == 2
    assert bad == [newest.path.name]
    assert newest.path.with_suffix(".bad").exists()
    assert Store(store.folder).offers()[1] == []


def test_a_living_session_is_offered_to_nobody(tmp_path: Path) -> None:
    one, two = Store(tmp_path), Store(tmp_path)
    one.save(NOTE, pack(painted()))
    assert one.offers() == two.offers() == ([], [])
    one.close()
    assert [o.note.name for o in two.offers()[0]] == ["nuclei"]
    two.forget(NOTE.layer)
    assert two.offers() == ([], [])


def test_old_and_too_many_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    noise = np.random.default_rng(0).integers(1, 255, (100, 100), np.uint8)
    monkeypatch.setattr(recovery, "MOST", 25_000)
    for n in range(4):
        store.save(replace(NOTE, layer=f"{n}" * 32), pack(noise))
        os.utime(tmp_path / f"{str(n) * 32}-1.strokes", (n + 1e9, n + 1e9))
    left = sorted(path.name[0] for path in tmp_path.glob("*.strokes"))
    assert left == ["2", "3"]
    os.utime(tmp_path / f"{'3' * 32}-1.strokes", (time.time(),) * 2)
    store.close()
    assert [o.note.layer[0] for o in Store(tmp_path).offers()[0]] == ["3"]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((SaveError, OSError)):
        Store(tmp_path / "file").save(NOTE, pack(painted()))


def trained(path: Path) -> None:
    """Leave the checkpoint of a training of two steps."""
    from napari_unetpp.train import train  # late: torch is slow to import

    image = np.random.default_rng(0).random((64, 64))
    strokes = np.zeros((64, 64), np.uint8)
    strokes[10:20, 10:50], strokes[40:50, 10:50] = 1, 2
    small = NetConfig("unet", width=4, levels=1)
    train(image, strokes, network=small, max_steps=2, checkpoint=path, device="cpu")


def test_a_training_is_offered_when_its_session_has_ended(tmp_path: Path) -> None:
    first = Store(tmp_path)
    files = [first.new_training() for _ in range(2)]
    for file in files:
        trained(file)
    second = Store(tmp_path)
    assert second.trainings() == []  # it lives
    first.close()
    os.utime(files[0], (0, 0))
    (found,) = second.trainings()  # the last one of the session
    assert (found.path, found.steps) == (files[1], 2)
    files[1].write_bytes(b"damaged")
    assert [t.path for t in second.trainings()] == [files[0]]
    second.forget_training(files[0])
    assert second.trainings() == []
    assert not files[0].exists()


def test_only_the_last_two_trainings_of_a_session_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    files = []
    for _ in range(3):
        files.append(store.new_training())
        files[-1].write_bytes(b"checkpoint")
        files[-1].with_name(f"{files[-1].stem}.best.safetensors").write_bytes(b"best")
    assert [f.exists() for f in files] == [False, True, True]
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    store.forget_trainings()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_that_is_gone_comes_back_for_a_training(tmp_path: Path) -> None:
    store = Store(tmp_path / "kept")
    shutil.rmtree(store.new_training().parent)
    assert store.new_training().parent.is_dir()


def test_a_store_may_be_opened_from_two_threads_at_once(tmp_path: Path) -> None:
    for n in range(30):
        store = Store(tmp_path / str(n))
        barrier = threading.Barrier(2)

        def begin(store: Store = store, barrier: threading.Barrier = barrier) -> Path:
            barrier.wait()
            return store.new_training()

        with ThreadPoolExecutor(2) as pool:
            for found in [pool.submit(begin) for _ in range(2)]:
                assert found.result().parent == tmp_path / str(n)
        store.close()
