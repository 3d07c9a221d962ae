"""The README's pictures of the docks: a real napari, samples of scikit-image.

xvfb-run -a -s "-screen 0 1600x1000x24" python benchmarks/screenshots.py docs
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from docks import WINDOW, event_loop, open_dock
from PIL import Image


def save(viewer: Any, path: Path) -> None:
    """Write the whole window with a palette, which is a third of the size."""
    event_loop(0.5)
    pixels = np.asarray(viewer.screenshot(canvas_only=False, flash=False))[..., :3]
    Image.fromarray(pixels).quantize(256).save(path, optimize=True)


def annotate_and_train(folder: Path) -> Path:
    """Train a UNet++ on the stained section; return the model's file."""
    viewer, dock = open_dock("immunohistochemistry")
    viewer.reset_view()
    dock.train()
    event_loop(condition=lambda: dock.link.steps >= 300, limit=300)
    save(viewer, folder / "dock.png")
    dock.link._training = False
    dock.link.stop()
    event_loop(condition=lambda: dock.link.state == "idle")
    path = Path(tempfile.mkdtemp()) / "glands.safetensors"
    dock.link.model.save(path)
    viewer.close()
    event_loop(0.5)
    return path


def predict(folder: Path, model: Path) -> None:
    """Label a folder of four files, one of which is damaged."""
    import napari
    import tifffile

    from napari_unetpp import samples

    image = samples.load("immunohistochemistry").image
    images = model.parent / "sections"
    images.mkdir()
    for n, part in enumerate((image, image[::-1], image[:, ::-1])):
        tifffile.imwrite(images / f"section_{n + 1}.tif", np.ascontiguousarray(part))
    (images / "section_4.tif").write_bytes(b"II*\0" + bytes(30))
    viewer = napari.Viewer()
    viewer.window._qt_window.resize(*WINDOW)
    viewer.add_image(image, name="section")
    _, dock = viewer.window.add_plugin_dock_widget("napari-unetpp", "Predict")
    event_loop(0.5)
    viewer.reset_view()
    dock.form.model.set_path(model)
    event_loop(condition=lambda: dock._facts is not None)
    dock.form.start.click()
    event_loop(condition=lambda: dock._predicting)
    event_loop(condition=lambda: not dock._predicting)
    dock.form.on_folder.setChecked(True)
    dock.form.folder.set_path(images)
    dock.form.as_files.setChecked(True)
    event_loop(0.2)
    dock.form.start.click()
    event_loop(condition=lambda: dock._predicting)
    event_loop(condition=lambda: not dock._predicting)
    save(viewer, folder / "predict.png")
    viewer.close()


if __name__ == "__main__":
    out = Path(sys.argv[1])
    predict(out, annotate_and_train(out))
