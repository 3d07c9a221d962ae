"""The numbers that training minimises, on annotated pixels only, and U-Net's weights.

All losses take logits (N, K, H, W) and a target (N, H, W) of class indices with
`IGNORE` where nothing is annotated, compute in float32 also under autocast (float64
stays float64), and return a 0-d tensor: 0 with gradient 0 when nothing is annotated.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

IGNORE = -1

_FEW = 0.25  # share of annotated pixels below which gathering them first pays
_NEGLIGIBLE = 1e-7  # of w0: below what a float32 weight of 1 can show


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    pixel_weights: Tensor | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    reduction: Literal["weighted", "annotated", "sum"] = "weighted",
) -> Tensor:
    """Return the softmax cross entropy, weighted per pixel as in U-Net's equation 1.

    Parameters
    ----------
    logits : Tensor
        (N, K, H, W), K >= 2.
    target : Tensor
        (N, H, W) int64, 0..K-1 or `IGNORE`.
    pixel_weights : Tensor, optional
        (N, H, W), for example from `border_weights`; not negative.
    class_weights : Tensor or sequence of float, optional
        One weight per class; multiplies the pixel weights.
    reduction : {"weighted", "annotated", "sum"}
        Divide the sum by the sum of the weights, by the number of annotated pixels,
        or not at all (the paper's form).

    Returns
    -------
    Tensor
        0-d.

    Raises
    ------
    ValueError
        If the shapes do not agree or `reduction` is unknown.

    References
    ----------
    .. [1] O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015,
       :doi:`10.1007/978-3-319-24574-4_28`. The paper omits the minus sign.
    """
    if reduction not in ("weighted", "annotated", "sum"):
        raise ValueError(
            f"`reduction` must be weighted, annotated or sum, got {reduction!r}."
        )
    _check(logits, target, least=2)
    weights = pixel_weights
    if weights is not None and weights.shape != target.shape:
        raise ValueError(
            f"`pixel_weights` must have the target's shape {tuple(target.shape)}, "
            f"got {tuple(weights.shape)}."
        )
    scores, classes, weights = _compact(logits, target, weights)
    losses = functional.cross_entropy(
        scores, classes, ignore_index=IGNORE, reduction="none"
    )
    annotated = (classes != IGNORE).to(losses)
    scale = annotated if weights is None else annotated * weights.to(losses)
    if class_weights is not None:
        scale = scale * _per_class(class_weights, scores)[classes.clamp_min(0)]
    # A weight of 0 must win over a pixel's infinite loss, so no plain product.
    total = torch.where(scale > 0, losses * scale, losses.new_zeros(())).sum()
    if reduction == "sum":
        return total
    return _ratio(total, (scale if reduction == "weighted" else annotated).sum())


def dice(
    logits: Tensor,
    target: Tensor,
    *,
    smooth: float = 1e-5,
    squared: bool = False,
    include_background: bool = True,
    per_image: bool = False,
) -> Tensor:
    """Return 1 - soft Dice, the mean over the classes that are annotated.

    ``D = (2 I + smooth) / (S + smooth)`` with I = sum p g and S = sum p + sum g.
    With one channel the logit means "is the object" (target 1) and the class counts
    even where no object is annotated.

    Parameters
    ----------
    logits, target : Tensor
        (N, K, H, W) and (N, H, W); K = 1 is the sigmoid form, K >= 2 softmax.
    smooth : float
        Added above and below; with 0 a class without pixels is still no NaN.
    squared : bool
        V-Net's denominator: sum p^2 + sum g^2.
    include_background : bool
        Whether class 0 is one of the classes of the mean (K >= 2).
    per_image : bool
        The mean over images instead of one Dice of the whole batch.

    Returns
    -------
    Tensor
        0-d.

    References
    ----------
    .. [1] F. Milletari, N. Navab, S.-A. Ahmadi, "V-Net", 3DV 2016,
       :doi:`10.1109/3DV.2016.79`.
    """
    probabilities, truth, used = _soft(logits, target, compact=not per_image)
    inter, size, present = _set_sums(
        probabilities, truth, used, squared=squared, per_image=per_image
    )
    return _mean_present(
        1 - _ratio(2 * inter + smooth, size + smooth),
        present,
        include_background=include_background,
    )


def jaccard(
    logits: Tensor,
    target: Tensor,
    *,
    smooth: float = 1e-5,
    squared: bool = False,
    include_background: bool = True,
    per_image: bool = False,
) -> Tensor:
    """Return 1 - soft Jaccard, ``J = (I + smooth) / (S - I + smooth)``.

    The arguments mean the same as in `dice`; with ``smooth=0``, J = D / (2 - D).

    Parameters
    ----------
    logits, target : Tensor
        (N, K, H, W) and (N, H, W).
    smooth, squared, include_background, per_image
        As in `dice`.

    Returns
    -------
    Tensor
        0-d.
    """
    probabilities, truth, used = _soft(logits, target, compact=not per_image)
    inter, size, present = _set_sums(
        probabilities, truth, used, squared=squared, per_image=per_image
    )
    return _mean_present(
        1 - _ratio(inter + smooth, size - inter + smooth),
        present,
        include_background=include_background,
    )


def generalised_dice(logits: Tensor, target: Tensor) -> Tensor:
    """Return the generalised Dice loss, classes weighted by 1 / (annotated pixels)^2.

    Parameters
    ----------
    logits, target : Tensor
        (N, K, H, W), K >= 2, and (N, H, W).

    Returns
    -------
    Tensor
        0-d.

    References
    ----------
    .. [1] C. H. Sudre et al., "Generalised Dice overlap", DLMIA 2017,
       :doi:`10.1007/978-3-319-67558-9_28`.
    """
    _check(logits, target, least=2)
    probabilities, truth, used = _soft(logits, target, compact=True)
    inter, size, present = _set_sums(probabilities, truth, used)
    weights = torch.where(present > 0, present.clamp_min(1) ** -2, 0)
    total = (weights * size).sum()
    return torch.where(
        total > 0, 1 - 2 * _ratio((weights * inter).sum(), total), 0 * total
    )


def bce_dice(
    logits: Tensor,
    target: Tensor,
    *,
    bce_weight: float = 0.5,
    smooth: float = 1.0,
    per_image: bool = False,
) -> Tensor:
    """Return UNet++'s loss, 0.5 BCE + (1 - Dice), one sigmoid per channel.

    With K >= 2 each channel is its class against the rest; the BCE is the mean over
    pixels and channels, the Dice the mean over the annotated classes. Where we depart
    from the authors' code: 1 is added, so that a perfect output has loss 0. (The
    paper prints a BCE without the background's half; their code has both halves.)

    Parameters
    ----------
    logits, target : Tensor
        (N, K, H, W) and (N, H, W); K = 1: the object's logit, target 1 is the object.
    bce_weight : float
        Weight of the BCE.
    smooth : float
        As in `dice`; the authors' 1.
    per_image : bool
        As in `dice`.

    Returns
    -------
    Tensor
        0-d.

    References
    ----------
    .. [1] Z. Zhou et al., "UNet++", DLMIA 2018, :doi:`10.1007/978-3-030-00889-5_1`.
    """
    _check(logits, target)
    scores, classes, _ = _compact(logits, target, dense=per_image)
    truth, used = _one_hot(scores, classes)
    entropy = functional.binary_cross_entropy_with_logits(
        scores, truth, reduction="none"
    )
    mean_entropy = _ratio((entropy * used).sum(), used.sum() * scores.shape[1])
    inter, size, present = _set_sums(
        torch.sigmoid(scores) * used, truth * used, used, per_image=per_image
    )
    overlap = 1 - _ratio(2 * inter + smooth, size + smooth)
    return bce_weight * mean_entropy + _mean_present(overlap, present)


def focal(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Return the focal loss ``-alpha_t (1 - p_t)^gamma log p_t``, mean over pixels.

    Parameters
    ----------
    logits, target : Tensor
        (N, K, H, W) and (N, H, W); K = 1 is the paper's sigmoid form with target 1
        as the object, K >= 2 softmax.
    gamma : float
        0 gives the cross entropy.
    alpha : float, Tensor or sequence of float, optional
        K = 1: the object's weight, the rest has 1 - alpha. K >= 2: one per class.

    Returns
    -------
    Tensor
        0-d.

    Raises
    ------
    ValueError
        If `gamma` is negative or `alpha` does not fit the classes.

    References
    ----------
    .. [1] T.-Y. Lin et al., "Focal loss for dense object detection", ICCV 2017,
       :doi:`10.1109/ICCV.2017.324`.
    """
    if not gamma >= 0:
        raise ValueError(f"`gamma` must be 0 or more, got {gamma!r}.")
    _check(logits, target)
    scores, classes, _ = _compact(logits, target)
    used = (classes != IGNORE).to(scores)
    if scores.shape[1] == 1:
        sign = torch.where(classes == 1, 1.0, -1.0).to(scores)
        margin = sign * scores[:, 0]
        log_p = functional.logsigmoid(margin)
        hardness = torch.exp(gamma * functional.logsigmoid(-margin))
    else:
        log_p = -functional.cross_entropy(
            scores, classes, ignore_index=IGNORE, reduction="none"
        )
        # The floor keeps the gradient of x**gamma finite at p_t = 1 for gamma < 1.
        tiny = torch.finfo(scores.dtype).tiny
        hardness = (-torch.expm1(log_p)).clamp_min(tiny) ** gamma
    losses = -hardness * log_p * used
    if alpha is not None:
        losses = losses * _balance(alpha, scores)[classes.clamp_min(0)]
    return _ratio(losses.sum(), used.sum())


def deep_supervision(
    heads: Sequence[Tensor],
    target: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Return the mean of `loss` over the heads, so that its scale is one head's.

    Parameters
    ----------
    heads : sequence of Tensor
        Logits (N, K, H, W), one per head.
    target : Tensor
        (N, H, W).
    loss : callable
        Takes (logits, target), for example a value of `LOSSES`.

    Returns
    -------
    Tensor
        0-d.

    Raises
    ------
    ValueError
        If there is no head.
    """
    if not heads:
        raise ValueError("`heads` must hold the logits of at least one head, got none.")
    return torch.stack([loss(logits, target) for logits in heads]).mean()


def soft_cross_entropy(logits: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """Cross entropy with class probabilities that are known at some pixels.

    Parameters
    ----------
    logits : Tensor
        (N, K, H, W).
    rows : Tensor
        (N, H, W) integers: each pixel's row of `table`, -1 where it has none.
    table : Tensor
        (R, K) float, each row summing to 1.

    Returns
    -------
    Tensor
        0-d: mean over the pixels that have a row of ``-sum_k table_k log p_k``; 0
        where there is none.

    References
    ----------
    .. [1] Hinton et al., Distilling the Knowledge in a Neural Network, 2015,
           :arXiv:`1503.02531`
    """
    _check(logits, rows, least=2)
    scores, rows, _ = _compact(logits, rows)
    known = rows != IGNORE
    wanted = (table[rows.clamp_min(0)] * known[..., None]).movedim(-1, 1)  # (B, K, P)
    return _ratio(-(wanted * scores.log_softmax(1)).sum(), known.sum())


def edge_aware(
    logits: Tensor,
    image: Tensor,
    *,
    sigma: float = 0.1,
    distances: Sequence[int] = (1, 3, 8),
) -> Tensor:
    """Energy of pairs of pixels that look alike but are labelled differently.

    It needs no annotation: between strokes, where nothing says how far a class
    reaches, it draws the border to where the image has an edge.

    Parameters
    ----------
    logits : Tensor
        (N, K, H, W).
    image : Tensor
        (N, C, H, W), normalised; H and W at least 2.
    sigma : float, optional
        Difference of grey values, in units of `image`, at which a pair counts
        ``exp(-1/2)`` of one that looks the same.
    distances : sequence of int, optional
        Of the pairs along rows, columns and diagonals, in pairs of pixels: both
        arguments are averaged over 2 x 2 pixels first. Distances that do not fit
        are left out.

    Returns
    -------
    Tensor
        0-d float32: mean over the pairs of their weight times ``1 - p_a . p_b``.

    Notes
    -----
    The gated CRF loss of [2]_ after [1]_, on fixed directions instead of all pixels of
    a window, and without its gates: annotated pixels take part, too.

    References
    ----------
    .. [1] Tang et al., On Regularized Losses for Weakly-supervised CNN Segmentation,
           ECCV 2018, :DOI:`10.1007/978-3-030-01270-0_31`
    .. [2] Obukhov et al., Gated CRF Loss for Weakly Supervised Semantic Image
           Segmentation, 2019, :arXiv:`1906.04651`
    """
    p = functional.avg_pool2d(logits.float().softmax(1), 2)
    grey = functional.avg_pool2d(image.float(), 2)
    height, width = p.shape[-2:]
    terms = []
    for d in distances:
        for dy, dx in ((0, d), (d, 0), (d, d), (d, -d)):
            if dy >= height or abs(dx) >= width:
                continue
            down, up = slice(dy, height), slice(0, height - dy)
            left, right = slice(0, width - abs(dx)), slice(abs(dx), width)
            a, b = (right, left) if dx >= 0 else (left, right)
            apart = (grey[..., down, a] - grey[..., up, b]).square().sum(1)
            alike = torch.exp(apart * (-0.5 / sigma**2))
            agree = (p[..., down, a] * p[..., up, b]).sum(1)
            terms.append((alike * (1 - agree)).mean())
    return torch.stack(terms).mean() if terms else 0 * p.sum()


def border_weights(
    instances: NDArray[np.integer],
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_balance: bool = False,
    unlabelled: int | None = None,
) -> NDArray[np.float32]:
    """Return U-Net's weight map ``w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))``.

    d1 and d2 are the distances to the nearest pixel of the nearest and the second
    nearest instance. The second term acts on the background only, where borders have
    to be learnt, and is 0 where fewer than two instances exist. Compute it on the
    whole image, before patches are cut.

    Parameters
    ----------
    instances : ndarray
        (H, W) integers: 0 background, one positive value per instance.
    w0 : float
        Height of the border term.
    sigma : float
        Its width in pixels.
    class_balance : bool
        w_c = n / (2 n_c) over the labelled pixels of background and instances,
        instead of 1.
    unlabelled : int, optional
        Value of the pixels that are not labelled; their weight is 0.

    Returns
    -------
    ndarray
        (H, W) float32.

    Raises
    ------
    ValueError
        If `instances` is not a 2-d integer array of values >= 0, or a number is out
        of range.

    References
    ----------
    .. [1] O. Ronneberger, P. Fischer, T. Brox, "U-Net", MICCAI 2015,
       :doi:`10.1007/978-3-319-24574-4_28`.
    """
    instances = np.asarray(instances)
    _check_instances(instances, w0, sigma, unlabelled)
    labelled = np.ones(instances.shape, bool)
    if unlabelled is not None:
        labelled = instances != unlabelled
    cells = np.where(labelled, instances, 0)
    background = labelled & (cells == 0)
    # Further out than this the term would not change a weight of 1.
    reach = sigma * math.sqrt(-2 * math.log(_NEGLIGIBLE / max(w0, 1.0)))
    nearest, second = _two_distances(cells, math.ceil(reach))
    weights = labelled.astype(np.float64)
    if class_balance:
        for part in (background, labelled & ~background):
            weights[part] = labelled.sum() / (2 * max(part.sum(), 1))
    border = w0 * np.exp(-((nearest + second) ** 2) / (2 * sigma**2))
    weights[background] += border[background]
    return weights.astype(np.float32)


def regions(target: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the connected regions of each class but the background, numbered from 1.

    Parameters
    ----------
    target : ndarray of shape (H, W) and dtype uint8
        0 = not annotated, 1 = background, 2, 3, ... = classes.

    Returns
    -------
    ndarray of shape (H, W) and dtype int64
        Pixels that share a side belong together.
    """
    from skimage.measure import label

    objects = np.where(target > 1, target, 0)
    return np.asarray(label(objects, connectivity=1), np.int64)  # type: ignore[no-untyped-call]


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "dice": dice,
    "jaccard": jaccard,
    "bce_dice": bce_dice,
    "focal": focal,
}


def _check(logits: Tensor, target: Tensor, *, least: int = 1) -> None:
    n, k, *size = logits.shape
    if logits.ndim != 4 or target.shape != (n, *size):
        raise ValueError(
            "`target` must be (N, H, W) for logits (N, K, H, W), got "
            f"{tuple(target.shape)} for {tuple(logits.shape)}."
        )
    if k < least:
        raise ValueError(f"This loss needs at least {least} channels, got {k}.")


def _compact(
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None = None,
    *,
    dense: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Flatten to (B, K, P), (B, P): just the annotated pixels where they are few."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    logits, target = logits.flatten(2), target.flatten(1)
    if weights is not None:
        weights = weights.flatten(1)
    # Elsewhere than on the CPU, counting would wait for the device.
    if dense or logits.device.type != "cpu":
        return logits, target, weights
    annotated = target != IGNORE
    if int(annotated.sum()) >= _FEW * target.numel():
        return logits, target, weights
    image, pixel = annotated.nonzero(as_tuple=True)
    k, area = logits.shape[1:]
    channels = torch.arange(k)[:, None] * area
    rows = logits.flatten().take(image * (k * area) + pixel + channels)[None]
    return (
        rows,
        target[image, pixel][None],
        None if weights is None else weights[image, pixel][None],
    )


def _one_hot(scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, K, P) of 0 and 1, class 1 alone for K = 1, and the mask (B, 1, P)."""
    k = scores.shape[1]
    values = torch.arange(k, device=scores.device) if k > 1 else classes.new_ones(1)
    truth = (classes[:, None] == values[:, None]).to(scores)
    return truth, (classes != IGNORE)[:, None].to(scores)


def _soft(
    logits: Tensor, target: Tensor, *, compact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities and truth, 0 where nothing is annotated, and the mask."""
    _check(logits, target)
    scores, classes, _ = _compact(logits, target, dense=not compact)
    truth, used = _one_hot(scores, classes)
    soft = torch.sigmoid(scores) if scores.shape[1] == 1 else scores.softmax(1)
    return soft * used, truth, used


def _set_sums(
    probabilities: Tensor,
    truth: Tensor,
    used: Tensor,
    *,
    squared: bool = False,
    per_image: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return I, S and the pixels of each class, (B, K) with B = 1 for the batch.

    For K = 1 the last is the annotated pixels: an image without object counts too.
    """
    inter = (probabilities * truth).sum(2)
    soft = (probabilities * probabilities if squared else probabilities).sum(2)
    hard = truth.sum(2)
    present = hard if truth.shape[1] > 1 else used.sum(2)
    if per_image:
        return inter, soft + hard, present
    return inter.sum(0)[None], (soft + hard).sum(0)[None], present.sum(0)[None]


def _mean_present(
    losses: Tensor, present: Tensor, *, include_background: bool = True
) -> Tensor:
    """Mean over the present classes of each image, then over images that have one."""
    counted = (present > 0).to(losses)
    if not include_background and losses.shape[1] > 1:
        losses, counted = losses[:, 1:], counted[:, 1:]
    each = _ratio((losses * counted).sum(1), counted.sum(1))
    return _ratio(each.sum(), (counted.sum(1) > 0).to(losses).sum())


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Divide; 0 / 0 is 0 with gradient 0."""
    # Dividing by a tiny number instead would make infinite gradients, and NaN of them.
    return above / torch.where(below > 0, below, 1)


def _per_class(weights: Tensor | Sequence[float], like: Tensor) -> Tensor:
    values = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
    if values.shape != (like.shape[1],):
        raise ValueError(
            f"One weight per class is needed, {like.shape[1]}, got {values.tolist()}."
        )
    return values


def _balance(alpha: float | Tensor | Sequence[float], scores: Tensor) -> Tensor:
    if scores.shape[1] > 1:
        if isinstance(alpha, (int, float)):
            raise ValueError(
                f"`alpha` must hold one weight per class, {scores.shape[1]}, "
                f"got {alpha!r}."
            )
        return _per_class(alpha, scores)
    if not isinstance(alpha, (int, float)):
        raise ValueError(f"`alpha` must be one number for one channel, got {alpha!r}.")
    return scores.new_tensor([1 - alpha, alpha])


def _check_instances(
    instances: NDArray[np.integer], w0: float, sigma: float, unlabelled: int | None
) -> None:
    if instances.ndim != 2 or instances.dtype.kind not in "iu":
        raise ValueError(
            "`instances` must be a 2-d integer array, one value per instance, got "
            f"{instances.dtype} of shape {instances.shape}."
        )
    if not (0 <= w0 < math.inf and 0 < sigma < math.inf):
        raise ValueError(
            f"`w0` must be 0 or more and `sigma` above 0, got {w0!r} and {sigma!r}."
        )
    if unlabelled == 0:
        raise ValueError("`unlabelled` must not be 0, which is the background.")
    known = instances if unlabelled is None else instances[instances != unlabelled]
    if known.size and known.min() < 0:
        raise ValueError(
            f"Instances must be numbered from 1, got {known.min()}. "
            "Name a value for pixels that are not labelled with `unlabelled`."
        )


def _two_distances(
    cells: NDArray[np.integer], reach: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the distances to the two nearest instances, inf beyond `reach`."""
    from scipy import ndimage

    nearest = np.full(cells.shape, np.inf)
    second = np.full(cells.shape, np.inf)
    values, numbers = np.unique(cells, return_inverse=True)
    numbers = numbers.reshape(cells.shape) + int(0 not in values)
    for number, box in enumerate(ndimage.find_objects(numbers), start=1):
        near = tuple(slice(max(s.start - reach, 0), s.stop + reach) for s in box)
        distance = ndimage.distance_transform_edt(numbers[near] != number)
        second[near] = np.minimum(second[near], np.maximum(nearest[near], distance))
        nearest[near] = np.minimum(nearest[near], distance)
    return nearest, second
