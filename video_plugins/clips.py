"""Clips of a video file as the networks take them: sampled by time, scaled, cut out and normalised."""
from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from fractions import Fraction
from importlib import import_module
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from timm_softpool.functional import to_tuple

from .hub import VideoCfg

# Imported when they are needed: neither is needed for the networks.
DECODERS = {'pyav': '.decode', 'torchcodec': '.decode_torchcodec'}


def load_clip(path: str | os.PathLike[str], num_frames: int = 16, frame_stride: float = 2,
              size: int | Sequence[int] = 224, start: float = 0.0, **transform: Any) -> Tensor:
    """One clip of a video, (1, 3, T, H, W), from `start` seconds on; for the rest see :func:`load_clips`."""
    return load_clips(path, [start], num_frames, frame_stride, size, **transform)


def load_clips(path: str | os.PathLike[str], starts: int | Sequence[float] = 5, num_frames: int = 16,
               frame_stride: float = 2, size: int | Sequence[int] = 224, *, crop_pct: float = 1.0,
               interpolation: str = 'bilinear', mean: Sequence[float] = VideoCfg.mean,
               std: Sequence[float] = VideoCfg.std, decoder: str = 'pyav') -> Tensor:
    """Some clips of a video, decoded in one go.

    Frame i of a clip is the one nearest to the moment ``start + i * frame_stride / rate`` seconds after the first frame
    of the video, where ``rate`` is the container's average number of frames per second. At a variable rate, it is the
    one shown half of ``1 / rate`` after that moment, so that the moments are evenly spaced though frames are not. A
    clip that reaches beyond the end of the video repeats the last frame; a still image is a video of one frame.

    A frame is turned upright as its metadata says, its pixels are made square, and it is scaled, with antialiasing and
    in 8 bits, so that it just covers ``floor(size / crop_pct)``; its centre of `size` is cut out. Grey becomes RGB,
    more than 8 bits become 8, and transparency is ignored. The values in 0..1 become ``(value - mean) / std``.

    What is not needed is sought over, to the last keyframe before a clip, rather than decoded, if it is longer than two
    seconds. Only what was cut out is kept, in 8 bits.

    Args:
        path: A file that FFmpeg can read.
        starts: When each clip begins, in seconds after the first frame of the video; or the number of clips, which are
            then spread evenly: the first begins with the video, the last ends with it, and a single one is its middle.
        num_frames: T, the frames of a clip.
        frame_stride: The distance between two frames of a clip, in frames of the video at its average rate.
        size: H and W, one number for both.
        crop_pct: The part of the scaled frame's short side that `size` is, at most 1.
        interpolation: 'bilinear', 'bicubic', or another name of torchvision's `InterpolationMode`.
        mean: Of red, green and blue in 0..1; by default that of our networks' configurations.
        std: The standard deviation, likewise.
        decoder: 'pyav', or 'torchcodec', which needs an FFmpeg of its own and gives the same pixels for ordinary MP4
            and WebM files (`decode_torchcodec` tells for which it does not).

    Returns:
        float32 (N, 3, T, H, W), clips in the order of `starts`.

    Raises:
        ImportError: If the decoder is missing.
        OSError: If the file cannot be opened.
        TypeError: If `num_frames`, `size` or a number of clips is no integer.
        ValueError: If an argument has a bad value, a start is not in the video, or the file has no video that can be
            decoded, or its frames are missing or damaged where they are needed. Damage elsewhere does no harm. What
            FFmpeg conceals without a word is not noticed.
    """
    num_frames, height, width = operator.index(num_frames), *to_tuple(2, 'size', size)
    for name, value in (('num_frames', num_frames), ('frame_stride', frame_stride), ('size', min(height, width)),
                        ('crop_pct', crop_pct), *(('std', value) for value in std)):
        if not 0 < value < math.inf:
            raise ValueError(f'{name} must be positive and finite, got {value!r}')
    if crop_pct > 1:
        raise ValueError(f'crop_pct must be at most 1, got {crop_pct!r}')
    for name, values in (('mean', mean), ('std', std)):
        if len(values) != 3:
            raise ValueError(f'{name} must have a number for each of red, green and blue, got {values!r}')
    mode = InterpolationMode(interpolation)
    if decoder not in DECODERS:
        raise ValueError(f'decoder must be one of {", ".join(DECODERS)}, got {decoder!r}')
    with import_module(DECODERS[decoder], __package__).Video(path) as video:
        step = frame_stride / video.rate
        begins = list(starts) if isinstance(starts, Sequence) else _spread(
            operator.index(starts), video.duration - (num_frames - 1) * step - 1 / video.rate)
        if not begins or not all(0 <= begin < math.inf for begin in begins):
            raise ValueError(f'starts must be moments of the video, from 0 s on, or a positive number of clips, '
                             f'got {starts!r}')
        moments = sorted((begin + frame * step, clip, frame) for clip, begin in enumerate(begins)
                         for frame in range(num_frames))
        clips = torch.empty(len(begins), num_frames, 3, height, width, dtype=torch.uint8)
        known = None
        for (_, clip, frame), picture in zip(moments, video.pictures(moment for moment, _, _ in moments)):
            if picture is not known:
                known, cut = picture, _cut(picture.pixels, picture.aspect, (height, width), crop_pct, mode)
            clips[clip, frame] = cut
        if video.end is not None and max(begins) >= video.end:
            raise ValueError(f'start must be less than the duration of {video.path}, {video.end:.3f} s, '
                             f'got {max(begins)!r}')
    return transforms.normalize(clips.float() / 255, list(mean), list(std)).transpose(1, 2).contiguous()


def clip_config(model: nn.Module) -> dict[str, Any]:
    """What the configuration of a network for clips, ``model.pretrained_cfg``, says to :func:`load_clips`.

    Raises:
        ValueError: If the network is not one for clips.
    """
    cfg: Any = getattr(model, 'pretrained_cfg', {})
    if not cfg.get('num_frames'):
        raise ValueError(f'model must be a network for clips, with num_frames in its pretrained_cfg, got '
                         f'{cfg.get("architecture") or type(model).__name__}')
    data = resolve_model_data_config(model)
    return {'num_frames': cfg['num_frames'], 'frame_stride': cfg['frame_stride'], 'size': data['input_size'][1:],
            **{key: data[key] for key in ('crop_pct', 'interpolation', 'mean', 'std')}}


def _spread(count: int, last: float) -> list[float]:
    last = max(last, 0.0)
    return [last / 2] if count == 1 else [last * clip / (count - 1) for clip in range(count)]


def _cut(pixels: Tensor, aspect: float, size: tuple[int, int], crop_pct: float, mode: InterpolationMode) -> Tensor:
    height, width = pixels.shape[-2], pixels.shape[-1] * Fraction(aspect)
    cover = [math.floor(side / crop_pct) for side in size]
    scale = max(Fraction(cover[0], height), cover[1] / width)
    scaled = transforms.resize(pixels, [int(height * scale), int(width * scale)], mode, antialias=True)
    return transforms.center_crop(scaled, list(size))
