"""The rules by which channels are followed, one network of two layers or so for each."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torchvision.ops import roi_align

from explain import flow_graph
from timm_softpool import SoftPool2d


class Net(nn.Module):
    """A function of an input and of the network with these parts."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, input):
        return self.function(self, input)


def conv(channels, kernels, **options):
    return nn.Conv2d(channels, kernels, 1, **options)


def graph(function, input=None, **parts):
    """Of a network whose layer ``first`` makes four channels of the input before ``function`` is applied to them."""
    model = Net(lambda net, input: function(net, net.first(input)), first=parts.pop('first', conv(3, 4)), **parts)
    return flow_graph(model.eval(), torch.randn(1, 3, 4, 4) if input is None else input)


def made(graph, layer='first'):
    """Of each output of the network, the kernels of ``layer`` that make it."""
    return [[kernel for name, kernel in kernels if name == layer] for kernels in graph.outputs]


def scaled(graph, layer='last'):
    return [graph.modulators(layer, channel) for channel in range(graph.layers[layer].channels)]


ONE_TO_ONE = [[0], [1], [2], [3]]
ALL = [[0, 1, 2, 3]]


# What moves.

@pytest.mark.parametrize('function, outputs', {
    'pooled': (lambda net, x: SoftPool2d(2)(x), ONE_TO_ONE),
    'resized': (lambda net, x: F.interpolate(x, 7, mode='bilinear'), ONE_TO_ONE),
    'shuffled': (lambda net, x: F.channel_shuffle(x, 2), [[0], [2], [1], [3]]),
    'overwritten by a number': (lambda net, x: x.scatter(1, torch.ones_like(x[:, :1], dtype=torch.long), 3.0),
                                [[0], [], [2], [3]]),
    'reversed': (lambda net, x: x.flip(1), [[3], [2], [1], [0]]),
    'rolled': (lambda net, x: x.roll(1, 1), [[3], [0], [1], [2]]),
    'pixels shuffled': (lambda net, x: F.pixel_shuffle(x, 2), ALL),
    'pixels unshuffled': (lambda net, x: F.pixel_unshuffle(x[:, :2], 2), [[0]] * 4 + [[1]] * 4),
    'channels last': (lambda net, x: x.movedim(1, -1)[..., [2, 0]].movedim(-1, 1), [[2], [0]]),
    'frames of two channels': (lambda net, x: x.view(1, 2, 2, 4, 4).mean(1), [[0, 2], [1, 3]]),
    'padded': (lambda net, x: F.pad(x, (1, 1, 1, 1, 1, 2), value=2.), [[], *ONE_TO_ONE, [], []]),
    'padded by reflection': (lambda net, x: F.pad(x, (1, 1, 1, 1), mode='reflect'), ONE_TO_ONE),
    'with no memory order': (lambda net, x: x.contiguous(memory_format=torch.channels_last).reshape(1, 4, 16),
                             ONE_TO_ONE),
    'strided': (lambda net, x: x.contiguous().as_strided((1, 2, 16), (64, 32, 1), 16), [[1], [3]]),
}.values())
def test_what_moves_channels_is_followed(function, outputs):
    found = graph(function)
    assert made(found) == outputs and not found.opaque


def write_columns(net, x):
    out = torch.zeros(1, 4, 4, 6).movedim(1, -1)
    out[..., 1:3] = x.movedim(1, -1)[:, :, :, [3, 0]].repeat(1, 1, 2, 1)[:, :, :6].movedim(1, 1).reshape(1, 4, 6, 2)
    return out.movedim(-1, 1)


def write_view(net, x):
    x.view(1, 2, 2, 16)[:, 1] += x.view(1, 2, 2, 16)[:, 0]
    return x


def write_base(net, x):
    part = x[:, 1:3]
    x[:, 2:] = x[:, :2]
    return part


def scale_part(net, x):
    x[:, :2].mul_(x[:, 2:])
    return x


def clear_part(net, x):
    x[:, 1].fill_(3.)
    x[:, 2:3].zero_()
    return x


def put(net, x):
    x[:, [0, 3]] = x[:, [1, 2]]
    return x


