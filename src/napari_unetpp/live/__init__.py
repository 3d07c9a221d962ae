"""Training and prediction in turn, for a viewer: newest strokes, what is seen first."""

from napari_unetpp.live.session import live_steps, warm_up

__all__ = ["live_steps", "warm_up"]
