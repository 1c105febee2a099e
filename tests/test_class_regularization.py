"""Class Regularization: the formula, on any classifier of either zoo, in every way a model is used."""
import copy
import pickle
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from classreg_helpers import CLIPS, IMAGES, create
from explain_helpers import narrow_slowfast
from hypothesis import given
from hypothesis import strategies as st
from pytorchvideo.models import hub as pytorchvideo_hub
from torch import nn

from timm_softpool import (
    ClassRegularization,
    add_class_regularization,
    remove_class_regularization,
)


def reference(input, weight, projection, strength):
    """The formula, one sample and channel at a time, in float64."""
    affinity = (weight @ projection.T if projection is not None else weight).double()
    out = input.double().clone()
    for sample in out:
        means = [float(channel.mean()) for channel in sample]
        responses = [sum(m * v for m, v in zip(means, row)) for row in affinity.tolist()]
        part = [m * v for m, v in zip(means, affinity[responses.index(max(responses))].tolist())]
        for channel, value in zip(sample, part):
            channel *= 1 + strength * (2 * (value - min(part)) / (max(part) - min(part)) - 1)
    return out


# The block

@given(st.integers(2, 6), st.integers(2, 6), st.integers(2, 5), st.floats(0.01, 0.99),
       st.sampled_from([(3, 4), (2, 3, 2)]), st.integers(0, 2 ** 16))
def test_the_block_is_the_formula(channels, features, classes, strength, size, seed):
    torch.manual_seed(seed)
    classifier = nn.Linear(features, classes)
    block = ClassRegularization(classifier, channels, strength)
    input = torch.randn(2, channels, *size)
    projection = None if block.projection is None else block.projection.weight
    assert (projection is None) == (channels == features)
    expected = reference(input, classifier.weight, projection, strength)
    torch.testing.assert_close(block(input), expected.float(), rtol=1e-4, atol=1e-5)


def test_where_all_channels_have_the_same_part_none_is_scaled():
    block = ClassRegularization(torch.nn.Linear(1, 3), 1, 0.3)
    input = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(block(input), input)


def test_factors_reach_from_one_minus_to_one_plus_the_strength():
    block = ClassRegularization(nn.Linear(8, 3), 16, 0.3)
    input = torch.rand(4, 16, 5, 5) + 0.1
    factors = (block(input) / input).mean((2, 3))
    torch.testing.assert_close(factors.amin(1), torch.full((4,), 0.7))
    torch.testing.assert_close(factors.amax(1), torch.full((4,), 1.3))


