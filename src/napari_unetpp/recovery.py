"""Annotations kept apart from the user's files, so that no crash takes a stroke.

A file is a magic line, a line of JSON, the non-empty blocks of the labels as one zlib
stream, and the SHA-256 of all that. Each layer has two files, written in turn: whatever
happens to one, the other is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import threading
import time
import weakref
import zlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import platformdirs

from napari_unetpp import checkpoint
from napari_unetpp.errors import ModelFileError, RecoveryFileError
from napari_unetpp.io.files import atomic_write, opened, shown
from napari_unetpp.io.lock import take

if TYPE_CHECKING:
    from numpy.typing import NDArray

FOLDER = "NAPARI_UNETPP_RECOVERY"  # environment variable: where the files are kept
MOST = 2 * 10**9  # bytes of all files together
DAYS = 30  # after which a file is removed

_MAGIC = b"napari-unetpp recovery 1\n"
_BLOCK = 2**16  # pixels, in C order
_HEADER = 2**22  # bytes
_LARGEST = 2**36  # bytes of labels in memory
_RATIO = 1032  # zlib cannot do better
_DTYPES = {f"{kind}{size}" for kind in "ui" for size in (1, 2, 4, 8)}
_SUFFIX = ".strokes"
_TRAINING = ".training.safetensors"  # a checkpoint


@dataclass(frozen=True)
class Note:
    """What is known of an annotation beside its pixels.

    Parameters
    ----------
    layer : str
        Identifies the layer for ever: 32 hexadecimal digits.
    name, image, path : str
        Of the layer, of its image and of the image's file; "" where unknown.
    classes, colours : tuple of str
        Of values 1, 2, ...
    scale, translate : tuple of float
        Of the layer; () as napari has it by default.
    """

    layer: str
    name: str
    image: str = ""
    path: str = ""
    classes: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()
    scale: tuple[float, ...] = ()
    translate: tuple[float, ...] = ()
    time: float = 0.0
    session: str = ""
    serial: int = 0
    painted: int = 0


class Packed(NamedTuple):
    """Labels as they are written."""

    shape: tuple[int, ...]
    dtype: str
    runs: list[list[int]]  # first block and number of blocks
    payload: bytes
    painted: int
    digest: str  # of the content


class Offer(NamedTuple):
    """Unsaved work of a session that has ended."""

    path: Path
    note: Note
    shape: tuple[int, ...]


class Training(NamedTuple):
    """A training whose model was not saved when its session ended."""

    path: Path
    time: float
    steps: int


def recovery_folder() -> Path:
    """Return where recovery files are kept; it need not exist."""
    own = os.environ.get(FOLDER)
    if own:
        return Path(own)
    return platformdirs.user_data_path("napari-unetpp", appauthor=False) / "recovery"


def pack(labels: NDArray[Any]) -> Packed:
    """Compress labels, the empty blocks left out."""
    flat = np.asarray(labels).reshape(-1)
    dtype = flat.dtype.newbyteorder("<")
    code = f"{dtype.kind}{dtype.itemsize}"
    if code not in _DTYPES:
        raise RecoveryFileError(
            f"Labels that are kept must be whole numbers, got {labels.dtype}."
        )
    press, digest = zlib.compressobj(1), hashlib.sha256()
    digest.update(f"{labels.shape} {code}".encode())
    runs: list[list[int]] = []
    parts: list[bytes] = []
    painted = 0
    for number, start in enumerate(range(0, flat.size, _BLOCK)):
        part = flat[start : start + _BLOCK]
        if not part.any():
            continue
        block = part.astype(dtype)  # the user may paint meanwhile: read once
        raw = block.tobytes()
        painted += int(np.count_nonzero(block))
        digest.update(number.to_bytes(8, "little") + raw)
        parts.append(press.compress(raw))
        if runs and sum(runs[-1]) == number:
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    parts.append(press.flush())
    payload = b"".join(parts)
    shape = tuple(int(n) for n in labels.shape)
    return Packed(shape, code, runs, payload, painted, digest.hexdigest())


def to_bytes(note: Note, packed: Packed) -> bytes:
    """Return the content of a recovery file."""
    header = {
        **asdict(replace(note, painted=packed.painted)),
        "shape": packed.shape,
        "dtype": packed.dtype,
        "runs": packed.runs,
    }
    text = json.dumps(header, allow_nan=False).encode("ascii") + b"\n"
    whole = _MAGIC + text + packed.payload
    return whole + hashlib.sha256(whole).digest()


def from_bytes(data: bytes, name: str = "file") -> tuple[Note, NDArray[Any]]:
    """Return what a recovery file holds; see `read`."""
    note, header, start = _parsed(data, name)
    shape, dtype = tuple(header["shape"]), np.dtype("<" + header["dtype"])
    try:
        flat = np.zeros(math.prod(shape), dtype)
        _unpack(flat, header["runs"], memoryview(data)[start:-32])
    except (zlib.error, _BadError) as error:
        raise _damaged(name, str(error)) from None
    except MemoryError:
        raise RecoveryFileError(
            f"`{name}` needs {math.prod(shape) * dtype.itemsize / 1e9:.1f} GB of "
            "memory. Close other programs and try again."
        ) from None
    return note, flat.reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def read(path: Path) -> tuple[Note, NDArray[Any]]:
    """Read a recovery file.

    Raises
    ------
    RecoveryFileError
        If it is damaged, lies about itself, or cannot be opened.
    """
    return from_bytes(_content(path), shown(path))


class _BadError(ValueError):
    """Something in the file is not as it must be."""


def _damaged(name: str, why: str) -> RecoveryFileError:
    error = RecoveryFileError(f"The recovery file `{name}` is damaged: {why[:100]}.")
    error.damaged = True
    return error


def _content(path: Path) -> bytes:
    with opened(path, RecoveryFileError) as (file, stat):
        if stat.st_size > MOST:
            raise _damaged(shown(path), f"it has {stat.st_size} bytes, at most {MOST}")
        return file.read(MOST)


def _parsed(data: bytes, name: str) -> tuple[Note, dict[str, Any], int]:
    """Check all that can be checked without memory for the labels."""
    end = data.find(b"\n", len(_MAGIC), len(_MAGIC) + _HEADER)
    if not data.startswith(_MAGIC) or end < 0 or len(data) < end + 33:
        raise _damaged(name, "it does not begin or end as it must")
    if hashlib.sha256(memoryview(data)[:-32]).digest() != data[-32:]:
        raise _damaged(name, "its checksum does not agree")
    try:
        header = json.loads(data[len(_MAGIC) : end])
        note = _note(header)
        _check_sizes(header, len(data) - 33 - end)
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(name, f"its header is wrong ({error})") from None
    return note, header, end + 1


def _note(header: Any) -> Note:
    names = [field.name for field in fields(Note)]
    if not isinstance(header, dict) or {*header} != {*names, "shape", "dtype", "runs"}:
        raise _BadError("other keys than agreed")
    strings = ("layer", "name", "image", "path", "session")
    if not all(isinstance(header[k], str) and len(header[k]) < 5000 for k in strings):
        raise _BadError("a text is none")
    if not all(re.fullmatch("[0-9a-f]{32}", header[k]) for k in ("layer", "session")):
        raise _BadError("an identity is none")
    for key, kind in (("classes", str), ("colours", str), ("scale", float)):
        if not _list_of(header[key], kind, 255):
            raise _BadError(key)
    if not _list_of(header["translate"], float, 255):
        raise _BadError("translate")
    if not all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in header["colours"]):
        raise _BadError("a colour is none")
    if not all(value > 0 for value in header["scale"]):
        raise _BadError("scale")
    if not (_list_of([header["time"]], float, 1) and 0 <= header["time"] < 1e11):
        raise _BadError("time")
    if not all(_whole(header[k], 0, 2**53) for k in ("serial", "painted")):
        raise _BadError("a number is none")
    values: dict[str, Any] = {name: header[name] for name in names}
    values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    return Note(**values)


def _check_sizes(header: dict[str, Any], payload: int) -> None:
    shape, dtype, runs = header["shape"], header["dtype"], header["runs"]
    if not (isinstance(shape, list) and 1 <= len(shape) <= 8):
        raise _BadError("shape")
    if not all(_whole(n, 1, 2**40) for n in shape) or dtype not in _DTYPES:
        raise _BadError("shape or dtype")
    for key in ("scale", "translate"):
        if len(header[key]) not in (0, len(shape)):
            raise _BadError(key)
    item, size = int(dtype[1:]), math.prod(shape)
    if size * item > _LARGEST or header["painted"] > size:
        raise _BadError("too large")
    end, blocks = 0, -(-size // _BLOCK)
    if not isinstance(runs, list):
        raise _BadError("runs")
    for run in runs:
        if not (isinstance(run, list) and len(run) == 2):
            raise _BadError("runs")
        if not (_whole(run[0], end, blocks) and _whole(run[1], 1, blocks - run[0])):
            raise _BadError("runs")
        end = sum(run)
    raw = (sum(run[1] for run in runs) - 1) * _BLOCK * item
    if raw > _RATIO * payload:
        raise _BadError("more blocks than its bytes can hold")


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _list_of(value: object, kind: type, most: int) -> bool:
    if not isinstance(value, list) or len(value) > most:
        return False
    if kind is str:
        return all(isinstance(v, str) and len(v) <= 1000 for v in value)
    return all(type(v) in (int, float) and abs(v) < 1e300 for v in value)


def _unpack(
    flat: NDArray[Any], runs: list[list[int]], payload: bytes | memoryview
) -> None:
    """Fill `flat`, block by block: never more memory than a block beside it."""
    stream, rest = zlib.decompressobj(), bytes(payload)
    for first, number in runs:
        for block in range(first, first + number):
            part = flat[block * _BLOCK : (block + 1) * _BLOCK]
            raw = b""
            while len(raw) < part.nbytes:
                more = stream.decompress(rest, part.nbytes - len(raw))
                rest = stream.unconsumed_tail
                if not more:
                    raise _BadError("pixels are missing")
                raw += more
            part[:] = np.frombuffer(raw, flat.dtype)
    if stream.decompress(rest, 1) or not stream.eof or stream.unused_data:
        raise _BadError("there is something behind the pixels")


class Store:
    """The recovery files, as one session sees them.

    Parameters
    ----------
    folder : Path, optional
        Where they are; the user's if not given.

    Raises
    ------
    OSError
        From `save`, if the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or recovery_folder()
        self.session = secrets.token_hex(16)
        self._lock: weakref.finalize[Any, Any] | None = None
        self._serials: dict[str, int] = {}
        self._trainings = 0
        self._opening = threading.Lock()

    def save(self, note: Note, packed: Packed) -> None:
        """Write an annotation; the file before it stays."""
        self._open()
        serial = self._serials.get(note.layer)
        if serial is None:
            serial = max((n.serial for n in self._notes(note.layer)), default=0)
        note = replace(note, serial=serial + 1, session=self.session, time=time.time())
        path = self.folder / f"{note.layer}-{note.serial % 2}{_SUFFIX}"
        atomic_write(path, to_bytes(note, packed), overwrite=True)
        self._serials[note.layer] = note.serial
        self._keep_small(path)

    def _notes(self, layer: str) -> list[Note]:
        found = []
        for path in self.folder.glob(f"{layer}-?{_SUFFIX}"):
            with contextlib.suppress(RecoveryFileError):
                found.append(_parsed(_content(path), shown(path))[0])
        return found

    def has(self, layer: str) -> bool:
        """Return whether there is a file of this layer."""
        return any(self.folder.glob(f"{layer}-?{_SUFFIX}"))

    def forget(self, layer: str) -> None:
        """Remove the files of a layer that is safe elsewhere, or not wanted."""
        for path in self.folder.glob(f"{layer}-?{_SUFFIX}"):
            path.unlink(missing_ok=True)

    def offers(self) -> tuple[list[Offer], list[str]]:
        """Return what ended sessions left, newest first, and the damaged files.

        Those are renamed to end on ".bad", so that each is told once.
        """
        self._tidy()
        best: dict[str, Offer] = {}
        bad = []
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            try:
                note, header, _ = _parsed(_content(path), shown(path))
            except RecoveryFileError as error:
                if error.damaged:
                    bad.append(shown(path))
                    with contextlib.suppress(OSError):
                        path.replace(path.with_suffix(".bad"))
                continue
            old = best.get(note.layer)
            if old is None or old.note.serial < note.serial:
                best[note.layer] = Offer(path, note, tuple(header["shape"]))
        found = [
            o
            for o in best.values()
            if o.note.painted and not self._lives(o.note.session)
        ]
        return sorted(found, key=lambda o: -o.note.time), bad

    def new_training(self) -> Path:
        """Return the checkpoint file of a training that begins.

        That of the training before stays: until the new one has written its first
        checkpoint, there is no other.

        Raises
        ------
        OSError
            If nothing can be written there; a training goes on without, then.
        """
        self._open()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(self.folder, os.W_OK):
            raise PermissionError(f"`{shown(self.folder)}` is write-protected.")
        self._trainings += 1
        for number in range(1, self._trainings - 1):
            self.forget_training(self.folder / self._training(number))
        return self.folder / self._training(self._trainings)

    def _training(self, number: int) -> str:
        return f"{self.session}-{number}{_TRAINING}"

    def forget_trainings(self) -> None:
        """Remove this session's checkpoints: their model is saved."""
        for path in self.folder.glob(f"{self.session}-*{_TRAINING}"):
            self.forget_training(path)

    def forget_training(self, path: Path) -> None:
        """Remove a checkpoint and those beside it."""
        for file in self.folder.glob(f"{path.stem}*.safetensors"):
            with contextlib.suppress(OSError):
                file.unlink()

    def trainings(self) -> list[Training]:
        """Return the last training of each ended session, newest first."""
        newest: dict[str, Training] = {}
        for path in self.folder.glob(f"*-*{_TRAINING}"):
            session = path.name.partition("-")[0]
            if self._lives(session):
                continue
            with contextlib.suppress(ModelFileError, OSError):
                found = Training(
                    path, path.stat().st_mtime, checkpoint.read(path).steps
                )
                if session not in newest or newest[session].time < found.time:
                    newest[session] = found
        return sorted(newest.values(), key=lambda t: -t.time)

    def close(self) -> None:
        """End the session: from now on others are offered what it left."""
        if self._lock is not None:
            self._lock()
            self._lock = None
            with contextlib.suppress(OSError):
                self._lock_of(self.session).unlink()

    def _open(self) -> None:
        with self._opening:  # a second lock, by another thread, would be refused
            if self._lock is None:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                flags = os.O_RDWR | os.O_CREAT
                descriptor = os.open(self._lock_of(self.session), flags, 0o600)
                self._lock = weakref.finalize(self, os.close, descriptor)
                take(descriptor)

    def _lock_of(self, session: str) -> Path:
        return self.folder / f"{session}.lock"

    def _lives(self, session: str) -> bool:
        """Whether a session has not ended: its lock is held."""
        if session == self.session:
            return True
        try:
            with open(self._lock_of(session), "r+b") as file:
                take(file.fileno())
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def _tidy(self) -> None:
        """Remove what is too old, and what a killed write has left."""
        now = time.time()
        ages = (
            (f"*{_SUFFIX}", DAYS),
            ("*.safetensors", DAYS),
            ("*.bad", DAYS),
            ("*.lock", DAYS),
            (".*.part", 1),
        )
        for pattern, days in ages:
            for path in self.folder.glob(pattern):
                with contextlib.suppress(OSError):
                    if now - path.stat().st_mtime > days * 86400:
                        path.unlink()

    def _keep_small(self, newest: Path) -> None:
        files = []
        for path in itertools.chain(
            self.folder.glob(f"*{_SUFFIX}"),
            self.folder.glob("*.bad"),
            self.folder.glob("*.safetensors"),
        ):
            with contextlib.suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime, stat.st_size, path))
        size = sum(file[1] for file in files)
        for _, bytes_, path in sorted(files):
            if size > MOST and path != newest:
                with contextlib.suppress(OSError):
                    path.unlink()
                    size -= bytes_
