"""Which layers a network has, and how what they give becomes maps."""
import pytest
import torch
from explain_helpers import NETWORKS, Small, Twice, clip, narrow_mvit, narrow_slow, narrow_slowfast
from torch import nn

from explain import Explainer, SaliencyTubes, find_layers, last_spatial_layer
from explain.layers import Grid, find_grid, resolve

# The layer that 'auto' finds and its grid.
FOUND = {
    'resnet18': ('layer4', (2, 2)), 'test_convnext': ('stages', (2, 2)), 'test_efficientnet': ('bn2', (2, 2)),
    'mobilenetv3_small_050': ('blocks', (2, 2)), 'densenet121': ('features', (2, 2)),
    'test_vit': ('blocks.5.norm1', (4, 4)), 'test_vit3': ('norm', (4, 4)),
    'xcit_nano_12_p16_224': ('cls_attn_blocks.1.norm1', (4, 4)), 'levit_128s': ('stages', (4, 4)),
    'vit_tiny_patch16_224': ('blocks', (4, 4)), 'swin_tiny_patch4_window7_224': ('norm', (2, 2)),
    'pvt_v2_b0': ('stages', (2, 2)), 'mvitv2_tiny': ('norm', (2, 2)), 'resnet18_softpool': ('layer4', (2, 2)),
    'slow': ('blocks.4', (4, 2, 2)), 'x3d': ('blocks.5.pool.pre_act', (4, 2, 2)),
    'slowfast': ('blocks.4', (2, 2, 2), (8, 2, 2)), 'mvit': ('blocks.2.norm1', (4, 8, 8)),
    'mtnet': ('blocks.4', (1, 2, 2), (1, 1, 1)), 'srtg': ('blocks.4', (1, 2, 2)), 'fast': ('blocks.4', (1, 2, 2)),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_the_last_layer_with_maps_of_any_network_is_found_and_explained(name):
    model, x = NETWORKS[name]()
    layer, *grids = FOUND[name]
    explainer = SaliencyTubes(model.eval())
    result = explainer.explain(x, target=1)
    assert [map_.shape for map_ in result.maps.values()] == [(2, 1, *grid) for grid in grids]
    assert {name.partition('[')[0] for name in result.maps} == {layer}
    size = max((part.shape[2:] for part in x), key=len) if isinstance(x, list) else x.shape[2:]
    assert result.upsampled().shape[-2:] == size[-2:] and result.upsampled().any()
    shapes = [part.shape for part in x] if isinstance(x, list) else x.shape
    found = explainer.attribute(x, target=1)
    assert ([part.shape for part in found] if isinstance(x, list) else found.shape) == shapes


def test_a_pool_over_some_positions_is_no_layer_of_its_own():
    model = narrow_slow()
    assert last_spatial_layer(model, clip(frames=4, size=96)) == 'blocks.4', 'its head pools 2 x 2 of 3 x 3 cells'


def test_layers_are_listed_in_the_order_in_which_they_end():
    layers = find_layers(Small(), clip())
    assert [layer.name for layer in layers] == ['first.0', 'first.1', 'first.2', 'first', 'last.0', 'last.1', 'last.2',
                                                'last', 'dropout', 'head']
    last, head = layers[7], layers[-1]
    assert (last.type, last.shape, last.grid, last.stride) == ('Sequential', (2, 8, 2, 8, 8),
                                                               Grid('first', (2, 8, 8)), (2, 2, 2))
    assert (head.shape, head.grid, head.stride) == ((2, 5), None, None)


def test_a_layer_is_a_module_a_name_wildcards_an_index_or_a_list():
    model = Small()
    layers = find_layers(model, clip())

    def names(layer):
        return [info.name for info in resolve(model, layer, layers, auto='last')]

    assert names(model.last[0]) == ['last.0']
    assert names('auto') == ['last'] == names('last')
    assert names('*') == ['first', 'last', 'dropout', 'head'], 'wildcards do not reach over dots'
    assert names('*.[02]') == ['first.0', 'first.2', 'last.0', 'last.2']
    assert names(-1) == ['last'] and names(0) == ['first.0']
    assert names(['last', 'first', 'last', 0]) == ['last', 'first', 'first.0']


@pytest.mark.parametrize(('layer', 'error', 'message'), [
    ('layer9', ValueError, "layer must name a module .* got 'layer9'"),
    (nn.Linear(1, 1), ValueError, 'layer must be a module of the model, got a Linear that is not in it'),
    (8, ValueError, 'layer must be an index into the 8 layers that have maps, got 8'),
    (1.5, TypeError, 'layer must be a module, a name, an index or a list of these, got 1.5'),
    ('head', ValueError, r"layer must give maps, got 'head' with the shape \(2, 5\)"),
])
def test_what_is_no_layer_with_maps_is_refused(layer, error, message):
    with pytest.raises(error, match=message):
        SaliencyTubes(Small(), layer).explain(clip())


def test_calls_and_streams_of_a_layer_have_names():
    model = Twice()
    assert [layer.name for layer in find_layers(model, clip()) if layer.module == 'last'] == ['last@0', 'last@1']
    both = SaliencyTubes(model, 'last').explain(clip(), 0)
    assert list(both.maps) == ['last@0', 'last@1']
    assert list(SaliencyTubes(model, 'last@1').explain(clip(), 0).maps) == ['last@1']
    x = [clip(1, 2, 64), clip(1, 8, 64)]
    assert list(SaliencyTubes(narrow_slowfast(), 'blocks.4[1]').explain(x, 0).maps) == ['blocks.4[1]']


def test_the_layer_is_found_anew_for_inputs_of_another_size():
    model = Small(axes=2)
    explainer = SaliencyTubes(model)
    assert explainer.explain(clip(axes=2, size=16)).maps['last'].shape[2:] == (8, 8)
    assert explainer.explain(clip(axes=2, size=24)).maps['last'].shape[2:] == (12, 12)
    with pytest.raises(ValueError, match='use larger inputs'):
        last_spatial_layer(model, clip(axes=2, size=1))


@pytest.mark.parametrize(('shape', 'size', 'options', 'expected'), [
    ((2, 64, 7, 7), (224, 224), {}, Grid('first', (7, 7))),
    ((2, 7, 7, 64), (224, 224), {}, Grid('last', (7, 7))),
    ((2, 8, 8, 8), (64, 64), {}, Grid('first', (8, 8))),
    ((2, 8, 8, 8), (64, 64), dict(channels_last=True), Grid('last', (8, 8))),
    ((2, 16, 4, 5), (32, 40), {}, Grid('first', (4, 5))),
    ((2, 4, 5, 16), (32, 40), {}, Grid('last', (4, 5))),
    ((2, 196, 384), (224, 224), {}, Grid('tokens', (14, 14))),
    ((2, 197, 384), (224, 224), {}, Grid('tokens', (14, 14), 1)),
    ((2, 201, 384), (224, 224), dict(prefix=5), Grid('tokens', (14, 14), 5)),
    ((2, 20, 384), (64, 80), {}, Grid('tokens', (4, 5))),
    ((2, 393, 96), (16, 224, 224), {}, Grid('tokens', (8, 7, 7), 1)),
    ((2, 393, 96), (16, 224, 224), dict(known=[(2, 14, 14)]), Grid('tokens', (2, 14, 14), 1)),
    ((2, 12, 197, 197), (224, 224), {}, None),  # attention
    ((98, 49, 96), (224, 224), {}, None),  # windows
    ((2, 1000), (224, 224), {}, None),
])
def test_positions_are_recognised(shape, size, options, expected):
    assert find_grid(shape, size, 2, **options) == expected


@torch.no_grad()
def test_tokens_that_come_before_their_size_is_told_have_the_grid_of_the_patches():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.norm, self.head = nn.Conv3d(3, 4, (2, 4, 4), (2, 4, 4)), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, clip):
            tokens = self.patches(clip).flatten(2).transpose(1, 2)
            return self.head(self.norm(torch.cat([tokens[:, :1], tokens], 1))[:, 0])

    # 1 + 8 * 28 * 28 is 3 * 41 * 51, too
    grids = {layer.name: layer.grid for layer in find_layers(Tokens().eval(), torch.randn(1, 3, 16, 112, 112))}
    assert grids['norm'] == Grid('tokens', (8, 28, 28), 1)


def test_tokens_are_laid_out_row_by_row_behind_their_prefix():
    tokens = torch.arange(2 * 7 * 3).reshape(2, 7, 3)
    maps = Grid('tokens', (2, 3), 1).maps(tokens)
    assert maps.shape == (2, 3, 2, 3)
    assert torch.equal(maps[1, 2], tokens[1, 1:, 2].reshape(2, 3))


def test_a_function_can_make_the_maps():
    model, x = narrow_mvit().eval(), clip(frames=8, size=64)
    by_hand = SaliencyTubes(model, 'blocks.2.norm1',
                            reshape=lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 8, 8)))
    torch.testing.assert_close(by_hand.attribute(x, 1), SaliencyTubes(model).attribute(x, 1))
    with pytest.raises(ValueError, match="reshape must be 'auto' or a function, got 'tokens'"):
        Explainer(model, reshape='tokens')
