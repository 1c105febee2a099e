"""Class Feature Pyramids: the maps and the graph by their formulas, on networks whose weights are known."""
import pytest
import timm
import torch
from explain_helpers import NETWORKS, Small, clip
from torch import nn

from explain import ClassFeaturePyramid, SaliencyTubes
from explain.class_feature_pyramid import blurred


class Tower(nn.Module):
    """1 x 1 convolutions, so that all can be worked out by hand: 2 -> 4 -> 4 in two groups -> 3 classes."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2, bias=False)
        self.head = nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            self.first.weight[:, :, 0, 0] = torch.tensor([[1., 0], [0, 1], [1, 1], [2, -1]])
            self.norm.weight[1] = -1
            self.norm.bias[1] = 5
            self.grouped.weight[:, :, 0, 0] = torch.tensor([[1., 2], [3, -1], [1, 1], [2, 1]])
            self.head.weight[:] = torch.tensor([[4., 2, -1, 1], [-3, 0, 1, 2], [0, 0, 0, 0]])

    def forward(self, image):
        return self.head((self.grouped(self.norm(self.first(image)).relu())).mean((2, 3)))


IMAGE = torch.tensor([[1., 2], [3, 4]]).expand(1, 2, 2, 2)  # the channels' means are 2.5


@pytest.fixture
def tower():
    return Tower().eval()


def test_the_contributions_of_the_gradient_rule_are_gradient_times_activation(tower):
    graph = ClassFeaturePyramid(tower, select=('topk', 10)).graph(IMAGE, 0)
    # Means behind first, norm and relu: 2.5, 5 - 2.5, 5, 2.5 (but for the norm's eps); then 7.5, 5, 7.5, 12.5.
    assert graph.nodes['head', 0] == 1
    parts = torch.tensor([4 * 7.5, 2 * 5, 1 * 12.5])  # the third channel speaks against the class
    torch.testing.assert_close(torch.tensor([*graph.channels['head', 0].values()]),
                               (parts / parts.sum())[[0, 2, 1]], rtol=1e-4, atol=0)
    assert [*graph.channels['head', 0]] == [0, 3, 1]
    # The gradients at the inputs of grouped: 4 + 2 * 3, 2 * 4 - 2, -1 + 2, -1 + 1 (of 4 positions).
    assert [*graph.channels['grouped', 0]] == [*graph.channels['grouped', 1]] == [0, 1]
    assert [*graph.channels['grouped', 3]] == [2]
    torch.testing.assert_close(graph.channels['grouped', 0][0], 10 * 2.5 / (10 * 2.5 + 6 * 2.5), rtol=1e-4, atol=0)


def test_the_published_rule_multiplies_means_and_scales_the_class_s_row_by_the_whole_matrix(tower):
    graph = ClassFeaturePyramid(tower, rule='paper', select=('theta', 0.7)).graph(IMAGE, 0)
    assert [*graph.channels['head', 0]] == [0, 1], '(4 + 3) / 7 and (2 + 3) / 7, but not (1 + 3) / 7'
    assert [*graph.channels['grouped', 0]] == [1], '2 * 2.5 is the largest, 1 * 2.5 the least of the group'
    assert [*graph.channels['grouped', 1]] == [0], '-1 * 2.5 is not positive'
    assert [*graph.channels['first', 1]] == [1]


def test_the_folded_rule_knows_the_scale_of_the_normalisation_behind(tower):
    with torch.no_grad():
        tower.first.weight[1, 0] = 0.1
    plain, folded = (ClassFeaturePyramid(tower, rule=rule, select=('topk', 9)).graph(IMAGE, 0)
                     for rule in ('paper', 'folded'))
    assert [*plain.channels['first', 1]] == [1, 0]
    assert [*folded.channels['first', 1]] == [], 'whatever enters kernel 1 is subtracted'


@pytest.mark.parametrize('select, chosen', [
    (('topk', 1), [0]), (('topk', 2), [0, 3]), (('theta', 0.9), [0]), (('theta', 0.5), [0, 3]),
    (('theta', 0), [0, 3, 1]), (('mass', 0.5), [0]), (('mass', 0.6), [0, 3]), (('mass', 1), [0, 3, 1])])
def test_selections(tower, select, chosen):  # of 30, 12.5, 10 and -7.5
    assert [*ClassFeaturePyramid(tower, select=select).graph(IMAGE, 0).channels['head', 0]] == chosen


def test_strengths_are_added_where_kernels_share_a_channel_and_sum_to_one_in_each_layer(tower):
    graph = ClassFeaturePyramid(tower).graph(IMAGE, 0)
    for layer in graph.layers:
        assert sum(strength for (name, _), strength in graph.nodes.items() if name == layer) == pytest.approx(1)
    given = graph.edges[('grouped', 0), ('first', 0)] + graph.edges[('grouped', 1), ('first', 0)]
    everything = sum(strength for (parent, _), strength in graph.edges.items() if parent[0] == 'grouped')
    assert graph.nodes['first', 0] == pytest.approx(given / everything)


def test_depth_is_the_number_of_steps_back_from_the_class(tower):
    for depth, count in ((1, 2), (2, 3), (None, 3)):
        assert ClassFeaturePyramid(tower, depth=depth).graph(IMAGE, 0).layers == ['head', 'grouped', 'first'][:count]


def test_tubes_are_sums_of_the_maps_of_the_channels(tower):
    features = tower.norm(tower.first(IMAGE)).relu()
    paper = ClassFeaturePyramid(tower, rule='paper', select=('topk', 2)).graph(IMAGE, 0)
    torch.testing.assert_close(paper.tube(('grouped', 0)), features[:, :2].sum(1, keepdim=True))
    grad = ClassFeaturePyramid(tower).graph(IMAGE, 0)
    parts = features[:, :2] * torch.tensor([10., 6]).reshape(1, 2, 1, 1) / 4
    torch.testing.assert_close(grad.tube(('grouped', 0)), parts.relu().sum(1, keepdim=True))
    folded = ClassFeaturePyramid(tower, rule='folded', select=('topk', 2)).graph(IMAGE, 0)
    shares = folded.channels['grouped', 0]
    torch.testing.assert_close(folded.tube(('grouped', 0)),
                               sum(features[:, [channel]] * share for channel, share in shares.items()))


class Matrix(nn.Module):
    """A layer of tokens (B, N, 4) that is no `nn.Linear`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, tokens):
        return tokens @ self.weight.T


