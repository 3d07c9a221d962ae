"""Which images there are and which files are made of them, checked before any work."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tifffile

from napari_unetpp import io
from napari_unetpp.config import check_number
from napari_unetpp.errors import ImageFileError, SaveError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray


REPLACE = "pass overwrite=True to replace it"


class Picture(NamedTuple):
    """An image as read, its channels (if any) on the last axis."""

    path: Path
    pixels: NDArray[Any]
    channel_axis: int | None  # -1 or None
    note: str  # what was decided without being asked, or ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the labels."""
        return self.pixels.shape[: self.channel_axis]

    @property
    def channels(self) -> int:
        """Number of channels."""
        return 1 if self.channel_axis is None else self.pixels.shape[-1]


@dataclass(frozen=True, eq=False)
class Target:
    """An image and the files to make of it.

    Attributes
    ----------
    image : Path or array of shape (..., Y, X), with channels at `channel_axis`
        A file, or an image in memory or lazy.
    labels : Path or None
        The label TIFF to write; None: none, the labels come tile by tile only.
    probabilities : Path or None
        The TIFF of the probabilities to write, a channel per class.
    channel_axis : int or None
        Of an array: the axis of its channels. Files tell it themselves.
    name : str
        How an array is called; files are called by their names.
    """

    image: Any
    labels: Path | None = None
    probabilities: Path | None = None
    channel_axis: int | None = None
    name: str = ""

    @property
    def title(self) -> str:
        """What to call the image, as plain text of at most 64 characters."""
        return io.shown(self.name or (self.image if self.is_file else "image"))

    @property
    def is_file(self) -> bool:
        """Whether the image is a file."""
        return isinstance(self.image, (str, os.PathLike))

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are made."""
        both = (self.labels, self.probabilities)
        return tuple(path for path in both if path is not None)


# --- reading ---------------------------------------------------------------------


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the image files that are given by name or by their folder.

    Raises
    ------
    ImageFileError
        If something is missing, or a folder has no image.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise ImageFileError(
                f"There is no file or folder `{io.shown(path)}`. Check name and folder."
            )
        found += io.list_images(path)
    return found


def read_picture(
    path: Path, channel_axis: int | None = None, *, channels: int | None = None
) -> Picture:
    """Read an image and find its channels.

    Parameters
    ----------
    path : Path
        The image file.
    channel_axis : int or None
        Axis of the channels; None: where the file says so, else there is one channel.
    channels : int or None
        How many the model takes; alpha is dropped unless it is among them.
    """
    axes = io.probe(path).axes or ""
    pixels = io.read_image(path)
    if channel_axis is not None:
        check_number(
            "channel_axis", channel_axis, -pixels.ndim, pixels.ndim - 1, whole=True
        )
        return Picture(path, np.moveaxis(pixels, channel_axis, -1), -1, "")
    if len(axes) != pixels.ndim or not {"S", "C"} & set(axes):
        return Picture(path, pixels, None, "")
    colour = "S" in axes
    pixels = np.moveaxis(pixels, axes.index("S" if colour else "C"), -1)
    note = f"{pixels.shape[-1]} channels, as the file says"
    if colour and pixels.shape[-1] in (2, 4) and channels != pixels.shape[-1]:
        pixels = pixels[..., :-1]
        note = "colour without its transparency (alpha)"
    elif colour:
        note = "colour, channel axis -1"
    if pixels.shape[-1] == 1:
        return Picture(path, pixels[..., 0], None, "grey without transparency (alpha)")
    return Picture(path, pixels, -1, note)


# --- planning --------------------------------------------------------------------


def plan_files(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    probabilities: bool = False,
) -> list[Target]:
    """List image files with the files to make of them.

    Parameters
    ----------
    images : path or sequence of path
        Image files and folders of them (without their subfolders).
    out : path
        The folder of the outputs, ``NAME.tif`` for an image ``NAME``; for a single
        image also the name of a TIFF.
    probabilities : bool, optional
        Whether ``NAME_probabilities.tif`` is made as well.

    Returns
    -------
    targets : list of Target
        In the order of the names.

    Raises
    ------
    ValueError
        If two images would give one file, or `out` is the folder of the images.
    ImageFileError
        If an image or folder is missing, or a folder has no image.
    """
    if isinstance(images, (str, os.PathLike)):
        images = [images]
    given, out = [Path(path) for path in images], Path(out)
    found = find_images(given)
    one_file = (
        len(given) == 1
        and not given[0].is_dir()
        and out.suffix.lower() in (".tif", ".tiff")
        and not out.is_dir()
    )
    _check_folder(out.parent if one_file else out, [] if one_file else given, one_file)
    targets = []
    for image in found:
        labels = out if one_file else out / f"{image.stem}.tif"
        beside = labels.with_name(f"{labels.stem}_probabilities.tif")
        targets.append(Target(image, labels, beside if probabilities else None))
    _check_different(targets)
    return targets


def _check_folder(out: Path, given: Sequence[Path], must_exist: bool) -> None:
    name = io.shown(out)
    if must_exist and not out.is_dir():
        raise ValueError(f"There is no folder `{name}`. Create it first.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"`{name}` is a file, but the output is a folder of labels.")
    for path in given:
        if path.is_dir() and os.path.realpath(path) == os.path.realpath(out):
            raise ValueError(
                f"`{name}` is the folder of the images, which labels would mix with. "
                "Choose another folder for the output."
            )


def _check_different(targets: Sequence[Target]) -> None:
    seen: dict[str, Target] = {}
    for target in targets:
        for file in target.files:
            # Windows and macOS do not tell capitals from small letters.
            other = seen.setdefault(str(file).casefold(), target)
            if other is not target:
                raise ValueError(
                    f"`{other.title}` and `{target.title}` would both give "
                    f"`{io.shown(file)}`. Rename one, or use two output folders."
                )


def check_targets(
    targets: Sequence[Target],
    *,
    keep: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
    remedy: str = REPLACE,
) -> None:
    """Refuse outputs that cannot or must not be written; folders may be missing yet.

    Parameters
    ----------
    targets : sequence of Target
        What is planned.
    keep : iterable of path
        Files that no output may replace, beside the images.
    overwrite : bool
        Whether outputs may exist.
    remedy : str
        What the message advises where one exists.

    Raises
    ------
    ValueError, SaveError
        As `check_output`, and if two targets would give one file.
    """
    _check_different(targets)
    inputs = {os.path.realpath(path) for path in keep}
    inputs |= {os.path.realpath(t.image) for t in targets if t.is_file}
    for file in (f for t in targets for f in t.files):
        if file.parent.is_dir():
            _check_output(file, inputs, overwrite, remedy)


def check_output(
    path: Path,
    inputs: Iterable[Path],
    *,
    overwrite: bool,
    remedy: str = REPLACE,
) -> None:
    """Refuse an output that cannot or must not be written.

    Raises
    ------
    ValueError
        If it is an input, exists without `overwrite`, or has no folder.
    SaveError
        If the folder is write-protected.
    """
    _check_output(path, {os.path.realpath(p) for p in inputs}, overwrite, remedy)


def _check_output(path: Path, inputs: set[str], overwrite: bool, remedy: str) -> None:
    name = io.shown(path)
    real = os.path.realpath(path)
    if real in inputs:
        raise ValueError(f"`{name}` is an input. Choose another name for the output.")
    if path.is_dir():
        raise ValueError(f"`{name}` is a folder. Add the name of a file to it.")
    if os.path.lexists(path) and not overwrite:
        raise ValueError(
            f"`{name}` exists. Choose another name or folder, or {remedy}."
        )
    folder = Path(real).parent
    if not folder.is_dir():
        raise ValueError(
            f"There is no folder `{io.shown(folder)}` for `{name}`. Create it first."
        )
    if not os.access(folder, os.W_OK):
        raise SaveError(
            f"The folder `{io.shown(folder)}` is write-protected. Choose another one."
        )


def make_folder(path: Path) -> None:
    """Create a folder where there is none.

    Raises
    ------
    SaveError
        If that fails.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"The folder `{io.shown(path)}` cannot be made: {error.strerror or error}. "
            "Choose another one."
        ) from error


@contextmanager
def alone(targets: Sequence[Target]) -> Iterator[None]:
    """Be the only run that writes into the folders of these outputs, or its one file.

    Raises
    ------
    SaveError
        If a folder cannot be made or written into, or another run writes there.
    """
    files = [f for t in targets for f in t.files]
    with ExitStack() as locks:
        for folder in sorted({f.parent for f in files}):
            make_folder(folder)
            if len(targets) > 1:
                locks.enter_context(io.lock(folder))
        if len(targets) == 1:  # many jobs of an image each may share a folder
            for file in files:
                locks.enter_context(io.lock(file))
        for file in files:
            io.sweep(file)
        yield


def write_probabilities(
    path: Path, values: NDArray[np.float32], *, overwrite: bool = False
) -> None:
    """Write probabilities (K, ..., Y, X) as a float32 TIFF, a channel per class."""
    axes = f"C{'QQQZYX'[-(values.ndim - 1) :]}"
    buffer = BytesIO()
    tifffile.imwrite(
        buffer,
        values,
        bigtiff=values.nbytes > 2**31,
        photometric="minisblack",
        metadata={"axes": axes},
    )
    io.atomic_write(path, buffer.getvalue(), overwrite=overwrite)
