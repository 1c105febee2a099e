"""SoftPool as layers, to stand where `nn.MaxPool2d` or `nn.AvgPool2d` stood."""
from __future__ import annotations

from typing import Any

import torch
from timm.layers import pad_same, register_notrace_module
from torch import Tensor, nn

from .functional import Size, geometry, soft_pool
from .kernels import Window


class _SoftPool(nn.Module):
    ndim: int

    def __init__(self, kernel_size: Size = 2, stride: Size | None = None, padding: Size = 0,
                 ceil_mode: bool = False, *, detach_weights: bool = False) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = geometry(self.ndim, kernel_size, stride, padding)
        self.ceil_mode = ceil_mode
        self.detach_weights = detach_weights
        Window.make(self.kernel_size, self.stride, self.padding, ceil_mode)

    def forward(self, input: Tensor) -> Tensor:
        input = self._pad(input)
        if torch.jit.is_scripting():
            return torch.ops.timm_softpool.soft_pool(
                input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.detach_weights)
        return soft_pool(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.detach_weights)

    def _pad(self, input: Tensor) -> Tensor:
        return input

    def extra_repr(self) -> str:
        text = f'kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}'
        return text + ', ceil_mode=True' * self.ceil_mode + ', detach_weights=True' * self.detach_weights


class SoftPool1d(_SoftPool):
    """:func:`soft_pool1d` as a layer: (N, C, L) or (C, L) in, the same rank out."""

    ndim = 1


class SoftPool2d(_SoftPool):
    """:func:`soft_pool2d` as a layer: (N, C, H, W) or (C, H, W) in, the same rank out.

    It is an `aa_layer` of timm too, ``timm.create_model('resnet50', aa_layer=SoftPool2d)``: to such a layer timm
    gives ``channels``, ``device`` and ``dtype``, which a layer without parameters has no use for.
    """

    ndim = 2

    def __init__(self, kernel_size: Size = 2, stride: Size | None = None, padding: Size = 0,
                 ceil_mode: bool = False, *, detach_weights: bool = False, channels: int | None = None,
                 device: Any = None, dtype: Any = None) -> None:
        super().__init__(kernel_size, stride, padding, ceil_mode, detach_weights=detach_weights)


class SoftPool3d(_SoftPool):
    """:func:`soft_pool3d` as a layer: (N, C, T, H, W) or (C, T, H, W) in, the same rank out."""

    ndim = 3


@register_notrace_module
class SoftPool2dSame(SoftPool2d):
    """:class:`SoftPool2d` with TensorFlow's 'same' padding, which depends on the size of the input.

    The output has ``ceil(size / stride)`` cells on each axis, as that of timm's `MaxPool2dSame` and `AvgPool2dSame`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.padding = (0, 0)  # the argument has no effect in timm's pools either

    def _pad(self, input: Tensor) -> Tensor:
        return pad_same(input, list(self.kernel_size), list(self.stride), value=-float('inf'))
