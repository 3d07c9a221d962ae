"""A training as a script: what the dock did, as lines of `api` that run anywhere."""

from __future__ import annotations

import io as buffers
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from napari_unetpp import __version__, io
from napari_unetpp.errors import ImageFileError, SaveError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Channel:
    """An image, or one of the channels that make one, in a file or in memory alone.

    Attributes
    ----------
    data : array
        Its pixels.
    path : str or None
        The file that holds them, if there is one.
    colours : bool
        Whether the last axis holds red, green, blue (and alpha, which is dropped).
    """

    data: Any
    path: str | None = None
    colours: bool = False


@dataclass(frozen=True, eq=False)
class Job:
    """What a training was made of.

    Attributes
    ----------
    images : sequence of sequence of Channel
        Each image; one of several channels is stacked from them.
    annotations : sequence of mapping of int to ndarray of shape (Y, X)
        The painted planes of each image, by number in C order.
    shapes : sequence of tuple of int
        Shape of each annotation.
    classes : tuple of str
        Names.
    network : str
        One of `NETWORKS`.
    width : int or None
        Of the network, None: the default for work.
    settings : dict
        What differs from the defaults of `TrainConfig`.
    seed : int
        Of the training.
    steps : int
        How many were taken; 0: half a minute is written instead.
    start : str or None
        The model file that it went on from.
    """

    images: Sequence[Sequence[Channel]]
    annotations: Sequence[Mapping[int, NDArray[np.uint8]]]
    shapes: Sequence[tuple[int, ...]]
    classes: tuple[str, ...]
    network: str
    width: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    steps: int = 0
    start: str | None = None


def write_script(job: Job, folder: Path) -> str:
    """Return the script; what is in no file yet is written to `folder`.

    Parameters
    ----------
    job : Job
        What to write down.
    folder : Path
        Where annotations and unsaved images go; made if there is none.

    Raises
    ------
    ValueError
        If the images do not all have their channels on the same axis.
    SaveError
        If the folder cannot be made or written to.
    """
    axes = {_axis(channels) for channels in job.images}
    if len(axes) > 1:
        raise ValueError(
            "A script needs images that all have their channels on the same axis; "
            "colour and grey images, or several layers and one, cannot be mixed."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(
            f"The folder `{io.shown(folder)}` cannot be made: {error.strerror}. Make "
            "room, or check its access rights."
        ) from error
    images = [_image(c, folder, f"image_{i}") for i, c in enumerate(job.images)]
    notes = [
        _annotation(planes, shape, folder / f"annotation_{i}.tif")
        for i, (planes, shape) in enumerate(
            zip(job.annotations, job.shapes, strict=True)
        )
    ]
    return _text(job, images, notes, axes.pop() if axes else None)


def _axis(channels: Sequence[Channel]) -> int | None:
    if len(channels) > 1:
        return 0
    return -1 if channels[0].colours else None


def _image(channels: Sequence[Channel], folder: Path, stem: str) -> str:
    """Return the expression that reads an image."""
    parts = []
    for i, channel in enumerate(channels):
        path = Path(channel.path) if channel.path else None
        if path is None or not _holds(path, channel.data, colours=channel.colours):
            path = folder / f"{stem}_{i}.npy"
            buffer = buffers.BytesIO()
            np.save(buffer, np.asarray(channel.data), allow_pickle=False)
            io.atomic_write(path, buffer.getvalue(), overwrite=True)
        parts.append(_read(path) + ("[..., :3]" if channel.colours else ""))
    return parts[0] if len(parts) == 1 else f"np.stack([{', '.join(parts)}])"


def _holds(path: Path, data: Any, *, colours: bool) -> bool:
    """Return whether a file alone holds these very pixels."""
    if path.suffix.lower() not in io.SUFFIXES or not path.is_file():
        return False
    try:
        found = io.read_image(path)
    except ImageFileError:
        return False
    if colours:
        found = found[..., :3]
    return found.shape == data.shape and np.array_equal(found, np.asarray(data))


def _read(path: Path) -> str:
    suffix = path.suffix.lower()
    reader = "np.load" if suffix == ".npy" else "imread"
    if suffix in (".tif", ".tiff"):
        reader = "tifffile.imread"
    return f"{reader}({str(path)!r})"


def _annotation(
    planes: Mapping[int, NDArray[np.uint8]], shape: tuple[int, ...], path: Path
) -> str:
    whole = np.zeros((int(np.prod(shape[:-2], dtype=np.int64)), *shape[-2:]), np.uint8)
    for number, plane in planes.items():
        whole[number] = plane
    io.write_labels(path, whole.reshape(shape), overwrite=True)
    return _read(path)


def _text(job: Job, images: list[str], notes: list[str], axis: int | None) -> str:
    options = [f"classes={job.classes!r}"]
    lines = [
        f"# Written by napari-unetpp {__version__}: trains as the dock did, labels the "
        "same images.",
        "import numpy as np",
        "import tifffile",
        "from skimage.io import imread",
        "",
        "from napari_unetpp import api",
        "",
        "images = [",
        *(f"    {image}," for image in images),
        "]",
        "annotations = [  # 0 = not annotated, 1 = the first class",
        *(f"    {note}," for note in notes),
        "]",
    ]
    if job.start is not None:
        options.append("model=start")
        lines.append(f"start = api.load_model({job.start!r})")
    elif job.width is not None:
        options.append("model=start")
        first = job.images[0]
        channels = len(first) if len(first) > 1 else 3 if first[0].colours else 1
        lines += [
            "start = api.create_model(",
            f"    {job.network!r}, classes={job.classes!r}, in_channels={channels}, "
            f"width={job.width}, seed={job.seed},",
            ")",
        ]
    else:
        options.append(f"network={job.network!r}")
    if axis is not None:
        options.append(f"channel_axis={axis}")
    if job.settings:
        changes = ", ".join(f"{key}={value!r}" for key, value in job.settings.items())
        options.append(f"config=api.TrainConfig({changes})")
    options.append(f"max_steps={job.steps}" if job.steps else "max_seconds=30")
    options.append(f"seed={job.seed}")
    place = f", channel_axis={axis}" if axis is not None else ""
    lines += [
        "model = api.train(",
        "    images,",
        "    annotations,",
        *(f"    {option}," for option in options),
        ")",
        'model.save("model.safetensors", overwrite=True)',
        "for i, image in enumerate(images):",
        f"    labels = api.predict(model, image{place})",
        '    tifffile.imwrite(f"labels_{i}.tif", labels, compression="zlib")',
    ]
    source = "\n".join(lines)
    for used, line in (
        (r"\bnp\.", "import numpy as np\n"),
        (r"(?<![.\w])imread\(", "from skimage.io import imread\n"),
    ):
        if not re.search(used, source):
            source = source.replace(line, "")
    return source + "\n"
