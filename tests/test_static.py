"""What the source must never hold: unsafe loading, other writers, foreign markup."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.find_spec("napari_unetpp")
assert _spec is not None
assert _spec.origin is not None
FOLDER = Path(_spec.origin).parent

RUNS_CODE = {
    "pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml",
}  # fmt: skip
UNSAFE = {"eval", "exec", "compile", "__import__", "os.system", "os.popen"}
LOADS = {"torch.load", "np.load", "numpy.load", "torch.hub.load", "torch.jit.load"}
WRITES = {
    "write_text", "write_bytes", "tofile", "savez", "savez_compressed", "savetxt",
    "memmap", "open_memmap", "save_file", "touch", "NamedTemporaryFile", "mkstemp",
}  # fmt: skip
# These write into the first argument, which must be a buffer in memory.
INTO = {"imwrite", "imsave", "write_array", "imageio.imwrite", "np.save", "torch.save"}
RENAMES = {"os.replace", "os.rename", "os.truncate", "shutil.move", "shutil.copyfile"}

SHOWS = {"show_info", "show_warning", "show_error", "setToolTip", "setWhatsThis"}

# What one place may do and no other: the reason is its docstring or comment.
MAY = {
    "io.files": {"open", "os.open", "os.replace"},  # the one writer
    # Files that are locked; they stay empty.
    "recovery": {"os.open", "open"},
    "io.lock": {"os.open"},
    # What is not complete: a lock, and a manifest that grows by whole lines, each of
    # which is checked when it is read.
    "io.unfinished": {"open"},
    # zarr writes each chunk beside its place and renames it.
    "io.labels": {"zarr.open_array", "zarr.config.set", "zarr.create_group"},
    "io.lazy": {"np.memmap", "zarr.open_array"},  # both for reading
    "cli.console": {"os.open"},  # /dev/null in the place of a closed stdout
}


def modules() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(FOLDER).with_suffix("").parts): ast.parse(
            path.read_text(encoding="utf-8")
        )
        for path in sorted(FOLDER.rglob("*.py"))
    }


def buffers(tree: ast.AST) -> set[str]:
    """Return the names that hold a BytesIO."""
    return {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and "BytesIO(" in ast.unparse(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def mode_of(call: ast.Call, place: int) -> str:
    """Return the mode with which a file is opened, "?" where it is not a constant."""
    given = [k.value for k in call.keywords if k.arg == "mode"]
    given += call.args[place : place + 1]
    if not given:
        return "r"
    value = given[0]
    return str(value.value) if isinstance(value, ast.Constant) else "?"


def unsafe_loads(tree: ast.AST) -> list[str]:
    """Return what can run code that a file holds (rule R1)."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in RUNS_CODE]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] in RUNS_CODE:
                found.append(module)
            else:  # a module that another hands on, as dask does
                found += [a.name for a in node.names if a.name in RUNS_CODE]
            names = {f"{module}.{alias.name}" for alias in node.names}
            found += sorted(names & (LOADS | {"numpy.load", "os.system"}))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in UNSAFE | LOADS:
                found.append(name)
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and (
                    ast.unparse(keyword.value) != "False"
                ):
                    found.append("allow_pickle")
    return found


