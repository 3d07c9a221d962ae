"""Which image trains, which one chooses and which one tests."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from napari_unetpp import io
from napari_unetpp.errors import ImageFileError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PARTS = ("train", "validation", "test")
SHARES = (0.7, 0.15, 0.15)
_FOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}

Pair = tuple["Path", "Path"]


def split(
    names: Sequence[str],
    *,
    groups: Mapping[str, str] | None = None,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> dict[str, list[str]]:
    """Divide names into parts, whole groups at a time.

    Parameters
    ----------
    names : sequence of str
        All different.
    groups : mapping of str to str, optional
        The group of each name, such as its patient or field of view; None: each name is
        a group of its own.
    shares : sequence of float, optional
        Of train, validation and test; their sum is 1. A test share of 0 is no test.
    seed : int, optional
        Of the order in which groups of one size are dealt.

    Returns
    -------
    parts : dict of str to list of str
        By `PARTS`, names sorted. Large groups are dealt first, each to the part that
        lacks most of its share.

    Raises
    ------
    ValueError
        If a share does not fit, a name has no group or there are too few groups.
    """
    if len(shares) != 3 or min(shares[:2]) <= 0 or shares[2] < 0:
        raise ValueError(
            "The split must be three shares for train, validation and test, the first "
            f"two above 0, got {tuple(shares)}. Pass for example 70,15,15."
        )
    of = groups or {name: name for name in names}
    lone = sorted(set(names) - set(of))
    if lone:
        raise ValueError(
            f"Every image needs a group, got none for {', '.join(lone[:5])}. Add a "
            "row for each to the table, or leave the groups out."
        )
    members: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        members[of[name]].append(name)
    used = [i for i in range(3) if shares[i] > 0]
    if len(members) < len(used):
        raise ValueError(
            f"A split into {', '.join(PARTS[i] for i in used)} needs at least "
            f"{len(used)} images of different groups, got {len(members)}. Add images, "
            "or pass subfolders train/ and val/."
        )
    order = np.random.default_rng(seed).permutation(sorted(members)).tolist()
    order.sort(key=lambda group: -len(members[group]))
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for group in order:
        lacking = min(used, key=lambda i: len(parts[PARTS[i]]) / shares[i])
        parts[PARTS[lacking]] += members[group]
    return {part: sorted(found) for part, found in parts.items()}


def find_parts(
    images: Path,
    masks: Path,
    *,
    groups: str | None = None,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> dict[str, list[Pair]]:
    """Pair the files of two folders by name and divide them into parts.

    Parameters
    ----------
    images, masks : Path
        Folders. Where both have subfolders train/ and val/ (and perhaps test/), these
        are the parts; else the files are divided by `split`.
    groups : str, optional
        A table or an expression, see `read_groups`.
    shares, seed
        See `split`.

    Raises
    ------
    ValueError
        If files do not pair up, or as `split`.
    ImageFileError
        If a folder is missing or has no image.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise ImageFileError(
                f"There is no folder `{io.shown(folder)}`. A run learns from a folder "
                "of images and a folder of masks with the same names."
            )
    given = {part: _subfolder(images, part) for part in PARTS}
    if given["train"] and given["validation"]:
        if groups:
            raise ValueError(
                f"`{io.shown(images)}` is divided by its subfolders already, so groups "
                "would change nothing. Leave them out, or put all files in one folder."
            )
        pairs: dict[str, list[Pair]] = {part: [] for part in PARTS}
        for part, inner in given.items():
            if inner is None:
                continue
            other = _subfolder(masks, part)
            if other is None:
                raise ImageFileError(
                    f"There is `{io.shown(inner)}`, but no {part} folder in "
                    f"`{io.shown(masks)}`. Give the masks the same subfolders."
                )
            pairs[part] = io.pair_by_stem(io.list_images(inner), io.list_images(other))
        return pairs
    every = io.pair_by_stem(io.list_images(images), io.list_images(masks))
    by_name = {pair[0].stem: pair for pair in every}
    of = read_groups(groups, list(by_name)) if groups else None
    names = split(list(by_name), groups=of, shares=shares, seed=seed)
    return {part: [by_name[n] for n in found] for part, found in names.items()}


def read_groups(text: str, names: Sequence[str]) -> dict[str, str]:
    """Return the group of each name, from a table or from the name itself.

    Parameters
    ----------
    text : str
        A CSV file with columns `name` and `group`, or a regular expression: what its
        first group (or else the whole of it) matches in a name is the group.
    names : sequence of str
        Of the images, without suffix.

    Raises
    ------
    ValueError
        If the table or the expression does not fit the names.
    ImageFileError
        If the table cannot be read.
    """
    if not text.lower().endswith(".csv"):
        return _matched(text, names)
    try:
        with open(text, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ImageFileError(
            f"The table of groups `{io.shown(text)}` cannot be read: {error}. Check "
            "its name and save it as CSV in UTF-8."
        ) from None
    if not rows or not {"name", "group"} <= set(rows[0]):
        found = ", ".join(map(str, rows[0])) if rows else "no row"
        raise ValueError(
            "The table of groups must have the columns name and group, got "
            f"{found:.100}. Add a first line `name,group`."
        )
    table = {str(row["name"]): str(row["group"]) for row in rows}
    known = {name: table.get(name, table.get(f"{name}.tif", "")) for name in names}
    lone = sorted(name for name, group in known.items() if not group)
    if lone:
        raise ValueError(
            f"The table of groups must have a row for each image, got none for "
            f"{', '.join(lone[:5])}. The names are those of the files without suffix."
        )
    return known


def _matched(pattern: str, names: Sequence[str]) -> dict[str, str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            "The groups must be a .csv file or a regular expression, got "
            f"{pattern!r:.80}: {error}."
        ) from None
    found = {name: expression.search(name) for name in names}
    lone = sorted(name for name, match in found.items() if match is None)
    if lone:
        raise ValueError(
            f"The expression of the groups must match every name, but not "
            f"{', '.join(lone[:5])}. Change it, or pass a table."
        )
    return {
        name: match.group(1 if expression.groups else 0) or ""
        for name, match in found.items()
        if match is not None
    }


def _subfolder(folder: Path, part: str) -> Path | None:
    for name in _FOLDERS[part]:
        if (folder / name).is_dir():
            return folder / name
    return None
