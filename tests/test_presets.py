"""The papers' recipes are what the papers say, and learn."""

from __future__ import annotations

import pytest

from napari_unetpp.config import NETWORKS, TrainConfig, published_config
from napari_unetpp.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_published_network_and_a_checked_training(name: str) -> None:
    found = preset(name, 3, ("background", "a", "b"))
    assert found.network == published_config(found.network.name, 3, 3)
    assert found.network.name in NETWORKS
    assert TrainConfig.from_dict(found.config.to_dict()) == found.config
    assert found.summary
    dense = found.config
    assert (dense.edges, dense.prior, dense.averaging, dense.held_out) == (0, 0, 0, 0)
    assert dense.pretrained is False
    assert dense.patience is not None
    assert preset(name).network.out_channels == 2


def test_the_papers_figures() -> None:
    unet, unetpp, fcn, vgg = (
        preset(n).config
        for n in ("unet-2015", "unetpp-2018", "fcn-2015", "vgg19-frozen")
    )
    assert (unet.optimizer, unet.momentum, unet.nesterov) == ("sgd", 0.99, False)
    assert (unet.batch, unet.patch, unet.border, unet.border_sigma) == (1, 388, 10, 5)
    assert unet.elastic_sigma == 10
    assert preset("unet-2015").network.dropout == 0.5
    assert (unetpp.optimizer, unetpp.learning_rate) == ("adam", 3e-4)
    assert unetpp.loss == "bce_dice"
    assert preset("unetpp-2018").network.deep_supervision
    assert (fcn.optimizer, fcn.momentum, fcn.learning_rate) == ("sgd", 0.9, 1e-4)
    assert (fcn.batch, fcn.weight_decay, fcn.flip) == (20, 5e-4, True)
    assert vgg.frozen_steps > 0
    assert (vgg.thawed, vgg.learning_rate * vgg.thaw_rate) == (1, pytest.approx(1e-4))


def test_a_tile_of_unet_is_572_pixels() -> None:
    from napari_unetpp.networks import build_network

    found = preset("unet-2015")
    network = build_network(found.network.replaced(width=4))
    assert network.valid_size(found.config.patch) == 572


def test_unknown_presets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of fcn-2015, .*, got 'resnet'"):
        preset("resnet")
    with pytest.raises(ValueError, match="`in_channels` must lie between"):
        preset("unet-2015", 99)
