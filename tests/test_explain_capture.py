"""An explanation may be asked for anywhere, and leaves everything as it was."""
import copy

import pytest
import timm
import torch
from explain_helpers import CLASSES, EXPLAINERS, Small, Twice, assert_as_found, clip, hooks, narrow_slowfast, state
from torch import Tensor, nn

from explain import SaliencyTubes
from explain.capture import Tap, arguments_of, capture, named_layers, trace, unwrap

every_explainer = pytest.mark.parametrize('create', EXPLAINERS.values(), ids=EXPLAINERS)


class Broken(nn.Module):
    def forward(self, input):
        raise ArithmeticError('broken')


def fails(explainer, x, failure):
    if failure == 'bad target':
        with pytest.raises(ValueError, match='target must'):
            explainer.explain(x, target=CLASSES)
    elif failure == 'target raises':
        with pytest.raises(ZeroDivisionError):
            explainer.explain(x, target=lambda logits: logits[0] * (1 / 0))
    elif failure == 'model raises':
        explainer.model.dropout, dropout = Broken(), explainer.model.dropout
        with pytest.raises(ArithmeticError, match='broken'):
            explainer.explain(x, target=0)
        explainer.model.dropout = dropout
    else:
        explainer.explain(x, target=0)


@every_explainer
@pytest.mark.parametrize('failure', ['none', 'bad target', 'target raises', 'model raises'])
@pytest.mark.parametrize('training', [False, True])
def test_a_call_leaves_model_inputs_and_random_numbers_as_it_found_them(create, failure, training):
    model, x = Small(), clip()
    model.train(training)
    model.last.eval()  # one part in a mode of its own
    model.first[0].weight.requires_grad_(False)
    model.head.register_forward_hook(lambda *_: None)
    explainer = create(model)
    fails(explainer, x, failure)  # the layers are found now
    before, pixels, random = state(model), x.clone(), torch.get_rng_state()
    fails(explainer, x, failure)
    assert_as_found(before, state(model))
    assert torch.equal(x, pixels) and not x.requires_grad and x.grad is None
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()


def under_inference_mode(explainer, x):
    with torch.inference_mode():
        return explainer.attribute(x + 0, target=1)


def under_no_grad(explainer, x):
    with torch.no_grad():
        return explainer.attribute(x, target=1)


def with_frozen_parameters(explainer, x):
    explainer.model.requires_grad_(False)
    return explainer.attribute(x, target=1)


def in_training_mode(explainer, x):
    explainer.model.train()
    return explainer.attribute(x, target=1)


def of_an_input_that_requires_a_gradient(explainer, x):
    result = explainer.attribute((x * 1).requires_grad_(), target=1)
    assert not result.requires_grad
    return result


@every_explainer
@pytest.mark.parametrize('way', [under_no_grad, under_inference_mode, with_frozen_parameters, in_training_mode,
                                 of_an_input_that_requires_a_gradient])
