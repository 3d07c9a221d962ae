"""The functions that napari's File > Open Sample menu calls."""

from __future__ import annotations

from typing import Any

from . import samples

LayerData = tuple[Any, dict[str, Any], str]


def _layers(name: str) -> list[LayerData]:
    sample = samples.load(name)
    options: dict[str, Any] = {"name": name}
    if sample.channel_axis is not None and sample.image.shape[-1] == 3:
        options["rgb"] = True
    elif sample.channel_axis is not None:
        options["channel_axis"] = sample.channel_axis
        options["name"] = [f"{name} {c}" for c in range(sample.image.shape[-1])]
    return [
        (sample.image, options, "image"),
        (
            sample.strokes,
            {"name": "annotation", "metadata": {"classes": list(sample.classes)}},
            "labels",
        ),
    ]


def sample_immunohistochemistry() -> list[LayerData]:
    """Open the stained colon glands with their strokes."""
    return _layers("immunohistochemistry")


def sample_coins() -> list[LayerData]:
    """Open the coins with their strokes."""
    return _layers("coins")


def sample_retina() -> list[LayerData]:
    """Open the retina crop with its strokes."""
    return _layers("retina")


def sample_cell() -> list[LayerData]:
    """Open the floating cell with its strokes."""
    return _layers("cell")


def sample_human_mitosis() -> list[LayerData]:
    """Fetch and open the cells in mitosis with an empty annotation."""
    return _layers("human_mitosis")


def sample_cells3d() -> list[LayerData]:
    """Fetch and open the cells in 3-D with an empty annotation."""
    return _layers("cells3d")
