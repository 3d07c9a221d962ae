"""A model is made, cut, saved and loaded; a file that lies is refused."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from napari_unetpp import modelfile
from napari_unetpp.config import NETWORKS, NetConfig, working_config
from napari_unetpp.errors import ModelFileError, SaveError
from napari_unetpp.model import (
    Model,
    TrainStep,
    check_classes,
    check_depth,
    check_unlabelled,
    create_model,
    load_model,
)
from napari_unetpp.predict import predict_proba
from napari_unetpp.preprocess import Preprocessing

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IMAGE = np.random.default_rng(0).normal(100, 30, (37, 52)).astype(np.float32)


def make(name: str = "unet", **settings: Any) -> Model:
    """Return a small model with something in every field."""
    settings = {
        "classes": ("background", "Zelle", "<b>細胞</b>"),
        "width": 4,
        **settings,
    }
    model = create_model(name, seed=3, **settings)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    model.preprocessing = Preprocessing(2.0, 98.0, clip_low=-1.0, clip_high=3.0)
    model.prior = (0.5, -0.25, 0.0)
    model.history = (TrainStep(1, 0.75, 0.5), TrainStep(2, 0.5, 1.25, 0.875))
    model.provenance = {"seed": 3, "note": "für Ä"}
    return model


def weights(model: Model) -> dict[str, torch.Tensor]:
    return model.network.state_dict()


def assert_equal_weights(a: Model, b: Model) -> None:
    assert weights(a).keys() == weights(b).keys()
    for name, value in weights(a).items():
        assert value.dtype == weights(b)[name].dtype
        assert torch.equal(value, weights(b)[name]), name


# --- making ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_name_gives_the_network_for_work(name: str) -> None:
    model = create_model(name, classes=("a", "b", "c"), in_channels=2)
    assert model.config == working_config(name, 2, 3)
    assert model.classes == ("a", "b", "c")
    assert not model.network.training
    assert (model.unlabelled, model.prior, model.history) == (0, (), ())
    assert model.preprocessing == Preprocessing()
    assert model.provenance == {"seed": 0}


def test_the_default_is_a_unetpp_of_two_classes() -> None:
    model = create_model()
    assert model.config == working_config("unet++", 1, 2)
    assert model.classes == ("background", "foreground")


def test_settings_reach_the_network() -> None:
    model = create_model(
        "unet", width=6, levels=2, norm="batch", unlabelled=None, seed=9
    )
    assert (model.config.width, model.config.levels) == (6, 2)
    assert model.config.norm == "batch"
    assert model.unlabelled is None
    assert model.provenance == {"seed": 9}


def test_a_config_is_taken_as_it_is_but_for_its_classes() -> None:
    config = NetConfig("unet", 3, 9, width=5, levels=2, norm="none")
    model = create_model(config, classes=("a", "b"))
    assert model.config == config.replaced(out_channels=2)
    create_model(config, in_channels=3, width=5, levels=2, norm="none")
    for name, value in (
        ("in_channels", 2),
        ("width", 6),
        ("levels", 1),
        ("norm", "group"),
    ):
        with pytest.raises(
            ValueError, match=f"`{name}` is already .* in `network`, got"
        ):
            create_model(config, **{name: value})  # type: ignore[arg-type]


def test_seeds_draw_the_weights_and_leave_the_callers_numbers_alone() -> None:
    state = torch.get_rng_state()
    a, b, c = (create_model("unet", width=4, levels=1, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert_equal_weights(a, b)
    assert not torch.equal(
        weights(a)["x_0_0.conv1.weight"], weights(c)["x_0_0.conv1.weight"]
    )


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        ("resnet", {}, "`network` must be one of fcn-32s, .*, got 'resnet'"),
        (None, {}, "`network` must be one of"),
        ("unet", {"classes": ("one",)}, "`classes` must be 2 to 255 names, got 1"),
        ("unet", {"classes": ()}, "`classes` must be 2 to 255 names, got 0"),
        ("unet", {"classes": [str(i) for i in range(256)]}, "2 to 255 names, got 256"),
        ("unet", {"classes": "ab"}, "`classes` must be a sequence of names, got 'ab'"),
        ("unet", {"classes": 3}, "`classes` must be a sequence of names, got 3"),
        (
            "unet",
            {"classes": ("a", "b", "a")},
            r"differ from each other, got twice: \['a'\]",
        ),
        ("unet", {"classes": ("a", "")}, "`classes` must be plain text"),
        ("unet", {"classes": ("a", 5)}, "`classes` must be a text, got 5"),
        ("unet", {"classes": ("a", "b\n")}, "`classes` must be plain text"),
        ("unet", {"classes": ("a", "b\u202e")}, "`classes` must be plain text"),
        ("unet", {"in_channels": 0}, "`in_channels` must lie between 1 and 16, got 0"),
        (
            "unet",
            {"in_channels": 17},
            "`in_channels` must lie between 1 and 16, got 17",
        ),
        ("unet", {"width": 3}, "`width` must lie between 4 and 128, got 3"),
        ("unet", {"width": 10**6}, "`width` must lie between 1 and 128"),
        (NetConfig("unet", width=2), {}, "`width` must lie between 4 and 128, got 2"),
        ("unet", {"levels": 7}, "`levels` must lie between 1 and 6, got 7"),
        ("fcn-8s", {"levels": 4}, "`fcn-8s` has 5 levels, got 4"),
        ("unet", {"norm": "layer"}, "`norm` must be one of none, batch, group"),
        ("unet", {"unlabelled": 1}, "`unlabelled` must be 0 .* or None .*, got 1"),
        ("unet", {"unlabelled": False}, "`unlabelled` must be 0 .*, got False"),
        ("unet", {"seed": -1}, "`seed` must lie between 0 and"),
        ("unet", {"seed": 2**70}, "`seed` must lie between 0 and"),
        ("unet", {"seed": 1.5}, "`seed` must be a whole number"),
        (
            "unet++",
            {"levels": 6, "width": 128},
            r"would take \d+.\d GiB, allowed is 1.0",
        ),
        (
            "fcn-32s",
            {"classes": [f"c{i}" for i in range(255)], "width": 64},
            "GiB, allowed",
        ),
    ],
)
def test_bad_settings_are_refused(
    network: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(network, **settings)


def test_a_copy_is_independent() -> None:
    model = make()
    other = model.copy()
    assert_equal_weights(model, other)
    with torch.no_grad():
        next(other.network.parameters()).add_(1)
    other.provenance["seed"] = 4
    assert not torch.equal(*(next(m.network.parameters()) for m in (model, other)))
    assert model.provenance["seed"] == 3


def test_a_pruned_model_keeps_what_describes_it() -> None:
    model = make("unet++", levels=3)
    small = model.pruned(2)
    assert small.config == model.config.replaced(levels=2)
    assert small.network.depths == (1, 2)
    assert not small.network.training
    for field in ("classes", "preprocessing", "unlabelled", "prior", "history"):
        assert getattr(small, field) == getattr(model, field)
    assert small.provenance == {**model.provenance, "pruned_from_levels": 3}
    assert model.config.levels == 3
    count = [sum(p.numel() for p in m.network.parameters()) for m in (small, model)]
    assert count[0] < count[1] / 3
    assert model.pruned(np.int64(2)).config == small.config  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [0, 4, -1, True, "2", 1.5])
def test_a_depth_without_a_head_is_refused(depth: Any) -> None:
    model = make("unet++", levels=3)
    with pytest.raises(
        ValueError, match=r"`depth` must be one of 1, 2, 3 for this unet\+\+, got "
    ):
        model.pruned(depth)
    with pytest.raises(ValueError, match="`depth` must be one of 1, 2, 3"):
        check_depth(model.network, depth)


def test_the_deepest_head_is_the_default() -> None:
    assert check_depth(make("unet++", levels=3).network, None) == 3
    assert check_depth(make("unet", levels=2).network, 2) == 2
    assert check_depth(make("fcn-8s").network, None) == 5


def test_names_and_codings_are_checked_alike_everywhere() -> None:
    assert check_classes(["a", "b c", "細胞"]) == ("a", "b c", "細胞")
    check_unlabelled(0)
    check_unlabelled(None)


# --- saving and loading ----------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_survives_its_file(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make(name)
    path = tmp_path / "m.safetensors"
    before = {k: v.clone() for k, v in weights(model).items()}
    model.save(path)
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    found = load_model(path)
    assert_equal_weights(found, model)
    for field in (
        "config",
        "classes",
        "preprocessing",
        "unlabelled",
        "prior",
        "history",
    ):
        assert getattr(found, field) == getattr(model, field), field
    digest = modelfile.read(path).digest
    assert found.provenance == {**model.provenance, "digest": digest}
    assert not found.network.training
    flags = [{k: p.requires_grad for k, p in m.network.named_parameters()}
             for m in (found, model)]  # fmt: skip
    assert flags[0] == flags[1]
    assert all(not p.is_meta for p in found.network.parameters())
    np.testing.assert_array_equal(
        predict_proba(found, IMAGE), predict_proba(model, IMAGE)
    )
    assert caplog.records == []


def test_dense_and_untrained_models_survive_too(tmp_path: Path) -> None:
    model = create_model("unet", width=4, levels=1, norm="batch", unlabelled=None)
    model.save(str(tmp_path / "m.safetensors"))
    found = load_model(str(tmp_path / "m.safetensors"))
    assert found.unlabelled is None
    assert (found.prior, found.history) == ((), ())
    assert_equal_weights(found, model)


def test_a_fresh_process_predicts_the_same_bits(tmp_path: Path) -> None:
    names = ("unet++", "fcn-8s", "unet-valid")
    np.save(tmp_path / "image.npy", IMAGE)
    expected = []
    for name in names:
        model = make(name)
        model.save(tmp_path / f"{name}.safetensors")
        expected.append(predict_proba(model, IMAGE, tile=32))
    code = f"""
