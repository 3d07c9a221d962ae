"""One image larger than memory: predicted by chunks into an OME-Zarr label image."""

from napari_unetpp.bigimage.steps import (
    ZarrStep,
    predict_to_zarr,
    predict_to_zarr_steps,
)

__all__ = ["ZarrStep", "predict_to_zarr", "predict_to_zarr_steps"]
