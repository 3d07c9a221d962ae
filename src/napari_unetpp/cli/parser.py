"""What can be typed: commands, options and their help; imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from napari_unetpp import __version__
from napari_unetpp.config import NETWORKS

_CODES = (
    "exit codes: 0 done, 2 wrong argument, 3 bad file, 4 no memory or disk left, "
    "130 stopped by Ctrl-C"
)


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in two lines."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(
            f"napari-unetpp: error: {message}\nSee `{self.prog} --help` for help.\n"
        )
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; its result has `command` and the command's options."""
    common = _Parser(add_help=False)
    common.add_argument(
        "-q", "--quiet", action="store_true", default=argparse.SUPPRESS,
        help="results and errors only",
    )  # fmt: skip
    common.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS,
        help="log to stderr, and a traceback with an error",
    )  # fmt: skip
    parser: argparse.ArgumentParser = _Parser(
        prog="napari-unetpp",
        description="Label pixels with UNet++ and its relatives, trained from strokes.",
        epilog=f"{_CODES}. `napari-unetpp COMMAND --help` tells more.",
        parents=[common],
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    for name, (text, add) in {
        "demo": ("train on a sample image for half a minute and compare", _demo),
        "train": ("learn from annotated images and write a model", _train),
        "predict": ("label images with a model", _predict),
        "evaluate": ("compare labels with a truth: IoU and Dice per class", _evaluate),
        "info": ("tell what a model file holds", _info),
    }.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_CODES,
            parents=[common],
            allow_abbrev=False,
        )
        add(command)
        command.add_argument(
            "--json", action="store_true", help="print one JSON object instead of text"
        )
    return parser


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps (default: the fastest)"
    )


def _add_limits(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--network", choices=NETWORKS, metavar="NAME",
        help=f"{', '.join(NETWORKS)} (default: unet++; of the demo: unet)",
    )  # fmt: skip
    command.add_argument(
        "--seconds", type=float, metavar="S",
        help="time to train (default: 30 unless --steps is given)",
    )  # fmt: skip
    command.add_argument("--steps", type=int, metavar="N", help="steps to train")
    command.add_argument(
        "--from-scratch", action="store_true",
        help="start from random weights instead of pre-trained ones",
    )  # fmt: skip
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of all chance (default: 0)"
    )
    _add_device(command)


def _add_overwrite(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace outputs that exist"
    )


def _add_coding(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--classes", type=_names, metavar="A,B,...",
        help="names of the classes, background first",
    )  # fmt: skip
    command.add_argument(
        "--unlabelled", choices=("0", "none"),
        help="0: value 0 is not annotated, class A is 1 (default); none: every pixel "
        "is annotated, class A is 0. Masks of 0 and 255 are recognised",
    )  # fmt: skip


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--sample", default="immunohistochemistry", metavar="NAME",
        help="coins, retina, cell, ... (default: immunohistochemistry)",
    )  # fmt: skip
    _add_limits(command)
    command.add_argument(
        "-o", "--out", type=Path, metavar="FOLDER",
        help="for the model, the labels and a picture (default: ./napari-unetpp-demo, "
        "where an earlier demo is replaced)",
    )  # fmt: skip
    _add_overwrite(command)


def _train(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", type=Path, help="an image file or a folder of them")
    command.add_argument(
        "annotations", type=Path,
        help="the annotation file, or a folder of them with the images' names",
    )  # fmt: skip
    command.add_argument(
        "-o", "--out", type=Path, required=True, metavar="MODEL.safetensors",
        help="the model file to write",
    )  # fmt: skip
    _add_coding(command)
    command.add_argument(
        "--channel-axis", type=int, metavar="AXIS",
        help="axis of the channels, such as -1 or 0 (default: as the file says)",
    )  # fmt: skip
    command.add_argument(
        "--from", dest="base", type=Path, metavar="MODEL",
        help="go on with this model instead of a new network",
    )  # fmt: skip
    _add_limits(command)
    command.add_argument(
        "--width", type=int, metavar="N", help="channels of the first level"
    )
    command.add_argument("--levels", type=int, metavar="N", help="number of poolings")
    command.add_argument(
        "--batch", type=int, default=4, metavar="N",
        help="patches per step, of all processes together (default: 4)",
    )  # fmt: skip
    command.add_argument(
        "--checkpoint", type=Path, metavar="FILE",
        help="what is written every minute, and deleted when the model is saved "
        "(default: MODEL.checkpoint.safetensors)",
    )  # fmt: skip
    command.add_argument(
        "--checkpoint-seconds", type=float, default=60.0, metavar="S",
        help="time between two checkpoints (default: 60)",
    )  # fmt: skip
    command.add_argument(
        "--resume", action="store_true",
        help="go on with the checkpoint of the same command, exactly where it stood",
    )  # fmt: skip
    command.add_argument(
        "--changed-data", action="store_true",
        help="resume although images or annotations are others than before",
    )  # fmt: skip
    _add_overwrite(command)


def _predict(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, help="a model file")
    command.add_argument(
        "images", type=Path, nargs="+", help="image files, or folders of them"
    )
    command.add_argument(
        "-o", "--out", type=Path, required=True, metavar="OUT",
        help="folder for the labels, NAME.tif for each image; for a single image also "
        "the name of a .tif file",
    )  # fmt: skip
    command.add_argument(
        "--depth", type=int, metavar="N",
        help="depth of UNet++ to use: 1 is the fastest (default: the deepest)",
    )  # fmt: skip
    command.add_argument(
        "--heads", choices=("last", "mean"), default="last",
        help="mean: average all heads up to the depth (default: last)",
    )  # fmt: skip
    command.add_argument(
        "--tile", type=int, metavar="PX", help="side of a tile in pixels"
    )
    command.add_argument(
        "--channel-axis", type=int, metavar="AXIS",
        help="axis of the channels, such as -1 or 0 (default: as the file says)",
    )  # fmt: skip
    _add_device(command)
    command.add_argument(
        "--probabilities", action="store_true",
        help="also write NAME_probabilities.tif, a channel per class",
    )  # fmt: skip
    existing = command.add_mutually_exclusive_group()
    _add_overwrite(existing)
    existing.add_argument(
        "--skip-existing", action="store_true",
        help="leave out images whose outputs exist",
    )  # fmt: skip


def _evaluate(command: argparse.ArgumentParser) -> None:
    command.add_argument("labels", type=Path, help="a label file or a folder of them")
    command.add_argument(
        "truth", type=Path, help="the true labels: a file, or a folder with such names"
    )
    _add_coding(command)


def _info(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, help="a model file")
