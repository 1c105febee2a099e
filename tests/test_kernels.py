"""The operator behind the functions: its registrations, its backends, and the formula they all stand for."""
import threading
from types import SimpleNamespace

import pytest
import torch
from helpers import CASES, DTYPES, SPECIAL_WINDOWS, assert_rounded, cases, random, values_and_gradients
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from timm_softpool import available_backends, backend, kernels, set_backend, soft_pool1d, soft_pool2d
from timm_softpool.kernels import Window, dispatch, eager

OPERATOR = torch.ops.timm_softpool.soft_pool
BACKWARD = torch.ops.timm_softpool.soft_pool_backward

torch.manual_seed(0)  # for the tensors of this table, which are made at import

# Inputs as the layers before a pool leave them in memory, each with its window.
LAYOUTS = {
    'contiguous': (torch.randn(2, 3, 8, 7), ([3, 2], [2, 1], [1, 0], True)),
    'float64': (torch.randn(2, 3, 8, 6).double(), ([2, 2], [2, 2], [0, 0])),
    'channels_last': (torch.randn(2, 3, 8, 6).to(memory_format=torch.channels_last), ([3, 3], [2, 2], [1, 1])),
    'channels_last, cropped': (
        torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)[:, 1:, 1:], ([2, 2], [2, 2], [0, 0])),
    'axes swapped': (torch.randn(2, 3, 8, 6).transpose(2, 3), ([2, 2], [2, 2], [0, 0])),
    'batch and channels swapped': (torch.randn(3, 2, 8, 6).transpose(0, 1), ([2, 2], [2, 2], [0, 0])),
    'expanded': (torch.randn(2, 1, 8, 6).expand(2, 3, 8, 6), ([2, 2], [2, 2], [0, 0])),
    'unbatched': (torch.randn(3, 8, 6), ([2, 2], [2, 2], [0, 0])),
    'half': (torch.randn(2, 3, 8, 6).half(), ([2, 2], [2, 2], [0, 0])),
    'an empty batch': (torch.randn(0, 3, 8, 6), ([2, 2], [2, 2], [0, 0])),
    '1d, tokens by channels': (torch.randn(2, 8, 3).transpose(1, 2), ([3], [2], [1])),
    '3d': (torch.randn(2, 2, 4, 5, 6), ([1, 3, 3], [1, 2, 2], [0, 1, 1])),
    '3d, unbatched': (torch.randn(3, 4, 6, 8), ([2, 2, 2], [2, 2, 2], [0, 0, 0])),
    '3d, unbatched, time innermost': (
        torch.randn(1, 3, 4, 6, 8).to(memory_format=torch.channels_last_3d)[0].permute(1, 0, 2, 3),
        ([2, 2, 2], [2, 2, 2], [0, 0, 0])),
    'one channel, channels_last': (
        torch.randn(2, 1, 8, 6).to(memory_format=torch.channels_last), ([2, 2], [2, 2], [0, 0])),
    'one cell left, channels_last': (
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), ([4, 4], [4, 4], [0, 0])),
    '3d, channels_last': (
        torch.randn(2, 3, 4, 6, 6).to(memory_format=torch.channels_last_3d), ([2, 2, 2], [2, 2, 2], [0, 0, 0])),
}
every_layout = pytest.mark.parametrize('input, window', LAYOUTS.values(), ids=LAYOUTS)
either_gradient = pytest.mark.parametrize('detach_weights', [False, True])


def usable_backends(input):
    """The backends of this machine that take ``input``, whatever the window."""
    return [name for name, state in available_backends().items()
            if state == 'available' and dispatch.BACKENDS[name].supports(input, Window((2,), (2,), (0,)))]


# What PyTorch asks of an operator

@every_layout
@pytest.mark.parametrize('requires_grad', [False, True])
def test_the_operator_passes_opcheck(input, window, requires_grad):
    opcheck(OPERATOR, (input.detach().requires_grad_(requires_grad), *window))


@every_layout
@pytest.mark.parametrize('requires_grad', [False, True])
def test_the_operator_of_the_gradient_passes_opcheck(input, window, requires_grad):
    grad_output = torch.randn_like(OPERATOR(input, *window))
    opcheck(BACKWARD, [tensor.detach().requires_grad_(requires_grad) for tensor in (grad_output, input)] + [*window])


