"""The operators ``torch.ops.timm_softpool.soft_pool`` and ``soft_pool_backward``: one pair for 1-D, 2-D and 3-D.

They carry what PyTorch asks of an operator: a kernel for real tensors, one for fake tensors, and the derivative.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .dispatch import choose
from .window import Window

_GEOMETRY = 'int[] kernel_size, int[] stride, int[] padding, bool ceil_mode=False, bool detach_weights=False'

torch.library.define('timm_softpool::soft_pool', f'(Tensor input, {_GEOMETRY}) -> Tensor')
torch.library.define('timm_softpool::soft_pool_backward', f'(Tensor grad_output, Tensor input, {_GEOMETRY}) -> Tensor')


@torch.library.impl('timm_softpool::soft_pool', 'CompositeExplicitAutograd')
def _forward(input: Tensor, kernel_size, stride, padding, ceil_mode=False, detach_weights=False) -> Tensor:
    window = Window.make(kernel_size, stride, padding, ceil_mode)
    return choose(input, window).forward(input, window, window.output_size(input))


@torch.library.register_fake('timm_softpool::soft_pool')
def _forward_fake(input: Tensor, kernel_size, stride, padding, ceil_mode=False, detach_weights=False) -> Tensor:
    window = Window.make(kernel_size, stride, padding, ceil_mode)
    return window.new_output(input, window.output_size(input))


@torch.library.impl('timm_softpool::soft_pool_backward', 'CompositeExplicitAutograd')
def _backward(grad_output: Tensor, input: Tensor, kernel_size, stride, padding, ceil_mode=False,
              detach_weights=False) -> Tensor:
    window, size = _checked(grad_output, input, kernel_size, stride, padding, ceil_mode)
    return choose(input, window).backward(grad_output, input, window, size, detach_weights)


@torch.library.register_fake('timm_softpool::soft_pool_backward')
def _backward_fake(grad_output: Tensor, input: Tensor, kernel_size, stride, padding, ceil_mode=False,
                   detach_weights=False) -> Tensor:
    window, _ = _checked(grad_output, input, kernel_size, stride, padding, ceil_mode)
    return torch.empty_like(input, memory_format=window.memory_format(input))


def _checked(grad_output: Tensor, input: Tensor, *geometry: Any) -> tuple[Window, list[int]]:
    """The window and its output size, after a comparison of ``grad_output`` with the output: kernels trust it."""
    window = Window.make(*geometry)
    size = window.output_size(input)
    expected = (*input.shape[:-window.ndim], *size)
    if (tuple(grad_output.shape), grad_output.dtype, grad_output.device) != (expected, input.dtype, input.device):
        raise ValueError(f'grad_output must have the shape {expected}, dtype {input.dtype} and device {input.device} '
                         f'of the output, got {tuple(grad_output.shape)}, {grad_output.dtype}, {grad_output.device}')
    return window, size


def _setup(ctx, inputs, output) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.geometry = inputs[len(tensors):]


def _differentiate(ctx, grad_output: Tensor) -> tuple:
    input, = ctx.saved_tensors
    grad = torch.ops.timm_softpool.soft_pool_backward(grad_output, input, *ctx.geometry)
    return grad, *[None] * len(ctx.geometry)


def _differentiate_twice(ctx, grad: Tensor) -> tuple:
    *geometry, detach_weights = ctx.geometry
    window = Window.make(*geometry)

    def gradient(grad_output: Tensor, input: Tensor) -> Tensor:
        return torch.func.vjp(lambda x: reference.soft_pool(x, window, detach_weights), input)[1](grad_output)[0]

    return *torch.func.vjp(gradient, *ctx.saved_tensors)[1](grad), *[None] * len(ctx.geometry)


torch.library.register_autograd('timm_softpool::soft_pool', _differentiate, setup_context=_setup)
torch.library.register_autograd('timm_softpool::soft_pool_backward', _differentiate_twice, setup_context=_setup)
