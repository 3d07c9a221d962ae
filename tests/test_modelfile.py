"""A model file is read back exactly or refused; nothing in it is run or believed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tracemalloc
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from napari_unetpp import modelfile
from napari_unetpp.errors import ModelFileError, SaveError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIG = {"network": "unet++", "levels": 4, "classes": ["background", "Zellkern ü"]}
PROVENANCE = {"created": "2024-05-01", "loss": 0.125}


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_0_0.weight": rng.normal(size=(2, 1, 3, 3)).astype(np.float32),
        "half": np.array([1.5, -2.0], np.float16),
        "count": np.array(7, np.int64),
    }


@pytest.fixture(scope="module")
def good() -> bytes:
    return modelfile.encode(tensors(), config=CONFIG, provenance=PROVENANCE)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + body


def sealed(header: dict[str, Any], body: bytes) -> bytes:
    """Return a file whose checksum is right, whatever else it holds."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "sha256"}
    table = {k: v for k, v in header.items() if k != "__metadata__"}
    text = json.dumps([table, metadata], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode() + body).hexdigest()
    return join({"__metadata__": {**metadata, "sha256": digest}, **table}, body)


def one(**entry: Any) -> dict[str, Any]:
    """Return the header of a file of one float32, with changes."""
    base = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    metadata = {
        "format": "napari-unetpp",
        "format_version": "1",
        "config": "{}",
        "provenance": "{}",
    }
    return {"__metadata__": metadata, "w": {**base, **entry}}


def same(a: modelfile.ModelFile, b: modelfile.ModelFile) -> bool:
    return (
        (a.config, a.provenance, a.extra) == (b.config, b.provenance, b.extra)
        and list(a.tensors) == list(b.tensors)
        and all(
            x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
            for x, y in zip(a.tensors.values(), b.tensors.values(), strict=True)
        )
    )


# --- what is written is read -----------------------------------------------------


def test_round_trip(good: bytes) -> None:
    file = modelfile.decode(good)
    assert (file.config, file.provenance, file.extra) == (CONFIG, PROVENANCE, {})
    assert set(file.tensors) == set(tensors())
    for name, array in tensors().items():
        found = file.tensors[name]
        assert found.dtype == array.dtype
        assert found.shape == array.shape
        assert found.flags.writeable
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x010280])
def test_a_header_whose_length_looks_like_a_pickle_is_read(length: int) -> None:
    header, body = split(sealed(one(), b"1234"))
    header["__metadata__"]["provenance"] = "{}" + " " * (
        length - len(sealed(header, body)) + 8 + len(body)
    )
    data = sealed(header, body)
    assert int.from_bytes(data[:8], "little") == length
    assert list(modelfile.decode(data).tensors) == ["w"]


def test_the_checksum_is_over_table_metadata_and_data(good: bytes) -> None:
    header, body = split(good)
    assert sealed(header, body)[8:].startswith(b"{")
    resealed, _ = split(sealed(header, body))
    assert resealed["__metadata__"]["sha256"] == modelfile.decode(good).digest


def test_extra_travels_along() -> None:
    extra = {"step": 12, "state": [1, 2.5, None, True]}
    data = modelfile.encode(tensors(), config={}, provenance={}, extra=extra)
    assert modelfile.decode(data).extra == extra


def test_same_content_same_bytes(good: bytes) -> None:
    backwards = dict(reversed(tensors().items()))
    again = modelfile.encode(backwards, config=CONFIG, provenance=PROVENANCE)
    assert again == good


def test_other_programs_can_read_it(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "nuclei.safetensors"
    path.write_bytes(good)
    loaded = safetensors.numpy.load(good)
    for name, array in tensors().items():
        np.testing.assert_array_equal(loaded[name], array)
    with safetensors.safe_open(path, "np") as file:
        assert json.loads(file.metadata()["config"]) == CONFIG


def test_bf16_becomes_float32() -> None:
    body = np.array([0x3F80, 0xC040, 0x0001], "<u2").tobytes()
    header = one(dtype="BF16", shape=[3], data_offsets=[0, 6])
    (array,) = modelfile.decode(sealed(header, body)).tensors.values()
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, np.array([1, -3, 2.0**-133], np.float32))


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.text("abc_.01", min_size=1, max_size=8),
        hnp.arrays(
            st.sampled_from([np.float32, np.float16, np.int64]),
            hnp.array_shapes(min_dims=0, max_dims=5, max_side=3),
            elements={"allow_nan": False, "allow_infinity": False},
        ),
        min_size=1,
        max_size=4,
    ),
    st.dictionaries(st.text(max_size=4), st.integers(-(10**18), 10**18), max_size=3),
)
def test_any_content_survives(
    arrays: dict[str, np.ndarray], config: dict[str, int]
) -> None:
    try:
        data = modelfile.encode(arrays, config=config, provenance={})
    except ValueError:
        with pytest.raises(UnicodeEncodeError):
            "".join(config).encode()
        return
    file = modelfile.decode(data)
    assert file.config == config
    assert {n: a.tobytes() for n, a in file.tensors.items()} == {
        n: a.tobytes() for n, a in arrays.items()
    }


