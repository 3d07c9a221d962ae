"""Which device computes, and how precisely."""

from __future__ import annotations

import gc
import os
import platform
import sys
import weakref
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from napari_unetpp import __version__
from napari_unetpp.errors import DeviceError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Linux's large pages: every map is new memory, and that costs a third of the time of
# convolutions of 16 channels in pages of 4 kB. torch reads it when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

_dead: set[str] = set()  # kinds of devices that have failed in this process


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device to use.

    Parameters
    ----------
    device : str, torch.device or None, optional
        "cpu", "cuda", "cuda:1", "mps"; None or "auto" takes an NVIDIA GPU, else an
        Apple GPU, else the CPU.

    Raises
    ------
    ValueError
        If this computer or this torch does not have the device.
    DeviceError
        If it has failed in this process.
    """
    if device is None or device == "auto":
        if torch.cuda.is_available() and "cuda" not in _dead:
            return torch.device("cuda")
        mps = torch.backends.mps.is_available() and "mps" not in _dead
        return torch.device("mps" if mps else "cpu")
    try:
        wished = torch.device(device)
    except (RuntimeError, TypeError):
        wished = torch.device("meta")
    if wished.type in _dead:
        raise DeviceError(
            f"The device {wished} has failed and cannot be used before this program "
            "is restarted. Continue on the CPU (device='cpu', --device cpu)."
        )
    if wished.type == "cpu":
        return wished
    count = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }.get(wished.type, 0)
    if (wished.index or 0) < count:
        return wished
    found = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    found += ["mps"] * torch.backends.mps.is_available()
    raise ValueError(
        f"`device` must be one that this computer has ({', '.join(found)}), got "
        f"{str(device)!r}. Leave it out to use the fastest one."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this is how torch or numpy says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    told = str(error)
    return isinstance(error, RuntimeError) and (
        "allocate memory" in told
        or "out of memory" in told
        # How oneDNN says it, as measured under a limit of address space.
        or "could not create a primitive" in told
    )


def release_memory() -> None:
    """Give back what nothing refers to any more, also to the devices' drivers."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def is_device_failure(error: BaseException) -> bool:
    """Return whether a device has failed, after which it computes nothing any more."""
    if is_out_of_memory(error) or not isinstance(error, RuntimeError):
        return False
    told = str(error)
    return isinstance(error, torch.AcceleratorError) or any(
        sign in told for sign in ("CUDA error", "device-side assert", "MPS backend")
    )


@contextmanager
def guarded(device: torch.device) -> Iterator[None]:
    """Turn the failure of a device into DeviceError, and never use it again.

    Raises
    ------
    DeviceError
        Which says how to continue on the CPU.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_device_failure(error):
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    else:
        return
    _dead.add(device.type)
    raise DeviceError(
        f"The device {device} has failed ({first}) and cannot be used before this "
        "program is restarted. Continue on the CPU (device='cpu', --device cpu)."
    )


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """Half precision where the device computes in it (bfloat16: no loss scaling)."""
    able = {"cuda": torch.cuda.is_bf16_supported, "cpu": _cpu_has_bfloat16}
    if enabled and device.type in able and able[device.type]():
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _cpu_has_bfloat16() -> bool:
    """Return whether the CPU multiplies in bfloat16; imitated, it would be slow."""
    ask: Callable[[], dict[str, bool]] = getattr(torch.cpu, "get_capabilities", dict)
    found = ask()  # torch >= 2.11
    able = found.get("avx512_bf16", False) or found.get("amx_bf16", False)
    return able and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@contextmanager
def considerate() -> Iterator[None]:
    """Leave a core to the window, and the interpreter to it every half millisecond.

    Notes
    -----
    Measured beside napari: training on all cores but one moves the brush's latency
    (95th percentile) from 9 to 13 ms, on all cores to 57 ms; a loop in pure Python with
    the interpreter's own switch interval of 5 ms to 200 ms.
    """
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 2) - 1)))
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Allow only operations that give the same bits every time, and restore.

    Raises
    ------
    TrainingError
        At an operation that has no such form on the device.
    """
    if not enabled:
        yield
        return
    # cuBLAS reads it when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    strict = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    tuned = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        told = str(error).partition(".")[0]
        raise TrainingError(
            f"Not everything can be repeated bit for bit on this device: {told:.120}. "
            "Leave `deterministic` off, or use device='cpu'."
        ) from None
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.backends.cudnn.benchmark = tuned


def describe(device: torch.device) -> str:
    """Return a device in a few words, with its free memory where that can be asked."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return f"{torch.cuda.get_device_name(device)}, {free / 1e9:.0f} GB free"
    if device.type == "mps":
        return "Apple GPU"
    cores = os.cpu_count() or 1
    return f"CPU, {torch.get_num_threads()} of {cores} core{'s' * (cores > 1)}"


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the last bits of a training depend on, beside its arguments."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "napari-unetpp": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        **{name: version(name) for name in ("scikit-image", "scikit-learn")},
        "system": platform.system(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "device": name,
        "threads": torch.get_num_threads(),
        "bfloat16": isinstance(autocast(device, True), torch.autocast),
    }


class _Peak(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the memory of all tensors that operators return while they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now: int = 0
        self.peak: int = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        place, size = storage._cdata, storage.nbytes()  # data_ptr is 0 on "meta"
        self._users[place] = self._users.get(place, 0) + 1
        if self._users[place] == 1:
            self._now += size
            self.peak = max(self.peak, self._now)
        weakref.finalize(tensor, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self._now -= size


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the largest total size in bytes of the tensors that `work` holds at once.

    Notes
    -----
    Counted on any device by the tensors that operators return; what an operator needs
    for itself while it runs is not in it.
    """
    with _Peak() as meter:
        work()
    return int(meter.peak)
