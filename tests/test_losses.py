from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unetpp.losses import (
    IGNORE,
    LOSSES,
    bce_dice,
    border_weights,
    cross_entropy,
    deep_supervision,
    dice,
    edge_aware,
    focal,
    generalised_dice,
    jaccard,
    soft_cross_entropy,
)

EXACT = {"rel": 0, "abs": 1e-9}
ALL = [*LOSSES.values(), generalised_dice]
ONE_CHANNEL = [dice, jaccard, bce_dice, focal]


@pytest.fixture
def three():
    """Logits of three classes, labels and weights of a 2 x 2 image."""
    logits = [[[2.0, 0], [-1, 0]], [[0, 1], [0, 0]], [[0, 0], [3, 0]]]
    labels = torch.tensor([[[0, 1], [2, 0]]])
    weights = torch.tensor([[[1, 2], [0.5, 4]]], dtype=torch.float64)
    return torch.tensor([logits], dtype=torch.float64), labels, weights


@pytest.fixture
def masked(three):
    logits, labels, weights = three
    labels = labels.clone()
    labels[0, 1, 1] = IGNORE
    return logits, labels, weights


@pytest.fixture
def one():
    """One channel, 2 x 2."""
    logits = torch.tensor([2.0, -1, 0, 3], dtype=torch.float64).view(1, 1, 2, 2)
    return logits, torch.tensor([[[1, 0], [1, 1]]])


@pytest.fixture
def two_images(one):
    logits, target = one
    empty = torch.tensor([-3.0, -2, -1, -4], dtype=torch.float64).view(1, 1, 2, 2)
    return torch.cat([logits, empty]), torch.cat([target, torch.zeros_like(target)])


def sparse_of(logits, target, pad=9):
    """The same annotated pixels in an image that is mostly not annotated."""
    n, k, h, w = logits.shape
    wide = torch.randn(n, k, h + pad, w + pad, dtype=logits.dtype)
    marks = torch.full((n, h + pad, w + pad), IGNORE)
    wide[:, :, 3 : 3 + h, 5 : 5 + w] = logits
    marks[:, 3 : 3 + h, 5 : 5 + w] = target
    return wide, marks


def test_the_mark_of_unannotated_pixels_and_the_names_are_fixed():
    assert IGNORE == -1
    assert LOSSES == {
        "cross_entropy": cross_entropy,
        "dice": dice,
        "jaccard": jaccard,
        "bce_dice": bce_dice,
        "focal": focal,
    }


# Cross entropy


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sum", 5.769825300637141),
        ("annotated", 1.4424563251592852),
        ("weighted", 0.7693100400849521),
    ],
)
def test_cross_entropy_with_pixel_weights(three, reduction, expected):
    logits, labels, weights = three
    loss = cross_entropy(logits, labels, pixel_weights=weights, reduction=reduction)
    assert loss.item() == pytest.approx(expected, **EXACT)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("sum", 1.3753761459647014),
        ("annotated", 0.4584587153215671),
        ("weighted", 0.3929646131327718),
    ],
)
def test_cross_entropy_leaves_out_what_is_not_annotated(masked, reduction, expected):
    logits, labels, weights = masked
    loss = cross_entropy(logits, labels, pixel_weights=weights, reduction=reduction)
    assert loss.item() == pytest.approx(expected, **EXACT)


def test_cross_entropy_without_weights_is_the_mean(three, masked):
    assert cross_entropy(*three[:2]).item() == pytest.approx(
        0.4888714181448687, **EXACT
    )
    assert cross_entropy(*masked[:2]).item() == pytest.approx(
        0.2856244613037883, **EXACT
    )


@pytest.mark.parametrize("weights", [(1, 2, 3), torch.tensor([1.0, 2, 3])])
def test_cross_entropy_with_class_weights(masked, weights):
    logits, labels, _ = masked
    loss = partial(cross_entropy, logits, labels, class_weights=weights)
    assert loss().item() == pytest.approx(0.256680984226379, **EXACT)
    assert loss(reduction="annotated").item() == pytest.approx(
        0.513361968452758, **EXACT
    )


