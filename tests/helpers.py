"""What several test files use: the pools beside PyTorch's, random windows, oracles, and videos."""
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import timm_softpool

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POOLS = {1: timm_softpool.soft_pool1d, 2: timm_softpool.soft_pool2d, 3: timm_softpool.soft_pool3d}
LAYERS = {1: timm_softpool.SoftPool1d, 2: timm_softpool.SoftPool2d, 3: timm_softpool.SoftPool3d}
MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
INF, NAN = float('inf'), float('nan')

# Windows of four cells that hold more than ordinary numbers; a name for each.
SPECIAL_WINDOWS = {
    'a NaN': (1, NAN, 3, 2), 'only NaN': (NAN,) * 4, 'NaN beside +inf': (NAN, 1, INF, 2), 'NaN beside -inf':
    (NAN, 1, -INF, 2), '+inf': (1, INF, 3, 2), 'two +inf': (INF, INF, 1, 2), '+inf beside -inf': (INF, -INF, 1, 2),
    '-inf': (-INF, 1, 2, 3), 'only -inf': (-INF,) * 4,
}


class Case(NamedTuple):
    """An input shape and a geometry that can pool it."""

    shape: tuple
    kernel_size: tuple
    stride: tuple
    padding: tuple
    ceil_mode: bool = False

    @property
    def ndim(self):
        return len(self.kernel_size)

    @property
    def geometry(self):
        return self[1:]

    def pool(self, input, **options):
        return POOLS[self.ndim](input, *self.geometry, **options)

    def max_pool(self, input):
        kernel_size, stride, padding, ceil_mode = self.geometry
        return MAX_POOLS[self.ndim](input, kernel_size, stride, padding, ceil_mode=ceil_mode)


@st.composite
def cases(draw):
    """One to three axes, batched or not, with overlap, gaps, padding and windows that hang over the end."""
    ndim = draw(st.integers(1, 3))
    kernel_size, stride = (draw(st.tuples(*[st.integers(1, 4)] * ndim)) for _ in range(2))
    padding = tuple(draw(st.integers(0, kernel // 2)) for kernel in kernel_size)
    least = [max(1, kernel - 2 * pad) for kernel, pad in zip(kernel_size, padding, strict=True)]
    size = tuple(draw(st.integers(cells, 7)) for cells in least)
    lead = draw(st.sampled_from([(2,), (2, 3)]))
    return Case(lead + size, kernel_size, stride, padding, draw(st.booleans()))


CASES = {
    '1d': Case((2, 3, 9), (3,), (2,), (1,)),
    '1d, unbatched, gaps': Case((3, 9), (2,), (3,), (0,)),
    '2d': Case((2, 3, 8, 6), (2, 2), (2, 2), (0, 0)),
    '2d, overlap, padding, ceil_mode': Case((2, 3, 8, 7), (3, 2), (2, 1), (1, 0), True),
    '2d, unbatched': Case((3, 7, 6), (3, 3), (2, 2), (1, 1)),
    '3d, overlap, padding, ceil_mode': Case((2, 2, 4, 5, 4), (1, 3, 3), (1, 2, 2), (0, 1, 1), True),
}


def reference(input, kernel_size, stride, padding, ceil_mode=False, *, grad_output=None, detach_weights=False):
    """SoftPool of ``input`` and its gradient for ``grad_output`` (ones if None), window by window in float64.

    Only the number of windows is taken from PyTorch's max pool.
    """
    x = input.detach().double()
    out = torch.empty_like(Case(x.shape, kernel_size, stride, padding, ceil_mode).max_pool(x))
    grad_output = torch.ones_like(out) if grad_output is None else grad_output.double()
    grad = torch.zeros_like(x)
    for cell in product(*map(range, out.shape[-len(kernel_size):])):
        starts = [index * step - pad for index, step, pad in zip(cell, stride, padding, strict=True)]
        ends = [start + kernel for start, kernel in zip(starts, kernel_size, strict=True)]
        window = (..., *(slice(max(start, 0), end) for start, end in zip(starts, ends, strict=True)))
        axes = tuple(range(-len(kernel_size), 0))
        maximum = x[window].amax(axes, keepdim=True)
        above = x[window] - maximum
        weights = above.exp() / above.exp().sum(axes, keepdim=True)
        mean = (weights * above).sum(axes, keepdim=True)
        out[(..., *cell)] = (maximum + mean)[(..., *[0] * len(cell))]
        slope = weights if detach_weights else weights * (1 + above - mean)
        grad[window] += slope * grad_output[(..., *[slice(index, index + 1) for index in cell])]
    return out, grad


def values_and_gradients(function, input, grad_output):
    """``function(input)`` and its gradient for ``grad_output``."""
    input = input.detach().requires_grad_()
    output = function(input)
    return output.detach(), torch.autograd.grad(output, input, grad_output)[0]


def random(case, dtype=torch.float32, scale=1.0):
    """An input for ``case`` and a gradient of its output, some of it above one."""
    input = ((2 * torch.rand(case.shape, dtype=torch.float64) - 1) * scale).to(dtype)
    return input, 4 * torch.randn_like(case.max_pool(input.double())).to(dtype)


def assert_rounded(actual, expected, dtype, scale=1.0):
    """Equal but for the rounding to ``dtype`` and of sums, which are taken in float32 at least."""
    assert actual.dtype == dtype
    epsilon, sums = (torch.finfo(d).eps for d in (dtype, torch.promote_types(dtype, torch.float32)))
    torch.testing.assert_close(actual.double(), expected.double(), rtol=4 * epsilon, atol=64 * sums * scale)


def by_hand(model, input, monkeypatch):
    """What ``model`` computes when PyTorch's own pooling functions, which its layers call too, are SoftPool."""
    def as_max(soft):
        return lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: (
            soft(input, kernel_size, stride, padding, ceil_mode))

    def as_average(soft):
        return lambda input, kernel_size, stride=None, padding=0, ceil_mode=False, *_, **__: (
            soft(input, kernel_size, stride, padding, ceil_mode))

    with monkeypatch.context() as patch:
        for ndim, soft in POOLS.items():
            patch.setattr(F, f'max_pool{ndim}d', as_max(soft))
            patch.setattr(F, f'avg_pool{ndim}d', as_average(soft))
        return model(input)


def write_video(path, frames, codec='mpeg4', rate=25, pixels='yuv420p'):
    """A video of ``frames``, uint8 (T, H, W, 3)."""
    import av

    with av.open(path, 'w') as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path
