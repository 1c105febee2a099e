"""The scores of maps, worked out by hand; what is changed for a score is afterwards as it was."""
import copy

import pytest
import timm
import torch
from explain_helpers import CLASSES, Small, assert_as_found, clip, narrow_slowfast, state
from torch import nn

from explain import SaliencyTubes, metrics

# Two images: a quarter of the mass in the mask's one pixel, where the maximum is not; nothing but zeros.
IMAGES = torch.tensor([[[1., -9.], [3., 0.]], [[0., 0.], [0., 0.]]])
PIXEL = torch.tensor([[[True, True], [False, False]]]).expand(2, 2, 2)
# A clip of three frames of two pixels: the object is in the left pixel of the first two.
CLIP = torch.tensor([[[[2., 2.]], [[1., 3.]], [[8., 0.]]]])
LEFT = torch.tensor([[[[1, 0]], [[1, 0]], [[0, 0]]]])


def equal(result, *expected):
    torch.testing.assert_close(result, torch.tensor(expected), check_dtype=False)


def test_the_energy_is_the_share_of_what_is_positive_inside_the_mask():
    equal(metrics.energy_pointing_game(IMAGES, PIXEL), 0.25, 0)
    equal(metrics.energy_pointing_game(CLIP, LEFT), 3 / 16)


def test_the_energy_in_time_is_the_share_of_the_frames_with_the_object():
    equal(metrics.energy_pointing_game(CLIP, LEFT, 'time'), 8 / 16)
    equal(metrics.energy_pointing_game(IMAGES, PIXEL, 'time'), 1, 0)


def test_the_energy_by_frame_is_the_mean_over_the_frames_with_the_object():
    equal(metrics.energy_pointing_game(CLIP, LEFT, 'frame'), (1 / 2 + 1 / 4) / 2)
    blank = CLIP.clone()
    blank[:, 1] = -1
    equal(metrics.energy_pointing_game(blank, LEFT, 'frame'), (1 / 2 + 0) / 2)
    equal(metrics.energy_pointing_game(IMAGES, PIXEL, 'frame'), 0.25, 0)


@pytest.mark.parametrize('over', ['space', 'time', 'frame'])
def test_without_an_object_or_a_map_the_energy_is_zero(over):
    equal(metrics.energy_pointing_game(CLIP, torch.zeros_like(LEFT), over), 0)
    equal(metrics.energy_pointing_game(torch.zeros_like(CLIP), LEFT, over), 0)
    equal(metrics.energy_pointing_game(-CLIP, LEFT, over), 0)


def test_a_channel_of_one_in_maps_or_masks_makes_no_difference():
    equal(metrics.energy_pointing_game(IMAGES[:, None], PIXEL), 0.25, 0)
    equal(metrics.energy_pointing_game(CLIP[:, None], LEFT, 'frame'), 3 / 8)
    equal(metrics.energy_pointing_game(CLIP[:, None].bfloat16(), LEFT[:, None], 'frame'), 3 / 8)


def peak(frame, row, column):
    maps = torch.zeros(1, 2, 9, 9)
    maps[0, frame, row, column] = 1
    return maps


def test_the_maximum_may_miss_the_mask_by_the_slack_in_rows_and_columns_but_not_in_time():
    mask = peak(0, 4, 4)
    hits = [metrics.pointing_game(peak(*position), mask).item()
            for position in ((0, 4, 4), (0, 2, 6), (0, 4, 7), (0, 1, 4), (1, 4, 4))]
    assert hits == [True, True, False, False, False]
    assert not metrics.pointing_game(peak(0, 4, 5), mask, slack=0)
    assert metrics.pointing_game(peak(0, 4, 4), mask, slack=0).dtype == torch.bool


def test_a_map_that_says_nothing_does_not_point():
    mask = peak(0, 4, 4)
    assert not metrics.pointing_game(torch.zeros(1, 2, 9, 9), mask)
    assert not metrics.pointing_game(torch.ones(1, 2, 9, 9), mask)
    assert not metrics.pointing_game(peak(0, 4, 4) - 2, mask)
    assert metrics.pointing_game(peak(0, 4, 4) + peak(0, 5, 5), mask), 'two maxima, both in the grown mask'


