"""The errors that a user can meet; messages say the rule, the value, the remedy."""

from __future__ import annotations


class UnetppError(Exception):
    """Base class of the states that stop our work; never a RuntimeError."""


class ModelFileError(UnetppError):
    """A model file is damaged, lies about itself or was not written by us."""


class ImageFileError(UnetppError):
    """An image file cannot be read, or its header does not agree with its content."""


class RecoveryFileError(UnetppError):
    """A recovery file is `damaged`, or cannot be opened."""

    damaged = False


class SaveError(UnetppError):
    """A file could not be written; whatever stood there before is still there."""


class InUseError(SaveError):
    """Another process writes there at this moment."""


class DeviceMemoryError(UnetppError):
    """The device ran out of memory although smaller pieces were tried."""


class TrainingError(UnetppError):
    """Training cannot go on, for example because the loss is not finite."""
