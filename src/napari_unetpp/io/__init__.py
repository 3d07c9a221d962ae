"""Image files in, every file out: the only room that reads images and writes files."""

from napari_unetpp.io.files import (
    SUFFIXES,
    atomic_write,
    list_images,
    opened,
    pair_by_stem,
    rotate,
    shown,
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
from napari_unetpp.io.lock import lock, sweep, take

__all__ = [
    "SUFFIXES",
    "Probe",
    "atomic_write",
    "list_images",
    "lock",
    "opened",
    "pair_by_stem",
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
