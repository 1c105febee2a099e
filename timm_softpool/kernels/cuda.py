"""The CUDA backend: CUDA C++ (``csrc/soft_pool.cu``), compiled for the window and the GPU at its first use.

It takes NVRTC and NVIDIA's Python bindings, which PyTorch's CUDA builds bring along; neither nvcc nor a host compiler.
Every number is read and written once, but for windows that overlap, and no kernel adds atomically, so that the same
input always gives the same bits.
"""
from __future__ import annotations

import ctypes
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .window import Window, three_axes

_DTYPES = {torch.float32: 'float', torch.float64: 'double', torch.bfloat16: 'Bfloat16', torch.float16: 'Float16'}
_THREADS = 256
_MAX_CELLS = 64  # the cells of a window are kept in registers
_MAX_NUMBERS = 2 ** 31  # indices are of 32 bits
_SHARED_BYTES = 48 * 1024  # that every GPU gives a block of threads


@cache
def missing() -> str:
    if torch.version.cuda is None:
        return 'this PyTorch is built without CUDA'
    if not torch.cuda.is_available():
        return 'there is no GPU that this PyTorch can use'
    try:
        _architectures()
    except ImportError as error:
        return f'it needs the package cuda-bindings: {error}'
    except RuntimeError as error:  # of a library that cannot be loaded, too
        return f'NVRTC is not to be had: {error}'
    return ''


def supports(input: Tensor, window: Window) -> bool:
    return (input.device.type == 'cuda' and prod(window.kernel_size) <= _MAX_CELLS and input.numel() < _MAX_NUMBERS
            and prod(input.shape[:-window.ndim]) * prod(window.output_size(input)) < _MAX_NUMBERS
            and (bool(missing()) or _architecture(input.device) in _architectures()))


def forward(input: Tensor, window: Window, output_size: list[int]) -> Tensor:
    output = window.new_output(input, output_size)
    input = input.contiguous(memory_format=window.memory_format(input))
    _launch('forward', [input, output], input, output, window)
    return output


def backward(grad_output: Tensor, input: Tensor, window: Window, output_size: list[int],
             detach_weights: bool) -> Tensor:
    format = window.memory_format(input)
    input, grad_output = (tensor.contiguous(memory_format=format) for tensor in (input, grad_output))
    make = torch.empty_like if writes_all(input, window, output_size) else torch.zeros_like
    grad_input = make(input, memory_format=format)
    _launch('backward_overlapping' if window.overlaps() else 'backward_apart', [input, grad_output, grad_input], input,
            grad_output, window, detach_weights)
    return grad_input


def writes_all(input: Tensor, window: Window, output_size: list[int]) -> bool:
    """Whether the backward kernel writes every cell: the one for overlapping windows does, else windows must cover."""
    return window.overlaps() or window.kernel_size == window.stride and all(
        out * stride - pad >= size for size, out, stride, pad in
        zip(input.shape[-window.ndim:], output_size, window.stride, window.padding))


