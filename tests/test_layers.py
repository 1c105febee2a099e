"""The layers: SoftPool1d, SoftPool2d, SoftPool3d, SoftPool2dSame, and their place in timm's models."""
import pytest
import timm
import torch
from helpers import CASES, LAYERS, POOLS, random
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from timm_softpool import SoftPool1d, SoftPool2d, SoftPool2dSame, SoftPool3d

every_layer = pytest.mark.parametrize('layer', [*LAYERS.values(), SoftPool2dSame])
sizes_of_same_pools = pytest.mark.parametrize('kernel_size, stride', [
    (1, 1), (2, 2), (3, 2), (3, 1), (2, 3), (4, 2), ((3, 2), (2, 1)), (3, None)], ids=str)


@pytest.mark.parametrize('layer, text', [
    (SoftPool1d(), 'SoftPool1d(kernel_size=(2,), stride=(2,), padding=(0,))'),
    (SoftPool2d(3, 2, 1), 'SoftPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))'),
    (SoftPool3d((1, 3, 3), ceil_mode=True, detach_weights=True),
     'SoftPool3d(kernel_size=(1, 3, 3), stride=(1, 3, 3), padding=(0, 0, 0), ceil_mode=True, detach_weights=True)'),
    (SoftPool2dSame(3, 2), 'SoftPool2dSame(kernel_size=(3, 3), stride=(2, 2), padding=(0, 0))'),
], ids=lambda value: value if isinstance(value, str) else '')
def test_a_layer_prints_its_window_and_what_differs_from_the_default(layer, text):
    assert repr(layer) == text


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
@pytest.mark.parametrize('detach_weights', [False, True])
def test_a_layer_gives_what_its_function_gives(case, detach_weights):
    layer = LAYERS[case.ndim](*case.geometry, detach_weights=detach_weights)
    input = random(case)[0].requires_grad_()
    outputs = layer(input), case.pool(input, detach_weights=detach_weights)
    assert torch.equal(*outputs)
    assert torch.equal(*(torch.autograd.grad(output.square().sum(), input)[0] for output in outputs))


@pytest.mark.parametrize('ndim', [1, 2, 3])
def test_a_layer_pools_two_cells_of_each_axis_unless_told_otherwise(ndim):
    input = torch.randn([2, 3, 6, 4, 8][:ndim + 2])
    assert torch.equal(LAYERS[ndim]()(input), POOLS[ndim](input, 2, 2))


@every_layer
def test_a_layer_has_nothing_to_learn_or_to_save(layer):
    assert not list(layer().parameters()) and not list(layer().buffers()) and not layer().state_dict()


@every_layer
@pytest.mark.parametrize('sizes, error, message', [
    (dict(kernel_size=0), ValueError, 'kernel_size .*0'), (dict(kernel_size=2.0), TypeError, r'kernel_size .*2\.0'),
    (dict(kernel_size=(2,) * 4), ValueError, r'kernel_size .*\(2, 2, 2, 2\)'),
    (dict(stride=0), ValueError, 'stride .*0'), (dict(stride='2'), TypeError, "stride .*'2'"),
    (dict(padding=-1), ValueError, 'padding .*-1'), (dict(padding=2), ValueError, 'padding .*half of kernel_size.*2'),
], ids=str)
def test_a_bad_size_is_refused_when_the_layer_is_made(layer, sizes, error, message):
    with pytest.raises(error, match=message):
        layer(**sizes)


@every_layer
def test_detach_weights_is_given_by_name_only(layer):
    assert layer(detach_weights=True).detach_weights
    with pytest.raises(TypeError):
        layer(2, 2, 0, False, True)


@pytest.mark.parametrize('ndim', [1, 2, 3])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_a_layer_moves_with_its_model(ndim, dtype, device):
    model = nn.Sequential(LAYERS[ndim](3, 2, 1)).to(device, dtype)
    output = model(torch.zeros([2, 3, 7, 8, 9][:ndim + 2], device=device, dtype=dtype))
    assert (output.dtype, output.device.type, output.shape) == (dtype, device, (2, 3, 4, 4, 5)[:ndim + 2])


# 'Same' padding

@sizes_of_same_pools
@pytest.mark.parametrize('height, width', [(8, 8), (7, 9), (6, 5), (1, 2), (3, 3)])
def test_same_padding_gives_the_output_size_of_timms_pools(kernel_size, stride, height, width):
    input = torch.randn(2, 3, height, width)
    timms = AvgPool2dSame(kernel_size, stride) if stride else MaxPool2dSame(kernel_size, kernel_size)
    steps = torch.nn.modules.utils._pair(stride or kernel_size)
    output = SoftPool2dSame(kernel_size, stride)(input)
    assert output.shape[-2:] == tuple(-(-size // step) for size, step in zip((height, width), steps, strict=True))
    assert output.shape == timms(input).shape


def test_same_padding_is_all_the_padding_there_is_as_in_timms_pools():
    input = torch.randn(2, 3, 9, 9)
    assert SoftPool2dSame(3, 2, padding=1)(input).shape == AvgPool2dSame(3, 2, padding=1)(input).shape


@sizes_of_same_pools
@pytest.mark.parametrize('axis', [2, 3])
def test_cells_added_by_same_padding_have_weight_zero(kernel_size, stride, axis):
    # Along the stripes all cells are equal, so a window that counted a padded one would not give their value.
    stripes = torch.tensor([-3.0, -1.0, -7.0, -2.0, -5.0])
    input = stripes.view([-1, 1] if axis == 2 else [1, -1]).expand(1, 1, 5, 5).contiguous().requires_grad_()
    layer = SoftPool2dSame(kernel_size, stride)
    output = layer(input)
    along = output.amax(5 - axis, keepdim=True)
    torch.testing.assert_close(output, along.expand_as(output))
    maximum = MaxPool2dSame(layer.kernel_size, layer.stride)(input)
    minimum = -MaxPool2dSame(layer.kernel_size, layer.stride)(-input)
    assert (minimum <= output).all() and (output <= maximum).all()
    torch.testing.assert_close(torch.autograd.grad(output.sum(), input)[0].sum(), torch.tensor(float(output.numel())))


# timm's models

@pytest.mark.parametrize('name, count, options', [
    ('resnet18', 4, dict(aa_layer=SoftPool2d)), ('seresnet50', 4, dict(aa_layer=SoftPool2d)),
    ('efficientnet_b0', 4, dict(aa_layer=SoftPool2d)), ('mobilenetv3_small_100', 4, dict(aa_layer=SoftPool2d)),
    ('cspresnet50', 4, dict(aa_layer=SoftPool2d)), ('resnet18', 4, dict(aa_layer=SoftPool2dSame)),
    # DenseNet gives the channels by position, where a pool has its kernel size.
    ('densenet121', 4, dict(aa_layer=lambda channels, stride, **_: SoftPool2d(stride), aa_stem_only=False)),
])
def test_the_pool_is_an_anti_aliasing_layer_of_timms_models(name, count, options):
    model = timm.create_model(name, num_classes=2, **options)
    pools = [module for module in model.modules() if isinstance(module, SoftPool2d)]
    assert [(pool.kernel_size, pool.stride) for pool in pools] == [((2, 2), (2, 2))] * count
    features = model.forward_features(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, model.num_features, 2, 2)
    model.forward_head(features).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