def test_pixel_and_class_weights_multiply(masked):
    logits, labels, weights = masked
    both = cross_entropy(
        logits, labels, pixel_weights=weights, class_weights=(1, 2, 3), reduction="sum"
    )
    nll = [0.2395447662218847, 0.5514447139320511, 0.06588390375742911]
    expected = nll[0] + 2 * 2 * nll[1] + 0.5 * 3 * nll[2]
    assert both.item() == pytest.approx(expected, **EXACT)


def test_cross_entropy_of_a_wildly_wrong_logit_is_finite():
    logits = torch.tensor([1000.0, 0]).view(1, 2, 1, 1)
    assert cross_entropy(logits, torch.ones(1, 1, 1).long()).item() == 1000.0


def test_all_weights_zero_give_zero(three):
    logits, labels, weights = three
    for reduction in ("sum", "annotated", "weighted"):
        loss = cross_entropy(
            logits, labels, pixel_weights=0 * weights, reduction=reduction
        )
        assert loss.item() == 0


def test_a_pixel_of_weight_zero_cannot_make_the_loss_infinite():
    logits = torch.tensor([[0.0, math.inf], [0.0, 0.0]]).view(1, 2, 1, 2)
    weights = torch.tensor([1.0, 0.0]).view(1, 1, 2)
    target = torch.tensor([[[0, 1]]])
    loss = cross_entropy(logits, target, pixel_weights=weights)
    assert loss.item() == pytest.approx(math.log(2))


def test_cross_entropy_names_what_is_wrong(three):
    logits, labels, weights = three
    with pytest.raises(ValueError, match=r"reduction.*'mean'"):
        cross_entropy(logits, labels, reduction="mean")
    with pytest.raises(ValueError, match=r"at least 2 channels, got 1"):
        cross_entropy(logits[:, :1], labels)
    with pytest.raises(ValueError, match=r"pixel_weights.*\(1, 2, 2\).*\(1, 2, 1\)"):
        cross_entropy(logits, labels, pixel_weights=weights[:, :, :1])
    with pytest.raises(ValueError, match=r"One weight per class is needed, 3"):
        cross_entropy(logits, labels, class_weights=(1, 2))


# Overlap losses


@pytest.mark.parametrize(
    ("smooth", "expected"),
    [(0, 0.8330028545355872), (1e-5, 0.8330031526211431), (1, 0.8582965894615081)],
)
def test_dice_of_one_channel(one, smooth, expected):
    assert dice(*one, smooth=smooth).item() == pytest.approx(1 - expected, **EXACT)


@pytest.mark.parametrize(
    ("smooth", "expected"),
    [(0, 0.7138002503031738), (1e-5, 0.7138011258125125), (1, 0.780842573316587)],
)
def test_jaccard_of_one_channel(one, smooth, expected):
    assert jaccard(*one, smooth=smooth).item() == pytest.approx(1 - expected, **EXACT)


def test_defaults_smooth_a_little(one):
    assert dice(*one).item() == dice(*one, smooth=1e-5).item()
    assert jaccard(*one).item() == jaccard(*one, smooth=1e-5).item()


def test_squared_denominator_is_v_nets(one):
    loss = dice(*one, smooth=0, squared=True)
    assert loss.item() == pytest.approx(1 - 0.9323172555382099, **EXACT)
    p = torch.sigmoid(one[0]).flatten()
    g = one[1].flatten()
    inter, size = (p * g).sum(), (p * p).sum() + g.sum()
    expected = 1 - inter / (size - inter)
    assert jaccard(*one, smooth=0, squared=True).item() == pytest.approx(
        expected.item(), **EXACT
    )


def test_dice_masks_a_pixel(one):
    logits, target = one
    target = target.clone()
    target[0, 1, 0] = IGNORE
    loss = dice(logits, target, smooth=0)
    assert loss.item() == pytest.approx(1 - 0.8938232513555888, **EXACT)


def test_dice_per_image_or_of_the_batch(two_images):
    assert dice(*two_images, per_image=True).item() == pytest.approx(
        0.5834873999458101, **EXACT
    )
    assert dice(*two_images).item() == pytest.approx(0.22938480623744206, **EXACT)


def test_jaccard_per_image_is_the_mean_over_images(two_images):
    logits, target = two_images
    each = [jaccard(logits[i : i + 1], target[i : i + 1]).item() for i in (0, 1)]
    loss = jaccard(logits, target, per_image=True)
    assert loss.item() == pytest.approx(sum(each) / 2, **EXACT)
    assert jaccard(logits, target).item() != pytest.approx(loss.item(), abs=1e-3)


