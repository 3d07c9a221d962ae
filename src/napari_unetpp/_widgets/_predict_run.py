"""What the Predict dock asks of the thread that works, and what comes back from it."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ._worker import failure_of
from .pairs import plain

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Generator

    import numpy as np
    from numpy.typing import NDArray

    from napari_unetpp.api import BatchStep, Model, Target

_REMEDY = "tick `Skip images that are done`"
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{a}{n}" for a in ("com", "lpt")
                                            for n in range(1, 10)}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """An image layer as it was when Predict was pressed."""

    name: str
    data: Any
    channel_axis: int | None
    path: Path | None  # the file that the layer was read from


@dataclass(frozen=True, eq=False)
class Request:
    """All that a run needs; nothing of it changes while it runs."""

    model: Path | Model  # its file, or one that is not saved
    sources: tuple[Source, ...] = ()
    folder: Path | None = None  # instead of sources
    out: Path | None = None  # None: as layers
    depth: int | None = None
    heads: Literal["last", "mean"] = "last"
    skip_existing: bool = False


@dataclass(frozen=True)
class Facts:
    """What a model file holds, in plain words and numbers."""

    network: str
    classes: tuple[str, ...]
    channels: int
    depths: tuple[int, ...]
    dense: bool  # value 0 is the first class, not "not annotated"
    history: str
    saved: str  # date and time, "" for a model that has no file

    def text(self) -> str:
        """Return three lines that are short where the names are."""
        names = ", ".join(plain(n) for n in self.classes[:6])
        more = len(self.classes) - 6
        names += f" and {more} more" if more > 0 else ""
        first = f"{self.network}, {self.channels} channel{'s' * (self.channels > 1)}"
        if len(self.depths) > 1:
            first += f", depths L{self.depths[0]} to L{self.depths[-1]}"
        classes = f"{len(self.classes)} classes: {names}"
        day = self.saved.split()[0] if self.saved else "just trained, not saved"
        return f"{first}\n{classes}\n{self.history}, {day}"


@dataclass(frozen=True)
class Begun:
    """The model is read; `joined`: the layers are the channels of one image."""

    facts: Facts
    joined: bool


@dataclass(frozen=True)
class Progress:
    """How far the run is: words, and a share from 0 to 1."""

    text: str
    share: float


@dataclass(frozen=True, eq=False)
class Piece:
    """Labels of a part of image `number` (from 1)."""

    key: tuple[Any, ...]
    number: int
    title: str
    shape: tuple[int, ...]
    slices: tuple[int | slice, ...]
    labels: NDArray[np.uint8]


@dataclass(frozen=True)
class Summary:
    """What has become of the images so far."""

    total: int
    done: tuple[int, ...] = ()  # their numbers
    skipped: int = 0
    failures: tuple[tuple[str, str], ...] = ()  # name and reason
    seconds: float = 0.0
    stopped: bool = False
    out: str = ""
    started: float = field(default_factory=time.monotonic, compare=False)

    def text(self) -> str:
        """Return what has become of the images, and the reason if one failed."""
        n, failed = len(self.done), self.reasons()
        if self.total == 1 and failed:
            return failed[0]
        counts = f"{n:,} of {self.total:,} images"
        if n == self.total:
            counts = f"{n:,} image{'s' * (n != 1)}"
        text = f"{counts} labelled in {self.seconds:.1f} s"
        if self.skipped:
            text += f", {self.skipped:,} skipped because done before"
        if failed:
            text += f", {len(failed):,} failed"
        if self.stopped:
            text = f"Cancelled: {text}"
        if n and self.out:
            text += f". Written to {plain(Path(self.out).name)}"
        return f"{text}. {failed[0]}" if len(failed) == 1 else f"{text}."

    def reasons(self) -> list[str]:
        """Return a line for each image that failed."""
        return [
            reason if name in reason else f"{name}: {reason}"
            for name, reason in self.failures
        ]


def read_model(path: Path) -> Callable[[threading.Event], Generator[Any, None, Facts]]:
    """Return what the thread runs to tell what a model file holds."""

    def make(_stop: threading.Event) -> Generator[Any, None, Facts]:
        from napari_unetpp import api

        facts = facts_of(api.load_model(path), path)
        yield facts
        return facts

    return make


def run(
    request: Request,
) -> Callable[[threading.Event], Generator[Any, None, Summary]]:
    """Return what the thread runs to label the images of a request."""

    def make(stop: threading.Event) -> Generator[Any, None, Summary]:
        from napari_unetpp import api

        path, model = None, request.model
        if isinstance(model, Path):
            path, model = model, api.load_model(model)
        joined = _are_channels(request.sources, model.config.in_channels)
        yield Begun(facts_of(model, path), joined)
        targets = _targets(request, joined)
        steps = api.predict_files(
            model,
            targets,
            depth=request.depth,
            heads=request.heads,
            skip_existing=request.skip_existing,
            keep=[p for p in (path, *(s.path for s in request.sources)) if p],
            remedy=_REMEDY,
            stop=stop,
        )
        summary = Summary(len(targets), out=str(request.out or ""))
        noun = "file" if request.folder else "image"
        for step in steps:
            yield Progress(_words(step, noun), _share(step))
            if step.tile is not None and request.out is None:
                yield _piece(step)
            if step.state not in ("started", "tile"):
                summary = _counted(summary, step)
                yield summary
        seconds = time.monotonic() - summary.started
        return replace(summary, seconds=seconds, stopped=stop.is_set())

    return make


def facts_of(model: Model, path: Path | None) -> Facts:
    """Return what a model is, and when its file was saved."""
    last = model.history[-1] if model.history else None
    words = "untrained"
    if last is not None:
        words = f"{last.step:,} steps"
        if last.score is not None and math.isfinite(last.score):
            words += f", held-out IoU {last.score:.2f}"
    saved = ""
    if path is not None:
        when = time.localtime(os.path.getmtime(path))
        saved = time.strftime("%Y-%m-%d %H:%M", when)
    return Facts(
        model.config.name,
        model.classes,
        model.config.in_channels,
        tuple(model.network.depths),
        model.unlabelled is None,
        words,
        saved,
    )


def _are_channels(sources: tuple[Source, ...], wanted: int) -> bool:
    """Return whether the layers are the channels of one image, as napari opens them."""
    shapes = {tuple(s.data.shape) for s in sources}
    grey = all(s.channel_axis is None for s in sources)
    return 1 < wanted == len(sources) and grey and len(shapes) == 1


def _targets(request: Request, joined: bool) -> list[Target]:
    from napari_unetpp import api

    out, sources = request.out, request.sources
    if request.folder is not None:
        # Without a place for labels the plan still finds the files.
        planned = api.plan_files(request.folder, out or default_out(request.folder))
        return planned if out else [api.Target(t.image) for t in planned]
    if joined:
        import dask.array

        parts = [
            dask.array.from_array(s.data, name=False)
            if not isinstance(s.data, dask.array.Array)
            else s.data
            for s in sources
        ]
        first = replace(sources[0], data=dask.array.stack(parts), channel_axis=0)
        sources = (first,)
    return [
        api.Target(
            s.data,
            out / f"{file_name(s.name)}.tif" if out else None,
            channel_axis=s.channel_axis,
            name=plain(s.name),
        )
        for s in sources
    ]


def default_out(folder: Path) -> Path:
    """Return where the labels of a folder's images go: beside it."""
    return folder.with_name(f"{folder.name}_labels")


