"""The public names: everything a script needs, nothing else."""

from napari_unetpp.batch import BatchStep, Target, plan_files, predict_files
from napari_unetpp.bigimage import ZarrStep, predict_to_zarr, predict_to_zarr_steps
from napari_unetpp.config import (
    NETWORKS,
    NetConfig,
    PredictConfig,
    TrainConfig,
    published_config,
)
from napari_unetpp.errors import (
    ClusterError,
    DeviceError,
    DeviceMemoryError,
    ImageFileError,
    MissingPackageError,
    ModelFileError,
    SaveError,
    TrainingError,
    UnetppError,
)
from napari_unetpp.evaluate import Evaluation, evaluate
from napari_unetpp.experiment import Part, Plan, run_steps
from napari_unetpp.io import Axis, LazyImage, open_image
from napari_unetpp.isbi import pixel_error, rand_error, warping_error
from napari_unetpp.model import Model, TrainStep, create_model, load_model
from napari_unetpp.predict import Tile, predict, predict_proba, predict_tiles
from napari_unetpp.preprocess import Preprocessing
from napari_unetpp.presets import PRESETS, Preset, preset
from napari_unetpp.pretrained import load_trunk
from napari_unetpp.project import (
    Project,
    ProjectImage,
    Round,
    add_round,
    go_back,
    load_project,
    save_project,
)
from napari_unetpp.train import train, train_steps

__all__ = [
    "NETWORKS",
    "PRESETS",
    "Axis",
    "BatchStep",
    "ClusterError",
    "DeviceError",
    "DeviceMemoryError",
    "Evaluation",
    "ImageFileError",
    "LazyImage",
    "MissingPackageError",
    "Model",
    "ModelFileError",
    "NetConfig",
    "Part",
    "Plan",
    "PredictConfig",
    "Preprocessing",
    "Preset",
    "Project",
    "ProjectImage",
    "Round",
    "SaveError",
    "Target",
    "Tile",
    "TrainConfig",
    "TrainStep",
    "TrainingError",
    "UnetppError",
    "ZarrStep",
    "add_round",
    "create_model",
    "evaluate",
    "go_back",
    "load_model",
    "load_project",
    "load_trunk",
    "open_image",
    "pixel_error",
    "plan_files",
    "predict",
    "predict_files",
    "predict_proba",
    "predict_tiles",
    "predict_to_zarr",
    "predict_to_zarr_steps",
    "preset",
    "published_config",
    "rand_error",
    "run_steps",
    "save_project",
    "train",
    "train_steps",
    "warping_error",
]
