"""The native CPU backend: C++ for AVX-512, AVX2 and any other processor, on PyTorch's threads.

The library (``csrc/``) is built when the package is installed, if a C++ compiler is at hand. It knows nothing of
PyTorch or Python, so one build serves all their versions; what it needs of PyTorch, its thread pool, it is given.
"""
from __future__ import annotations

import ctypes
import importlib.util
import platform
from functools import cache, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from .._private import parallel_for
from .window import Window, three_axes

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as in csrc/geometry.h


class _Call(ctypes.Structure):
    """`Call` of csrc/geometry.h."""

    _fields_ = [
        ('geometry', ctypes.c_int64 * 17), ('parallel_for', ctypes.c_void_p), ('input', ctypes.c_void_p),
        ('grad_output', ctypes.c_void_p), ('result', ctypes.c_void_p), ('threads', ctypes.c_int64),
        ('detach_weights', ctypes.c_bool)]


@cache
def _library() -> tuple[Any, str]:
    """The library, or None and why there is none."""
    spec = importlib.util.find_spec(f'{__package__}._cpu')
    if spec is None or spec.origin is None:
        return None, 'it was not built; install timm-softpool again where there is a C++ compiler (GCC or Clang)'
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as error:
        return None, f'its library does not load on this {platform.machine()} machine: {error}'
    if getattr(library, 'soft_pool_call_size', int)() != ctypes.sizeof(_Call):
        return None, 'its library is of another version; install timm-softpool again'
    library.soft_pool_run.argtypes = [ctypes.POINTER(_Call), ctypes.c_int32, ctypes.c_int32]
    library.soft_pool_run.restype = None
    library.soft_pool_set_isa.argtypes = [ctypes.c_char_p]
    library.soft_pool_set_isa.restype = ctypes.c_char_p
    return library, ''


def missing() -> str:
    return _library()[1]


def supports(input: Tensor, window: Window) -> bool:
    return input.device.type == 'cpu'


def set_isa(name: str = '') -> str:
    """Use the instructions ``name`` ('avx512', 'avx2' or 'baseline'), or the next below that this processor has.

    Without a name, the best. Returns the name of those that serve from now on.
    """
    return _library()[0].soft_pool_set_isa(name.encode()).decode()


def forward(input: Tensor, window: Window, output_size: list[int]) -> Tensor:
    output = window.new_output(input, output_size)
    _run(input, None, output, window, output_size)
    return output


def backward(grad_output: Tensor, input: Tensor, window: Window, output_size: list[int],
             detach_weights: bool) -> Tensor:
    grad_input = torch.empty_like(input, memory_format=window.memory_format(input))
    _run(input, grad_output, grad_input, window, output_size, detach_weights)
    return grad_input


def _run(input: Tensor, grad_output: Tensor | None, result: Tensor, window: Window, output_size: list[int],
         detach_weights: bool = False) -> None:
    if not result.numel():
        return
    format = window.memory_format(input)
    input = input.contiguous(memory_format=format)
    call = _Call(_geometry(tuple(input.shape), window, tuple(output_size)), parallel_for(), input.data_ptr(), None,
                 result.data_ptr(), torch.get_num_threads(), detach_weights)
    if grad_output is not None:
        grad_output = grad_output.contiguous(memory_format=format)
        call.grad_output = grad_output.data_ptr()
    _library()[0].soft_pool_run(call, _DTYPES[input.dtype], format != torch.contiguous_format)


@lru_cache(maxsize=1024)
def _geometry(shape: tuple[int, ...], window: Window, output_size: tuple[int, ...]) -> ctypes.Array:
    """`Geometry` of csrc/geometry.h."""
    lead = shape[:-window.ndim]
    return (ctypes.c_int64 * 17)(
        prod(lead[:-1]), lead[-1], *three_axes(shape[-window.ndim:], 1), *three_axes(output_size, 1),
        *three_axes(window.kernel_size, 1), *three_axes(window.stride, 1), *three_axes(window.padding, 0))
