"""The settings: frozen dataclasses, checked when they are made, to and from JSON."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, Self

NETWORKS = (
    "fcn-32s",
    "fcn-16s",
    "fcn-8s",
    "unet",
    "unet-valid",
    "wide-unet",
    "unet++",
    "vgg19-unet",
)

Norm = Literal["none", "batch", "group"]
Up = Literal["transposed", "bilinear", "nearest"]


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {', '.join(choices)}, got {value!r}."
        )


def check_number(
    name: str, value: object, low: float, high: float, *, whole: bool = False
) -> None:
    """Raise ValueError unless `value` is a finite number from `low` to `high`."""
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        kind = "a whole number" if whole else "a number"
        raise ValueError(f"`{name}` must be {kind}, got {value!r}.")
    # Compared first: a huge whole number has no float that could be finite.
    if not (low <= value <= high and math.isfinite(value)):
        raise ValueError(f"`{name}` must lie between {low} and {high}, got {value!r}.")


class Settings:
    """What all settings share: to and from JSON, and nothing unknown."""

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON-able values."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from `to_dict`'s result; unknown names are a ValueError."""
        if not isinstance(values, dict):
            raise ValueError(
                f"{cls.__name__} must be a table of settings, got {values!r}."
            )
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(map(repr, set(values) - known))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no setting {', '.join(unknown)}. "
                f"Known: {', '.join(sorted(known))}."
            )
        needed = {f.name for f in fields(cls) if f.default is MISSING}  # type: ignore[arg-type]
        if needed - set(values):
            raise ValueError(
                f"{cls.__name__} needs the setting {', '.join(sorted(needed))}."
            )
        return cls(**values)

    def to_json(self) -> str:
        """Return the settings as canonical JSON."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def replaced(self, **changes: Any) -> Self:
        """Return a copy with `changes`, checked again."""
        return replace(self, **changes)  # type: ignore[type-var]


@dataclass(frozen=True)
class NetConfig(Settings):
    """A network, complete: the same settings always build the same modules.

    Attributes
    ----------
    name : str
        One of `NETWORKS`.
    in_channels, out_channels : int
        Channels of the image (1 to 16) and logits per pixel (1 to 255).
    width : int
        Channels of the first level; level i has ``width * 2**i`` (VGG: capped at 8x).
    levels : int
        Number of poolings, 1 to 6; fixed at 5 for FCN and 4 for the VGG19 U-Net.
    norm : {"none", "batch", "group"}
        Layer after each 3x3 convolution. "group" takes its statistics from the
        patch in training and once from the whole image in prediction.
    up : {"transposed", "bilinear", "nearest"}
        How a coarse map is brought to the next finer level.
    dropout : float
        Probability, at the places that the network's paper names.
    deep_supervision : bool
        UNet++ only: a head at every depth instead of the deepest alone.
    residual : bool
        The second convolution of a block is added to the first one's output.
    stem : {1, 2}
        2 folds 2x2 pixels into channels first and unfolds them in the heads, so that
        the network runs at half the resolution.
    refine : bool
        With ``stem=2``: the heads see the image at full resolution beside the map,
        which gives sharper borders than unfolding.
    published : bool
        FCN only: the paper's geometry (100 px of padding, crops) instead of "same".
    """

    name: str
    in_channels: int = 1
    out_channels: int = 2
    width: int = 16
    levels: int = 4
    norm: Norm = "group"
    up: Up = "transposed"
    dropout: float = 0.0
    deep_supervision: bool = False
    residual: bool = False
    stem: int = 1
    refine: bool = False
    published: bool = False

    def __post_init__(self) -> None:
        check_choice("name", self.name, NETWORKS)
        check_number("in_channels", self.in_channels, 1, 16, whole=True)
        check_number("out_channels", self.out_channels, 1, 255, whole=True)
        check_number("width", self.width, 1, 128, whole=True)
        check_number("levels", self.levels, 1, 6, whole=True)
        check_choice("norm", self.norm, ("none", "batch", "group"))
        check_choice("up", self.up, ("transposed", "bilinear", "nearest"))
        check_number("dropout", self.dropout, 0, 0.95)
        check_number("stem", self.stem, 1, 2, whole=True)
        for flag in ("deep_supervision", "residual", "refine", "published"):
            if not isinstance(getattr(self, flag), bool):
                raise ValueError(
                    f"`{flag}` must be True or False, got {getattr(self, flag)!r}."
                )
        self._check_fits()

    def _check_fits(self) -> None:
        """Refuse what the network `name` does not have, rather than ignore it."""
        same = ("unet", "wide-unet", "unet++")
        fcn = ("fcn-32s", "fcn-16s", "fcn-8s")
        for setting, used, networks in (
            ("deep_supervision=True", self.deep_supervision, ("unet++",)),
            ("residual=True", self.residual, same),
            ("stem=2", self.stem == 2, same),
            ("published=True", self.published, fcn),
        ):
            if used and self.name not in networks:
                raise ValueError(
                    f"`{setting}` needs the network {' or '.join(networks)}, got "
                    f"{self.name}."
                )
        if self.refine and self.stem != 2:
            raise ValueError("`refine=True` needs `stem=2`, got `stem=1`.")
        if self.name in fcn and self.up != "transposed":
            raise ValueError(f"FCN needs `up` transposed, got {self.up!r}.")
        if self.name == "unet-valid" and self.up == "bilinear":
            # It mixes in the edge of a map, so that a tile would differ from the whole.
            raise ValueError("`unet-valid` cannot have `up` bilinear; take nearest.")
        fixed = {"vgg19-unet": 4} | dict.fromkeys(fcn, 5)
        levels = fixed.get(self.name, self.levels)
        if self.levels != levels:
            raise ValueError(f"`{self.name}` has {levels} levels, got {self.levels}.")


def published_config(
    name: str, in_channels: int = 1, out_channels: int = 2
) -> NetConfig:
    """Return the exact network of the paper that introduced `name`.

    Parameters
    ----------
    name : str
        One of `NETWORKS`.
    in_channels, out_channels : int
        Channels of the image, and logits per pixel (1 to 255).

    Raises
    ------
    ValueError
        If `name` is not in `NETWORKS` or a number of channels is out of range.

    References
    ----------
    .. [1] Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR
           2015, :DOI:`10.1109/CVPR.2015.7298965`
    .. [2] Ronneberger et al., U-Net, MICCAI 2015, :DOI:`10.1007/978-3-319-24574-4_28`
    .. [3] Zhou et al., UNet++, DLMIA 2018, :DOI:`10.1007/978-3-030-00889-5_1`
    """
    check_choice("name", name, NETWORKS)
    common = NetConfig(
        name, in_channels, out_channels, levels=_levels(name), norm="none"
    )
    if name.startswith("fcn"):
        return common.replaced(width=64, dropout=0.5, published=True)
    if name in ("unet", "unet-valid"):
        return common.replaced(width=64, dropout=0.5)
    if name == "vgg19-unet":
        return common.replaced(width=64, dropout=0.25)
    width = {"wide-unet": 35, "unet++": 32}[name]
    return common.replaced(width=width, dropout=0.5, deep_supervision=name == "unet++")


def working_config(
    name: str,
    in_channels: int = 1,
    out_channels: int = 2,
    *,
    width: int | None = None,
    levels: int | None = None,
    norm: Norm | None = None,
) -> NetConfig:
    """Return the network for work: it learns on two CPU cores in seconds."""
    check_choice("name", name, NETWORKS)
    if levels is None:
        # The stem's half resolution stands for one of the paper's four poolings; the
        # depths of UNet++ are numbered as in the paper all the same.
        levels = 3 if name in ("unet", "wide-unet") else _levels(name)
    return NetConfig(
        name,
        in_channels,
        out_channels,
        width={"wide-unet": 18}.get(name, 16) if width is None else width,
        levels=levels,
        norm="group" if norm is None else norm,
        deep_supervision=name == "unet++",
        residual=name in ("unet", "wide-unet", "unet++"),
        stem=2 if name in ("unet", "wide-unet", "unet++") else 1,
    )


def _levels(name: str) -> int:
    return 5 if name.startswith("fcn") else 4


_SWITCHES = (
    "pretrained", "pooled_norms", "nesterov", "flip", "right_angles", "mixed_precision",
    "deterministic",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig(Settings):
    """How a network learns from strokes; the defaults suit two CPU cores and a GPU.

    Attributes
    ----------
    pretrained : bool
        Start a new network from the weights that ship, where its kind and size have
        some (UNet++ of the default width and two classes has); False: from random ones.
    patch, batch : int
        Side of a training patch in pixels, and patches per step.
    optimizer : {"adamw", "adam", "sgd"}
        Rule of the weight update.
    learning_rate, weight_decay, momentum : float
        Its rate, decay and (SGD alone) momentum.
    nesterov : bool
        Whether the momentum is Nesterov's.
    schedule : {"constant", "cosine", "step"}
        How the rate falls: along half a cosine to a hundredth within `schedule_steps`,
        or to a tenth after every `schedule_steps`.
    schedule_steps : int
        See `schedule`; 0 where it is constant.
    clip : float
        Largest norm of the gradient; 0: any.
    frozen_steps : int
        FCN and VGG19 U-Net: so many first steps leave the trunk as it is. Then its
        last `thawed` convolutions learn, too, all at `thaw_rate` times the rate, and
        the optimizer starts afresh.
    thawed : int
        See `frozen_steps`.
    thaw_rate : float
        See `frozen_steps`.
    loss : {"cross_entropy", "dice", "jaccard", "bce_dice", "focal"}
        What is minimised, on annotated pixels only.
    border, border_sigma : float
        Height and width in pixels of U-Net's extra weight (cross-entropy alone) on the
        background between two objects; 0: none. The objects are the given instances,
        else the connected regions of a class.
    edges : float
        Weight of the energy that draws borders between strokes to edges of the image.
    forest : float
        Weight of what a random forest on the same strokes is sure of elsewhere; 0: no
        forest, as for a model that was trained without and goes on.
    balance : float
        0 to 1: exponent of the inverse class frequency that weighs the cross-entropy.
    prior : float
        0 to 1: how far the shares of the painted pixels are believed as shares of
        the classes; added to the logits when training ends.
    averaging : float
        Exponential moving average of the weights over the last 1/(1 + averaging) of
        the steps; 0 shows the raw weights.
    pooled_norms : bool
        With a single image, let group norms take their statistics from all patches of
        a step together, as prediction takes them from the whole image: a patch alone
        does not show how bright it is. With several images, or several processes,
        each patch has its own.
    held_out : float
        Share of the positions whose strokes only score and never train, ever: it is
        decided at a model's first training and stays with the model.
    score_every : int or None
        Steps from one held-out score (or validation) to the next; None: 50.
    patience : int or None
        End after so many held-out scores in a row that are no
        better than the best, and return the model that scored best; NaN is no better,
        and while there is no score nothing is counted. None: train to the end and
        return the last model. A live training goes on until it is stopped.
    flip, right_angles : bool
        Mirror, and turn by multiples of 90 degrees.
    rotation, scale : float
        Largest turn in degrees and largest relative change of size.
    elastic_sigma, elastic_spacing : float
        Standard deviation of the elastic deformation's control points and the
        distance between them, in pixels.
    warp_after : int
        Steps before rotation, scale and elastic deformation begin.
    gain, offset : float
        Grey values: factor from 1 - gain to 1 + gain, and the standard deviation of
        what is added (in units of the normalised image).
    channel_share : float
        Share of gain and offset that each channel draws for itself (colour).
    gamma, noise : float
        Largest log exponent of the grey-value curve; largest standard deviation of
        added noise.
    mixed_precision : bool
        Half precision where the device computes in it: GPUs and some CPUs.
    deterministic : bool
        Only operations that give the same bits every time on the same device; slower on
        a GPU, and an error where there is none. The CPU's are so anyway.
    """

    pretrained: bool = True
    patch: int = 128
    batch: int = 4
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = True
    schedule: Literal["constant", "cosine", "step"] = "constant"
    schedule_steps: int = 0
    clip: float = 0.0
    frozen_steps: int = 0
    thawed: int = 1
    thaw_rate: float = 0.1
    loss: str = "cross_entropy"
    border: float = 0.0
    border_sigma: float = 5.0
    edges: float = 1.0
    forest: float = 1.0
    balance: float = 1.0
    prior: float = 0.5
    averaging: float = 6.0
    pooled_norms: bool = True
    held_out: float = 0.15
    score_every: int | None = None
    patience: int | None = None
    flip: bool = True
    right_angles: bool = True
    rotation: float = 23.0
    scale: float = 0.25
    elastic_sigma: float = 3.0
    elastic_spacing: float = 24.0
    warp_after: int = 100
    gain: float = 0.3
    offset: float = 0.1
    channel_share: float = 0.0
    gamma: float = 0.0
    noise: float = 0.0
    mixed_precision: bool = True
    deterministic: bool = False

    def __post_init__(self) -> None:
        whole: dict[str, tuple[float, float]] = {
            "patch": (16, 4096),
            "batch": (1, 4096),
            "warp_after": (0, 10**9),
            "schedule_steps": (0, 10**9),
            "frozen_steps": (0, 10**9),
            "thawed": (0, 16),
        }
        for name, (low, high) in whole.items():
            check_number(name, getattr(self, name), low, high, whole=True)
        for name in ("patience", "score_every"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 1, 10**9, whole=True)
        check_choice("optimizer", self.optimizer, ("adamw", "adam", "sgd"))
        check_choice("schedule", self.schedule, ("constant", "cosine", "step"))
        check_choice(
            "loss", self.loss, ("cross_entropy", "dice", "jaccard", "bce_dice", "focal")
        )
        limits: dict[str, tuple[float, float]] = {
            "learning_rate": (1e-12, 10),
            "weight_decay": (0, 1),
            "momentum": (0, 0.9999),
            "clip": (0, 1e9),
            "thaw_rate": (0, 1),
            "border": (0, 1000),
            "border_sigma": (0.1, 1000),
            "edges": (0, 1000),
            "forest": (0, 1000),
            "balance": (0, 1),
            "prior": (0, 1),
            "averaging": (0, 1000),
            "held_out": (0, 0.5),
            "rotation": (0, 180),
            "scale": (0, 0.75),
            "elastic_sigma": (0, 100),
            "elastic_spacing": (4, 4096),
            "gain": (0, 0.95),
            "offset": (0, 10),
            "channel_share": (0, 1),
            "gamma": (0, 2),
            "noise": (0, 10),
        }
        for name, (low, high) in limits.items():
            check_number(name, getattr(self, name), low, high)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"`{name}` must be True or False, got {getattr(self, name)!r}."
                )
        self._check_fits()

    def _check_fits(self) -> None:
        """Refuse settings that need one another and do not have each other."""
        if (self.schedule == "constant") != (self.schedule_steps == 0):
            raise ValueError(
                f"`schedule` {self.schedule!r} must go with `schedule_steps` "
                f"{'0' if self.schedule == 'constant' else 'above 0'}, got "
                f"{self.schedule_steps}."
            )
        if self.border and self.loss != "cross_entropy":
            raise ValueError(
                "`border` needs the loss cross_entropy, which weighs each pixel, got "
                f"{self.loss!r}. Choose that loss, or border=0."
            )


@dataclass(frozen=True)
class PredictConfig(Settings):
    """How an image is cut up for prediction.

    Attributes
    ----------
    tile : int or None
        Side in pixels of the core that one step writes; None: the whole image up to
        768 x 768, tiles of 512 beyond.
    depth : int or None
        UNet++ head to use; None is the deepest.
    heads : {"last", "mean"}
        "mean" averages the probabilities of heads 1 to `depth` (the UNet++ paper's
        accurate mode).
    """

    tile: int | None = None
    depth: int | None = None
    heads: Literal["last", "mean"] = "last"

    def __post_init__(self) -> None:
        if self.tile is not None:
            check_number("tile", self.tile, 16, 16384, whole=True)
        if self.depth is not None:
            check_number("depth", self.depth, 1, 6, whole=True)
        check_choice("heads", self.heads, ("last", "mean"))