def test_dice_of_three_classes(three, masked):
    scores = [0.6689654540367073, 0.5586398863128718, 0.7235176216159984]
    logits, labels, _ = three
    assert dice(logits, labels, smooth=0).item() == pytest.approx(
        1 - sum(scores) / 3, **EXACT
    )
    without = dice(logits, labels, smooth=0, include_background=False)
    assert without.item() == pytest.approx(0.35892124603556486, **EXACT)
    assert dice(*masked[:2], smooth=0).item() == pytest.approx(
        0.24082712903264447, **EXACT
    )


def test_jaccard_of_three_classes(three):
    scores = [0.6689654540367073, 0.5586398863128718, 0.7235176216159984]
    ratios = [d / (2 - d) for d in scores]
    logits, labels, _ = three
    assert jaccard(logits, labels, smooth=0).item() == pytest.approx(
        1 - sum(ratios) / 3, **EXACT
    )
    without = jaccard(logits, labels, smooth=0, include_background=False)
    assert without.item() == pytest.approx(1 - sum(ratios[1:]) / 2, **EXACT)


def test_background_may_only_be_left_out_of_several_classes(one):
    assert dice(*one, include_background=False).item() == dice(*one).item()


def test_background_may_be_left_out_of_two_classes(three):
    logits, labels = three[0][:, :2], three[1] % 2
    p = logits.softmax(1)[:, 1]
    expected = 1 - 2 * (p * labels).sum() / (p.sum() + labels.sum())
    loss = dice(logits, labels, smooth=0, include_background=False)
    assert loss.item() == pytest.approx(expected.item(), **EXACT)


@pytest.mark.parametrize("loss", [dice, jaccard])
def test_absent_classes_do_not_count(three, loss):
    logits, labels, _ = three
    labels = torch.where(labels == 1, IGNORE, labels)
    truth = torch.nn.functional.one_hot(labels.clamp_min(0), 3).movedim(-1, 1)
    used = labels != IGNORE
    p = logits.softmax(1)
    expected = []
    for k in (0, 2):
        inter = (p[:, k] * truth[:, k])[used].sum()
        size = p[:, k][used].sum() + truth[:, k][used].sum()
        d = 2 * inter / size
        expected.append((1 - (d if loss is dice else d / (2 - d))).item())
    assert loss(logits, labels, smooth=0).item() == pytest.approx(
        sum(expected) / 2, **EXACT
    )


@pytest.mark.parametrize("loss", [dice, jaccard, bce_dice])
def test_per_image_skips_images_without_annotation(three, loss):
    logits, labels, _ = three
    twice = torch.cat([logits, logits + 1.5])
    marks = torch.cat([labels, torch.full_like(labels, IGNORE)])
    alone = loss(logits, labels, per_image=True).item()
    assert loss(twice, marks, per_image=True).item() == pytest.approx(alone, **EXACT)


def test_per_image_weighs_images_alike(three):
    logits, labels, _ = three
    few = torch.where(labels == 0, 0, IGNORE)
    loss = dice(torch.cat([logits, logits]), torch.cat([labels, few]), per_image=True)
    each = [dice(logits, labels).item(), dice(logits, few).item()]
    assert loss.item() == pytest.approx(sum(each) / 2, **EXACT)


def test_only_background_leaves_no_foreground_to_score(three):
    logits, labels, _ = three
    loss = dice(logits, torch.zeros_like(labels), include_background=False)
    assert loss.item() == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 4), st.booleans())
def test_jaccard_follows_from_dice(seed, k, squared):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, k, 4, 4, generator=generator, dtype=torch.float64)
    target = torch.full((1, 4, 4), k - 1)  # one class: the mean is that class
    d = 1 - dice(logits, target, smooth=0, squared=squared)
    j = 1 - jaccard(logits, target, smooth=0, squared=squared)
    assert j.item() == pytest.approx((d / (2 - d)).item(), **EXACT)


def test_generalised_dice(three):
    assert generalised_dice(*three[:2]).item() == pytest.approx(
        0.34677304784564167, **EXACT
    )


