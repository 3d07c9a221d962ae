"""Which device computes, and how precisely."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


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
    """
    if device is None or device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wished = torch.device(device)
    except (RuntimeError, TypeError):
        wished = torch.device("meta")
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
        "allocate memory" in told or "out of memory" in told
    )


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager[object]:
    """Half precision on a GPU that has it (bfloat16: no loss scaling needed)."""
    if enabled and device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return nullcontext()
