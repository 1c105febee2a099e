"""SoftPool as functions: ``soft_pool1d``, ``soft_pool2d`` and ``soft_pool3d``."""
from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from . import kernels
from ._private import forward_ad_active, functorch_active

Size = int | Sequence[int]
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def soft_pool1d(input: Tensor, kernel_size: Size = 2, stride: Size | None = None, padding: Size = 0,
                ceil_mode: bool = False, *, detach_weights: bool = False) -> Tensor:
    """SoftPool over one axis: :func:`soft_pool2d` for input (N, C, L) or (C, L)."""
    return soft_pool(input, *geometry(1, kernel_size, stride, padding), ceil_mode, detach_weights)


def soft_pool2d(input: Tensor, kernel_size: Size = 2, stride: Size | None = None, padding: Size = 0,
                ceil_mode: bool = False, *, detach_weights: bool = False) -> Tensor:
    r"""Pool each window with the softmax of its own values as weights, channel by channel.

    .. math:: \text{out} = \sum_{i \in R} w_i x_i, \qquad w_i = \frac{\exp x_i}{\sum_{j \in R} \exp x_j}

    The result lies between the window's mean and its maximum. The maximum of the window is subtracted before the
    exponential, so values of any magnitude are exact to rounding; float16 and bfloat16 are accumulated in float32.
    Padded cells have weight 0. A NaN makes its window NaN; infinities give what `torch.nn.functional.max_pool2d`
    gives: +inf wherever the window has one, -inf only where it has nothing else. The gradient of such a window is 0.

    The gradient is exact, :math:`\partial \text{out} / \partial x_i = w_i (1 + x_i - \text{out})`.

    Args:
        input: (N, C, H, W) or (C, H, W); float16, bfloat16, float32 or float64; N may be 0.
        kernel_size: Size of the window in cells, one number or one for each axis.
        stride: Step between windows in cells; `kernel_size` if None.
        padding: Cells added on both sides of each axis, at most half of `kernel_size`.
        ceil_mode: Round the output size up instead of down, as `torch.nn.functional.max_pool2d` does.
        detach_weights: Treat the weights as constants, which makes the gradient :math:`w_i`: how the CUDA code of
            the paper's authors trains.

    Returns:
        (N, C, H', W') or (C, H', W') in the dtype and memory format of `input`, where
        ``H' = floor((H + 2 * padding - kernel_size) / stride) + 1``.

    Raises:
        TypeError: If `input` is not a floating tensor, or a size is not made of integers.
        ValueError: If a size has a bad value, or `input` the wrong rank or fewer cells than one window.

    Source: A. Stergiou, R. Poppe, G. Kalliatakis, "Refining activation downsampling with SoftPool", ICCV 2021.
    """
    return soft_pool(input, *geometry(2, kernel_size, stride, padding), ceil_mode, detach_weights)


def soft_pool3d(input: Tensor, kernel_size: Size = 2, stride: Size | None = None, padding: Size = 0,
                ceil_mode: bool = False, *, detach_weights: bool = False) -> Tensor:
    """SoftPool over three axes: :func:`soft_pool2d` for input (N, C, T, H, W) or (C, T, H, W)."""
    return soft_pool(input, *geometry(3, kernel_size, stride, padding), ceil_mode, detach_weights)


def to_tuple(ndim: int, name: str, value: Size) -> tuple[int, ...]:
    """``value`` for each of ``ndim`` axes.

    Raises:
        TypeError: If it is neither an integer nor a sequence of them.
        ValueError: If a sequence has another length than 1 or ``ndim``.
    """
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    try:
        if any(isinstance(number, bool) for number in values):
            raise TypeError
        values = tuple(operator.index(number) for number in values)  # of NumPy too, and symbolic ones
    except TypeError:
        raise TypeError(f'{name} must be an integer or a sequence of {ndim} integers, got {value!r}') from None
    if len(values) not in (1, ndim):
        raise ValueError(f'{name} must be an integer or a sequence of {ndim} integers, got {value!r}')
    return values if len(values) == ndim else values * ndim


def geometry(ndim: int, kernel_size: Size, stride: Size | None, padding: Size) -> Geometry:
    """``kernel_size``, ``stride`` and ``padding`` with one number for each of ``ndim`` axes."""
    kernel_size = to_tuple(ndim, 'kernel_size', kernel_size)
    return (kernel_size, kernel_size if stride is None else to_tuple(ndim, 'stride', stride),
            to_tuple(ndim, 'padding', padding))


def soft_pool(input: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...],
              ceil_mode: bool = False, detach_weights: bool = False) -> Tensor:
    """SoftPool over the last ``len(kernel_size)`` axes, by the operator or, where it cannot go, by its formula."""
    if not isinstance(input, Tensor) and not hasattr(input, '__torch_function__'):
        raise TypeError(f'input must be a torch.Tensor, got {type(input).__name__}')
    # A file that is exported has no use for an operator of ours, and neither functorch nor forward-mode
    # differentiation can look into one (pytorch#168393): it would fail, or give a tangent of zero.
    if (torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
            or functorch_active() or forward_ad_active()):
        return kernels.reference.soft_pool(
            input, kernels.Window.make(kernel_size, stride, padding, ceil_mode), detach_weights)
    return torch.ops.timm_softpool.soft_pool(input, kernel_size, stride, padding, ceil_mode, detach_weights)