def test_gradients_are_right_and_stop_before_the_classifier_unless_asked_for():
    for detach, top_k in [(True, 1), (False, 1), (True, 2)]:
        classifier = nn.Linear(3, 4).double()
        block = ClassRegularization(classifier, 5, top_k=top_k, detach_classifier=detach).double()
        input = torch.randn(2, 5, 2, 3, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(block, input) and torch.autograd.gradgradcheck(block, input)
        block(torch.randn(2, 5, 2, 3, dtype=torch.double)).square().sum().backward()
        assert block.projection.weight.grad.abs().sum() > 0
        assert (classifier.weight.grad is None) == detach


def test_several_classes_are_weighed_by_the_softmax_of_their_responses():
    classifier = nn.Linear(6, 5)
    block, input = ClassRegularization(classifier, 6, 0.5, top_k=3), torch.randn(2, 6, 4, 4)
    means = input.mean((2, 3))
    response, classes = (means @ classifier.weight.T).topk(3)
    part = means * (response.softmax(1)[..., None] * classifier.weight[classes]).sum(1)
    part = (part - part.amin(1, True)) / (part.amax(1, True) - part.amin(1, True))
    torch.testing.assert_close(block(input), input * (0.5 + part)[..., None, None])


def test_streams_are_one_layer_side_by_side():
    torch.manual_seed(0)
    block, input = ClassRegularization(nn.Linear(6, 3), 6, 0.4), torch.randn(2, 6, 4, 4, 4)
    short, long = block((input[:, :4], input[:, 4:]))
    assert torch.equal(torch.cat([short, long], 1), block(input))
    assert isinstance(block([input]), list)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_types_come_back_as_they_came(dtype):
    block = ClassRegularization(nn.Linear(6, 3), 4).to(dtype)
    assert ClassRegularization(nn.Linear(6, 3).to(dtype), 4)(torch.rand(2, 4, 3, 3, dtype=dtype)).dtype == dtype
    assert block.projection.weight.dtype == dtype


def test_a_map_that_is_the_same_everywhere_gives_numbers():
    assert ClassRegularization(nn.Linear(6, 3), 4)(torch.zeros(1, 4, 3, 3)).isfinite().all()


def test_the_mean_of_a_large_map_is_within_float16_though_its_sum_is_not():
    assert ClassRegularization(nn.Linear(4, 3), 4)(torch.rand(1, 4, 400, 400, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize(('arguments', 'error', 'message'), [
    (dict(strength=-0.1), ValueError, 'strength must be at least 0 and less than 1, got -0.1'),
    (dict(strength=1), ValueError, 'strength must be at least 0 and less than 1, got 1'),
    (dict(channels=0), ValueError, 'channels must be at least 1, got 0'),
    (dict(top_k=4), ValueError, 'top_k must be between 1 and the number of classes, 3, got 4'),
    (dict(classifier=nn.ReLU()), TypeError, 'must be a linear layer, a 1 x 1 convolution, .*, got ReLU; any other'),
    (dict(classifier=nn.Conv2d(3, 3, 3)), TypeError, 'got Conv2d'),
    (dict(classifier=nn.Identity()), TypeError, 'got one without'),
])
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        ClassRegularization(**{'classifier': nn.Linear(6, 3), 'channels': 4, **arguments})


@pytest.mark.parametrize('shapes', [[(2, 5, 3, 3)], [(2, 4)], [(4,)], [(2, 4, 3)], [(2, 2, 3, 3), (2, 3, 3, 3)],
                                    [(2, 2, 3, 3), (2, 2, 3)], []])
def test_an_input_that_is_no_map_of_its_channels_is_refused(shapes):
    block, maps = ClassRegularization(nn.Linear(6, 3), 4), tuple(map(torch.zeros, shapes))
    message = ('input must be (N, C, H, W) or (N, C, T, H, W) with 4 channels in all, got '
               + ' and '.join(str(list(shape)) for shape in shapes))
    for input in [maps, maps[0]] if len(maps) == 1 else [maps]:
        with pytest.raises(ValueError, match=f'^{re.escape(message)}$'):
            block(input)


# On a model

@pytest.mark.parametrize('name', IMAGES + CLIPS)
@torch.no_grad()
def test_strength_zero_is_exactly_the_identity_and_removal_leaves_no_trace(name):
    model, input = create(name)
    expected, keys, kind = model(input), list(model.state_dict()), type(model)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    add_class_regularization(model, strength=0.0)
    assert torch.equal(model(input), expected)
    assert type(model) is kind and [key for key in model.state_dict() if 'class_reg' not in key] == keys
    assert len(model.class_regularization.layers) >= 2
    remove_class_regularization(model)
    add_class_regularization(model, strength=0.5)
    assert not torch.equal(model(input), expected)
    remove_class_regularization(model)
    assert torch.equal(model(input), expected)
    assert list(model.state_dict()) == keys
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@torch.no_grad()
def test_stages_that_end_in_channels_are_regularised_along_them():
    model = timm.create_model('swin_tiny_patch4_window7_224', num_classes=7, img_size=64, depths=(1, 1, 1, 1)).eval()
    add_class_regularization(model, input=torch.zeros(1, 3, 64, 64))
    assert [block.channels for block in model.class_regularization.blocks] == [96, 192, 384, 768]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 7)


@torch.no_grad()
def test_slowfast_takes_its_list():
    model = pytorchvideo_hub.slowfast_r50(model_num_class=7).eval()
    clips = [torch.randn(1, 3, 8, 224, 224), torch.randn(1, 3, 32, 224, 224)]
    add_class_regularization(model, ['blocks.1', 'blocks.4'], input=clips)
    assert [block.channels for block in model.class_regularization.blocks] == [256 + 64 + 32, 2048 + 256]
    assert model.class_regularization.affinity('blocks.1').shape == (7, 352)


@torch.no_grad()
def test_the_streams_of_slowfast_are_scaled_though_it_changes_its_lists():
    model, clips = narrow_slowfast().eval(), [torch.randn(1, 3, 2, 64, 64), torch.randn(1, 3, 8, 64, 64)]
    plain = model([*clips])
    add_class_regularization(model, input=[*clips])
    assert model([*clips]).shape == plain.shape and not torch.equal(model([*clips]), plain)
    torch.testing.assert_close(remove_class_regularization(model)([*clips]), plain)


def regularised(name='resnet18', strength=0.3, **options):
    model, input = create(name)
    return add_class_regularization(model, strength=strength, **options), input


def test_layers_and_their_strengths_can_be_named():
    model, _ = regularised(layers=['layer2.1.conv2', 'layer4'], strength=[0.1, 0.4])
    assert model.class_regularization.layers == ['layer2.1.conv2', 'layer4']
    assert [(block.channels, block.strength) for block in model.class_regularization.blocks] == [(128, .1), (512, .4)]


def test_the_affinity_is_the_classifier_s_weights_at_the_layer():
    model, _ = regularised()
    assert torch.equal(model.class_regularization.affinity('layer4'), model.fc.weight)
    projection = model.class_regularization.blocks[0].projection.weight
    torch.testing.assert_close(model.class_regularization.affinity('layer1'), model.fc.weight @ projection.T)
    with pytest.raises(ValueError, match="layer must be one of layer1, layer2, layer3, layer4, got 'layer5'"):
        model.class_regularization.affinity('layer5')


def test_the_projection_keeps_the_angles_between_classes_on_average():
    model, _ = create('resnet18')
    add_class_regularization(model, ['layer3'])
    plain, projected = (F.normalize(weight) for weight in
                        (model.fc.weight, model.class_regularization.affinity('layer3')))
    assert (plain @ plain.T - projected @ projected.T).abs().max() < 0.3


@torch.no_grad()
def test_a_new_classifier_is_followed_and_without_one_the_features_stay_as_they_were():
    model, input = regularised()
    model.reset_classifier(11)
    assert model(input).shape == (2, 11) and model.class_regularization.affinity('layer2').shape == (11, 128)
    features = model.forward_features(input)
    model.reset_classifier(0)
    assert torch.equal(model.forward_features(input), features)
    model.reset_classifier(6)
    assert model.class_regularization.affinity('layer2').shape == (6, 128)


@pytest.mark.parametrize('name', ['resnet18', 'densenet121'])
@pytest.mark.parametrize('road', [torch.fx.symbolic_trace,
                                  lambda model: torch.jit.script(torch.fx.symbolic_trace(model)),
                                  lambda model: torch.jit.trace(model, torch.randn(2, 3, 64, 64))],
                         ids=['fx', 'fx and jit.script', 'jit.trace'])
def test_traced_it_computes_the_same_and_follows_the_classifier_s_weights(name, road):
    model, input = timm.create_model(f'{name}_classreg', num_classes=7).eval(), torch.randn(2, 3, 64, 64)
    traced = road(model)
    torch.testing.assert_close(traced(input), model(input))
    with torch.no_grad():
        model.get_classifier().weight.mul_(torch.randn(7, 1))
    torch.testing.assert_close(traced(input), model(input))


@pytest.mark.parametrize('name', ['resnet18', 'mtnet_xs_w16'])
@pytest.mark.parametrize('copy_of', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
                         ids=['deepcopy', 'pickle'])
@torch.no_grad()
def test_a_copy_has_its_own_classifier(name, copy_of):
    model, input = regularised(name)
    expected, again = model(input), copy_of(model)
    assert torch.equal(again(input), expected)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(again(input), expected)
    remove_class_regularization(again)
    assert not torch.equal(again(input), expected)


@pytest.mark.parametrize('name', ['resnet18', 'mtnet_xs_w16', 'srtg_r3d_18_w16'])
@torch.no_grad()
def test_compiled_and_exported_models_compute_the_same(name):
    model, input = regularised(name)
    expected = model(input)
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(input), expected)
    exported = torch.export.export(model, (input,)).module()
    torch.testing.assert_close(exported(input), expected)


@pytest.mark.parametrize('name', ['resnet18', 'densenet121', 'convnext_atto'])
def test_gradient_checkpoints_change_nothing(name):
    model, input = regularised(name)
    expected = model(input)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(input), expected)


