"""The rooms of the package import one another as agreed, and nothing foreign."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "napari_unetpp"
_spec = importlib.util.find_spec(PACKAGE)
assert _spec is not None
assert _spec.origin is not None
FOLDER = Path(_spec.origin).parent

# Room -> the rooms it may import. "+" before a name: that room and all it may import.
TABLE = {
    "__init__": "",
    "__main__": "cli",
    "errors": "",
    "config": "errors",
    "io": "errors",
    "preprocess": "config errors",
    "device": "errors",
    "parallel": "device errors",
    "networks": "config errors",
    "losses": "",
    "augment": "",
    "sampling": "config errors",
    "evaluate": "errors",
    "isbi": "errors",
    "presets": "config errors",
    "schedule": "config networks",
    "folders": "io errors",
    "pictures": "model",  # for its types alone
    "report": "pictures io errors",
    "record": "checkpoint model io errors",
    "experiment": "record report train predict model evaluate examples device io config"
    " errors",
    "heldout": "errors",
    "score": "augment heldout config device networks",
    "modelfile": "io config errors",
    "model": "modelfile networks preprocess io config errors",
    "examples": "preprocess config errors",
    "checkpoint": "modelfile io config errors",
    "teacher": "heldout",
    "trainer": "budget teacher model checkpoint losses augment sampling heldout score"
    " examples parallel schedule networks device config errors",
    "pretrained": "model networks io errors",
    "train": "trainer pretrained model networks checkpoint examples preprocess device"
    " parallel io config errors",
    "budget": "networks device config",
    "predict": "budget model networks preprocess device config errors",
    "messages": "model score",  # for its types alone: it is free of torch
    "live": "+train +predict trainer messages heldout",
    "script": "io errors",
    "recovery": "checkpoint io errors",
    "project": "model examples heldout modelfile io config errors",
    "samples": "errors",
    "cluster": "io config errors",
    "bigimage": "cluster predict model device preprocess io config errors",
    "batch": "cluster predict model io preprocess config errors",
    "api": "+live +batch bigimage evaluate pretrained isbi presets experiment samples"
    " project io",
    "cli": "api teacher parallel batch checkpoint evaluate experiment folders presets"
    " io project samples config errors",
    "_sample_data": "samples",
    "_widgets": "messages config errors api live device script recovery project",
}
# Of these, _widgets imports the last five inside functions, which run in its thread.
WIDGETS_AT_MODULE_LEVEL = {"_widgets", "messages", "config", "errors"}

QT = {
    "qtpy", "PyQt5", "PyQt6", "PySide2", "PySide6", "magicgui", "superqt", "pyqtgraph",
    "vispy",
}  # fmt: skip
KNOWS_NAPARI = {"_widgets", "_sample_data"}
WITHOUT_TORCH = {
    "__init__", "errors", "config", "messages", "sampling", "evaluate", "modelfile",
    "checkpoint", "recovery", "teacher",
    "samples", "batch", "cluster", "script", "_sample_data", "isbi", "presets",
    "folders", "pictures", "report", "record", "experiment", "project",
}  # fmt: skip


class Arrow(NamedTuple):
    """One import of `target` by `module`, at module level (`top`) or in a function."""

    module: str
    target: str
    top: bool
    typing: bool

    @property
    def room(self) -> str:
        return self.module.partition(".")[0]

    @property
    def ours(self) -> bool:
        return self.target.partition(".")[0] == PACKAGE

    @property
    def target_room(self) -> str:
        parts = self.target.split(".")
        return parts[1] if len(parts) > 1 else "__init__"


def modules() -> dict[str, Path]:
    """Return our modules by dotted name without the package's, packages as __init__."""
    return {
        ".".join(path.relative_to(FOLDER).with_suffix("").parts): path
        for path in sorted(FOLDER.rglob("*.py"))
    }


def arrows() -> list[Arrow]:
    """Return every import of every module."""
    return [
        arrow
        for module, path in modules().items()
        for arrow in walk(module, ast.parse(path.read_text(encoding="utf-8")))
    ]