def test_generalised_dice_without_an_absent_class(three):
    logits, labels, _ = three
    labels = torch.where(labels == 1, IGNORE, labels)
    p, used = logits.softmax(1), (labels != IGNORE)
    above = below = 0.0
    for k in (0, 2):
        g = (labels == k).double()
        weight = 1 / g.sum() ** 2
        above += weight * (p[:, k] * g).sum()
        below += weight * (p[:, k][used].sum() + g.sum())
    assert generalised_dice(logits, labels).item() == pytest.approx(
        (1 - 2 * above / below).item(), **EXACT
    )
    with pytest.raises(ValueError, match="at least 2"):
        generalised_dice(logits[:, :1], labels)


# BCE + Dice


def test_bce_dice_is_the_authors_plus_one(one):
    assert bce_dice(*one).item() - 1 == pytest.approx(-0.7105560606246477, **EXACT)


@pytest.mark.parametrize(
    ("bce_weight", "smooth", "expected"),
    [(0.5, 1e-5, 0.3147373762157172), (1, 1e-6, 0.4624781733295299)],
)
def test_bce_dice_in_other_hands(one, bce_weight, smooth, expected):
    loss = bce_dice(*one, bce_weight=bce_weight, smooth=smooth)
    assert loss.item() == pytest.approx(expected, **EXACT)


def test_bce_dice_masks_a_pixel(one):
    logits, target = one
    target = target.clone()
    target[0, 1, 0] = IGNORE
    loss = bce_dice(logits, target, smooth=0)
    expected = 0.5 * 0.16292568337831245 + 1 - 0.8938232513555888
    assert loss.item() == pytest.approx(expected, **EXACT)


def test_bce_dice_per_image_changes_only_the_dice(two_images):
    logits, target = two_images
    together = bce_dice(logits, target, smooth=1e-5).item()
    apart = bce_dice(logits, target, smooth=1e-5, per_image=True).item()
    assert together - apart == pytest.approx(
        0.22938480623744206 - 0.5834873999458101, **EXACT
    )


def test_bce_dice_of_several_classes_is_one_against_the_rest(masked):
    logits, labels, _ = masked
    used = labels != IGNORE
    bce, overlap = [], []
    for k in range(3):
        z, g = logits[:, k][used], (labels[used] == k).double()
        p = torch.sigmoid(z)
        bce.append(-(g * p.log() + (1 - g) * (1 - p).log()).mean().item())
        overlap.append((2 * (p * g).sum() + 1).item() / (p.sum() + g.sum() + 1).item())
    expected = 0.5 * sum(bce) / 3 + 1 - sum(overlap) / 3
    assert bce_dice(logits, labels).item() == pytest.approx(expected, **EXACT)


# Focal


def test_focal_of_three_classes(three):
    assert focal(*three[:2]).item() == pytest.approx(0.1496227943585912, **EXACT)


def test_focal_leaves_out_what_is_not_annotated(masked):
    parts = [0.010869330887949407, 0.09908187417336804, 0.0002678440761095295]
    assert focal(*masked[:2]).item() == pytest.approx(sum(parts) / 3, **EXACT)
    weighted = focal(*masked[:2], alpha=(1, 2, 3)).item()
    expected = (parts[0] + 2 * parts[1] + 3 * parts[2]) / 3
    assert weighted == pytest.approx(expected, **EXACT)


def test_focal_of_one_channel(one):
    assert focal(*one).item() == pytest.approx(0.04946442470204776, **EXACT)
    assert focal(*one, alpha=0.25).item() == pytest.approx(
        0.015198363364070355, **EXACT
    )


def test_focal_of_one_channel_masks_a_pixel(one):
    logits, target = one
    target = target.clone()
    target[0, 1, 0] = IGNORE
    parts = [0.0018035628352403813, 0.022658057508467326, 0.00010928332449699652]
    assert focal(logits, target).item() == pytest.approx(sum(parts) / 3, **EXACT)


def test_focal_without_gamma_is_the_cross_entropy(three, one):
    assert focal(*three[:2], gamma=0).item() == pytest.approx(
        cross_entropy(*three[:2]).item(), **EXACT
    )
    assert focal(*one, gamma=0).item() == pytest.approx(0.2954810576737207, **EXACT)


