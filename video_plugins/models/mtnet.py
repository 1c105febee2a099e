"""MTNet: residual networks of multi-temporal convolutions (A. Stergiou, R. Poppe, IJCNN 2021, 2011.03949).

Source: network/MTnet.py of the author's repository at its last version (January 2021). Two things differ where his
network cannot run: the choice of frames passes clips of two frames, and maps of one cell are not halved.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import MTConv3d, SqueezeRecursion, select_similar_frames
from ..layers.mtconv import Streams, halve, resize, split_channels
from .net import Head, Layer, Stem, VideoNet, stem_pool, with_options
from .resnet import WIDTHS, check_widths, create_stages, stem_conv


class PadToEven(nn.Module):
    """Repeats the last row and column of maps with an odd number of them."""

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[3:]
        return F.pad(input, (0, width % 2, 0, height % 2, 0, 0), mode='replicate') if height % 2 or width % 2 else input


class SplitStreams(nn.Module):
    """The short and the long stream: channels split by ``ratio``, the long one with half of the frames and cells.

    Shape:
        (N, C, T, H, W) -> (N, C_s, T // 2, H, W) and (N, C - C_s, T // 4, H // 2, W // 2); a stream of two frames and
        fewer keeps them.
    """

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, input: Tensor) -> Streams:
        input = select_similar_frames(input)
        short, long = input.split(split_channels(input.shape[1], self.ratio), dim=1)
        return short, select_similar_frames(halve(long))


class MTStem(Stem):
    """The stem, then the two streams."""

    def __init__(self, conv: nn.Module, norm: nn.Module, activation: nn.Module, pool: nn.Module, ratio: float) -> None:
        super().__init__(conv, norm, activation, nn.Sequential(PadToEven(), pool))
        self.split = SplitStreams(ratio)


def blur_single_frame(input: Tensor) -> Tensor:
    """The average of each 2 x 2 cells, where there is one frame: with it, a stride of 2 skips no cell."""
    frames, height, width = input.shape[2:]
    return F.avg_pool3d(input, (1, min(height, 2), min(width, 2)), 1) if frames == 1 else input


class MTBlock(nn.Module):
    """Four multi-temporal convolutions, a recursion of each stream, and the skip connection.

    ``conv1_1`` (1x1x1), ``conv1_2`` (1x1x1, back), ``conv2`` (3x3x3, strided), ``conv3`` (1x1x1 beside a downsampled
    skip connection, else 1x3x3), with an activation behind the first three. The downsampled skip connection of the long
    stream averages 2x2 cells once that stream has one frame, where the author's logits show it (at 16 frames, in the
    last stage); that the number of frames decides it, and not the stage, is inferred.

    Shape:
        (N, C_s, T, H, W) and (N, C_l, T', H', W') -> the same pair with the channels of the output, strided.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, width: float, groups: int, ratio: float,
                 recurrent: str, norm: Layer, activation: Layer) -> None:
        super().__init__()
        conv = partial(MTConv3d, ratio=ratio, norm=norm)
        inner = int(channels * width / groups)
        has_downsample = stride != 1 or in_channels != channels
        kernel, padding = (1, (0, 0, 0)) if has_downsample else ((1, 3, 3), (0, 1, 1))
        self.conv1_1 = conv(in_channels, inner, 1)
        self.conv1_2 = conv(inner, in_channels, 1)
        self.conv2 = conv(in_channels, inner, 3, stride, 1, groups=groups)
        self.conv3 = conv(inner, channels, kernel, 1, padding, groups=groups)
        self.downsample = conv(in_channels, channels, 1, stride, lateral=False) if has_downsample else None
        self.activation = activation()
        self.recursion_short, self.recursion_long = (
            SqueezeRecursion(c, recurrent=recurrent) for c in split_channels(channels, ratio))

    def forward(self, streams: Streams) -> Streams:
        skip = streams if self.downsample is None else self.downsample((streams[0], blur_single_frame(streams[1])))
        for conv in (self.conv1_1, self.conv1_2, self.conv2):
            short, long = conv(streams)
            streams = self.activation(short), self.activation(long)
        short, long = self.conv3(streams)
        short, long = self.recursion_short(short), self.recursion_long(long)
        return (self.activation(short + resize(skip[0], short.shape[2:])),
                self.activation(long + resize(skip[1], long.shape[2:])))


def create_mtnet(
    *,
    # Input and output configs.
    input_channel: int = 3,
    depths: Sequence[int] = (2, 2, 5, 3),
    model_num_class: int = 400,
    dropout_rate: float = 0.0,
    # Convolution configs.
    widths: Sequence[int] = WIDTHS,
    width_per_group: int = 64,
    groups: int = 1,
    ratio: float = 0.875,
    # Pooling configs.
    pool: str = 'max',
    # Recursion configs.
    recurrent: str = 'gru',
    # Norm and activation configs.
    norm: Layer = nn.BatchNorm3d,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    activation: Layer = nn.ReLU,
) -> VideoNet:
    """An MTNet.

    Args:
        input_channel: Channels of the clips.
        depths: Blocks of each of the four stages.
        model_num_class: Classes; 0 for pooled features instead of logits.
        dropout_rate: Of the pooled features.

        widths: Channels of the four stages; the stem has those of the first.
        width_per_group: A stage of C channels has inner convolutions of ``C * width_per_group / 64 / groups``.
        groups: Sub-streams of the last two convolutions of each block.
        ratio: Share of the channels in the short stream.

        pool: 'max' or 'soft', behind the first convolution.

        recurrent: 'gru' or 'lstm'.

        norm: Called with ``num_features=, eps=, momentum=``; where there are sub-streams, GroupNorm stands instead.
        norm_eps: Given to the norms.
        norm_momentum: Given to the norms.
        activation: Called without arguments.

    Returns:
        Blocks ``[stem, stage 1 .. 4, head]``: (N, input_channel, T, H, W) -> logits (N, model_num_class), for T of
        1 frame and more. Between the blocks pass pairs of streams.

    Raises:
        ValueError: If an argument is none of its choices, or channels do not divide into the sub-streams.
    """
    check_widths(widths)
    norm = with_options(norm, norm_eps, norm_momentum)
    block = partial(MTBlock, width=width_per_group / 64, groups=groups, ratio=ratio, recurrent=recurrent, norm=norm,
                    activation=activation)
    stem = MTStem(stem_conv(input_channel, widths[0]), norm(num_features=widths[0]), activation(),
                  stem_pool(pool, time=False), ratio)
    return VideoNet([stem, *create_stages(block, depths, widths), Head(widths[-1], model_num_class, dropout_rate)])
