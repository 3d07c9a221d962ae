"""Any file: opened safely, written all or nothing, listed and paired by name."""

from __future__ import annotations

import glob
import logging
import os
import platform
import secrets
import shutil
import stat as modes
import sys
import time
import unicodedata
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from napari_unetpp.errors import ImageFileError, SaveError, UnetppError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_log = logging.getLogger("napari_unetpp")

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".bmp", ".npy")

# Tells whose process a number in a name is, on a drive that computers share.
_HOST = f"{zlib.crc32(platform.node().encode()) & 0xFFFF:04x}"

# Virus scanners and sync clients hold a fresh file for a moment on Windows only.
_RETRY_DELAYS = (0.08, 0.16, 0.32, 0.64, 1.28) if sys.platform == "win32" else ()


def shown(path: str | os.PathLike[str]) -> str:
    """Return the file name of `path` as plain text of at most 64 characters."""
    whole = os.fsdecode(path)
    name = os.path.basename(whole) or whole
    plain = "".join(c if c.isprintable() else "?" for c in name)
    return plain if len(plain) <= 64 else f"{plain[:40]}...{plain[-21:]}"


@contextmanager
def opened(
    path: str | os.PathLike[str], error: type[UnetppError]
) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """Open a regular file for reading, once; anything else raises `error`."""
    name = shown(path)

    def opener(path: str, flags: int) -> int:
        # Without O_NONBLOCK the mere opening of a named pipe waits for ever.
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

    odd = error(f"`{name}` is a folder, a pipe or a device, not a file.")
    try:
        if not modes.S_ISREG(os.stat(path).st_mode):
            raise odd
        file = open(path, "rb", opener=opener)
    except FileNotFoundError:
        raise error(f"There is no file `{name}`. Check name and folder.") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"`{name}` cannot be opened: {reason}.") from problem
    with file:
        stat = os.fstat(file.fileno())
        if not modes.S_ISREG(stat.st_mode):
            raise odd
        yield file, stat


def atomic_write(
    path: str | os.PathLike[str],
    data: bytes | Callable[[BinaryIO], object],
    *,
    overwrite: bool = False,
) -> None:
    """Write a file so that at any moment the old or the new one is there, complete.

    Parameters
    ----------
    path : path-like
        Where to write; a link stays a link and the file that it names is replaced.
    data : bytes or callable
        The content, or a function that writes it into the open binary file.
    overwrite : bool
        Whether an existing file may be replaced; its access rights are kept.

    Raises
    ------
    SaveError
        If the file exists and `overwrite` is False, or the disk refuses. What stood
        there before is unchanged and nothing half-written stays behind.
    """
    name = shown(path)
    if "\0" in os.fsdecode(path):
        raise SaveError(f"`{name}` cannot be the name of a file. Choose another name.")
    try:
        target = Path(os.path.realpath(path))
        old = _old_mode(target, name, overwrite)
        sweep(target, dead=True)
        if isinstance(data, bytes):
            _check_room(target.parent, name, len(data))
        _write_beside(target, data, old)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise SaveError(
            f"`{name}` was not saved: {reason}. What stood there before is unchanged. "
            "Choose another folder, or make room and try again."
        ) from error
    _sync_folder(target.parent)


def short(path: Path) -> str:
    """Return the name of a file, of which hidden ones beside it can be made."""
    # A name has at most 255 bytes on common file systems; the rest is ours.
    return os.fsencode(path.name)[:200].decode("utf-8", "ignore")


def sweep(path: str | os.PathLike[str], *, dead: bool = False) -> None:
    """Remove what killed writes have left of a file, or of all files in a folder.

    Parameters
    ----------
    path : path-like
        Hold its lock first, unless `dead`.
    dead : bool, optional
        Only what ended processes of this computer have left.
    """
    real = Path(os.path.realpath(path))
    folder, name = (real, "*") if real.is_dir() else (real.parent, short(real))
    pattern = f".{name if name == '*' else glob.escape(name)}.*.{'[0-9a-f]' * 8}.part"
    with suppress(OSError):  # the next sweep has another chance
        for part in folder.glob(pattern):
            if not dead or _is_dead(part):
                part.unlink(missing_ok=True)


def _is_dead(part: Path) -> bool:
    import psutil  # most writes find nothing to ask it about

    pid, token = part.name.split(".")[-3:-1]
    here = token.startswith(_HOST) and pid.isdecimal()
    return here and not psutil.pid_exists(int(pid))


def rotate(new: Path, path: Path, old: Path) -> None:
    """Give `new` the name `path`, and what stood there before the name `old`.

    Raises
    ------
    SaveError
        If the disk refuses; no content is lost, though it may keep its other name.
    """
    try:
        if path.exists():
            _replace(path, old)
        _replace(new, path)
    except OSError as error:
        raise SaveError(
            f"`{shown(path)}` could not be renamed: {error.strerror}. Its content is "
            f"in `{shown(new)}`, or already there."
        ) from error
    _sync_folder(path.parent)


