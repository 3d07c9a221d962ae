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
    changes = _changes(options)
    for name in network_changes(options):
        changes.pop(name)
    if options.deterministic:
        changes["deterministic"] = True
    return TrainConfig.from_dict({**config.to_dict(), **changes})


def network_changes(options: Namespace) -> dict[str, Any]:
    """Return the settings of the network among those that --set names."""
    known = NetConfig(DEFAULT).to_dict().keys() - {"name", "in_channels"}
    return {k: v for k, v in _changes(options).items() if k in known}


def network_of(options: Namespace, channels: int, n_classes: int) -> NetConfig:
    """Return the network, with all its settings."""
    if not options.preset:
        network = working_config(
            options.network or DEFAULT,
            channels,
            n_classes,
            width=options.width,
            levels=options.levels,
        )
        return network.replaced(**network_changes(options))
    if options.network:
        raise ValueError(
            "--preset names a network already. Leave out --network, or --preset."
        )
    network = preset(options.preset, channels, n_classes).network
    given = {"width": options.width, "levels": options.levels}
    given = {k: v for k, v in given.items() if v is not None}
    return network.replaced(**{**given, **network_changes(options)})


def _changes(options: Namespace) -> dict[str, Any]:
    changes = {}
    for text in options.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(
                f"--set takes NAME=VALUE, such as batch=8, got {text!r:.80}."
            )
        changes[name.strip()] = _value(value.strip())
    return changes


def _value(text: str) -> Any:
    """Return a number, true, false or null as JSON has it, else the text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
