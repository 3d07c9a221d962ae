"""The device is one that the computer has; running out of memory is recognised."""

from __future__ import annotations

import pytest
import torch

from napari_unetpp import device as room
from napari_unetpp.device import (
    autocast,
    deterministic,
    is_out_of_memory,
    resolve_device,
)
from napari_unetpp.errors import TrainingError


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def with_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("device", [None, "auto", "cpu", torch.device("cpu")])
def test_the_cpu_is_always_there(device: str | torch.device | None) -> None:
    assert resolve_device(device) == torch.device("cpu")


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    "device",
    ["cuda", "cuda:0", "cuda:9", "mps", "meta", "toaster", "", "cuda:-1", 1.5, ["cpu"]],
)
def test_what_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"`device` must be one .*\(cpu\), got "):
        resolve_device(device)


@pytest.mark.usefixtures("with_two_gpus")
def test_gpus_are_counted() -> None:
    assert resolve_device() == torch.device("cuda")
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"\(cpu, cuda\), got 'cuda:2'"):
        resolve_device("cuda:2")


def test_an_apple_gpu_comes_after_nvidias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device() == torch.device("mps")
    assert resolve_device("mps") == torch.device("mps")
    with pytest.raises(ValueError, match=r"\(cpu, mps\), got 'mps:1'"):
        resolve_device("mps:1")


class Asked:
    """Stands in for torch.autocast, which warns where there is no GPU."""

    def __init__(self, kind: str, *, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_half_precision_is_for_devices_that_have_it(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = True
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)
    monkeypatch.setattr(room, "_cpu_has_bfloat16", lambda: able)
    monkeypatch.setattr(torch, "autocast", Asked)
    found = autocast(torch.device(device), True)
    assert isinstance(found, Asked)
    assert (found.kind, found.dtype) == (device, torch.bfloat16)
    for other, enabled in ((device, False), ("mps", True)):
        assert not isinstance(autocast(torch.device(other), enabled), Asked)
    able = False
    assert not isinstance(autocast(torch.device(device), True), Asked)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False),
        ({"bf16": True}, False),  # ARM: not tried
        (None, False),
    ],
)
def test_the_cpu_is_asked_for_bfloat16(
    found: dict[str, bool] | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    if found is None:  # an older torch
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert room._cpu_has_bfloat16() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert room._cpu_has_bfloat16() is False


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (OSError("cannot allocate memory"), False),
    ],
)
def test_running_out_of_memory_is_recognised(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_what_cannot_be_repeated_is_told() -> None:
    with pytest.raises(TrainingError, match=r"put_ does not have .*device='cpu'"):
        with deterministic(True):
            torch.zeros(4).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="shape"), deterministic(True):
        torch.zeros(4).view(3)
    assert not torch.are_deterministic_algorithms_enabled()
