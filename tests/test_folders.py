"""Images are divided by whole groups, repeatably, and subfolders are understood."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import tifffile

from napari_unetpp.errors import ImageFileError
from napari_unetpp.folders import PARTS, find_parts, read_groups, split

if TYPE_CHECKING:
    from pathlib import Path

NAMES = [f"cell{i:02}" for i in range(20)]


def test_every_name_is_in_one_part_and_the_shares_are_kept() -> None:
    parts = split(NAMES)
    assert list(parts) == list(PARTS)
    assert sorted(n for found in parts.values() for n in found) == NAMES
    assert [len(found) for found in parts.values()] == [14, 3, 3]
    assert [len(f) for f in split(NAMES, shares=(0.8, 0.2, 0)).values()] == [16, 4, 0]


def test_the_seed_alone_decides() -> None:
    assert split(NAMES, seed=3) == split(NAMES[::-1], seed=3)
    assert split(NAMES, seed=3) != split(NAMES, seed=4)


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together(seed: int) -> None:
    groups = {name: f"patient{i % 7}" for i, name in enumerate(NAMES)}
    parts = split(NAMES, groups=groups, seed=seed)
    owners = [{groups[n] for n in found} for found in parts.values()]
    assert sum(len(o) for o in owners) == 7
    assert all(len(found) >= 2 for found in parts.values())
    assert len(parts["train"]) >= 12


def test_a_large_group_trains() -> None:
    groups = {name: "big" if i < 15 else name for i, name in enumerate(NAMES)}
    assert set(NAMES[:15]) <= set(split(NAMES, groups=groups)["train"])


@pytest.mark.parametrize(
    ("names", "more", "told"),
    [
        (NAMES[:2], {}, "at least 3 images of different groups, got 2"),
        (NAMES, {"groups": dict.fromkeys(NAMES, "one")}, "got 1"),
        (NAMES, {"groups": {"cell00": "a"}}, "got none for cell01, cell02"),
        (NAMES, {"shares": (1, 0, 0)}, "the first two above 0"),
        (NAMES, {"shares": (0.5, 0.5)}, "three shares"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    names: list[str], more: dict[str, object], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        split(names, **more)  # type: ignore[arg-type]


def test_groups_come_from_a_table(tmp_path: Path) -> None:
    table = tmp_path / "groups.csv"
    table.write_text("name,slide,group\na,1,p\nb.tif,1,q\n", encoding="utf-8")
    assert read_groups(str(table), ["a", "b"]) == {"a": "p", "b": "q"}
    with pytest.raises(ValueError, match="a row for each image, got none for c"):
        read_groups(str(table), ["a", "c"])
    table.write_text("name,slide\na,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="columns name and group, got name, slide"):
        read_groups(str(table), ["a"])
    with pytest.raises(ImageFileError, match="cannot be read"):
        read_groups(str(tmp_path / "none.csv"), ["a"])


def test_groups_come_from_the_names() -> None:
    names = ["p1_z0", "p1_z1", "p2_z0"]
    by_part = {"p1_z0": "p1", "p1_z1": "p1", "p2_z0": "p2"}
    assert read_groups(r"^(p\d+)_", names) == by_part
    assert read_groups(r"^p\d+", names) == by_part
    with pytest.raises(ValueError, match="must match every name, but not p2_z0"):
        read_groups("p1", names)
    with pytest.raises(ValueError, match="regular expression, got"):
        read_groups("(", names)


def write(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True)
    for name in names:
        tifffile.imwrite(folder / name, np.zeros((4, 4), np.uint8))


def test_files_are_paired_and_divided(tmp_path: Path) -> None:
    names = [f"{n}.tif" for n in NAMES]
    write(tmp_path / "images", *names)
    write(tmp_path / "masks", *names)
    parts = find_parts(tmp_path / "images", tmp_path / "masks", seed=1)
    assert {k: [a.stem for a, _ in v] for k, v in parts.items()} == split(NAMES, seed=1)
    assert all(a.stem == b.stem for found in parts.values() for a, b in found)
    grouped = find_parts(tmp_path / "images", tmp_path / "masks", groups=r"(\d)$")
    digits = [{a.stem[-1] for a, _ in found} for found in grouped.values()]
    assert sum(map(len, digits)) == 10


@pytest.mark.parametrize("val", ["val", "validation"])
def test_subfolders_are_the_parts(tmp_path: Path, val: str) -> None:
    for side in ("images", "masks"):
        write(tmp_path / side / "train", "a.tif", "b.tif")
        write(tmp_path / side / val, "c.tif")
    found = find_parts(tmp_path / "images", tmp_path / "masks")
    assert {k: len(v) for k, v in found.items()} == {
        "train": 2, "validation": 1, "test": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="divided by its subfolders already"):
        find_parts(tmp_path / "images", tmp_path / "masks", groups="a")
    write(tmp_path / "images" / "test", "d.tif")
    with pytest.raises(ImageFileError, match="but no test folder in"):
        find_parts(tmp_path / "images", tmp_path / "masks")


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ImageFileError, match="no folder"):
        find_parts(tmp_path / "images", tmp_path / "masks")
