"""What a project's folder holds, read strictly and without reading an image."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp import io, modelfile
from napari_unetpp.config import NetConfig, TrainConfig
from napari_unetpp.errors import ImageFileError, ModelFileError
from napari_unetpp.heldout import HeldOut

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from napari_unetpp.model import Model

FILE = "project.json"
FORMAT = "napari-unetpp project"
VERSION = 1
MODEL, SCORE = "model.safetensors", "score.json"  # in a round's folder
_MOST = 2**24  # bytes of project.json
_NAME = re.compile(r"[^/\\\x00-\x1f:]{1,200}\.\d{6}\.strokes\.tif")


@dataclass(frozen=True, eq=False)
class ProjectImage:
    """An image of a project: where it is, not its pixels.

    Attributes
    ----------
    name : str
        What it is called.
    files : tuple of Path or None
        The file, or one for each channel; None: in memory alone, until it is saved.
    shape : tuple of int
        Of its annotation.
    channel_axis : int or None
        -1 if it has channels, else None.
    rgb : bool
        Whether the channels are colours; a fourth one (alpha) is dropped.
    scale, translate : tuple of float
        Of its layer in napari; () as napari has it by default.
    units : tuple of str
        Of its axes, such as "micrometer"; ().
    data : tuple of arrays
        The pixels of each of `files`, as far as they are in memory.
    """

    name: str = ""
    files: tuple[Path | None, ...] = ()
    shape: tuple[int, ...] = ()
    channel_axis: int | None = None
    rgb: bool = False
    scale: tuple[float, ...] = ()
    translate: tuple[float, ...] = ()
    units: tuple[str, ...] = ()
    data: tuple[Any, ...] = field(default=(), repr=False)
    facts: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    annotation: str = ""

    def read_files(self) -> list[Any]:
        """Read what each file holds, in its own type and shape.

        Raises
        ------
        ImageFileError
            If a file is missing, or no longer the image that it was.
        """
        return [
            _read(path, facts)
            for path, facts in zip(self.files, self.facts, strict=True)
            if path is not None
        ]

    def read(self) -> Any:
        """Read the image, its channels (if any) on the last axis; see `read_files`."""
        found = self.read_files()
        if len(found) > 1:
            return np.stack([np.asarray(a) for a in found], axis=-1)
        return found[0][..., :3] if self.rgb and found[0].shape[-1] == 4 else found[0]


def _read(path: Path, facts: dict[str, Any]) -> Any:
    name, shape = io.shown(path), tuple(facts["shape"])
    if not os.path.exists(path):  # no error where it is no possible name
        raise ImageFileError(
            f"The image `{name}` of this project is not in `{path.parent}` any more. "
            "Put it back, or save the project anew with the image where it is now."
        )
    whole = not path.is_dir() and facts["fingerprint"]
    array: Any = io.read_image(path) if whole else io.open_image(path)
    if array.shape != shape and whole and array.size == math.prod(shape):
        array = array.reshape(shape)  # a TIFF leaves axes of one pixel out
    other = array.shape != shape or array.dtype.name != facts["dtype"]
    if other or (whole and fingerprint(array) != facts["fingerprint"]):
        raise ImageFileError(
            f"`{name}` must be the image that this project was made with, {shape} "
            f"{facts['dtype']}, got {array.shape} {array.dtype}"
            f"{'' if other else ' with other pixels'}. Put the old file back, or save "
            "the project anew with this one."
        )
    return array


def fingerprint(array: NDArray[Any]) -> str:
    """Return what tells an array from others; see `examples.fingerprint`."""
    from napari_unetpp import examples

    return examples.fingerprint(array)


@dataclass(frozen=True, eq=False)
class Round:
    """A training of a project that has ended, and the strokes it learned from.

    Attributes
    ----------
    number : int
        1 for the first.
    score : float or None
        Held-out mean IoU, as far as known.
    interval : tuple of float
        Its 90 % interval, or ().
    steps, painted : int
        Steps of its training, and annotated pixels.
    date : str
        When it ended: ISO 8601 with the offset from UTC.
    folder : Path
        Where it is kept.
    """

    number: int
    score: float | None
    interval: tuple[float, ...]
    steps: int
    painted: int
    date: str
    folder: Path
    weights: str = field(default="", repr=False)
    strokes: tuple[str, ...] = field(default=(), repr=False)

    def load_model(self) -> Model:
        """Read its model; ModelFileError if that cannot be."""
        from napari_unetpp.model import load_model

        return load_model(inside(self.folder, MODEL))


@dataclass(frozen=True, eq=False)
class Project:
    """What a project's folder holds; images and models are read when they are asked.

    Attributes
    ----------
    folder : Path
    classes : tuple of str
        Names, the background first.
    unlabelled : int or None
        Coding of the annotations, see `Model`.
    network : NetConfig or None
        None before the first round.
    config : TrainConfig
        How it is trained.
    depth : int or None
        That is used; None: the deepest.
    held_out : HeldOut or None
        Which pixels never train; None before the first round.
    images : tuple of ProjectImage
    rounds : tuple of Round
        The history, oldest first.
    current : int or None
        Number of the round whose model is the current one.
    """

    folder: Path
    classes: tuple[str, ...]
    unlabelled: int | None
    network: NetConfig | None
    config: TrainConfig
    depth: int | None
    held_out: HeldOut | None
    images: tuple[ProjectImage, ...]
    rounds: tuple[Round, ...]
    current: int | None

    def round(self, number: int) -> Round:
        """Return a round by its number; ValueError if there is none."""
        for found in self.rounds:
            if found.number == number:
                return found
        known = ", ".join(str(r.number) for r in self.rounds) or "none"
        raise ValueError(
            f"`round` must be one that the project keeps ({known}), got {number!r}."
        )

    def load_model(self) -> Model | None:
        """Read the current model, None before the first round."""
        return None if self.current is None else self.round(self.current).load_model()

    def read_annotations(self, round: int | None = None) -> list[NDArray[Any]]:
        """Read the annotations: the current ones, or the strokes of a round.

        Raises
        ------
        ImageFileError
            If a file is missing or damaged, or has not its image's shape.
        """
        if round is None:
            folder, names = self.folder / "annotations", [
                i.annotation for i in self.images
            ]  # fmt: skip
        else:
            found = self.round(round)
            folder, names = found.folder, list(found.strokes)
        arrays = []
        for name, image in zip(names, self.images, strict=False):
            array = io.read_labels(inside(folder, name))
            if array.size != math.prod(image.shape):
                raise ImageFileError(
                    f"`{io.shown(name)}` must have its image's shape {image.shape}, "
                    f"got {array.shape}. Copy the project's folder once more."
                )
            arrays.append(array.reshape(image.shape))
        return arrays


def load_project(folder: str | os.PathLike[str]) -> Project:
    """Read a project; no image and no model is read yet.

    Parameters
    ----------
    folder : path
        As `save_project` wrote it, or its `project.json`.

    Raises
    ------
    ModelFileError
        If there is none, or it is damaged or newer than this version.
    """
    folder = Path(folder)
    folder = folder.parent if folder.name == FILE and folder.is_file() else folder
    folder = Path(os.path.realpath(folder))
    if not (folder / FILE).is_file():
        raise ModelFileError(
            f"`{io.shown(folder)}` is no project: it holds no {FILE}. Choose a folder "
            "that was saved as a project."
        )
    values = _table(folder / FILE)
    if values.get("format") != FORMAT:
        raise _damaged(folder / FILE, "it is not a project of napari-unetpp")
    version = values.get("version")
    if type(version) is int and version > VERSION:
        raise ModelFileError(
            f"The project `{io.shown(folder)}` was saved by a newer version of "
            "napari-unetpp. Update napari-unetpp."
        )
    try:
        return parsed(folder, values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(folder / FILE, str(error)) from None


def inside(folder: Path, name: str) -> Path:
    """Return the path of a project's own file, which no link may lead out of it."""
    path = folder / name
    real = os.path.realpath(path)
    if os.path.dirname(real) != os.path.realpath(folder) or folder.is_symlink():
        raise ModelFileError(
            f"`{io.shown(name)}` leads out of the project's folder, so it is not "
            "opened. Copy the project's folder once more, without links."
        )
    return path


