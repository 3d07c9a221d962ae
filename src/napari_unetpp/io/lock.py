"""One writer at a time: a lock that the system gives back when its process ends."""

from __future__ import annotations

import errno
import logging
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from napari_unetpp.errors import InUseError, SaveError
from napari_unetpp.io.files import short, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

_log = logging.getLogger("napari_unetpp")

# Some network drives have no locks; work there goes on as it did without them.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def take(descriptor: int) -> None:
    """Lock an open file until it is closed or its process ends.

    Raises
    ------
    OSError
        If another holds it.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Be the only one that writes a file, or into a folder, for a while.

    Parameters
    ----------
    path : path-like
        A file that need not exist, or a folder. The lock is a hidden file beside or
        in it, which goes at the end; one that a killed process left locks nothing.

    Raises
    ------
    InUseError
        If another process, or another place of this one, holds the lock.
    SaveError
        If the folder cannot be written into.
    """
    real = Path(os.path.realpath(path))
    if real.is_dir():
        file = real / ".napari-unetpp.lock"
    else:
        file = real.with_name(f".{short(real)}.lock")
    descriptor = _taken(file, shown(path))
    try:
        yield
    finally:
        if sys.platform != "win32":  # there an open file cannot be removed
            with suppress(OSError):
                file.unlink()
        os.close(descriptor)
        if sys.platform == "win32":
            with suppress(OSError):
                file.unlink()


def _taken(file: Path, name: str) -> int:
    """Return the descriptor of the lock file, locked."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise SaveError(
                f"`{name}` cannot be written: {error.strerror or error}. Choose "
                "another folder."
            ) from error
        try:
            take(descriptor)
            # Whoever held it may have removed the file since we opened it.
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _log.warning("No lock on `%s`: %s", name, error.strerror)
                return descriptor
            os.close(descriptor)
            raise InUseError(
                f"`{name}` is being written by another napari or napari-unetpp. Wait "
                "until it has ended, or choose another output."
            ) from None
        os.close(descriptor)