@every_layout
def test_fake_tensors_have_the_shape_dtype_and_strides_of_real_ones(input, window):
    def layouts(input):
        out = OPERATOR(input.detach().requires_grad_(), *window)
        grad = BACKWARD(torch.ones_like(out), input, *window)
        return [(tensor.shape, tensor.dtype, tensor.stride()) for tensor in (out, grad)]

    with FakeTensorMode() as mode:
        fake = layouts(mode.from_tensor(input))
    assert fake == layouts(input)


def test_a_meta_tensor_is_pooled_without_data():
    input = torch.empty(2, 3, 10 ** 6, 10 ** 6, device='meta', dtype=torch.half, requires_grad=True)
    out = soft_pool2d(input)
    out.backward(torch.empty_like(out))
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 500_000, 500_000), torch.half, 'meta')
    assert input.grad.shape == input.shape


@pytest.mark.parametrize('input, window', [
    (torch.zeros(4, 4), ([2, 2], [2, 2], [0, 0])), (torch.zeros(1, 1, 4, 4).int(), ([2, 2], [2, 2], [0, 0])),
    (torch.zeros(1, 0, 4, 4), ([2, 2], [2, 2], [0, 0])), (torch.zeros(1, 1, 4, 4), ([5, 2], [2, 2], [0, 0])),
    (torch.zeros(1, 1, 4, 4), ([2, 2], [2, 0], [0, 0])), (torch.zeros(1, 1, 4, 4), ([2, 2], [2, 2], [2, 0])),
    (torch.zeros(1, 1, 4, 4), ([2, 2], [2], [0, 0])), (torch.zeros(1, 1, 4, 4), ([2] * 4, [2] * 4, [0] * 4)),
], ids=['rank', 'dtype', 'no channels', 'small input', 'stride', 'padding', 'lengths', 'four axes'])
def test_the_operator_refuses_the_same_with_the_same_words_for_real_and_meta_tensors_and_in_the_formula(input, window):
    def refusal(function, *arguments):
        with pytest.raises((ValueError, TypeError)) as caught:
            function(*arguments)
        return caught.type, str(caught.value)

    real = refusal(OPERATOR, input, *window)
    assert refusal(OPERATOR, input.to('meta'), *window) == real
    assert refusal(lambda: kernels.reference.soft_pool(input, Window.make(*window, False))) == real


@pytest.mark.parametrize('grad_output', [
    torch.ones(1, 1, 1, 1), torch.ones(1, 1, 4, 4).double(), torch.ones(1, 1, 4, 4, device='meta')],
    ids=['shape', 'dtype', 'device'])
def test_the_operator_of_the_gradient_refuses_what_is_no_gradient_of_the_output(grad_output):
    for device in ('cpu', 'meta'):
        if device == 'meta' and grad_output.device.type == 'meta':
            continue
        with pytest.raises(ValueError, match=r'grad_output .*\(1, 1, 4, 4\).*float32'):
            BACKWARD(grad_output, torch.ones(1, 1, 8, 8, device=device), [2, 2], [2, 2], [0, 0])


# The formula and the backends

@given(cases(), st.sampled_from(DTYPES), st.sampled_from([1.0, 30.0, 1e4]), st.booleans())
def test_every_backend_gives_what_the_formula_gives(case, dtype, scale, detach_weights):
    input, grad_output = random(case, dtype, scale)
    expected = values_and_gradients(
        lambda x: kernels.reference.soft_pool(x, Window.make(*case.geometry), detach_weights), input, grad_output)
    assert 'eager' in usable_backends(input)
    for name in usable_backends(input):
        with backend(name):
            out, grad = values_and_gradients(lambda x: case.pool(x, detach_weights=detach_weights), input, grad_output)
        assert_rounded(out, expected[0], dtype)
        assert_rounded(grad, expected[1], dtype, float(grad_output.abs().max()))


@every_layout
def test_every_backend_gives_what_the_formula_gives_in_every_layout(input, window):
    pool = Window.make(*window[:3], *window[3:] or [False])
    grad_output = torch.randn_like(OPERATOR(input, *window))
    expected = values_and_gradients(
        lambda x: kernels.reference.soft_pool(x, pool), input.double(), grad_output.double())
    for name in usable_backends(input):
        with backend(name):
            actual = values_and_gradients(lambda x: OPERATOR(x, *window), input, grad_output)
        for result, wanted in zip(actual, expected, strict=True):
            assert_rounded(result, wanted, input.dtype, 8.0)