def _damaged(path: Path, why: str) -> ModelFileError:
    return ModelFileError(
        f"`{io.shown(path)}` is damaged: {why:.200} Copy the project's folder once "
        "more, or take its newest model from `rounds`."
    )


def _table(path: Path) -> dict[str, Any]:
    inside(path.parent, path.name)
    with io.opened(path, ModelFileError) as (file, stat):
        if stat.st_size > _MOST:
            raise _damaged(path, f"it has {stat.st_size:,} bytes, at most {_MOST:,}.")
        data = file.read(_MOST)
    try:
        return modelfile.parse_json("text", data)
    except ValueError as error:
        raise _damaged(path, f"{error}.") from None


def parsed(folder: Path, values: dict[str, Any]) -> Project:
    """Return the project that a table describes; ValueError or worse if it cannot."""
    if values["unlabelled"] not in (0, None) or isinstance(values["unlabelled"], bool):
        raise ValueError("its coding is unknown.")
    settings = values["settings"]
    network, held_out = settings["network"], values["held_out"]
    rounds = tuple(_round(folder, n) for n in _list(values["rounds"], 10_000))
    numbers = [r.number for r in rounds]
    if numbers != sorted(set(numbers)):
        raise ValueError("its rounds are not in order.")
    current = values["current"]
    if current is not None and _whole(current, 1) not in numbers:
        raise ValueError("its current round is missing.")
    depth, classes = settings["depth"], _list(values["classes"], 255)
    if len(classes) < 2 or len({str(c) for c in classes}) != len(classes):
        raise ValueError("it has not two classes or more, each with its own name.")
    return Project(
        folder,
        tuple(modelfile.check_text("class", c) for c in classes),
        values["unlabelled"],
        None if network is None else NetConfig.from_dict(network),
        TrainConfig.from_dict(settings["training"]),
        None if depth is None else _whole(depth, 1),
        None if held_out is None else HeldOut.from_dict(held_out),
        tuple(_image(folder, i) for i in _list(values["images"], 10_000)),
        rounds,
        current,
    )


