"""The backend that is always there: plain PyTorch, one strided view of the input for each cell of the window."""
from __future__ import annotations

from functools import reduce
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Window


def missing() -> str:
    return ''


def supports(input: Tensor, window: Window) -> bool:
    return True


def forward(input: Tensor, window: Window, output_size: list[int]) -> Tensor:
    """See `functional.soft_pool2d`; half precision is accumulated in float32."""
    taps = _taps(_pad(input, window.margins(input, output_size)), window, output_size)
    shift, _, mean = _statistics(taps)
    return window.like(mean.add_(shift), input)


def backward(grad_output: Tensor, input: Tensor, window: Window, output_size: list[int],
             detach_weights: bool) -> Tensor:
    """``w_i (1 + x_i - out) grad_output`` (``w_i grad_output`` if `detach_weights`), summed over a cell's windows."""
    margins = window.margins(input, output_size)
    padded = _pad(input, margins)
    taps = _taps(padded, window, output_size)
    shift, total, mean = _statistics(taps)
    scale = (grad_output / total).masked_fill_(~shift.isfinite(), 0)
    grad = torch.zeros_like(padded, dtype=total.dtype)
    for tap, grad_tap in zip(taps, _taps(grad, window, output_size)):
        x = _centred(tap, shift)
        weight = x.exp().mul_(scale)
        grad_tap += weight if detach_weights else x.sub_(mean).add_(1).mul_(weight)
    return window.like(_pad(grad, [-margin for margin in margins], 0), input)


def _pad(x: Tensor, margins: list[int], value: float = -torch.inf) -> Tensor:
    return F.pad(x, margins, value=value) if any(margins) else x


def _taps(padded: Tensor, window: Window, output_size: list[int]) -> list[Tensor]:
    """For each cell of the window: the values that the windows of all outputs have there, a view of `padded`."""
    def tap(offset: tuple[int, ...]) -> Any:
        return ..., *(slice(start, start + stride * (out - 1) + 1, stride)
                      for start, stride, out in zip(offset, window.stride, output_size))

    return [padded[tap(offset)] for offset in product(*map(range, window.kernel_size))]


def _centred(tap: Tensor, shift: Tensor) -> Tensor:
    # At an infinite maximum x - m is NaN and counts as 0; elsewhere -inf would make 0 * -inf of e * x.
    return (tap - shift).nan_to_num_(nan=0.0, neginf=torch.finfo(shift.dtype).min)


def _statistics(taps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Each window's maximum ``m``, ``sum exp(x - m)`` and softmax-weighted mean of ``x - m``."""
    shift = reduce(torch.maximum, taps)
    shift = shift.to(torch.promote_types(shift.dtype, torch.float32))
    total = torch.zeros_like(shift)
    weighted = torch.zeros_like(shift)
    for tap in taps:
        x = _centred(tap, shift)
        e = x.exp()
        total += e
        weighted.addcmul_(e, x)
    return shift, total, weighted.div_(total)
