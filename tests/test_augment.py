from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from napari_unetpp.augment import (
    Warp,
    cut_windows,
    elastic_field,
    grey_values,
    interpolate_control,
    sampling_grid,
    warp,
)

STRONG = Warp(
    flip=True,
    right_angles=True,
    rotation=30,
    scale=0.2,
    shift=5,
    elastic_sigma=3,
    elastic_spacing=20,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(grid, window):
    """The grid in pixels of the window, (x, y)."""
    return (grid.double() + 1) * (window - 1) / 2


def noise_windows(n=2, channels=1, side=65, seed=0):
    generator = seeded(seed)
    windows = torch.randn(n, channels, side, side, generator=generator)
    marks = torch.randint(0, 4, (n, side, side), generator=generator)
    return windows, marks.to(torch.int16)


def middle(tensor, size):
    start = (tensor.shape[-1] - size) // 2
    return tensor[..., start : start + size, start : start + size]


# Windows


def numpy_window(image, target, centre, size):
    """The same by padding, for pads of any size."""
    pad = size + max(np.abs(centre)) + max(target.shape)
    wide = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    marks = np.pad(target, pad)
    top, left = (c - size // 2 + pad for c in centre)
    box = np.s_[top : top + size, left : left + size]
    return wide[(slice(None), *box)], marks[box]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(-3, 12),
    st.integers(-3, 12),
    st.integers(1, 14),
    st.integers(1, 3),
)
def test_windows_equal_numpy_reflect(height, width, y, x, size, channels):
    generator = seeded(height * width)
    image = torch.randn(channels, height, width, generator=generator)
    target = torch.randint(1, 9, (height, width), generator=generator).to(torch.uint8)
    windows, marks = cut_windows([image], [target], [0], [(y, x)], size)
    expected = numpy_window(image.numpy(), target.numpy(), (y, x), size)
    np.testing.assert_array_equal(windows[0], expected[0])
    np.testing.assert_array_equal(marks[0], expected[1])


def test_each_window_comes_from_its_image():
    images = [torch.arange(48.0).view(1, 6, 8), -torch.arange(25.0).view(1, 5, 5)]
    targets = [i[0].to(torch.int16) for i in images]
    centres = torch.tensor([[3, 2], [2, 2], [4, 7]])
    windows, marks = cut_windows(images, targets, [0, 1, 0], centres, 3)
    assert windows.shape == (3, 1, 3, 3)
    assert marks.dtype == torch.int16
    assert torch.equal(windows[0], images[0][:, 2:5, 1:4])
    assert torch.equal(windows[1], images[1][:, 1:4, 1:4])
    assert torch.equal(marks[1], targets[1][1:4, 1:4])
    assert windows[2, 0, 1].tolist() == [38, 39, 38]
    assert marks[2, 1].tolist() == [38, 39, 0]
    assert marks[2, :, 0].tolist() == [30, 38, 46]


def test_the_centre_lies_half_a_window_in():
    image = torch.arange(100.0).view(1, 10, 10)
    for size in (4, 5):
        windows, _ = cut_windows([image], [image[0].int()], [0], [(6, 5)], size)
        assert windows[0, 0, size // 2, size // 2] == 65


def test_windows_are_copies():
    image = torch.zeros(1, 4, 4)
    target = torch.zeros(4, 4, dtype=torch.int16)
    windows, marks = cut_windows([image], [target], [0], [(2, 2)], 4)
    windows += 1
    marks += 1
    assert image.sum() == 0
    assert target.sum() == 0


def test_windows_name_what_is_wrong():
    image, target = torch.zeros(1, 4, 5), torch.zeros(4, 5).int()
    with pytest.raises(ValueError, match="one index and one centre, got 2 and 1"):
        cut_windows([image], [target], [0, 0], [(1, 1)], 3)
    with pytest.raises(ValueError, match="one index and one centre, got 0 and 0"):
        cut_windows([image], [target], [], [], 3)
    with pytest.raises(ValueError, match=r"Image 1 has the shape \(4, 5\).*\(5, 4\)"):
        cut_windows([image] * 2, [target, target.T], [0, 1], [(1, 1)] * 2, 3)


# The settings


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rotation": -1}, "`rotation` must lie between 0 and 180, got -1"),
        ({"rotation": 181}, "`rotation`"),
        ({"rotation": math.nan}, "`rotation`"),
        ({"scale": 1.0}, "`scale` must lie between 0 and 0.95"),
        ({"scale": -0.1}, "`scale`"),
        ({"shift": -1}, "`shift`"),
        ({"shift": 1.5}, "`shift` must be whole pixels, got 1.5"),
        ({"shift": 10001}, "`shift` must lie between 0 and 10000"),
        ({"elastic_sigma": -1}, "`elastic_sigma`"),
        ({"elastic_sigma": 1001}, "`elastic_sigma` must lie between 0 and 1000"),
        ({"elastic_spacing": 0}, "`elastic_spacing` must be above 0"),
        ({"elastic_spacing": -3}, "`elastic_spacing` must be above 0"),
    ],
)
def test_settings_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Warp(**kwargs)


