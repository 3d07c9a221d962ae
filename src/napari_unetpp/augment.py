"""One warp of image and annotation, in one resampling, and the grey values.

Windows of real pixels, larger than the patch, come in; patches go out. All random
numbers are drawn on the CPU from the caller's generator, so that every device sees the
same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Generator, Tensor

PAPER_POINTS = 3  # U-Net: random displacements on a coarse 3 by 3 grid


@dataclass(frozen=True)
class Warp:
    """How far a patch may be warped; every default is "not at all".

    Attributes
    ----------
    flip : bool
        Mirror each axis with probability 1/2.
    right_angles : bool
        Turn by 0, 90, 180 or 270 degrees with equal probability.
    rotation : float
        Turn by up to so many degrees either way, 0 to 180.
    scale : float
        Zoom between 1 - scale and 1 + scale, 0 to below 1.
    shift : int
        Move by up to so many whole pixels along each axis.
    elastic_sigma : float
        Standard deviation in pixels of a control point's displacement. Above about
        0.16 times the distance between control points the field folds.
    elastic_spacing : float or None
        About so many pixels between control points; None: 3 by 3 points per patch.
    """

    flip: bool = False
    right_angles: bool = False
    rotation: float = 0.0
    scale: float = 0.0
    shift: int = 0
    elastic_sigma: float = 0.0
    elastic_spacing: float | None = None

    def __post_init__(self) -> None:
        """Check every number."""
        limits = {"rotation": 180.0, "scale": 0.95, "shift": 1e4, "elastic_sigma": 1e3}
        for field in fields(self):
            value, limit = getattr(self, field.name), limits.get(field.name)
            if limit is not None and not 0 <= value <= limit:
                raise ValueError(
                    f"`{field.name}` must lie between 0 and {limit:g}, got {value!r}."
                )
        if self.shift != int(self.shift):
            raise ValueError(f"`shift` must be whole pixels, got {self.shift!r}.")
        if self.elastic_spacing is not None and not self.elastic_spacing > 0:
            raise ValueError(
                "`elastic_spacing` must be above 0 pixels or None, got "
                f"{self.elastic_spacing!r}."
            )

    def window(self, patch: int) -> int:
        """Return the side of the window that patches of side `patch` are warped from.

        It holds every pixel of the affine part and displacements of three standard
        deviations; what lies further out is mirrored, and not annotated.
        """
        angle = math.radians(min(self.rotation, 45.0))
        middle = (patch - 1) / 2
        reach = middle * (math.cos(angle) + math.sin(angle)) / (1 - self.scale)
        reach += self.shift + 3 * self.elastic_sigma
        side = patch + 2 * math.ceil(reach - middle - 1e-6)
        # Coordinates are exact in float32 where side - 1 is a power of two.
        exact = 2 ** math.ceil(math.log2(max(side - 1, 1))) + 1
        return exact if exact <= 1.1 * side else side


def cut_windows(
    images: Sequence[Tensor],
    targets: Sequence[Tensor],
    index: Sequence[int],
    centres: Tensor | Sequence[Sequence[int]],
    size: int,
) -> tuple[Tensor, Tensor]:
    """Cut square windows around centres; reflected pixels but no annotation outside.

    The centre lies at ``[size // 2, size // 2]`` of its window.

    Parameters
    ----------
    images : sequence of Tensor
        (C, H, W) each, of any size from one pixel on.
    targets : sequence of Tensor
        (H, W) integers each, 0 where nothing is annotated.
    index : sequence of int
        Which image each of the N windows is cut from.
    centres : array-like
        (N, 2) whole numbers, row and column in that image.
    size : int
        Side of the windows in pixels.

    Returns
    -------
    windows : Tensor
        (N, C, size, size), the images mirrored at their borders without repeating the
        edge pixel.
    annotations : Tensor
        (N, size, size), 0 outside the image.

    Raises
    ------
    ValueError
        If the numbers of indices and centres differ or an image and its target do.
    """
    places = [(int(y), int(x)) for y, x in centres]
    chosen = [int(i) for i in index]
    if len(places) != len(chosen) or not chosen:
        raise ValueError(
            "Each window needs one index and one centre, got "
            f"{len(chosen)} and {len(places)}."
        )
    first, first_target = images[chosen[0]], targets[chosen[0]]
    windows = first.new_empty((len(chosen), first.shape[0], size, size))
    annotations = first_target.new_zeros((len(chosen), size, size))
    for n, (i, centre) in enumerate(zip(chosen, places, strict=True)):
        image, target = images[i], targets[i]
        if image.shape[1:] != target.shape:
            raise ValueError(
                f"Image {i} has the shape {tuple(image.shape[1:])}, but its target "
                f"{tuple(target.shape)}."
            )
        top, left = (c - size // 2 for c in centre)
        height, width = target.shape
        inside = tuple(
            (max(start, 0), min(start + size, length))
            for start, length in ((top, height), (left, width))
        )
        (y0, y1), (x0, x1) = inside
        beyond = (x0 - left, left + size - x1, y0 - top, top + size - y1)
        if not any(beyond):
            windows[n] = image[:, y0:y1, x0:x1]
        elif max(beyond[:2]) < x1 - x0 and max(beyond[2:]) < y1 - y0:
            seen = image[None, :, y0:y1, x0:x1]
            windows[n] = functional.pad(seen, beyond, mode="reflect")[0]
        else:  # mirrored more than once
            rows = _reflected(top, size, height, image.device)
            columns = _reflected(left, size, width, image.device)
            windows[n] = image[:, rows[:, None], columns]
        if y0 < y1 and x0 < x1:
            annotations[n, y0 - top : y1 - top, x0 - left : x1 - left] = target[
                y0:y1, x0:x1
            ]
    return windows, annotations


def sampling_grid(
    n: int,
    size_out: int,
    size_window: int,
    generator: Generator,
    warp: Warp,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw where each pixel of n patches comes from, all transforms in one grid.

    Parameters
    ----------
    n : int
        Number of patches.
    size_out, size_window : int
        Sides of the patches and of the windows in pixels. Without any transform the
        patch is the window from ``(size_window - size_out) // 2`` on.
    generator : Generator
        A CPU generator; advanced by the same amount whatever the device.
    warp : Warp
        How far.
    device : device or str
        Where the grid is built.

    Returns
    -------
    Tensor
        (n, size_out, size_out, 2) float32, (x, y) from -1 at the centre of the
        window's first pixel to 1 at the centre of its last one.
    """
    matrix, move = _draw_affine(n, generator, warp)
    middle = (size_out - 1) / 2
    centre = (size_window - size_out) // 2 + middle
    unit = 2 / max(size_window - 1, 1)
    offsets = torch.arange(size_out, dtype=torch.float64)[:, None] - middle
    # Position = row part + column part + field, each (P, points) @ (n, points, 2 P),
    # so one matrix product builds the whole grid.
    right = offsets * matrix[:, None, :, 0] + (move + centre)[:, None]  # (n, P, 2)
    down = matrix[:, None, :, 1].expand(n, size_out, 2)
    left = [torch.ones_like(offsets), offsets]
    parts = [(right * unit - 1)[:, None], (down * unit)[:, None]]
    if warp.elastic_sigma:
        control = _draw_control(
            n, size_out, warp.elastic_sigma, warp.elastic_spacing, generator
        )
        left.append(_cubic_basis(control.shape[1], size_out))
        parts.append(_along_rows(control * unit, size_out))
    basis = torch.cat(left, 1).float().to(device)  # (P, points)
    varying = torch.cat(parts, 1).flatten(2).float().to(device)  # (n, points, 2 P)
    with torch.autocast(basis.device.type, enabled=False):
        grid = basis @ varying
    return grid.view(n, size_out, size_out, 2)


def elastic_field(
    n: int, size: int, sigma: float, spacing: float | None, generator: Generator
) -> Tensor:
    """Draw n smooth displacement fields: N(0, sigma) at coarse points, bicubic between.

    Parameters
    ----------
    n, size : int
        Number of fields and their side in pixels.
    sigma : float
        Standard deviation of each component at a control point, in pixels.
    spacing : float or None
        About so many pixels between control points, the outermost in the corners;
        None: 3 by 3 points as in the paper.
    generator : Generator
        A CPU generator.

    Returns
    -------
    Tensor
        (n, size, size, 2) float32, displacement (x, y) in pixels.

    References
    ----------
    .. [1] O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015,
       :doi:`10.1007/978-3-319-24574-4_28`.
    """
    control = _draw_control(n, size, sigma, spacing, generator)
    return interpolate_control(control.float(), size)


def interpolate_control(control: Tensor, size: int) -> Tensor:
    """Interpolate control grids bicubically; control points are hit exactly.

    Parameters
    ----------
    control : Tensor
        (N, points, points, D), the outermost points in the corners of the field.
    size : int
        Side of the field in pixels.

    Returns
    -------
    Tensor
        (N, size, size, D).
    """
    n, points, _, parts = control.shape
    basis = _cubic_basis(points, size).to(control)
    field = basis @ _along_rows(control, size).flatten(2)
    return field.view(n, size, size, parts)


def warp(windows: Tensor, annotations: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Resample windows once: bilinear for the image, nearest for the annotation.

    Parameters
    ----------
    windows : Tensor
        (N, C, W, W) float, mirrored where the grid leaves it.
    annotations : Tensor
        (N, W, W) integers, 0 where nothing is annotated.
    grid : Tensor
        (N, P, P, 2) from `sampling_grid`, on the same device.

    Returns
    -------
    patches : Tensor
        (N, C, P, P).
    annotation_patches : Tensor
        (N, P, P), 0 outside the window: nothing is known there.
    """
    patches = functional.grid_sample(
        windows, grid, "bilinear", padding_mode="reflection", align_corners=True
    )
    # Numbers of classes are exact in float32; nothing is known outside the window.
    nearest = functional.grid_sample(
        annotations[:, None].float(), grid, "nearest", "zeros", align_corners=True
    )
    return patches, nearest[:, 0].to(annotations.dtype)


def grey_values(
    patches: Tensor,
    generator: Generator,
    *,
    gain: float = 0.0,
    offset: float = 0.0,
    gamma: float | None = None,
    noise: float | None = None,
    channel_share: float = 0.0,
) -> Tensor:
    """Vary brightness and contrast, each patch on its own.

    Parameters
    ----------
    patches : Tensor
        (N, C, P, P), normalised to a mean near 0.
    generator : Generator
        A CPU generator.
    gain : float
        Each patch is multiplied by U(1 - gain, 1 + gain).
    offset : float
        Then N(0, offset) is added.
    gamma : float, optional
        Before that, each patch's own range is bent by the exponent
        ``exp(U(-gamma, gamma))``.
    noise : float, optional
        At the end, noise with a standard deviation from U(0, noise) is added.
    channel_share : float
        Share of gain and offset that each channel draws for itself, 0 to 1.

    Returns
    -------
    Tensor
        (N, C, P, P), a new tensor.
    """
    n, channels = patches.shape[:2]
    factor = 1 + gain * _per_patch(
        2 * torch.rand((n, channels + 1), generator=generator) - 1, channel_share
    )
    added = offset * _per_patch(
        torch.randn((n, channels + 1), generator=generator), channel_share
    )
    if gamma:
        patches = _bent(patches, generator, gamma)
    patches = torch.addcmul(added.to(patches), patches, factor.to(patches))
    if noise:
        spread = noise * torch.rand((n, 1, 1, 1), generator=generator)
        grain = torch.randn(patches.shape, generator=generator).mul_(spread)
        patches = patches.add_(grain.to(patches))
    return patches


def _draw_affine(n: int, generator: Generator, warp: Warp) -> tuple[Tensor, Tensor]:
    """Return matrices (n, 2, 2) from patch to window offsets (x, y), moves (n, 2)."""
    drawn = torch.rand((n, 7), generator=generator, dtype=torch.float64)
    quarter = (drawn[:, 2] * 4).long() if warp.right_angles else torch.zeros(n).long()
    angle = (2 * drawn[:, 3] - 1) * math.radians(warp.rotation)
    # A table, since cos(pi / 2) is not 0 in floating point.
    turn = torch.tensor([1.0, 0.0, -1.0, 0.0], dtype=torch.float64)
    cos_q, sin_q = turn[quarter], turn[quarter - 1]
    cos = cos_q * angle.cos() - sin_q * angle.sin()
    sin = sin_q * angle.cos() + cos_q * angle.sin()
    matrix = torch.stack((cos, -sin, sin, cos), 1).view(n, 2, 2)
    zoom = 1 + warp.scale * (2 * drawn[:, 4] - 1)
    matrix = matrix / zoom[:, None, None]
    if warp.flip:
        # Of the patch's axes, before the turn.
        matrix = matrix * torch.where(drawn[:, None, :2] < 0.5, -1.0, 1.0)
    move = torch.floor(drawn[:, 5:] * (2 * warp.shift + 1)) - warp.shift
    return matrix, move


def _draw_control(
    n: int, size: int, sigma: float, spacing: float | None, generator: Generator
) -> Tensor:
    """Return (n, points, points, 2) displacements in pixels, float64."""
    points = PAPER_POINTS
    if spacing is not None:
        points = max(2, round((size - 1) / spacing) + 1)
    shape = (n, points, points, 2)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * sigma


def _along_rows(control: Tensor, size: int) -> Tensor:
    """Interpolate each row of control points: (N, points, size, D)."""
    return _cubic_basis(control.shape[2], size).to(control) @ control


def _cubic_basis(points: int, size: int) -> Tensor:
    """Return (size, points): each control point's share in each pixel."""
    unit = torch.eye(points, dtype=torch.float64)[None, :, :, None]
    basis = functional.interpolate(unit, (size, 1), mode="bicubic", align_corners=True)
    return basis[0, :, :, 0].T


def _reflected(start: int, size: int, length: int, device: torch.device) -> Tensor:
    """Return the indices start..start+size-1 mirrored into 0..length-1."""
    period = max(2 * (length - 1), 1)
    steps = torch.arange(start, start + size, device=device).remainder_(period)
    return torch.minimum(steps, period - steps)


def _per_patch(drawn: Tensor, share: float) -> Tensor:
    """Mix column 0, common to a patch, with one column per channel: (N, C, 1, 1)."""
    return ((1 - share) * drawn[:, :1] + share * drawn[:, 1:])[:, :, None, None]


def _bent(patches: Tensor, generator: Generator, gamma: float) -> Tensor:
    """Bend each patch's range by a power, its darkest and brightest values kept."""
    drawn = 2 * torch.rand((len(patches), 1, 1, 1), generator=generator) - 1
    low = patches.amin((1, 2, 3), keepdim=True)
    span = (patches.amax((1, 2, 3), keepdim=True) - low).clamp_min(1e-6)
    return ((patches - low) / span) ** (gamma * drawn).exp().to(patches) * span + low
