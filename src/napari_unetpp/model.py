"""A model: network, preprocessing, classes and where they come from, in one thing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from napari_unetpp import io, modelfile
from napari_unetpp.config import (
    NETWORKS,
    NetConfig,
    Norm,
    check_choice,
    check_number,
    working_config,
)
from napari_unetpp.errors import ModelFileError
from napari_unetpp.networks import SegmentationNet, build_network, prune
from napari_unetpp.preprocess import Preprocessing

if TYPE_CHECKING:
    import os

_log = logging.getLogger("napari_unetpp")
_MAX_BYTES = 2**30
_TOLERANCE = 1e-3  # of the stored test output, absolute and relative, as bioimage.io's


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step, as `train_steps` yields it.

    Attributes
    ----------
    step : int
        1 for the first.
    loss : float
        Mean loss over the annotated pixels of the batch.
    seconds : float
        Since training began.
    score : float or None
        Mean IoU on the whole images as estimated from held-out strokes, when it was
        last measured; None before that, or while too few strokes are held out.
    note : str
        What the user should know of this step, in words: that memory ran out and less
        is taken at once from here on. Not kept in files.
    """

    step: int
    loss: float
    seconds: float
    score: float | None = None
    note: str = ""


@dataclass(eq=False)
class Model:
    """A network with all that is needed to use it on a new image.

    Attributes
    ----------
    network : torch.nn.Module
        In evaluation mode, with the weights to predict with.
    classes : tuple of str
        Names; the first is the background by convention.
    preprocessing : Preprocessing
        How grey values are scaled.
    unlabelled : int or None
        0: annotations and labels hold v = ``classes[v - 1]``, 0 is not annotated. None:
        dense masks, v = ``classes[v]``.
    prior : tuple of float
        What has been added to the network's logits for the shares of the classes.
    history : tuple of TrainStep
        How it was trained.
    provenance : dict
        JSON-able: versions, seed, data fingerprints, parent.
    """

    network: SegmentationNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    unlabelled: int | None = 0
    prior: tuple[float, ...] = ()
    history: tuple[TrainStep, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> NetConfig:
        """Settings of the network."""
        return self.network.config

    def copy(self) -> Model:
        """Return an independent copy."""
        return copy.deepcopy(self)

    def pruned(self, depth: int) -> Model:
        """Return the smaller UNet++ that ends at head `depth`.

        Parameters
        ----------
        depth : int
            1 to the number of levels.

        Returns
        -------
        model : Model
            Its own network, with heads 1 to `depth`; it predicts bit for bit what this
            model predicts with ``depth=depth``.

        Raises
        ------
        ValueError
            If the network has no head at `depth`.

        References
        ----------
        .. [1] Zhou et al., UNet++, DLMIA 2018, :DOI:`10.1007/978-3-030-00889-5_1`
        """
        depth = check_depth(self.network, depth)
        small = Model(
            prune(self.network, depth).eval(),
            self.classes,
            self.preprocessing,
            self.unlabelled,
            self.prior,
            self.history,
            {**self.provenance, "pruned_from_levels": self.config.levels},
        )
        return small

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        half: bool = False,
    ) -> None:
        """Write one self-describing safetensors file, atomically.

        Parameters
        ----------
        path : path
            Usually ending in ``.safetensors``.
        overwrite : bool, optional
            Whether a file of that name may be replaced.
        half : bool, optional
            Store the weights in half precision: half the size, and what is loaded
            predicts with the rounded weights.

        Raises
        ------
        SaveError
            If the file exists and `overwrite` is False, or cannot be written; whatever
            stood there is still there.
        """
        model = self.copy() if half else self
        if half:
            model.network.half().float()
        file = model.contents()
        tensors = {
            name: v.astype(np.float16) if half and v.dtype.kind == "f" else v
            for name, v in file.tensors.items()
        }
        modelfile.write(
            path,
            {**tensors, _TEST: _test_output(model.network)},
            config=file.config,
            provenance=file.provenance,
            overwrite=overwrite,
        )

    def contents(self) -> modelfile.ModelFile:
        """Return what a file holds of this model; the arrays are the network's own."""
        return modelfile.ModelFile(
            tensors={
                name: value.detach().cpu().contiguous().numpy()
                for name, value in self.network.state_dict().items()
            },
            config={
                "network": self.config.to_dict(),
                "classes": list(self.classes),
                "preprocessing": self.preprocessing.to_dict(),
                "unlabelled": self.unlabelled,
                "prior": list(self.prior),
            },
            provenance={**self.provenance, "history": _thin(self.history)},
            extra={},
            digest="",
        )


_TEST = "selftest.output"