def _image(folder: Path, values: dict[str, Any]) -> ProjectImage:
    facts = tuple(_facts(f) for f in _list(values["files"], 16))
    axis, rgb = values["channel_axis"], values["rgb"]
    shape = tuple(_whole(n, 1) for n in _list(values["shape"], 6))
    if not facts or axis not in (None, -1) or not isinstance(rgb, bool):
        raise ValueError("an image has no file, or other channels than agreed.")
    _check_channels(facts, shape, axis, rgb=rgb)
    places = {k: tuple(_list(values[k], 8)) for k in ("scale", "translate", "units")}
    for number in (*places["scale"], *places["translate"]):
        if type(number) not in (int, float) or abs(number) > 1e300:
            raise ValueError("an image's place is not a number.")
    if not all(v > 0 for v in places["scale"]):
        raise ValueError("an image's scale is not above 0.")
    for unit in places["units"]:
        if not (isinstance(unit, str) and len(unit) <= 64 and unit.isidentifier()):
            raise ValueError("the unit of an image is none.")
    name = values["annotation"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError("the name of an annotation is not one that we give.")
    return ProjectImage(
        str(values["name"])[:200],
        tuple(folder / f["path"] for f in facts),
        shape,
        axis,
        rgb,
        facts=facts,
        annotation=name,
        **places,
    )


def _check_channels(
    facts: tuple[dict[str, Any], ...],
    shape: tuple[int, ...],
    axis: int | None,
    *,
    rgb: bool,
) -> None:
    """Refuse channels that no layer could show."""
    whole = [tuple(f["shape"]) for f in facts]
    if rgb and (axis is None or whole[0][-1] not in (3, 4)):
        raise ValueError("an image of colours has no three channels.")
    if axis is not None and len(whole) > 1:
        raise ValueError("an image has channels both in its files and as files.")
    own = [found if axis is None else found[:-1] for found in whole]
    if len(shape) < 2 or any(found != shape for found in own):
        raise ValueError("an image and its annotation have different shapes.")


def _facts(values: dict[str, Any]) -> dict[str, Any]:
    path = values["path"]
    if not isinstance(path, str) or not 0 < len(path) < 5000 or "\0" in path:
        raise ValueError("the path of an image is none.")
    shape = [_whole(n, 1) for n in _list(values["shape"], 6)]
    for key in ("dtype", "fingerprint"):
        if not isinstance(values[key], str) or len(values[key]) > 64:
            raise ValueError(f"the {key} of an image is none.")
    return {**values, "shape": shape}


def _round(folder: Path, number: Any) -> Round:
    number = _whole(number, 1, 10**9)
    path = inside(folder / "rounds", f"{number:03d}")
    values = _table(path / SCORE)
    score, interval = values["score"], tuple(_list(values["interval"], 2))
    for value in (*interval, *(() if score is None else (score,))):
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise ValueError("the score of a round does not lie between 0 and 1.")
    names = tuple(_list(values["strokes"], 10_000))
    if not all(isinstance(n, str) and _NAME.fullmatch(n) for n in names):
        raise ValueError("the name of a round's strokes is not one that we give.")
    date = datetime.fromisoformat(values["date"]).isoformat(timespec="seconds")
    weights = values["weights"]
    if not (isinstance(weights, str) and re.fullmatch("[0-9a-f]{64}", weights)):
        raise ValueError("the weights of a round have no checksum.")
    steps, painted = (_whole(values[k], 0) for k in ("steps", "painted"))
    return Round(
        number, score, interval, steps, painted, date, path, weights, names
    )  # fmt: skip


def _whole(value: Any, low: int, high: int = 2**53) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r:.40} is not a whole number from {low}.")
    return value


def _list(value: Any, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{value!r:.40} is not a list of at most {most}.")
    return value
