"""Image files in, every file out: the only room that reads images and writes files."""

from napari_unetpp.io.files import (
    SUFFIXES,
    atomic_write,
    list_images,
    opened,
    pair_by_stem,
    rotate,
    shown,
    sweep,
    write_text,
)
from napari_unetpp.io.formats import Probe
from napari_unetpp.io.images import (
    probe,
    read_image,
    read_labels,
    write_labels,
    write_png,
)
from napari_unetpp.io.labels import Labels, create_labels, is_labels, ordered
from napari_unetpp.io.lazy import Axis, LazyImage, needed, open_image, plain_axes
from napari_unetpp.io.lock import lock, take
from napari_unetpp.io.unfinished import Part, part

__all__ = [
    "SUFFIXES",
    "Axis",
    "Labels",
    "LazyImage",
    "Part",
    "Probe",
    "atomic_write",
    "create_labels",
    "is_labels",
    "list_images",
    "lock",
    "needed",
    "open_image",
    "opened",
    "ordered",
    "pair_by_stem",
    "part",
    "plain_axes",
    "probe",
    "read_image",
    "read_labels",
    "rotate",
    "shown",
    "sweep",
    "take",
    "write_labels",
    "write_png",
    "write_text",
]
