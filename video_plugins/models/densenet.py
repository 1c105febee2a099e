"""DenseNet with FAST convolutions: a reconstruction, as no code of it was released (ICMLA 2019, 1909.13474)."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import FASTConv3d
from ..layers.mtconv import halve
from .net import Head, Layer, Stem, VideoNet, stem_pool, with_options
from .resnet import pointwise, stem_conv

GROWTH = 32
BOTTLENECK = 4  # the 1 x 1 x 1 convolution of a layer gives this many times the growth


class DenseLayer(nn.Sequential):
    """Norm, activation, 1 x 1 x 1 convolution, norm, activation, FAST convolution; the input stays in front.

    Shape:
        (N, in_channels, T, H, W) -> (N, in_channels + 32, T, H, W).
    """

    def __init__(self, in_channels: int, conv: Layer, norm: Layer, activation: Layer) -> None:
        width = BOTTLENECK * GROWTH
        super().__init__(OrderedDict(
            norm1=norm(num_features=in_channels), activation1=activation(), conv1=pointwise(in_channels, width),
            norm2=norm(num_features=width), activation2=activation(), conv2=conv(width, GROWTH)))

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([input, super().forward(input)], dim=1)


class Halve(nn.Module):
    """Average pool of 2 frames, rows and columns, of an axis of one cell that cell."""

    def forward(self, input: Tensor) -> Tensor:
        return halve(input, time=True)


def create_fast_densenet(
    *,
    # Input and output configs.
    input_channel: int = 3,
    depths: Sequence[int] = (6, 12, 24, 16),
    model_num_class: int = 400,
    dropout_rate: float = 0.0,
    # Convolution configs.
    parallel: bool = False,
    fuse: str = 'sum',
    # Pooling configs.
    pool: str = 'max',
    # Norm and activation configs.
    norm: Layer = nn.BatchNorm3d,
    norm_eps: float = 1e-5,
    norm_momentum: float = 0.1,
    activation: Layer = nn.ReLU,
) -> VideoNet:
    """A DenseNet whose 3 x 3 convolutions are FAST ones: a reconstruction.

    Depths, growth and widths are those of the 2-D DenseNet-121; the stem is that of the 3-D ResNets, and transitions
    halve frames, rows and columns (not an axis of one cell).

    Args:
        input_channel: Channels of the clips.
        depths: Dense layers of each stage.
        model_num_class: Classes; 0 for pooled features instead of logits.
        dropout_rate: Of the pooled features.

        parallel: See :class:`~video_plugins.layers.FASTConv3d`.
        fuse: 'sum' or 'cat' of the parallel branches.

        pool: 'max' or 'soft', behind the first convolution.

        norm: Called with ``num_features=, eps=, momentum=``.
        norm_eps: Given to the norms.
        norm_momentum: Given to the norms.
        activation: Called without arguments.

    Returns:
        Blocks ``[stem, stages..., head]``: (N, input_channel, T, H, W) -> logits (N, model_num_class), for T of 1 frame
        and more.

    Raises:
        ValueError: If an argument is none of its choices.
    """
    norm = with_options(norm, norm_eps, norm_momentum)

    def conv(in_channels: int, out_channels: int) -> nn.Module:
        return FASTConv3d(in_channels, out_channels, parallel=parallel, fuse=fuse, norm=norm, activation=activation)

    channels = 2 * GROWTH
    stem = Stem(stem_conv(input_channel, channels), norm(num_features=channels), activation(),
                stem_pool(pool, time=True))
    stages = []
    for index, depth in enumerate(depths):
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(DenseLayer(channels, conv, norm, activation))
            channels += GROWTH
        layers += [norm(num_features=channels), activation()]
        if index < len(depths) - 1:
            layers += [pointwise(channels, channels // 2), Halve()]
            channels //= 2
        stages.append(nn.Sequential(*layers))
    return VideoNet([stem, *stages, Head(channels, model_num_class, dropout_rate)])
