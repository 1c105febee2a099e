"""What soft_pool1d, soft_pool2d and soft_pool3d compute, what they keep of their input, and what they refuse."""
from functools import partial
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    CASES,
    DTYPES,
    INF,
    MAX_POOLS,
    POOLS,
    SPECIAL_WINDOWS,
    assert_rounded,
    cases,
    random,
    reference,
    values_and_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from timm_softpool import soft_pool1d, soft_pool2d

every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize('dtype', DTYPES, ids=str)


# The formula

@settings(max_examples=400)
@given(cases(), st.sampled_from(DTYPES), st.sampled_from([1e-3, 1.0, 30.0, 1e4]), st.booleans())
def test_values_and_gradients_are_those_of_the_definition(case, dtype, scale, detach_weights):
    input, grad_output = random(case, dtype, scale)
    out, grad = values_and_gradients(partial(case.pool, detach_weights=detach_weights), input, grad_output)
    expected_out, expected_grad = reference(
        input, *case.geometry, grad_output=grad_output, detach_weights=detach_weights)
    assert_rounded(out, expected_out, dtype, min(scale, 1.0))
    assert_rounded(grad, expected_grad, dtype, float(grad_output.abs().max()))


@pytest.mark.parametrize('detach_weights', [False, True])
def test_the_gradient_of_one_window_is_the_closed_form(detach_weights):
    x = torch.tensor([[0.5, -1.0, 2.0, 1.5]], dtype=torch.float64)
    out, grad = values_and_gradients(
        partial(soft_pool1d, kernel_size=4, detach_weights=detach_weights), x, torch.ones(1, 1, dtype=torch.float64))
    weights = x.exp() / x.exp().sum()
    torch.testing.assert_close(out, (weights * x).sum(1, keepdim=True))
    torch.testing.assert_close(grad, weights if detach_weights else weights * (1 + x - out))


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=9))
def test_the_result_lies_between_the_mean_and_the_maximum_of_the_window(window):
    cells = torch.tensor([window], dtype=torch.float64)
    out = soft_pool1d(cells, len(window)).item()
    assert cells.mean() - 1e-11 <= out <= max(window)


@given(cases(), st.sampled_from(DTYPES), st.sampled_from([-1e4, -0.1, 0.0, 3.0]))
def test_equal_cells_give_their_value_exactly_with_padding_too(case, dtype, value):
    input = torch.full(case.shape, value, dtype=dtype)
    assert torch.equal(case.pool(input), case.max_pool(input))


@pytest.mark.parametrize('ndim', [1, 2, 3])
@every_dtype
def test_a_window_of_one_cell_changes_nothing(ndim, dtype):
    input = torch.randn([2, 3, 5, 4, 6][:ndim + 2]).to(dtype)
    assert torch.equal(POOLS[ndim](input, 1), input)