def test_settings_at_their_limits():
    Warp(rotation=180, scale=0.95, shift=10_000, elastic_sigma=1000)
    assert Warp() == Warp(False, False, 0, 0, 0, 0, None)


@pytest.mark.parametrize("size", [1, 16, 33, 100])
@pytest.mark.parametrize(
    "spec",
    [
        Warp(),
        Warp(flip=True, right_angles=True),
        Warp(rotation=20),
        Warp(rotation=180, scale=0.1),
        Warp(shift=7),
        Warp(rotation=10, scale=0.3, shift=2, right_angles=True),
    ],
)
def test_the_window_holds_every_affine_draw_and_little_more(spec, size):
    side = spec.window(size)
    grid = pixels(sampling_grid(100, size, side, seeded(), spec), side)
    # An odd number of pixels too many, if any, lies at the end.
    spare = (side - size) % 2
    assert grid.min() > -1e-3
    assert grid.max() < side - 1 - spare + 1e-3
    exact = side - 1 == 2 ** round(math.log2(max(side - 1, 1)))
    if not exact and size > 16:
        assert grid.min() < 0.04 * side


def test_windows_of_the_usual_sizes():
    assert Warp().window(100) == 100
    assert Warp().window(128) == 129  # exact in float32
    assert Warp().window(64) == 65
    assert Warp(shift=3).window(100) == 106
    assert Warp(elastic_sigma=2).window(100) == 112
    assert Warp(rotation=45).window(101) == 143
    assert Warp(rotation=90).window(101) == 143
    assert Warp(scale=0.5).window(101) == 201
    assert Warp().window(1) == 1


# The grid


@pytest.mark.parametrize(("size", "side"), [(64, 65), (32, 129), (33, 129), (1, 1)])
def test_no_warp_is_the_middle_of_the_window_bit_for_bit(size, side):
    windows, marks = noise_windows(side=side)
    grid = sampling_grid(2, size, side, seeded(), Warp())
    assert grid.shape == (2, size, size, 2)
    assert grid.dtype == torch.float32
    patches, patch_marks = warp(windows, marks, grid)
    assert torch.equal(patches, middle(windows, size))
    assert torch.equal(patch_marks, middle(marks, size))
    assert patch_marks.dtype == torch.int16


@pytest.mark.parametrize(("size", "side"), [(96, 160), (31, 60), (20, 21), (8, 8)])
def test_no_warp_is_the_middle_of_any_window(size, side):
    windows, marks = noise_windows(side=side, channels=2)
    patches, patch_marks = warp(
        windows, marks, sampling_grid(2, size, side, seeded(), Warp())
    )
    torch.testing.assert_close(patches, middle(windows, size), atol=2e-4, rtol=0)
    assert torch.equal(patch_marks, middle(marks, size))


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        (Warp(flip=True), {(0, False), (0, True), (2, False), (2, True)}),
        (Warp(right_angles=True), {(k, False) for k in range(4)}),
        (
            Warp(flip=True, right_angles=True),
            {(k, f) for k in range(4) for f in (False, True)},
        ),
    ],
)
def test_flips_and_right_angles_are_all_drawn_and_exact(size, spec, kinds):
    n = 400
    windows, marks = (t.expand(n, *t.shape[1:]) for t in noise_windows(n=1))
    patches, patch_marks = warp(
        windows, marks, sampling_grid(n, size, 65, seeded(), spec)
    )
    core, core_marks = middle(windows[0], size), middle(marks[0], size)
    seen = {}
    for patch, patch_mark in zip(patches, patch_marks, strict=True):
        for turns, flipped in kinds:

            def move(x, turns=turns, flipped=flipped):
                return torch.rot90(x.flip(-1) if flipped else x, turns, (-2, -1))

            if torch.equal(patch, move(core)):
                assert torch.equal(patch_mark, move(core_marks))
                seen[turns, flipped] = seen.get((turns, flipped), 0) + 1
    assert seen.keys() == kinds
    assert sum(seen.values()) == n
    # Six standard deviations of a binomial.
    p = 1 / len(kinds)
    assert all(abs(c - n * p) < 6 * math.sqrt(n * p * (1 - p)) for c in seen.values())


