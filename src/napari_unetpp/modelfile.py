"""The model file: named tensors and their settings to and from bytes, nothing else."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import unicodedata
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from napari_unetpp import io
from napari_unetpp.errors import ModelFileError, SaveError

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = "napari-unetpp"
FORMAT_VERSION = 1
# A checkpoint is a model file with more: these tensors, and a table of this name in
# `extra`. Whoever wants the model alone leaves them out.
STATE = "training"

MAX_FILE = 2 * 1024**3
MAX_HEADER = 1024**2
MAX_CONFIG = 64 * 1024
MAX_TENSORS = 4096
MAX_RANK = 5
MAX_DIM = 2**20
MAX_DEPTH = 32
MAX_DIGITS = 19
MAX_TEXT = 64

# BF16 has no numpy type: its two bytes are the upper half of a float32.
_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
_CODES = {"float32": "F32", "float16": "F16", "int64": "I64"}
_METADATA = ("format", "format_version", "config", "provenance", "sha256")
_FOREIGN = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class ModelHeader:
    """What a model file says about itself; the weights are neither read nor verified.

    Attributes
    ----------
    config, provenance, extra : dict
        JSON-able values, as given to `encode`.
    digest : str
        The SHA-256 that the file claims, 64 hexadecimal digits.
    table : dict of str to (str, tuple of int)
        Data type ("F32", "F16", "BF16", "I64") and shape of every tensor.
    parameters, size : int
        Numbers in all tensors together, and bytes of the file.
    """

    config: dict[str, Any]
    provenance: dict[str, Any]
    extra: dict[str, Any]
    digest: str
    table: dict[str, tuple[str, tuple[int, ...]]]
    parameters: int
    size: int


@dataclass(frozen=True)
class ModelFile:
    """The verified content of a model file.

    Attributes
    ----------
    tensors : dict of str to ndarray
        Writable arrays of float32, float16 or int64; BF16 has become float32.
    config, provenance, extra : dict
        JSON-able values, as given to `encode`.
    digest : str
        SHA-256 over names, types, shapes, settings and data, 64 hexadecimal digits.
    """

    tensors: dict[str, np.ndarray] = field(repr=False)
    config: dict[str, Any]
    provenance: dict[str, Any]
    extra: dict[str, Any]
    digest: str

    def without_state(self) -> ModelFile:
        """Return the model alone, of a checkpoint the one that was shown."""
        start = f"{STATE}."
        own = {k: v for k, v in self.tensors.items() if not k.startswith(start)}
        rest = {k: v for k, v in self.extra.items() if k != STATE}
        return replace(self, tensors=own, extra=rest)


@dataclass(frozen=True)
class _Parsed:
    """A header that passed every check; `table` and `metadata` as they stand there."""

    table: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    settings: dict[str, dict[str, Any]]


class _Refusal(Exception):
    """Why a file is refused, before it is known which file that is."""


class _NotOurs(_Refusal):
    """The file is whole, but nothing that this version opens; says so itself."""


# --- writing ---------------------------------------------------------------------


def encode(
    tensors: Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
) -> bytes:
    """Return the bytes of a model file, readable by every safetensors library too.

    Parameters
    ----------
    tensors : mapping of str to ndarray
        float32, float16 or int64, at most 5 axes, none empty, all numbers finite.
    config : mapping
        JSON-able settings, at most 64 kB as JSON.
    provenance : mapping
        JSON-able: where the weights come from.
    extra : mapping, optional
        JSON-able: anything else that must travel along.

    Raises
    ------
    ValueError
        If a tensor or a setting cannot be stored in this format.
    SaveError
        If a tensor holds NaN or infinity: such a model would predict nonsense.
    """
    arrays = {name: _little_endian(name, a) for name, a in tensors.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "config": _dump("config", config),
        "provenance": _dump("provenance", provenance),
    }
    if extra:
        metadata["extra"] = _dump("extra", extra)
    # Wide types first, so that every tensor starts at a multiple of its item size.
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    table, end = {}, 0
    for name in order:
        array = arrays[name]
        table[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    data = [arrays[name].tobytes() for name in order]
    metadata["sha256"] = _digest(table, metadata, data)
    whole = {"__metadata__": metadata, **table}
    header = json.dumps(whole, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    try:
        _parse_header(header, end)
    except _Refusal as error:
        raise ValueError(f"This model cannot be stored: {error}.") from None
    return b"".join([len(header).to_bytes(8, "little"), header, *data])


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model file, all or nothing; see `encode` and `io.atomic_write`.

    Raises
    ------
    ValueError
        If a tensor or a setting cannot be stored in this format.
    SaveError
        If the file exists and `overwrite` is False, or cannot be written.
    """
    data = encode(tensors, config=config, provenance=provenance, extra=extra)
    io.atomic_write(path, data, overwrite=overwrite)


