"""A project is written: data under new names first, then the list of them, whole."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp import io
from napari_unetpp.config import TrainConfig
from napari_unetpp.errors import SaveError
from napari_unetpp.heldout import HeldOut
from napari_unetpp.project.format import (
    FILE,
    FORMAT,
    MODEL,
    SCORE,
    VERSION,
    Project,
    Round,
    load_project,
    parsed,
)
from napari_unetpp.project.images import as_image, own_folder, placed, plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from napari_unetpp.model import Model

KEPT = 10  # rounds; the best one stays, whatever its age


def save_project(
    folder: str | os.PathLike[str],
    images: Any,
    annotations: Any,
    model: Model | None = None,
    *,
    classes: Sequence[str] | None = None,
    unlabelled: int | None = 0,
    channel_axis: int | None = None,
    config: TrainConfig | None = None,
    depth: int | None = None,
) -> Project:
    """Save images by reference, annotations, model and settings in a folder.

    A project that is there is brought up to date: its rounds stay.

    Parameters
    ----------
    folder : path
        Made if there is none; a folder with a project in it, or without anything
        called `annotations`, `images` or `rounds`.
    images : path, array or ProjectImage, or a sequence of these
        A file is referred to, never changed or moved; an array is written into the
        folder.
    annotations : array or sequence of arrays
        One per image, as for `train`.
    model : Model or None, optional
        The current one; it becomes a round unless it is that of one.
    classes : sequence of str or None, optional
        Names; None: the model's, or those that the project has, or "background",
        "class 2", ... up to the highest number found.
    unlabelled : {0, None}, optional
        Coding of the annotations; a given `model` keeps its own.
    channel_axis : {-1, None}, optional
        Axis of the channels in every image that is no ProjectImage.
    config : TrainConfig or None, optional
        How it is trained; None: as the project has it, or the defaults.
    depth : int or None, optional
        That is used.

    Returns
    -------
    project : Project

    Raises
    ------
    ValueError
        If images and annotations do not fit each other.
    ImageFileError
        If an image cannot be read.
    SaveError, InUseError
        If the folder cannot be written, or another process writes there.
    """
    if channel_axis not in (None, -1):
        raise ValueError(
            f"`channel_axis` must be -1 or None in a project, got {channel_axis!r}. "
            "Move the channels to the last axis."
        )
    given = list(images) if isinstance(images, (list, tuple)) else [images]
    notes = list(annotations) if isinstance(annotations, (list, tuple)) else [
        annotations
    ]  # fmt: skip
    if len(given) != len(notes):
        raise ValueError(
            "A project needs one annotation for each image, got "
            f"{len(given)} and {len(notes)}."
        )
    folder = Path(os.path.realpath(folder))
    _make(folder)
    with _writing(folder) as old:
        old = old or Project(
            folder, (), 0, None, TrainConfig(), None, None, (), (), None
        )
        found = [as_image(i, n, channel_axis) for n, i in enumerate(given)]
        found = [
            placed(folder, image, np.asarray(note))
            for image, note in zip(found, notes, strict=True)
        ]
        names = classes or (model.classes if model is not None else old.classes)
        now = replace(
            old,
            images=tuple(found),
            classes=tuple(names or _names(notes, unlabelled)),
            unlabelled=unlabelled if model is None else model.unlabelled,
            config=config or old.config,
            depth=depth,
        )
        now = _with_annotations(now, [np.asarray(note) for note in notes])
        if model is not None:
            now = _with_model(now, model)
        if classes:  # more than the model has, as long as it has not learned them
            now = replace(now, classes=tuple(classes))
        return _commit(now)


def add_round(
    folder: str | os.PathLike[str], model: Model, annotations: Any = None
) -> Project:
    """Add a trained model to the history of a project and make it the current one.

    Parameters
    ----------
    folder : path
        Of a project.
    model : Model
        As `train` returned it.
    annotations : array or sequence of arrays, optional
        What it learned from; None: the project's annotations as they are.

    Returns
    -------
    project : Project
        Of its rounds the newest `KEPT` stay, and the one that scored best.

    Raises
    ------
    ModelFileError, ImageFileError
        If the project is damaged.
    ValueError
        If the annotations do not fit the images.
    SaveError, InUseError
        If the folder cannot be written, or another process writes there.
    """
    load_project(folder)
    with _writing(Path(os.path.realpath(folder))) as now:
        if now is None:  # removed since
            return load_project(folder)
        if annotations is not None:
            now = _with_annotations(now, _as_list(annotations))
        return _commit(_with_round(now, model))


def go_back(folder: str | os.PathLike[str], round: int) -> Project:
    """Make a round's model and strokes the current ones.

    Nothing is lost: strokes that no round keeps become a round first, with the model
    of that time, and the rounds after this one stay in the history, so that going
    back can itself be undone by going to one of them.

    Parameters
    ----------
    folder : path
        Of a project.
    round : int
        Number of the round.

    Raises
    ------
    ValueError
        If the project keeps no such round, or it knew fewer images than there are.
    ModelFileError, ImageFileError
        If the project, or that round, is damaged.
    SaveError, InUseError
        If the folder cannot be written, or another process writes there.
    """
    load_project(folder)
    with _writing(Path(os.path.realpath(folder))) as now:
        if now is None:
            return load_project(folder)
        wanted = now.round(round)
        strokes = now.read_annotations(round)
        if len(strokes) != len(now.images):
            raise ValueError(
                f"Round {round} has strokes of {len(strokes)} image(s), the project "
                f"has {len(now.images)}. Open its model from `{wanted.folder}` instead."
            )
        then = wanted.load_model()  # a damaged one is told before anything changes
        if now.current is not None and not _are_kept(now):
            kept = now.round(now.current).load_model()
            now = _with_round(now, kept, keep=round)
        now = _with_annotations(now, strokes)
        return _commit(replace(now, current=round, **_of(then)))


# --- parts -----------------------------------------------------------------------


def _as_list(arrays: Any) -> list[NDArray[Any]]:
    several = isinstance(arrays, (list, tuple))
    return [np.asarray(a) for a in (arrays if several else [arrays])]


def _names(notes: list[Any], unlabelled: int | None) -> list[str]:
    top = max((int(np.max(note)) for note in notes), default=0)
    n = max(2, top + (unlabelled is None))
    return ["background", *(f"class {i}" for i in range(2, n + 1))]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ours = (folder / FILE).exists() or any(folder.rglob("*.strokes.tif"))
        taken = [
            name
            for name in ("annotations", "images", "rounds")
            if not ours and (folder / name).exists()
        ]
    except OSError as error:
        raise SaveError(
            f"The folder `{io.shown(folder)}` cannot be made: {error.strerror}. Choose "
            "another one."
        ) from error
    if taken:
        raise SaveError(
            f"`{io.shown(folder)}` holds `{taken[0]}`, but is no project. Choose an "
            "empty folder, so that nothing of yours is mixed with a project."
        )


@contextmanager
def _writing(folder: Path) -> Iterator[Project | None]:
    """Be the only one that writes there; yields the project as it is, if any."""
    with io.lock(folder):
        yield load_project(folder) if (folder / FILE).exists() else None


def _with_annotations(now: Project, notes: list[NDArray[Any]]) -> Project:
    """Write annotations under new names."""
    if len(notes) != len(now.images):
        raise ValueError(
            f"The project has {len(now.images)} image(s), got {len(notes)} "
            "annotation(s). Give one for each, in the same order."
        )
    for note, image in zip(notes, now.images, strict=True):
        if note.shape != image.shape:
            raise ValueError(
                f"The annotation of `{io.shown(image.name)}` must have the image's "
                f"shape {image.shape}, got {note.shape}."
            )
    folder = own_folder(now.folder, "annotations")
    serials = [
        int(p.name[-18:-12]) for p in folder.glob(f"*.{'[0-9]' * 6}.strokes.tif")
    ]
    serial = max(serials, default=0)
    images = []
    for note, image in zip(notes, now.images, strict=True):
        serial += 1
        name = f"{plain(image.name)}.{serial:06d}.strokes.tif"
        io.write_labels(folder / name, note)
        images.append(replace(image, annotation=name))
    return replace(now, images=tuple(images))


def _weights(model: Model) -> str:
    """Return what tells a model's weights and classes from all others."""
    contents = model.contents()
    digest = hashlib.sha256(json.dumps(contents.config, sort_keys=True).encode())
    for name, array in sorted(contents.tensors.items()):
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def _with_model(now: Project, model: Model) -> Project:
    """Make a model the current one: the round that has its weights, or a new one."""
    weights = _weights(model)
    for known in now.rounds:
        if known.weights == weights:
            return replace(now, current=known.number, **_of(model))
    return _with_round(now, model)