def test_big_endian_and_strided_arrays_are_stored_right() -> None:
    array = np.arange(12, dtype=">f4").reshape(3, 4)[:, ::2]
    data = modelfile.encode({"w": array}, config={}, provenance={})
    np.testing.assert_array_equal(modelfile.decode(data).tensors["w"], array)


def test_write_read_describe(tmp_path: Path) -> None:
    path = tmp_path / "nuclei.safetensors"
    modelfile.write(path, tensors(), config=CONFIG, provenance=PROVENANCE)
    file, header = modelfile.read(path), modelfile.describe(path)
    assert file.config == header.config == CONFIG
    assert file.digest == header.digest
    assert header.table["x_0_0.weight"] == ("F32", (2, 1, 3, 3))
    assert header.parameters == 18 + 2 + 1
    assert header.size == path.stat().st_size
    with pytest.raises(SaveError, match="exists"):
        modelfile.write(path, tensors(), config={}, provenance={})
    assert modelfile.read(path).config == CONFIG
    modelfile.write(path, tensors(), config={}, provenance={}, overwrite=True)
    assert modelfile.read(path).config == {}


@pytest.mark.parametrize(
    ("arrays", "config"),
    [
        ({"w": np.zeros(2)}, {}),
        ({"w": np.zeros(2, bool)}, {}),
        ({"w": [1.0]}, {}),
        ({"w": np.zeros(0, np.float32)}, {}),
        ({"w": np.zeros((1,) * 6, np.float32)}, {}),
        ({"w": np.zeros(2**20 + 1, np.float16)}, {}),
        ({"": np.zeros(1, np.float32)}, {}),
        ({"a\nb": np.zeros(1, np.float32)}, {}),
        ({"__metadata__": np.zeros(1, np.float32)}, {}),
        ({f"w{i}": np.zeros(1, np.float32) for i in range(4097)}, {}),
        ({}, {}),
        ({"w": np.zeros(1, np.float32)}, {"a": float("nan")}),
        ({"w": np.zeros(1, np.float32)}, {"a": object()}),
        ({"w": np.zeros(1, np.float32)}, {"a": "\ud800"}),
        ({"w": np.zeros(1, np.float32)}, {"a": 10**19}),
        ({"w": np.zeros(1, np.float32)}, {"a": "x" * 65536}),
    ],
)
def test_what_could_not_be_read_is_not_written(
    arrays: dict[str, Any], config: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"stored|must"):
        modelfile.encode(arrays, config=config, provenance={})


