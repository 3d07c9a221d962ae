"""Rates and frozen weights are functions of the step, and training obeys them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from napari_unetpp import schedule
from napari_unetpp.config import NetConfig, TrainConfig
from napari_unetpp.errors import ModelFileError
from napari_unetpp.examples import read_examples
from napari_unetpp.losses import border_weights, regions
from napari_unetpp.model import create_model, load_model
from napari_unetpp.networks import build_network
from napari_unetpp.pretrained import load_trunk
from napari_unetpp.train import train, train_steps
from napari_unetpp.trainer import Trainer

if TYPE_CHECKING:
    from pathlib import Path

    from napari_unetpp.model import Model

VGG = NetConfig("vgg19-unet", width=4, norm="batch")
UNET = NetConfig("unet", width=4, levels=1)
QUICK = TrainConfig(
    patch=32, batch=2, edges=0, held_out=0, averaging=0, pretrained=False
)
CPU = torch.device("cpu")


def scene(side: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an image, its dense mask and two instances that touch."""
    instances = np.zeros((side, side), np.uint16)
    instances[10:30, 10:25] = 1
    instances[10:30, 25:40] = 2
    instances[40:56, 12:50] = 3
    noise = np.random.default_rng(0).normal(0, 10, (side, side))
    image = np.where(instances > 0, 150, 60) + noise
    return image.clip(0, 255).astype(np.uint8), (instances > 0) * np.uint8(1), instances


IMAGE, MASK, INSTANCES = scene()


def fit(network: NetConfig, steps: int, **settings: object) -> Model:
    config = QUICK.replaced(**settings)
    return train(
        IMAGE, MASK, network=network, unlabelled=None, config=config, max_steps=steps
    )


def trainer(network: NetConfig, **settings: object) -> Trainer:
    examples = read_examples(IMAGE, MASK, unlabelled=None)
    model = create_model(network, unlabelled=None)
    config = QUICK.replaced(**settings)
    return Trainer(model, examples, config, seed=0, device=CPU)


def test_the_rate_falls_as_it_was_ordered() -> None:
    config = TrainConfig(learning_rate=0.8)
    assert {schedule.rate(config, s) for s in (0, 7, 10**6)} == {0.8}
    steps = config.replaced(schedule="step", schedule_steps=10)
    rates = [schedule.rate(steps, s) for s in (0, 9, 10, 25)]
    assert rates == pytest.approx([0.8, 0.8, 0.08, 0.008])
    cosine = config.replaced(schedule="cosine", schedule_steps=10)
    rates = [schedule.rate(cosine, s) for s in (0, 5, 10, 99)]
    assert rates == pytest.approx([0.8, 0.8 * 0.505, 0.008, 0.008])
    thaw = config.replaced(frozen_steps=4, thaw_rate=0.5)
    assert [schedule.rate(thaw, s) for s in (3, 4)] == pytest.approx([0.8, 0.4])