def test_focal_at_nine_tenths_is_a_hundredth():
    logits = torch.tensor([math.log(9), 0], dtype=torch.float64).view(1, 2, 1, 1)
    target = torch.zeros(1, 1, 1).long()
    ratio = focal(logits, target) / cross_entropy(logits, target)
    assert ratio.item() == pytest.approx(0.01, **EXACT)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_has_a_finite_gradient_at_certainty(channels, gamma):
    logits = torch.full((1, channels, 1, 1), -500.0)
    logits[:, -1] = 500.0
    logits.requires_grad_()
    focal(logits, torch.ones(1, 1, 1).long(), gamma=gamma).backward()
    assert logits.grad.abs().sum() == 0


def test_focal_names_what_is_wrong(three, one):
    for gamma in (-1, math.nan):
        with pytest.raises(ValueError, match="`gamma` must be 0 or more"):
            focal(*one, gamma=gamma)
    with pytest.raises(ValueError, match=r"one weight per class, 3, got 0.25"):
        focal(*three[:2], alpha=0.25)
    with pytest.raises(ValueError, match=r"one number for one channel"):
        focal(*one, alpha=(1, 2))
    with pytest.raises(ValueError, match=r"One weight per class is needed, 3"):
        focal(*three[:2], alpha=(1, 2))


# What all have in common


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(loss, dtype):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 8, 8, generator=generator).to(dtype)
    target = torch.randint(-1, 3, (2, 8, 8), generator=generator)
    value = loss(logits, target)
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value.item() == pytest.approx(loss(logits.double(), target).item(), abs=1e-6)


@pytest.mark.parametrize("loss", ALL)
def test_many_pixels_do_not_overflow_half_precision(loss):
    logits = torch.ones(1, 2, 300, 300, dtype=torch.float16)
    assert torch.isfinite(loss(logits, torch.zeros(1, 300, 300).long()))


@pytest.mark.parametrize("loss", ALL)
def test_autocast_changes_nothing(loss):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 3, 8, 8, generator=generator)
    target = torch.randint(-1, 3, (1, 8, 8), generator=generator)
    expected = loss(logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, target)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "channels"), [(f, 3) for f in ALL] + [(f, 1) for f in ONE_CHANNEL]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_nothing_annotated_is_zero_with_zero_gradient(loss, channels, dtype):
    logits = torch.randn(2, channels, 4, 4).to(dtype).requires_grad_()
    value = loss(logits, torch.full((2, 4, 4), IGNORE))
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("loss", [dice, jaccard, bce_dice])
@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_annotated_per_image_is_zero(loss, channels):
    logits = torch.randn(2, channels, 4, 4, requires_grad=True)
    value = loss(logits, torch.full((2, 4, 4), IGNORE), per_image=True)
    value.backward()
    assert value.item() == 0
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize(
    ("loss", "channels"), [(f, 3) for f in ALL] + [(f, 1) for f in ONE_CHANNEL]
)
def test_few_annotated_pixels_give_the_same_loss_and_gradient(loss, channels):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, channels, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(-1, max(channels, 2), (2, 4, 5), generator=generator)
    dense = logits.clone().requires_grad_()
    wide, marks = sparse_of(logits, target)
    wide.requires_grad_()
    expected, value = loss(dense, target), loss(wide, marks)
    assert value.item() == pytest.approx(expected.item(), **EXACT)
    expected.backward()
    value.backward()
    torch.testing.assert_close(wide.grad[:, :, 3:7, 5:10], dense.grad)
    rest = wide.grad.clone()
    rest[:, :, 3:7, 5:10] = 0
    assert rest.abs().sum() == 0


def test_few_annotated_pixels_keep_their_weights(masked):
    logits, labels, weights = masked
    wide, marks = sparse_of(logits, labels)
    heavy = torch.rand(marks.shape, dtype=torch.float64)
    heavy[:, 3:5, 5:7] = weights
    loss = cross_entropy(wide, marks, pixel_weights=heavy)
    assert loss.item() == pytest.approx(0.3929646131327718, **EXACT)


@pytest.mark.parametrize("loss", [dice, jaccard, bce_dice])
def test_few_annotated_pixels_per_image(loss, two_images):
    wide, marks = sparse_of(*two_images)
    value = loss(wide, marks, per_image=True)
    assert value.item() == pytest.approx(
        loss(*two_images, per_image=True).item(), **EXACT
    )


