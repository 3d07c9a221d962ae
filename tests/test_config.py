"""Settings are checked when they are made and survive JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from napari_unetpp.config import (
    NETWORKS,
    NetConfig,
    PredictConfig,
    Settings,
    TrainConfig,
    check_number,
    published_config,
    working_config,
)

FCN = ("fcn-32s", "fcn-16s", "fcn-8s")
ALL = [
    NetConfig("unet++", 3, 5, width=7, levels=2, norm="batch", up="nearest", stem=2,
              deep_supervision=True, residual=True, refine=True, dropout=0.25),
    TrainConfig(patch=64, loss="dice", flip=False, learning_rate=0.5),
    PredictConfig(64, 2, "mean"),
]  # fmt: skip


def test_the_networks_of_the_papers() -> None:
    assert NETWORKS == (*FCN, "unet", "unet-valid", "wide-unet", "unet++", "vgg19-unet")


@pytest.mark.parametrize("settings", ALL, ids=lambda s: type(s).__name__)
def test_settings_survive_json(settings: Settings) -> None:
    text = settings.to_json()
    assert type(settings).from_dict(json.loads(text)) == settings
    assert type(settings).from_dict(settings.to_dict()) == settings
    assert " " not in text
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize("settings", ALL, ids=lambda s: type(s).__name__)
def test_unknown_settings_are_refused(settings: Settings) -> None:
    kind = type(settings)
    with pytest.raises(ValueError, match=f"{kind.__name__} has no setting 'colour'"):
        kind.from_dict({**settings.to_dict(), "colour": 1})
    for wrong in (None, [], "unet", 3):
        with pytest.raises(ValueError, match=f"{kind.__name__} must be a table"):
            kind.from_dict(wrong)  # type: ignore[arg-type]


def test_what_has_no_default_is_needed() -> None:
    with pytest.raises(ValueError, match="NetConfig needs the setting name"):
        NetConfig.from_dict({"width": 8})
    assert NetConfig.from_dict({"name": "unet"}) == NetConfig("unet")


def test_settings_are_frozen_and_replaced_by_checked_copies() -> None:
    config = NetConfig("unet")
    with pytest.raises(AttributeError):
        config.width = 3  # type: ignore[misc]
    assert config.replaced(width=3).width == 3
    assert config.width == 16
    with pytest.raises(ValueError, match="`width` must lie between 1 and 128, got 129"):
        config.replaced(width=129)


# Setting -> what is just accepted, what is just refused.
NET = {
    "in_channels": ((1, 16), (0, 17, -1, 1.0, True, "1", None)),
    "out_channels": ((1, 255), (0, 256, 2.0, None)),
    "width": ((1, 128), (0, 129, 10**6, 10**400, 8.0)),
    "levels": ((1, 6), (0, 7, 99, True, "3", float("inf"))),
    "dropout": ((0, 0.95), (-0.1, 0.96, float("nan"), "0", None)),
    "norm": (("none", "batch", "group"), ("layer", None, [], 1)),
    "up": (("transposed", "bilinear", "nearest"), ("cubic", None)),
    "stem": ((1, 2), (0, 3, 1.0)),
    "deep_supervision": ((True, False), (1, 0, None, "yes")),
    "residual": ((True, False), (1, None)),
    "refine": ((False,), (0, None)),
    "published": ((False,), (0, None)),
    "name": (("unet++",), ("UNet++", "", None, [], 3)),
}  # fmt: skip
TRAIN = {
    "pretrained": ((True, False), (1, None)),
    "patch": ((16, 4096), (15, 4097, 0, 10**6, 64.0)),
    "batch": ((1, 4096), (0, 4097, 1.0)),
    "warp_after": ((0, 10**9), (-1, 10**9 + 1, 0.5)),
    "optimizer": (("adamw", "adam", "sgd"), ("rmsprop", None)),
    "loss": (("cross_entropy", "dice", "jaccard", "bce_dice", "focal"), ("mse", None)),
    "learning_rate": ((1e-12, 10), (0, -1, 11, 1e9, float("nan"), "1")),
    "weight_decay": ((0, 1), (-1e-9, 1.1)),
    "momentum": ((0, 0.9999), (-0.1, 1)),
    "edges": ((0, 1000), (-0.1, 1001)),
    "forest": ((0, 1000), (-0.1, 1001)),
    "balance": ((0, 1), (-0.1, 1.1)),
    "prior": ((0, 1), (-0.1, 1.1)),
    "averaging": ((0, 1000), (-0.1, 1001)),
    "held_out": ((0, 0.5), (-0.1, 0.51)),
    "patience": ((None, 1, 10**9), (0, -1, 1.5, True)),
    "rotation": ((0, 180), (-1, 181)),
    "scale": ((0, 0.75), (-0.1, 0.76)),
    "elastic_sigma": ((0, 100), (-1, 101, 10**6)),
    "elastic_spacing": ((4, 4096), (3.9, 4097)),
    "gain": ((0, 0.95), (-0.1, 0.96)),
    "offset": ((0, 10), (-0.1, 10.1)),
    "channel_share": ((0, 1), (-0.1, 1.1)),
    "gamma": ((0, 2), (-0.1, 2.1)),
    "noise": ((0, 10), (-0.1, 10.1)),
    "flip": ((True, False), (1, None)),
    "right_angles": ((True, False), (0, None)),
    "mixed_precision": ((True, False), (1, "no")),
    "pooled_norms": ((True, False), (1, "no")),
    "deterministic": ((True, False), (1, "no")),
    "nesterov": ((True, False), (1, None)),
    "schedule": (("constant",), ("linear", None)),
    "schedule_steps": ((0,), (-1, 1.5, True)),
    "clip": ((0, 1, 1e9), (-1, float("nan"))),
    "frozen_steps": ((0, 10**9), (-1, 1.5, True)),
    "thawed": ((0, 16), (-1, 17, 1.0)),
    "thaw_rate": ((0, 1), (-0.1, 1.1)),
    "border": ((0, 10, 1000), (-1, 1001)),
    "border_sigma": ((0.1, 5), (0, -1)),
    "score_every": ((None, 1, 10**9), (0, -1, 1.5, True)),
}  # fmt: skip
PREDICT = {
    "tile": ((None, 16, 16384), (15, 16385, 0, -1, 64.0, True)),
    "depth": ((None, 1, 6), (0, 7, 99, True, "3", float("inf"), 2.0)),
    "heads": (("last", "mean"), ("first", None)),
}
CASES = [
    (kind, name, *values)
    for kind, table in (
        (NetConfig, NET),
        (TrainConfig, TRAIN),
        (PredictConfig, PREDICT),
    )
    for name, values in table.items()
]


@pytest.mark.parametrize(("kind", "name", "good", "bad"), CASES)
def test_every_setting_has_its_range(
    kind: type, name: str, good: tuple[Any, ...], bad: tuple[Any, ...]
) -> None:
    start = {"name": "unet++"} if kind is NetConfig else {}
    for value in good:
        assert getattr(kind(**{**start, name: value}), name) == value
    for value in bad:
        with pytest.raises(ValueError, match=f"^`{name}` must "):
            kind(**{**start, name: value})


def test_every_setting_is_tried() -> None:
    for kind, table in (
        (NetConfig, NET),
        (TrainConfig, TRAIN),
        (PredictConfig, PREDICT),
    ):
        assert set(kind.__dataclass_fields__) == set(table)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "unet", "deep_supervision": True}, "`deep_supervision=True` needs the"
         " network unet[+][+], got unet"),
        ({"name": "vgg19-unet", "residual": True}, "`residual=True` needs"),
        ({"name": "unet-valid", "residual": True}, "`residual=True` needs"),
        ({"name": "unet-valid", "stem": 2}, "`stem=2` needs the network unet or wide"),
        ({"name": "fcn-8s", "levels": 5, "stem": 2}, "`stem=2` needs"),
        ({"name": "unet", "published": True}, "`published=True` needs"),
        ({"name": "unet", "refine": True}, "`refine=True` needs `stem=2`"),
        ({"name": "fcn-8s", "levels": 5, "up": "nearest"}, "FCN needs `up` transposed"),
        ({"name": "unet-valid", "up": "bilinear"}, "cannot have `up` bilinear"),
        ({"name": "fcn-16s"}, "`fcn-16s` has 5 levels, got 4"),
        ({"name": "vgg19-unet", "levels": 5}, "`vgg19-unet` has 4 levels, got 5"),
    ],
)  # fmt: skip
def test_what_a_network_does_not_have_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        NetConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosine"}, "`schedule` 'cosine' must go with `schedule_steps`"),
        ({"schedule_steps": 5}, "`schedule` 'constant' must go with .* 0, got 5"),
        ({"border": 10, "loss": "dice"}, "`border` needs the loss cross_entropy"),
    ],
)
def test_settings_of_a_training_fit_one_another(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)
    assert TrainConfig(schedule="step", schedule_steps=5).schedule_steps == 5


@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks_have_the_papers_settings(name: str) -> None:
    config = published_config(name, 3, 7)
    width = {"wide-unet": 35, "unet++": 32}.get(name, 64)
    dropout = 0.25 if name == "vgg19-unet" else 0.5
    assert config == NetConfig(
        name, 3, 7, width=width, levels=5 if name in FCN else 4, norm="none",
        dropout=dropout, deep_supervision=name == "unet++", published=name in FCN,
    )  # fmt: skip
    assert published_config(name) == config.replaced(in_channels=1, out_channels=2)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_for_work_are_small(name: str) -> None:
    config = working_config(name)
    assert (config.name, config.in_channels, config.out_channels) == (name, 1, 2)
    assert 12 <= config.width <= 24
    assert config.levels == 5 if name in FCN else config.levels <= 4
    assert config.deep_supervision is (name == "unet++")
    assert (config.published, config.dropout) == (False, 0)
    if name == "unet++":  # the paper's table of depths and costs is about four
        assert config.levels == 4


def test_networks_for_work_take_the_callers_settings() -> None:
    config = working_config("unet++", 4, 9, width=5, levels=2, norm="batch")
    assert (config.in_channels, config.out_channels) == (4, 9)
    assert (config.width, config.levels, config.norm) == (5, 2, "batch")
    for wrong in ({"width": 0}, {"levels": 0}, {"norm": "layer"}):
        with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must"):
            working_config("unet", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("build", [published_config, working_config])
def test_unknown_networks_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"must be one of fcn-32s, .*, got 'resnet'"):
        build("resnet")


def test_check_number_says_what_is_wrong() -> None:
    check_number("n", 2, 1, 2)
    check_number("n", 1.5, 1, 2)
    for value, message in (
        (3, "`n` must lie between 1 and 2, got 3"),
        (0.5, "`n` must lie between 1 and 2, got 0.5"),
        (True, "`n` must be a number, got True"),
        ("2", "`n` must be a number, got '2'"),
        (float("-inf"), "`n` must lie between 1 and 2, got -inf"),
    ):
        with pytest.raises(ValueError, match=message):
            check_number("n", value, 1, 2)
    with pytest.raises(ValueError, match=r"`n` must be a whole number, got 1\.0"):
        check_number("n", 1.0, 1, 2, whole=True)
