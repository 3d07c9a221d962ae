"""What all tests share: reproducible properties, and a GPU only where there is one."""

from __future__ import annotations

import os
import tempfile

# Before torch is imported: two threads that wait for each other on a busy machine take
# ten times as long as one, and the figures of one are the same everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

# How long an example takes, or its making, says nothing about whether it is right.
hypothesis.settings.register_profile(
    "tests",
    deadline=None,
    derandomize="CI" in os.environ,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "long", hypothesis.settings.get_profile("tests"), max_examples=20_000
)
hypothesis.settings.register_profile(
    "sequences", hypothesis.settings.get_profile("tests"), max_examples=300
)
hypothesis.settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    """Keep a test's strokes from being offered in the user's next napari."""
    folder = tempfile.TemporaryDirectory(prefix="napari-unetpp-")
    os.environ["NAPARI_UNETPP_RECOVERY"] = folder.name
    config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU on a machine without one."""
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
