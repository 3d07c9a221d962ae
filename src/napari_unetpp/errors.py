"""The errors that a user can meet; messages say the rule, the value, the remedy."""

from __future__ import annotations

from typing import Any


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


class DeviceError(UnetppError):
    """The device has failed; it cannot be used again before the program restarts."""


class TrainingError(UnetppError):
    """Training cannot go on, for example because the loss is not finite.

    `model` is then the last good one, as far as there is one.
    """

    model: Any = None


class MissingPackageError(UnetppError):
    """A package is not installed that only some of the work needs."""


class ClusterError(UnetppError):
    """The workers or the scheduler of a cluster were lost."""
