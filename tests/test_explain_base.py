"""The two faces of an explainer, its targets, and what can be done with maps."""
import numpy as np
import pytest
import torch
from captum.metrics import infidelity, sensitivity_max
from explain_helpers import CLASSES, EXPLAINERS, Small, clip
from hypothesis import given
from hypothesis import strategies as st
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn

from explain import Explainer, Explanation, SaliencyTubes
from explain.base import normalize, select, upsample

every_explainer = pytest.mark.parametrize('create', EXPLAINERS.values(), ids=EXPLAINERS)
LOGITS = torch.tensor([[1.0, 5.0, 3.0], [4.0, 0.0, 2.0]])


@every_explainer
def test_attribute_gives_signed_maps_as_large_as_the_inputs_in_the_form_of_the_inputs(create):
    explainer, x = create(Small()), clip()
    maps = explainer.attribute(x, 1)
    assert maps.shape == x.shape and maps.dtype == x.dtype and maps.is_contiguous() and not maps.requires_grad
    assert torch.equal(maps[:, 0], maps[:, 2])
    assert explainer.method == 'eye' or (maps < 0).any()
    as_tuple, = explainer.attribute((x,), torch.tensor([1, 1]))
    torch.testing.assert_close(as_tuple, maps)
    torch.testing.assert_close(explainer.attribute(x, 1, relu=True), explainer.explain(x, 1).fuse().relu().expand_as(x))


@every_explainer
def test_captums_metrics_run_on_attribute(create):
    explainer, x = create(Small(channels=4)), clip()
    change = sensitivity_max(explainer.attribute, x, target=1, perturb_radius=0.02, n_perturb_samples=3)
    assert change.shape == (2,) and (change < 0.3).all()

    def perturb(inputs):
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    error = infidelity(explainer.model.eval(), perturb, x, explainer.attribute(x, 1), target=1, n_perturb_samples=3)
    assert error.shape == (2,) and error.isfinite().all()


@every_explainer
def test_a_call_gives_what_grad_cam_gives(create):
    explainer, x = create(Small()), clip()
    with explainer as cam:
        maps = cam(input_tensor=x, targets=[1, 2] if explainer.method in ('eye', 'class') else
                   [ClassifierOutputTarget(1), ClassifierOutputTarget(2)])
    assert maps.shape == (2, 4, 16, 16) and maps.dtype == np.float32
    assert maps.min() == 0 and maps.max() == 1
    assert explainer.outputs.shape == (2, CLASSES)
    np.testing.assert_allclose(explainer(x, [1, 2]), maps, atol=1e-6)


def test_a_context_manager_swallows_no_error():
    with pytest.raises(ValueError, match='target must'):
        with SaliencyTubes(Small()) as explainer:
            explainer(clip(), [CLASSES] * 2)


def test_a_batch_is_explained_like_its_clips_one_by_one():
    explainer, x = SaliencyTubes(Small(), weights='grad'), clip(3)
    whole = explainer.explain(x, [0, 2, 4])
    for index, target in enumerate([0, 2, 4]):
        torch.testing.assert_close(whole.maps['last'][[index]], explainer.explain(x[[index]], target).maps['last'])


@pytest.mark.parametrize(('target', 'scores', 'classes'), [
    (None, [5, 4], [1, 0]), (2, [3, 2], [2, 2]), (torch.tensor(2), [3, 2], [2, 2]), ([2, 1], [3, 0], [2, 1]),
    (torch.tensor([0, 1]), [1, 0], [0, 1]), ([1], [5, 0], [1, 1]), ([(2,), (0,)], [3, 4], [2, 0]),
    (lambda logits: logits[0] - logits[1], [-4, 4], None),
    ([lambda logits: logits[0], lambda logits: logits[2:]], [1, 2], None),
])
def test_targets(target, scores, classes):
    found, index = select(LOGITS, target)
    assert found.tolist() == scores
    assert classes is None if index is None else index.tolist() == classes


def test_targets_of_logits_with_more_axes_are_tuples():
    logits = torch.arange(12.0).reshape(2, 3, 2)
    assert select(logits, (2, 1))[0].tolist() == [5, 11]
    assert select(logits, [(0, 1), (2, 0)])[0].tolist() == [1, 10]
    with pytest.raises(ValueError, match='target must be given'):
        select(logits, None)
    assert select(torch.tensor([3.0, 4.0]), None)[0].tolist() == [3, 4], 'a score and no classes'


