"""What is installed is what the repository says: manifest, version, commands."""

from __future__ import annotations

import importlib
import re
import tomllib
from importlib import metadata
from pathlib import Path

import npe2
import pytest
from packaging.requirements import Requirement

import napari_unetpp

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def manifest() -> npe2.PluginManifest:
    return npe2.PluginManifest.from_file(ROOT / "napari.yaml")


def commands(manifest: npe2.PluginManifest) -> dict[str, str | None]:
    return {c.id: c.python_name for c in manifest.contributions.commands or ()}


def test_napari_finds_the_manifest_of_the_installed_package(
    manifest: npe2.PluginManifest,
) -> None:
    installed = npe2.PluginManifest.from_distribution("napari-unetpp")
    assert installed.name == manifest.name == "napari-unetpp"
    assert installed.display_name == manifest.display_name == "napari-unetpp"
    assert commands(installed) == commands(manifest)
    assert commands(manifest)


def test_every_command_of_the_manifest_exists(manifest: npe2.PluginManifest) -> None:
    for python_name in commands(manifest).values():
        assert python_name is not None
        module, _, function = python_name.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_every_sample_of_the_manifest_has_a_command(
    manifest: npe2.PluginManifest,
) -> None:
    samples = manifest.contributions.sample_data or []
    assert samples
    for sample in samples:
        assert sample.command in commands(manifest)
        assert sample.command == f"napari-unetpp.sample_{sample.key}"


def test_the_version_is_the_same_everywhere() -> None:
    assert metadata.version("napari-unetpp") == napari_unetpp.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == napari_unetpp.__version__


def test_the_types_ship() -> None:
    assert Path(napari_unetpp.__file__).with_name("py.typed").is_file()


def test_the_command_line_is_installed() -> None:
    (script,) = (
        e
        for e in metadata.distribution("napari-unetpp").entry_points
        if e.group == "console_scripts"
    )
    assert (script.name, script.value) == ("napari-unetpp", "napari_unetpp.cli:main")


def test_the_base_installation_asks_for_no_qt_binding_and_no_napari() -> None:
    base = [r for r in metadata.requires("napari-unetpp") or () if "extra ==" not in r]
    names = {re.split(r"[^A-Za-z0-9-]", r, maxsplit=1)[0].lower() for r in base}
    assert {"torch", "numpy", "qtpy"} <= names
    assert names & {"napari", "pyqt5", "pyqt6", "pyside2", "pyside6"} == set()


def test_ci_runs_the_command_of_the_readme_and_nothing_else() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    demo, tests = re.findall(r"^bash \.ci/prepare .*$", readme, re.MULTILINE)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert demo.endswith("napari-unetpp demo")
    assert [s for s in script if s and not s.startswith(("#", "set ", "cd "))] == [
        tests
    ]


def test_the_constraint_agrees_with_the_requirement() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    torch = next(d for d in wanted["project"]["dependencies"] if d.startswith("torch"))
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    )
    assert pins["torch"] in Requirement(torch).specifier