def create_model(
    network: str | NetConfig = "unet++",
    *,
    classes: Sequence[str] = ("background", "foreground"),
    in_channels: int = 1,
    width: int | None = None,
    levels: int | None = None,
    norm: Norm | None = None,
    unlabelled: int | None = 0,
    seed: int = 0,
) -> Model:
    """Make an untrained model.

    Parameters
    ----------
    network : str or NetConfig, optional
        One of `NETWORKS`, or all settings (then `in_channels`, `width`, `levels` and
        `norm` must be left out).
    classes : sequence of str, optional
        2 to 255 different names, the background first.
    in_channels : int, optional
        Channels of the images, 1 to 16.
    width : int or None, optional
        Channels of the first level, 4 to 128; None: small enough for 2 CPU cores.
    levels : int or None, optional
        Poolings; None: the paper's.
    norm : {"none", "batch", "group"} or None, optional
        None: "group".
    unlabelled : {0, None}, optional
        Coding of annotations and labels, see `Model`.
    seed : int, optional
        Of the initial weights.

    Returns
    -------
    model : Model

    Raises
    ------
    ValueError
        If an argument is out of range.
    """
    names = check_classes(classes)
    if isinstance(network, NetConfig):
        for name, value in (
            ("in_channels", None if in_channels == 1 else in_channels),
            ("width", width),
            ("levels", levels),
            ("norm", norm),
        ):
            if value not in (None, getattr(network, name)):
                raise ValueError(
                    f"`{name}` is already {getattr(network, name)} in `network`, got "
                    f"{value!r}. Leave it out, or change the NetConfig."
                )
        config = network.replaced(out_channels=len(names))
    else:
        check_choice("network", network, NETWORKS)
        config = working_config(
            network, in_channels, len(names), width=width, levels=levels, norm=norm
        )
    check_number("width", config.width, 4, 128, whole=True)
    check_number("seed", seed, 0, 2**63 - 1, whole=True)
    check_unlabelled(unlabelled)
    _on_paper(config)
    net = build_network(config, seed=seed).eval()
    return Model(net, names, unlabelled=unlabelled, provenance={"seed": seed})


def load_model(path: str | os.PathLike[str]) -> Model:
    """Read a model file; nothing in it is ever run.

    Parameters
    ----------
    path : path
        A file that `Model.save` wrote, or a checkpoint: then the model as it was shown.

    Returns
    -------
    model : Model

    Raises
    ------
    ModelFileError
        If the file is damaged, lies about itself, or was not written by us.
    """
    return from_file(modelfile.read(path), io.shown(path))


def from_file(file: modelfile.ModelFile, name: str) -> Model:
    """Build the model that a verified file describes; ModelFileError if it cannot be.

    Parameters
    ----------
    file : ModelFile
        Its content; of a checkpoint too.
    name : str
        What messages call it.
    """
    file = file.without_state()
    try:
        model = _empty(file.config)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelFileError(
            f"`{name}` describes a model that cannot be built: {error} "
            "It was damaged or made by another program; ask for it again."
        ) from None
    tensors = dict(file.tensors)
    expected = tensors.pop(_TEST, None)
    _match(model.network, tensors, name)
    kinds = {key: value.dtype for key, value in model.network.state_dict().items()}
    weights = {
        key: torch.from_numpy(np.array(value)).to(kinds[key])  # float16 becomes float32
        for key, value in tensors.items()
    }
    model.network.load_state_dict(weights, strict=True, assign=True)
    model.network.eval()
    provenance = dict(file.provenance)
    history = provenance.pop("history", [])
    model.history = tuple(TrainStep(*row) for row in _rows(history, name))
    model.provenance = {**provenance, "digest": file.digest}
    if expected is not None:
        _self_test(model.network, expected, name)
    return model


def _empty(config: Mapping[str, Any]) -> Model:
    """Build the described model without memory for its weights."""
    known = {"network", "classes", "preprocessing", "unlabelled", "prior"}
    if set(config) != known:
        raise ValueError(f"its settings are {sorted(config)}, not {sorted(known)}.")
    names = check_classes(config["classes"])
    net = NetConfig.from_dict(config["network"])
    check_number("width", net.width, 4, 128, whole=True)
    if net.out_channels != len(names):
        raise ValueError(f"{net.out_channels} outputs for {len(names)} classes.")
    check_unlabelled(config["unlabelled"])
    prior = tuple(config["prior"])
    if len(prior) not in (0, len(names)):
        raise ValueError(f"{len(prior)} prior values for {len(names)} classes.")
    for value in prior:
        check_number("prior", value, -100, 100)
    network = _on_paper(net)
    preprocessing = Preprocessing.from_dict(config["preprocessing"])
    return Model(network, names, preprocessing, config["unlabelled"], prior)


