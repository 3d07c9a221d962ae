"""The lines of README.md work as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from napari_unetpp import api, errors
from napari_unetpp.cli.parser import build_parser

if TYPE_CHECKING:
    from typing import Any

    import pytest

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_ten_lines_of_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = blocks("python")
    assert "max_seconds=10" in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("max_seconds=10", "max_steps=3"), names)
    assert names["labels"].shape == names["sample"].image.shape
    assert names["again"].classes == names["sample"].classes
    assert 0 < names["result"].mean_iou <= 1


def test_every_command_line_is_understood() -> None:
    lines = [
        line.split()[1:]
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("napari-unetpp ")
    ]
    assert len(lines) >= 4
    for line in lines:
        assert build_parser().parse_args(line).command == line[0]


def test_every_network_and_error_is_told() -> None:
    text = README.read_text(encoding="utf-8")
    for name in api.NETWORKS:
        assert name in text or name.removeprefix("fcn") in text


def test_every_error_has_a_line_a_next_step_and_a_test() -> None:
    assert without_line(README.read_text(encoding="utf-8")) == []
    tests = "".join(
        path.read_text(encoding="utf-8")
        for path in Path(__file__).parent.rglob("test_*.py")
        if path != Path(__file__)
    )
    for name in error_names():
        assert re.search(rf"pytest\.raises\(\(?[\w, ]*{name}", tests), name


def test_an_error_without_its_line_is_seen() -> None:
    text = README.read_text(encoding="utf-8")
    for name in error_names():
        gone = "\n".join(line for line in text.splitlines() if name not in line)
        assert name in without_line(gone)
        assert name in without_line(f"{gone}\n| `{name}` | |")


def error_names() -> list[str]:
    classes = {k: v for k, v in vars(errors).items() if isinstance(v, type)}
    own = {k for k, v in classes.items() if issubclass(v, errors.UnetppError)}
    return sorted(own - {"UnetppError"})


def without_line(text: str) -> list[str]:
    """Return the errors that no row of the table of troubles gives a next step."""
    table = text.partition("## Troubleshooting")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| (.+) \|$", table, flags=re.MULTILINE)
    told = " ".join(message for message, step in rows if step.strip())
    return [name for name in error_names() if name not in told]
