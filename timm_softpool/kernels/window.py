"""The pooling window: argument rules and output size, those of ``torch.nn.functional.max_pool*``."""
from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def three_axes(values: Sequence[int], filler: int) -> list[int]:
    """The numbers of 1 to 3 axes as those of three, for the native kernels: (1, 1, L), (H, 1, W) or (D, H, W)."""
    return [[filler, filler, *values], [values[0], filler, values[-1]], [*values]][len(values) - 1]


class Window(NamedTuple):
    """One pooling geometry; a tuple holds one number for each spatial axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool = False

    @classmethod
    def make(cls, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], ceil_mode: bool) -> Window:
        """Check the arguments as `max_pool*` does. An empty ``stride`` stands for ``kernel_size``."""
        window = cls(tuple(kernel_size), tuple(stride) or tuple(kernel_size), tuple(padding), ceil_mode)
        if not 1 <= len(kernel_size) <= 3 or len({len(axis) for axis in window[:3]}) > 1:
            raise ValueError(f'kernel_size, stride and padding must have one number for each of 1 to 3 axes, got '
                             f'{list(kernel_size)}, {list(stride)} and {list(padding)}')
        for name, values in zip(('kernel_size', 'stride'), window[:2]):
            if min(values) < 1:
                raise ValueError(f'{name} must be at least 1, got {list(values)}')
        for pad, kernel in zip(window.padding, window.kernel_size):
            if not 0 <= pad <= kernel // 2:
                raise ValueError(f'padding must be between 0 and half of kernel_size, got padding={list(padding)} '
                                 f'for kernel_size={list(kernel_size)}')
        return window

    @property
    def ndim(self) -> int:
        return len(self.kernel_size)

    def output_size(self, input: Tensor) -> list[int]:
        """Spatial size of the output: ``floor((size + 2 * padding - kernel_size) / stride) + 1`` on each axis.

        With ``ceil_mode`` the division rounds up, unless the last window would start beyond the input and its left
        padding. Raises for an ``input`` that cannot be pooled.
        """
        n = self.ndim
        if input.dtype not in FLOATING:
            raise TypeError(f'input must be float16, bfloat16, float32 or float64, got {input.dtype}')
        if input.dim() not in (n + 1, n + 2):
            raise ValueError(f'input must be {n + 1}-D (unbatched) or {n + 2}-D (batched) for {n}-D pooling, got '
                             f'shape {tuple(input.shape)}')
        if any(size == 0 for size in input.shape[-n - 1:]):
            raise ValueError(f'input may be empty in its batch dimension only, got shape {tuple(input.shape)}')
        output = []
        for size, kernel, stride, pad in zip(input.shape[-n:], *self[:3]):
            out = (size + 2 * pad - kernel + (stride - 1 if self.ceil_mode else 0)) // stride + 1
            if self.ceil_mode and (out - 1) * stride >= size + pad:
                out -= 1
            if out < 1:
                raise ValueError(f'kernel_size {list(self.kernel_size)} with padding {list(self.padding)} is larger '
                                 f'than the input, shape {tuple(input.shape)}')
            output.append(out)
        return output

    def overlaps(self) -> bool:
        return any(kernel > stride for kernel, stride in zip(self.kernel_size, self.stride))

    def margins(self, input: Tensor, output_size: Sequence[int]) -> list[int]:
        """`F.pad` amounts (last axis first) after which every window lies inside the padded input."""
        margins = []
        for size, out, kernel, stride, pad in zip(input.shape[-self.ndim:], output_size, *self[:3]):
            margins += [(out - 1) * stride + kernel - size - pad, pad]
        return margins[::-1]

    def memory_format(self, input: Tensor) -> torch.memory_format:
        """The format in which `max_pool*` returns its output: channels_last for a batch whose channels lie together."""
        if self.ndim > 1 and input.dim() == self.ndim + 2 and input.stride(1) == 1 and not input.is_contiguous():
            return torch.channels_last if self.ndim == 2 else torch.channels_last_3d
        return torch.contiguous_format

    def new_output(self, input: Tensor, output_size: Sequence[int]) -> Tensor:
        """Memory for the pool of `input`, in its dtype and memory format."""
        lead, format = input.shape[:-self.ndim], self.memory_format(input)
        if lead[-1] == 1 or prod(output_size) == 1:  # channels_last and contiguous alike, and called contiguous
            format = torch.contiguous_format
        return torch.empty((*lead, *output_size), dtype=input.dtype, device=input.device, memory_format=format)

    def like(self, result: Tensor, input: Tensor) -> Tensor:
        """`result` in the dtype and memory format that the pool of `input` has."""
        return result.to(input.dtype).contiguous(memory_format=self.memory_format(input))