def test_the_result_is_the_same(create, way):
    explainer, x = create(Small().eval()), clip()
    expected = explainer.attribute(x, target=1)
    torch.testing.assert_close(way(explainer, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize('weights', ['classifier', 'grad'])
@pytest.mark.parametrize('autocast', [False, True])
def test_bfloat16_gives_about_the_same(weights, autocast):
    model, x = Small().eval(), clip()
    expected = SaliencyTubes(model, weights=weights).explain(x, 1)
    if autocast:
        with torch.autocast('cpu', torch.bfloat16):
            result = SaliencyTubes(model, weights=weights).explain(x, 1)
    else:
        explainer = SaliencyTubes(copy.deepcopy(model).bfloat16(), weights=weights)
        result = explainer.explain(x.bfloat16(), 1)
        assert explainer.attribute(x.bfloat16(), 1).dtype == torch.bfloat16
    assert result.logits.dtype == torch.bfloat16 and result.maps['last'].dtype == torch.float32
    torch.testing.assert_close(result.maps['last'], expected.maps['last'], rtol=0.1, atol=0.02)


def test_float64_stays_float64():
    result = SaliencyTubes(Small().double().eval()).explain(clip().double())
    assert result.maps['last'].dtype == torch.float64


@pytest.mark.parametrize('compiled', ['wrapper', 'in place', 'part'])
@pytest.mark.parametrize('weights', ['auto', 'grad'])
def test_a_compiled_model_is_explained_like_the_model(compiled, weights):
    model, x = Small().eval(), clip()
    expected = SaliencyTubes(model, 'last', weights=weights).attribute(x, target=1)
    wrapped = model
    if compiled == 'wrapper':
        wrapped = torch.compile(model, backend='eager')
    elif compiled == 'in place':
        model.compile(backend='eager')
    else:
        model.last = torch.compile(model.last, backend='eager')
    wrapped(x)
    explainer = SaliencyTubes(wrapped, 'last', weights=weights)
    torch.testing.assert_close(explainer.attribute(x, target=1), expected)
    assert 'last.0' in named_layers(wrapped)


def test_a_distributed_model_is_explained_and_trains_on(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Small())
        x = clip()
        expected = SaliencyTubes(copy.deepcopy(model.module)).attribute(x, target=0)
        torch.testing.assert_close(SaliencyTubes(model).attribute(x, target=0), expected)
        model(x).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()
    assert unwrap(nn.DataParallel(model)) is model.module


def test_a_model_that_changes_the_list_it_is_given_is_called_again_and_again():
    model, x = narrow_slowfast().eval(), [clip(1, 2, 64), clip(1, 8, 64)]
    explainer = SaliencyTubes(model)
    first = explainer.attribute(x, target=0)
    assert [part.shape for part in x] == [part.shape for part in first] and isinstance(first, list)
    torch.testing.assert_close(explainer.attribute(x, target=0), first)
    as_captum = explainer.attribute(tuple(x), target=0)
    assert isinstance(as_captum, tuple)
    torch.testing.assert_close(list(as_captum), first)


def test_an_in_place_activation_behind_a_layer_does_not_reach_what_was_recorded():
    model, x = Small().eval(), clip()
    with capture(model, (x,), ['last.1']) as run:
        value, = run['last.1']
        assert (value < 0).any()
        torch.testing.assert_close(run.output, model(x))


def test_the_inputs_of_a_layer_can_be_recorded_and_gradients_go_back_to_them():
    model, x = Small().eval(), clip()
    with capture(model, (x,), [Tap('last', 'input'), 'first'], gradient='layers') as run:
        into, out_of = run[Tap('last', 'input')][0], run['first'][0]
        torch.testing.assert_close(into, out_of)
        slopes = run.gradients(run.output.sum(), [into, out_of])
        torch.testing.assert_close(*slopes)
        assert slopes[0].any()


def test_a_layer_gets_what_an_edit_makes_of_its_input_and_the_record_is_what_it_was():
    model, x = Small().eval(), clip()
    with capture(model, (x,), [Tap('head', 'input')], edit=Tensor.zero_) as run:
        torch.testing.assert_close(run.output, model.head.bias.expand(2, CLASSES))
        assert run[Tap('head', 'input')][0].any()


def test_gradients_go_back_to_the_inputs_where_asked_for():
    model, x = Small().eval(), clip().requires_grad_()
    expected, = torch.autograd.grad(model(x)[:, 0].sum(), x)
    with capture(model, (x,), ['last'], gradient='inputs') as run:
        slope, = torch.autograd.grad(run.output[:, 0].sum(), x)
    torch.testing.assert_close(slope, expected)


def test_a_layer_that_works_twice_has_two_calls():
    model, x = Twice().eval(), clip()
    with capture(model, (x,), ['last']) as run:
        first, second = run['last']
    torch.testing.assert_close(model.last(first), second)
    assert [call.number for call in trace(model, (x,)) if call.name == 'last'] == [0, 1]


def test_checkpoints_of_gradients_are_set_aside():
    model = timm.create_model('test_vit', img_size=64, num_classes=CLASSES).eval()
    x = clip(size=64, axes=2)
    expected = SaliencyTubes(model).attribute(x, target=1)
    model.set_grad_checkpointing()
    torch.testing.assert_close(SaliencyTubes(model).attribute(x, target=1), expected)
    assert model.grad_checkpointing is True


def test_wrong_taps_are_refused_without_a_trace():
    model = Small()
    with pytest.raises(ValueError, match="layer must be the name of a module, got 'lost'"):
        with capture(model, (clip(),), ['first', 'lost']):
            pass
    model.spare = nn.Conv3d(1, 1, 1)
    with pytest.raises(ValueError, match="layer must be one that the model calls with this input, got 'spare'"):
        with capture(model, (clip(),), ['spare']):
            pass
    with pytest.raises(ValueError, match="gradient must be None, 'layers', 'all' or 'inputs', got 'everything'"):
        with capture(model, (clip(),), gradient='everything'):
            pass
    assert hooks(model) == 0 and model.training


def test_a_tuple_is_several_arguments_where_the_model_takes_them():
    class Two(Small):
        def forward(self, input, shift):
            return super().forward(input + shift)

    x = clip()
    assert arguments_of(Two(), (x, 1)) == (x, 1)
    assert arguments_of(Two(), x, 1) == (x, 1)
    assert arguments_of(Small(), (x, x)) == ([x, x],)
    assert arguments_of(Small(), (x, x), forward=lambda model, *inputs: None) == (x, x)
    explainer = SaliencyTubes(Two())
    of_input, of_shift = explainer.attribute((x, torch.ones(1)), 1)
    torch.testing.assert_close(of_input, explainer.attribute(x, 1, additional_forward_args=torch.ones(1)))
    assert not of_shift.any(), 'a shift has no positions'