@pytest.mark.parametrize("loss", ALL)
def test_gradients_are_right(loss):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64)
    target = torch.randint(-1, 3, (2, 2, 3), generator=generator)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, target), (logits,))


@pytest.mark.parametrize("loss", ALL)
def test_a_perfect_output_costs_almost_nothing(loss):
    target = torch.tensor([[[0, 1], [2, 1]]])
    one_hot = torch.nn.functional.one_hot(target, 3).movedim(-1, 1)
    assert 0 <= loss(80.0 * (2 * one_hot - 1), target).item() < 1e-5
    assert loss(-80.0 * (2 * one_hot - 1), target).item() > 0.5


@pytest.mark.parametrize("loss", ALL)
def test_the_target_must_fit_the_logits(loss):
    with pytest.raises(ValueError, match=r"\(N, H, W\).*\(1, 4, 5\).*\(1, 2, 4, 4\)"):
        loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 5).long())
    with pytest.raises(ValueError, match=r"must be \(N, H, W\)"):
        loss(torch.zeros(1, 2, 4), torch.zeros(1, 4).long())
    with pytest.raises(ValueError, match=r"must be \(N, H, W\)"):
        loss(torch.zeros(2, 2, 4, 4), torch.zeros(1, 4, 4).long())


def test_the_inputs_stay_as_they_are(masked):
    logits, labels, weights = masked
    before = [t.clone() for t in masked]
    for loss in ALL:
        loss(logits, labels)
    cross_entropy(logits, labels, pixel_weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(before, masked, strict=True))


def test_deep_supervision_is_the_mean_over_heads(three):
    logits, labels, _ = three
    heads = [logits, 2 * logits, -logits]
    expected = sum(cross_entropy(h, labels).item() for h in heads) / 3
    assert deep_supervision(heads, labels, cross_entropy).item() == pytest.approx(
        expected, **EXACT
    )
    assert (
        deep_supervision(heads[:1], labels, dice).item() == dice(logits, labels).item()
    )
    with pytest.raises(ValueError, match="at least one head"):
        deep_supervision([], labels, dice)


# U-Net's weight map

ROW = np.array([[1, 1, 0, 0, 0, 2, 2]])


def brute_force(instances, w0, sigma):
    """Distances from every pixel to every pixel."""
    values = [v for v in np.unique(instances) if v > 0]
    weights = np.ones(instances.shape)
    if len(values) < 2:
        return weights
    places = np.indices(instances.shape).reshape(2, -1).T
    for y, x in places:
        if instances[y, x]:
            continue
        nearest = sorted(
            min(math.dist((y, x), p) for p in np.argwhere(instances == v))
            for v in values
        )
        weights[y, x] += w0 * math.exp(-((nearest[0] + nearest[1]) ** 2) / 2 / sigma**2)
    return weights


def test_weight_map_of_a_row():
    weights = border_weights(ROW)
    assert weights.dtype == np.float32
    high = 1 + 10 * math.exp(-16 / 50)
    np.testing.assert_allclose(weights, [[1, 1, high, high, high, 1, 1]], rtol=1e-6)
    assert high - 1 == pytest.approx(7.26149, abs=1e-5)


def test_weight_map_of_three_cells():
    grid = np.zeros((5, 7), int)
    grid[:2, :2] = 1
    grid[:2, 5:] = 2
    grid[4, 3] = 3
    extra = [
        [0, 0, 7.26149, 7.26149],
        [0, 0, 7.26149, 7.26149],
        [6.542786, 7.459199, 7.660628, 6.984544],
        [5.868522, 6.984544, 7.660628, 7.459199],
        [4.867523, 6.065307, 7.071651, 0],
    ]
    mirrored = [[*row, *row[2::-1]] for row in extra]
    np.testing.assert_allclose(border_weights(grid) - 1, mirrored, atol=2e-6)


