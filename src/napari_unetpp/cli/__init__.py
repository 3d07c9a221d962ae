"""The command line; the only room that prints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from napari_unetpp.cli.console import Console, exit_code
from napari_unetpp.cli.parser import build_parser
from napari_unetpp.errors import UnetppError

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence

__all__ = ["main"]

# What can come from below; a fault of our own is told in one line as well.
_STATES = (UnetppError, ValueError, OSError, MemoryError)
_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
)


def _command(name: str) -> Callable[[Namespace, Console], int]:
    """Import no more than the command needs."""
    if name in ("train", "demo"):
        from napari_unetpp.cli import training

        return training.train if name == "train" else training.demo
    if name == "predict":
        from napari_unetpp.cli import predicting

        return predicting.predict
    from napari_unetpp.cli import reporting

    return reporting.evaluate if name == "evaluate" else reporting.info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str or None, optional
        Without the program's name; None: those of this process.

    Returns
    -------
    code : int
        0 done, 2 wrong argument, 3 bad file, 4 no memory or disk left, 130 stopped by
        Ctrl-C, 143 stopped by SIGTERM, 1 anything else.
    """
    try:
        options = build_parser().parse_args(arguments)
    except SystemExit as end:  # argparse has told why
        return end.code if isinstance(end.code, int) else 2
    # A thread that waits spins for some microseconds: longer starves the others on a
    # busy computer (a step took 3 times as long), not at all makes a step 1.6 times as
    # long on an idle one. OpenMP reads it when torch is imported, so it is set here.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    console = Console(
        quiet=getattr(options, "quiet", False),
        verbose=getattr(options, "verbose", False),
        as_json=options.json,
    )
    with console:
        try:
            return _command(options.command)(options, console)
        except KeyboardInterrupt:
            console.tell("stopped by Ctrl-C; nothing unfinished was left behind.")
            return 130
        except _STATES as error:
            console.error(error)
            return exit_code(error)
        except _FAULTS as error:
            console.error(error, unexpected=True)
            return 1
