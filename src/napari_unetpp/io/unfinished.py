"""A large result that is not complete: alone with it, what was done, and its end."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from napari_unetpp.errors import SaveError
from napari_unetpp.io.files import rotate, shown, write_text
from napari_unetpp.io.lock import take

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_TMP = ".partial"  # how zarr calls a chunk that it has not finished


class Part:
    """The folder ``NAME.zarr.part`` of a result that is not complete.

    It holds the labels, what was planned, a line per chunk that is finished, and a
    lock. Use `part` to open one.

    Attributes
    ----------
    folder, labels, lock, model : Path
        The folder, and what is in it: the labels, the lock, the model for workers.
    closed : bool
        Whether the folder is gone.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(f"{target.name}.part")
        self.labels = self.folder / "labels.zarr"
        self.lock = self.folder / "lock"
        self.model = self.folder / "model.safetensors"
        self.closed = False
        self._manifest = self.folder / "manifest.txt"
        self._plan = self.folder / "plan.json"

    def plan(self) -> dict[str, Any] | None:
        """Return what was planned, None where nothing was begun or it is damaged."""
        try:
            found = json.loads(self._plan.read_text(encoding="utf-8"))
            whole = isinstance(found, dict) and found.pop("labels") == self._digest()
        except (OSError, ValueError, KeyError, RecursionError):
            return None
        return found if whole else None

    def begin(self, plan: dict[str, Any]) -> None:
        """Write the plan; from now on there is something to resume."""
        plan = {**plan, "labels": self._digest()}
        write_text(self._plan, json.dumps(plan, indent=1), overwrite=True)

    def _digest(self) -> str:
        """Return what tells whether the labels are of the form that they were given."""
        digest = hashlib.sha256()
        forms = ("*.json", "*/*.json", ".z*", "*/.z*")
        for path in sorted(p for form in forms for p in self.labels.glob(form)):
            digest.update(path.relative_to(self.labels).as_posix().encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def empty(self) -> None:
        """Delete everything but the lock."""
        self._plan.unlink(missing_ok=True)
        self._manifest.unlink(missing_ok=True)
        for folder in (self.labels, self.folder / "old.zarr"):
            shutil.rmtree(folder, ignore_errors=True)

    def done(self) -> dict[int, int]:
        """Return the checksums of the finished chunks by number.

        The last line may have been cut by a kill or a power cut.
        """
        try:
            text = self._manifest.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return {}
        lines = re.findall(r"^(\d{1,18}) ([0-9a-f]{8})\n", text, re.MULTILINE)
        return {int(number): int(crc, 16) for number, crc in lines}

    @contextmanager
    def manifest(self, done: Mapping[int, int]) -> Iterator[Any]:
        """Rewrite the lines of `done` and hand out a function that adds one."""
        write_text(
            self._manifest,
            "".join(f"{n} {crc:08x}\n" for n, crc in done.items()),
            overwrite=True,
        )
        with open(self._manifest, "a", encoding="ascii") as file:

            def add(number: int, crc: int) -> None:
                file.write(f"{number} {crc:08x}\n")
                file.flush()

            yield add

    def sweep(self) -> None:
        """Delete what killed writers have left."""
        for file in self.labels.rglob(f"*{_TMP}"):
            file.unlink(missing_ok=True)

    def finish(self) -> None:
        """Give the complete labels their name and delete the rest."""
        self.sweep()
        rotate(self.labels, self.target, self.folder / "old.zarr")
        self.close()

    def close(self) -> None:
        """Delete the folder, of which nothing is needed any more."""
        # The lock goes last: without it, what is left would be taken for another's.
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path != self.lock:
                with suppress(OSError):
                    path.unlink()
        if [*self.folder.iterdir()] == [self.lock]:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.closed = True


@contextmanager
def part(target: Path) -> Iterator[Part]:
    """Open the unfinished result beside `target`, alone.

    Raises
    ------
    SaveError
        If another process writes it, or the disk refuses, at once or later.
    """
    found = Part(target)
    name = shown(target)
    if (
        found.folder.exists()
        and not found.lock.exists()
        and any(found.folder.iterdir())
    ):
        raise SaveError(
            f"The folder `{shown(found.folder)}` is none of ours. Rename it, or choose "
            "another name."
        )
    try:
        found.folder.mkdir(exist_ok=True)
        lock = open(found.lock, "a+b")
    except OSError as error:
        raise SaveError(
            f"`{name}` cannot be written: {error.strerror or error}. Choose another "
            "folder."
        ) from error
    with lock, _told(name):
        if not _lock(lock.fileno()):
            raise SaveError(
                f"`{name}` is being written by another process. Wait until it is done, "
                "or choose another name."
            )
        # The process that had it may have finished and deleted the folder since.
        if not _same_file(lock.fileno(), found.lock):
            raise SaveError(
                f"`{name}` has just been finished by another process. Look at it first."
            )
        if target.exists() and not found.labels.exists():
            found.empty()  # what was killed on its last steps
        yield found
    if sys.platform == "win32" and found.closed:  # an open lock cannot be deleted there
        with suppress(OSError):
            found.lock.unlink()
            found.folder.rmdir()


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what the disk refuses into SaveError."""
    try:
        yield
    except OSError as error:
        raise SaveError(
            f"A part of `{name}` was not written: {error.strerror or error}. Make "
            "room, or see to the disk; the same command then goes on."
        ) from error


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    """Take the lock, which ends with the process."""
    try:
        take(descriptor)
    except OSError:
        return False
    return True