def _launch(name: str, tensors: list[Tensor], input: Tensor, output: Tensor, window: Window,
            detach_weights: bool = False) -> None:
    if not output.numel():
        return
    shape = sizes(input, output, window)
    channels_last = window.memory_format(input) != torch.contiguous_format
    if name == 'backward_overlapping':
        pack, blocks = 1, count_tiles(input, window, shape)
        count = blocks
    else:
        aligned = all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
        pack = pack_size(window, shape, 16 // input.element_size(), channels_last) if aligned else 1
        count = output.numel() // pack
        blocks = -(-count // _THREADS)
    defined = definitions(input.dtype, window, channels_last, pack, detach_weights)
    values = (*(tensor.data_ptr() for tensor in tensors), count, *shape)
    types = (*[ctypes.c_void_p] * len(tensors), *[ctypes.c_int] * (len(values) - len(tensors)))
    driver, _ = _bindings()
    with torch.cuda.device(input.device):
        _enter_context(input.device.index)
        kernel = _kernel(name, input.device, defined)
        stream = torch.cuda.current_stream().cuda_stream
        _check(driver.cuLaunchKernel(kernel, blocks, 1, 1, _THREADS, 1, 1, 0, stream, (values, types), 0))


def _enter_context(device: int) -> None:
    """Make the context that PyTorch uses current: in a new thread, a launch may come before anything does so."""
    driver, _ = _bindings()
    if not int(_check(driver.cuCtxGetCurrent())):
        _check(driver.cuCtxSetCurrent(_context(device)))


@cache
def _context(device: int) -> Any:
    driver, _ = _bindings()
    return _check(driver.cuDevicePrimaryCtxRetain(_check(driver.cuDeviceGet(device))))


def sizes(input: Tensor, output: Tensor, window: Window) -> list[int]:
    """Channels, and the sizes of input and output on three axes."""
    n = window.ndim
    return [input.shape[-n - 1], *three_axes(input.shape[-n:], 1), *three_axes(output.shape[-n:], 1)]


def pack_size(window: Window, sizes: list[int], most: int, channels_last: bool) -> int:
    """How many neighbours in memory a thread of the window kernels can serve: at most ``most``, a power of two."""
    input_size, output_size = sizes[1:4], sizes[4:]
    if channels_last:
        length = sizes[0]
    else:  # whole packs of cells, where no window meets an edge
        kernel, stride = three_axes(window.kernel_size, 1), three_axes(window.stride, 1)
        inside = not any(window.padding) and kernel[2] == stride[2] and input_size[2] == output_size[2] * kernel[2]
        inside = inside and all((out - 1) * step + cells <= size for size, out, step, cells in
                                zip(input_size, output_size, stride, kernel))
        length = output_size[2] if inside else 1
    while most > 1 and (length % most or most * prod(window.kernel_size) > _MAX_CELLS):
        most //= 2
    return most


def tile_of(window: Window, channels_last: bool) -> tuple[int, ...]:
    """Channels and windows of each axis that a block of threads serves, if windows overlap."""
    kernel, stride = three_axes(window.kernel_size, 1), three_axes(window.stride, 1)
    halo = [0, *((size - 1) // step for size, step in zip(kernel, stride))]
    tile = [32, 4, 4, 4] if channels_last else [1, 8, 4, 32]
    tile = [most if axis in (0, 3) or kernel[axis - 1] > 1 else 1 for axis, most in enumerate(tile)]
    while prod(map(sum, zip(tile, halo))) * 3 * 8 > _SHARED_BYTES:  # three numbers of float64 for each window
        largest = max(range(1, 4), key=tile.__getitem__)
        tile[largest if tile[largest] > 1 else 0] //= 2
    return tuple(tile)


def count_tiles(input: Tensor, window: Window, sizes: list[int]) -> int:
    """How many blocks of threads it takes to visit every cell of ``input``, if windows overlap."""
    tile_c, *tile = tile_of(window, window.memory_format(input) != torch.contiguous_format)
    batch = input.numel() // prod(sizes[:4])
    return batch * -(-sizes[0] // tile_c) * prod(
        -(-(size + pad) // (stride * windows)) for size, pad, stride, windows in
        zip(sizes[1:4], three_axes(window.padding, 0), three_axes(window.stride, 1), tile))


def definitions(dtype: torch.dtype, window: Window, channels_last: bool, pack: int, detach_weights: bool) -> str:
    """The lines that csrc/soft_pool.cu wants before it."""
    geometry = {f'{letter}{axis}': value
                for letter, values, filler in zip('KSP', window[:3], (1, 1, 0))
                for axis, value in enumerate(three_axes(values, filler))}
    tile = dict(zip(('TILE_C', 'TILE0', 'TILE1', 'TILE2'), tile_of(window, channels_last)))
    values = {'STORAGE': _DTYPES[dtype], **geometry, **tile, 'CHANNELS_LAST': int(channels_last), 'PACK': pack,
              'DETACH_WEIGHTS': int(detach_weights)}
    return ''.join(f'#define {name} {value}\n' for name, value in values.items())


@cache
def _kernel(name: str, device: torch.device, defined: str) -> Any:
    """The kernel ``name``, loaded on ``device``, which is the current one."""
    driver, _ = _bindings()
    module = _check(driver.cuModuleLoadData(compile_kernels(f'sm_{_architecture(device)}', defined)))
    return _check(driver.cuModuleGetFunction(module, name.encode()))


@cache
def compile_kernels(architecture: str, defined: str) -> bytes:
    """The kernels as machine code for a GPU of ``architecture``, such as ``sm_90``; takes no GPU.

    Raises:
        RuntimeError: If NVRTC does not compile them, with what it says.
    """
    _, nvrtc = _bindings()
    source = defined + (Path(__file__).parent / 'csrc' / 'soft_pool.cu').read_text()
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), b'soft_pool.cu', 0, [], []))
    options = [f'--gpu-architecture={architecture}'.encode(), b'--std=c++17']
    result, = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b' ' * _check(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        reason = log.rstrip(b'\0 \n').decode(errors='replace')[:2000]
        raise RuntimeError(f'NVRTC does not compile SoftPool for {architecture}: {reason}')
    code = b' ' * _check(nvrtc.nvrtcGetCUBINSize(program))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code


@cache
def _architecture(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def _architectures() -> frozenset[int]:
    """Those that NVRTC knows: 90 for sm_90."""
    _, nvrtc = _bindings()
    return frozenset(_check(nvrtc.nvrtcGetSupportedArchs()))


@cache
def _bindings() -> tuple[Any, Any]:
    from cuda.bindings import driver, nvrtc

    return driver, nvrtc


def _check(result: tuple[Any, ...]) -> Any:
    error, *values = result
    if error.value:
        raise RuntimeError(f'CUDA: {error!r}')
    return values[0] if values else None