@torch.no_grad()
def test_stages_given_one_by_one_are_the_regularised_ones():
    model, input = regularised()
    last = model.forward_intermediates(input, intermediates_only=True)[-1]
    assert torch.equal(model.forward_head(last), model(input))


@pytest.mark.parametrize('strength', [0.0, 0.3])
def test_two_processes_train_as_one(strength, tmp_path):
    subprocess.run([sys.executable, '-W', 'ignore', '-c', f'''
import torch, torch.distributed as dist, torch.multiprocessing as mp, timm, timm_softpool
from torch.nn.parallel import DistributedDataParallel

def make():
    torch.manual_seed(0)
    return timm_softpool.add_class_regularization(
        timm.create_model('test_resnet', num_classes=5, norm_layer=torch.nn.Identity).double(), strength={strength})

def work(rank):
    torch.manual_seed(1)
    images, alone = torch.randn(4, 3, 64, 64, dtype=torch.double), make()
    alone(images).square().mean().backward()
    dist.init_process_group('gloo', init_method='file://{tmp_path}/rendezvous', rank=rank, world_size=2)
    model = DistributedDataParallel(make())
    for _ in range(2):
        model.zero_grad()
        model(images[rank::2]).square().mean().backward()
    for name, parameter in alone.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(model.module.get_parameter(name).grad, parameter.grad, msg=name)
    dist.destroy_process_group()

if __name__ == '__main__':
    mp.start_processes(work, nprocs=2, start_method='fork')
'''], check=True)


