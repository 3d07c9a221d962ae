"""One image larger than memory: what is done is kept, the rest done step by step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from napari_unetpp import __version__, cluster, io
from napari_unetpp.bigimage.engine import Engine, Job, Place, Tiles, is_path, work
from napari_unetpp.config import PredictConfig
from napari_unetpp.device import resolve_device
from napari_unetpp.errors import SaveError
from napari_unetpp.model import Model, check_depth
from napari_unetpp.preprocess import Planes

if TYPE_CHECKING:
    from collections.abc import Generator

    from napari_unetpp.io import Part
    from napari_unetpp.predict import Core


class Stop(Protocol):
    """What is asked whether to end, for example a `threading.Event`."""

    def is_set(self) -> bool:
        """Return whether to end."""


@dataclass(frozen=True)
class ZarrStep:
    """How far `predict_to_zarr_steps` has come.

    Attributes
    ----------
    state : {"started", "tile", "pyramid", "done"}
        What has just happened; "started" tells how much an earlier run has done.
    done, total : int
        Pixels that are written, of all pixels of the labels; during "pyramid" of its
        smaller levels.
    slices : tuple of int and slice, or None
        In the state "tile": its place in the labels.
    labels : Path
        The OME-Zarr label image: in the folder ``NAME.zarr.part`` until "done".
    """

    state: Literal["started", "tile", "pyramid", "done"]
    done: int
    total: int
    labels: Path
    slices: Place | None = None


def predict_to_zarr_steps(
    model: Model,
    image: Any,
    path: str | os.PathLike[str],
    *,
    depth: int | None = None,
    heads: Literal["last", "mean"] = "last",
    channel_axis: int | None = None,
    tile: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    scheduler: str | None = None,
    stop: Stop | None = None,
) -> Generator[ZarrStep, None, None]:
    """Label an image of any size into an OME-Zarr label image, and go on after a kill.

    Parameters
    ----------
    model : Model
        Left unchanged.
    image : path or array of shape (..., Y, X), with channels at `channel_axis`
        A file that `open_image` reads, or an array: dask, zarr, numpy.
    path : path
        Ends in ``.zarr``. Until it is complete, it is called ``NAME.zarr.part``; the
        same call goes on with what is there.
    depth, heads, device
        As for `predict_tiles`.
    channel_axis : int or None, optional
        Axis of the channels; None: as the file tells, else a single channel.
    tile : int or None, optional
        Side of a tile, and of a chunk of the labels, as for `predict_tiles`.
    overwrite : bool, optional
        Whether labels that exist are replaced, once the new ones are complete, and an
        unfinished result of other settings is begun anew.
    workers : int or None, optional
        Number of processes on this computer that share the tiles.
    scheduler : str or None, optional
        Address of a running dask scheduler, whose workers share the tiles; image and
        `path` must have the same names on all computers.
    stop : object with ``is_set()``, optional
        Asked after each tile; what is done is kept.

    Yields
    ------
    step : ZarrStep
        "started", then "tile" for each, "pyramid" for each chunk of the smaller
        levels, and "done".

    Raises
    ------
    ValueError
        If an argument is out of range or the image does not fit the model.
    SaveError
        If `path` exists, is being written, or was begun with other settings.
    ImageFileError, DeviceMemoryError, MissingPackageError, ClusterError
        See there.
    """
    PredictConfig(tile, depth, heads)
    target = _checked_target(path, image, overwrite)
    opened = io.open_image(image) if is_path(image) else image
    if channel_axis is None:
        channel_axis = getattr(opened, "channel_axis", None)
    planes = Planes(opened, channel_axis=channel_axis)
    if planes.channels != model.config.in_channels:
        raise ValueError(
            f"`image` must have {model.config.in_channels} channel(s) for this model, "
            f"got {planes.channels} (shape {tuple(opened.shape)}, "
            f"channel_axis={channel_axis})."
        )
    if len(planes.leading) > 3:
        raise ValueError(
            "OME-Zarr has at most 5 axes, got labels of shape "
            f"{(*planes.leading, *planes.shape)}. Predict a part of the image."
        )
    resolve_device(device)
    shared = cluster.Wanted(workers, scheduler)
    source = _source(image, opened)
    if shared and isinstance(source, np.ndarray):
        raise ValueError(
            "Workers read the image themselves: it must be a path, or a dask or zarr "
            "array, got one in memory. Save it, or leave out `workers`."
        )
    part = io.Part(target)
    job = Job(
        labels=part.labels.absolute(),
        model=part.model.absolute(),
        image=source,
        channel_axis=channel_axis,
        tile=tile,
        depth=check_depth(model.network, depth),
        heads=heads,
        device=device,
        key=secrets.token_hex(8),
    )
    return _steps(model, opened, job, target, overwrite, shared, stop)


def predict_to_zarr(
    model: Model, image: Any, path: str | os.PathLike[str], **settings: Any
) -> Path:
    """Label an image of any size into an OME-Zarr label image.

    Parameters
    ----------
    model, image, path, **settings
        As for `predict_to_zarr_steps`.

    Returns
    -------
    labels : Path
        The label image; where `stop` has ended the work, the unfinished one.
    """
    labels = Path(path)
    for step in predict_to_zarr_steps(model, image, path, **settings):
        labels = step.labels
    return labels


def _source(image: Any, opened: Any) -> Any:
    """Return what a worker opens: a path where there is one."""
    if is_path(image):
        return Path(image).absolute()
    return opened.path.absolute() if isinstance(opened, io.LazyImage) else opened


def _checked_target(path: Any, image: Any, overwrite: bool) -> Path:
    target = Path(path)
    name = io.shown(target)
    if target.suffix.lower() != ".zarr":
        raise ValueError(f"`{name}` must end in .zarr. Add it to the name.")
    if not target.absolute().parent.is_dir():
        raise SaveError(f"There is no folder for `{name}`. Create it first.")
    image = getattr(image, "path", image)
    if is_path(image):
        mine, other = (Path(os.path.realpath(p)) for p in (target, image))
        if mine == other or other in mine.parents or mine in other.parents:
            raise ValueError(
                f"`{name}` and the image must not be the same or lie in each other. "
                "Choose another name for the labels."
            )
    if os.path.lexists(target):
        _tidy(target)
        if not overwrite:
            raise SaveError(
                f"`{name}` exists. Choose another name or pass overwrite=True."
            )
        if not io.is_labels(target):
            raise SaveError(
                f"`{name}` exists and is no label image, so it is not replaced. Choose "
                "another name."
            )
    return target


def _tidy(target: Path) -> None:
    """Delete what a kill on the last steps has left beside complete labels."""
    part = io.Part(target)
    if part.lock.exists() and not part.labels.exists():
        with contextlib.suppress(SaveError), io.part(target) as part:
            if not part.labels.exists():
                part.close()


def _steps(
    model: Model,
    image: Any,
    job: Job,
    target: Path,
    overwrite: bool,
    shared: cluster.Wanted,
    stop: Stop | None,
) -> Generator[ZarrStep, None, None]:
    planes = Planes(image, channel_axis=job.channel_axis)
    tiles = Tiles(model, planes, job)
    with io.part(target) as part:
        _begin(part, model, image, job, planes, tiles.side, overwrite)
        part.sweep()
        labels = io.Labels(part.labels)
        # A power cut may have taken pixels that the manifest already tells of.
        done = {
            n: crc
            for n, crc in part.done().items()
            if n < len(tiles) and labels.checksum(tiles[n][2]) == crc
        }
        pixels = sum(_pixels(tiles[n][1]) for n in done)
        total = math.prod((*planes.leading, *planes.shape))
        yield ZarrStep("started", pixels, total, part.labels)
        todo = (n for n in range(len(tiles)) if n not in done)
        with contextlib.ExitStack() as stack:
            add = stack.enter_context(part.manifest(done))
            if shared:
                client = stack.enter_context(shared.client())
                finished = cluster.each(client, work, job, todo)
            else:
                engine = Engine(job, model, image)
                finished = ((n, engine.write(n)) for n in todo)
            stack.callback(finished.close)
            if _asked(stop):
                return
            for n, crc in finished:
                add(n, crc)
                pixels += _pixels(tiles[n][1])
                yield ZarrStep("tile", pixels, total, part.labels, tiles[n][2])
                if _asked(stop):
                    return
        coarse = 0
        for count in labels.coarsen():
            coarse += count
            yield ZarrStep("pyramid", coarse, labels.coarse, part.labels)
            if _asked(stop):
                return
        part.finish()
    yield ZarrStep("done", total, total, target)


def _asked(stop: Stop | None) -> bool:
    return stop is not None and stop.is_set()


def _pixels(core: Core) -> int:
    return math.prod(stop - start for start, stop in core)


def _begin(
    part: Part,
    model: Model,
    image: Any,
    job: Job,
    planes: Planes,
    chunk: int,
    overwrite: bool,
) -> None:
    """Go on with what is there if it is of the same plan, else begin."""
    axes = getattr(image, "axes", None) or io.plain_axes(len(image.shape))
    if job.channel_axis is not None:
        axes = tuple(np.delete(np.array(axes, object), job.channel_axis))
    plan = {
        "version": __version__,
        "model": _digest(model),
        "image": str(job.image) if is_path(job.image) else "array",
        "shape": list(image.shape),
        "dtype": str(image.dtype),
        "channel_axis": job.channel_axis,
        "chunk": chunk,
        "depth": job.depth,
        "heads": job.heads,
        # Tells images apart that have the same name.
        "limits": model.preprocessing.limits(planes.plane(0)).tolist(),
    }
    old = part.plan()
    if old == plan and part.labels.is_dir():
        return
    if old is not None and old != plan and not overwrite:
        wrong = ", ".join(sorted(k for k in plan if plan[k] != old.get(k)))
        raise SaveError(
            f"`{io.shown(part.folder)}` is an unfinished result that was begun with "
            f"something else ({wrong}). Use the same again, delete that folder, or "
            "pass overwrite=True to begin anew."
        )
    part.empty()
    first = 1 if model.unlabelled == 0 else 0
    io.create_labels(
        part.labels,
        (*planes.leading, *planes.shape),
        chunk,
        io.ordered(axes),
        dict(enumerate(model.classes, start=first)),
        getattr(image, "version", "0.5"),
    )
    model.save(part.model, overwrite=True)
    part.begin(plan)


def _digest(model: Model) -> str:
    """Return what tells models apart that predict differently."""
    file = model.contents()
    digest = hashlib.sha256(json.dumps(file.config, sort_keys=True).encode())
    for name in sorted(file.tensors):
        digest.update(np.ascontiguousarray(file.tensors[name]).tobytes())
    return digest.hexdigest()