@pytest.mark.parametrize('function, outputs', [
    (write_columns, [[], [3], [0], []]), (write_view, [[0], [1], [0, 2], [1, 3]]), (write_base, [[1], [0]]),
    (scale_part, [[0, 2], [1, 3], [2], [3]]), (clear_part, [[0], [], [], [3]]), (put, [[1], [1], [2], [2]])])
def test_what_is_written_into_a_part_is_seen_through_every_view_of_it(function, outputs):
    assert made(graph(function)) == outputs


@pytest.mark.parametrize('function, outputs', {
    'sum over all': (lambda net, x: x.sum()[None], ALL),
    'both of var_mean': (lambda net, x: torch.cat(torch.var_mean(x, (2, 3)), 1), ONE_TO_ONE * 2),
    'cumulative sum': (lambda net, x: x.cumsum(1), ALL * 4),
    'sorted over positions': (lambda net, x: x.flatten(2).sort(2)[0], ONE_TO_ONE),
    'Fourier transform': (lambda net, x: torch.fft.rfft2(x).abs(), ONE_TO_ONE),
    'sampled': (lambda net, x: F.grid_sample(x, torch.zeros(1, 2, 2, 2), align_corners=False), ONE_TO_ONE),
    'regions': (lambda net, x: roi_align(x, [torch.tensor([[0., 0., 2., 2.]])], 2), ONE_TO_ONE),
    'patches': (lambda net, x: F.fold(F.unfold(x, 2), (4, 4), 2), ONE_TO_ONE),
    'gated linear unit': (lambda net, x: F.glu(x, 1), [[0, 2], [1, 3]]),
    'fixed filter of groups': (lambda net, x: F.conv2d(x, torch.ones(2, 2, 1, 1), groups=2), [[0, 1], [2, 3]]),
    'fixed matrix': (lambda net, x: x.flatten(2) @ torch.ones(16, 3), ONE_TO_ONE),
}.values())
def test_sums_and_averages_of_every_kind_unite(function, outputs):
    found = graph(function)
    assert made(found) == outputs and not found.opaque and list(found.layers) == ['first']


def test_a_blur_pool_is_no_layer():
    def blur(net, x):
        return F.conv2d(x, net.filter.expand(4, 1, 2, 2), stride=2, groups=4)

    found = graph(blur, filter=nn.Buffer(torch.ones(2, 2) / 4))
    assert list(found.layers) == ['first'] and made(found) == ONE_TO_ONE


def test_an_operator_that_is_not_known_is_counted_and_gives_what_is_made_of_all():
    found = graph(lambda net, x: torch.cdist(x.flatten(2), x.flatten(2)))
    assert found.opaque == {'_cdist_forward': 1} and made(found) == ALL * 4


# Layers.

def test_the_kernels_of_a_transposed_convolution_read_their_group():
    found = graph(lambda net, x: net.last(x), last=nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2))
    assert found.layers['last'] == ('last', 'last', 6, 4, 2)
    assert found.children('last', 2) == range(0, 2) and found.producers('last', 3) == [('first', 3)]


def test_convolutions_of_one_axis_and_of_three_are_layers():
    found = graph(lambda net, x: net.last(net.middle(x).flatten(2)), first=nn.Conv3d(3, 4, 1),
                  middle=nn.Conv3d(4, 5, 1), last=nn.Conv1d(5, 6, 3), input=torch.randn(1, 3, 2, 4, 4))
    assert list(found.layers) == ['first', 'middle', 'last'] and found.producers('last', 2) == [('middle', 2)]


@pytest.mark.parametrize('frames', [1, 3])
def test_matrices_of_parameters_are_groups_however_many_samples_they_are_repeated_for(frames):
    def matrices(net, x):
        return (x.reshape(4, 1, 4, 4).repeat(1, frames, 1, 1).view(2, 2, frames, 16).permute(2, 0, 3, 1)
                @ net.weight).permute(1, 3, 0, 2).reshape(1, 6, -1)

    found = graph(matrices, weight=nn.Parameter(torch.randn(2, 2, 3)))
    assert found.layers['weight'] == ('weight', '', 6, 4, 2)
    assert [found.producers('weight', channel) for channel in range(4)] == [[('first', kernel)] for kernel in range(4)]
    assert made(found, 'weight') == [[0], [1], [2], [3], [4], [5]]


