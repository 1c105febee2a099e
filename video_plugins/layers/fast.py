"""FAST 3-D convolutions: Fractioned Adjacent Spatial and Temporal (A. Stergiou, R. Poppe, ICMLA 2019, 1909.13474).

A reconstruction: no code was ever released. The abstract states the order of the three convolutions and that there is a
form with two of them side by side; a figure of the author shows their planes. The widths, the norms and activations
between them, the strides and how the parallel branches are fused are not stated and chosen here.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Layer = Callable[..., nn.Module]


class FASTConv3d(nn.Module):
    """A k x k x k convolution decomposed into three planes (a reconstruction, see the module's docstring).

    ::

        sequential:  space (1,k,k) -> norm, activation -> horizontal (k,1,k) -> norm, activation -> vertical (k,k,1)

                                                       +-> horizontal (k,1,k) -+
        parallel:    space (1,k,k) -> norm, activation |                       |-> sum, or concatenation
                                                       +-> vertical (k,k,1) ---+

    The sequential form of C -> C channels has 27 C^2 weights for k = 3, as many as the plain convolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output, and between the convolutions.
        kernel_size: k, odd, so that the map keeps its size at stride 1.
        stride: Of space and time alike, or (time, rows, columns). Space is strided by the first convolution, time by
            the first one that sees it (both branches of the parallel form).
        parallel: Horizontal and vertical side by side instead of in a sequence.
        fuse: 'sum' of the branches, or 'cat', where each has half of the channels.
        norm: Called with ``num_features=``; None for no norms.
        activation: Called without arguments; None for no activations.
        bias: Whether the convolutions have biases.

    Shape:
        (N, in_channels, T, H, W) -> (N, out_channels, ceil(T / s_t), ceil(H / s_h), ceil(W / s_w)).

    Raises:
        ValueError: If `kernel_size` is even, `fuse` is another word, or half of one channel is asked for.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3,
                 stride: int | tuple[int, int, int] = 1, *, parallel: bool = False, fuse: str = 'sum',
                 norm: Layer | None = nn.BatchNorm3d, activation: Layer | None = nn.ReLU, bias: bool = False) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}')
        if fuse not in ('sum', 'cat'):
            raise ValueError(f"fuse must be 'sum' or 'cat', got {fuse!r}")
        if parallel and fuse == 'cat' and out_channels < 2:
            raise ValueError(f"fuse='cat' needs out_channels of at least 2, got {out_channels}")
        k, pad = kernel_size, kernel_size // 2
        time, height, width = (stride,) * 3 if isinstance(stride, int) else stride
        self.parallel = parallel
        self.fuse = fuse

        def between() -> nn.Sequential:
            layers = [norm and norm(num_features=out_channels), activation and activation()]
            return nn.Sequential(*filter(None, layers))

        horizontal = vertical = out_channels
        if parallel and fuse == 'cat':
            horizontal, vertical = out_channels - out_channels // 2, out_channels // 2
        self.space = nn.Conv3d(in_channels, out_channels, (1, k, k), (1, height, width), (0, pad, pad), bias=bias)
        self.after_space = between()
        self.horizontal = nn.Conv3d(out_channels, horizontal, (k, 1, k), (time, 1, 1), (pad, 0, pad), bias=bias)
        self.after_horizontal = None if parallel else between()
        self.vertical = nn.Conv3d(out_channels, vertical, (k, k, 1), (time if parallel else 1, 1, 1), (pad, pad, 0),
                                  bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        x = self.after_space(self.space(input))
        if self.after_horizontal is not None:
            return self.vertical(self.after_horizontal(self.horizontal(x)))
        horizontal, vertical = self.horizontal(x), self.vertical(x)
        return horizontal + vertical if self.fuse == 'sum' else torch.cat([horizontal, vertical], dim=1)

    def extra_repr(self) -> str:
        return f'parallel={self.parallel}' + f', fuse={self.fuse!r}' * self.parallel