def angles_and_zooms(spec, n=500):
    size, side = 21, 101
    grid = pixels(sampling_grid(n, size, side, seeded(1), spec), side)
    step = grid[:, 10, 20] - grid[:, 10, 0]  # 20 columns further
    down = grid[:, 20, 10] - grid[:, 0, 10]
    angle = torch.atan2(step[:, 1], step[:, 0]).rad2deg()
    # A rotation with one zoom: perpendicular and of equal length, no mirror.
    torch.testing.assert_close(down[:, 0], -step[:, 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(down[:, 1], step[:, 0], atol=1e-4, rtol=0)
    centre = grid[:, 10, 10]
    return angle, 20 / step.norm(dim=1), centre


@pytest.mark.parametrize("limit", [10.0, 90.0, 180.0])
def test_rotation_is_uniform_both_ways_about_the_centre(limit):
    angle, zoom, centre = angles_and_zooms(Warp(rotation=limit))
    assert angle.abs().max() <= limit + 1e-3
    assert angle.max() > 0.97 * limit
    assert angle.min() < -0.97 * limit
    assert angle.std() == pytest.approx(limit / math.sqrt(3), rel=0.1)
    torch.testing.assert_close(zoom, torch.ones_like(zoom), atol=1e-4, rtol=0)
    torch.testing.assert_close(centre, torch.full_like(centre, 50), atol=1e-4, rtol=0)


def test_scale_zooms_by_up_to_its_fraction():
    angle, zoom, centre = angles_and_zooms(Warp(scale=0.25))
    assert zoom.min() >= 0.75 - 1e-4
    assert zoom.min() < 0.76
    assert zoom.max() <= 1.25 + 1e-4
    assert zoom.max() > 1.24
    assert zoom.mean() == pytest.approx(1, abs=0.03)
    assert angle.abs().max() < 1e-3
    torch.testing.assert_close(centre, torch.full_like(centre, 50), atol=1e-4, rtol=0)


def test_shift_moves_by_whole_pixels_in_both_axes():
    _, zoom, centre = angles_and_zooms(Warp(shift=2))
    moved = centre - 50
    assert {round(v, 3) + 0 for v in moved.flatten().tolist()} == {-2, -1, 0, 1, 2}
    assert len({tuple(row) for row in moved.round().tolist()}) == 25
    torch.testing.assert_close(zoom, torch.ones_like(zoom), atol=1e-4, rtol=0)


def test_the_parts_of_a_draw_are_independent():
    angle, zoom, centre = angles_and_zooms(Warp(rotation=20, scale=0.2, shift=9))
    parts = torch.stack([angle, zoom, *centre.T])
    assert (torch.corrcoef(parts) - torch.eye(4)).abs().max() < 0.2


def test_rotation_and_zoom_compose_with_flips():
    spec = Warp(flip=True, right_angles=True, rotation=15, scale=0.1)
    grid = pixels(sampling_grid(300, 21, 101, seeded(), spec), 101)
    step = (grid[:, 10, 20] - grid[:, 10, 0]) / 20
    down = (grid[:, 20, 10] - grid[:, 0, 10]) / 20
    sides = step[:, 0] * down[:, 1] - step[:, 1] * down[:, 0]
    assert (sides < 0).any()
    assert (sides > 0).any()
    assert 1 / sides.abs().max().sqrt() >= 0.9 - 1e-4
    assert (step * down).sum(1).abs().max() < 1e-4
    angle = torch.atan2(step[:, 1], step[:, 0]).rad2deg()
    off = (angle + 45).remainder(90) - 45  # from the nearest right angle
    assert off.abs().max() <= 15 + 1e-3
    assert off.abs().max() > 14
    assert len(set(((angle - off) / 90).round().remainder(4).tolist())) == 4


@pytest.mark.parametrize("spec", [Warp(), Warp(elastic_sigma=3), STRONG])
def test_a_seed_gives_the_same_grid(spec):
    draw = [sampling_grid(3, 32, 65, seeded(s), spec) for s in (5, 5, 6)]
    assert torch.equal(draw[0], draw[1])
    assert torch.equal(draw[0], draw[2]) == (spec == Warp())


def test_draws_differ_from_patch_to_patch_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    grid = sampling_grid(4, 32, 65, seeded(), STRONG)
    grey_values(torch.zeros(2, 1, 3, 3), seeded(), gain=1, offset=1, gamma=1, noise=1)
    assert len({g.sum().item() for g in grid}) == 4
    assert torch.equal(state, torch.get_rng_state())


def test_autocast_leaves_the_grid_exact():
    expected = sampling_grid(2, 32, 65, seeded(), STRONG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        grid = sampling_grid(2, 32, 65, seeded(), STRONG)
    assert torch.equal(grid, expected)


def test_the_grid_is_the_affine_part_plus_the_field():
    affine = Warp(flip=True, rotation=20, scale=0.1)
    both = Warp(flip=True, rotation=20, scale=0.1, elastic_sigma=4, elastic_spacing=9)
    generator = seeded(3)
    plain = pixels(sampling_grid(3, 32, 101, generator, affine), 101)
    field = elastic_field(3, 32, 4, 9, generator)
    grid = pixels(sampling_grid(3, 32, 101, seeded(3), both), 101)
    torch.testing.assert_close(grid, plain + field, atol=1e-4, rtol=0)


# The elastic field


@pytest.mark.parametrize("transposed", [False, True])
def test_field_of_a_ramp_of_control_points(transposed):
    control = torch.arange(1.0, 10, dtype=torch.float64).view(1, 3, 3, 1)
    if transposed:
        control = control.transpose(1, 2)
    field = interpolate_control(control, 5)[0, :, :, 0]
    row = field[:, 1] if transposed else field[1]
    expected = [2.21875, 2.625, 3.21875, 3.8125, 4.21875]
    assert row.tolist() == pytest.approx(expected, abs=1e-12)


def test_field_of_a_single_control_point():
    control = torch.zeros(1, 3, 3, 1, dtype=torch.float64)
    control[0, 1, 1] = 10
    field = interpolate_control(control, 5)[0, :, :, 0]
    expected = [0, 3.52539062, 5.9375, 3.52539062, 0]
    assert field[1].tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(field, field.T)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 12), st.integers(0, 1000))
def test_control_points_are_hit_exactly(points, step, seed):
    size = (points - 1) * step + 1
    control = torch.randn(
        2, points, points, 2, generator=seeded(seed), dtype=torch.float64
    )
    field = interpolate_control(control, size)
    assert field.shape == (2, size, size, 2)
    torch.testing.assert_close(field[:, ::step, ::step], control)


def test_field_equals_torchs_bicubic_upsampling():
    control = torch.randn(2, 4, 4, 2, generator=seeded(), dtype=torch.float64)
    expected = torch.nn.functional.interpolate(
        control.permute(0, 3, 1, 2), (23, 23), mode="bicubic", align_corners=True
    )
    field = interpolate_control(control, 23)
    torch.testing.assert_close(field, expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("size", "spacing", "points"),
    [(65, None, 3), (65, 64, 2), (65, 32, 3), (65, 16, 5), (65, 1000, 2), (65, 20, 4)],
)
def test_spacing_sets_the_number_of_control_points(size, spacing, points):
    generator = seeded(7)
    field = elastic_field(2, size, 5, spacing, generator)
    control = 5 * torch.randn(
        2, points, points, 2, generator=seeded(7), dtype=torch.float64
    )
    assert field.dtype == torch.float32
    torch.testing.assert_close(field, interpolate_control(control.float(), size))


def test_field_of_the_paper_is_as_strong_as_its_interpolation_says():
    # Bicubic weights w at a pixel shrink the deviation to sigma * sum(w ** 2) on
    # average over both axes: 7.7 of 10 px for 3 by 3 points.
    field = elastic_field(300, 128, 10, None, seeded())
    assert field.square().mean().sqrt().item() == pytest.approx(7.72, abs=0.35)
    assert field[:, [0, 0, -1, -1], [0, -1, 0, -1]].std() == pytest.approx(10, rel=0.1)
    assert field.mean().abs() < 0.6


@pytest.mark.parametrize(
    ("size", "low", "high"), [(64, 0.36, 0.56), (96, 0.01, 0.11), (160, 0, 0.005)]
)
def test_folding_depends_on_the_tile(size, low, high):
    field = elastic_field(200, size, 10, None, seeded(2))
    right = field[:, :-1, 1:] - field[:, :-1, :-1]
    down = field[:, 1:, :-1] - field[:, :-1, :-1]
    jacobian = (1 + right[..., 0]) * (1 + down[..., 1]) - right[..., 1] * down[..., 0]
    folded = (jacobian.flatten(1).amin(1) <= 0).double().mean().item()
    assert low <= folded <= high


# Image and annotation together


@pytest.mark.parametrize("seed", range(4))
def test_image_and_annotation_stay_together(seed):
    # Discs with soft edges: the annotation is the image above a threshold.
    y, x = torch.meshgrid(torch.arange(129.0), torch.arange(129.0), indexing="ij")
    image = torch.sin(y / 5.3 + seed) + torch.sin(x / 7.1)
    marks = (1 + (image > 0.2).int() + (image > 1.0).int()).to(torch.uint8)
    grid = sampling_grid(1, 96, 129, seeded(seed), STRONG)
    patch, patch_marks = warp(image[None, None], marks[None], grid)
    patch, patch_marks = patch[0, 0], patch_marks[0]
    again = 1 + (patch > 0.2).int() + (patch > 1.0).int()
    known = patch_marks > 0
    unsure = ((patch - 0.2).abs() < 0.2) | ((patch - 1.0).abs() < 0.2)
    clear = known & ~unsure
    assert clear.double().mean() > 0.5
    assert torch.equal(again[clear], patch_marks[clear].int())
    assert len(patch_marks[clear].unique()) == 3


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([torch.uint8, torch.int16, torch.int64]),
    st.sampled_from([STRONG, Warp(rotation=180, scale=0.6), Warp(elastic_sigma=30)]),
)
def test_warping_invents_no_class(seed, dtype, spec):
    generator = seeded(seed)
    values = torch.tensor([0, 3, 9, 200], dtype=dtype)
    marks = values[torch.randint(0, 4, (2, 24, 24), generator=generator)]
    windows = torch.randn(2, 1, 24, 24, generator=generator)
    grid = sampling_grid(2, 20, 24, generator, spec)
    patches, patch_marks = warp(windows, marks, grid)
    assert patch_marks.dtype == dtype
    assert set(patch_marks.unique().tolist()) <= set(values.tolist())
    assert torch.isfinite(patches).all()
    assert patches.min() >= windows.min() - 1e-4
    assert patches.max() <= windows.max() + 1e-4