def walk(
    module: str, node: ast.AST, top: bool = True, typing: bool = False
) -> Iterator[Arrow]:
    """Yield the imports below `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Arrow(module, alias.name, top, typing)
        elif isinstance(child, ast.ImportFrom):
            for target in targets(module, child):
                yield Arrow(module, target, top, typing)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from walk(module, ast.Module([part], []), top, typing=True)
            for part in child.orelse:
                yield from walk(module, ast.Module([part], []), top, typing)
        else:
            called = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(module, child, top and not called, typing)


def targets(module: str, node: ast.ImportFrom) -> list[str]:
    """Return the modules that a from-import reaches, a name as its module."""
    base = node.module or ""
    if node.level:
        here = [PACKAGE, *module.split(".")][: -node.level]
        base = ".".join([*here, *([base] if base else [])])
    if base.partition(".")[0] != PACKAGE:
        return [base]
    known = {f"{PACKAGE}.{name.removesuffix('.__init__')}" for name in modules()}
    return sorted(
        {n if (n := f"{base}.{alias.name}") in known else base for alias in node.names}
    )


def allowed(room: str) -> set[str]:
    """Return the rooms that `room` may import: itself, its row, and the version."""
    result = {room, "__init__"}
    for word in TABLE[room].split():
        name = word.removeprefix("+")
        result |= allowed(name) if word.startswith("+") else {name}
    return result


def test_every_module_has_its_row_in_the_table() -> None:
    rooms = {module.partition(".")[0] for module in modules()}
    assert {"config", "errors"} <= rooms
    assert rooms <= set(TABLE), "a new room needs a row: what may it import?"


def test_rooms_import_only_what_the_table_allows() -> None:
    wrong = [
        f"{arrow.module} imports {arrow.target}"
        for arrow in arrows()
        if arrow.ours and arrow.target_room not in allowed(arrow.room)
    ]
    assert wrong == []


def test_the_table_itself_has_no_circle() -> None:
    for room in TABLE:
        seen: set[str] = set()
        todo = [r for r in allowed(room) if r != room]
        while todo:
            other = todo.pop()
            assert other != room, f"{room} is reached from itself"
            if other not in seen:
                seen.add(other)
                todo += [r for r in allowed(other) if r != other]


def test_modules_import_one_another_without_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    names = {f"{PACKAGE}.{m.removesuffix('.__init__')}": m for m in modules()}
    names[PACKAGE] = "__init__"
    for arrow in arrows():
        if arrow.ours and not arrow.typing:
            graph.setdefault(arrow.module, set()).add(names.get(arrow.target, "?"))
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in graph.get(module, ()):
                visit(target, (*path, module))
            done.add(module)

    for module in list(graph):
        visit(module, ())


@pytest.mark.parametrize(
    ("foreign", "rooms"), [({"napari"}, KNOWS_NAPARI), (QT, {"_widgets"})]
)
def test_qt_and_napari_stay_in_their_rooms(foreign: set[str], rooms: set[str]) -> None:
    wrong = [
        f"{arrow.module} imports {arrow.target}"
        for arrow in arrows()
        if arrow.target.partition(".")[0] in foreign and arrow.room not in rooms
    ]
    assert wrong == []


def test_rooms_that_load_quickly_do_without_torch() -> None:
    wrong = [
        f"{arrow.module} imports {arrow.target}"
        for arrow in arrows()
        if arrow.target.partition(".")[0] == "torch"
        and arrow.room in WITHOUT_TORCH
        and not arrow.typing
    ]
    assert wrong == []


def test_docks_reach_the_core_only_from_their_thread() -> None:
    wrong = [
        f"{arrow.module} imports {arrow.target} at module level"
        for arrow in arrows()
        if arrow.room == "_widgets" and arrow.top and not arrow.typing
        if arrow.target.partition(".")[0] == "torch"
        or (arrow.ours and arrow.target_room not in WIDGETS_AT_MODULE_LEVEL)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch", ("torch", True, False)),
        ("def f():\n    from napari import Viewer", ("napari", False, False)),
        ("class A:\n    import torch.nn", ("torch.nn", True, False)),
        ("if TYPE_CHECKING:\n    import torch", ("torch", True, True)),
        ("from .errors import UnetppError", (f"{PACKAGE}.errors", True, False)),
        ("from . import errors", (f"{PACKAGE}.errors", True, False)),
        ("from napari_unetpp import config", (f"{PACKAGE}.config", True, False)),
        ("from napari_unetpp import __version__", (PACKAGE, True, False)),
    ],
)
def test_the_walk_sees_every_form_of_import(
    source: str, expected: tuple[str, bool, bool]
) -> None:
    (arrow,) = walk("losses", ast.parse(source))
    assert (arrow.target, arrow.top, arrow.typing) == expected


def test_a_relative_import_in_a_subpackage_is_resolved() -> None:
    source = "from ..errors import UnetppError\nfrom .blocks import Block"
    found = [a.target for a in walk("networks.unet", ast.parse(source))]
    assert found[0] == f"{PACKAGE}.errors"
    assert found[1] in (f"{PACKAGE}.networks", f"{PACKAGE}.networks.blocks")


def loaded_by(*names: str) -> set[str]:
    """Return the top-level modules that a fresh Python holds after the imports."""
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_the_core_brings_in_no_qt_and_no_napari() -> None:
    core = [
        f"{PACKAGE}.{module}"
        for module in modules()
        if module.partition(".")[0] not in {"__main__", "_widgets"}
        and not module.endswith("__init__")
    ]
    loaded = loaded_by(*core)
    assert PACKAGE in loaded
    assert loaded & (QT | {"napari"}) == set()


def test_the_package_alone_brings_in_no_torch() -> None:
    loaded = loaded_by(PACKAGE)
    assert PACKAGE in loaded
    assert loaded & {"torch", "skimage", "numpy"} == set()


def test_what_napari_loads_at_its_start_brings_in_no_torch() -> None:
    quick = [f"{PACKAGE}.{m}" for m in modules() if m in {"_sample_data", "samples"}]
    loaded = loaded_by(PACKAGE, *quick)
    assert PACKAGE in loaded
    assert "torch" not in loaded


def test_optional_packages_are_loaded_by_those_who_use_them() -> None:
    loaded = loaded_by(f"{PACKAGE}.api", f"{PACKAGE}.cli.predicting")
    assert "torch" in loaded
    assert loaded & {"zarr", "yaozarrs", "distributed"} == set()
