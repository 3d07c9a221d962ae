"""The lines of README.md work as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from napari_unetpp import api
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
    for name in (
        "ModelFileError",
        "SaveError",
        "DeviceMemoryError",
        "DeviceError",
        "TrainingError",
    ):
        assert name in text
