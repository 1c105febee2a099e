"""One operator, many roads: values and gradients are those of plain eager mode wherever PyTorch takes the pool."""
import copy
import io
import pickle
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import CASES, LAYERS, POOLS, random, values_and_gradients
from timm.models import create_feature_extractor
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from timm_softpool import SoftPool2d, SoftPool2dSame, soft_pool2d

every_case = pytest.mark.parametrize('case', CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch.compiler.reset()


def assert_same(function, expected, input, grad_output=None):
    grad_output = torch.randn_like(expected(input)) if grad_output is None else grad_output
    results = (values_and_gradients(f, input, grad_output) for f in (function, expected))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted)
        assert actual.stride() == wanted.stride()


# Copies, compilers, tracers and exporters of layers

def saved_script(layer, input):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(layer), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


ROADS = {
    'deepcopy': lambda layer, input: copy.deepcopy(layer),
    'pickle': lambda layer, input: pickle.loads(pickle.dumps(layer)),
    'checkpoint': lambda layer, input: partial(checkpoint, layer, use_reentrant=False),
    'jit.script': lambda layer, input: torch.jit.script(layer),
    'jit.script, saved': saved_script,
    'jit.trace': torch.jit.trace,
    'fx': lambda layer, input: torch.fx.symbolic_trace(layer),
    'compile': lambda layer, input: torch.compile(layer, fullgraph=True, backend='aot_eager'),
    'compile, dynamic': lambda layer, input: torch.compile(layer, fullgraph=True, backend='aot_eager', dynamic=True),
    'export': lambda layer, input: torch.export.export(layer, (input,)).module(),
    'export, strict': lambda layer, input: torch.export.export(layer, (input,), strict=True).module(),
    'vmap': lambda layer, input: lambda x: torch.vmap(layer)(x[None])[0],
}


@every_case
@pytest.mark.parametrize('road', ROADS.values(), ids=ROADS)
def test_a_layer_gives_the_same_on_every_road(case, road):
    layer, (input, grad_output) = LAYERS[case.ndim](*case.geometry), random(case)
    assert_same(road(layer, input), layer, input, grad_output)


@pytest.mark.parametrize('road', ROADS.values(), ids=ROADS)
def test_detached_weights_stay_detached_on_every_road(road):
    layer, input = SoftPool2d(3, 2, 1, detach_weights=True), torch.randn(2, 3, 8, 7)
    assert_same(road(layer, input), layer, input)


def timm_fx(layer, input):
    extractor = create_feature_extractor(nn.Sequential(layer), {'0': 'out'})
    return lambda x: extractor(x)['out']


# FX cannot trace timm's pad_same; timm's own tracer takes such layers as leaves.
@pytest.mark.parametrize('road', [pytest.param(road, id=name) for name, road in ROADS.items() if name != 'fx'] + [
    pytest.param(timm_fx, id='timm fx')])
def test_the_layer_with_same_padding_gives_the_same_on_every_road(road):
    layer, input = SoftPool2dSame(3, 2), torch.randn(2, 3, 8, 7)
    assert_same(road(layer, input), layer, input)


@pytest.mark.parametrize('change', [
    lambda x: x, lambda x: x.transpose(2, 3), lambda x: x.contiguous(memory_format=torch.channels_last),
], ids=['contiguous', 'axes swapped', 'channels_last'])
def test_inductor_compiles_the_pool_between_other_operations(change):
    def function(x):
        return soft_pool2d(x * 2, 3, 2).sin() + 1

    input = change(torch.randn(2, 3, 8, 8))
    assert_same(torch.compile(function, fullgraph=True), function, input)


def test_compiled_with_dynamic_shapes_it_does_not_compile_again():
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(SoftPool2d(3, 2, 1, ceil_mode=True), fullgraph=True, dynamic=True, backend=counter)
    for size in ((2, 3, 8, 7), (4, 3, 9, 12), (3, 5, 15, 10)):
        assert_same(compiled, SoftPool2d(3, 2, 1, ceil_mode=True), torch.randn(size))
    assert counter.frame_count == 1


@pytest.mark.parametrize('road', [
    lambda module, input: torch.compile(module, fullgraph=True, backend='aot_eager', dynamic=True),
    lambda module, input: torch.export.export(module, (input,), dynamic_shapes=({2: Dim.AUTO},)).module(),
    torch.jit.trace], ids=['compile, dynamic', 'export', 'jit.trace'])
def test_the_window_may_be_the_size_of_the_input_as_for_max_pool(road):
    class GlobalPool(nn.Module):
        def forward(self, x):
            return soft_pool2d(x, x.shape[-2:])

    input = torch.randn(2, 3, 8, 7)
    assert_same(road(GlobalPool(), input), GlobalPool(), input)


@pytest.mark.parametrize('layer', [
    SoftPool2d(2), SoftPool2d(3, 2, 1), SoftPool2d(3, 2, 1, ceil_mode=True), SoftPool2dSame(3, 2)], ids=repr)
@pytest.mark.parametrize('strict', [False, True])
def test_an_exported_program_holds_no_operator_of_ours_and_takes_any_batch_and_height(layer, strict):
    program = torch.export.export(
        layer, (torch.randn(2, 3, 9, 8),), dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},), strict=strict)
    for graph in (program.graph, program.run_decompositions().graph):
        assert not [node for node in graph.nodes if 'timm_softpool' in str(node.target)]
    for size in ((5, 3, 14, 8), (1, 3, 7, 8)):
        assert_same(program.module(), layer, torch.randn(size))


