"""What a tube is: the classifier's row times the maps, and the same as other libraries give where they can."""
import pytest
import timm
import torch
from captum.attr import LayerGradCam
from explain_helpers import NETWORKS, Small, clip, correlation
from pytorch_grad_cam import GradCAM, HiResCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torchcam.methods import CAM
from torchcam.methods import GradCAM as TorchGradCAM

from explain import SaliencyTubes
from timm_softpool import SoftPool3d

POOLED = ['resnet18', 'test_efficientnet', 'densenet121', 'swin_tiny_patch4_window7_224', 'mvitv2_tiny', 'slow',
          'slowfast', 'mtnet', 'srtg', 'fast']


@pytest.mark.parametrize('name', POOLED)
def test_in_front_of_a_global_average_the_tube_is_the_score_position_by_position(name):
    model, x = NETWORKS[name]()
    model = model.eval().double()
    x = [part.double() for part in x] if isinstance(x, list) else x.double()
    result = SaliencyTubes(model).explain(x, target=2)
    assert set(result.meta['weights'].values()) == {'classifier'} and not result.meta['why']
    head = [module for module in model.modules() if isinstance(module, nn.Linear) and len(module.weight) == 5][-1]
    mean = sum(map_.flatten(1).mean(1) for map_ in result.maps.values())
    torch.testing.assert_close(mean + head.bias[2], result.logits[:, 2])
    by_gradient = SaliencyTubes(model, weights='grad').explain(x, target=2)
    assert set(by_gradient.meta['weights'].values()) == {'grad'}
    for layer, map_ in result.maps.items():
        torch.testing.assert_close(by_gradient.maps[layer], map_)


def test_the_tube_by_hand():
    model, x = Small(axes=2).eval(), clip(axes=2)
    features = model.last(model.first(x))
    expected = torch.stack([sum(w * a for w, a in zip(model.head.weight[3], item)) for item in features])
    torch.testing.assert_close(SaliencyTubes(model).explain(x, 3).maps['last'][:, 0], expected)
    torch.testing.assert_close(SaliencyTubes(model, relu=True).explain(x, 3).maps['last'][:, 0], expected.relu())


class SoftHead(nn.Module):
    def forward(self, input):
        return SoftPool3d(input.shape[2:])(input)


class Mlp(nn.Module):
    def forward(self, input):
        return input.flatten(2).mean(2).tanh()


@pytest.mark.parametrize(('pool', 'layer'), [(SoftHead(), 'auto'), (nn.AdaptiveMaxPool3d(1), 'auto'), (Mlp(), 'auto'),
                                             (None, 'first')])
def test_anywhere_else_the_gradient_weighs_and_the_result_says_why(pool, layer):
    model, x = Small(pool=pool).eval(), clip()
    result = SaliencyTubes(model, layer).explain(x, target=1)
    name, = result.maps
    assert result.meta['weights'] == {name: 'grad'} and 'linear layer of the averages' in result.meta['why'][name]
    front, back = model.first(x), lambda front: model(x) if pool is None else model.head(pool(front).flatten(1))
    features = (front if layer == 'first' else model.last(front)).detach().requires_grad_()
    out = model.head(model.last(features.clone()).flatten(2).mean(2)) if layer == 'first' else back(features)
    slope, = torch.autograd.grad(out[:, 1].sum(), features)
    expected = (features * slope.sum((2, 3, 4), keepdim=True)).sum(1, keepdim=True)
    torch.testing.assert_close(result.maps[name], expected.detach())
    with pytest.raises(ValueError, match="weights can be 'classifier' only where a head allows it"):
        SaliencyTubes(model, layer, weights='classifier').explain(x, target=1)


def test_a_function_as_target_weighs_by_the_gradient():
    result = SaliencyTubes(Small()).explain(clip(), target=lambda logits: logits[0] - logits[1])
    assert result.meta['weights'] == {'last': 'grad'}
    model, x = Small(), clip()
    by_class = [SaliencyTubes(model).explain(x, index).maps['last'] for index in (0, 1)]
    difference = SaliencyTubes(model).explain(x, target=lambda logits: logits[0] - logits[1])
    torch.testing.assert_close(difference.maps['last'], by_class[0] - by_class[1])


def test_no_graph_is_made_in_front_of_the_layer_and_no_parameter_gets_a_gradient():
    model, x = Small(), clip()
    seen = []
    model.last[0].register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    SaliencyTubes(model, 'last', weights='grad').explain(x)
    assert seen and not any(seen)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_clip_played_backwards_has_its_tube_backwards():
    model, x = Small().eval(), clip(frames=5)
    for convolution in (model.first[0], model.last[0]):
        convolution.weight.data = convolution.weight + convolution.weight.flip(2)
    explainer = SaliencyTubes(model)
    torch.testing.assert_close(explainer.attribute(x.flip(2), 1), explainer.attribute(x, 1).flip(2))


@pytest.mark.parametrize('axes', [2, 3])
def test_other_libraries_give_the_same_map(axes):
    model, x = Small(axes, stride=1).eval(), clip(axes=axes)  # no need to resize, which each does by its own rules
    targets = [ClassifierOutputTarget(1)] * 2
    ours = {weights: SaliencyTubes(model, weights=weights, relu=True).explain(x, 1) for weights in ('auto', 'grad')}
    captum = LayerGradCam(model, model.last).attribute(x, target=1, relu_attributions=True)
    with TorchGradCAM(model, 'last') as extractor:
        torchcam, = extractor(1, model(x), normalized=False)
    with CAM(model, 'last', fc_layer='head', input_shape=tuple(x.shape[1:])) as extractor, torch.no_grad():
        model(x)
        cam, = extractor(1, normalized=False)
    for result in ours.values():
        for peer in (captum, torchcam[:, None], cam[:, None].relu()):
            assert (correlation(result.maps['last'], peer) > 0.9999).all()
        for peer in (GradCAM, HiResCAM):
            with peer(model, [model.last]) as extractor:
                gray = torch.from_numpy(extractor(input_tensor=x, targets=targets))
            assert (correlation(result.upsampled(), gray) > 0.9999).all()


def test_other_libraries_give_the_same_map_of_a_timm_model():
    model, x = timm.create_model('resnet18', num_classes=5).eval(), torch.randn(2, 3, 96, 96)
    for layer in ('layer4', 'layer3'):
        captum = LayerGradCam(model, model.get_submodule(layer)).attribute(x, target=1)
        assert (correlation(SaliencyTubes(model, layer).explain(x, 1).maps[layer], captum) > 0.9999).all()


def test_other_weights_are_refused():
    with pytest.raises(ValueError, match="weights must be one of auto, classifier, grad, got 'score'"):
        SaliencyTubes(Small(), weights='score')