def test_the_contrast_is_the_share_of_the_target_in_what_is_on_either_object():
    maps = torch.tensor([[[3., 1.], [9., -5.]], [[-1., -1.], [9., 9.]]])
    target, other = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    target[:, 0, 0] = 1
    other[:, :, 1] = 1
    equal(metrics.class_contrast(maps[:1], target[:1], other[:1]), 3 / 4)
    other[1, 1, 1] = 0
    equal(metrics.class_contrast(maps, target, other), 3 / 4, 0)


def test_the_rank_correlation_by_hand():
    a = torch.tensor([[1., 2., 3., 4.], [1., 2., 3., 4.], [1., 1., 2., 3.], [5., 5., 5., 5.]])
    b = torch.tensor([[1., 8., 9., 99.], [4., 3., 1., 2.], [1., 2., 3., 3.], [1., 2., 3., 4.]])
    # The third: ranks 1.5 1.5 3 4 and 1 2 3.5 3.5, the sum of products 4, of squares 4.5 and 4.5.
    equal(metrics.rank_correlation(a, b), 1, 1 - 6 * (9 + 1 + 4 + 4) / (4 * 15), 4 / 4.5, 0)


def test_the_rank_correlation_is_scipys():
    stats = pytest.importorskip('scipy.stats')
    a, b = torch.randint(0, 6, (2, 3, 1, 4, 5, 6))
    for values in ((a, b), (a + torch.rand(a.shape), b.float())):
        expected = [stats.spearmanr(*(item.flatten().numpy() for item in pair)).statistic for pair in zip(*values)]
        equal(metrics.rank_correlation(*values), *expected)


