"""3-D ResNets: plain, (2+1)-D, with squeeze and recursion (SRTG), with FAST convolutions.

Source: network/srtg_resnet.py of the SRTG author's repository at its last version (November 2020), whose bottleneck
has an expansion of 1: no block widens its channels.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from ..layers import FASTConv3d, SqueezeRecursion
from .net import Head, Layer, Size3, Stem, VideoNet, check_choice, stem_pool, with_options

# Blocks of each stage, and whether they are bottlenecks.
DEPTHS = {18: ((2, 2, 2, 2), False), 34: ((3, 4, 6, 3), False), 50: ((3, 4, 6, 3), True), 101: ((3, 4, 23, 3), True)}
PLACEMENTS = ('start', 'top', 'mid', 'end', 'res', 'final')
WIDTHS = (64, 128, 256, 512)


class Conv2Plus1d(nn.Module):
    """A k x k x k convolution as one in space, (1, k, k), norm, activation, and one in time, (k_t, 1, 1).

    Shape:
        (N, in_channels, T, H, W) -> (N, out_channels, T', H', W').
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int | Size3 = 1, *, mid_channels: int,
                 norm: Layer, activation: Layer, kernel_size: int = 3) -> None:
        super().__init__()
        time, height, width = (stride,) * 3 if isinstance(stride, int) else stride
        pad = kernel_size // 2
        self.spatial = nn.Conv3d(in_channels, mid_channels, (1, kernel_size, kernel_size), (1, height, width),
                                 (0, pad, pad), bias=False)
        self.norm = norm(num_features=mid_channels)
        self.activation = activation()
        self.temporal = nn.Conv3d(mid_channels, out_channels, (3, 1, 1), (time, 1, 1), (1, 0, 0), bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.temporal(self.activation(self.norm(self.spatial(input))))


class ResBlock(nn.Module):
    """A residual block with a recursion in one of six places.

    ::

        x -> [start] -+-> conv1, norm1, act -> [top] -> conv2, norm2, act -> [mid] -> conv3, norm3 -> [end] -+
                      |                                                                                      v
                      +-> downsample -> [res] -------------------------------------------------------------> +
                                                                                      out <- [final] <- act <-

    Simple blocks have no conv3: theirs is conv1, norm1, act, [mid], conv2, norm2, [end], and there is no 'top'.
    ``conv(in_channels, out_channels, stride, block_channels)`` makes the convolutions in space and time; the last is
    the block's ``in_channels``.

    Shape:
        (N, in_channels, T, H, W) -> (N, channels, ceil(T / stride), ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, *, conv: Layer, bottleneck: bool, norm: Layer,
                 activation: Layer, recursion: Layer | None, placement: str | None) -> None:
        super().__init__()
        if bottleneck:
            convs = [pointwise(in_channels, channels), conv(channels, channels, stride, in_channels),
                     pointwise(channels, channels)]
        else:
            convs = [conv(in_channels, channels, stride, in_channels), conv(channels, channels, 1, in_channels)]
        self.depth = len(convs)
        for index, layer in enumerate(convs, 1):
            self.add_module(f'conv{index}', layer)
            self.add_module(f'norm{index}', norm(num_features=channels))
        self.activation = activation()
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(pointwise(in_channels, channels, stride), norm(num_features=channels))
        self.placement = placement if recursion else None
        self.recursion = recursion(in_channels if placement == 'start' else channels) if recursion else None

    def recurse(self, x: Tensor, place: str) -> Tensor:
        return self.recursion(x) if self.recursion is not None and place == self.placement else x

    def forward(self, input: Tensor) -> Tensor:
        x = input = self.recurse(input, 'start')
        places = ('top', 'mid', 'end')[3 - self.depth:]
        for index, place in enumerate(places, 1):
            x = self.get_submodule(f'norm{index}')(self.get_submodule(f'conv{index}')(x))
            x = self.recurse(x if index == self.depth else self.activation(x), place)
        skip = input if self.downsample is None else self.downsample(input)
        return self.recurse(self.activation(x + self.recurse(skip, 'res')), 'final')


def pointwise(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, 1, stride, bias=False)


def spacetime(in_channels: int, out_channels: int, stride: int, block_channels: int) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, 3, stride, 1, bias=False)


def stem_conv(in_channels: int, out_channels: int) -> nn.Conv3d:
    """The first convolution: 3 frames, 7 x 7 cells, which halves rows and columns."""
    return nn.Conv3d(in_channels, out_channels, (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)


def create_srtg_resnet(
    *,
    # Input and output configs.
    input_channel: int = 3,
    model_depth: int = 50,
    model_num_class: int = 400,
    dropout_rate: float = 0.0,
    # Convolution configs.
    convolution: str = '3d',
    widths: Sequence[int] = WIDTHS,
    # Pooling configs.
    pool: str = 'max',
    # Recursion configs.
    placement: str | None = 'final',
    recurrent: str = 'lstm',
    gate: str | None = None,
    # Norm and activation configs.
    norm: Layer = nn.BatchNorm3d,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    activation: Layer = nn.ReLU,
) -> VideoNet:
    """A 3-D or (2+1)-D ResNet, with squeeze and recursion in each block.

    Args:
        input_channel: Channels of the clips.
        model_depth: 18 or 34 (simple blocks), 50 or 101 (bottlenecks without expansion).
        model_num_class: Classes; 0 for pooled features instead of logits.
        dropout_rate: Of the pooled features.

        convolution: '3d', or '2plus1d' for convolutions in space and then in time.
        widths: Channels of the four stages; the stem has those of the first.

        pool: 'max' or 'soft', behind the first convolution.

        placement: Where in a block the recursion stands: 'start', 'top' (bottlenecks only), 'mid', 'end', 'res',
            'final'; None for the plain network. The author's code cannot run 'start' nor 'res' and his released
            networks have 'final'.
        recurrent: 'lstm' or 'gru'.
        gate: None, 'or' or 'and': see :class:`~video_plugins.layers.SqueezeRecursion`.

        norm: Called with ``num_features=, eps=, momentum=``.
        norm_eps: Given to the norms.
        norm_momentum: Given to the norms.
        activation: Called without arguments.

    Returns:
        Blocks ``[stem, stage 1 .. 4, head]``: (N, input_channel, T, H, W) -> logits (N, model_num_class), for T of
        1 frame and more.

    Raises:
        ValueError: If an argument is none of its choices.
    """
    check_choice('convolution', convolution, ('3d', '2plus1d'))
    check_choice('placement', placement, (None, *PLACEMENTS))
    check_widths(widths)
    norm = with_options(norm, norm_eps, norm_momentum)
    factorised = partial(Conv2Plus1d, norm=norm, activation=activation)

    def factorised_conv(in_channels: int, out_channels: int, stride: int, block_channels: int) -> nn.Module:
        # The weights of a 3 x 3 x 3 convolution of the block's input, in all of the block's convolutions.
        mid = 27 * block_channels * out_channels // (9 * block_channels + 3 * out_channels)
        return factorised(in_channels, out_channels, stride, mid_channels=mid)

    first_conv: nn.Module
    conv: Layer
    if convolution == '3d':
        first_conv, conv = stem_conv(input_channel, widths[0]), spacetime
    else:
        # 45 of 64 in the author's code.
        first_conv = factorised(input_channel, widths[0], (1, 2, 2), mid_channels=-(-45 * widths[0] // 64),
                                kernel_size=7)
        conv = factorised_conv
    recursion = None if placement is None else partial(SqueezeRecursion, recurrent=recurrent, gate=gate)
    return _create_resnet(first_conv, conv, model_depth, widths, model_num_class, dropout_rate, pool, norm, activation,
                          recursion, placement)


def create_fast_resnet(
    *,
    # Input and output configs.
    input_channel: int = 3,
    model_depth: int = 50,
    model_num_class: int = 400,
    dropout_rate: float = 0.0,
    # Convolution configs.
    parallel: bool = False,
    fuse: str = 'sum',
    widths: Sequence[int] = WIDTHS,
    # Pooling configs.
    pool: str = 'max',
    # Norm and activation configs.
    norm: Layer = nn.BatchNorm3d,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    activation: Layer = nn.ReLU,
) -> VideoNet:
    """A ResNet with FAST convolutions in place of its 3 x 3 x 3 ones: a reconstruction.

    No code of these networks was released; stem, blocks and widths are those of :func:`create_srtg_resnet`.

    Args:
        input_channel: Channels of the clips.
        model_depth: 18, 34, 50 or 101.
        model_num_class: Classes; 0 for pooled features instead of logits.
        dropout_rate: Of the pooled features.

        parallel: See :class:`~video_plugins.layers.FASTConv3d`.
        fuse: 'sum' or 'cat' of the parallel branches.
        widths: Channels of the four stages; the stem has those of the first.

        pool: 'max' or 'soft', behind the first convolution.

        norm: Called with ``num_features=, eps=, momentum=``.
        norm_eps: Given to the norms.
        norm_momentum: Given to the norms.
        activation: Called without arguments.

    Returns:
        Blocks ``[stem, stage 1 .. 4, head]``: (N, input_channel, T, H, W) -> logits (N, model_num_class), for T of
        1 frame and more.

    Raises:
        ValueError: If an argument is none of its choices.
    """
    check_widths(widths)
    norm = with_options(norm, norm_eps, norm_momentum)

    def conv(in_channels: int, out_channels: int, stride: int, block_channels: int) -> nn.Module:
        return FASTConv3d(in_channels, out_channels, stride=stride, parallel=parallel, fuse=fuse, norm=norm,
                          activation=activation)

    return _create_resnet(stem_conv(input_channel, widths[0]), conv, model_depth, widths, model_num_class,
                          dropout_rate, pool, norm, activation)


def _create_resnet(first_conv: nn.Module, conv: Layer, depth: int, widths: Sequence[int], num_classes: int,
                   dropout_rate: float, pool: str, norm: Layer, activation: Layer, recursion: Layer | None = None,
                   placement: str | None = None) -> VideoNet:
    check_choice('model_depth', depth, tuple(DEPTHS))
    counts, bottleneck = DEPTHS[depth]
    if placement == 'top' and not bottleneck:
        raise ValueError(f"placement 'top' needs bottlenecks, model_depth 50 or 101, got {depth}")
    block = partial(ResBlock, conv=conv, bottleneck=bottleneck, norm=norm, activation=activation, recursion=recursion,
                    placement=placement)
    stem = Stem(first_conv, norm(num_features=widths[0]), activation(), stem_pool(pool, time=True))
    return VideoNet([stem, *create_stages(block, counts, widths), Head(widths[-1], num_classes, dropout_rate)])


def check_widths(widths: Sequence[int]) -> None:
    """Raises ValueError if ``widths`` are not those of four stages."""
    if len(widths) != len(WIDTHS) or min(widths) < 1:
        raise ValueError(f'widths must be {len(WIDTHS)} positive numbers of channels, got {widths!r}')


def create_stages(block: Layer, counts: Sequence[int], widths: Sequence[int]) -> list[nn.Sequential]:
    """Stages of ``block(in_channels, channels, stride)``: the first block of all stages but the first has stride 2."""
    stages, in_channels = [], widths[0]
    for index, (count, channels) in enumerate(zip(counts, widths)):
        strides = [2 if index else 1, *[1] * (count - 1)]
        stages.append(nn.Sequential(*(block(channels if position else in_channels, channels, stride)
                                      for position, stride in enumerate(strides))))
        in_channels = channels
    return stages
