"""The layers of the video plug-in, alone: shapes, streams, gates, and what they refuse."""
import pytest
import torch
from torch import nn

from video_plugins import FASTConv3d, MTConv3d, SqueezeRecursion, temporal_gate
from video_plugins.layers import select_similar_frames

# FAST


@pytest.mark.parametrize('form', [dict(), dict(parallel=True), dict(parallel=True, fuse='cat')], ids=str)
@pytest.mark.parametrize(('stride', 'shape'), [(1, (5, 8, 7)), (2, (3, 4, 4)), ((1, 2, 2), (5, 4, 4))], ids=str)
def test_fast_keeps_the_map_or_divides_it_by_its_stride(form, stride, shape):
    assert FASTConv3d(4, 6, stride=stride, **form)(torch.randn(2, 4, 5, 8, 7)).shape == (2, 6, *shape)


@pytest.mark.parametrize(('form', 'weights'), [(dict(), 27), (dict(parallel=True), 27),
                                               (dict(parallel=True, fuse='cat'), 18)], ids=str)
def test_fast_has_the_weights_of_a_plain_convolution_or_with_half_branches_two_thirds(form, weights):
    layer = FASTConv3d(8, 8, norm=None, activation=None, **form)
    assert sum(weight.numel() for weight in layer.parameters()) == weights * 8 * 8


def test_a_sequential_fast_convolution_is_a_plain_one_of_the_product_of_its_kernels():
    layer = FASTConv3d(1, 1, norm=None, activation=None).double()
    space, horizontal, vertical = (conv.weight for conv in (layer.space, layer.horizontal, layer.vertical))
    clip = torch.randn(1, 1, 9, 9, 9, dtype=torch.float64)
    impulse = torch.zeros_like(clip)
    impulse[..., 4, 4, 4] = 1
    kernel = layer(impulse)
    assert kernel.count_nonzero() == 5 ** 3
    spread = torch.nn.functional.conv3d(clip, kernel[..., 2:7, 2:7, 2:7].flip(2, 3, 4), padding=2)
    torch.testing.assert_close(layer(clip)[..., 2:7, 2:7, 2:7], spread[..., 2:7, 2:7, 2:7])
    assert {tuple(weight.shape[2:]) for weight in (space, horizontal, vertical)} == {(1, 3, 3), (3, 1, 3), (3, 3, 1)}


def test_only_the_first_temporal_convolutions_of_fast_are_strided_in_time():
    sequential, parallel = FASTConv3d(2, 2, stride=2), FASTConv3d(2, 2, stride=2, parallel=True)
    assert [conv.stride for conv in (sequential.space, sequential.horizontal, sequential.vertical)] == [
        (1, 2, 2), (2, 1, 1), (1, 1, 1)]
    assert parallel.horizontal.stride == parallel.vertical.stride == (2, 1, 1)


# Multi-temporal convolutions

