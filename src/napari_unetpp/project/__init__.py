"""Projects: images by reference, annotations, settings and rounds in one folder."""

from napari_unetpp.project.format import (
    FILE,
    Project,
    ProjectImage,
    Round,
    load_project,
)
from napari_unetpp.project.save import KEPT, add_round, go_back, save_project

__all__ = [
    "FILE",
    "KEPT",
    "Project",
    "ProjectImage",
    "Round",
    "add_round",
    "go_back",
    "load_project",
    "save_project",
]