def _of(model: Model) -> dict[str, Any]:
    """Return what a project tells of its current model."""
    return {
        "classes": model.classes,
        "network": model.config,
        "held_out": HeldOut.of(model.provenance),
    }


def _are_kept(now: Project) -> bool:
    """Whether the current annotations are the strokes of the current round."""
    if now.current is None:
        return False
    kept, mine = now.read_annotations(now.current), now.read_annotations()
    return len(kept) == len(mine) and all(map(np.array_equal, kept, mine))


def _with_round(now: Project, model: Model, *, keep: int | None = None) -> Project:
    """Write a round from the current annotations, and forget what is too old."""
    parent = own_folder(now.folder, "rounds")
    taken = [int(p.name) for p in parent.iterdir() if p.name.isdecimal()]
    number = max(taken, default=0) + 1
    folder = own_folder(parent, f"{number:03d}")
    model.save(folder / MODEL)
    strokes, painted = [], 0
    for image, note in zip(now.images, now.read_annotations(), strict=True):
        io.write_labels(folder / image.annotation, note)
        strokes.append(image.annotation)
        dense = model.unlabelled is None
        painted += note.size if dense else int(np.count_nonzero(note))
    last = model.history[-1] if model.history else None
    interval = model.provenance.get("held_out_interval")
    known = last is not None and last.score is not None and np.isfinite(last.score)
    values = {
        "score": float(last.score) if known and last else None,  # type: ignore[arg-type]
        "interval": [min(1.0, max(0.0, float(v))) for v in interval]
        if known and isinstance(interval, (list, tuple)) and len(interval) == 2
        else [],
        "steps": last.step if last else 0,
        "painted": painted,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "weights": _weights(model),
        "strokes": strokes,
    }
    _write_json(folder / SCORE, values)
    fresh = Round(
        number,
        **{**values, "interval": tuple(values["interval"]), "strokes": tuple(strokes)},  # type: ignore[arg-type]
        folder=folder,
    )
    return replace(
        now,
        rounds=_pruned((*now.rounds, fresh), {number, keep}),
        current=number,
        **_of(model),
    )