def _on_paper(config: NetConfig) -> SegmentationNet:
    """Build a network without memory for weights; ValueError if they are too many."""
    with torch.device("meta"):
        network = build_network(config)
    size = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    if size > _MAX_BYTES:
        raise ValueError(
            f"The weights of this {config.name} would take {size / 2**30:.1f} GiB, "
            f"allowed is {_MAX_BYTES / 2**30:.1f}. Choose fewer `levels`, a smaller "
            "`width` or fewer classes."
        )
    return network


def _match(network: SegmentationNet, tensors: Mapping[str, Any], name: str) -> None:
    wanted = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in tensors.items()}
    if wanted != found:
        wrong = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise ModelFileError(
            f"`{name}` does not hold the weights of the network it names "
            f"({network.config.name}): {wrong[:64]} is missing, too many or of another "
            "shape. Ask for the file again."
        )
    for key, value in network.state_dict().items():
        if value.is_floating_point() != (np.asarray(tensors[key]).dtype.kind == "f"):
            raise ModelFileError(f"`{name}`: {key[:64]} has the wrong type of number.")


def _test_output(network: SegmentationNet) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the deepest head's logits, thinned, for an input made by a formula."""
    side = network.valid_size(1) if network.margin else 2 * network.multiple()
    y, x = np.mgrid[:side, :side].astype(np.float32)
    image = np.stack(
        [
            np.sin(0.3 * y + c) + np.cos(0.17 * x)
            for c in range(network.config.in_channels)
        ]
    ).astype(np.float32)
    parameter = next(network.parameters())
    if network.training:
        network = copy.deepcopy(network).eval()
    with torch.inference_mode():
        batch = torch.from_numpy(image)[None].to(parameter.device, parameter.dtype)
        logits = network(batch, last_only=True)[-1].flatten().float().cpu().numpy()
    thinned: np.ndarray[Any, np.dtype[np.float32]] = logits[:: -(-logits.size // 4096)]
    return thinned


def _self_test(network: SegmentationNet, expected: Any, name: str) -> None:
    got = _test_output(network)
    close = np.zeros(1, bool)
    if got.shape == expected.shape:
        close = np.abs(got - expected) <= _TOLERANCE * (1 + np.abs(expected))
    if close.mean() < 0.9999:
        _log.warning(
            "`%s` gives other values here than where it was saved: %.1f %% of its test "
            "output differs. Compare its predictions before you rely on them.",
            name,
            100 * (1 - close.mean()),
        )


def _thin(history: tuple[TrainStep, ...]) -> list[list[float | int | None]]:
    """Return at most about 500 steps as rows, the last one among them."""
    every = -(-len(history) // 500) or 1
    kept = history[::-1][::every][::-1]
    return [[s.step, round(s.loss, 6), round(s.seconds, 3), s.score] for s in kept]


def _rows(history: Any, name: str) -> list[list[Any]]:
    good = isinstance(history, list) and all(
        isinstance(row, list)
        and len(row) == 4
        and all(v is None or isinstance(v, (int, float)) for v in row)
        for row in history
    )
    if not good:
        raise ModelFileError(f"`{name}` holds a training history that cannot be read.")
    return history  # type: ignore[no-any-return]


def check_classes(classes: Any) -> tuple[str, ...]:
    """Return the names as a tuple, or raise ValueError."""
    if isinstance(classes, str) or not isinstance(classes, Sequence):
        raise ValueError(f"`classes` must be a sequence of names, got {classes!r}.")
    names = tuple(classes)
    if not 2 <= len(names) <= 255:
        raise ValueError(f"`classes` must be 2 to 255 names, got {len(names)}.")
    for name in names:
        modelfile.check_text("classes", name)
    if len(set(names)) < len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"`classes` must differ from each other, got twice: {twice}.")
    return names


def check_unlabelled(unlabelled: Any) -> None:
    """Raise ValueError unless the coding is 0 (sparse) or None (dense)."""
    if unlabelled is not None and (isinstance(unlabelled, bool) or unlabelled != 0):
        raise ValueError(
            "`unlabelled` must be 0 (0 = not annotated) or None (every pixel is "
            f"annotated, 0 = first class), got {unlabelled!r}."
        )


def check_depth(network: SegmentationNet, depth: int | None) -> int:
    """Return the depth of the head to use, or raise ValueError."""
    if depth is None:
        return network.depths[-1]
    if isinstance(depth, bool) or depth not in network.depths:
        raise ValueError(
            f"`depth` must be one of {', '.join(map(str, network.depths))} for this "
            f"{network.config.name}, got {depth!r}."
        )
    return int(depth)