import sys, numpy as np, torch
torch.set_num_threads({torch.get_num_threads()})
from napari_unetpp import api
image = np.load("image.npy")
found = [api.predict_proba(api.load_model(n + ".safetensors"), image, tile=32)
         for n in {names!r}]
np.save("found.npy", np.stack(found))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    found = np.load(tmp_path / "found.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.stack(expected))


def test_an_existing_file_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"precious")
    model = make(levels=1)
    with pytest.raises(SaveError):
        model.save(path)
    assert path.read_bytes() == b"precious"
    model.save(path, overwrite=True)
    assert_equal_weights(load_model(path), model)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model = make(levels=1)
    with torch.no_grad():
        next(model.network.parameters())[0] = float("nan")
    with pytest.raises(SaveError, match="NaN or infinity"):
        model.save(tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


def test_saving_in_training_mode_changes_nothing(tmp_path: Path) -> None:
    model = make(norm="batch", levels=2)
    model.save(tmp_path / "eval.safetensors")
    before = {k: v.clone() for k, v in weights(model).items()}
    model.network.train()
    model.save(tmp_path / "train.safetensors")
    assert model.network.training
    assert all(torch.equal(v, before[k]) for k, v in weights(model).items())
    files = [(tmp_path / f"{n}.safetensors").read_bytes() for n in ("eval", "train")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("steps", "kept"),
    [(0, []), (1, [1]), (500, list(range(1, 501))), (501, list(range(1, 502, 2))),
     (1500, list(range(3, 1501, 3)))],
)  # fmt: skip
def test_a_long_history_is_thinned(tmp_path: Path, steps: int, kept: list[int]) -> None:
    model = create_model("unet", width=4, levels=1)
    model.history = tuple(
        TrainStep(i, 1 / i, i / 7, None if i < 25 else 0.5) for i in range(1, steps + 1)
    )
    model.save(tmp_path / "m.safetensors")
    found = load_model(tmp_path / "m.safetensors").history
    assert [s.step for s in found] == kept
    for s in found:
        assert isinstance(s, TrainStep)
        assert s.loss == round(1 / s.step, 6)
        assert s.seconds == round(s.step / 7, 3)
        assert s.score == (None if s.step < 25 else 0.5)


# --- files that lie --------------------------------------------------------------


@pytest.fixture
def rewrite(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a model file with changes, its digest right."""
    path = tmp_path / "good.safetensors"
    make(levels=2).save(path)
    good = modelfile.read(path)

    def rewrite(
        change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None],
    ) -> Path:
        tensors = {k: v.copy() for k, v in good.tensors.items()}
        config = json.loads(json.dumps(good.config))
        provenance = json.loads(json.dumps(good.provenance))
        change(tensors, config, provenance)
        changed = tmp_path / "bad.safetensors"
        modelfile.write(
            changed, tensors, config=config, provenance=provenance, overwrite=True
        )
        return changed

    return rewrite


def setting(name: str, value: Any, part: str | None = None) -> Callable[..., None]:
    def change(_: Any, config: dict[str, Any], __: Any) -> None:
        (config if part is None else config[part])[name] = value

    return change


def network(**values: Any) -> Callable[..., None]:
    return lambda _, config, __: config["network"].update(values)


def tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[..., None]:
    def apply(tensors: dict[str, Any], _: Any, __: Any) -> None:
        change(tensors)

    return apply


A, B = "x_0_0.conv1.weight", "x_1_0.conv1.weight"
BIAS = "x_0_0.conv1.bias"


def swap(tensors: dict[str, Any], a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


LIES: dict[str, Callable[..., None]] = {
    "weights swapped": tensors(lambda t: swap(t, A, B)),
    "weight renamed": tensors(lambda t: t.update({"x_9_9.w": t.pop(A)})),
    "weight missing": tensors(lambda t: t.pop(A)),
    "weight too many": tensors(lambda t: t.update(more=t[A])),
    "weight turned": tensors(lambda t: t.update({B: t[B].transpose(1, 0, 2, 3)})),
    "weight flat": tensors(lambda t: t.update({A: t[A].ravel()})),
    "whole numbers": tensors(lambda t: t.update({BIAS: t[BIAS].astype(np.int64)})),
    "other network": network(name="unet++", deep_supervision=True),
    "fcn": network(name="fcn-8s", levels=5, residual=False, stem=1),
    "other levels": network(levels=3),
    "other width": network(width=5),
    "other channels": network(in_channels=2),
    "other norm": network(norm="none"),
    "batch norm": network(norm="batch"),
    "unknown network": network(name="unet+++"),
    "width a million": network(width=10**6),
    "width too small": network(width=1),
    "huge": network(width=128, levels=6, name="unet++"),
    "depth 0": network(levels=0),
    "depth 99": network(levels=99),
    "depth true": network(levels=True),
    "depth text": network(levels="3"),
    "unknown setting": network(colour=1),
    "network a list": setting("network", []),
    "no name": setting("network", {"width": 4}),
    "outputs": network(out_channels=4),
    "one class": setting("classes", ["a"]),
    "two names": setting("classes", ["a", "b"]),
    "256 classes": setting("classes", [str(i) for i in range(256)]),
    "twins": setting("classes", ["a", "b", "a"]),
    "no text": setting("classes", ["a", "b", None]),
    "classes a text": setting("classes", "abc"),
    "classes a table": setting("classes", {"a": 1, "b": 2, "c": 3}),
    "empty name": setting("classes", ["a", "b", ""]),
    "blank name": setting("classes", ["a", "b", "  "]),
    "long name": setting("classes", ["a", "b", "c" * 65]),
    "bidi": setting("classes", ["a", "b", "gpj\u202eexe"]),
    "control": setting("classes", ["a", "b", "c\x1b[31m"]),
    "newline": setting("classes", ["a", "b", "c\nd"]),
    "zero width": setting("classes", ["a", "b", "c\u200bd"]),
    "unlabelled 1": setting("unlabelled", 1),
    "unlabelled false": setting("unlabelled", False),
    "unlabelled a list": setting("unlabelled", []),
    "prior too short": setting("prior", [1.0]),
    "prior a text": setting("prior", "abc"),
    "prior a number": setting("prior", 3),
    "prior huge": setting("prior", [0, 0, 1e9]),
    "prior true": setting("prior", [0, 0, True]),
    "percentiles reversed": setting("low", 99.9, "preprocessing"),
    "percentile 200": setting("high", 200, "preprocessing"),
    "preprocessing unknown": setting("gamma", 2, "preprocessing"),
    "preprocessing a list": setting("preprocessing", [1, 2]),
    "setting missing": lambda _, config, __: config.pop("prior"),
    "setting too many": setting("code", "import os"),
    "history a text": lambda _, __, p: p.update(history="long"),
    "history too wide": lambda _, __, p: p.update(history=[[1, 2, 3, 4, 5]]),
    "history a table": lambda _, __, p: p.update(history=[{"step": 1}]),
    "history of texts": lambda _, __, p: p.update(history=[["a", 1, 2, 3]]),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(lie: str, rewrite: Callable[..., Path]) -> None:
    resource = pytest.importorskip("resource")
    path = rewrite(LIES[lie])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelFileError) as caught:
        load_model(path)
    assert "bad.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300 * 1024, "kilobytes"


def test_the_rewriting_alone_changes_nothing(rewrite: Callable[..., Path]) -> None:
    found = load_model(rewrite(lambda *_: None))
    assert_equal_weights(found, make(levels=2))
    assert found.classes == ("background", "Zelle", "<b>細胞</b>")


def test_files_that_could_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
    torch.save({"weights": torch.zeros(3)}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ModelFileError, match=r"can run code when they are opened"):
            load_model(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_damaged_missing_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    make(levels=1).save(path)
    data = path.read_bytes()
    newer = data.replace(b'"format_version":"1"', b'"format_version":"2"')
    flipped = bytearray(data)
    flipped[-1] ^= 1
    # The names of two tensors exchanged, their data and the digest as they were.
    names = data.replace(b'"x_0_0.norm1.bias"', b'"x_0_0.norm9.bias"')
    names = names.replace(b'"x_0_0.norm2.bias"', b'"x_0_0.norm1.bias"')
    names = names.replace(b'"x_0_0.norm9.bias"', b'"x_0_0.norm2.bias"')
    for wrong in (newer, bytes(flipped), names, data[:-1], data + b"\0", b"", b"PK"):
        assert wrong != data
        path.write_bytes(wrong)
        with pytest.raises(ModelFileError, match=r"m\.safetensors"):
            load_model(path)
    with pytest.raises(ModelFileError, match="gone"):
        load_model(tmp_path / "gone.safetensors")


def test_half_precision_weights_become_single(rewrite: Callable[..., Path]) -> None:
    def halve(tensors: dict[str, Any], _: Any, __: Any) -> None:
        for name in tensors:
            if name != "selftest.output":
                tensors[name] = tensors[name].astype(np.float16)

    model = load_model(rewrite(halve))
    assert {v.dtype for v in weights(model).values()} == {torch.float32}
    expected = weights(make(levels=2))[A].half().float()
    assert torch.equal(weights(model)[A], expected)
    predict_proba(model, IMAGE)


# --- the self-test ---------------------------------------------------------------


def shifted(share: float, by: float = 1.0) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        output = tensors["selftest.output"]
        output[: round(share * output.size)] += by

    return change


@pytest.mark.parametrize(
    ("change", "percent"),
    [
        (shifted(1.0), "100.0"),
        (shifted(0.25), "25.0"),
        (lambda t: t.update({"selftest.output": t["selftest.output"][:-1]}), "100.0"),
        (lambda t: swap(t, "x_0_0.norm1.bias", "x_0_0.norm2.bias"), None),
        (lambda t: t["head_2.score.weight"].__imul__(1.01), None),
    ],
)
def test_other_values_than_when_saved_are_told(
    change: Callable[..., Any],
    percent: str | None,
    rewrite: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = load_model(rewrite(tensors(change)))
    assert isinstance(model, Model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.name == "napari_unetpp"
    text = record.getMessage()
    assert "`bad.safetensors` gives other values here" in text
    if percent:
        assert f"{percent} % of its test output differs" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        shifted(1.0, 5e-4),
        lambda t: t.pop("selftest.output"),
    ],
)
def test_rounding_and_a_missing_self_test_are_no_news(
    change: Callable[..., Any],
    rewrite: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    load_model(rewrite(tensors(change)))
    assert caplog.records == []


def test_the_stored_output_is_small_and_not_constant(tmp_path: Path) -> None:
    for name in ("unet", "unet-valid"):
        make(name, in_channels=2).save(tmp_path / f"{name}.safetensors")
        output = modelfile.read(tmp_path / f"{name}.safetensors").tensors[
            "selftest.output"
        ]
        assert output.dtype == np.float32
        assert 40 <= output.size <= 4096
        assert output.std() > 1e-3


def test_half_precision_halves_the_file_and_predicts_the_same(tmp_path: Path) -> None:
    model = make()
    model.save(tmp_path / "whole.safetensors")
    model.save(tmp_path / "half.safetensors", half=True)
    sizes = [(tmp_path / f"{n}.safetensors").stat().st_size for n in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    weight = next(iter(model.network.parameters()))
    before = weight.detach().clone()
    loaded = load_model(tmp_path / "half.safetensors")
    assert torch.equal(weight, before)
    assert all(p.dtype == torch.float32 for p in loaded.network.parameters())
    np.testing.assert_allclose(
        predict_proba(loaded, IMAGE), predict_proba(model, IMAGE), atol=0.02
    )
