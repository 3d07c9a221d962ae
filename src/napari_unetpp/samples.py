"""The sample images of scikit-image, with strokes and truths, as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np
import skimage.data
from skimage import io as skimage_io

from .errors import ImageFileError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_BORDERS = (
    "Outlines were drawn by hand and refined in two ways without the strokes ({0}); "
    "the truth is 0 (unsure, not judged) where the two differ, along every border, "
    "and where the eye could not decide. {1} of the pixels are judged. "
)
_TWO_FILLS = "a watershed of the gradient and a random walker"


@dataclass(frozen=True, eq=False)
class Sample:
    """A sample image with the strokes of a user and, where there is one, a truth.

    Attributes
    ----------
    name : str
        The name for `load`.
    title : str
        What a menu shows.
    image : ndarray, shape (..., Y, X) or (..., Y, X, C)
        The image as scikit-image carries it, or a crop of it; uint8 or uint16.
    channel_axis : int or None
        -1 where the last axis holds the channels, else None.
    strokes : ndarray of uint8, shape (..., Y, X)
        Brush strokes, 3 pixels wide: 0 = not annotated, v = ``classes[v - 1]``. All 0
        where a sample comes without strokes.
    truth : ndarray of uint8, shape (..., Y, X), or None
        Coded as `strokes`; 0 = unsure, not to be judged. None: nobody made one.
    classes : tuple of str
        The names of the classes, background first.
    description : str
        What the image shows, its source and licence, how the truth was made and how
        sure it is.
    needs_network : bool
        True where scikit-image fetches the image on first use.
    """

    name: str
    title: str
    image: NDArray[np.generic]
    channel_axis: int | None
    strokes: NDArray[np.uint8]
    truth: NDArray[np.uint8] | None
    classes: tuple[str, ...]
    description: str
    needs_network: bool = False


def _fetch(name: str) -> NDArray[np.generic]:
    # the loader by its name at call time: importing this room must fetch nothing
    return np.array(getattr(skimage.data, name)())


def _retina_crop() -> NDArray[np.generic]:
    return _fetch("retina")[226:738, 141:653].copy()


def _channels_last() -> NDArray[np.generic]:
    return np.ascontiguousarray(np.moveaxis(_fetch("cells3d"), 1, -1))


@dataclass(frozen=True)
class _Entry:
    """What is known of a sample before its image is loaded."""

    title: str
    classes: tuple[str, ...]
    description: str
    channel_axis: int | None = None
    needs_network: bool = False
    read: Callable[[], NDArray[np.generic]] | None = None


_ENTRIES: dict[str, _Entry] = {
    "immunohistochemistry": _Entry(
        title="Colon glands, immunohistochemistry: lumen, stroma, gland",
        classes=("background", "stroma", "gland"),
        channel_axis=-1,
        description=(
            "Colonic glands; FHL2 protein stained brown with DAB, nuclei "
            "counterstained with haematoxylin (512 x 512, RGB). Source: scikit-image "
            "(skimage.data.immunohistochemistry), acquired at the Center for "
            "Microscopy And Molecular Imaging (CMMI); no known copyright "
            "restrictions. Classes: background = empty glass and lumen, stroma with "
            "its nuclei, gland = epithelium with its nuclei. Lumen and stroma are "
            "nearly equally bright, so a threshold of grey fails; the colour of single "
            "pixels finds the glands, but takes stroma for lumen. "
            + _BORDERS.format(_TWO_FILLS, "93 %")
            + "The two refinements agree by IoU 0.87 / 0.96 / 0.97 (background, "
            "stroma, gland), before what they dispute was taken out; vacuoles and "
            "torn lumens are unsure. One annotator, no pathologist."
        ),
    ),
    "coins": _Entry(
        title="Coins on an unevenly lit ground",
        classes=("background", "coin"),
        description=(
            "Greek coins from Pompeii (303 x 384, grey). Source: scikit-image "
            "(skimage.data.coins), Brooklyn Museum Collection; no known copyright "
            "restrictions. The light falls off, so the ground at the top is as bright "
            "as coins at the bottom. "
            + _BORDERS.format(_TWO_FILLS, "94 %")
            + "The two refinements agree by IoU 0.98 on coins. One annotator."
        ),
    ),
    "retina": _Entry(
        title="Human retina: vessels (crop)",
        classes=("background", "vessel"),
        channel_axis=-1,
        read=_retina_crop,
        description=(
            "Fundus of a healthy eye, the crop of rows 226-737 and columns 141-652 "
            "around the optic disc (512 x 512, RGB). Source: scikit-image "
            "(skimage.data.retina), Mikael Häggström, WikiJournal of Medicine 1 (2), "
            "2014, doi:10.15347/wjm/2014.008; CC0. Vessels are thin, and the pigment "
            "at the disc, the frame and the fovea are as dark as they are. "
            + _BORDERS.format(
                "a watershed and the half depth of each vessel's profile", "91 %"
            )
            + "Vessels too faint to outline are unsure with 4 px around them. The two "
            "refinements agree by IoU 0.89 on vessels: their width is sure to about "
            "1 px per side. One annotator, no ophthalmologist."
        ),
    ),
    "cell": _Entry(
        title="Floating cell, quantitative phase (easy)",
        classes=("background", "cell"),
        description=(
            "A cell in saline, quantitative phase from a hologram, 0.107 um per pixel "
            "(660 x 550, grey). Source: scikit-image (skimage.data.cell); P. Müller et "
            "al., Optics Express 26(8), 2018, doi:10.1364/OE.26.010729; CC0. An easy "
            "one to learn the tool with: a threshold does as well here. "
            + _BORDERS.format(_TWO_FILLS, "99.8 %")
            + "The two refinements agree by IoU 0.99 on the cell. One annotator."
        ),
    ),
    "human_mitosis": _Entry(
        title="Human cells in mitosis (fetched on first use)",
        classes=("background", "nucleus"),
        needs_network=True,
        description=(
            "Nuclei of human cells, some in mitosis (512 x 512, grey). Source: "
            "scikit-image (skimage.data.human_mitosis); Moffat et al., Cell 124(6), "
            "2006, doi:10.1016/j.cell.2006.01.040; copyright David Root, CC0. "
            "scikit-image fetches it on first use. Without strokes and truth."
        ),
    ),
    "cells3d": _Entry(
        title="Cells in 3-D, membranes and nuclei (fetched on first use)",
        classes=("background", "nucleus"),
        channel_axis=-1,
        needs_network=True,
        read=_channels_last,
        description=(
            "A stack of 60 planes, channel 0 membranes, channel 1 nuclei, voxels of "
            "0.29 x 0.26 x 0.26 um (60 x 256 x 256, 2 channels). Source: scikit-image "
            "(skimage.data.cells3d), Allen Institute for Cell Science; scikit-image "
            "states no licence of its own for it. scikit-image fetches it on first "
            "use. Without strokes and truth."
        ),
    ),
}

SAMPLES: tuple[str, ...] = tuple(_ENTRIES)
NEEDS_NETWORK: tuple[str, ...] = tuple(
    name for name, entry in _ENTRIES.items() if entry.needs_network
)


def load(name: str) -> Sample:
    """Load a sample image with its strokes and its truth.

    Parameters
    ----------
    name : str
        One of `SAMPLES`. Those of `NEEDS_NETWORK` are fetched by scikit-image on first
        use and kept in its cache.

    Returns
    -------
    Sample
        With fresh arrays at every call.

    Raises
    ------
    ValueError
        If there is no sample of this name.
    ImageFileError
        If the image is not there and cannot be fetched.
    """
    if name not in _ENTRIES:
        raise ValueError(
            f"`name` must be one of {', '.join(SAMPLES)}, got {name!r}. "
            "Choose one of these samples."
        )
    entry = _ENTRIES[name]
    image = _read(name, entry)
    shape = image.shape if entry.channel_axis is None else image.shape[:-1]
    return Sample(
        name=name,
        title=entry.title,
        image=image,
        channel_axis=entry.channel_axis,
        strokes=(
            np.zeros(shape, np.uint8)
            if entry.needs_network
            else _labels(f"{name}_strokes.png")
        ),
        truth=None if entry.needs_network else _labels(f"{name}_truth.png"),
        classes=entry.classes,
        description=entry.description,
        needs_network=entry.needs_network,
    )


def _read(name: str, entry: _Entry) -> NDArray[np.generic]:
    try:
        return entry.read() if entry.read is not None else _fetch(name)
    # without a network: OSError; without pooch: ImportError; damaged: ValueError
    except (OSError, ImportError, ValueError) as error:
        local = ", ".join(other for other in SAMPLES if other not in NEEDS_NETWORK)
        raise ImageFileError(
            f"The sample image {name!r} must be in scikit-image or be fetched by it, "
            f"but that failed ({type(error).__name__}). Connect to the network once "
            f"(it is kept then), or choose a sample that needs none: {local}."
        ) from error


def _labels(file_name: str) -> NDArray[np.uint8]:
    path = resources.files("napari_unetpp") / "_data" / file_name
    with resources.as_file(path) as local:
        return np.array(skimage_io.imread(local), dtype=np.uint8)
