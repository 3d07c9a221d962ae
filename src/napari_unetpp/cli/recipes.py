"""Which network is trained and how, as the options of a command say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from napari_unetpp.config import NetConfig, TrainConfig, working_config
from napari_unetpp.presets import preset

if TYPE_CHECKING:
    from argparse import Namespace

DEFAULT = "unet++"


def config_of(options: Namespace) -> TrainConfig:
    """Return how to train: a preset or the defaults, changed as asked."""
    config = TrainConfig(pretrained=not options.from_scratch)
    if options.preset:
        config = preset(options.preset).config
    changes: dict[str, Any] = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(
                f"--set takes NAME=VALUE, such as batch=8, got {text!r:.80}."
            )
        changes[name.strip()] = _value(value.strip())
    if options.deterministic:
        changes["deterministic"] = True
    return TrainConfig.from_dict({**config.to_dict(), **changes})


def network_of(options: Namespace, channels: int, n_classes: int) -> NetConfig:
    """Return the network, with all its settings."""
    if not options.preset:
        return working_config(
            options.network or DEFAULT,
            channels,
            n_classes,
            width=options.width,
            levels=options.levels,
        )
    if options.network:
        raise ValueError(
            "--preset names a network already. Leave out --network, or --preset."
        )
    network = preset(options.preset, channels, n_classes).network
    given = {"width": options.width, "levels": options.levels}
    return network.replaced(**{k: v for k, v in given.items() if v is not None})


def _value(text: str) -> Any:
    """Return a number, true, false or null as JSON has it, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text