class LeftPixel(nn.Module):
    """Gives class 1 the first pixel's value as its logit, class 0 none."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input):
        pixel = input.flatten(1)[:, 0] * self.scale
        return torch.stack([torch.zeros_like(pixel), pixel], 1)


@pytest.mark.parametrize('size', [(2, 2), (1, 2, 2)])
def test_insertion_and_deletion_by_hand(size):
    present, absent = torch.sigmoid(torch.tensor([2., -2.]))
    maps = torch.tensor([[4., 3., 2., 1.], [-2., 1., 1., 1.]]).reshape(2, *size)
    insertion, deletion = metrics.insertion_deletion(LeftPixel(), torch.full((2, 1, *size), 2.), maps, 1, steps=4,
                                                     baseline=-2.)
    # Five points four steps apart: the pixel comes at the second one of the first map, at the last of the other.
    equal(insertion, (absent / 2 + 3 * present + present / 2) / 4, (absent / 2 + 3 * absent + present / 2) / 4)
    equal(deletion, (present / 2 + 3 * absent + absent / 2) / 4, (present / 2 + 3 * present + absent / 2) / 4)


def test_no_target_is_the_prediction_of_the_whole_input():
    x, maps = torch.tensor([2., 0, 0, 0]).reshape(1, 1, 2, 2), torch.tensor([[[4., 3.], [2., 1.]]])
    torch.testing.assert_close(metrics.insertion_deletion(LeftPixel(), x, maps, baseline=-2.),
                               metrics.insertion_deletion(LeftPixel(), x, maps, 1, baseline=-2.))


class Recorder(LeftPixel):
    def forward(self, input):
        self.seen.append((input.clone(), self.training, torch.is_grad_enabled()))
        return super().forward(input)


def test_the_baseline_is_noise_like_each_channel_of_each_input():
    model = Recorder()
    model.seen = []
    x = torch.randn(2, 2, 64, 64) * torch.tensor([[1., 9.], [0.1, 0.]])[..., None, None] + 5
    metrics.insertion_deletion(model, x, torch.rand(2, 64, 64), 0, steps=1)
    noise = model.seen[1][0]  # the first pass looks for the target
    assert not torch.isclose(noise, x)[:, 0].any(2).all()
    torch.testing.assert_close(noise.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=0.5)
    torch.testing.assert_close(noise.std((2, 3)), x.std((2, 3)), rtol=0.1, atol=0)
    assert not any(training or gradient for _, training, gradient in model.seen)


def test_the_seed_decides_the_noise_and_the_order_of_equal_values():
    model, x, flat = Small(2).eval(), clip(axes=2), torch.zeros(2, 16, 16)
    areas = {(seed, baseline): metrics.insertion_deletion(model, x, flat, 0, steps=4, baseline=baseline, seed=seed)
             for seed in (0, 1) for baseline in (None, 0.)}
    torch.testing.assert_close(areas[0, None], metrics.insertion_deletion(model, x, flat, 0, steps=4), rtol=0, atol=0)
    for baseline in (None, 0.):
        assert not torch.equal(areas[0, baseline][0], areas[1, baseline][0])


def logits_without(model, x, layer, channels):
    """Of the model with some input channels of a layer at 0, by its weights."""
    model = copy.deepcopy(model)
    for item in channels:
        model.get_submodule(layer).weight.data[:, item] = 0
    return model(x).softmax(1)


@pytest.mark.parametrize('layer', ['last.0', 'head'])
def test_the_ablation_sets_the_strongest_input_channels_to_zero(layer):
    model, x = Small().eval(), clip()
    strengths = torch.tensor([.1, .9, .2, .8, .3, .7, -5., .6])
    expected = (model(x).softmax(1) - logits_without(model, x, layer, [1, 3]))[:, 2].detach()
    torch.testing.assert_close(metrics.kernel_ablation(model, x, 2, layer, strengths), expected)
    torch.testing.assert_close(metrics.kernel_ablation(model, x, 2, model.get_submodule(layer), strengths), expected)
    each = torch.stack([strengths, -strengths])
    opposite = (model(x).softmax(1) - logits_without(model, x, layer, [6, 0]))[:, 2].detach()
    torch.testing.assert_close(metrics.kernel_ablation(model, x, 2, layer, each), torch.stack([expected[0],
                                                                                               opposite[1]]))
    one = (model(x).softmax(1) - logits_without(model, x, layer, [1]))[:, 2].detach()
    torch.testing.assert_close(metrics.kernel_ablation(model, x, 2, layer, strengths, share=0.01), one)


def test_the_channels_of_tokens_are_on_the_last_axis():
    model, x = timm.create_model('test_vit', img_size=64, num_classes=CLASSES).eval(), torch.randn(2, 3, 64, 64)
    width = model.blocks[0].mlp.fc1.in_features
    strengths = torch.zeros(width)
    strengths[:width // 4] = 1
    broken = copy.deepcopy(model)
    broken.blocks[0].mlp.fc1.weight.data[:, :width // 4] = 0
    expected = (model(x).softmax(1) - broken(x).softmax(1))[:, 1].detach()
    torch.testing.assert_close(metrics.kernel_ablation(model, x, 1, 'blocks.0.mlp.fc1', strengths), expected)


def test_the_ablation_takes_the_inputs_an_explainer_takes():
    model, x = narrow_slowfast().eval(), [clip(1, 2, 64), clip(1, 8, 64)]
    head = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    falls = metrics.kernel_ablation(model, x, None, head, model.get_submodule(head).weight[0].abs(), share=1)
    equal(falls, (model(list(x)).softmax(1).amax(1) - model.get_submodule(head).bias.softmax(0)[
        model(list(x)).argmax(1)]).item())


def test_randomising_goes_from_the_classifier_down_and_the_map_changes_when_its_layers_do():
    model, x = Small().eval(), clip()
    result = metrics.parameter_randomisation(SaliencyTubes(model, 'first', weights='grad'), x, 1)
    assert [name for name, _ in result] == ['head', 'last.1', 'last.0', 'first.1', 'first.0']
    assert all(value.shape == (2,) and (value.abs() <= 1).all() for _, value in result)
    assert (result[0][1] < 0.999).all(), 'the classifier matters'
    alone = dict(metrics.parameter_randomisation(SaliencyTubes(model, 'first', weights='grad'), x, 1, 'independent'))
    torch.testing.assert_close(alone['head'], result[0][1])
    assert not torch.allclose(alone['first.0'], result[-1][1])


def test_randomising_can_end_behind_the_first_layers():
    explainer, x = SaliencyTubes(Small().eval(), 'first', weights='grad'), clip()
    whole, part = (metrics.parameter_randomisation(explainer, x, 1, depth=depth) for depth in (None, 2))
    assert [name for name, _ in part] == ['head', 'last.1']
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole, part))


def test_a_map_that_does_not_depend_on_a_layer_keeps_its_likeness():
    model, x = Small().eval(), clip()
    model.head.weight.data[:] = model.head.weight[:1, :1]  # constant: drawn anew it is the same
    model.head.bias.data[:] = 0
    result = metrics.parameter_randomisation(SaliencyTubes(model), x, 1, 'independent')
    equal(dict(result)['head'], 1, 1)
    assert (dict(result)['first.0'] < 0.99).all()


def test_the_seed_decides_what_is_drawn():
    explainer, x = SaliencyTubes(Small(), weights='grad'), clip()
    first, again, other = (metrics.parameter_randomisation(explainer, x, 1, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again))
    assert not torch.equal(first[0][1], other[0][1])


class Tokens(nn.Module):
    """A layer whose projection is never called, as attention of torch has one, and a parameter of the root."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(3, 1, 1))
        self.first = nn.Conv2d(3, 8, 3)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input):
        tokens = self.first(input + self.shift).flatten(2).mT
        return self.head(self.attend(tokens, tokens, tokens)[0].mean(1))