def test_nothing_is_known_outside_the_window():
    windows = torch.rand(1, 1, 33, 33, generator=seeded())
    marks = torch.ones(1, 33, 33, dtype=torch.uint8)
    grid = sampling_grid(1, 65, 33, seeded(), Warp())
    patches, patch_marks = warp(windows, marks, grid)
    inside = torch.zeros(65, 65, dtype=torch.uint8)
    inside[16:49, 16:49] = 1
    assert torch.equal(patch_marks[0], inside)
    mirrored = np.pad(windows[0, 0], 16, mode="reflect")
    np.testing.assert_allclose(patches[0, 0], mirrored, atol=1e-5)


def test_halfway_between_pixels_the_image_is_the_mean():
    windows = torch.tensor([[0.0, 1, 4], [2, 3, 8], [0, 0, 0]]).view(1, 1, 3, 3)
    marks = torch.tensor([[[1, 2, 3], [4, 5, 6], [7, 8, 9]]])
    grid = torch.tensor([[[[-0.5, -1.0], [0.0, -0.5], [0.3, -0.9]]]])
    patches, patch_marks = warp(windows, marks, grid)
    assert patches[0, 0, 0, :2].tolist() == [0.5, 2.0]
    assert patch_marks[0, 0, 2] == 2


def test_warping_leaves_its_inputs_alone():
    windows, marks = noise_windows()
    grid = sampling_grid(2, 32, 65, seeded(), STRONG)
    before = [t.clone() for t in (windows, marks, grid)]
    warp(windows, marks, grid)
    after = (windows, marks, grid)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# Grey values


