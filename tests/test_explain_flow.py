"""The graph of channels: exact on hand-made networks, complete by perturbation on those of the zoos."""
import gc
import weakref
from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from explain_helpers import Small, Twice, clip, narrow_slow, narrow_slowfast, narrow_x3d
from torch import nn

import video_plugins
from explain import flow_graph
from timm_softpool import SoftPool2d


class Wired(nn.Module):
    """Every way in which channels travel."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.grouped = nn.Conv2d(8, 6, 1, groups=2)
        self.gate = nn.Conv2d(6, 6, 1)
        self.pool = SoftPool2d(2)
        self.head = nn.Linear(6, 2)

    def forward(self, image):
        left, right = self.left(image), self.right(image).relu_()
        shuffled = torch.stack([left, right], 2).flatten(1, 2)  # left 0, right 0, left 1, ...
        shuffled[:, 2:4] = 0.5 * left[:, :2]
        grouped = self.grouped(shuffled)
        gated = grouped * self.gate(grouped.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(self.pool(gated + F.pad(left[:, 1:], (0, 0, 0, 0, 0, 3))).mean((2, 3)))


@pytest.fixture(scope='module')
def wired():
    return flow_graph(Wired().eval(), torch.randn(2, 3, 8, 8))


def test_the_layers_are_those_that_the_pass_calls_in_their_order(wired):
    assert list(wired.layers) == ['left', 'right', 'grouped', 'gate', 'head']
    assert wired.layers['grouped'] == ('grouped', 'grouped', 6, 8, 2)
    assert wired.inputs_of('grouped') == ['left', 'right'] and wired.inputs_of('left') == []
    assert not wired.opaque


def test_the_producers_of_a_channel_are_followed_through_a_shuffle_and_a_write_into_a_part(wired):
    assert [wired.producers('grouped', channel) for channel in range(5)] == [
        [('left', 0)], [('right', 0)], [('left', 0)], [('left', 1)], [('left', 2)]]
    assert wired.producers('left', 0) == []


def test_sums_unite_the_producers_and_a_gate_only_modulates(wired):
    assert wired.producers('head', 0) == [('grouped', 0), ('left', 1)]
    assert wired.producers('head', 5) == [('grouped', 5)]
    assert wired.modulators('head', 5) == [('gate', 5)]
    assert wired.producers('gate', 3) == [('grouped', 3)]


def test_a_kernel_reads_the_channels_of_its_group(wired):
    assert wired.children('grouped', 2) == range(0, 4)
    assert wired.children('grouped', 3) == range(4, 8)
    assert wired.outputs == [[('head', 0)], [('head', 1)]]


def test_a_module_that_works_twice_is_two_layers():
    graph = flow_graph(Twice().eval(), clip())
    assert list(graph.layers) == ['first.0', 'last.0@0', 'last.0@1', 'head']
    assert graph.producers('last.0@1', 3) == [('last.0@0', 3)]


def test_functional_layers_have_the_names_of_their_parameters():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel, self.inner = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Linear(4, 2)

        def forward(self, image):
            return F.linear(F.conv2d(image, self.kernel / self.kernel.norm()).mean((2, 3)), self.inner.weight)

    assert list(flow_graph(Functional().eval(), torch.randn(1, 3, 4, 4)).layers) == ['kernel', 'inner']


def test_weight_norm_and_compilation_change_no_names():
    model = Small()
    nn.utils.parametrizations.weight_norm(model.last[0])
    assert list(flow_graph(torch.compile(model), clip()).layers) == ['first.0', 'last.0', 'head']


def test_a_graph_is_kept_for_a_model_and_its_modules_and_goes_with_it():
    model = Small()
    graph = flow_graph(model, clip())
    assert flow_graph(model, clip(batch=5)) is graph
    assert flow_graph(model, clip(frames=6)) is not graph
    model.dropout = nn.Conv1d(1, 1, 1)
    model.head = nn.Linear(8, 3)
    model.dropout = nn.Identity()
    assert len(flow_graph(model, clip()).outputs) == 3
    model.head = nn.Linear(8, 4)  # of another shape alone
    assert len(flow_graph(model, clip()).outputs) == 4
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_model_is_left_as_it_was():
    model = Small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flow_graph(model, clip())
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def timm_model(name):
    return lambda: (timm.create_model(name, num_classes=5), torch.randn(1, 3, 64, 64))


def video_model(name):
    return lambda: (video_plugins.create_model(name, num_classes=5), torch.randn(1, 3, 8, 32, 32))


NETWORKS = {name: timm_model(name) for name in (
    'resnet18_softpool', 'cs3darknet_focus_s', 'legacy_seresnet18', 'dpn48b', 'ghostnet_050', 'mobilenetv3_small_050',
    'dla46x_c', 'resnest14d', 'skresnet18', 'resnet18_classreg')}
NETWORKS |= {name: video_model(name) for name in ('r3d_18_w16', 'fast_r3d_18_w16', 'srtg_r3d_18_w16', 'mtnet_xs_w16')}
NETWORKS |= {'slow': lambda: (narrow_slow(), clip(1, 4, 64)), 'x3d': lambda: (narrow_x3d(), clip(1, 4, 64)),
             'slowfast': lambda: (narrow_slowfast(), [clip(1, 2, 64), clip(1, 8, 64)])}


@pytest.mark.parametrize('name', NETWORKS)
def test_the_graph_has_every_channel_that_a_kernel_reaches(name):
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    for module in model.eval().modules():
        if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):  # the last one of a block begins with zeros
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    missed, extra, reached = compare(model, inputs, samples=6)
    assert reached >= 4 and not missed
    assert len(extra) <= reached // 3, 'but for what a dead activation hides'


def compare(model, inputs, samples):
    """What moves of the layers' inputs if one kernel changes and all layers' outputs are held otherwise: not in the
    graph, in the graph only (gates aside), and how much in all. Layers without a module of their own are not held."""
    graph = flow_graph(model, inputs)
    modules = {name: module for name, module in model.named_modules()
               if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)) and name in graph.layers}
    modules = {name: modules[name] for name in graph.layers if name in modules}
    held, seen, change = {}, {}, {}

    @cache
    def sources(name, channel):
        made = {*graph.producers(name, channel), *graph.modulators(name, channel)}
        return {kernel for kernel in made if kernel[0] in modules}.union(*(
            sources(layer, other) for layer, kernel in made if layer not in modules
            for other in graph.children(layer, kernel)))

    def axis(module):
        return -1 if isinstance(module, nn.Linear) else 1

    def before(name):
        return lambda module, args: seen.__setitem__(name, args[0].movedim(axis(module), 0).flatten(1).clone())

    def after(name):
        def hook(module, args, output):
            output = held.setdefault(name, output.clone()).clone()
            if name in change:
                output.movedim(axis(module), 0)[change[name]] += 3 * torch.rand_like(output.movedim(axis(module), 0)[0])
            return output
        return hook

    handles = [handle for name, module in modules.items() for handle in (
        module.register_forward_pre_hook(before(name)), module.register_forward_hook(after(name)))]
    run = lambda: model([*inputs] if isinstance(inputs, list) else inputs)  # noqa: E731  (SlowFast changes its list)
    missed, extra, reached = [], [], 0
    with torch.no_grad():
        run(), run()
        first = dict(seen)
        modules = {name: module for name, module in modules.items() if name in seen}  # others lend their weights
        for _ in range(samples):
            layer = list(modules)[torch.randint(len(modules), ()).item()]
            kernel = torch.randint(graph.layers[layer].kernels, ()).item()
            change.clear()
            change[layer] = kernel
            run()
            for name in modules:
                moved = ((seen[name] - first[name]).abs() > 1e-5 * (1 + first[name].abs())).any(1)
                for channel, has_moved in enumerate(moved.tolist()):
                    reached += has_moved
                    if has_moved and (layer, kernel) not in sources(name, channel):
                        missed.append((layer, kernel, name, channel))
                    if not has_moved and (layer, kernel) in graph.producers(name, channel):
                        extra.append((layer, kernel, name, channel))
    for handle in handles:
        handle.remove()
    return missed, extra, reached