def test_no_parameter_is_left_out():
    model, x = Tokens(), clip(axes=2)
    seen = {}

    class Watched(SaliencyTubes):
        def explain(self, *args):
            seen.update({name: parameter.clone() for name, parameter in model.named_parameters()})
            return super().explain(*args)
    result = metrics.parameter_randomisation(Watched(model, 'first', weights='grad'), x, 0)
    assert [name for name, _ in result] == ['head', 'attend', 'first', '']
    varying = [name for name, value in model.named_parameters() if value.std() > 0]
    assert len(varying) >= 6 and not any(torch.equal(seen[name], model.get_parameter(name)) for name in varying)


class Fails(SaliencyTubes):
    calls = 0

    def explain(self, *args):
        self.calls += 1
        if self.calls == 4:
            raise ArithmeticError('broken')
        return super().explain(*args)


def randomises(model, x):
    metrics.parameter_randomisation(SaliencyTubes(model), x)


def randomises_and_fails(model, x):
    with pytest.raises(ArithmeticError, match='broken'):
        metrics.parameter_randomisation(Fails(model), x)


def inserts_and_deletes(model, x):
    metrics.insertion_deletion(model, x, x.detach()[:, 0], steps=2)


def ablates(model, x):
    metrics.kernel_ablation(model, x, 0, 'last', torch.arange(8))


def ablates_and_fails(model, x):
    with pytest.raises(ValueError, match='strengths must'):
        metrics.kernel_ablation(model, x, 0, 'last', torch.arange(7))


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('use', [randomises, randomises_and_fails, inserts_and_deletes, ablates, ablates_and_fails])
def test_model_inputs_and_random_numbers_are_afterwards_as_they_were(use, training):
    model, x = Small().train(training), clip().requires_grad_()
    model.last.eval()  # one part in a mode of its own
    model.first[0].weight.requires_grad_(False)
    before, pixels, random = state(model), x.detach().clone(), torch.get_rng_state()
    storage = [parameter.data_ptr() for parameter in model.parameters()]
    use(model, x)
    assert_as_found(before, state(model))
    assert storage == [parameter.data_ptr() for parameter in model.parameters()]
    assert torch.equal(x, pixels) and x.grad is None
    assert torch.equal(torch.get_rng_state(), random) and torch.is_grad_enabled()
    model(x).sum().backward()
    assert model.head.weight.grad is not None