def writes(tree: ast.AST) -> list[str]:
    """Return what creates or changes a file."""
    found, memory = [], buffers(tree)
    pillow = "PIL" in ast.unparse(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        first = ast.unparse(node.args[0]) if node.args else ""
        if name == "open" and set(mode_of(node, 1)) & set("wax+?"):
            found.append("open")
        elif name == "os.open":
            found.append("os.open")
        elif last == "open" and name not in {"open", "os.open"} and node.args:
            if set(mode_of(node, 0)) & set("wax+?"):
                found.append(name)
        elif last in INTO or name in INTO or (pillow and last == "save"):
            if first not in memory:
                found.append(name)
        elif name in RENAMES or name.startswith("zarr."):
            found.append(name)
        elif last in WRITES and name not in {"io.write_text", "write_text"}:
            found.append(name)
    return found


def clean(node: ast.expr) -> bool:
    """Return whether a text holds nothing foreign, or has been made plain."""
    match node:
        case ast.Constant():
            return True
        case ast.Call():
            return ast.unparse(node.func).rpartition(".")[2] in {"safe", "escape"}
        case ast.JoinedStr():
            return all(clean(part) for part in node.values)
        case ast.FormattedValue(format_spec=ast.JoinedStr()):
            return True  # a number: text has no format here
        case ast.FormattedValue() | ast.Subscript() | ast.Attribute():
            return clean(node.value)
        case ast.IfExp():
            return clean(node.body) and clean(node.orelse)
        case ast.Name():
            return node.id.isupper()
    return False


def markup(tree: ast.AST) -> list[str]:
    """Return the texts that Qt or napari may read as markup although foreign."""
    found = []
    plain = "PlainText" in ast.unparse(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        shows = name in SHOWS
        label = name in {"QLabel", "setHtml"} and not plain
        if (shows or label) and not clean(node.args[0]):
            found.append(f"{name}({ast.unparse(node.args[0])})")
    return found


def test_nothing_can_run_what_a_file_holds() -> None:
    found = {m: unsafe_loads(tree) for m, tree in modules().items()}
    # dask sends work between its processes so, never through a file; whoever reaches
    # them can run code anyway (README: trusted networks only).
    allowed = {"pretrained": ["torch.load"], "cluster": ["pickle", "pickle"]}
    assert {m: f for m, f in found.items() if f and f != allowed.get(m)} == {}


def test_what_pytorch_loads_is_weights_alone() -> None:
    calls = [
        node
        for node in ast.walk(modules()["pretrained"])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    for call in calls:
        assert "weights_only=True" in ast.unparse(call)
        assert "mmap=False" in ast.unparse(call)


def test_one_place_alone_writes_files() -> None:
    found = {m: set(writes(tree)) - MAY.get(m, set()) for m, tree in modules().items()}
    assert {m: f for m, f in found.items() if f} == {}
    assert "os.replace" in writes(modules()["io.files"])


# Texts that are ours although they are no constants: what calls them gives constants.
OURS = {
    "setToolTip(tip)",
    "setToolTip(saved)",  # a date
    # Its name is escaped one line above.
    "setToolTip(f'<p>{name}</p><p>{self._tip}</p>' if name else self._tip)",
}


def test_foreign_text_is_never_markup() -> None:
    found = {m: set(markup(t)) - OURS for m, t in modules().items() if "_widgets" in m}
    assert {m: f for m, f in found.items() if f} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from distributed.protocol import pickle",
        "from yaml import load",
        "import joblib.numpy_pickle",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "np.load(path)",
        "read_array(f, allow_pickle=flag)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
    ],
)
def test_unsafe_loading_is_seen(source: str) -> None:
    assert unsafe_loads(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "open(p, 'w')",
        "open(p, mode='ab')",
        "open(p, 'r+b')",
        "open(p, how)",
        "p.open('w')",
        "p.write_text('a')",
        "p.write_bytes(b'a')",
        "tifffile.imwrite(path, a)",
        "buffer = path\ntifffile.imwrite(buffer, a)",
        "imageio.imwrite(path, a)",
        "from PIL import Image\nImage.fromarray(a).save(path)",
        "np.save(path, a)",
        "np.savez(path, a)",
        "a.tofile(path)",
        "torch.save(a, path)",
        "zarr.open(path)",
        "os.open(p, os.O_WRONLY)",
        "os.replace(a, b)",
    ],
)
def test_another_writer_is_seen(source: str) -> None:
    assert writes(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    ["open(p)", "open(p, 'rb')", "b = BytesIO()\nnp.save(b, a)", "io.write_text(p, t)"],
)
def test_reading_and_memory_are_no_writers(source: str) -> None:
    assert writes(ast.parse(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "show_info(text)",
        "show_error(f'{path} failed')",
        "w.setToolTip(layer.name)",
        "w.setToolTip('a' if b else name)",
        "QLabel(name)",
    ],
)
def test_foreign_markup_is_seen(source: str) -> None:
    assert markup(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["show_info(safe(text))", "w.setToolTip('a')", "w.setToolTip(f'{n:,} a')"]
)
def test_plain_text_is_let_alone(source: str) -> None:
    assert markup(ast.parse(source)) == []
