"""The weights that ship: what they fit, and what they are worth before any stroke."""

import hashlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import numpy as np
import pooch
import pytest
import torch
from skimage.filters import gaussian

from napari_unetpp import api, pretrained, samples
from napari_unetpp.config import TrainConfig, published_config, working_config
from napari_unetpp.errors import ModelFileError
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


class _Publisher(SimpleHTTPRequestHandler):
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def publisher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file server on this machine in the place of torchvision's, and a small VGG."""
    served = tmp_path / "served"
    served.mkdir()
    _Publisher.asked.clear()
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(_Publisher, directory=str(served))
    )
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(
        pretrained, "_PUBLISHER", f"http://127.0.0.1:{server.server_port}/"
    )
    monkeypatch.setattr(pretrained, "_VGG_WIDTH", 4)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def published_vgg(name: str, network: SegmentationNet, seed: int) -> dict[str, Any]:
    """A state dict with torchvision's names in the order of theirs."""
    generator = torch.Generator().manual_seed(seed)
    own = network.features.state_dict()
    weights = {
        f"features.{k}": torch.randn(v.shape, generator=generator) / 8
        for k, v in own.items()
    }
    if name == "vgg16":
        hidden = network.fc6.weight.shape[0]
        weights["classifier.0.weight"] = torch.randn(hidden, 32 * 49) / 9
        weights["classifier.0.bias"] = torch.randn(hidden)
        weights["classifier.3.weight"] = torch.randn(hidden, hidden) / 9
        weights["classifier.3.bias"] = torch.randn(hidden)
    weights["classifier.6.weight"] = torch.zeros(3, 3)
    return weights


def publish(
    served: Path, monkeypatch: pytest.MonkeyPatch, name: str, weights: object
) -> str:
    # The published files are in the format before zip.
    torch.save(weights, served / "new", _use_new_zipfile_serialization=False)
    digest = hashlib.sha256((served / "new").read_bytes()).hexdigest()
    file = f"{name}-{digest[:8]}.pth"
    (served / "new").rename(served / file)
    monkeypatch.setitem(pretrained._PUBLISHED, name, file)
    return file


@pytest.mark.parametrize(
    ("arch", "vgg"), [("vgg19-unet", "vgg19"), ("fcn-8s", "vgg16")]
)
def test_imagenets_trunk_is_fetched_once_checked_and_fitted(
    publisher: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arch: str,
    vgg: str,
) -> None:
    config = published_config(arch, 3, 2).replaced(width=4)
    fresh = api.create_model(config)
    given = published_vgg(vgg, fresh.network, seed=3)
    file = publish(publisher, monkeypatch, vgg, given)
    found = api.load_trunk(fresh, "imagenet")
    again = api.load_trunk(fresh, "imagenet")
    assert _Publisher.asked == [f"/{file}"]
    kept = list((tmp_path / "cache" / "napari-unetpp").iterdir())
    assert [p.suffix for p in kept] == [".safetensors"]
    own = found.network.state_dict()
    for name, value in again.network.state_dict().items():
        assert torch.equal(own[name], value)
    for name, value in given.items():
        if name.startswith("features.") and not name.startswith("features.0."):
            assert torch.equal(own[name], value)
    # The first convolution sees 0 to 1 as torchvision's sees what it has normalised.
    image = torch.rand(1, 3, 9, 9)
    mean, deviation = (
        torch.tensor(v)[:, None, None]
        for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    expected = torch.nn.functional.conv2d(
        (image - mean) / deviation, given["features.0.weight"], given["features.0.bias"]
    )
    first = torch.nn.functional.conv2d(
        image, own["features.0.weight"], own["features.0.bias"]
    )
    assert torch.allclose(first, expected, atol=1e-5)
    grey = api.load_trunk(api.create_model(config.replaced(in_channels=1)), "imagenet")
    assert torch.allclose(
        grey.network.features[0].weight[:, 0], own["features.0.weight"].sum(1)
    )
    two = api.load_trunk(api.create_model(config.replaced(in_channels=2)), "imagenet")
    half = own["features.0.weight"].sum(1) / 2
    assert torch.allclose(two.network.features[0].weight[:, 0], half)
    assert torch.allclose(two.network.features[0].weight[:, 1], half)
    if vgg == "vgg16":
        assert torch.equal(own["fc6.weight"].flatten(1), given["classifier.0.weight"])
        assert torch.equal(own["fc7.bias"], given["classifier.3.bias"])


def a_published_vgg19(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[api.Model, str]:
    fresh = api.create_model(published_config("vgg19-unet", 3, 2).replaced(width=4))
    weights = published_vgg("vgg19", fresh.network, seed=3)
    return fresh, publish(served, monkeypatch, "vgg19", weights)


def test_a_trunk_that_was_damaged_on_its_way_is_refused(
    publisher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh, file = a_published_vgg19(publisher, monkeypatch)
    good = (publisher / file).read_bytes()
    (publisher / file).write_bytes(good[:-1] + b"!")
    with pytest.raises(ModelFileError, match="is not the published file"):
        api.load_trunk(fresh, "imagenet")
    assert list((tmp_path / "cache" / "napari-unetpp").iterdir()) == []
    (publisher / file).write_bytes(good)
    assert api.load_trunk(fresh, "imagenet").provenance["digest"]


def test_a_trunk_that_torch_has_fetched_before_is_used(
    publisher: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fresh, file = a_published_vgg19(publisher, monkeypatch)
    theirs = tmp_path / "torch" / "hub" / "checkpoints"
    theirs.mkdir(parents=True)
    (publisher / file).rename(theirs / file)
    api.load_trunk(fresh, "imagenet")
    assert _Publisher.asked == []
    assert (theirs / file).exists()


@pytest.mark.usefixtures("publisher")
def test_without_a_network_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Nobody listens on port 9 of this machine.
    monkeypatch.setattr(pretrained, "_PUBLISHER", "http://127.0.0.1:9/")
    config = published_config("vgg19-unet", 3, 2).replaced(width=4)
    with pytest.raises(ModelFileError, match=r"did not answer .* Connect to the net"):
        api.load_trunk(api.create_model(config), "imagenet")
    with pytest.raises(ValueError, match="has the width 4, got 8"):
        api.load_trunk(api.create_model(config.replaced(width=8)), "imagenet")
