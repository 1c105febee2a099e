"""Synthetic motion on real photographs: what the camera does is what is asked, and the first frame tells nothing."""
import math

import pytest
import torch

from video_plugins import CAMERA_MOTIONS, camera_motion
from video_plugins.camera_motion import SIDES, SPEEDS, TILT

SIZE, HEIGHT, WIDTH = 16, 40, 48


def views(motion, seed, num_frames=5, height=HEIGHT, width=WIDTH):
    """Of each frame, where its middle is, its side, and its tilt: read from a picture of its own coordinates.

    The picture is affine in its coordinates, and so is a frame that nowhere leaves it.
    """
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing='ij')
    picture = torch.stack([x, y, torch.zeros_like(x)]).double()
    clip = camera_motion(picture, motion, num_frames, SIZE, torch.Generator().manual_seed(seed))
    v, u = torch.meshgrid(*[torch.arange(SIZE).double() + 0.5 - SIZE / 2] * 2, indexing='ij')
    design = torch.stack([u.flatten(), v.flatten(), torch.ones(SIZE ** 2)], 1)
    result = []
    for frame in clip.transpose(0, 1):
        fit = torch.linalg.lstsq(design, frame[:2].flatten(1).T).solution  # rows: along u, along v, middle
        torch.testing.assert_close(design @ fit, frame[:2].flatten(1).T, rtol=0, atol=1e-9)
        torch.testing.assert_close(fit[1], torch.stack([-fit[0, 1], fit[0, 0]]), rtol=0, atol=1e-9)  # no shear
        result.append((fit[2, 0].item(), fit[2, 1].item(), SIZE * fit[0].norm().item(),
                       math.atan2(fit[0, 1], fit[0, 0])))
    return torch.tensor(result)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('motion', CAMERA_MOTIONS)
def test_the_camera_does_what_the_motion_says_and_stays_inside_the_photograph(motion, seed):
    x, y, side, tilt = views(motion, seed).double().T
    right, down, growth, turn = CAMERA_MOTIONS[motion]
    dx, dy = x[-1] - x[0], y[-1] - y[0]
    cos, sin = torch.cos(tilt[0]), torch.sin(tilt[0])
    moved = torch.stack([(dx * cos + dy * sin) / side[0], (dy * cos - dx * sin) / side[0],
                         torch.log(side[-1] / side[0]), tilt[-1] - tilt[0]])
    speed = moved.norm()
    assert SPEEDS[0] <= speed <= SPEEDS[1]
    torch.testing.assert_close(moved / speed, torch.tensor([right, down, growth, turn]).double(), rtol=0, atol=1e-5)


def test_a_photograph_of_any_shape_is_never_left():
    for motion in CAMERA_MOTIONS:
        for seed in range(20):
            views(motion, seed, height=40, width=40)  # is affine


@pytest.mark.parametrize('seed', range(5))
def test_the_first_frame_is_the_same_for_all_motions(seed):
    picture = torch.rand(3, HEIGHT, WIDTH)
    first = [camera_motion(picture, motion, 3, SIZE, torch.Generator().manual_seed(seed))[:, 0]
             for motion in CAMERA_MOTIONS]
    assert all(torch.equal(frame, first[0]) for frame in first)


def test_the_first_views_are_spread_evenly_about_the_middle_of_the_photograph():
    x, y, side, tilt = torch.cat([views('zoom in', seed, 1) for seed in range(400)]).T
    for value, middle in ((x, WIDTH / 2), (y, HEIGHT / 2), (tilt, 0), (side / HEIGHT, sum(SIDES) / 2)):
        assert abs(value.mean() - middle) < 4 * value.std() / math.sqrt(len(value))
    assert tilt.abs().max() <= TILT and SIDES[0] <= side.min() / HEIGHT and side.max() / HEIGHT <= SIDES[1]


def test_a_large_photograph_is_made_smaller_first():
    fine = torch.zeros(3, 400, 400)
    fine[:, ::2] = 1  # lines of one pixel, which would flicker
    clip = camera_motion(fine, 'pan up', 4, SIZE, torch.Generator().manual_seed(0))
    assert clip.std() < 0.05


def test_the_random_numbers_are_those_of_pytorch_without_a_generator():
    picture = torch.rand(3, 32, 32)
    clips = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        clips.append(camera_motion(picture, 'pan left', 2, 8))
    assert torch.equal(clips[0], clips[1]) and not torch.equal(clips[0], clips[2])


@pytest.mark.parametrize(('change', 'error', 'message'), [
    (dict(image=torch.rand(1, 3, 8, 8)), ValueError, r'image must have the shape \(3, H, W\), got \(1, 3, 8, 8\)'),
    (dict(image=torch.zeros(3, 8, 8, dtype=torch.uint8)), TypeError, 'image must be floating-point, got torch.uint8'),
    (dict(motion='roll'), ValueError, "motion must be one of pan left, .*, got 'roll'"),
    (dict(num_frames=0), ValueError, 'num_frames must be at least 1, got 0'),
    (dict(size=0), ValueError, 'size must be at least 1, got 0'),
])
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        camera_motion(**{**dict(image=torch.rand(3, 8, 8), motion='zoom in', num_frames=2, size=4), **change})
