"""The public names: everything a script needs, nothing else."""

from napari_unetpp.batch import BatchStep, Target, plan_files, predict_files
from napari_unetpp.config import (
    NETWORKS,
    NetConfig,
    PredictConfig,
    TrainConfig,
    published_config,
)
from napari_unetpp.errors import (
    DeviceError,
    DeviceMemoryError,
    ImageFileError,
    ModelFileError,
    SaveError,
    TrainingError,
    UnetppError,
)
from napari_unetpp.evaluate import Evaluation, evaluate
from napari_unetpp.model import Model, TrainStep, create_model, load_model
from napari_unetpp.predict import Tile, predict, predict_proba, predict_tiles
from napari_unetpp.preprocess import Preprocessing
from napari_unetpp.train import train, train_steps

__all__ = [
    "NETWORKS",
    "BatchStep",
    "DeviceError",
    "DeviceMemoryError",
    "Evaluation",
    "ImageFileError",
    "Model",
    "ModelFileError",
    "NetConfig",
    "PredictConfig",
    "Preprocessing",
    "SaveError",
    "Target",
    "Tile",
    "TrainConfig",
    "TrainStep",
    "TrainingError",
    "UnetppError",
    "create_model",
    "evaluate",
    "load_model",
    "plan_files",
    "predict",
    "predict_files",
    "predict_proba",
    "predict_tiles",
    "published_config",
    "train",
    "train_steps",
]