def test_a_parameter_on_the_left_or_a_vector_of_them_is_a_layer():
    found = graph(lambda net, x: net.rows @ x.flatten(2), rows=nn.Parameter(torch.randn(2, 4)))
    assert found.layers['rows'] == ('rows', '', 2, 4, 1) and made(found, 'rows') == [[0], [1]]
    found = graph(lambda net, x: (x.flatten(2).mT @ net.vector)[:, None], vector=nn.Parameter(torch.randn(4)))
    assert found.layers['vector'] == ('vector', '', 1, 4, 1) and made(found, 'vector') == [[0]]


def test_an_einsum_with_parameters_is_a_layer():
    found = graph(lambda net, x: torch.einsum('bchw,kc->bkhw', x, net.weight), weight=nn.Parameter(torch.randn(5, 4)))
    assert found.layers['weight'] == ('weight', '', 5, 4, 1) and made(found, 'weight') == [[0], [1], [2], [3], [4]]


def standardised(net, x):
    weight = net.last.weight
    weight = net.gain * (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
    return F.conv2d(x, weight, groups=net.last.groups)


def masked(net, x):
    return F.conv2d(x, net.last.weight * torch.ones_like(net.last.weight).tril(), groups=net.last.groups)


def larger(net, x):
    weight = torch.zeros(4, 4 // net.last.groups, 3, 3)
    weight[..., 1:, 1:] = net.last.weight
    return F.conv2d(x, weight, groups=net.last.groups)


@pytest.mark.parametrize('groups', [1, 4])
@pytest.mark.parametrize('function', [standardised, masked, larger])
def test_standardised_masked_and_enlarged_weights_are_those_of_their_layer(function, groups):
    found = graph(function, last=nn.Conv2d(4, 4, 2, groups=groups), gain=nn.Parameter(torch.ones(4, 1, 1, 1)))
    assert found.layers['last'] == ('last', 'last', 4, 4, groups)


@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
@pytest.mark.parametrize('change', [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm,
                                    nn.utils.weight_norm, nn.utils.spectral_norm,
                                    lambda layer: prune.random_unstructured(layer, 'weight', 0.2)])
def test_normalised_and_pruned_weights_change_no_names(change):
    found = graph(lambda net, x: net.last(x), last=change(conv(4, 2)))
    assert list(found.layers) == ['first', 'last']


def test_a_recurrence_is_a_layer_with_the_name_of_its_parameter():
    def recur(net, x):
        output, state = net.last(x.flatten(2).permute(2, 0, 1))
        return output.permute(1, 2, 0) if net.last.mode == 'GRU' else state[0].movedim(0, 2)

    found = graph(recur, last=nn.LSTM(4, 5, bidirectional=True))
    assert list(found.layers) == ['first', 'last.weight_ih_l0', 'last.weight_ih_l0_reverse']
    assert found.producers('last.weight_ih_l0', 2) == [('first', 2)]
    assert made(found, 'last.weight_ih_l0') == [[0], [1], [2], [3], [4]]
    found = graph(recur, last=nn.GRU(4, 5), input=torch.randn(1, 3, 1, 2))  # of matrix products
    assert list(found.layers) == ['first', 'last.weight_ih_l0', 'last.weight_hh_l0']  # but for the state at the start
    assert ('last.weight_ih_l0', 2) in found.outputs[2] and not found.opaque


def test_weights_that_the_network_computes_are_a_layer_that_they_modulate():
    found = graph(lambda net, x: net.last(F.conv2d(x, net.weights(x.mean((2, 3))).view(2, 4, 1, 1))),
                  weights=nn.Linear(4, 8), last=conv(2, 1))
    assert list(found.layers) == ['first', 'weights', 'functional', 'last']
    assert found.producers('last', 1) == [('functional', 1)]
    assert found.modulators('last', 1) == [('weights', kernel) for kernel in range(8)]


# Gates and attention.

def test_a_smaller_factor_is_a_gate_and_one_of_the_same_size_is_not():
    found = graph(lambda net, x: net.last(x * net.gate(x).sigmoid().mean((2, 3), keepdim=True)), gate=conv(4, 4),
                  last=conv(4, 1))
    assert found.producers('last', 2) == [('first', 2)] and found.modulators('last', 2) == [('gate', 2)]
    found = graph(lambda net, x: net.last(x.mul_(net.gate(x).sigmoid())), gate=conv(4, 4), last=conv(4, 1))
    assert found.producers('last', 2) == [('first', 2), ('gate', 2)] and found.modulators('last', 2) == []


def by_softmax(query, key, value):
    return F.dropout((query @ key.mT / 2).softmax(-1), training=False) @ value


def on_the_right(query, key, value):
    return (value.mT @ (key @ query.mT).softmax(-2)).mT


def shared(query, key, value):
    return F.scaled_dot_product_attention(query, key[:, :1], value[:, :1], enable_gqa=True)


@pytest.mark.parametrize('attend', [by_softmax, on_the_right, F.scaled_dot_product_attention, shared])
@pytest.mark.parametrize('size', [3, 4])  # with as many tokens as channels, too
def test_queries_and_keys_only_modulate_what_values_make(attend, size):
    def attention(net, x):
        query, key, value = net.qkv(x).view(1, 3, 2, 4, -1).mT.unbind(1)  # two heads of four channels
        return net.last(attend(query, key, value).mT.reshape(1, 8, *x.shape[2:]))

    found = graph(attention, qkv=conv(4, 24), last=conv(8, 1), input=torch.randn(1, 3, 1, size))
    value = 16 if attend is shared else 20  # of the fifth channel, the first one of the second head
    assert found.producers('last', 4) == [('qkv', value)] and not found.opaque
    key = range(8, 12) if attend is shared else range(12, 16)
    assert {('qkv', kernel) for kernel in [*range(4, 8), *key]} <= {*found.modulators('last', 4)}


def test_the_layers_of_pytorch_s_transformer_are_told_apart():
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    found = graph(lambda net, x: net.encoder(x.flatten(2).mT).mT, encoder=encoder)
    assert [*found.layers] == ['first', 'encoder.self_attn.in_proj_weight', 'encoder.self_attn.out_proj',
                               'encoder.linear1', 'encoder.linear2'] and not found.opaque
    assert found.outputs[1] == [('encoder.linear2', 1), ('encoder.self_attn.out_proj', 1), ('first', 1)]
    assert torch.backends.mha.get_fastpath_enabled()


# Wherever and however it runs.

@pytest.mark.parametrize('change', [
    lambda model: model.to(memory_format=torch.channels_last), lambda model: model.bfloat16(), nn.DataParallel,
    lambda model: model.requires_grad_(False), torch.inference_mode()(lambda model: model)])
def test_the_graph_is_the_same_for_every_state_of_a_model(change):
    def model():
        return Net(lambda net, x: net.last(F.channel_shuffle(net.first(x.sub_(1)), 2).relu_()), first=conv(3, 4),
                   last=conv(4, 2)).eval()

    changed = change(model())
    expected, input = flow_graph(model(), torch.randn(1, 3, 4, 4)), torch.randn(1, 3, 4, 4)
    with torch.inference_mode():
        found = flow_graph(changed, input.to(next(changed.parameters()).dtype))
    assert found.layers == expected.layers and found.outputs == expected.outputs
    assert [found.producers('last', channel) for channel in range(4)] == [
        [('first', kernel)] for kernel in (0, 2, 1, 3)]


def test_a_model_made_in_inference_mode_has_a_graph():
    with torch.inference_mode():
        model = Net(lambda net, x: net.last(net.first(x)), first=conv(3, 4), last=conv(4, 2)).eval()
    assert list(flow_graph(model, torch.randn(1, 3, 4, 4)).layers) == ['first', 'last']


def test_the_graph_is_the_same_under_autocast_behind_another_pass():
    model = Net(lambda net, x: net.last(net.first(x)), first=conv(3, 4), last=conv(4, 2))
    input = torch.randn(1, 3, 4, 4)
    with torch.autocast('cpu', torch.bfloat16):
        model(input)
        assert list(flow_graph(model, input).layers) == ['first', 'last']


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_indices_on_a_gpu_move_channels():
    order = torch.tensor([2, 0], device='cuda')
    model = Net(lambda net, x: net.first(x).index_select(1, order), first=conv(3, 4)).cuda().eval()
    assert made(flow_graph(model, torch.randn(1, 3, 4, 4, device='cuda'))) == [[2], [0]]
