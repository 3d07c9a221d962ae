"""The short forms of reliability.py and faults.py, and that they would find a fault."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from napari_unetpp import modelfile

if TYPE_CHECKING:
    from types import ModuleType

FILE = Path(__file__).parents[1] / "benchmarks" / "reliability.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    if not FILE.exists():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location("reliability", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_changed_model_files_are_refused_or_true(bench: ModuleType) -> None:
    told = bench.fuzz_model(10_000, 60)
    assert (told["wrong"], told["untyped"]) == (0, 0)
    assert told["refused"] > told["inputs"] / 2
    assert told["accepted"] > 10  # a new checksum does reach what lies behind it


def test_a_reader_without_its_checksum_is_found_out(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = bench.small_model()
    digest = modelfile.decode(good).digest
    monkeypatch.setattr(modelfile, "_digest", lambda *_: digest)
    assert bench.fuzz_model(2000, 60)["wrong"] > 0


def test_a_reader_that_raises_anything_else_is_found_out(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modelfile, "_check_entry", lambda *_: None)
    assert bench.fuzz_model(2000, 60)["untyped"] > 0


def test_every_damage_is_reported(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = bench.damage(100)
    assert told["damages"] - told["same"] > 150
    assert told["silent"] == 0
    monkeypatch.setattr(modelfile, "read", lambda _: None)
    assert bench.damage(20)["silent"] > 0


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_a_save_is_whole_wherever_it_is_broken(bench: ModuleType) -> None:
    assert bench is not None
    faults = FILE.with_name("faults.py")
    command = [sys.executable, str(faults), "calls"]
    command += ["--savers", "model,in place", "--faults", "SIGKILL,ENOSPC"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "strace cannot watch" in ran.stderr:
        pytest.skip("strace may not watch processes here")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    good, bad = ran.stdout.splitlines()
    assert "'killed': " in good
    assert "'wrong': 0" in good
    assert "'wrong': 0" not in bad  # which writes in place is found out