def test_provenance_has_the_room_of_the_header() -> None:
    array = {"w": np.zeros(1, np.float32)}
    long = modelfile.encode(array, config={}, provenance={"log": "x" * 900_000})
    assert len(modelfile.decode(long).provenance["log"]) == 900_000
    with pytest.raises(ValueError, match="1 MiB"):
        modelfile.encode(array, config={}, provenance={"log": "x" * 1_100_000})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_not_saved(
    value: float, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(SaveError, match="NaN or infinity"):
        modelfile.write(
            path, {"w": np.array([0, value], np.float32)}, config={}, provenance={}
        )
    assert list(tmp_path.iterdir()) == []


# --- hostile files, by their number in the plan ----------------------------------


def nested(name: str) -> bytes:
    deep = b"[" * 100_000 + b"]" * 100_000
    return b'{"__metadata__":{"format":"napari-unetpp","%s":%s}}' % (
        name.encode(),
        deep,
    )


def with_metadata(good: bytes, **changes: str) -> bytes:
    header, body = split(good)
    header["__metadata__"].update(changes)
    return sealed(header, body)


def twice(good: bytes, key: bytes) -> bytes:
    """Return the file with one entry of the header given two times."""
    length = int.from_bytes(good[:8], "little")
    header, body = good[8 : 8 + length], good[8 + length :]
    value = json.dumps(json.loads(header)[key.decode()]).encode()
    return join(b'{"' + key + b'":' + value + b"," + header[1:], body)


def hole(good: bytes) -> bytes:
    header, body = split(good)
    header["half"]["data_offsets"] = [n + 8 for n in header["half"]["data_offsets"]]
    return sealed(header, body + bytes(8))


def overlap(good: bytes) -> bytes:
    header, body = split(good)
    header["half2"] = header["half"]
    return sealed(header, body)


def swapped(good: bytes, field: str) -> bytes:
    """Exchange the names, or the values of `field`, of two tensors; keep the data."""
    header, body = split(good)
    header["half2"] = {"dtype": "F16", "shape": [1, 2], "data_offsets": [0, 0]}
    end = len(body)
    header["half2"]["data_offsets"] = [end, end + 4]
    header, body = split(sealed(header, body + b"\x00\x3c\x00\x3c"))
    a, b = header["half"], header["half2"]
    if field == "name":
        header["half"], header["half2"] = b, a
    else:
        a[field], b[field] = b[field], a[field]
    return join(header, body)


def flipped(good: bytes, at: int, bit: int = 1) -> bytes:
    changed = bytearray(good)
    changed[at] ^= bit
    return bytes(changed)


def million() -> bytes:
    entry = b'"%07d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    return join(b"{" + b",".join(entry % i for i in range(1_000_000)) + b"}", bytes(4))


def too_many() -> bytes:
    header = one()
    for i in range(1, 4097):
        header[f"w{i}"] = {**header["w"], "data_offsets": [4 * i, 4 * i + 4]}
    return sealed(header, bytes(4 * 4097))


def trap() -> Any:
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
            return os.mkdir, ("the_trap_has_sprung",)

    return Trap()


def zipped(good: bytes) -> bytes:
    buffer = io.BytesIO(good)
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr("archive/data.pkl", pickle.dumps(trap()))
    return buffer.getvalue()


def torch_zip(good: bytes) -> bytes:
    del good
    return zipped(b"")


F32 = np.float32
HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "50 empty": lambda _: b"",
    "51 seven bytes": lambda g: g[:7],
    "52 length 2^63": lambda g: (2**63).to_bytes(8, "little") + g[8:],
    "53 length 2^64-1": lambda g: b"\xff" * 8 + g[8:],
    "54 length 0": lambda g: bytes(8) + g[8:],
    "55 header past the end": lambda g: len(g).to_bytes(8, "little") + g[8:],
    "56 not UTF-8": lambda _: join(b'{"\xff\xfe":1}', b""),
    "57 not JSON": lambda _: join(b"{weights", b""),
    "58 JSON array": lambda _: join(b"[1, 2]", b""),
    "59 nested header": lambda _: join(nested("config"), b""),
    "59 nested config": lambda g: with_metadata(
        g, config='{"a":' + "[" * 30_000 + "]" * 30_000 + "}"
    ),
    "59 nested a little": lambda g: with_metadata(
        g, config='{"a":' + "[" * 40 + "]" * 40 + "}"
    ),
    "60 a tensor twice": lambda g: twice(g, b"half"),
    "61 metadata twice": lambda g: twice(g, b"__metadata__"),
    "61 a setting twice": lambda g: with_metadata(g, config='{"a":1,"a":1}'),
    "62 product overflows": lambda _: sealed(one(shape=[2**16] * 4), bytes(4)),
    "62 offsets overflow": lambda _: sealed(one(data_offsets=[0, 2**64]), bytes(4)),
    "63 negative dims": lambda _: sealed(one(shape=[-1, -1]), bytes(4)),
    "63 float dims": lambda _: sealed(one(shape=[1.0]), bytes(4)),
    "63 true dims": lambda _: sealed(one(shape=[True]), bytes(4)),
    "63 text dims": lambda _: sealed(one(shape="1"), bytes(4)),
    "63 float offsets": lambda _: sealed(one(data_offsets=[0, 4.0]), bytes(4)),
    "63 three offsets": lambda _: sealed(one(data_offsets=[0, 4, 4]), bytes(4)),
    "64 dims [0, 10^18]": lambda _: sealed(
        one(shape=[0, 10**18], data_offsets=[0, 0]), b""
    ),
    "65 100,002 dims": lambda _: sealed(one(shape=[1] * 100_002), bytes(4)),
    "66 overlap": overlap,
    "67 hole": hole,
    "68 trailing bytes": lambda g: g + b"\0",
    "69 cut by one byte": lambda g: g[:-1],
    "70 unknown dtype": lambda _: sealed(one(dtype="F8_E4M3"), bytes(4)),
    "70 list as dtype": lambda _: sealed(one(dtype=["F32"]), bytes(4)),
    "71 a million tensors": lambda _: million(),
    "71 4097 tensors": lambda _: too_many(),
    "73 NaN weights": lambda _: sealed(one(), F32(np.nan).tobytes()),
    "73 infinite weights": lambda _: sealed(one(), F32(np.inf).tobytes()),
    "73 infinite BF16": lambda _: sealed(
        one(dtype="BF16", shape=[2]), b"\x80\x7f\x00\x00"
    ),
    "74 flipped bit in the data": lambda g: flipped(g, len(g) - 3),
    "75 names swapped": lambda g: swapped(g, "name"),
    "75 shapes swapped": lambda g: swapped(g, "shape"),
    "75 places swapped": lambda g: swapped(g, "data_offsets"),
    "76 other architecture": lambda g: g.replace(b"unet++", b"fcn-8s"),
    "77 pickle": lambda _: pickle.dumps(trap()),
    "77 old pickle": lambda _: pickle.dumps(trap(), protocol=0) * 9,
    "78 zip": torch_zip,
    "78 zip behind a model": zipped,
    "79 newer version": lambda g: with_metadata(g, format_version="2"),
    "version 0": lambda g: with_metadata(g, format_version="0"),
    "version of digits": lambda g: with_metadata(g, format_version="1" * 5000),
    "version in other digits": lambda g: with_metadata(g, format_version="\u0661"),
    "version of letters": lambda g: with_metadata(g, format_version="1.0"),
    "other program": lambda _: safetensors.numpy.save({"w": np.ones(3)}),
    "other format": lambda g: with_metadata(g, format="pt"),
    "unknown metadata": lambda g: with_metadata(g, author="me"),
    "no tensors": lambda _: sealed({"__metadata__": one()["__metadata__"]}, b""),
    "NaN in the settings": lambda g: with_metadata(g, config='{"a":NaN}'),
    "infinity in the settings": lambda g: with_metadata(g, config='{"a":-Infinity}'),
    "1e999 in the settings": lambda g: with_metadata(g, config='{"a":1e999}'),
    "20 digits": lambda g: with_metadata(g, config='{"a":' + "1" * 20 + "}"),
    "4301 digits": lambda g: with_metadata(g, config='{"a":' + "1" * 4301 + "}"),
    "half a character": lambda g: with_metadata(g, config='{"a":"\\ud800"}'),
    "half a character as name": lambda g: with_metadata(g, config='{"\\udc00":1}'),
    "settings are a list": lambda g: with_metadata(g, config="[]"),
    "settings are not text": lambda _: sealed(
        {**one(), "__metadata__": {**one()["__metadata__"], "config": {}}}, bytes(4)
    ),
    "65 kB of settings": lambda g: with_metadata(
        g, config='{"a":"' + "x" * 65_600 + '"}'
    ),
    "extra key of a tensor": lambda _: sealed(one(strides=[1]), bytes(4)),
    "name with NUL": lambda _: sealed({**one(), "\0": one()["w"]}, bytes(4)),
    "space before the header": lambda g: join(b" " + g[8:-80], b""),
    "checksum in capitals": lambda g: join(
        {
            **(h := split(g)[0]),
            "__metadata__": {**h["__metadata__"], "sha256": "A" * 64},
        },
        split(g)[1],
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_refused(
    case: str, good: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "nuclei.safetensors"
    content = HOSTILE[case](good)
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as error:
            modelfile.read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60e6
    message = str(error.value)
    assert message.startswith("`nuclei.safetensors` ")
    assert len(message) < 400
    assert message.isprintable()
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == content


# Why each is refused: a case that fails at another check would test nothing.
REASONS = {
    "it has only": ["50 empty", "51 seven bytes"],
    "is longer than": [
        "52 length 2^63", "53 length 2^64-1", "71 a million tensors", "77 old pickle",
    ],
    "does not fit": ["54 length 0", "55 header past the end"],
    "not text": ["56 not UTF-8", "settings are not text"],
    "header is not valid JSON": [
        "57 not JSON", "60 a tensor twice", "61 metadata twice", "62 offsets overflow",
    ],
    "does not start as a table": ["58 JSON array", "space before the header"],
    "header is n": ["59 nested header"],
    "config is n": ["59 nested config"],
    "nested too deeply": ["59 nested a little"],
    "config is not valid JSON": [
        "61 a setting twice", "NaN in the settings", "infinity in the settings",
        "1e999 in the settings", "20 digits", "4301 digits",
    ],
    "agree with its size": ["62 product overflows"],
    "side of a tensor": [
        "63 negative dims", "63 float dims", "63 true dims", "64 dims [0, 10^18]",
    ],
    "more than 5 axes": ["63 text dims", "65 100,002 dims"],
    "impossible place": ["63 float offsets"],
    "no place": ["63 three offsets"],
    "overlap or leave a hole": ["66 overlap", "67 hole"],
    "bytes of weights": [
        "68 trailing bytes", "69 cut by one byte", "78 zip behind a model",
    ],
    "none of F32": ["70 unknown dtype", "70 list as dtype"],
    "tensors, allowed": ["71 4097 tensors", "no tensors"],
    "NaN or infinity": [
        "73 NaN weights", "73 infinite weights", "73 infinite BF16",
    ],
    "does not agree with its content": [
        "74 flipped bit in the data", "75 names swapped", "75 shapes swapped",
        "75 places swapped", "76 other architecture",
    ],
    "can run code": ["77 pickle", "78 zip"],
    "newer version": ["79 newer version"],
    "no format version 0": ["version 0"],
    "version is not a number": [
        "version of digits", "version in other digits", "version of letters",
    ],
    "not written by napari-unetpp": ["other program", "other format"],
    "unknown entries": ["unknown metadata"],
    "half a character": ["half a character", "half a character as name"],
    "config is not a table": ["settings are a list"],
    "64 kB": ["65 kB of settings"],
    "not complete": ["extra key of a tensor"],
    "name of a tensor": ["name with NUL"],
    "not a SHA-256": ["checksum in capitals"],
}  # fmt: skip


def test_each_hostile_file_has_its_reason() -> None:
    assert sorted(case for cases in REASONS.values() for case in cases) == sorted(
        HOSTILE
    )


@pytest.mark.parametrize(
    ("reason", "case"),
    [(why, case) for why, cases in REASONS.items() for case in cases],
)
def test_hostile_bytes_are_refused(reason: str, case: str, good: bytes) -> None:
    with pytest.raises(ModelFileError, match=reason):
        modelfile.decode(HOSTILE[case](good))


@pytest.mark.parametrize("change", ["data", "name", "shape", "config"])
def test_a_file_that_is_wrong_in_its_checksum_only_is_refused(
    change: str, good: bytes
) -> None:
    header, body = split(good)
    if change == "data":
        body = flipped(body, len(body) - 1, 0x80)
    elif change == "name":
        header["x_0_1.weight"] = header.pop("x_0_0.weight")
    elif change == "shape":
        header["x_0_0.weight"]["shape"] = [2, 9]
    else:
        header["__metadata__"]["config"] = "{}"
    with pytest.raises(ModelFileError, match="checksum"):
        modelfile.decode(join(header, body))
    modelfile.decode(sealed(header, body))


@pytest.mark.skipif(os.name == "nt", reason="needs sparse files")
@pytest.mark.parametrize("size", [2**40, 2**30])
def test_sparse_file_is_refused_without_reading_it(
    size: int, good: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "nuclei.safetensors"
    path.write_bytes(good)
    os.truncate(path, size)
    tracemalloc.start()
    try:
        for reader in (modelfile.read, modelfile.describe):
            with pytest.raises(ModelFileError, match=r"GiB|never written"):
                reader(path)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("reader", [modelfile.read, modelfile.describe])
def test_what_is_no_file_is_refused(reader: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no file `none"):
        reader(tmp_path / "none.safetensors")
    with pytest.raises(ModelFileError, match="folder"):
        reader(tmp_path)
    with pytest.raises(ModelFileError, match="cannot be opened"):
        reader(str(tmp_path / "a\0b"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_and_device_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="pipe"):
        modelfile.read(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="device"):
        modelfile.read("/dev/zero")


def test_messages_say_what_to_do(good: bytes) -> None:
    def message(data: bytes) -> str:
        with pytest.raises(ModelFileError) as error:
            modelfile.decode(data)
        return str(error.value)

    assert "Copy it once more" in message(good[:-1])
    newer = message(with_metadata(good, format_version="2"))
    assert "newer version" in newer
    assert "Update" in newer
    assert "run code" in message(torch_zip(good))
    assert "run code" in message(pickle.dumps("x" * 99))
    assert "not written by napari-unetpp" in message(
        safetensors.numpy.save({"w": np.ones(3)})
    )


def test_a_newer_file_is_told_even_if_it_holds_new_things(good: bytes) -> None:
    header, body = split(good)
    header["half"]["dtype"] = "F4"
    header["__metadata__"] |= {"format_version": "3", "licence": "new"}
    with pytest.raises(ModelFileError, match="newer version"):
        modelfile.decode(sealed(header, body))


# --- any damage ------------------------------------------------------------------


def small() -> bytes:
    arrays = {"w": np.array([[1, -2]], np.float32), "n": np.array(3, np.int64)}
    return modelfile.encode(arrays, config={"levels": 4}, provenance={"v": "1"})


SMALL = small()


def test_every_cut_is_refused() -> None:
    for length in range(len(SMALL)):
        with pytest.raises(ModelFileError):
            modelfile.decode(SMALL[:length])


def assert_refused_or_same(data: bytes) -> None:
    try:
        found = modelfile.decode(data)
    except ModelFileError:
        return
    assert same(found, modelfile.decode(SMALL))


def test_every_flipped_bit_is_refused_or_changes_nothing() -> None:
    for at in range(len(SMALL)):
        for bit in range(8):
            assert_refused_or_same(flipped(SMALL, at, 1 << bit))


@settings(max_examples=300)
@given(st.integers(0, len(SMALL) - 1), st.integers(0, 255))
def test_every_changed_byte_is_refused_or_changes_nothing(at: int, value: int) -> None:
    changed = bytearray(SMALL)
    changed[at] = value
    assert_refused_or_same(bytes(changed))


@settings(max_examples=300)
@given(st.data())
def test_pieces_moved_about_are_refused_or_change_nothing(data: st.DataObject) -> None:
    places = st.integers(0, len(SMALL))
    a, b, c = sorted(data.draw(st.tuples(places, places, places)))
    kind = data.draw(st.sampled_from(["swap", "drop", "double", "insert"]))
    pieces = {
        "swap": SMALL[:a] + SMALL[b:c] + SMALL[a:b] + SMALL[c:],
        "drop": SMALL[:a] + SMALL[b:],
        "double": SMALL[:b] + SMALL[a:],
        "insert": SMALL[:a] + data.draw(st.binary(max_size=9)) + SMALL[a:],
    }
    assert_refused_or_same(pieces[kind])


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["F32", "F16", "BF16", "I64", "1", "{}", "napari-unetpp"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(st.data(), st.binary(max_size=16))
def test_lying_headers_are_refused_or_true(data: st.DataObject, body: bytes) -> None:
    header = one()
    for _ in range(data.draw(st.integers(0, 3))):
        where = data.draw(
            st.sampled_from([header, header["w"], header["__metadata__"]])
        )
        if where is header or not isinstance(where, dict):
            header[data.draw(st.text(max_size=3))] = data.draw(values)
        else:
            where[data.draw(st.sampled_from([*where, "extra"]))] = data.draw(values)
    try:
        content = sealed(header, body)
    except (TypeError, UnicodeEncodeError):
        return
    try:
        file = modelfile.decode(content)
    except ModelFileError:
        return
    assert all(np.isfinite(array).all() for array in file.tensors.values())
    assert set(file.tensors) == set(header) - {"__metadata__"}


# --- names -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["nucleus", "Zellkern ü", "細胞 核", "a" * 64, "<b>", "👩\u200d🔬", "x²"]
)
def test_plain_names_pass(text: str) -> None:
    assert modelfile.check_text("classes", text) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "  ", "a" * 65, "a\nb", "a\0", "\u202eabc", "\u2066abc", "\ud800",
        "a\u2028b", "\x1b[31m", "\ufeffa", "x" * 10_000_000, None, 3, b"a", ["a"],
    ],
)  # fmt: skip
def test_other_names_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="classes") as error:
        modelfile.check_text("classes", text)
    assert len(str(error.value)) < 1000
    assert str(error.value).isprintable()
