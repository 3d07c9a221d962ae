"""Build hook: /napari.yaml, the one manifest, becomes part of the package."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ManifestHook(BuildHookInterface):  # type: ignore[type-arg]
    """Ship the manifest in a wheel; link to it beside an editable install's code.

    npe2 looks for the manifest in the package's own folder alone, which for an
    editable install is the one under src.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the manifest to the wheel, or put a link to it into src."""
        manifest = Path(self.root, "napari.yaml")
        if version != "editable":
            build_data["force_include"][str(manifest)] = "napari_unetpp/napari.yaml"
            return
        link = Path(self.root, "src", "napari_unetpp", "napari.yaml")
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(os.path.relpath(manifest, link.parent))
        except OSError:  # Windows outside its developer mode
            shutil.copyfile(manifest, link)