@pytest.mark.parametrize('layer', [SoftPool2d(2), SoftPool2d(3, 2, 1, ceil_mode=True), SoftPool2dSame(3, 2)], ids=repr)
def test_onnx_runtime_gives_the_same_for_any_batch_and_height(layer):
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    program = torch.onnx.export(layer.eval(), (torch.randn(2, 3, 9, 8),), dynamo=True, verbose=False,
                                dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.DYNAMIC},))
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    for size in ((2, 3, 9, 8), (5, 3, 14, 8)):
        input = torch.randn(size)
        output, = session.run(None, {session.get_inputs()[0].name: input.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), layer(input))


# Function transforms and forward mode

@every_case
def test_vmap_may_be_nested_and_map_any_axis(case):
    input = torch.randn(4, 5, *case.shape)
    expected = torch.stack([torch.stack([case.pool(x) for x in row]) for row in input])
    torch.testing.assert_close(torch.vmap(torch.vmap(case.pool))(input), expected)
    last = torch.vmap(torch.vmap(case.pool, in_dims=-1, out_dims=-1), in_dims=1, out_dims=1)(input.movedim(0, -1))
    torch.testing.assert_close(last, expected.movedim(0, -1).movedim(0, 1).movedim(1, 0))


@every_case
@pytest.mark.parametrize('detach_weights', [False, True])
def test_func_grad_and_per_sample_gradients_are_those_of_autograd(case, detach_weights):
    pool = partial(case.pool, detach_weights=detach_weights)
    input, grad_output = random(case)
    _, expected = values_and_gradients(pool, input, grad_output)

    def loss(x):
        return (pool(x) * grad_output).sum()

    torch.testing.assert_close(torch.func.grad(loss)(input), expected)
    inputs = torch.stack([input, input + 1])
    per_sample = torch.vmap(torch.func.grad(loss))(inputs)
    torch.testing.assert_close(per_sample, torch.stack([expected, torch.func.grad(loss)(input + 1)]))


@every_case
def test_func_jacobians_hessian_and_jvp_are_those_of_autograd(case):
    input, grad_output = random(case, torch.float64)
    tangent = torch.randn_like(input)

    def loss(x):
        return (case.pool(x).square() * grad_output).sum()

    expected = jacobian(case.pool, input)
    torch.testing.assert_close(torch.func.jacrev(case.pool)(input), expected)
    torch.testing.assert_close(torch.func.jacfwd(case.pool)(input), expected)
    torch.testing.assert_close(torch.func.hessian(loss)(input), hessian(loss, input))
    out, out_tangent = torch.func.jvp(case.pool, (input,), (tangent,))
    torch.testing.assert_close(out, case.pool(input))
    torch.testing.assert_close(out_tangent.flatten(), expected.reshape(out.numel(), -1) @ tangent.flatten())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(case.pool(forward_ad.make_dual(input, tangent)))
        torch.testing.assert_close(tuple(dual), (out, out_tangent))


def test_batched_gradients_are_those_of_one_call_each():
    input = torch.randn(2, 3, 8, 8, requires_grad=True)
    output = soft_pool2d(input, 3, 2, 1)
    grad_outputs = torch.randn(4, *output.shape)
    gradient = partial(torch.autograd.grad, output, input, retain_graph=True)
    expected = torch.stack([gradient(grad_output)[0] for grad_output in grad_outputs])
    torch.testing.assert_close(gradient(grad_outputs, is_grads_batched=True)[0], expected)


@pytest.mark.parametrize('transform', [
    torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), lambda f: torch.vmap(f),
    lambda f: torch.vmap(torch.func.grad(f))], ids=['grad', 'jvp', 'vmap', 'vmap of grad'])
def test_function_transforms_may_be_compiled(transform):
    transformed = transform(lambda x: soft_pool2d(x, 3, 2, 1).sin().sum())
    input = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(transformed, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(input), transformed(input))


# Modes

@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
@every_case
def test_without_gradients_the_values_are_the_same_and_nothing_is_recorded(mode, case):
    input = random(case)[0].requires_grad_()
    with mode():
        output = case.pool(input)
    assert output.grad_fn is None and torch.equal(output, case.pool(input))


@pytest.mark.parametrize('ndim', [1, 2, 3])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
def test_autocast_leaves_the_pool_in_the_dtype_it_is_given(ndim, dtype):
    def under_autocast(x):
        with torch.autocast('cpu', torch.bfloat16):
            return POOLS[ndim](x)

    assert_same(under_autocast, POOLS[ndim], torch.randn([2, 3, 6, 4, 8][:ndim + 2]).to(dtype))


def test_under_autocast_a_convolution_hands_bfloat16_through_the_pool():
    with torch.autocast('cpu', torch.bfloat16):
        output = nn.Sequential(nn.Conv2d(3, 4, 3), SoftPool2d())(torch.randn(2, 3, 8, 8))
    assert output.dtype == torch.bfloat16


# Two processes

def gradients(wrap, samples):
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 3), SoftPool2d(3, 2, 1), nn.Flatten(), nn.Linear(36, 1)))
    model(torch.randn(8, 3, 8, 8)[samples]).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


def train_one_step(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    torch.save(gradients(nn.parallel.DistributedDataParallel, slice(rank, None, 2)), f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='needs gloo')
def test_two_processes_get_the_gradients_of_one_with_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(train_one_step, (tmp_path,), nprocs=2)
    expected = gradients(lambda model: model, slice(None))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f'{rank}.pt'), expected)
