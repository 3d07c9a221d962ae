"""The keys of the dock; what napari has taken stays napari's."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from napari_unetpp._widgets.train_dock import TrainDock

_log = logging.getLogger("napari_unetpp")

KEYS = {
    "Alt-T": "train, pause, go on",
    "A": "annotate the predicted region under the cursor",
    "Shift-A": "annotate the predicted class under the cursor, all of it in view",
    "Q": "show or hide the prediction",
    **{f"Alt-{n}": f"paint class {n}" for n in range(1, 10)},
}


def bind(dock: TrainDock) -> None:
    """Bind the keys to the viewer of a dock."""
    actions: dict[str, Callable[[], object]] = {
        "Alt-T": dock.toggle_training,
        "A": dock.accept,
        "Shift-A": lambda: dock.accept(whole_class=True),
        "Q": dock.toggle_prediction,
    }
    for n in range(1, 10):
        actions[f"Alt-{n}"] = _picker(dock, n)
    for key, action in actions.items():
        try:
            dock.viewer.bind_key(key, _without_viewer(action))
        except ValueError:
            _log.warning("The key %s is taken; it does nothing for this plugin.", key)
        else:
            dock.bound.append(key)


def unbind(dock: TrainDock) -> None:
    """Give the keys back."""
    for key in dock.bound:
        dock.viewer.bind_key(key, None)
    dock.bound = []


def _picker(dock: TrainDock, value: int) -> Callable[[], None]:
    return lambda: dock.pick(value)


def _without_viewer(action: Callable[[], object]) -> Callable[[Any], None]:
    def run(_viewer: Any) -> None:
        action()

    return run
