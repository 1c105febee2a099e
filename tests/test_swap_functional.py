"""swap_pooling of pools that are called as functions, in modules and in graphs that were traced from them."""
import copy
import io
import pickle
from collections import OrderedDict

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import POOLS, by_hand
from torch import nn
from torch.nn.functional import avg_pool2d

from timm_softpool import soft_pool2d, soft_pools, swap_pooling


def pool_of_another_module(x):
    return F.max_pool2d(x, 2)


class Call(nn.Module):
    """A module whose only work is ``pool``, which it calls by a name of this file."""

    def forward(self, x):
        return F.max_pool2d(x, 2)


class CallWithKeywords(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, kernel_size=2, stride=2, count_include_pad=False)


class CallOfImportedName(nn.Module):
    def forward(self, x):
        return avg_pool2d(x, (2, 2))


class InheritedCall(Call):
    pass


class CallInAnotherMethod(nn.Module):
    def forward(self, x):
        return self.pool(x)

    def pool(self, x, *, size=2):
        return F.max_pool2d(x, size)


class CallThroughSuper(Call):
    def forward(self, x):
        return super().forward(x)


class CallsHereAndThroughSuper(Call):
    def forward(self, x):
        return F.avg_pool2d(super().forward(x), 1)


class CallInLambda(nn.Module):
    def forward(self, x):
        return (lambda x: F.max_pool2d(x, 2))(x)


class CallInComprehension(nn.Module):
    def forward(self, x):
        return torch.stack([F.max_pool2d(image, 2) for image in x])


class CallOfTorchFunction(nn.Module):
    def forward(self, x):
        return torch.max_pool2d(x, 2)


class CallByFullName(nn.Module):
    def forward(self, x):
        return torch.nn.functional.max_pool2d(x, 2)


class CallInStaticMethod(nn.Module):
    def forward(self, x):
        return self.pool(x)

    @staticmethod
    def pool(x):
        return F.max_pool2d(x, 2)


class CallInDecoratedMethod(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return F.max_pool2d(x, 2)


class CallOfStoredFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = F.max_pool2d

    def forward(self, x):
        return self.pool(x, 2)


@pytest.mark.parametrize('cls', [Call, CallWithKeywords, CallOfImportedName, InheritedCall, CallInAnotherMethod])
def test_a_functional_pool_becomes_soft_pool(cls, log):
    x = torch.randn(2, 3, 8, 6)
    model = swap_pooling(nn.Sequential(OrderedDict(stem=cls())))
    assert torch.equal(model(x), soft_pool2d(x, 2))
    assert isinstance(model.stem, cls)
    assert list(soft_pools(model)) == ['stem']
    record, = log.records
    assert record.levelname == 'INFO'
    assert record.message.startswith('stem: ')
    assert cls.__name__ in record.message


@pytest.mark.parametrize('create', [lambda: nn.MaxPool2d(2), Call, lambda: torch.fx.symbolic_trace(Call())],
                         ids=['layer', 'module', 'graph'])
def test_a_max_pool_becomes_soft_pool_on_a_map_as_small_as_its_window_too(create):
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(swap_pooling(create())(x), soft_pool2d(x, 2))


@pytest.mark.parametrize('cls', [CallThroughSuper, CallsHereAndThroughSuper, CallInLambda, CallInComprehension,
                                 CallOfTorchFunction, CallByFullName, CallOfStoredFunction, CallInStaticMethod,
                                 CallInDecoratedMethod])
def test_a_functional_pool_is_replaced_or_named_in_a_warning(cls, log):
    x = torch.randn(2, 3, 8, 6)
    model = swap_pooling(nn.Sequential(OrderedDict(stem=cls())))
    warned = [record for record in log.records if record.levelname == 'WARNING' and 'stem: ' in record.message]
    assert torch.equal(model(x), soft_pool2d(x, 2)) or warned


def test_replaced_functional_pools_are_named_by_the_documented_logger(log):
    swap_pooling(Call())
    record, = log.records
    assert record.name == 'timm_softpool.swap'


def test_other_instances_of_the_class_keep_their_pools():
    x = torch.randn(2, 3, 8, 6)
    other = Call()
    swap_pooling(Call())
    assert torch.equal(other(x), F.max_pool2d(x, 2))
    assert torch.equal(Call()(x), F.max_pool2d(x, 2))


class BothKinds(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(F.max_pool2d(x, 2), 2)


@pytest.mark.parametrize(('pools', 'expected'), [
    (('max',), lambda x: F.avg_pool2d(soft_pool2d(x, 2), 2)),
    (('avg',), lambda x: soft_pool2d(F.max_pool2d(x, 2), 2)),
], ids=['max', 'avg'])
@pytest.mark.parametrize('create', [BothKinds, lambda: torch.fx.symbolic_trace(BothKinds())], ids=['module', 'graph'])
def test_pools_chooses_among_functional_pools_too(create, pools, expected):
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(swap_pooling(create(), pools=pools)(x), expected(x))


@pytest.mark.parametrize('create', [lambda: nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2)), BothKinds,
                                    lambda: torch.fx.symbolic_trace(BothKinds())], ids=['layers', 'module', 'graph'])
def test_one_kind_after_the_other_is_the_same_as_both_at_once(create):
    x = torch.randn(2, 3, 8, 8)
    one_by_one = swap_pooling(swap_pooling(create(), pools=('max',)), pools=('avg',))
    assert torch.equal(one_by_one(x), swap_pooling(create())(x))