def scores(model, x):
    return [*metrics.insertion_deletion(model, x, x.abs().amax(1), 1, steps=2),
            metrics.kernel_ablation(model, x, 1, 'last', torch.arange(8.)),
            *dict(metrics.parameter_randomisation(SaliencyTubes(model, 'first', weights='grad'), x, 1)).values()]


def test_a_score_is_the_same_in_inference_mode():
    model, x = Small().eval(), clip()
    expected = scores(model, x)
    with torch.inference_mode():
        torch.testing.assert_close(scores(model, x + 0), expected, rtol=0, atol=0)


@pytest.mark.parametrize(('call', 'message'), [
    (lambda model, x: metrics.energy_pointing_game(CLIP, LEFT, 'space-time'),
     "over must be 'space', 'time' or 'frame', got 'space-time'"),
    (lambda model, x: metrics.energy_pointing_game(CLIP, LEFT[:, :2]),
     r"mask must have the maps' size \(1, 3, 1, 2\), got \(1, 2, 1, 2\)"),
    (lambda model, x: metrics.energy_pointing_game(x, LEFT),
     r'maps must be \(B, H, W\), \(B, 1, H, W\), .*, got \(2, 3, 4, 16, 16\)'),
    (lambda model, x: metrics.class_contrast(CLIP, LEFT, LEFT[..., :1]), "other_mask must have the maps' size"),
    (lambda model, x: metrics.pointing_game(CLIP, LEFT, slack=-1), 'slack must be at least 0, got -1'),
    (lambda model, x: metrics.rank_correlation(CLIP, LEFT[:, :2]), r'a and b must have one shape \(B, ...\), got'),
    (lambda model, x: metrics.insertion_deletion(model, x, x[:, 0], 0, steps=0), 'steps must be at least 1, got 0'),
    (lambda model, x: metrics.insertion_deletion(model, x, x[:, 0, :2], 0),
     r"maps must have the inputs' size \(2, 4, 16, 16\), got \(2, 2, 16, 16\)"),
    (lambda model, x: metrics.insertion_deletion(model, x, x[:, 0], CLASSES), 'target must be in the logits'),
    (lambda model, x: metrics.insertion_deletion(model, x, x[:, 0], 0, baseline=x[..., :7]),
     "baseline must be broadcast to the inputs' shape"),
    (lambda model, x: metrics.insertion_deletion(model.first, x, x[:, 0], 0), r'model must give logits \(B, classes\)'),
    (lambda model, x: metrics.kernel_ablation(model, x, 0, 'last', torch.rand(8), share=0), 'share must be more'),
    (lambda model, x: metrics.kernel_ablation(model, x, 0, 'lost', torch.rand(8)), 'layer must name a module'),
    (lambda model, x: metrics.kernel_ablation(model, x, 0, '*.0', torch.rand(8)),
     r"layer must mean one layer, got '\*\.0', which means first.0, last.0"),
    (lambda model, x: metrics.kernel_ablation(model, x, 0, 'head', torch.rand(7)),
     r"strengths must be \(C,\) or \(B, C\) of what 'head' takes, \(2, 8\), got \(7,\)"),
    (lambda model, x: metrics.kernel_ablation(model, x, 0, 'head', torch.rand(3, 8)), 'strengths must be'),
    (lambda model, x: metrics.kernel_ablation(model, x, 0, 'head', torch.rand(2, 8, 1)), 'strengths must be'),
    (lambda model, x: metrics.parameter_randomisation(SaliencyTubes(model), x, order='random'),
     "order must be 'cascading' or 'independent', got 'random'"),
    (lambda model, x: metrics.parameter_randomisation(SaliencyTubes(model), x, depth=0),
     'depth must be None or at least 1, got 0'),
])
def test_what_cannot_be_scored_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(Small(), clip())


def test_a_target_must_be_a_class_and_the_pixels_of_one_tensor():
    with pytest.raises(TypeError, match='target must be indices of classes, got a function'):
        metrics.kernel_ablation(Small(), clip(), lambda logits: logits[0], 'head', torch.rand(8))
    with pytest.raises(TypeError, match='inputs must be one tensor, got list'):
        metrics.insertion_deletion(Small(), [clip()], torch.rand(2, 4, 16, 16), 0)
