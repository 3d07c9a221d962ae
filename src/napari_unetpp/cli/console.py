"""What the commands say: results to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shlex
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self, TextIO

from napari_unetpp.errors import (
    DeviceError,
    DeviceMemoryError,
    SaveError,
    TrainingError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_NAME = "napari-unetpp"
REPLACE = "pass --overwrite to replace it"  # what to do where an output exists
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EFBIG}


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error: 1, 2, 3 or 4, see `main`."""
    if isinstance(error, (TrainingError, DeviceError)):
        return 1
    if isinstance(error, (SaveError, DeviceMemoryError, MemoryError)):
        return 4
    if isinstance(error, OSError) and error.errno in _FULL:
        return 4
    return 2 if isinstance(error, ValueError) else 3


def plain(text: object) -> str:
    """Return text in one line without control characters and direction marks."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )


def message_of(error: BaseException) -> str:
    """Return an error's text, at most three safe lines."""
    text = str(error).strip() or type(error).__name__
    return "\n".join(plain(line) for line in text.splitlines()[:3])


class Console:
    """Prints; it never raises because nobody reads.

    Parameters
    ----------
    quiet : bool
        No notes and no progress.
    verbose : bool
        Log and tracebacks.
    as_json : bool
        `result` prints JSON instead of text.
    """

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, as_json: bool = False
    ) -> None:
        self.quiet = quiet
        self.verbose = verbose
        self.as_json = as_json
        self._log = logging.StreamHandler(sys.stderr)
        self._log.setFormatter(
            logging.Formatter(f"{_NAME}: %(levelname)s: %(message)s")
        )
        self._logger = logging.getLogger("napari_unetpp")
        self._level = self._logger.level

    def __enter__(self) -> Self:
        self._log.setLevel(logging.DEBUG if self.verbose else logging.WARNING)
        if self.verbose:
            self._logger.setLevel(logging.DEBUG)
        self._logger.addHandler(self._log)
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self._log)
        self._logger.setLevel(self._level)

    def say(self, *lines: str) -> None:
        """Print lines of the result, unless it is to be JSON."""
        if not self.as_json:
            self._write(sys.stdout, lines)

    def result(self, values: dict[str, Any], lines: Iterable[str] = ()) -> None:
        """Print the result: JSON, or the lines."""
        if self.as_json:
            text = json.dumps(_jsonable(values), indent=1, allow_nan=False)
            self._write(sys.stdout, [text])
        else:
            self._write(sys.stdout, lines)

    def note(self, text: str) -> None:
        """Tell what is going on, unless quiet."""
        if not self.quiet:
            self.tell(text)

    def tell(self, text: str) -> None:
        """Tell what must be known."""
        self._write(sys.stderr, [f"{_NAME}: {text}"])

    def error(self, error: BaseException, *, unexpected: bool = False) -> None:
        """Tell an error, with its traceback if verbose."""
        if self.verbose:
            self._write(sys.stderr, traceback.format_exc().splitlines())
        text = message_of(error)
        if unexpected:
            text = (
                f"unexpected {type(error).__name__}: {plain(str(error)[:500])}\n"
                "This is a fault of the program: run it with --verbose and report it."
            )
        self.tell(f"error: {text}")

    def bar(self, total: float, unit: str, name: str) -> Any:
        """Return a tqdm progress bar, silent when quiet or when nobody watches."""
        from tqdm import tqdm

        n = "{n:.0f}/{total:.0f}"
        return tqdm(
            total=total,
            desc=plain(name),
            disable=self.quiet or not sys.stderr.isatty(),
            file=sys.stderr,
            leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}| " + n + f" {unit}{{postfix}}",
        )

    def _write(self, stream: TextIO, lines: Iterable[str]) -> None:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = "".join(f"{line}\n" for line in lines)
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except BrokenPipeError:
            # The reader has gone. The work goes on; the interpreter's own last flush
            # must not complain either.
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _jsonable(value: Any) -> Any:
    """Return JSON's own types; what is not finite becomes null."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def count(n: int, noun: str) -> str:
    """Return "1 image" or "2 images"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def score(value: float) -> str:
    """Return a score with three digits, "-" for NaN."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def quoted(path: Path) -> str:
    """Return a path as a shell takes it."""
    return plain(shlex.quote(str(path)))


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return lines with aligned columns, the first to the left."""
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = []
    for row in table:
        first, *rest = (cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *rest]).rstrip())
    return lines