def test_the_optimizer_gets_the_rate_of_its_step() -> None:
    own = trainer(UNET, learning_rate=0.1, schedule="step", schedule_steps=1)
    rates = []
    for _ in range(3):
        own.step()
        rates.append(own._optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_a_clipped_gradient_moves_no_weight_further() -> None:
    plain = {"optimizer": "sgd", "learning_rate": 1.0, "momentum": 0.0}
    own = trainer(UNET, clip=1e-3, weight_decay=0.0, **plain)
    before = torch.cat([p.detach().flatten() for p in own.network.parameters()])
    own.step()
    after = torch.cat([p.detach().flatten() for p in own.network.parameters()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-2)


def test_momentum_is_nesterovs_unless_it_is_not() -> None:
    for nesterov in (True, False):
        own = trainer(UNET, optimizer="sgd", nesterov=nesterov)
        assert own._optimizer.param_groups[0]["nesterov"] is nesterov


def test_a_trunk_is_frozen_first_and_then_its_last_convolution_learns() -> None:
    own = trainer(VGG, frozen_steps=2, thawed=1)
    start = {k: v.clone() for k, v in own.network.state_dict().items()}

    def changed() -> set[str]:
        now = own.network.state_dict()
        return {
            k
            for k, v in start.items()
            if not torch.equal(v, now[k]) and "num_batches" not in k
        }

    own.step()
    own.step()
    assert not any(name.startswith("features") for name in changed())
    assert "head.weight" in changed()
    first = own._optimizer
    own.step()
    learned = {k for k in changed() if k.startswith("features")}
    numbers = [n for n, m in own.network.features.named_modules()
               if isinstance(m, torch.nn.Conv2d)]  # fmt: skip
    weights = {k for k in learned if k.endswith("weight") and "running" not in k}
    assert weights == {f"features.{numbers[-1]}.weight"}
    assert own._optimizer is not first
    step = next(iter(own._optimizer.state.values()))["step"]
    assert int(step) == 1  # the optimizer has started afresh


@pytest.mark.parametrize("thawed", [0, 3])
def test_as_many_convolutions_thaw_as_were_asked_for(thawed: int) -> None:
    own = trainer(VGG, frozen_steps=1, thawed=thawed)
    schedule.freeze(own.network, own._config, 1)
    free = [
        m.weight.requires_grad
        for m in own.network.features.modules()
        if isinstance(m, torch.nn.Conv2d)
    ]
    assert free == [False] * (len(free) - thawed) + [True] * thawed


def test_a_trunk_comes_from_a_file(tmp_path: Path) -> None:
    config = NetConfig("vgg19-unet", 3, 2, width=4, norm="none")
    source = build_network(config, seed=5)
    weights = {f"features.{k}": v for k, v in source.features.state_dict().items()}
    weights["classifier.0.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "vgg.safetensors")
    fresh = create_model(config)
    found = load_trunk(fresh, tmp_path / "vgg.safetensors")
    for name, value in found.network.state_dict().items():
        inside = name.startswith("features")
        expected = weights[name] if inside else fresh.network.state_dict()[name]
        assert torch.equal(value, expected)
    assert found.provenance["digest"]
    grey = load_trunk(
        create_model(config.replaced(in_channels=1)), tmp_path / "vgg.safetensors"
    )
    assert torch.allclose(
        grey.network.features[0].weight[:, 0], weights["features.0.weight"].sum(1)
    )
    for wrong, told in (
        (create_model(config.replaced(width=8)), "the width of the file"),
        (create_model(NetConfig("fcn-8s", 3, 2, width=4, levels=5)), "without norm"),
        (create_model("unet"), "must have a VGG trunk"),
    ):
        with pytest.raises(ValueError, match=told):
            load_trunk(wrong, tmp_path / "vgg.safetensors")
    del weights["features.34.bias"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"has no `features\.34\.bias`"):
        load_trunk(fresh, tmp_path / "less.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"not one")
    for name in ("no.safetensors", "missing.safetensors"):
        with pytest.raises(ModelFileError, match="cannot be read as a safetensors"):
            load_trunk(fresh, tmp_path / name)


def test_a_network_without_a_trunk_cannot_freeze_it() -> None:
    with pytest.raises(ValueError, match=r"needs a network with a trunk .* got unet"):
        fit(UNET, 1, frozen_steps=1)


def test_a_thawed_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings = {"frozen_steps": 3, "schedule": "cosine", "schedule_steps": 9}
    config = QUICK.replaced(**settings)
    common = {"network": VGG, "unlabelled": None, "config": config}
    whole = fit(VGG, 6, **settings)
    for stop in (2, 3, 5):
        place = tmp_path / str(stop)
        place.mkdir()
        train(IMAGE, MASK, max_steps=stop, checkpoint=place, **common)
        parts = train(IMAGE, MASK, max_steps=6, checkpoint=place, resume=True, **common)
        for name, value in whole.network.state_dict().items():
            assert torch.equal(value, parts.network.state_dict()[name]), (stop, name)


# --- border weights --------------------------------------------------------------


def test_regions_are_the_connected_parts_of_each_class() -> None:
    target = np.array([[2, 2, 1, 2], [1, 1, 0, 3]], np.uint8)
    found = regions(target)
    assert found[0, 0] == found[0, 1] > 0
    assert len({found[0, 0], found[0, 3], found[1, 3]}) == 3
    assert (found[target < 2] == 0).all()


def test_a_batch_carries_the_weights_of_the_whole_image() -> None:
    examples = read_examples(IMAGE, MASK, unlabelled=None, instances=INSTANCES)
    config = QUICK.replaced(
        border=10, patch=64, flip=False, right_angles=False, gain=0, offset=0
    )
    model = create_model(UNET, unlabelled=None)
    own = Trainer(model, examples, config, seed=0, device=CPU)
    expected = border_weights(INSTANCES, w0=10, sigma=5)
    own.batch()
    for weights in own._pixel_weights.numpy():
        inside = weights[weights > 1.001]
        assert len(inside) > 20
        assert inside.max() <= expected.max() + 1e-4
    touching = border_weights(regions(MASK * np.uint8(1) + np.uint8(1)), w0=10, sigma=5)
    assert not np.allclose(expected, touching)  # two instances touch: one region


def test_the_weights_change_what_is_learned() -> None:
    def run(**settings: object) -> Model:
        return train(
            IMAGE, MASK, network=UNET, unlabelled=None, max_steps=2,
            config=QUICK.replaced(patch=64), **settings,
        )  # fmt: skip

    plain = run()
    ignored = run(instances=INSTANCES)
    weight = plain.network.state_dict()["x_0_0.conv1.weight"]
    assert torch.equal(weight, ignored.network.state_dict()["x_0_0.conv1.weight"])
    weighed = fit(UNET, 2, patch=64, border=10)
    assert not torch.equal(weight, weighed.network.state_dict()["x_0_0.conv1.weight"])


def test_instances_must_have_the_images_shape() -> None:
    with pytest.raises(ValueError, match=r"`?instances"):
        read_examples(IMAGE, MASK, unlabelled=None, instances=INSTANCES[:9])


# --- the judge, and the deterministic switch --------------------------------------


def test_a_judge_gives_the_score_and_the_best_is_kept(tmp_path: Path) -> None:
    told = {2: 0.3, 4: 0.8, 6: float("nan"), 8: 0.5}
    asked = []

    def judge(model: Model, step: int) -> float:
        asked.append((step, model.network.training))
        return told[step]

    config = QUICK.replaced(score_every=2, patience=2)
    steps = train_steps(
        IMAGE, MASK, network=UNET, unlabelled=None, config=config, max_steps=99,
        judge=judge, checkpoint=tmp_path,
    )  # fmt: skip
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            model = end.value
            break
    assert asked == [(2, False), (4, False), (6, False), (8, False)]
    assert [s.score for s in seen] == [None, 0.3, 0.3, 0.8, 0.8, 0.0, 0.0, 0.5]
    assert model.history[-1].step == 4
    best = load_model(tmp_path / "training.checkpoint.best.safetensors")
    assert best.history[-1].step == 4


def test_deterministic_training_restores_what_it_found() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    plain, strict = fit(UNET, 3), fit(UNET, 3, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()
    for name, value in plain.network.state_dict().items():
        assert torch.equal(value, strict.network.state_dict()[name])


def test_a_step_is_deterministic_while_it_lasts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = trainer(UNET, deterministic=True)
    seen = []
    real = own.batch
    monkeypatch.setattr(
        own,
        "batch",
        lambda: (seen.append(torch.are_deterministic_algorithms_enabled()), real())[1],
    )
    own.step()
    assert seen == [True]