def write_text(
    path: str | os.PathLike[str], text: str, *, overwrite: bool = False
) -> None:
    """Write `text` as UTF-8; see `atomic_write`."""
    atomic_write(path, text.encode("utf-8"), overwrite=overwrite)


def _old_mode(target: Path, name: str, overwrite: bool) -> int | None:
    """Return the access rights of the file to replace, None where there is none."""
    try:
        old = target.stat().st_mode
    except FileNotFoundError:
        if target.parent.is_dir():
            return None
        folder = shown(target.parent)
        raise SaveError(
            f"`{name}` was not saved: there is no folder `{folder}`. Create it first."
        ) from None
    if not modes.S_ISREG(old):
        raise SaveError(f"`{name}` is a folder or a device. Choose another name.")
    if not overwrite:
        raise SaveError(f"`{name}` exists. Choose another name or pass overwrite=True.")
    if not os.access(target, os.W_OK):
        raise SaveError(f"`{name}` is write-protected. Choose another name.")
    return modes.S_IMODE(old) & 0o777


def _check_room(folder: Path, name: str, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise SaveError(
            f"`{name}` was not saved: its disk must have {2 * size / 1e6:.1f} MB free "
            f"and has {free / 1e6:.1f}. Make room or choose another folder."
        )


def _write_beside(
    target: Path, data: bytes | Callable[[BinaryIO], object], old: int | None
) -> None:
    """Write a hidden file beside `target`, then give it the name of `target`."""
    token = f"{os.getpid()}.{_HOST}{secrets.token_hex(2)}"
    part = target.with_name(f".{short(target)}.{token}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    # The system applies the umask to a new file; a replaced one keeps its rights.
    descriptor = os.open(part, flags, 0o666 if old is None else old)
    try:
        with open(descriptor, "wb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                data(file)
            file.flush()
            os.fsync(file.fileno())
        if old is not None:
            os.chmod(part, old)
        _replace(part, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


def _replace(part: Path, target: Path) -> None:
    for delay in _RETRY_DELAYS:
        try:
            os.replace(part, target)
        except PermissionError:
            time.sleep(delay)
        else:
            return
    os.replace(part, target)


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut; the data are safe without it."""
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        _log.warning("Folder %s could not be synchronised: %s", folder, error)


def list_images(path: str | os.PathLike[str]) -> list[Path]:
    """Return the image files of a folder, sorted by name, or the one file given.

    Raises
    ------
    ImageFileError
        If there is no such file or folder, or no image in it.
    """
    path = Path(path)
    known = ", ".join(SUFFIXES)
    if not path.is_dir():
        if path.suffix.lower() not in SUFFIXES:
            raise ImageFileError(f"`{shown(path)}` is neither a folder nor {known}.")
        with opened(path, ImageFileError):
            return [path]
    found = sorted(
        p
        for p in path.iterdir()
        if p.suffix.lower() in SUFFIXES and not p.name.startswith(".") and p.is_file()
    )
    if not found:
        raise ImageFileError(f"The folder `{shown(path)}` has no image ({known}).")
    return found


def pair_by_stem(
    images: Iterable[Path], annotations: Iterable[Path]
) -> list[tuple[Path, Path]]:
    """Pair files whose names agree up to the suffix, in the order of `images`.

    Raises
    ------
    ValueError
        If a name occurs twice on one side, or a file has no partner.
    """
    left, right = _by_stem("images", images), _by_stem("annotations", annotations)
    lone = [_some(left[s].name for s in sorted(set(left) - set(right)))]
    lone += [_some(right[s].name for s in sorted(set(right) - set(left)))]
    if any(lone):
        raise ValueError(
            "Each image needs an annotation of the same name up to the suffix. Images "
            f"without: {lone[0] or 'none'}. Annotations without: {lone[1] or 'none'}. "
            "Rename them or take them out."
        )
    return [(file, right[stem]) for stem, file in left.items()]


def _by_stem(side: str, files: Iterable[Path]) -> dict[str, Path]:
    table: dict[str, Path] = {}
    twice = []
    for file in files:
        # macOS and Linux write the same accent in two ways.
        stem = unicodedata.normalize("NFC", file.stem)
        if stem in table:
            twice.append(file.name)
        table[stem] = file
    if twice:
        raise ValueError(
            f"Two of the {side} have the same name up to the suffix: {_some(twice)}. "
            "Rename one of them."
        )
    return table


def _some(names: Iterable[str]) -> str:
    listed = [shown(name) for name in names]
    more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
    return ", ".join(listed[:10]) + more