def _pruned(rounds: tuple[Round, ...], keep: set[int | None]) -> tuple[Round, ...]:
    """Return the newest rounds, and of the older ones the best."""
    scored = [r for r in rounds if r.score is not None]
    best = max(scored, key=lambda r: r.score or 0.0, default=None)
    must = {*keep, best.number if best else None}
    left = list(rounds)
    for old in rounds:
        if len(left) > KEPT and old.number not in must:
            left.remove(old)
    return tuple(left)


def _commit(now: Project) -> Project:
    """Write the list of all files, then remove what it no longer names."""
    values = {
        "format": FORMAT,
        "version": VERSION,
        "classes": list(now.classes),
        "unlabelled": now.unlabelled,
        "settings": {
            "network": None if now.network is None else now.network.to_dict(),
            "training": now.config.to_dict(),
            "depth": now.depth,
        },
        "held_out": None if now.held_out is None else now.held_out.to_dict(),
        "images": [
            {
                "name": image.name,
                "files": list(image.facts),
                "shape": list(image.shape),
                "channel_axis": image.channel_axis,
                "rgb": image.rgb,
                "scale": list(image.scale),
                "translate": list(image.translate),
                "units": list(image.units),
                "annotation": image.annotation,
            }
            for image in now.images
        ],
        "rounds": [r.number for r in now.rounds],
        "current": now.current,
    }
    parsed(now.folder, values)  # what could not be opened again is not written
    _write_json(now.folder / FILE, values)
    _sweep(now)
    return load_project(now.folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=1, allow_nan=False) + "\n"
    io.write_text(path, text, overwrite=True)


def _sweep(now: Project) -> None:
    """Remove our own files that the project no longer names."""
    io.sweep(now.folder / FILE)
    named = {image.annotation for image in now.images}
    numbers = {r.number for r in now.rounds}
    gone = [
        path
        for path in (now.folder / "annotations").glob(f"*.{'[0-9]' * 6}.strokes.tif")
        if path.name not in named
    ]
    for name in ("annotations", "images"):  # of killed writes
        gone += (now.folder / name).glob(".*.part")
    with suppress(OSError):
        for folder in (now.folder / "rounds").iterdir():
            if folder.name.isdecimal() and int(folder.name) not in numbers:
                gone += [folder / MODEL, folder / SCORE, *folder.glob("*.strokes.tif")]
                gone += folder.glob(".*.part")
                gone.append(folder)
    for path in gone:
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
