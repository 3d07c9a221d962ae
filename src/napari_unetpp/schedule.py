"""Which weights learn at a step, and how fast: functions of the step alone.

So a training that is interrupted goes on exactly, with nothing to remember.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from napari_unetpp.config import TrainConfig
    from napari_unetpp.networks import SegmentationNet

_LEAST = 0.01  # of the rate, at the end of the cosine


def rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate after `step` steps."""
    value = config.learning_rate
    if config.frozen_steps and step >= config.frozen_steps:
        value *= config.thaw_rate
    if config.schedule == "step":
        value *= 0.1 ** (step // config.schedule_steps)
    elif config.schedule == "cosine":
        done = min(1.0, step / config.schedule_steps)
        value *= _LEAST + (1 - _LEAST) * (1 + math.cos(math.pi * done)) / 2
    return value


def thaws(config: TrainConfig, step: int) -> bool:
    """Return whether the trunk begins to learn after `step` steps."""
    return 0 < config.frozen_steps == step


def freeze(network: SegmentationNet, config: TrainConfig, step: int) -> None:
    """Let the trunk's weights learn, or not, as after `step` steps.

    Raises
    ------
    ValueError
        If the network has no trunk.
    """
    if not config.frozen_steps:
        return
    trunk = getattr(network, "features", None)
    if not isinstance(trunk, nn.Module):
        raise ValueError(
            "`frozen_steps` needs a network with a trunk (fcn-32s, fcn-16s, fcn-8s, "
            f"vgg19-unet), got {network.config.name}."
        )
    # A module has no `requires_grad` of its own: setting one would free nothing.
    trunk.requires_grad_(False)
    if step >= config.frozen_steps and config.thawed:
        convolutions = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
        for convolution in convolutions[-config.thawed :]:
            convolution.requires_grad_(True)


def train_mode(network: SegmentationNet, config: TrainConfig, step: int) -> None:
    """Switch to training; a frozen trunk keeps its batch statistics as well."""
    network.train()
    if config.frozen_steps and step < config.frozen_steps:
        network.get_submodule("features").eval()
