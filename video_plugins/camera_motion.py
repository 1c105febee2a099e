"""Synthetic motion on real photographs: a camera that pans, zooms or rotates over a still picture.

The clips need no data set of videos, and their class is in the motion alone: where a clip starts, how large its view
is and how fast it moves are drawn before the class is looked at, so that the first frames of all classes have the same
distribution, and opposite motions are mirror images of each other.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# What the camera does: pictures move the other way. Of each, how the view changes at speed 1: right and down in
# views, the logarithm of its size, and clockwise in radians.
CAMERA_MOTIONS: dict[str, tuple[float, float, float, float]] = {
    'pan left': (-1, 0, 0, 0),
    'pan right': (1, 0, 0, 0),
    'pan up': (0, -1, 0, 0),
    'pan down': (0, 1, 0, 0),
    'zoom in': (0, 0, -1, 0),
    'zoom out': (0, 0, 1, 0),
    'rotate clockwise': (0, 0, 0, 1),
    'rotate counterclockwise': (0, 0, 0, -1),
}

# The view's side at the start, as a part of the photograph's short side; its tilt in radians, either way; and the
# speed, which is the motion between the first and the last frame.
SIDES, TILT, SPEEDS = (0.25, 0.42), 0.35, (0.05, 0.4)


def camera_motion(image: Tensor, motion: str, num_frames: int, size: int,
                  generator: torch.Generator | None = None) -> Tensor:
    """A clip of a photograph under a camera motion.

    The view is a square. At the start it has a side of 0.25 to 0.42 of the photograph's short side, a tilt of up to
    0.35 radians, and a place from which no motion leaves the photograph. Until the last frame it moves evenly by
    v = 0.05 to 0.4: v views aside, e^v times its size, or v radians. All of these are drawn from uniform
    distributions, the same ones and in the same order for every motion.

    Args:
        image: float (3, H, W).
        motion: One of `CAMERA_MOTIONS`: what the camera does.
        num_frames: T, the frames of the clip.
        size: Rows and columns of a frame.
        generator: Where the random numbers come from; the same state gives every motion the same first frame.

    Returns:
        (3, T, size, size) of the image's type.

    Raises:
        TypeError: If the image is not floating-point.
        ValueError: If it has another shape, the motion is unknown, or there are no frames or cells.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        raise ValueError(f'image must have the shape (3, H, W), got {tuple(image.shape)}')
    if not image.is_floating_point():
        raise TypeError(f'image must be floating-point, got {image.dtype}')
    if motion not in CAMERA_MOTIONS:
        raise ValueError(f'motion must be one of {", ".join(CAMERA_MOTIONS)}, got {motion!r}')
    for name, value in (('num_frames', num_frames), ('size', size)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1, got {value}')
    short = min(image.shape[1:])
    if short > 3 * size:  # else the largest views would skip pixels
        scale = 3 * size / short
        image = F.interpolate(image[None], [round(length * scale) for length in image.shape[1:]], mode='bilinear',
                              antialias=True)[0]
    height, width = image.shape[1:]
    draw = torch.rand(5, generator=generator, dtype=torch.float64, device='cpu').tolist()
    side = min(height, width) * (SIDES[0] + (SIDES[1] - SIDES[0]) * draw[0])
    tilt = TILT * (2 * draw[1] - 1)
    speed = SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * draw[2]
    # The farthest that any motion reaches from where it starts: a corner of the tilted view after a zoom or a turn,
    # or its edge after a pan.
    reach = side * max(math.exp(speed) / math.sqrt(2), speed + math.sin(math.pi / 4 + abs(tilt)) / math.sqrt(2))
    start = [length / 2 + (length / 2 - reach) * (2 * part - 1) for length, part in zip((width, height), draw[3:])]
    time = torch.linspace(0, speed, num_frames, dtype=torch.float64)
    right, down, growth, turn = CAMERA_MOTIONS[motion]
    angle, sides = tilt + turn * time, side * torch.exp(growth * time)
    cos, sin = torch.cos(angle), torch.sin(angle)
    x = start[0] + side * time * (right * cos - down * sin)
    y = start[1] + side * time * (right * sin + down * cos)
    # From cells of the view in -1..1 to those of the photograph, as `F.grid_sample` takes them.
    theta = torch.stack([
        torch.stack([sides * cos / width, -sides * sin / width, 2 * x / width - 1], -1),
        torch.stack([sides * sin / height, sides * cos / height, 2 * y / height - 1], -1)], 1).to(image)
    grid = F.affine_grid(theta, [num_frames, 3, size, size], align_corners=False)
    frames = F.grid_sample(image.expand(num_frames, -1, -1, -1), grid, padding_mode='border', align_corners=False)
    return frames.transpose(0, 1)