@given(cases(), st.floats(-1e4, 1e4))
def test_a_constant_added_to_the_input_is_added_to_the_result(case, constant):
    input, _ = random(case, torch.float64)
    torch.testing.assert_close(case.pool(input + constant), case.pool(input) + constant, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('order', list(permutations(range(3))), ids=str)
def test_the_order_of_the_cells_of_a_window_does_not_matter(order):
    windows = torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(soft_pool1d(windows[..., order].flatten(1), 3), soft_pool1d(windows.flatten(1), 3))


def test_channels_and_samples_do_not_mix():
    input = torch.randn(3, 4, 6, 6)
    apart = [[soft_pool2d(channel[None])[0] for channel in sample] for sample in input]
    assert torch.equal(soft_pool2d(input), torch.stack([torch.stack(sample) for sample in apart]))


# Geometry

@given(st.data(), st.integers(1, 3), st.booleans())
def test_it_pools_what_max_pool_pools_to_the_size_of_max_pool(data, ndim, ceil_mode):
    def axes(low, high):
        return data.draw(st.tuples(*[st.integers(low, high)] * ndim))

    input, arguments = torch.zeros(2, 3, *axes(1, 7)), (axes(0, 4), axes(0, 4), axes(-1, 2))
    try:
        expected = MAX_POOLS[ndim](input, *arguments, ceil_mode=ceil_mode).shape
    except RuntimeError:
        with pytest.raises(ValueError):
            POOLS[ndim](input, *arguments, ceil_mode)
    else:
        assert POOLS[ndim](input, *arguments, ceil_mode).shape == expected


@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_one_number_stands_for_all_axes_and_the_stride_is_the_kernel_size_unless_given(ndim):
    input = torch.randn([2, 3, 6, 7, 8][:ndim + 2])
    assert torch.equal(POOLS[ndim](input, 3, None, 1), POOLS[ndim](input, [3] * ndim, (3,) * ndim, [1] * ndim))
    assert torch.equal(POOLS[ndim](input), POOLS[ndim](input, 2, 2, 0))


# What is kept of the input

@pytest.mark.parametrize('ndim, memory_format', [
    (1, torch.contiguous_format), (2, torch.contiguous_format), (2, torch.channels_last),
    (3, torch.contiguous_format), (3, torch.channels_last_3d)], ids=str)
@every_dtype
def test_dtype_and_memory_format_are_kept_by_result_and_gradient(ndim, memory_format, dtype):
    input = torch.randn([2, 3, 6, 4, 8][:ndim + 2]).to(dtype=dtype, memory_format=memory_format)
    out = POOLS[ndim](input)
    _, grad = values_and_gradients(POOLS[ndim], input, torch.ones_like(out))
    for result in (out, grad):
        assert result.dtype == dtype and result.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize('change', [
    lambda x: x.transpose(2, 3), lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x[:, 1:, 1:],
    lambda x: x[:, :1].expand(-1, 3, -1, -1), lambda x: x.contiguous(memory_format=torch.channels_last)[..., 1:],
], ids=['axes swapped', 'batch and channels swapped', 'every other cell', 'crop', 'expanded', 'channels_last crop'])
def test_an_input_that_is_not_contiguous_gives_what_its_copy_gives(change):
    input = change(torch.randn(3, 3, 8, 8))
    pool = partial(soft_pool2d, kernel_size=3, stride=2, padding=1)
    grad_output = torch.randn_like(pool(input)).transpose(2, 3).contiguous().transpose(2, 3)
    copies = values_and_gradients(pool, input.contiguous(), grad_output.contiguous())
    for result, expected in zip(values_and_gradients(pool, input, grad_output), copies, strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_an_empty_batch_gives_an_empty_result_and_an_empty_gradient(ndim):
    input = torch.empty([0, 3, 6, 6, 6][:ndim + 2])
    out, grad = values_and_gradients(POOLS[ndim], input, torch.empty([0, 3, 3, 3, 3][:ndim + 2]))
    assert out.shape == (0, 3, *[3] * ndim) and grad.shape == input.shape


# NaN, infinities and the ends of the number line

@pytest.mark.parametrize('window', SPECIAL_WINDOWS.values(), ids=SPECIAL_WINDOWS)
@every_dtype
def test_nan_and_infinities_give_what_max_pool_gives_in_their_own_window_only(window, dtype):
    input = torch.tensor([[*window, 1.0, 2.0, 3.0, 4.0]], dtype=dtype)
    out = soft_pool1d(input, 4)
    if window == SPECIAL_WINDOWS['-inf']:
        assert torch.equal(out[:, 0], soft_pool1d(input[:, 1:4], 3)[:, 0])
    else:
        torch.testing.assert_close(out[:, 0], F.max_pool1d(input, 4)[:, 0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out[:, 1], soft_pool1d(input[:, 4:], 4)[:, 0])


@every_dtype
@pytest.mark.parametrize('lowest', [lambda dtype: -INF, lambda dtype: torch.finfo(dtype).min], ids=['-inf', 'lowest'])
def test_beside_finite_cells_the_lowest_value_has_weight_and_gradient_zero(lowest, dtype):
    finite = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    window = F.pad(finite, (1, 0), value=lowest(dtype))
    ones = torch.ones(1, 1, dtype=dtype)
    out, grad = values_and_gradients(partial(soft_pool1d, kernel_size=4), window, ones)
    expected_out, expected_grad = values_and_gradients(partial(soft_pool1d, kernel_size=3), finite, ones)
    assert torch.equal(out, expected_out) and torch.equal(grad, F.pad(expected_grad, (1, 0)))


@every_dtype
def test_the_largest_numbers_do_not_overflow(dtype):
    largest = torch.finfo(dtype).max
    input = torch.tensor([[largest, -largest, largest, 0.0]], dtype=dtype)
    out, grad = values_and_gradients(partial(soft_pool1d, kernel_size=4), input, torch.ones(1, 1, dtype=dtype))
    assert out.item() == largest and grad.tolist() == [[0.5, 0.0, 0.5, 0.0]]


# Derivatives

@every_case
def test_gradcheck_passes(case):
    input, _ = random(case, torch.float64)
    assert gradcheck(case.pool, input.requires_grad_(), check_batched_grad=True, check_forward_ad=True)


@every_case
def test_gradgradcheck_passes(case):
    input, grad_output = random(case, torch.float64)
    assert gradgradcheck(case.pool, input.requires_grad_(), grad_output.requires_grad_())


@every_case
def test_derivatives_of_third_order_are_finite(case):
    derivative = random(case, torch.float64)[0].requires_grad_()
    function = case.pool(derivative).sin().sum()
    for _ in range(3):
        last, = torch.autograd.grad(function, derivative, create_graph=True)
        function = last.sin().sum()
    assert last.isfinite().all() and last.any()


def test_detached_weights_are_constants_of_the_second_derivative_too():
    input, direction = torch.randn(2, 1, 4, dtype=torch.float64)
    weights = input.softmax(1)
    out = soft_pool1d(input.requires_grad_(), 4, detach_weights=True)
    grad, = torch.autograd.grad(out.square().sum(), input, create_graph=True)
    second, = torch.autograd.grad((direction * grad).sum(), input)
    torch.testing.assert_close(second, 2 * (direction * weights).sum() * weights)


# Refusals

@pytest.mark.parametrize('input, error, message', [
    pytest.param(torch.tensor(1.0), ValueError, r'input .*\(\)', id='no axes'),
    pytest.param(torch.zeros(4, 4), ValueError, r'input .*\(4, 4\)', id='too few axes'),
    pytest.param(torch.zeros(1, 1, 1, 4, 4), ValueError, r'input .*\(1, 1, 1, 4, 4\)', id='too many axes'),
    pytest.param(torch.zeros(2, 0, 4, 4), ValueError, r'input .*\(2, 0, 4, 4\)', id='no channels'),
    pytest.param(torch.zeros(0, 4, 4), ValueError, r'input .*\(0, 4, 4\)', id='no channels, unbatched'),
    pytest.param(torch.zeros(2, 3, 4, 0), ValueError, r'input .*\(2, 3, 4, 0\)', id='no cells'),
    pytest.param(torch.zeros(3, 4, 1), ValueError, r'kernel_size \[2, 2\].*input.*\(3, 4, 1\)', id='under a window'),
    pytest.param(torch.zeros(3, 4, 4).cfloat(), TypeError, 'input .*complex64', id='complex'),
    pytest.param(torch.zeros(3, 4, 4).bool(), TypeError, 'input .*bool', id='boolean'),
    pytest.param(np.zeros((3, 4, 4), 'float32'), TypeError, 'input .*ndarray', id='an array'),
    pytest.param([[[1.0, 2.0], [3.0, 4.0]]], TypeError, 'input .*list', id='a list'),
    pytest.param(None, TypeError, 'input .*None', id='nothing'),
])
def test_an_input_that_max_pool_refuses_is_refused_by_name(input, error, message):
    with pytest.raises(error, match=message):
        soft_pool2d(input)
    with pytest.raises((RuntimeError, TypeError)):
        F.max_pool2d(input, 2)


def test_integers_are_refused_for_their_mean_is_none():
    with pytest.raises(TypeError, match='input .*float32.*int64'):
        soft_pool2d(torch.zeros(3, 4, 4).long())


@pytest.mark.parametrize('sizes, error, message', [
    (dict(kernel_size=0), ValueError, r'kernel_size .*at least 1.*0'),
    (dict(kernel_size=(2, -1)), ValueError, r'kernel_size .*at least 1.*\[2, -1\]'),
    (dict(kernel_size=7), ValueError, r'kernel_size \[7, 7\].*input.*\(2, 3, 6, 6\)'),
    (dict(kernel_size=2.0), TypeError, r'kernel_size .*integer.*2\.0'),
    (dict(kernel_size='2'), TypeError, r"kernel_size .*integer.*'2'"),
    (dict(kernel_size=True), TypeError, r'kernel_size .*integer.*True'),
    (dict(kernel_size=None), TypeError, r'kernel_size .*integer.*None'),
    (dict(kernel_size=(2, 2, 2)), ValueError, r'kernel_size .*2 integers.*\(2, 2, 2\)'),
    (dict(kernel_size=()), ValueError, r'kernel_size .*2 integers.*\(\)'),
    (dict(stride=0), ValueError, r'stride .*at least 1.*0'),
    (dict(stride=-2), ValueError, r'stride .*at least 1.*-2'),
    (dict(stride=1.5), TypeError, r'stride .*integer.*1\.5'),
    (dict(stride=(2, 2, 2)), ValueError, r'stride .*2 integers.*\(2, 2, 2\)'),
    (dict(padding=-1), ValueError, r'padding .*between 0 and half of kernel_size.*-1'),
    (dict(padding=2), ValueError, r'padding .*half of kernel_size.*padding=\[2, 2\].*kernel_size=\[2, 2\]'),
    (dict(padding=0.5), TypeError, r'padding .*integer.*0\.5'),
    (dict(padding=(0, 0, 0)), ValueError, r'padding .*2 integers.*\(0, 0, 0\)'),
], ids=str)
def test_a_size_that_max_pool_refuses_is_refused_by_name(sizes, error, message):
    sizes = dict(kernel_size=2) | sizes
    with pytest.raises(error, match=message):
        soft_pool2d(torch.zeros(2, 3, 6, 6), **sizes)
    with pytest.raises((RuntimeError, TypeError)):
        F.max_pool2d(torch.zeros(2, 3, 6, 6), **sizes)
