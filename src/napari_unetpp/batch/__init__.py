"""Many images through one model: planned and checked first, each one by itself."""

from napari_unetpp.batch.files import (
    Picture,
    Target,
    check_output,
    check_targets,
    find_images,
    make_folder,
    plan_files,
    read_picture,
)
from napari_unetpp.batch.run import predict_files
from napari_unetpp.batch.steps import BatchStep

__all__ = [
    "BatchStep",
    "Picture",
    "Target",
    "check_output",
    "check_targets",
    "find_images",
    "make_folder",
    "plan_files",
    "predict_files",
    "read_picture",
]