def test_weight_map_balances_the_classes():
    weights = border_weights(ROW, class_balance=True, w0=0)
    background, cell = 7 / 6, 7 / 8
    expected = [[cell, cell, background, background, background, cell, cell]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    with_border = border_weights(ROW, class_balance=True)
    np.testing.assert_allclose(
        with_border - weights, border_weights(ROW) - 1, rtol=1e-6
    )


@pytest.mark.parametrize("value", [0, 3])
def test_weight_map_of_a_single_class_is_finite(value):
    weights = border_weights(np.full((3, 4), value), class_balance=True)
    np.testing.assert_array_equal(weights, np.full((3, 4), 0.5))


def test_one_cell_has_no_border():
    one = np.where(ROW == 1, 1, 0)
    np.testing.assert_array_equal(border_weights(one), np.ones((1, 7)))
    np.testing.assert_array_equal(border_weights(0 * ROW), np.ones((1, 7)))


def test_touching_cells_everywhere_have_no_background():
    np.testing.assert_array_equal(
        border_weights(np.array([[1, 1, 2, 3]])), np.ones((1, 4))
    )


def test_unlabelled_pixels_weigh_nothing_and_are_no_background():
    row = np.array([[1, 1, 0, -1, 0, 2, 2]])
    weights = border_weights(row, unlabelled=-1, class_balance=True, w0=0)
    background, cell = 6 / 4, 6 / 8
    expected = [[cell, cell, background, 0, background, cell, cell]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    high = 1 + 10 * math.exp(-16 / 50)
    np.testing.assert_allclose(
        border_weights(np.where(row == -1, 255, row), unlabelled=255),
        [[1, 1, high, 0, high, 1, 1]],
        rtol=1e-6,
    )


def test_a_pixel_wide_row_of_holes_next_to_one_cell_is_no_border():
    grid = np.zeros((7, 7), np.uint8)
    grid[2:5, 2:5] = 7
    grid[3, 3] = 0
    np.testing.assert_array_equal(border_weights(grid), np.ones((7, 7)))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([(10.0, 5.0), (1000.0, 0.6), (0.5, 0.4), (3.0, 2.0)]),
)
def test_weight_map_equals_brute_force(seed, height, width, numbers):
    rng = np.random.default_rng(seed)
    grid = rng.choice([0, 0, 0, 0, 0, 1, 2, 40], (height, width)).astype(np.int32)
    w0, sigma = numbers
    np.testing.assert_allclose(
        border_weights(grid, w0=w0, sigma=sigma),
        brute_force(grid, w0, sigma),
        rtol=1e-6,
        atol=1e-5,
    )


def test_far_cells_need_not_be_looked_at():
    grid = np.zeros((3, 90), int)
    grid[1, 0], grid[1, 24], grid[1, 89] = 1, 2, 3
    np.testing.assert_allclose(
        border_weights(grid), brute_force(grid, 10, 5), rtol=1e-6, atol=1e-6
    )


def test_a_high_border_reaches_further():
    row = np.array([[1, 0, 0, 0, 0, 0, 2]])
    weights = border_weights(row, w0=1e4, sigma=1)
    # d1 = 1, d2 = 5, just behind the cell.
    assert weights[0, 1] - 1 == pytest.approx(1e4 * math.exp(-18), abs=2e-7)
    np.testing.assert_allclose(weights, brute_force(row, 1e4, 1), rtol=1e-6)


def test_weight_map_leaves_its_input_alone():
    grid = ROW.copy()
    border_weights(grid, class_balance=True, unlabelled=2)
    np.testing.assert_array_equal(grid, ROW)


@pytest.mark.parametrize(
    ("array", "kwargs", "match"),
    [
        (ROW.astype(float), {}, "2-d integer array.*float64"),
        (ROW[0], {}, r"2-d integer array.*\(7,\)"),
        (ROW > 0, {}, "2-d integer array.*bool"),
        (-ROW, {}, "numbered from 1, got -2"),
        (ROW, {"w0": -1}, "`w0` must be 0 or more"),
        (ROW, {"w0": math.inf}, "`w0` must be 0 or more"),
        (ROW, {"sigma": 0}, "`sigma` above 0"),
        (ROW, {"sigma": math.nan}, "`sigma` above 0"),
        (ROW, {"sigma": math.inf}, "`sigma` above 0"),
        (ROW, {"unlabelled": 0}, "must not be 0"),
    ],
)
def test_weight_map_names_what_is_wrong(array, kwargs, match):
    with pytest.raises(ValueError, match=match):
        border_weights(array, **kwargs)


def labelled(rows: list[list[int]], certainty: float = 40.0) -> torch.Tensor:
    """Return logits (1, 2, 2 H, 2 W) that are sure of a class for each 2 x 2 pixels."""
    classes = torch.tensor(rows).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return torch.stack([1 - classes, classes])[None] * certainty


def grey(rows: list[list[float]]) -> torch.Tensor:
    return (
        torch.tensor(rows).repeat_interleave(2, 0).repeat_interleave(2, 1)[None, None]
    )


def test_the_energy_is_the_mean_over_pairs_that_look_alike() -> None:
    image = grey([[0.0, 0.1]])
    pair = edge_aware(labelled([[0, 1]]), image, sigma=0.1, distances=(1,))
    torch.testing.assert_close(pair, torch.tensor(math.exp(-0.5)))
    # Undecided pixels agree by half with everything.
    undecided = edge_aware(torch.zeros(1, 2, 4, 4), torch.zeros(1, 1, 4, 4))
    torch.testing.assert_close(undecided, torch.tensor(0.5))


@pytest.mark.parametrize("turn", [0, 1])
def test_a_border_costs_nothing_at_an_edge_and_much_beside_it(turn: int) -> None:
    image = grey([[0.0, 0.0, 1.0, 1.0]] * 4).rot90(turn, (2, 3))
    at = labelled([[0, 0, 1, 1]] * 4).rot90(turn, (2, 3))
    beside = labelled([[0, 0, 0, 1]] * 4).rot90(turn, (2, 3))
    assert edge_aware(at, image, distances=(1, 3)) < 1e-6
    # Distance 1: 4 of 12 pairs along the rows, none of 12 across, 3 of 9 on each
    # diagonal lie in the bright half and differ; distance 3: no such pair.
    expected = (4 / 12 + 0 + 3 / 9 + 3 / 9) / 4
    only = edge_aware(beside, image, distances=(1,))
    torch.testing.assert_close(only, torch.tensor(expected))
    both = edge_aware(beside, image, distances=(1, 3))
    torch.testing.assert_close(both, torch.tensor(expected / 2))


def test_colours_add_up_and_distances_that_do_not_fit_are_left_out() -> None:
    image = grey([[0.0, 0.1]]).repeat(1, 3, 1, 1)
    pair = edge_aware(labelled([[0, 1]]), image, distances=(1, 3, 8))
    torch.testing.assert_close(pair, torch.tensor(math.exp(-1.5)))
    logits = torch.zeros(1, 2, 2, 2, requires_grad=True)
    none = edge_aware(logits, torch.zeros(1, 1, 2, 2))
    none.backward()
    assert none == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_the_energy_is_float32_for_half_precision() -> None:
    logits = labelled([[0, 1]]).to(torch.bfloat16)
    pair = edge_aware(logits, grey([[0.0, 0.0]]).to(torch.bfloat16))
    assert pair.dtype == torch.float32
    assert pair == 1


def test_a_narrow_image_keeps_the_pairs_along_its_length() -> None:
    tall = edge_aware(labelled([[0], [1], [1]]), grey([[0.0]] * 3), distances=(1, 2))
    # Distance 1: one of two pairs differs; distance 2: the only pair does.
    torch.testing.assert_close(tall, torch.tensor((1 / 2 + 1) / 2))


def test_soft_cross_entropy_of_a_worked_example() -> None:
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])[None, :, None, :]
    logits = logits.repeat(1, 1, 8, 1)  # p = (1/2, 1/2) and (3/4, 1/4)
    rows = torch.full((1, 8, 2), -1)
    assert float(soft_cross_entropy(logits, rows, torch.eye(2))) == 0
    rows[0, 5, 1] = 1
    table = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    expected = -(0.25 * math.log(0.75) + 0.75 * math.log(0.25))
    found = soft_cross_entropy(logits, rows, table)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    rows[0, 2, 0] = 0
    found = soft_cross_entropy(logits, rows, table)
    assert float(found) == pytest.approx((expected + math.log(2)) / 2, rel=1e-6)


def test_soft_cross_entropy_with_certain_rows_is_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 7, generator=generator, requires_grad=True)
    rows = torch.randint(-1, 3, (2, 6, 7), generator=generator)
    soft = soft_cross_entropy(logits, rows, torch.eye(3))
    hard = cross_entropy(logits, rows)
    torch.testing.assert_close(soft, hard)
    for found, expected in zip(
        torch.autograd.grad(soft, logits),
        torch.autograd.grad(hard, logits),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