def _little_endian(name: str, array: np.ndarray) -> np.ndarray:
    found = getattr(array, "dtype", type(array).__name__)
    if getattr(found, "name", None) not in _CODES:
        raise ValueError(
            f"Tensor {name!r} must be an array of {', '.join(_CODES)}, got {found}."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise SaveError(
            f"The weights {name!r} hold NaN or infinity, so this model was not saved. "
            "Train again with a lower learning rate."
        )
    # Not ascontiguousarray, which turns a scalar into an array of one axis.
    return np.asarray(array, dtype=_DTYPES[_CODES[array.dtype.name]], order="C")


def _dump(name: str, values: Mapping[str, Any]) -> str:
    try:
        return json.dumps(
            dict(values), separators=(",", ":"), allow_nan=False, ensure_ascii=False
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`{name}` must hold JSON values only: {error}.") from None


def _digest(
    table: dict[str, dict[str, Any]],
    metadata: dict[str, str],
    data: list[bytes] | list[memoryview],
) -> str:
    """Return SHA-256 over everything that changes what the model does."""
    named = {key: value for key, value in metadata.items() if key != "sha256"}
    canonical = json.dumps([table, named], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()


# --- reading ---------------------------------------------------------------------


def decode(data: bytes, *, name: str = "This model file") -> ModelFile:
    """Return the verified content of a model file; never runs code from it.

    Parameters
    ----------
    data : bytes
        The whole file.
    name : str
        What the messages call it.

    Raises
    ------
    ModelFileError
        If anything at all is not as `encode` would have written it.
    """
    try:
        return _decode(data)
    except _Refusal as error:
        raise _named(error, name) from None


def read(path: str | os.PathLike[str]) -> ModelFile:
    """Read and verify a model file: opened once, never mapped into memory.

    Raises
    ------
    ModelFileError
        If the file is missing, damaged, too large, not a model file or newer than we.
    """
    name = f"`{io.shown(path)}`"
    with io.opened(path, ModelFileError) as (file, stat):
        try:
            _check_stat(file, stat)
            _read_header(file, stat.st_size)
            file.seek(0)
            # One byte more than promised shows a file that grows meanwhile.
            data = file.read(stat.st_size + 1)
        except _Refusal as error:
            raise _named(error, name) from None
    return decode(data, name=name)


def describe(path: str | os.PathLike[str]) -> ModelHeader:
    """Read what a model file says about itself, without reading the weights.

    Raises
    ------
    ModelFileError
        If the header is missing, damaged, not a model file's or newer than we.
    """
    with io.opened(path, ModelFileError) as (file, stat):
        try:
            _check_stat(file, stat)
            parsed = _read_header(file, stat.st_size)
        except _Refusal as error:
            raise _named(error, f"`{io.shown(path)}`") from None
    table = {n: (e["dtype"], tuple(e["shape"])) for n, e in parsed.table.items()}
    return ModelHeader(
        **parsed.settings,
        digest=parsed.metadata["sha256"],
        table=table,
        parameters=sum(math.prod(shape) for _, shape in table.values()),
        size=stat.st_size,
    )


def check_text(name: str, value: object) -> str:
    """Return `value` if it is plain text that is safe to show.

    Parameters
    ----------
    name : str
        What the message calls it.
    value : object
        A text of 1 to 64 characters, not only spaces, without control characters and
        without marks that change the direction of reading.

    Raises
    ------
    ValueError
        If it is anything else.
    """
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text, got {value!r:.80}.")
    # The two joiners are letters of Persian, Hindi and of composed emoji.
    letters = value[:MAX_TEXT].replace("\u200c", "").replace("\u200d", "")
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"} & set(map(unicodedata.category, letters))
    if hidden or not value.strip() or len(value) > MAX_TEXT:
        raise ValueError(
            f"`{name}` must be plain text of 1 to {MAX_TEXT} characters without "
            "control characters or direction marks, "
            f"got {value[:MAX_TEXT]!a}. Choose a plain name."
        )
    return value


def _named(error: _Refusal, name: str) -> ModelFileError:
    if isinstance(error, _NotOurs):
        return ModelFileError(f"{name} {error}")
    return ModelFileError(
        f"{name} is damaged: {error}. Copy it once more, or ask for it again."
    )


def _check_stat(file: BinaryIO, stat: os.stat_result) -> None:
    _check_size(stat.st_size)
    blocks = getattr(stat, "st_blocks", None)
    if sys.platform == "win32" or blocks is None or blocks * 512 * 2 >= stat.st_size:
        return
    # Compressing and network file systems report few blocks for whole files: only a
    # hole in the file proves that most of it was never written.
    if file.seek(0, os.SEEK_HOLE) < stat.st_size:
        raise _Refusal("most of it was never written to the disk")
    file.seek(0)


def _check_size(size: int) -> None:
    if size < 8:
        raise _Refusal(f"it has only {size} bytes")
    if size > MAX_FILE:
        raise _Refusal(f"it claims {size:,} bytes, more than any model has (2 GiB)")


def _read_header(file: BinaryIO, size: int) -> _Parsed:
    file.seek(0)
    start = file.read(8)
    length = _header_length(start, size)
    return _parse_header(file.read(length), size - 8 - length)


def _header_length(start: bytes, size: int) -> int:
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:  # shorter ones may begin as those files do: 640 is 80 02
        if start.startswith(_FOREIGN):
            raise _NotOurs(
                "was not opened: PyTorch files (.pt, .pth, .ckpt) and zip files can "
                "run code when they are opened. Ask for the model as a .safetensors "
                "file."
            )
        raise _Refusal(
            "its header is longer than any model's (1 MiB), or it is no model file"
        )
    if length < 2 or length > size - 8:
        raise _Refusal(f"its header of {length} bytes does not fit into {size} bytes")
    return length


def _parse_header(header: bytes, room: int) -> _Parsed:
    """Check the header alone; `room` is the number of bytes that follow it."""
    if len(header) > MAX_HEADER:
        raise _Refusal(f"its header has {len(header):,} bytes, allowed are 1 MiB")
    if header[:1] != b"{":
        raise _Refusal("its header does not start as a table, or it is no model file")
    try:
        table = _strict_json("header", header.decode("utf-8"))
    except UnicodeDecodeError:
        raise _Refusal("its header is not text") from None
    metadata = table.pop("__metadata__", None)
    settings = _check_metadata(metadata)
    if not 1 <= len(table) <= MAX_TENSORS:
        raise _Refusal(f"it has {len(table):,} tensors, allowed are 1 to {MAX_TENSORS}")
    for name, entry in table.items():
        _check_entry(name, entry)
    _check_cover(table, room)
    return _Parsed(table, metadata, settings)


def _check_metadata(metadata: Any) -> dict[str, dict[str, Any]]:
    """Return the settings that the metadata carry as JSON."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise _NotOurs("was not written by napari-unetpp, so it cannot be opened here.")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise _Refusal("its metadata are not text")
    version = metadata.get("format_version", "")
    if not (version.isascii() and version.isdigit() and len(version) <= 4):
        raise _Refusal("its format version is not a number")
    if int(version) > FORMAT_VERSION:
        raise _NotOurs(
            f"was written by a newer version of napari-unetpp (file format {version}, "
            f"this version reads up to {FORMAT_VERSION}). Update napari-unetpp."
        )
    if version != str(FORMAT_VERSION):
        raise _Refusal(f"there is no format version {version}")
    missing = sorted(set(_METADATA) - set(metadata))
    unknown = sorted(set(metadata) - {*_METADATA, "extra"})
    if missing or unknown:
        raise _Refusal(f"its metadata lack {missing} or have unknown entries")
    digest = metadata["sha256"]
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise _Refusal("its checksum is not a SHA-256")
    if len(metadata["config"].encode("utf-8")) > MAX_CONFIG:
        raise _Refusal("its settings are longer than 64 kB")
    names = ("config", "provenance", "extra")
    return {name: _strict_json(name, metadata.get(name, "{}")) for name in names}


def _check_entry(name: str, entry: Any) -> None:
    """Check one tensor of the table alone."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _Refusal("the entry of a tensor is not complete")
    shape, offsets, code = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not isinstance(shape, list) or len(shape) > MAX_RANK:
        raise _Refusal(f"a tensor has more than {MAX_RANK} axes")
    if not all(type(n) is int and 1 <= n <= MAX_DIM for n in shape):
        raise _Refusal(f"the side of a tensor is not a whole number up to {MAX_DIM}")
    if not isinstance(code, str) or code not in _DTYPES:
        raise _Refusal(f"a tensor is none of {', '.join(_DTYPES)}")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise _Refusal("a tensor has no place in the file")
    if not all(type(n) is int and 0 <= n <= MAX_FILE for n in offsets):
        raise _Refusal("a tensor has an impossible place in the file")
    size = math.prod(shape) * np.dtype(_DTYPES[code]).itemsize
    if size != offsets[1] - offsets[0]:
        raise _Refusal("the shape of a tensor does not agree with its size")
    if not name or len(name) > 256 or not name.isprintable():
        raise _Refusal("the name of a tensor is not plain text of 1 to 256 characters")


def _check_cover(table: dict[str, dict[str, Any]], room: int) -> None:
    """Check that the tensors lie one after the other, up to the end of the file."""
    end = 0
    for start, stop in sorted(tuple(e["data_offsets"]) for e in table.values()):
        if start != end:
            raise _Refusal("its tensors overlap or leave a hole")
        end = stop
    if end != room:
        raise _Refusal(f"it has {room:,} bytes of weights where {end:,} are needed")


def _decode(data: bytes) -> ModelFile:
    _check_size(len(data))
    length = _header_length(data[:8], len(data))
    parsed = _parse_header(data[8 : 8 + length], len(data) - 8 - length)
    body = memoryview(data)[8 + length :]
    if _digest(parsed.table, parsed.metadata, [body]) != parsed.metadata["sha256"]:
        raise _Refusal("its checksum (SHA-256) does not agree with its content")
    tensors = {name: _array(body, entry) for name, entry in parsed.table.items()}
    return ModelFile(tensors, **parsed.settings, digest=parsed.metadata["sha256"])


def _array(body: memoryview, entry: dict[str, Any]) -> np.ndarray:
    """Return a writable copy of one tensor."""
    start, stop = entry["data_offsets"]
    raw = np.frombuffer(body[start:stop], _DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":
        array = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    else:
        array = raw.astype(raw.dtype.newbyteorder("="))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise _Refusal("its weights hold NaN or infinity")
    return array.reshape(entry["shape"])


# --- strict JSON -----------------------------------------------------------------


def parse_json(name: str, data: bytes) -> dict[str, Any]:
    """Parse a JSON table as strictly as a model file's own; else ValueError."""
    try:
        return _strict_json(name, data.decode("utf-8"))
    except (_Refusal, UnicodeDecodeError) as error:
        raise ValueError(f"{error}") from None


def _strict_json(name: str, text: str) -> dict[str, Any]:
    """Parse a JSON table and refuse all that Python's parser lets through."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_short_int,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except (ValueError, RecursionError):
        raise _Refusal(f"its {name} is not valid JSON") from None
    if not isinstance(value, dict):
        raise _Refusal(f"its {name} is not a table")
    _check_plain(name, value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("the same name twice")
    return table


def _short_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError("too many digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("not a finite number")
    return value


def _check_plain(name: str, table: dict[str, Any]) -> None:
    """Refuse deep nesting and texts that no file can hold."""
    waiting: list[tuple[Any, int]] = [(table, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _Refusal(f"its {name} is nested too deeply")
        if isinstance(value, dict):
            waiting += [(v, depth + 1) for item in value.items() for v in item]
        elif isinstance(value, list):
            waiting += [(v, depth + 1) for v in value]
        elif isinstance(value, str) and not _encodable(value):
            raise _Refusal(f"its {name} holds half a character")


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
