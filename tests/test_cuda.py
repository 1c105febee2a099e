"""The CUDA backend: its kernels, compiled for GPUs and, for their arithmetic, for the CPU; on a GPU, the operator.

Without a GPU the last part is skipped; ``make gpu`` runs it where there is one.
"""
import ctypes
import shutil
import subprocess
from math import prod
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from helpers import DTYPES, SPECIAL_WINDOWS, Case, assert_rounded, cases, random, values_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from timm_softpool import available_backends, backend, kernels, soft_pool1d, soft_pool2d
from timm_softpool.kernels import Window, cuda

SOURCE = Path(cuda.__file__).parent / 'csrc' / 'soft_pool.cu'

CASES = {
    '1d': Case((2, 3, 40), (3,), (2,), (1,)),
    '2d, in packs': Case((2, 3, 8, 16), (2, 2), (2, 2), (0, 0)),
    '2d, gaps and rest': Case((2, 8, 9, 11), (2, 2), (3, 3), (0, 0)),
    '2d, overlap over several tiles': Case((1, 40, 70, 75), (3, 3), (2, 2), (1, 1), True),
    '2d, stride 1': Case((2, 3, 20, 40), (3, 3), (1, 1), (1, 1)),
    '3d, overlap': Case((1, 2, 12, 9, 70), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    '3d, much overlap': Case((1, 2, 6, 7, 9), (3, 3, 3), (1, 1, 1), (1, 1, 1)),
}
on_gpu = pytest.mark.skipif(available_backends()['cuda'] != 'available', reason=available_backends()['cuda'])
every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize('dtype', DTYPES, ids=str)


def formats(case):
    return [torch.contiguous_format, *[torch.channels_last, torch.channels_last_3d][case.ndim - 2:case.ndim - 1]]


def options(case, dtype, format):
    """The definitions of a case, with the pack that a GPU would get."""
    window = Window.make(*case.geometry)
    input = torch.empty(case.shape, dtype=dtype).contiguous(memory_format=format)
    output = window.new_output(input, window.output_size(input))
    sizes = cuda.sizes(input, output, window)
    last = window.memory_format(input) != torch.contiguous_format
    pack = 1 if window.overlaps() else cuda.pack_size(window, sizes, 16 // dtype.itemsize, last)
    return cuda.definitions(dtype, window, last, pack, False), sizes, pack


# Without a GPU

@every_dtype
@pytest.mark.parametrize('architecture', ['sm_75', 'sm_90'])
def test_the_kernels_compile_for_gpus_from_turing_on(architecture, dtype):
    pytest.importorskip('cuda.bindings', reason='comes with the CUDA builds of PyTorch')
    for case in CASES.values():
        for format in formats(case):
            assert cuda.compile_kernels(architecture, options(case, dtype, format)[0]).startswith(b'\x7fELF')


def test_what_nvrtc_refuses_is_said():
    pytest.importorskip('cuda.bindings', reason='comes with the CUDA builds of PyTorch')
    with pytest.raises(RuntimeError, match='sm_90.*STORAGE'):
        cuda.compile_kernels('sm_90', '')


@pytest.mark.skipif(shutil.which('g++') is None, reason='needs g++')
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
@every_case
def test_on_the_cpu_the_kernels_give_what_the_formula_gives(tmp_path, case, dtype):
    for format in formats(case):
        defined, sizes, pack = options(case, dtype, format)
        source = tmp_path / 'kernel.cpp'
        source.write_text(f'#include "{Path(__file__).parent / "cuda_on_cpu.h"}"\n{defined}#include "{SOURCE}"\n')
        built = tmp_path / f'{format}.so'
        subprocess.run(['g++', '-std=c++17', '-O1', '-w', '-shared', '-fPIC', source, '-o', built], check=True)
        library = ctypes.CDLL(str(built))

        window = Window.make(*case.geometry)
        input, grad_output = (tensor.contiguous(memory_format=format) for tensor in random(case, dtype))
        output = torch.empty_like(grad_output)
        written = cuda.writes_all(input, window, output.shape[-window.ndim:])
        grad_input = torch.full_like(input, torch.nan if written else 0.0)
        count = output.numel() // pack

        def run(name, count, *tensors, library=library, sizes=sizes):
            pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
            block, kernel = ctypes.c_int.in_dll(library, 'blockIdx'), getattr(library, name)
            for block.value in range(count):
                kernel(*pointers, count, *sizes)

        run('forward', count, input, output)
        if window.overlaps():
            run('backward_overlapping', cuda.count_tiles(input, window, sizes), input, grad_output, grad_input)
        else:
            run('backward_apart', count, input, grad_output, grad_input)
        expected = values_and_gradients(
            lambda x, window=window: kernels.reference.soft_pool(x, window), input.double(), grad_output.double())
        assert_rounded(output, expected[0], dtype)
        assert_rounded(grad_input, expected[1], dtype, float(grad_output.abs().max()))


@pytest.mark.skipif(torch.cuda.is_available(), reason='has a GPU')
def test_without_a_gpu_the_backend_says_why_it_is_missing():
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: .*(CUDA|GPU)"), backend('cuda'):
        pass


def test_what_the_bindings_lack_is_said_and_asked_once(monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', '13.0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for error, message in ((ImportError('No module'), 'needs the package cuda-bindings: No module'),
                           (RuntimeError('not found'), 'NVRTC is not to be had: not found')):
        def fail(error=error):
            raise error
        monkeypatch.setattr(cuda, '_architectures', fail)
        assert message in cuda.missing.__wrapped__()


def test_inputs_and_outputs_of_too_many_numbers_are_left_to_others(monkeypatch):
    monkeypatch.setattr(cuda, 'missing', lambda: 'no GPU')
    window = Window((2,), (1,), (1,))

    def tensor(*shape):
        return SimpleNamespace(device=torch.device('cuda', 0), shape=torch.Size(shape), numel=lambda: prod(shape),
                               dtype=torch.float32, dim=lambda: len(shape))

    assert cuda.supports(tensor(2, 3, 8), window)
    assert not cuda.supports(tensor(2 ** 28, 8, 1), window), 'its output has 2^32 numbers'
    assert not cuda.supports(tensor(1, 1, 2 ** 31), Window((4,), (4,), (0,)))
    assert not cuda.supports(tensor(1, 1, 999), Window((65,), (1,), (0,)))


# On a GPU

@on_gpu
@settings(max_examples=200)
@given(cases(), st.sampled_from(DTYPES), st.sampled_from([1.0, 30.0, 1e4]), st.booleans())
def test_values_and_gradients_are_those_of_the_formula(case, dtype, scale, detach_weights):
    input, grad_output = random(case, dtype, scale)
    window = Window.make(*case.geometry)
    expected = values_and_gradients(
        lambda x: kernels.reference.soft_pool(x, window, detach_weights), input.double(), grad_output.double())
    with backend('cuda'):
        out, grad = values_and_gradients(
            lambda x: case.pool(x, detach_weights=detach_weights), input.cuda(), grad_output.cuda())
    assert_rounded(out.cpu(), expected[0], dtype, min(scale, 1.0))
    assert_rounded(grad.cpu(), expected[1], dtype, float(grad_output.abs().max()))


@on_gpu
@every_case
@every_dtype
def test_both_layouts_give_the_formula_and_the_same_bits_each_time(case, dtype):
    for format in formats(case):
        input, grad_output = (tensor.contiguous(memory_format=format) for tensor in random(case, dtype))
        expected = values_and_gradients(
            lambda x: kernels.reference.soft_pool(x, Window.make(*case.geometry)),
            input.double(), grad_output.double())
        with backend('cuda'):
            first, second = (values_and_gradients(case.pool, input.cuda(), grad_output.cuda()) for _ in range(2))
        assert all(map(torch.equal, first, second)) and first[1].is_contiguous(memory_format=format)
        assert_rounded(first[0].cpu(), expected[0], dtype)
        assert_rounded(first[1].cpu(), expected[1], dtype, float(grad_output.abs().max()))


@on_gpu
@pytest.mark.parametrize('window', SPECIAL_WINDOWS.values(), ids=SPECIAL_WINDOWS)
def test_nan_and_infinities_give_what_the_formula_gives(window):
    input, grad_output = torch.tensor([[*window, 1.0, 2.0, 3.0, 4.0]]), torch.tensor([[5.0, -6.0]])
    expected = values_and_gradients(lambda x: kernels.reference.soft_pool(x, Window((4,), (4,), (0,))),
                                    input, grad_output)
    actual = values_and_gradients(lambda x: soft_pool1d(x, 4), input.cuda(), grad_output.cuda())
    torch.testing.assert_close([tensor.cpu() for tensor in actual], [*expected], equal_nan=True)


@on_gpu
@every_case
def test_the_operator_passes_opcheck_on_a_gpu(case):
    input = random(case)[0].cuda().requires_grad_()
    opcheck(torch.ops.timm_softpool.soft_pool, (input, *map(list, case.geometry[:3]), case.ceil_mode))


@on_gpu
def test_it_runs_on_the_current_stream_and_in_a_graph():
    input = torch.randn(4, 8, 64, 64, device='cuda')
    expected = soft_pool2d(input, 3, 2, 1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10 ** 8)  # a kernel on the default stream would not wait for this
        late = soft_pool2d(input * 2, 3, 2, 1)
    stream.synchronize()
    torch.testing.assert_close(late, soft_pool2d(input * 2, 3, 2, 1))

    graph, static = torch.cuda.CUDAGraph(), input.clone()
    with torch.cuda.graph(graph):
        out = soft_pool2d(static, 3, 2, 1)
    static.copy_(input.flip(0))
    graph.replay()
    torch.testing.assert_close(out, expected.flip(0))


@on_gpu
def test_it_runs_in_a_thread_that_has_done_nothing_before():
    input, results = torch.randn(2, 3, 16, 16, device='cuda', requires_grad=True), []
    soft_pool2d(input, 3, 2, 1).sum().backward()
    thread = Thread(target=lambda: results.append(soft_pool2d(input, 3, 2, 1)))
    thread.start()
    thread.join()
    torch.testing.assert_close(results[0], soft_pool2d(input, 3, 2, 1))


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_it_runs_on_the_device_of_its_input():
    input = torch.randn(2, 3, 16, 16, device='cuda:1')
    torch.testing.assert_close(soft_pool2d(input).cpu(), soft_pool2d(input.cpu()))


@on_gpu
def test_without_gradients_nothing_but_the_output_is_allocated():
    input = torch.randn(8, 16, 64, 64, device='cuda')
    soft_pool2d(input)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = soft_pool2d(input)
    assert torch.cuda.max_memory_allocated() - before <= prod(output.shape) * 4 + 512
