"""What tests of the docks share: napari, a screen, settings apart, no worker left."""

from __future__ import annotations

import gc
import os
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytest.importorskip("napari", reason="needs napari")
pytest.importorskip("pytestqt", reason="needs pytest-qt and a Qt binding")

# napari's, not ours: a layer may be touched by the GUI thread alone.
os.environ.setdefault("NAPARI_ENSURE_PLUGIN_MAIN_THREAD", "1")

# Imported before any worker is: the first test would wait for it.
import torch._dynamo  # noqa: F401
from napari.qt.threading import GeneratorWorker

from napari_unetpp._widgets import _worker, offer


@pytest.fixture(autouse=True)
def _settings_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NAPARI_CONFIG", str(tmp_path / "settings.yaml"))


@pytest.fixture(autouse=True)
def _imports_are_no_garbage() -> None:
    """Spare napari's collection after each test the half million objects before it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_model_is_on_offer() -> None:
    offer.newest.put(None)


@pytest.fixture(autouse=True)
def _no_worker_is_left(qapp: Any) -> Iterator[None]:
    yield
    GeneratorWorker.await_workers(20_000)
    end = time.monotonic() + 5
    while (_worker._active or _worker._queue) and time.monotonic() < end:
        qapp.processEvents()
    left = [runner.title for runner in _worker._active]
    _worker._active.clear()
    _worker._queue.clear()
    assert not left, f"runs left: {left}"


@pytest.fixture
def wait(qtbot: Any) -> Callable[[Callable[[], bool]], None]:
    """Process events until a condition holds; fails after half a minute."""

    def until(condition: Callable[[], bool], timeout: int = 30_000) -> None:
        qtbot.waitUntil(condition, timeout=timeout)

    return until