@pytest.mark.parametrize(('target', 'error', 'message'), [
    (3, ValueError, r'target must be in the logits of shape \(2, 3\), got 3'),
    (-1, ValueError, 'target must be in the logits'),
    ([0, 1, 2], ValueError, 'target must have an index for each of the 2 inputs'),
    ([(0, 1), (1, 1)], ValueError, 'target must have an index for each'),
    ([lambda logits: logits[0]], ValueError, 'target must have a function for each of the 2 inputs, got 1'),
    ('cat', TypeError, "target must be indices of classes or functions of the logits, got 'cat'"),
    (0.5, TypeError, 'target must be of integers, got torch.float32'),
])
def test_what_is_no_target_is_refused(target, error, message):
    with pytest.raises(error, match=message):
        select(LOGITS, target)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match='model must be a torch.nn.Module, got function'):
        Explainer(lambda x: x)
    with pytest.raises(ValueError, match=r'inputs must hold images \(B, C, H, W\) or clips'):
        SaliencyTubes(nn.Linear(3, 3)).explain(torch.zeros(2, 3))


def explanation(**maps):
    return Explanation({name: torch.tensor(values)[None, None] for name, values in maps.items()}, torch.tensor([0]),
                       torch.zeros(1, 2), (2, 2))


def test_maps_are_joined():
    both = explanation(a=[[1.0, -2.0], [4.0, 0.0]], b=[[3.0, 0.0], [6.0, -1.0]])
    assert both.fuse()[0, 0].tolist() == [[2, -1], [5, -0.5]]
    assert both.fuse('product')[0, 0].tolist() == [[0.125, 0], [1, 0]]
    assert both.fuse('max')[0, 0].tolist() == [[0.5, 0], [1, 0]]
    assert torch.equal(both.fuse('product', layers=['a']), both.maps['a']), 'one map stays as it is'
    with pytest.raises(ValueError, match="how must be one of mean, max, product, got 'sum'"):
        both.fuse('sum')
    with pytest.raises(ValueError, match="layer must be one of a, b, got 'c'"):
        both.upsampled('c')


def test_maps_grow_smoothly_along_every_axis():
    maps = torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1, 1)
    assert upsample(maps, (4, 1, 1)).flatten().tolist() == [0, 0.25, 0.75, 1]
    assert upsample(maps, (4, 1, 1), 'nearest').flatten().tolist() == [0, 0, 1, 1]
    assert upsample(maps, (1, 1)).flatten().tolist() == [0.5], 'a clip explained for an image'
    assert upsample(maps[:, :, 0], (3, 2, 2)).shape == (1, 1, 3, 2, 2), 'an image explained for a clip'
    with pytest.raises(ValueError, match="mode must be 'linear' or 'nearest', got 'cubic'"):
        upsample(maps, (2, 2, 2), 'cubic')


@given(st.lists(st.floats(-10, 10, width=32), min_size=8, max_size=8), st.sampled_from(['minmax', 'max', 'percentile']),
       st.sampled_from(['clip', 'frame', 'batch']))
def test_normalised_maps_are_within_their_range_and_never_nan(values, how, per):
    maps = normalize(torch.tensor(values).reshape(2, 1, 2, 1, 2), how, per)
    assert (maps <= 1).all() and (maps >= (-1 if how == 'max' else 0)).all()


def test_normalised_maps_share_a_scale_where_asked_for():
    maps = torch.tensor([1.0, 3.0, 5.0, 9.0]).reshape(1, 1, 2, 1, 2)
    assert normalize(maps).flatten().tolist() == [0, 0.25, 0.5, 1]
    assert normalize(maps, per='frame').flatten().tolist() == [0, 1, 0, 1]
    assert normalize(torch.cat([maps, 2 * maps]), per='batch')[0].amax().item() == pytest.approx(8 / 17)
    assert normalize(maps - 9, 'max').flatten().tolist() == [-1, -0.75, -0.5, 0]
    assert normalize(torch.full((1, 1, 2, 2), 3.0)).tolist() == [[[[0, 0], [0, 0]]]]
    assert normalize(maps, 'none') is maps
    for arguments in (('mean',), ('minmax', 'pixel')):
        with pytest.raises(ValueError, match='must be'):
            normalize(maps, *arguments)
