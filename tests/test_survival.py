"""Training outlives what goes wrong: no memory, no finite numbers, no device."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from napari_unetpp import augment, budget
from napari_unetpp import device as device_room
from napari_unetpp import predict as predict_room
from napari_unetpp.config import NetConfig, TrainConfig
from napari_unetpp.device import guarded, resolve_device
from napari_unetpp.errors import DeviceError, DeviceMemoryError, TrainingError
from napari_unetpp.examples import read_examples
from napari_unetpp.model import Model, create_model, load_model
from napari_unetpp.train import train_steps
from napari_unetpp.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NET = NetConfig("unet++", width=4, levels=2, deep_supervision=True, stem=2)
QUICK = TrainConfig(patch=128, batch=4, warp_after=1)
CPU = torch.device("cpu")
FULL = (
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
)
# Each halves the batch or the patch once more.
LESS = [(4, 128), (2, 128), (1, 128), (1, 64), (1, 32)]


def picture(side: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of two textures, and a stroke on either."""
    y, x = np.indices((side, side))
    image = np.where(x < side // 2, 60 * (y % 6 < 3), 60 * ((x + y) % 6 < 3))
    noise = np.random.default_rng(0).normal(90, 8, (side, side))
    strokes = np.zeros((side, side), np.uint8)
    strokes[4:-4, 8 : side // 2 - 8 : 6] = 1
    strokes[4:-4, side // 2 + 8 : -4 : 6] = 2
    return (image + noise).astype(np.float32), strokes


IMAGE, PAINT = picture()


def trainer(config: TrainConfig = QUICK, net: NetConfig = NET) -> Trainer:
    return Trainer(
        create_model(net), read_examples(IMAGE, PAINT), config, seed=0, device=CPU
    )


def weights(own: Trainer) -> dict[str, np.ndarray]:
    return own.state().tensors


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def failing(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, times: int, error: Exception
) -> list[int]:
    """Let a function fail when it ends, so that all it did must be undone."""
    real, calls = getattr(owner, name), []

    def short(*args: Any, **kwargs: Any) -> Any:
        found = None if "step" in name else real(*args, **kwargs)
        calls.append(1)
        if len(calls) <= times:
            raise error
        return real(*args, **kwargs) if "step" in name else found

    monkeypatch.setattr(owner, name, short)
    return calls


PHASES: dict[str, tuple[Any, str]] = {
    "reading": (augment, "cut_windows"),
    "augmenting": (augment, "grey_values"),
    "forward": (Trainer, "_loss"),
    "between strokes": (Trainer, "_between_strokes"),
    "backward": (torch.Tensor, "backward"),
    "optimizer": (torch.optim.AdamW, "step"),
}


@cache
def three_steps(batch: int, patch: int) -> tuple[list[float], dict[str, np.ndarray]]:
    own = trainer(QUICK.replaced(batch=batch, patch=patch))
    return [own.step() for _ in range(3)], weights(own)


@pytest.mark.parametrize("depth", range(5))
@pytest.mark.parametrize("phase", PHASES)
def test_a_step_without_memory_equals_one_with_less_from_the_start(
    phase: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, patch = LESS[depth]
    losses, expected = three_steps(batch, patch)
    own = trainer()
    failing(monkeypatch, *PHASES[phase], depth, FULL[depth % 3])
    assert own.step() == losses[0]
    assert (f"batch is {batch} x {patch} px" in own.note) == (depth > 0)
    assert own.step() == losses[1]
    assert own.note == ""
    assert own.step() == losses[2]
    assert same(weights(own), expected)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_later_step_goes_on_from_the_last_weights(
    optimizer: str, norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = QUICK.replaced(optimizer=optimizer, patch=32)
    net = NetConfig("unet", width=4, levels=1, norm=norm)
    expected, own = trainer(config, net), trainer(config, net)
    for _ in range(2):
        assert own.step() == expected.step()
    expected._use(config.replaced(batch=2))
    failing(monkeypatch, Trainer, "_between_strokes", 1, FULL[0])
    found = own.step()
    monkeypatch.undo()
    assert found == expected.step()
    assert own.step() == expected.step()
    assert same(weights(own), weights(expected))


def test_six_tries_and_then_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing(monkeypatch, Trainer, "_loss", 99, FULL[0])
    with pytest.raises(
        DeviceMemoryError, match=r"1 patch\(es\) of 32 px.*device='cpu'"
    ):
        trainer(QUICK.replaced(batch=32, patch=32)).step()
    assert len(calls) == 6
    del calls[:]
    with pytest.raises(DeviceMemoryError):
        trainer(QUICK.replaced(batch=1, patch=32)).step()
    assert len(calls) == 1


def test_a_score_without_memory_is_measured_with_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = trainer(QUICK.replaced(batch=1, patch=64))
    own.steps = 49
    calls = failing(monkeypatch, type(own._scorer), "measure", 1, FULL[1])
    before = weights(own)
    own.step()
    assert "1 x 32 px" in own.note
    assert len(calls) == 2
    assert not same(before, weights(own))


def test_the_tensors_of_a_failed_try_are_gone_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import weakref

    real, seen, alive = Trainer._loss, [], []

    def short(self: Trainer, heads: Any, target: Any) -> Any:
        alive.append(sum(r() is not None for r in seen))
        seen.append(weakref.ref(heads[0]))
        if len(seen) < 3:
            raise torch.OutOfMemoryError("no")
        return real(self, heads, target)

    monkeypatch.setattr(Trainer, "_loss", short)
    trainer().step()
    assert alive == [0, 0, 0]


def test_less_is_told_and_kept_over_a_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    ask: dict[str, Any] = {"network": NET, "config": QUICK, "checkpoint": path}
    failing(monkeypatch, Trainer, "_loss", 2, FULL[0])
    steps = train_steps(IMAGE, PAINT, max_steps=3, **ask)
    notes = [s.note for s in steps]
    assert "batch is 1 x 128 px" in notes[0]
    assert notes[1:] == ["", ""]
    monkeypatch.undo()
    drawn: list[int] = []
    real = Trainer._draw
    monkeypatch.setattr(
        Trainer, "_draw", lambda self, n: drawn.append(n) or real(self, n)
    )
    found = drain(train_steps(IMAGE, PAINT, max_steps=4, resume=True, **ask))
    assert drawn == [1]
    assert [s.step for s in found.history] == [1, 2, 3, 4]


def test_what_cannot_fit_begins_with_less(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = budget.step_bytes(NET, 4, 128)
    assert 1.8 < needed / budget.step_bytes(NET, 2, 128) < 2.2
    monkeypatch.setattr(budget, "available_bytes", lambda _: 1.2 * needed)
    notes = [s.note for s in train_steps(IMAGE, PAINT, network=NET, config=QUICK,
                                         max_steps=2)]  # fmt: skip
    assert notes == ["Memory is short: from step 1 on, the batch is 2 x 128 px.", ""]
    monkeypatch.setattr(budget, "available_bytes", lambda _: 1.3 * needed)
    notes = [s.note for s in train_steps(IMAGE, PAINT, network=NET, config=QUICK,
                                         max_steps=1)]  # fmt: skip
    assert notes == [""]


def drain(steps: Any) -> Model:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of address space")
@pytest.mark.parametrize("megabytes", [300, 700])
def test_a_real_limit_of_memory_ends_well(megabytes: int) -> None:
    code = f"""
import resource, sys
import numpy as np, torch, torch._dynamo
from napari_unetpp import api
torch.set_num_threads(1)
image = np.random.default_rng(0).random((600, 600), np.float32)
paint = np.zeros((600, 600), np.uint8); paint[100:500, 100:200] = 1
paint[100:500, 400:500] = 2
ask = dict(network="unet", device="cpu")
api.train(image, paint, config=api.TrainConfig(batch=1, patch=32), max_steps=2, **ask)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + {megabytes} * 10**6
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
config = api.TrainConfig(batch=64, patch=256)
try:
    notes = [s.note for s in api.train_steps(image, paint, config=config, max_steps=2,
                                             **ask)]
except api.DeviceMemoryError as error:
    print("told", error)
else:
    print("done", notes)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr[-500:]
    assert "told The device" in found.stdout or "Memory is short" in found.stdout


# --- numbers that are not finite ---------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient", "weights"])
def test_the_last_good_model_stays_and_no_bad_file_is_written(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = drain(train_steps(IMAGE, PAINT, network=NET, config=QUICK, max_steps=2))
    path = tmp_path / "c.safetensors"
    told = "loss" if what == "loss" else "weights"  # which a gradient spoils
    real_loss, real_step, calls = Trainer._loss, torch.optim.AdamW.step, []

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(_: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * torch.nan

    def loss(self: Trainer, heads: Any, target: Any) -> torch.Tensor:
        found = real_loss(self, heads, target)
        if self.steps == 2:
            found = {"loss": found * torch.inf, "gradient": Bad.apply(found)}.get(
                what, found
            )
        return found

    def step(self: Any, *args: Any) -> None:
        calls.append(1)
        real_step(self, *args)
        if what == "weights" and len(calls) == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(torch.nan)

    monkeypatch.setattr(Trainer, "_loss", loss)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    steps = train_steps(
        IMAGE, PAINT, network=NET, config=QUICK, checkpoint=path, checkpoint_seconds=0
    )
    with pytest.raises(
        TrainingError, match=rf"The {told} must stay finite.*step 3"
    ) as e:
        drain(steps)
    good = e.value.model
    assert [s.step for s in good.history] == [1, 2]
    for name, value in good.network.state_dict().items():
        assert torch.equal(value, expected.network.state_dict()[name])
    for file in tmp_path.glob("*.safetensors"):
        kept = load_model(file)
        assert all(v.isfinite().all() for v in kept.network.state_dict().values())
        assert kept.history


def test_a_rate_that_explodes_ends_with_a_finite_model() -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        TrainConfig(learning_rate=1e9)
    config = QUICK.replaced(
        optimizer="sgd", learning_rate=10, momentum=0.99, patch=32, edges=0
    )
    net = NetConfig("unet", width=4, levels=1, norm="none")
    steps = train_steps(IMAGE, PAINT, network=net, config=config, max_steps=400)
    with pytest.raises(TrainingError, match="smaller `learning_rate`") as error:
        drain(steps)
    kept = error.value.model.network.state_dict()
    assert all(v.isfinite().all() for v in kept.values())


def test_an_image_that_turns_bad_is_named() -> None:
    own = Trainer(
        create_model(NET),
        read_examples([IMAGE, IMAGE], [PAINT, PAINT]),
        QUICK.replaced(batch=16, patch=32),
        seed=0,
        device=CPU,
    )
    own.step()
    own._images[1].fill_(torch.nan)
    with pytest.raises(TrainingError, match="Image 2 holds values that are not"):
        own.step()


# --- a device that fails -----------------------------------------------------------


@pytest.fixture
def alive() -> Iterator[None]:
    yield
    device_room._dead.clear()


@pytest.mark.usefixtures("alive")
def test_a_failed_device_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resolve_device("auto").type == "cuda"
    with (
        pytest.raises(DeviceError, match=r"has failed.*Continue on the CPU"),
        guarded(torch.device("cuda")),
    ):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    assert resolve_device("auto").type != "cuda"
    assert resolve_device("cpu").type == "cpu"
    with pytest.raises(DeviceError, match=r"cuda has failed.*device='cpu'"):
        resolve_device("cuda")


@pytest.mark.usefixtures("alive")
def test_a_training_whose_device_fails_can_go_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.safetensors"
    ask: dict[str, Any] = {"network": NET, "config": QUICK, "checkpoint": path}
    real = Trainer._loss

    def broken(self: Trainer, heads: Any, target: Any) -> Any:
        if self.steps == 2:
            raise RuntimeError("CUDA error: unspecified launch failure\nmore of it")
        return real(self, heads, target)

    monkeypatch.setattr(Trainer, "_loss", broken)
    with pytest.raises(DeviceError, match=r"failed.*CPU.*checkpoint is .*\(step 2\)"):
        drain(train_steps(IMAGE, PAINT, checkpoint_seconds=0, **ask))
    monkeypatch.undo()
    device_room._dead.clear()  # it was the CPU that played the GPU
    found = drain(train_steps(IMAGE, PAINT, max_steps=3, resume=True, **ask))
    expected = drain(train_steps(IMAGE, PAINT, network=NET, config=QUICK, max_steps=3))
    for name, value in found.network.state_dict().items():
        assert torch.equal(value, expected.network.state_dict()[name])


@pytest.mark.usefixtures("alive")
def test_a_prediction_whose_device_fails_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("MPS backend has gone")

    monkeypatch.setattr(predict_room.PlanePredictor, "probabilities", broken)
    with pytest.raises(DeviceError, match="MPS backend"):
        predict_room.predict(create_model(NET), IMAGE)