def test_grey_values_do_nothing_by_default():
    patches = torch.randn(3, 2, 5, 5, generator=seeded())
    result = grey_values(patches, seeded())
    assert torch.equal(result, patches)
    assert result.data_ptr() != patches.data_ptr()


def fitted(result, patches):
    """Gain and offset of each patch and channel."""
    x, y = patches.flatten(2).double(), result.flatten(2).double()
    gain = (y[..., -1] - y[..., 0]) / (x[..., -1] - x[..., 0])
    offset = y[..., 0] - gain * x[..., 0]
    torch.testing.assert_close(
        y, gain[..., None] * x + offset[..., None], atol=1e-4, rtol=0
    )
    return gain, offset


def ramps(n, channels):
    return torch.linspace(-2, 3, 16).view(1, 1, 4, 4).repeat(n, channels, 1, 1)


def test_gain_and_offset_per_patch():
    patches = ramps(500, 3)
    gain, offset = fitted(grey_values(patches, seeded(), gain=0.4, offset=0.3), patches)
    torch.testing.assert_close(gain, gain[:, :1].expand(-1, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(offset, offset[:, :1].expand(-1, 3), atol=1e-5, rtol=0)
    gain, offset = gain[:, 0], offset[:, 0]
    assert 0.6 - 1e-5 <= gain.min() < 0.61
    assert 1.39 < gain.max() <= 1.4 + 1e-5
    assert gain.mean() == pytest.approx(1, abs=0.05)
    assert offset.std() == pytest.approx(0.3, rel=0.12)
    assert offset.mean() == pytest.approx(0, abs=0.06)


@pytest.mark.parametrize("name", ["gain", "offset"])
def test_gain_or_offset_alone(name):
    patches = ramps(4, 1)
    gain, offset = fitted(grey_values(patches, seeded(), **{name: 0.5}), patches)
    still = offset if name == "gain" else gain - 1
    moved = gain - 1 if name == "gain" else offset
    assert still.abs().max() < 1e-5
    assert moved.abs().min() > 1e-3


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_channels_may_draw_a_share_of_their_own(share):
    patches = ramps(800, 2)
    result = grey_values(patches, seeded(), gain=0.4, offset=0.3, channel_share=share)
    for drawn, spread in zip(
        fitted(result, patches), (0.4 / math.sqrt(3), 0.3), strict=True
    ):
        apart = (drawn[:, 0] - drawn[:, 1]).std()
        assert apart == pytest.approx(share * spread * math.sqrt(2), rel=0.1)
        total = spread * math.hypot(share, 1 - share)
        assert drawn[:, 0].std() == pytest.approx(total, rel=0.1)


def test_gamma_bends_each_patch_and_keeps_its_ends():
    patches = ramps(300, 1)
    patches[1::2] *= 7
    result = grey_values(patches, seeded(), gamma=0.5)
    low, high = patches.amin((1, 2, 3)), patches.amax((1, 2, 3))
    torch.testing.assert_close(result.amin((1, 2, 3)), low)
    torch.testing.assert_close(result.amax((1, 2, 3)), high)
    flat = result.flatten(1)
    assert (flat.diff(dim=1) > 0).all()
    unit = (flat - low[:, None]) / (high - low)[:, None]
    power = unit[:, 7].log() / math.log(7 / 15)
    torch.testing.assert_close(
        unit[:, 11].log() / math.log(11 / 15), power, atol=1e-3, rtol=0
    )
    assert power.log().abs().max() <= 0.5 + 1e-3
    assert power.log().max() > 0.48
    assert power.log().min() < -0.48


def test_gamma_of_a_flat_patch_is_the_patch():
    patches = torch.full((2, 1, 3, 3), 4.0)
    assert torch.equal(grey_values(patches, seeded(), gamma=0.5), patches)


def test_gamma_comes_before_gain_and_offset():
    patches = ramps(5, 1)
    bent = grey_values(patches, seeded(4), gamma=0.5)
    both = grey_values(patches, seeded(4), gamma=0.5, gain=0.4, offset=0.3)
    fitted(both, bent)


def test_noise_has_a_strength_of_its_own_in_each_patch():
    patches = torch.ones(200, 1, 32, 32)
    spread = (grey_values(patches, seeded(), noise=0.5) - patches).std((1, 2, 3))
    assert spread.max() <= 0.55
    assert spread.max() > 0.45
    assert spread.min() < 0.05
    assert spread.mean() == pytest.approx(0.25, abs=0.05)
    grain = grey_values(patches, seeded(), noise=0.5) - patches
    assert grain.mean() == pytest.approx(0, abs=0.01)
    assert grain[0, 0, 0].std() > 0


def test_grey_values_repeat_with_the_seed_and_keep_their_input():
    patches = ramps(3, 2)
    before = patches.clone()
    settings_ = {"gain": 0.3, "offset": 0.2, "gamma": 0.3, "noise": 0.1}
    first = grey_values(patches, seeded(1), **settings_)
    assert torch.equal(first, grey_values(patches, seeded(1), **settings_))
    assert not torch.equal(first, grey_values(patches, seeded(2), **settings_))
    assert torch.equal(patches, before)
