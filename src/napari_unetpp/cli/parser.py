"""What can be typed: commands, options and their help; imports nothing heavy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from napari_unetpp import __version__
from napari_unetpp.cli.console import plain
from napari_unetpp.config import NETWORKS
from napari_unetpp.presets import PRESETS

_CODES = (
    "exit codes: 0 done, 2 wrong argument, 3 bad file, 4 no memory or disk left, "
    "130 stopped by Ctrl-C"
)


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in two lines."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(
            f"napari-unetpp: error: {plain(message)}\n"
            f"See `{self.prog} --help` for help.\n"
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
        "info": ("tell what a model file or a project holds", _info),
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
    command.add_argument(
        "images", type=Path, nargs="?", help="an image file or a folder of them"
    )
    command.add_argument(
        "annotations", type=Path, nargs="?",
        help="the annotation file, or a folder of them with the images' names",
    )  # fmt: skip
    command.add_argument(
        "--project", type=Path, metavar="FOLDER",
        help="go on with a project instead: with its images, annotations, model and "
        "settings; what is learned becomes its newest round",
    )  # fmt: skip
    command.add_argument(
        "-o", "--out", type=Path, metavar="MODEL.safetensors",
        help="the model file to write; with --run it may be left out",
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

    _add_recipe(command)
    _add_run(command)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--preset", choices=PRESETS, metavar="NAME",
        help=f"a paper's network and training: {', '.join(PRESETS)}",
    )  # fmt: skip
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE",
        help="change a setting of the training or the network, such as batch=8, "
        "patience=20 or dropout=0",
    )  # fmt: skip
    command.add_argument(
        "--deterministic", action="store_true",
        help="only operations that give the same bits every time",
    )  # fmt: skip


def _add_run(command: argparse.ArgumentParser) -> None:
    long = command.add_argument_group(
        "long training",
        "IMAGES and ANNOTATIONS are folders of images and dense masks, with subfolders "
        "train/, val/ and test/ or divided at random; val chooses the best step and "
        "the end, test is scored once. Without --steps and --seconds, patience ends it",
    )
    long.add_argument(
        "--run", type=Path, metavar="FOLDER",
        help="for the model, settings, history, scores and a report",
    )  # fmt: skip
    long.add_argument(
        "--groups", metavar="TABLE|REGEX",
        help="keep groups together: a .csv with the columns name and group, or what a "
        "regular expression matches in the names",
    )  # fmt: skip
    long.add_argument(
        "--split", type=_shares, metavar="A,B,C",
        help="shares of train, val and test in percent (default: 70,15,15)",
    )  # fmt: skip
    long.add_argument(
        "--instances", action="store_true",
        help="the masks number single objects: 0 = background, 1, 2, ... = objects",
    )  # fmt: skip
    long.add_argument(
        "--trunk", type=Path, metavar="FILE",
        help="a .safetensors file with a VGG's `features` to start from, or imagenet: "
        "torchvision's weights, fetched once (550 MB; default: random weights)",
    )  # fmt: skip
    long.add_argument(
        "--tile", type=int, metavar="PX", help="side of a tile in validation and test"
    )


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    total = sum(shares)
    if len(shares) != 3 or not 0 < total < float("inf"):
        raise argparse.ArgumentTypeError(
            f"takes three numbers such as 70,15,15, got {text!r}"
        )
    return tuple(share / total for share in shares)


def _predict(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", type=Path, help="a model file")
    command.add_argument(
        "images", type=Path, nargs="+", help="image files, or folders of them"
    )
    command.add_argument(
        "-o", "--out", type=Path, required=True, metavar="OUT",
        help="folder for the labels, NAME.tif for each image; for a single image also "
        "the name of a .tif file, or of a .zarr folder: then the image (Zarr, TIFF) "
        "may be larger than the memory, and the same command goes on after a kill",
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
    shared = command.add_mutually_exclusive_group()
    shared.add_argument(
        "--workers", type=int, metavar="N",
        help="processes on this computer that share the work",
    )  # fmt: skip
    shared.add_argument(
        "--scheduler", metavar="ADDRESS",
        help="a dask scheduler, such as tcp://10.0.0.7:8786, whose workers share it",
    )  # fmt: skip
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
    command.add_argument(
        "model", type=Path, help="a model file, or the folder of a project"
    )
