"""The coach line: the next useful thing to do, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_FEW_PIXELS = 60  # of a class: about one short stroke of a thin brush
_FEW_STROKES = 3


def advice(
    names: Sequence[str],
    pixels: Sequence[int],
    strokes: Sequence[int],
    *,
    training: bool,
    predicted: bool,
    scored: bool,
    holds_out: bool = True,
) -> str:
    """Return the next useful thing.

    Parameters
    ----------
    names, pixels, strokes
        Of each class: its name, its painted pixels and connected strokes.
    training : bool
        Whether a training runs.
    predicted : bool
        Whether a prediction has been shown.
    scored : bool
        Whether there is a held-out score.
    holds_out : bool, optional
        Whether the model keeps any place for it.
    """
    if not any(pixels):
        first = names[0]
        return (
            f"Paint a stroke of {_short(first)} and one of each other class. Pick the "
            "class in the table, then drag on the image."
        )
    for name, painted in zip(names, pixels, strict=True):
        if not painted:
            return f"Paint some {_short(name)}."
    for name, painted, count in zip(names, pixels, strokes, strict=True):
        if painted < _FEW_PIXELS and count < _FEW_STROKES:
            more = _FEW_STROKES - count
            return (
                f"Class {_short(name)} has {painted} pixels in {count} "
                f"stroke{'s' * (count != 1)}: paint {more} more in other places."
            )
    if not training and not predicted:
        return "Press Train: the network learns while you go on painting."
    if training and not holds_out:
        return (
            "This model learns from every stroke, so it has no held-out score. Paint "
            "where the prediction is wrong."
        )
    if training and not scored:
        return (
            "No held-out pixels yet: the score comes with strokes in more places. "
            "Paint where the prediction is wrong."
        )
    if training:
        return (
            "Paint where the prediction is wrong, or point at a region that is right "
            "and press A."
        )
    return (
        "Press Go on to learn more, Save to keep the model, or label other images "
        "with the Predict dock."
    )


def _short(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"
