"""napari-unetpp: label pixels with UNet++ and its relatives, trained from strokes."""

__version__ = "0.1.0"
