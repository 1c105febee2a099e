"""Class tubes: weights of a whole layer, from a data set or from Class Regularization."""
import pytest
import torch
from explain_helpers import CLASSES, NETWORKS, Small, clip, correlation
from torch import nn

from explain import ClassTubes, SaliencyTubes
from explain.capture import capture
from explain.class_tubes import ridge
from timm_softpool import add_class_regularization


def test_ridge_is_the_minimum_of_its_objective():
    features, logits = torch.randn(40, 6).double(), torch.randn(40, 3).double()
    weights, _ = ridge(features, logits, l2=2.0)
    assert weights.shape == (3, 6)
    scaled = (features - features.mean(0)) / features.std(0)
    v = (weights.T * features.std(0)[:, None]).requires_grad_()
    loss = (scaled @ v - (logits - logits.mean(0))).square().sum() + 2.0 * v.square().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0], torch.zeros_like(v), atol=1e-9, rtol=0)


def test_r2_is_that_of_samples_left_out():
    features, logits = torch.randn(12, 4).double(), torch.randn(12, 2).double()
    features = (features - features.mean(0)) / features.std(0)
    errors = []
    for left in range(12):
        rest = [index for index in range(12) if index != left]
        # the ridge of the others, with an intercept, on the scale of all
        z, y = features[rest], logits[rest]
        v = torch.linalg.solve((z - z.mean(0)).T @ (z - z.mean(0)) + 3 * torch.eye(4).double(),
                               (z - z.mean(0)).T @ (y - y.mean(0)))
        errors.append(logits[left] - y.mean(0) - (features[left] - z.mean(0)) @ v)
    wanted = 1 - torch.stack(errors).square().sum() / (logits - logits.mean(0)).square().sum()
    assert ridge(features, logits, l2=3.0)[1] == pytest.approx(wanted.item())


def test_more_channels_than_samples_explain_nothing_that_was_left_out():
    _, r2 = ridge(torch.randn(30, 200), torch.randn(30, 4), l2=5.0)
    assert r2 < 0.3


def test_in_front_of_a_linear_head_the_fitted_tube_is_the_saliency_tube():
    model, batches = Small(channels=4), [clip(16) for _ in range(8)]
    explainer = ClassTubes(model, 'last').fit(batches, l2=1e-6)
    assert explainer.r2['last'] > 0.999
    found, wanted = (tube.explain(batches[0], 2) for tube in (explainer, SaliencyTubes(model, 'last')))
    assert found.meta == {'weights': {'last': 'ridge'}, 'r2': explainer.r2}
    torch.testing.assert_close(found.maps['last'], wanted.maps['last'], atol=1e-3, rtol=1e-2)


def test_a_layer_that_tells_nothing_is_refused():
    explainer = ClassTubes(Small(channels=4), 'first').fit([clip(4)])
    explainer.r2['first'] = 0.2
    with pytest.raises(ValueError, match="layer must tell of the logits .*, got 'first' with an r2 of 0.2"):
        explainer.explain(clip(), 1)
    explainer.least_r2 = 0.1
    assert explainer.explain(clip(), 1).maps['first'].shape == (2, 1, 2, 8, 8)


def test_the_blocks_of_class_regularization_are_the_weights():
    model, inputs = NETWORKS['resnet18']()
    add_class_regularization(model, strength=0.0)
    explainer = ClassTubes(model)
    found = explainer.explain(inputs, 3)
    assert list(found.maps) == ['layer4'] and found.meta == {'weights': {'layer4': 'blocks'}, 'r2': {}}
    at_head = SaliencyTubes(model, 'layer4').explain(inputs, 3)
    affinity = model.class_regularization.affinity('layer4')
    torch.testing.assert_close(found.maps['layer4'], torch.einsum(
        'bchw,c->bhw', activations(model, inputs), affinity[3])[:, None])
    assert (correlation(found.maps['layer4'], at_head.maps['layer4']) > 0.99).all()  # of one width, one affinity
    several = ClassTubes(model, ['layer2', 'layer3']).explain(inputs, [0, 4])
    assert list(several.maps) == ['layer2', 'layer3'] and several.target.tolist() == [0, 4]


def test_each_stream_has_its_own_columns_of_the_block():
    model, inputs = NETWORKS['mtnet']()
    add_class_regularization(model, ['blocks.3'])
    found = ClassTubes(model).explain(inputs, 1)
    assert list(found.maps) == ['blocks.3[0]', 'blocks.3[1]'] and set(found.meta['weights'].values()) == {'blocks'}
    with capture(model, (inputs,), ['blocks.3']) as run:
        streams, = run['blocks.3']
    rows = model.class_regularization.affinity('blocks.3')[1].split([stream.shape[1] for stream in streams])
    for map_, stream, row in zip(found.maps.values(), streams, rows):
        torch.testing.assert_close(map_[:, 0], torch.einsum('bcthw,c->bthw', stream, row))


def activations(model, inputs):
    values = []
    handle = model.layer4.register_forward_hook(lambda module, args, output: values.append(output))
    with torch.no_grad():
        model.eval()(inputs)
    handle.remove()
    return values[0]


@pytest.mark.parametrize('name', ['test_vit', 'slowfast', 'mtnet', 'srtg', 'x3d'])
def test_any_network_can_be_fitted(name):
    model, inputs = NETWORKS[name]()
    explainer = ClassTubes(model, least_r2=-float('inf')).fit([inputs, inputs] if isinstance(inputs, torch.Tensor)
                                                             else [(inputs, 0), (inputs, 0)])
    found = explainer.explain(inputs, 1)
    assert all(map_.isfinite().all() for map_ in found.maps.values())
    assert set(found.maps) == set(explainer.r2)


@pytest.mark.parametrize('call, message', [
    (lambda: ClassTubes(Small()).explain(clip(), 1), r'layer must be fitted first, ClassTubes\(...\).fit\(loader\)'),
    (lambda: ClassTubes(Small()).fit([]), 'loader must give two samples at least, got 0'),
    (lambda: ClassTubes(Small()).fit([clip()], l2=0), 'l2 must be positive, got 0'),
    (lambda: ClassTubes(Small()).fit([clip()]).explain(clip(), lambda row: row[0]), 'target must be a class of logits'),
    (lambda: ClassTubes(Small()).fit([clip()]).explain(clip(), CLASSES), 'target must be in the logits of shape')])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_classifier_is_not_needed_at_explanation_time():
    """The weights are the whole data set's: another head changes the logits, not the maps."""
    model = Small()
    explainer = ClassTubes(model, 'last', least_r2=-1e9).fit([clip(8)])
    inputs = clip()
    before = explainer.explain(inputs, 1).maps['last']
    nn.init.normal_(model.head.weight)
    torch.testing.assert_close(explainer.explain(inputs, 1).maps['last'], before)