def streams(frames=8, channels=64):
    return torch.randn(2, channels * 7 // 8, frames, 8, 8), torch.randn(2, channels // 8, frames // 2, 4, 4)


@pytest.mark.parametrize('groups', [1, 8])
def test_mtconv_strides_both_streams_and_shares_the_channels_by_the_ratio(groups):
    short, long = MTConv3d(64, 128, 3, 2, 1, groups=groups)(streams())
    assert short.shape == (2, 112, 4, 4, 4)
    assert long.shape == (2, 16, 2, 2, 2)


def test_the_lateral_path_goes_from_the_short_stream_to_the_long_one_only():
    layer, (short, long) = MTConv3d(64, 64, 1).eval(), streams()
    for argument, changed in ((0, [True, True]), (1, [False, True])):
        other = [short, long]
        other[argument] = other[argument] + torch.randn_like(other[argument])
        pairs = zip(layer((short, long)), layer(tuple(other)))
        assert [not torch.equal(one, two) for one, two in pairs] == changed


def test_without_a_lateral_path_the_streams_do_not_meet():
    layer, (short, long) = MTConv3d(64, 64, 1, lateral=False).eval(), streams()
    assert torch.equal(layer((short, long))[1], layer((2 * short, long))[1])


def test_sub_streams_have_group_norms():
    layer = MTConv3d(64, 64, 3, groups=8)
    assert (layer.norm_short.num_groups, layer.norm_long.num_groups) == (7, 1)
    assert (layer.conv_short.groups, layer.conv_long.groups) == (7, 1)


def test_the_frames_most_similar_to_their_neighbours_are_kept_in_their_order():
    clip = torch.zeros(2, 3, 6, 2, 2)
    clip[0, 0], clip[0, 1, 0], clip[0, 2, 1] = 1, 9, 9  # frames 3 and 4 have equal neighbours, 2 has one
    clip[0, 0] += torch.arange(6)[:, None, None]
    clip[1] = clip[0].flip(1)
    kept = select_similar_frames(clip)
    assert kept[0, 0, :, 0, 0].tolist() == [3, 4, 5]
    assert torch.equal(kept[1], kept[0].flip(1))


@pytest.mark.parametrize(('frames', 'kept'), [(1, 1), (2, 2), (3, 1), (5, 2), (16, 8)])
def test_half_of_the_frames_are_kept_but_for_clips_without_a_middle(frames, kept):
    assert select_similar_frames(torch.randn(2, 3, frames, 4, 4)).shape == (2, 3, kept, 4, 4)


# Squeeze and recursion

@pytest.mark.parametrize(('recurrent', 'reference'), [('lstm', nn.LSTM), ('gru', nn.GRU)])
def test_the_recursion_multiplies_by_what_torch_computes_from_the_means(recurrent, reference):
    layer, rnn, clip = SqueezeRecursion(5, recurrent=recurrent), reference(5, 5, 2), torch.randn(3, 5, 4, 6, 7)
    rnn.load_state_dict(layer.rnn.state_dict())
    states = rnn(clip.mean((3, 4)).permute(2, 0, 1))[0].permute(1, 2, 0)
    torch.testing.assert_close(layer(clip), clip * states[..., None, None])


def test_a_closed_gate_passes_a_clip_and_an_open_one_multiplies(monkeypatch):
    monkeypatch.setattr('video_plugins.layers.srtg.temporal_gate', lambda *_: torch.tensor([True, False]))
    layer, clip = SqueezeRecursion(5), torch.randn(2, 5, 4, 6, 7)
    always = layer(clip)
    layer.gate = 'or'
    out = layer(clip)
    assert torch.equal(out[0], always[0])
    assert torch.equal(out[1], clip[1])


@pytest.mark.parametrize('mode', ['or', 'and'])
def test_the_gate_opens_for_equal_sequences_and_not_for_swapped_frames(mode):
    frames = torch.randn(2, 6, 5)
    answers = frames.clone()
    answers[1] = frames[1].flip(1)
    assert temporal_gate(frames, answers, mode).tolist() == [True, False]


def test_a_clip_consistent_in_one_direction_opens_only_the_gate_of_or():
    frames = torch.tensor([[[0.0, 1.0]]])
    answers = torch.tensor([[[0.6, 0.7]]])  # the nearest of frame 1 is answer 1, of frame 0 answer 0; both are near 1
    assert temporal_gate(frames, answers, 'or').tolist() == [True]
    assert temporal_gate(frames, answers, 'and').tolist() == [False]
    assert temporal_gate(answers, frames, 'or').tolist() == [True]


def test_gates_are_each_clip_s_own():
    frames, answers = torch.randn(4, 3, 6), torch.randn(4, 3, 6)
    answers[2] = frames[2]
    together = temporal_gate(frames, answers)
    assert torch.equal(together, torch.cat([temporal_gate(f[None], a[None]) for f, a in zip(frames, answers)]))
    assert together[2]


# Refusals

@pytest.mark.parametrize(('make', 'message'), [
    (lambda: FASTConv3d(2, 2, 4), 'kernel_size must be odd, got 4'),
    (lambda: FASTConv3d(2, 2, fuse='mean'), "fuse must be 'sum' or 'cat', got 'mean'"),
    (lambda: FASTConv3d(2, 1, parallel=True, fuse='cat'), 'out_channels of at least 2, got 1'),
    (lambda: MTConv3d(64, 60, groups=8), 'out_channels=60.*groups=8'),
    (lambda: SqueezeRecursion(4, recurrent='rnn'), "recurrent must be one of 'lstm', 'gru', got 'rnn'"),
    (lambda: SqueezeRecursion(4, gate='xor'), "gate must be None, 'or' or 'and', got 'xor'"),
    (lambda: temporal_gate(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), 'xor'), "mode must be 'or' or 'and'"),
    (lambda: temporal_gate(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)), r'one shape \(N, C, T\)'),
])
def test_what_makes_no_sense_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