def test_modes_are_left_as_they_were():
    model, _ = create('resnet18')
    model.train()
    model.layer2.eval()
    before = {name: module.training for name, module in model.named_modules()}
    means = model.bn1.running_mean.clone()
    add_class_regularization(model)
    assert {name: module.training for name, module in model.named_modules()
            if 'class_reg' not in name} == before
    assert torch.equal(model.bn1.running_mean, means)
    assert [block.training for block in model.class_regularization.blocks] == [True, False, True, True]


def test_a_network_of_neither_zoo_says_which_layer_is_its_classifier():
    model = torchvision.models.resnet18(num_classes=5)
    with pytest.raises(TypeError, match='got ResNet; any other model needs a get_classifier'):
        add_class_regularization(model)
    model.get_classifier = lambda: model.fc
    add_class_regularization(model, ['layer3', 'layer4'], input=torch.zeros(1, 3, 64, 64))
    assert model.class_regularization.affinity('layer3').shape == (5, 256)


@pytest.mark.parametrize(('make', 'error', 'message'), [
    (lambda m: add_class_regularization('resnet18'), TypeError, 'model must be a torch.nn.Module, got str'),
    (lambda m: add_class_regularization(add_class_regularization(m)), ValueError, 'has class_regularization already'),
    (lambda m: add_class_regularization(m, ['layer9']), ValueError, "layers must be names of modules of the model"),
    (lambda m: add_class_regularization(m, []), ValueError, 'layers must be one or more different names'),
    (lambda m: add_class_regularization(m, ['layer1'] * 2), ValueError, 'layers must be one or more different names'),
    (lambda m: add_class_regularization(m, ['layer1', 'fc']), ValueError, r'feature maps .* but fc gives \(1, 7'),
    (lambda m: add_class_regularization(m, strength=1.0), ValueError, 'strength must be at least 0 and less than 1'),
    (lambda m: add_class_regularization(m, strength=[.1]), ValueError, 'one number or one for each of the 4'),
    (lambda m: add_class_regularization(nn.Linear(2, 2)), ValueError, 'layers must be named for a Linear'),
    (lambda m: add_class_regularization(nn.ReLU()), TypeError, 'the classifier must be a linear layer'),
    (lambda m: add_class_regularization(timm.create_model('levit_128s')), TypeError, 'got tuple'),
    (lambda m: add_class_regularization(timm.create_model('resnet18', num_classes=0)), ValueError, 'must have classes'),
    (lambda m: add_class_regularization(timm.create_model('vit_tiny_patch16_224')), ValueError,
     r'but blocks.0 gives \(1, 197, 192\)'),
    (lambda m: add_class_regularization(pytorchvideo_hub.slowfast_r50()), ValueError, 'give an input= of the model'),
    (remove_class_regularization, ValueError, 'model has no class_regularization'),
])
def test_what_cannot_be_regularised_says_why_and_is_left_as_it_was(make, error, message):
    before = str(model := create('resnet18')[0])
    with pytest.raises(error, match=message):
        make(model)
    assert hasattr(model, 'class_regularization') or str(model) == before
