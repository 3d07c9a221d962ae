"""One training on several processes, each of which computes its share of a batch."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from napari_unetpp.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

_PATIENCE = timedelta(seconds=60)  # with a process that does not answer


@dataclass(frozen=True)
class Team:
    """The processes of a training, as one of them sees them.

    Every process draws the whole batch from the same random numbers and computes its
    share of the network's outputs. Each then computes the loss of the whole batch, so
    that any loss and any weight of classes is that of a single process; the gradients,
    each by its own share alone, are added up.

    Attributes
    ----------
    rank, size : int
        Number of this process, from 0, and how many there are.
    """

    rank: int = 0
    size: int = 1

    def share(self, n: int) -> slice:
        """Return which of n patches are this process's.

        Raises
        ------
        ValueError
            If they cannot be shared out evenly.
        """
        if n % self.size:
            raise ValueError(
                f"`batch` must be a multiple of the number of processes, {self.size}, "
                f"got {n}. Choose another `batch` (--set batch=N) or number."
            )
        part = n // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def joined(self, heads: list[Tensor]) -> list[Tensor]:
        """Return the heads of the whole batch, given those of this process's share."""
        if self.size == 1:
            return heads
        import torch

        own = torch.cat([h.detach().float().flatten() for h in heads])
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with _answered():
            torch.distributed.all_gather(parts, own)
        sizes = [h.numel() for h in heads]
        rows = [torch.split(part, sizes) for part in parts]
        return [
            torch.cat(
                [
                    head.float() if rank == self.rank else row[i].view(head.shape)
                    for rank, row in enumerate(rows)
                ]
            )
            for i, head in enumerate(heads)
        ]

    def add_up(self, gradients: Sequence[Tensor]) -> None:
        """Replace each gradient by its sum over the processes."""
        if self.size == 1:
            return
        import torch

        flat = torch.cat([g.flatten() for g in gradients])
        with _answered():
            torch.distributed.all_reduce(flat)
        for own, total in zip(
            gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
        ):
            own.copy_(total.view(own.shape))

    def any(self, flag: bool, device: object = "cpu") -> bool:
        """Return whether any process says so; all get the same answer."""
        if self.size == 1:
            return flag
        import torch

        votes = torch.tensor(float(flag), device=str(device))
        with _answered():
            torch.distributed.all_reduce(votes)
            return bool(votes > 0)


_team = Team()


def team() -> Team:
    """Return the processes that train together: this one alone, unless `together`."""
    return _team


def asked() -> bool:
    """Return whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def together(device: str | None) -> Iterator[str]:
    """Train with the other processes that torchrun has started.

    Parameters
    ----------
    device : str or None
        As for `train_steps`; each process of a computer takes a GPU of its own.

    Yields
    ------
    device : str
        Where this process computes: NCCL joins GPUs, gloo the CPUs.

    Raises
    ------
    TrainingError
        If the others cannot be reached within 60 s.
    """
    global _team
    import torch

    from napari_unetpp.device import resolve_device

    found = resolve_device(device)
    where = str(found)
    if found.type == "cuda":
        where = str(resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}"))
        torch.cuda.set_device(where)
    with _answered():
        torch.distributed.init_process_group(
            "nccl" if found.type == "cuda" else "gloo", timeout=_PATIENCE
        )
    _team = Team(torch.distributed.get_rank(), torch.distributed.get_world_size())
    try:
        yield where
    finally:
        _team = Team()
        torch.distributed.destroy_process_group()


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise TrainingError(
            "All processes of a training must stay, but another one has ended or does "
            f"not answer ({first}). Start all of them again with --resume."
        ) from None