class Unusual(nn.Module):
    """A transposed convolution in groups, a norm that keeps no statistics, a layer of its own."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.ConvTranspose2d(2, 4, 1, groups=2, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.norm, self.matrix = nn.BatchNorm2d(4, track_running_stats=False), Matrix()
        self.head = nn.Linear(4, 1, bias=False)
        with torch.no_grad():
            self.up.weight.fill_(1)
            self.norm.bias.fill_(1)
            self.down.weight.copy_(torch.eye(4)[:, :, None, None])
            self.head.weight.copy_(torch.tensor([[-1., -1., -1., 1.]]))

    def forward(self, image):
        return self.head(self.matrix(self.norm(self.down(self.up(image))).flatten(2).mT).relu().mean(1))


@pytest.mark.parametrize('rule', ['grad', 'folded', 'paper'])
def test_other_layouts_of_weights_and_channels_are_known(rule):
    graph = ClassFeaturePyramid(Unusual().eval(), rule=rule, select=('topk', 1)).graph(torch.rand(1, 2, 5, 5), 0)
    assert graph.channels['head', 0] == graph.channels['matrix', 3] == {3: 1}
    if rule != 'grad':  # the gradient in front of a norm of the sample itself adds nothing
        assert graph.channels['down', 3] == {3: 1} and graph.channels['up', 3] == {1: 1}


def test_a_shortcut_is_followed_beside_the_block():
    model = timm.create_model('resnet18', num_classes=5, zero_init_last=False).eval()
    graph = ClassFeaturePyramid(model).graph(torch.randn(1, 3, 64, 64), 2)
    below = {child[0] for parent, child in graph.edges if parent[0] == 'fc'}
    assert below == {'layer4.1.conv2', 'layer4.0.conv2', 'layer4.0.downsample.0'}
    assert graph.layers[-1] == 'conv1' and len(graph.layers) == 21


@pytest.mark.parametrize('name', ['slowfast', 'mtnet', 'srtg', 'x3d', 'densenet121', 'test_vit', 'resnet18_softpool'])
def test_maps_and_graph_of_networks_of_both_zoos(name):
    model, inputs = NETWORKS[name]()
    one = [stream[:1] for stream in inputs] if isinstance(inputs, list) else inputs[:1]
    pyramid = ClassFeaturePyramid(model)
    fused = pyramid.explain(inputs, 1).fuse()
    largest = inputs[-1] if isinstance(inputs, list) else inputs
    assert fused.shape == (2, 1, *largest.shape[2:]) and fused.isfinite().all()
    graph = pyramid.graph(one, 1)
    assert len(graph.layers) > 1 and graph.target == 1


def test_the_maps_are_the_tube_and_two_for_each_larger_resolution():
    model, images = timm.create_model('resnet18', num_classes=5, zero_init_last=False).eval(), torch.randn(2, 3, 64, 96)
    explanation = ClassFeaturePyramid(model).explain(images, 3)
    assert {name: tuple(map_.shape[2:]) for name, map_ in explanation.maps.items()} == {
        'layer4': (2, 3), 'layer1.0.conv1:input': (16, 24), 'layer2.0.downsample.0:input': (16, 24),
        'layer2.0.conv2:input': (8, 12), 'layer3.0.downsample.0:input': (8, 12), 'layer3.0.conv2:input': (4, 6),
        'layer4.0.downsample.0:input': (4, 6)}
    torch.testing.assert_close(explanation.maps['layer4'], SaliencyTubes(model).explain(images, 3).maps['layer4'])
    features = model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(images))))).detach().requires_grad_()
    score = model.fc(model.layer4(model.layer3(model.layer2(features))).mean((2, 3)))[:, 3].sum()
    product = (features * torch.autograd.grad(score, features)[0]).relu().sum(1, keepdim=True)
    found = explanation.maps['layer2.0.downsample.0:input']
    torch.testing.assert_close(found, blurred(product.detach()), rtol=1e-4, atol=1e-6)


def test_the_blur_is_one_two_one_along_rows_and_columns_and_levels_every_second_cell():
    point = torch.zeros(1, 1, 2, 5, 5)
    point[..., 0, 2, 2] = 16
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = torch.tensor([[1., 2, 1], [2, 4, 2], [1, 2, 1]])
    torch.testing.assert_close(blurred(point)[0, 0], torch.stack([expected, torch.zeros(5, 5)]))
    stripes = torch.tensor([1., 0]).repeat(1, 1, 6, 3)
    torch.testing.assert_close(blurred(stripes)[..., 1:-1], torch.full((1, 1, 6, 4), 0.5))


def test_where_all_maps_have_one_size_the_pyramid_is_the_tube():
    model, clips = Small(), clip()
    torch.testing.assert_close(ClassFeaturePyramid(model).explain(clips, 1).fuse(),
                               SaliencyTubes(model).explain(clips, 1).fuse())


def test_a_graph_says_where_it_ends_before_the_image():
    class Functional(Tower):
        def forward(self, image):
            features = torch.nn.functional.conv2d(self.first(image), self.grouped.weight, groups=2)
            return self.head(features.mean((2, 3)))

    graph = ClassFeaturePyramid(Functional().eval()).graph(IMAGE, 0)
    assert graph.layers == ['head', 'grouped'] and graph.ends == ['grouped']
    assert ClassFeaturePyramid(Tower().eval()).graph(IMAGE, 0).ends == []


def test_the_largest_logit_is_the_class_of_a_graph_without_a_target(tower):
    assert ClassFeaturePyramid(tower).graph(IMAGE).target == int(tower(IMAGE).argmax())


@pytest.mark.parametrize('options, message', [
    (dict(depth=0), 'depth must be None or at least 1, got 0'), (dict(rule='exact'), 'rule must be one of grad'),
    (dict(select='topk'), r"select must be one of \('topk', a whole number of at least 1\)"),
    (dict(select=('topk', 0)), 'select'), (dict(select=('topk', 2.5)), 'select'), (dict(select=([], 1)), 'select'),
    (dict(select=('theta', 1.5)), 'select'),
    (dict(select=('mass', 0)), 'select')])
def test_arguments_out_of_range(tower, options, message):
    with pytest.raises(ValueError, match=message):
        ClassFeaturePyramid(tower, **options)


@pytest.mark.parametrize('inputs, target, message', [
    (IMAGE.expand(2, 2, 2, 2), 0, 'a batch of one, got 2'), (IMAGE, 3, 'target must be in the logits'),
    (IMAGE, lambda logits: logits[0], 'target must be one class')])
def test_what_has_no_graph(tower, inputs, target, message):
    with pytest.raises(ValueError, match=message):
        ClassFeaturePyramid(tower).graph(inputs, target)
