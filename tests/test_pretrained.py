"""The weights that ship: what they fit, and what they are worth before any stroke."""

import numpy as np
import pytest
import torch
from skimage.filters import gaussian

from napari_unetpp import api, samples
from napari_unetpp.config import TrainConfig, working_config
from napari_unetpp.model import load_model
from napari_unetpp.networks import SegmentationNet, build_network, prune
from napari_unetpp.pretrained import _FILES, _FOLDER, start_from_pretrained

FILE = _FOLDER / _FILES["unet++"]


def started(
    channels: int = 1, levels: int | None = None
) -> tuple[SegmentationNet, str | None]:
    config = working_config("unet++", channels, 2, levels=levels)
    network = build_network(config, seed=5).eval()
    return network, start_from_pretrained(network)


def source() -> SegmentationNet:
    model = load_model(FILE)
    model.network.add_to_logits([-p for p in model.prior])
    return model.network


def test_the_file_is_small_and_says_where_it_comes_from() -> None:
    assert FILE.stat().st_size <= 4_000_000
    provenance = load_model(FILE).provenance
    assert "CC0" in provenance["trained_on"]
    assert len(provenance["sha256_of_data"]) == 64
    assert provenance["script"] == "benchmarks/pretrain.py"


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_heads_of_all_depths_start_as_the_files(levels: int) -> None:
    network, digest = started(3, levels)
    assert digest == load_model(FILE).provenance["digest"]
    x = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = network(x)
        wanted = prune(source(), min(levels, 3))(x)
    for d in range(levels):  # L4 is a correction of L3, and starts at 0
        torch.testing.assert_close(found[d], wanted[min(d, 2)])


def test_grey_images_are_seen_as_grey_colour_images() -> None:
    network, _ = started(1)
    grey = torch.rand((1, 1, 64, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found = network(grey)[-1]
        wanted = source()(grey.expand(1, 3, 64, 64))[-1]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [2, 5])
def test_equal_channels_are_seen_as_one(channels: int) -> None:
    many, _ = started(channels)
    one, _ = started(1)
    grey = torch.rand((1, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, wanted = (
            n(x)[0] for n, x in ((many, grey.expand(1, channels, 32, 32)), (one, grey))
        )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        working_config("unet", 1, 2),
        working_config("unet++", 1, 3),
        working_config("unet++", 1, 2, width=8),
        working_config("unet++", 1, 2, norm="batch"),
        api.published_config("unet++", 1, 2),
    ],
    ids=["unet", "three classes", "narrow", "batch norm", "published"],
)
def test_other_networks_are_left_alone(config: api.NetConfig) -> None:
    network = build_network(config, seed=1)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    assert start_from_pretrained(network) is None
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


def test_starting_twice_is_the_same() -> None:
    (a, _), (b, _) = started(), started()
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_training_starts_there_unless_told_otherwise() -> None:
    sample = samples.load("coins")
    options = {"classes": sample.classes, "max_steps": 1, "seed": 0, "device": "cpu"}
    start = api.train(sample.image, sample.strokes, **options)
    scratch = api.train(
        sample.image, sample.strokes, config=TrainConfig(pretrained=False), **options
    )
    assert start.provenance["parent"] == load_model(FILE).provenance["digest"]
    assert scratch.provenance["parent"] is None
    assert start.history[0].loss != scratch.history[0].loss


@pytest.mark.parametrize("bright", [True, False])
def test_they_find_what_looks_like_nuclei(bright: bool) -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:192, :192]
    truth = np.zeros((192, 192), bool)
    for row, column in rng.uniform(15, 177, (14, 2)):
        a, b = rng.uniform(8, 13, 2)
        truth |= ((y - row) / a) ** 2 + ((x - column) / b) ** 2 < 1
    image = gaussian(truth.astype(float), 1.5) + 0.05 * rng.standard_normal(truth.shape)
    image = np.stack([image if bright else 1 - image] * 3, -1)
    found = api.predict(load_model(FILE), image, channel_axis=-1) == 2
    assert np.count_nonzero(found & truth) / np.count_nonzero(found | truth) > 0.7
