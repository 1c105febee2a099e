"""The native CPU backend: every instruction set of this processor, rows and channels that do not fill its vectors."""
import ctypes
import importlib.util

import pytest
import torch
from helpers import DTYPES, SPECIAL_WINDOWS, Case, assert_rounded, random, values_and_gradients
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from timm_softpool import available_backends, backend, kernels, soft_pool1d, soft_pool2d
from timm_softpool.kernels import Window, cpu, dispatch

pytestmark = pytest.mark.skipif(available_backends()['cpu'] != 'available', reason=available_backends()['cpu'])

ISAS = ('baseline', 'avx2', 'avx512')
every_dtype = pytest.mark.parametrize('dtype', DTYPES, ids=str)


@pytest.fixture(params=ISAS)
def isa(request):
    """The native backend with one instruction set."""
    if available_backends()['cpu'] == 'available' and cpu.set_isa(request.param) != request.param:
        cpu.set_isa()
        pytest.skip(f'this processor has no {request.param}')
    with backend('cpu'):
        yield request.param
    cpu.set_isa()


@st.composite
def wide_cases(draw):
    """Maps of more cells and channels than a vector holds, some in several blocks, and their memory format."""
    ndim = draw(st.integers(1, 3))
    kernel_size, stride = (draw(st.tuples(*[st.integers(1, most)] * ndim)) for most in (4, 4))
    padding = tuple(draw(st.integers(0, kernel // 2)) for kernel in kernel_size)
    least = [max(1, kernel - 2 * pad) for kernel, pad in zip(kernel_size, padding, strict=True)]
    most = [[150], [90, 75], [8, 12, 40]][ndim - 1]
    size = tuple(draw(st.integers(low, high)) for low, high in zip(least, most, strict=True))
    channels = draw(st.sampled_from([1, 3, 16, 21, 40]))
    case = Case((2, channels, *size), kernel_size, stride, padding, draw(st.booleans()))
    return case, draw(st.sampled_from([
        torch.contiguous_format, *[torch.channels_last, torch.channels_last_3d][ndim - 2:ndim - 1]]))


def formula(case, input, grad_output, detach_weights=False):
    """Values and gradients in float64."""
    return values_and_gradients(
        lambda x: kernels.reference.soft_pool(x, Window.make(*case.geometry), detach_weights),
        input.double(), grad_output.double())


@settings(max_examples=120)
@given(wide_cases(), st.sampled_from(DTYPES), st.sampled_from([1.0, 30.0, 1e4]), st.booleans())
@pytest.mark.parametrize('name', ISAS)
def test_every_instruction_set_gives_what_the_formula_gives(name, wide_case, dtype, scale, detach_weights):
    case, format = wide_case
    input, grad_output = (tensor.contiguous(memory_format=format) for tensor in random(case, dtype, scale))
    expected = formula(case, input, grad_output, detach_weights)
    try:
        assume(cpu.set_isa(name) == name)
        with backend('cpu'):
            out, grad = values_and_gradients(lambda x: case.pool(x, detach_weights=detach_weights), input, grad_output)
    finally:
        cpu.set_isa()
    assert_rounded(out, expected[0], dtype, min(scale, 1.0))
    assert_rounded(grad, expected[1], dtype, float(grad_output.abs().max()))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_every_number_of_half_precision_passes_through_unchanged(isa, dtype):
    numbers = torch.arange(-2 ** 15, 2 ** 15, dtype=torch.int16).view(dtype)
    for input in (numbers.view(1, 1, -1), numbers.view(1, -1, 1, 64).contiguous(memory_format=torch.channels_last)):
        pool = soft_pool1d if input.dim() == 3 else soft_pool2d
        torch.testing.assert_close(pool(input, 1), input, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('scale', [1e-6, 1.0, 6e4])
def test_half_precision_is_the_rounding_of_float32(isa, dtype, scale):
    input = (torch.randn(2, 8, 33, 70) * scale).clamp(-6.5e4, 6.5e4).to(dtype)
    for changed in (input, input.contiguous(memory_format=torch.channels_last)):
        grad_output = torch.randn_like(soft_pool2d(changed, 3, 2, 1))
        rough = values_and_gradients(lambda x: soft_pool2d(x, 3, 2, 1), changed, grad_output)
        exact = values_and_gradients(lambda x: soft_pool2d(x, 3, 2, 1), changed.float(), grad_output.float())
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(rough, exact, strict=True))


@pytest.mark.parametrize('place', [0, 15, 16, 40, 48])
@pytest.mark.parametrize('window', SPECIAL_WINDOWS.values(), ids=SPECIAL_WINDOWS)
@every_dtype
def test_nan_and_infinities_touch_their_own_window_only(isa, window, place, dtype):
    ordinary = torch.randn(1, 3, 1, 49 * 4).to(dtype)
    special = ordinary.clone()
    special[0, 1, 0, 4 * place:4 * place + 4] = torch.tensor(window, dtype=dtype)
    for change in (lambda x: x, lambda x: x.contiguous(memory_format=torch.channels_last)):
        out, grad = values_and_gradients(
            lambda x: soft_pool2d(x, (1, 4)), change(special), torch.ones(1, 3, 1, 49, dtype=dtype))
        expected_out, expected_grad = values_and_gradients(
            lambda x: soft_pool2d(x, (1, 4)), change(ordinary), torch.ones(1, 3, 1, 49, dtype=dtype))
        alone = values_and_gradients(lambda x: kernels.reference.soft_pool(x, Window((4,), (4,), (0,))),
                                     torch.tensor([window], dtype=dtype), torch.ones(1, 1, dtype=dtype))
        expected_out[0, 1, 0, place], expected_grad[0, 1, 0, 4 * place:4 * place + 4] = alone[0][0, 0], alone[1][0]
        torch.testing.assert_close(out, expected_out, equal_nan=True)
        torch.testing.assert_close(grad, expected_grad, equal_nan=True)


@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('geometry', [(2, 2, 0), (3, 2, 1)], ids=str)
def test_any_number_of_threads_gives_the_same_bits_and_so_does_none_of_pytorchs(monkeypatch, format, geometry):
    input = torch.randn(4, 32, 56, 56).contiguous(memory_format=format)
    grad_output = torch.randn_like(soft_pool2d(input, *geometry))

    def results():
        with backend('cpu'):
            return values_and_gradients(lambda x: soft_pool2d(x, *geometry), input, grad_output)

    threads, all_results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        all_results.append(results())
    torch.set_num_threads(threads)
    monkeypatch.setattr(cpu, 'parallel_for', lambda: None)
    all_results.append(results())
    for out, grad in all_results[1:]:
        assert torch.equal(out, all_results[0][0]) and torch.equal(grad, all_results[0][1])


@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_training_step_allocates_the_output_and_the_gradient_only(format):
    input = torch.randn(2, 16, 64, 64).contiguous(memory_format=format).requires_grad_()
    grad_output = torch.ones(2, 16, 32, 32).contiguous(memory_format=format)
    with backend('cpu'), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.autograd.backward(soft_pool2d(input, 3, 2, 1), grad_output)
    allocated = sum(event.self_cpu_memory_usage for event in profiler.events() if event.self_cpu_memory_usage > 0)
    assert allocated == (grad_output.numel() + input.numel()) * 4


def test_where_it_was_not_built_the_eager_backend_serves_and_says_so_once(monkeypatch, caplog):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name, *_: None if name.endswith('._cpu') else find_spec(name, *_))
    cpu._library.cache_clear()
    dispatch._say_once.cache_clear()
    try:
        assert 'compiler' in available_backends()['cpu']
        with pytest.raises(RuntimeError, match="backend 'cpu' is not available: it was not built"), backend('cpu'):
            pass
        for _ in range(2):
            soft_pool2d(torch.randn(1, 1, 4, 4))
        assert [record.getMessage() for record in caplog.records if 'not built' in record.getMessage()] == [
            f"SoftPool runs slower than it could, backend 'cpu' is not available: {available_backends()['cpu']}"]
    finally:
        cpu._library.cache_clear()
        dispatch._say_once.cache_clear()


def test_a_forced_backend_refuses_a_device_that_is_not_its_own():
    elsewhere = torch.empty(1, 1, 4, 4, device='meta')
    with backend('cpu'), pytest.raises(RuntimeError, match=r"'cpu' does not take .*\(1, 1, 4, 4\) on meta.*\[2, 2\]"):
        dispatch.choose(elsewhere, Window((2, 2), (2, 2), (0, 0)))


def test_a_library_of_another_version_is_not_used(monkeypatch):
    class Other(ctypes.Structure):
        _fields_ = [*cpu._Call._fields_, ('more', ctypes.c_int64)]

    monkeypatch.setattr(cpu, '_Call', Other)
    assert 'another version' in cpu._library.__wrapped__()[1]
