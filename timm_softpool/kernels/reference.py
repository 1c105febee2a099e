"""SoftPool as one differentiable formula of plain PyTorch operations.

It serves wherever an opaque operator cannot: export, ONNX, functorch transforms, forward-mode and double
backward. It holds every window in memory, so the backends beside it do the everyday work.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .window import Window


def soft_pool(input: Tensor, window: Window, detach_weights: bool = False) -> Tensor:
    """``out = m + sum_i w_i (x_i - m)`` with ``w = softmax(x - m)`` and ``m = max(x)``, over each window.

    The maximum takes no part in the derivative: the result does not depend on it. Where it is infinite, ``x - m``
    is NaN at the maximum itself and counts as 0. A difference of -1000 has weight 0 in every dtype; a lower one would
    overflow in the derivative.
    """
    output_size = window.output_size(input)
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    x = F.pad(x, window.margins(input, output_size), value=-torch.inf)
    for kernel, stride in zip(window.kernel_size, window.stride):
        x = x.unfold(-window.ndim, kernel, stride)
    x = x.flatten(-window.ndim)
    shift = x.detach().amax(-1, keepdim=True)
    x = (x - shift).nan_to_num(nan=0.0).clamp(min=-1000.0)
    weights = x.softmax(-1)
    out = ((weights.detach() if detach_weights else weights) * x).sum(-1) + shift.squeeze(-1)
    return window.like(out, input)
