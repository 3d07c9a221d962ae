"""Work shared by processes, on this computer or by the workers of a dask scheduler."""

from __future__ import annotations

import itertools
import logging
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from napari_unetpp import io
from napari_unetpp.config import check_number
from napari_unetpp.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

_FAILURES = 3  # how often a task may lose its worker
_TIMEOUT = 30  # s until a scheduler must have answered, or a worker come back
_LOOK = 5  # s after which it is asked whether there are workers
_LOST = (
    "Workers died again and again, or the scheduler was lost ({}). What is done is "
    "kept: the same command goes on with it."
)
_LARGEST = 16 * 2**20  # bytes that describe the work to a worker


@dataclass(frozen=True)
class Wanted:
    """Who shares the work; false where nobody does.

    Attributes
    ----------
    workers : int or None
        Processes on this computer.
    scheduler : str or None
        Address of a dask scheduler, such as "tcp://10.0.0.7:8786".
    """

    workers: int | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_number("workers", self.workers, 1, 1024, whole=True)
            if self.scheduler is not None:
                raise ValueError(
                    "Pass `workers` or `scheduler`, not both: a scheduler has workers."
                )
        if self:
            # Who imported it before sees its log as they like; others see our errors.
            quiet = dict.fromkeys(("distributed", "distributed.client"), "critical")
            with io.needed("dask", "cluster").config.set({"logging": quiet}):
                io.needed("distributed", "cluster")

    def __bool__(self) -> bool:
        return self.workers is not None or self.scheduler is not None

    @contextmanager
    def client(self) -> Iterator[Any]:
        """Connect to the workers, and end those that were started here.

        Raises
        ------
        ClusterError
            If the scheduler does not answer.
        """
        import dask
        import distributed

        settings = {
            "distributed.scheduler.allowed-failures": _FAILURES,
            "distributed.comm.timeouts.connect": _TIMEOUT,
        }
        with dask.config.set(settings):
            if self.scheduler is not None:
                try:
                    client = distributed.Client(self.scheduler, timeout=_TIMEOUT)
                except (OSError, ValueError, TypeError) as error:
                    raise ClusterError(
                        f"The scheduler `{self.scheduler}` does not answer. Is it "
                        "running, and is the address right (tcp://HOST:8786)?"
                    ) from error
                with client:
                    yield client
                return
            # Other computers must not reach processes that run what they are sent.
            with (
                distributed.LocalCluster(
                    n_workers=self.workers,
                    threads_per_worker=1,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",
                    worker_dashboard_address="127.0.0.1:0",
                    memory_limit=0,
                    silence_logs=logging.CRITICAL,
                    preload=[__name__],
                ) as processes,
                distributed.Client(processes) as client,
            ):
                yield client


def dask_setup(_: Any) -> None:
    """Leave Ctrl-C to the process that started a worker; called by its name."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def each(
    client: Any,
    work: Callable[[bytes, Any], Any],
    job: Any,
    items: Iterable[Any],
    *,
    keep_going: bool = False,
) -> Generator[tuple[Any, Any], None, None]:
    """Yield each item with what `work` returned for it, in the order of completion.

    Parameters
    ----------
    client : distributed.Client
        From `Wanted.client`.
    work : callable
        Takes `job`, packed, and an item; pure, so that it can be done again.
    job : object
        The same for all items.
    items : iterable
        Each worker has one at a time.
    keep_going : bool, optional
        Whether an item whose workers died is yielded with a `ClusterError` instead of
        ending the work.

    Raises
    ------
    ClusterError
        If a task lost its worker too often.
    """
    import distributed
    from distributed.protocol import pickle

    # Packed here: dask would compute a dask array that it finds in an argument.
    blob = pickle.dumps(job)
    if len(blob) > _LARGEST:
        raise ValueError(
            "Workers read the image themselves: it must be a path, or a dask or zarr "
            f"array of stored data, got {len(blob) / 1e6:.0f} MB in memory."
        )
    waiting = iter(items)
    running: dict[Any, Any] = {}
    suspects = []

    def submit(left: Iterator[Any], most: int) -> None:
        for item in itertools.islice(left, most):
            running[client.submit(work, blob, item, pure=False)] = item

    submit(waiting, max(1, sum(client.nthreads().values())))
    try:
        while running:
            for future in _first_done(client, running):
                item = running.pop(future)
                if isinstance(future.exception(), distributed.KilledWorker):
                    suspects.append(item)
                else:
                    yield item, _outcome(future, keep_going)
                submit(waiting, 1)
        # What shared a worker with a task that kills was blamed too: once more, alone.
        for item in suspects:
            submit(iter([item]), 1)
            (future,) = _first_done(client, running)
            del running[future]
            yield item, _outcome(future, keep_going)
    finally:
        client.cancel(list(running))


def _first_done(client: Any, running: dict[Any, Any]) -> list[Any]:
    """Wait until something has ended, but not for workers that never come back."""
    import distributed

    alone = 0
    while alone < _TIMEOUT:
        try:
            ended = distributed.wait(list(running), _LOOK, "FIRST_COMPLETED").done
        except distributed.CancelledError:
            break
        except distributed.TimeoutError:
            alone = 0 if client.nthreads() else alone + _LOOK
            if alone and client.cluster is not None:
                client.cluster.scale(len(client.cluster.worker_spec) or 1)
        else:
            return list(ended)
    raise ClusterError(_LOST.format("no worker is left"))


def _lost() -> tuple[type[Exception], ...]:
    import distributed
    from distributed.comm import CommClosedError

    return distributed.KilledWorker, distributed.CancelledError, CommClosedError


def _outcome(future: Any, keep_going: bool) -> Any:
    try:
        return future.result()
    except _lost() as error:
        lost = ClusterError(_LOST.format(type(error).__name__))
        if keep_going:
            return lost
        raise lost from error


@contextmanager
def alone() -> Iterator[None]:
    """Let dask arrays be read by this thread, not by tasks that wait for it."""
    import dask

    with dask.config.set(scheduler="synchronous"):
        yield


def unpacked(blob: bytes) -> Any:
    """Return a job that `each` has packed, for this process alone."""
    from distributed.protocol import pickle

    return pickle.loads(blob)