@pytest.mark.parametrize('create', [Call, lambda: torch.fx.symbolic_trace(Call())], ids=['module', 'graph'])
def test_where_is_asked_about_the_module_that_calls_a_functional_pool(create):
    x = torch.randn(2, 3, 8, 6)
    asked = []
    model = nn.Sequential(OrderedDict(stem=create()))
    stem = model.stem
    swap_pooling(model, where=lambda *place: asked.append(place))
    assert asked == [('stem', stem)]
    assert torch.equal(model(x), F.max_pool2d(x, 2))


class GlobalAverage(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 7)


class GlobalAverageOfTheMap(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, x.shape[2:])


class GlobalAverageWithStrideOne(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 7, stride=1)


class AdaptiveAverage(nn.Module):
    def forward(self, x):
        return F.adaptive_avg_pool2d(x, 1)


@pytest.mark.parametrize('cls', [GlobalAverage, GlobalAverageOfTheMap, GlobalAverageWithStrideOne, AdaptiveAverage])
def test_a_functional_average_in_place_of_a_global_one_stays(cls):
    x = torch.randn(2, 3, 7, 7)
    assert torch.equal(swap_pooling(cls())(x), cls()(x))


class Dilated(nn.Module):
    def forward(self, x):
        return F.max_pool2d(x, 2, dilation=2)


class WithIndices(nn.Module):
    def forward(self, x):
        return F.max_pool2d(x, 2, return_indices=True)


class OtherDivisor(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 2, divisor_override=3)


class DilatedUnderAnyName(nn.Module):
    def forward(self, x):
        return F.max_pool2d(x, 2, 2, 0, 2)


@pytest.mark.parametrize('road', [lambda model: model, torch.jit.script], ids=['eager', 'script'])
@pytest.mark.parametrize('cls', [Dilated, DilatedUnderAnyName, OtherDivisor])
def test_a_functional_pool_that_soft_pool_has_no_form_of_stays(cls, road):
    x = torch.randn(2, 3, 8, 6)
    assert torch.equal(road(swap_pooling(cls()))(x), cls()(x))


def test_a_functional_pool_with_indices_still_gives_them():
    x = torch.randn(2, 3, 8, 6)
    for actual, expected in zip(swap_pooling(WithIndices())(x), WithIndices()(x)):
        assert torch.equal(actual, expected)


def test_what_the_layers_of_timm_pool_is_left_alone():
    gate = timm.layers.GatherExcite(4, extent=2, use_mlp=False)
    assert type(swap_pooling(nn.Sequential(gate))[0]) is type(gate)
    assert not soft_pools(nn.Sequential(gate))


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def loaded_into_another(model):
    other = swap_pooling(timm.create_model('inception_v3', num_classes=2)).eval()
    other.load_state_dict(model.state_dict())
    return other


ROADS = {
    'deepcopy': copy.deepcopy,
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
    'torch.save': saved_and_loaded,
    'state_dict': loaded_into_another,
    'jit.script': torch.jit.script,
    'fx': torch.fx.symbolic_trace,
    'compile': lambda model: torch.compile(model, fullgraph=True, backend='eager'),
}


@pytest.fixture(scope='module')
def inception():
    torch.manual_seed(0)
    return swap_pooling(timm.create_model('inception_v3', num_classes=2)).eval()


@pytest.mark.parametrize('road', ROADS.values(), ids=ROADS)
@torch.no_grad()
def test_a_network_with_functional_pools_survives(road, inception):
    input = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(road(inception)(input), inception(input))


class CallOfMaxPool1d(nn.Module):
    def forward(self, x):
        return F.max_pool1d(x, 2)


class CallOfAvgPool3d(nn.Module):
    def forward(self, x):
        return F.avg_pool3d(x, 2)


@pytest.mark.parametrize('batch', [(), (2,)], ids=['unbatched', 'batched'])
@pytest.mark.parametrize(('cls', 'ndim'), [(Call, 2), (CallWithKeywords, 2), (CallOfImportedName, 2)])
def test_a_functional_pool_is_the_same_in_torchscript(cls, ndim, batch):
    x = torch.randn(*batch, 4, *(4, 8, 6)[:ndim])
    assert torch.equal(torch.jit.script(swap_pooling(cls()))(x), POOLS[ndim](x, 2))


@pytest.mark.parametrize('cls', [CallOfMaxPool1d, CallOfAvgPool3d])
def test_torchscript_refuses_functional_pools_of_one_and_three_axes(cls):
    with pytest.raises(RuntimeError):
        torch.jit.script(swap_pooling(cls()))


@torch.no_grad()
def test_the_pools_of_a_traced_graph_are_replaced(monkeypatch):
    model = timm.create_model('inception_v3', num_classes=2).eval()
    input = torch.rand(1, 3, 96, 96)
    graph = swap_pooling(torch.fx.symbolic_trace(model))
    torch.testing.assert_close(graph(input), by_hand(model, input, monkeypatch))


@pytest.mark.parametrize('road', ['deepcopy', 'pickle', 'torch.save', 'jit.script', 'fx'])
def test_a_traced_graph_with_replaced_calls_survives(road):
    x = torch.randn(2, 3, 8, 6)
    graph = swap_pooling(torch.fx.symbolic_trace(Call()))
    assert torch.equal(ROADS[road](graph)(x), soft_pool2d(x, 2))


def test_replaced_calls_of_a_traced_graph_are_named_at_level_info(log):
    swap_pooling(nn.Sequential(OrderedDict(stem=torch.fx.symbolic_trace(Call()))))
    record, = log.records
    assert record.levelname == 'INFO'
    assert record.message.startswith('stem: ')