def file_name(name: str) -> str:
    """Return a layer's name as every system takes it for a file, at most 80 long."""
    kept = "".join(c if c.isalnum() or c in " ._-+()[]" else "_" for c in name)
    kept = kept.encode()[:80].decode(errors="ignore").strip(" .")
    if kept.split(".")[0].lower() in _RESERVED:
        kept = f"_{kept}"
    return kept or "image"


def _words(step: BatchStep, noun: str) -> str:
    text = f"{noun} {step.number:,} of {step.count:,}"
    if step.planes > 1:
        text += f", plane {step.plane:,} of {step.planes:,}"
    elif step.state == "started":
        text += ", reading"
    return text


def _share(step: BatchStep) -> float:
    size = math.prod(step.shape) if step.shape else 0
    part = step.pixels / size if size else float(step.state in ("skipped", "failed"))
    return (step.number - 1 + part) / step.count


def _piece(step: BatchStep) -> Piece | None:
    tile = step.tile
    if tile is None:
        return None
    place = tuple((s.start, s.stop) if isinstance(s, slice) else s for s in tile.slices)
    return Piece(
        (step.number, place),
        step.number,
        step.target.title,
        step.shape,
        tile.slices,
        tile.labels,
    )


def _counted(summary: Summary, step: BatchStep) -> Summary:
    if step.state == "done":
        return replace(summary, done=(*summary.done, step.number))
    if step.state == "skipped":
        return replace(summary, skipped=summary.skipped + 1)
    if step.error is not None:
        reason = failure_of(step.error).message
        failure = (step.target.title, " ".join(reason.split()))
        return replace(summary, failures=(*summary.failures, failure))
    return summary