@pytest.mark.parametrize('window', SPECIAL_WINDOWS.values(), ids=SPECIAL_WINDOWS)
@either_gradient
def test_every_backend_gives_what_the_formula_gives_for_nan_and_infinities(window, detach_weights):
    input, grad_output = torch.tensor([[*window, 1.0, 2.0, 3.0, 4.0]]), torch.tensor([[5.0, -6.0]])
    expected = values_and_gradients(
        lambda x: kernels.reference.soft_pool(x, Window((4,), (4,), (0,)), detach_weights), input, grad_output)
    for name in usable_backends(input):
        with backend(name):
            actual = values_and_gradients(
                lambda x: soft_pool1d(x, 4, detach_weights=detach_weights), input, grad_output)
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_every_backend_gives_the_same_bits_each_time(case):
    input, grad_output = random(case)
    for name in usable_backends(input):
        with backend(name):
            first, second = (values_and_gradients(case.pool, input, grad_output) for _ in range(2))
        assert all(map(torch.equal, first, second))


# Which backend serves

@pytest.fixture
def a_faster_backend(monkeypatch):
    """A backend before all others that takes float64 only and counts its calls."""
    calls = []

    def counted(name):
        return lambda *arguments: calls.append(name) or getattr(eager, name)(*arguments)

    module = SimpleNamespace(forward=counted('forward'), backward=counted('backward'), calls=calls,
                             missing=lambda: '', supports=lambda input, window: input.dtype == torch.float64)
    monkeypatch.setattr(dispatch, 'BACKENDS', {'faster': module, **dispatch.BACKENDS})
    return module


def test_the_eager_backend_is_always_available():
    assert available_backends()['eager'] == 'available'


def test_the_first_backend_that_takes_the_tensor_serves_it_forward_and_backward(a_faster_backend):
    values_and_gradients(soft_pool2d, torch.randn(1, 1, 2, 2), torch.ones(1, 1, 1, 1))
    assert a_faster_backend.calls == []
    values_and_gradients(soft_pool2d, torch.randn(1, 1, 2, 2).double(), torch.ones(1, 1, 1, 1).double())
    assert a_faster_backend.calls == ['forward', 'backward']


def test_set_backend_holds_until_it_is_given_none(a_faster_backend):
    input = torch.randn(1, 1, 2, 2).double()
    set_backend('eager')
    soft_pool2d(input)
    assert a_faster_backend.calls == []
    set_backend(None)
    soft_pool2d(input)
    assert a_faster_backend.calls == ['forward']


def test_backend_gives_back_the_former_choice_after_an_exception_too(a_faster_backend):
    set_backend('faster')
    with pytest.raises(KeyError), backend('eager'):
        with backend(None), backend('eager'):
            pass
        assert dispatch.choose(torch.zeros(1).double(), None) is eager
        raise KeyError
    assert dispatch.choose(torch.zeros(1).double(), None) is a_faster_backend


def test_backend_holds_in_other_threads(a_faster_backend):
    input = torch.randn(1, 1, 2, 2).double()
    with backend('eager'):
        thread = threading.Thread(target=soft_pool2d, args=(input,))
        thread.start()
        thread.join()
    assert a_faster_backend.calls == []


@pytest.mark.parametrize('choose', [set_backend, lambda name: backend(name).__enter__()], ids=['set', 'with'])
def test_an_unknown_backend_is_refused_with_the_names_of_the_known_ones(choose):
    with pytest.raises(ValueError, match="backend .*'eager'.* got 'gpu'"):
        choose('gpu')


@pytest.mark.parametrize('choose', [set_backend, lambda name: backend(name).__enter__()], ids=['set', 'with'])
def test_a_backend_that_cannot_run_is_listed_and_refused_with_its_reason_and_never_serves(a_faster_backend, choose):
    a_faster_backend.missing = lambda: 'no compiler'
    assert available_backends()['faster'] == 'no compiler'
    with pytest.raises(RuntimeError, match="'faster'.*no compiler"):
        choose('faster')
    soft_pool2d(torch.randn(1, 1, 2, 2).double())
    assert a_faster_backend.calls == []
