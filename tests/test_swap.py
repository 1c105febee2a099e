"""swap_pooling: which pools of a model become SoftPool, which stay, and what else of the model stays as it was."""
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from helpers import POOLS, by_hand
from timm.layers import AvgPool2dSame, create_pool2d
from torch import nn

from timm_softpool import SoftPool1d, SoftPool2d, SoftPool2dSame, SoftPool3d, soft_pools, swap_pooling

MaxPool2dSame = type(create_pool2d('max', 2, padding='same'))

REPLACED = [
    (nn.MaxPool1d(3, 2, 1), SoftPool1d(3, 2, 1)),
    (nn.MaxPool2d(2), SoftPool2d(2)),
    (nn.MaxPool2d(3, 2, ceil_mode=True), SoftPool2d(3, 2, ceil_mode=True)),
    (nn.MaxPool2d((3, 2), (2, 1), (1, 0)), SoftPool2d((3, 2), (2, 1), (1, 0))),
    (nn.MaxPool2d(5, stride=1, padding=2), SoftPool2d(5, 1, 2)),
    (nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), SoftPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))),
    (nn.AvgPool1d(2), SoftPool1d(2)),
    (nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), SoftPool2d(2, ceil_mode=True)),
    (nn.AvgPool2d(3, stride=1, padding=1), SoftPool2d(3, 1, 1)),
    (nn.AvgPool2d(7, stride=2), SoftPool2d(7, 2)),
    (nn.AvgPool3d(2), SoftPool3d(2)),
    (MaxPool2dSame(3, 2), SoftPool2dSame(3, 2)),
    (AvgPool2dSame(2, 2), SoftPool2dSame(2, 2)),
    (AvgPool2dSame(2, 1), SoftPool2dSame(2, 1)),
]

KEPT = {
    'max of one cell': nn.MaxPool2d(1, 2),
    'average of one cell': nn.AvgPool2d(1, 2),
    'adaptive': nn.AdaptiveAvgPool2d(1),
    'adaptive max': nn.AdaptiveMaxPool2d(2),
    'global, stride 1': nn.AvgPool2d(4, stride=1),
    'global, as large as the map': nn.AvgPool2d(7),
    'global, of a video': nn.AvgPool3d((4, 7, 7), stride=1),
    'global, of a video, not overlapping': nn.AvgPool3d((4, 7, 7)),
    'of another norm': nn.LPPool2d(2, 2),
    'SoftPool': SoftPool2d(3, 2),
}

OBSTACLES = {
    'dilation': nn.MaxPool2d(2, dilation=2),
    'dilation, 1d': nn.MaxPool1d(2, dilation=2),
    'return_indices': nn.MaxPool2d(2, return_indices=True),
    'return_indices, 3d': nn.MaxPool3d(2, return_indices=True),
    'divisor_override': nn.AvgPool2d(2, divisor_override=3),
    'divisor_override, 3d': nn.AvgPool3d(2, divisor_override=3),
}


def input_for(pool):
    axes = next(ndim for ndim in POOLS if f'Pool{ndim}d' in type(pool).__name__)
    return torch.randn(2, 3, *(9, 14, 15)[-axes:])


class Net(nn.Sequential):
    """A network with pools of both kinds, at two depths."""

    def __init__(self):
        super().__init__(OrderedDict(
            conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), pool=nn.MaxPool2d(3, 2, 1),
            block=nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 4, 3), down=nn.AvgPool2d(2))),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))))


# Layers

@pytest.mark.parametrize(('pool', 'expected'), REPLACED, ids=map(str, (pool for pool, _ in REPLACED)))
def test_a_local_pool_becomes_soft_pool_with_its_geometry(pool, expected):
    model = swap_pooling(nn.Sequential(pool))
    assert type(model[0]) is type(expected)
    assert str(model[0]) == str(expected)
    input = input_for(pool)
    assert torch.equal(model(input), expected(input))
    assert model(input).shape == pool(input).shape


@pytest.mark.parametrize('pool', KEPT.values(), ids=KEPT)
def test_a_pool_that_is_no_local_one_stays(pool, log):
    model = swap_pooling(nn.Sequential(pool))
    assert model[0] is pool
    assert not log.records


@pytest.mark.parametrize('base', dict.fromkeys(type(pool) for pool, _ in REPLACED), ids=lambda base: base.__name__)
def test_a_subclass_of_a_pool_stays_for_only_its_author_knows_what_it_does(base):
    pool = type(f'Special{base.__name__}', (base,), {})(2, 2)
    input = input_for(pool)
    expected = pool(input)
    model = swap_pooling(nn.Sequential(pool))
    assert model[0] is pool
    assert torch.equal(model(input), expected)
    assert not soft_pools(model)


@pytest.mark.parametrize(('reason', 'pool'), [(key.split(',')[0], pool) for key, pool in OBSTACLES.items()],
                         ids=OBSTACLES)
def test_what_soft_pool_has_no_form_of_stays_and_is_named_in_a_warning(reason, pool, log):
    model = swap_pooling(nn.Sequential(OrderedDict(stem=nn.Sequential(OrderedDict(pool=pool)))))
    assert model.stem.pool is pool
    record, = log.records
    assert record.levelname == 'WARNING'
    assert 'stem.pool' in record.message
    assert type(pool).__name__ in record.message
    assert reason in record.message


def test_what_was_replaced_is_named_at_level_info(log):
    swap_pooling(Net())
    assert [(record.name, record.levelname) for record in log.records] == [('timm_softpool.swap', 'INFO')] * 2
    assert log.messages[0].startswith('pool: MaxPool2d(kernel_size=3')
    assert 'SoftPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))' in log.messages[0]
    assert log.messages[1].startswith('block.down: AvgPool2d(')


@pytest.mark.parametrize(('options', 'expected'), [
    (dict(), {'pool', 'block.down'}),
    (dict(pools=('max',)), {'pool'}),
    (dict(pools=['avg']), {'block.down'}),
    (dict(pools={'max', 'avg'}), {'pool', 'block.down'}),
    (dict(where=lambda name, module: name.startswith('block.')), {'block.down'}),
    (dict(where=lambda name, module: module.kernel_size == 3), {'pool'}),
    (dict(pools=('avg',), where=lambda name, module: name == 'pool'), set()),
], ids=str)
def test_pools_and_where_choose_what_is_replaced(options, expected):
    assert set(soft_pools(swap_pooling(Net(), **options))) == expected


def test_where_is_asked_about_local_pools_only():
    asked = []
    swap_pooling(Net(), where=lambda name, module: asked.append((name, type(module))))
    assert asked == [('pool', nn.MaxPool2d), ('block.down', nn.AvgPool2d)]


def test_a_pool_in_two_places_stays_one_pool_in_two_places(log):
    pool = nn.MaxPool2d(2)
    places = {'first': pool, 'list': nn.ModuleList([nn.ReLU(), pool]), 'other': nn.MaxPool2d(2)}
    model = swap_pooling(nn.ModuleDict(places))
    assert model['first'] is model['list'][1]
    assert model['first'] is not model['other']
    assert type(model['first']) is SoftPool2d
    assert len(log.messages) == 2


def test_a_pool_in_a_module_that_occurs_twice_is_replaced():
    block = nn.Sequential(nn.MaxPool2d(2))
    model = swap_pooling(nn.ModuleList([block, block]))
    assert type(model[0][0]) is SoftPool2d
    assert model[0] is block
    assert model[1] is block


@pytest.mark.parametrize(('pool', 'expected'), [
    (nn.MaxPool2d(3, 2), 'SoftPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(0, 0))'),
    (nn.AdaptiveAvgPool2d(1), 'AdaptiveAvgPool2d(output_size=1)'),
    (nn.MaxPool2d(2, dilation=2), 'MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=2, ceil_mode=False)'),
])
def test_a_model_that_is_itself_a_pool_comes_back_replaced_where_it_can_be(pool, expected):
    assert str(swap_pooling(pool)) == expected


# What stays

def test_the_model_itself_comes_back():
    model = Net()
    assert swap_pooling(model) is model


@pytest.mark.parametrize('training', [True, False])
def test_the_training_flag_of_a_pool_is_kept(training):
    model = Net()
    model.pool.train(training)
    assert swap_pooling(model).pool.training is training


@pytest.mark.parametrize('register', [nn.Module.register_forward_hook, nn.Module.register_forward_pre_hook])
def test_hooks_on_a_pool_are_still_called_and_can_still_be_removed(register):
    calls = []
    model = Net()
    handle = register(model.pool, lambda *_: calls.append('called'))
    swap_pooling(model)
    model(torch.rand(2, 3, 16, 16))
    handle.remove()
    model(torch.rand(2, 3, 16, 16))
    assert calls == ['called']


def test_names_of_tensors_stay_and_a_checkpoint_of_the_plain_model_loads():
    plain, model = Net(), swap_pooling(Net())
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.block.conv.weight, plain.block.conv.weight)


@pytest.mark.parametrize('create', [Net, lambda: timm.create_model('inception_v3', num_classes=2)],
                         ids=['layers', 'functions'])
def test_swapping_twice_changes_nothing_more(create, log):
    model = swap_pooling(create())
    before = [(name, module, type(module)) for name, module in model.named_modules()]
    assert log.records
    log.clear()
    swap_pooling(model)
    assert [(name, module, type(module)) for name, module in model.named_modules()] == before
    assert not log.records


# Whole networks

TIMM = {'resnet18': {}, 'resnet34d': {}, 'ghostnetv2_100': {}, 'inception_v3': {}, 'nest_tiny_jx': dict(img_size=96),
        'resnetv2_50x1_bit': {}, 'densenet121': {}, 'vovnet39a': {}}
TORCHVISION = {'googlenet': dict(aux_logits=False, init_weights=False), 'squeezenet1_1': {},
               'inception_v3': dict(aux_logits=False, init_weights=False), 'densenet121': {}, 'shufflenet_v2_x0_5': {}}
ZOO = {f'timm {name}': (timm.create_model, name, options) for name, options in TIMM.items()}
ZOO |= {f'torchvision {name}': (torchvision.models.get_model, name, options) for name, options in TORCHVISION.items()}


@pytest.mark.parametrize(('create', 'name', 'options'), ZOO.values(), ids=ZOO)
@torch.no_grad()
def test_a_network_computes_what_it_would_with_every_pool_changed_by_hand(create, name, options, monkeypatch):
    model = create(name, num_classes=3, **options).eval()
    input = torch.rand(1, 3, 96, 96)
    plain, expected = model(input), by_hand(model, input, monkeypatch)
    actual = swap_pooling(model)(input)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, plain)
    assert actual.shape == plain.shape


@torch.no_grad()
def test_a_video_network_pools_softly_in_space_and_keeps_its_head(monkeypatch):
    model = nn.Sequential(OrderedDict(
        stem=nn.Conv3d(3, 4, 3, padding=1), pool=nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        down=nn.AvgPool3d((2, 2, 2)), head=nn.AvgPool3d((4, 7, 7), stride=1))).eval()
    head = model.head
    clip = torch.rand(1, 3, 8, 28, 28)
    expected = head(by_hand(model[:3], clip, monkeypatch))
    swap_pooling(model)
    assert model.head is head
    assert set(soft_pools(model)) == {'pool', 'down'}
    torch.testing.assert_close(model(clip), expected)


# Bad arguments

@pytest.mark.parametrize(('arguments', 'options', 'error', 'message'), [
    (('resnet18',), {}, TypeError, 'model must be a torch.nn.Module, got str'),
    ((Net,), {}, TypeError, 'model must be a torch.nn.Module, got type'),
    ((Net(),), dict(pools='max'), ValueError, "pools must be .*, got 'max'"),
    ((Net(),), dict(pools=()), ValueError, r'pools must be .*, got \(\)'),
    ((Net(),), dict(pools=('max', 'min')), ValueError, r"pools must be .*, got \('max', 'min'\)"),
    ((Net(),), dict(pools=None), ValueError, 'pools must be .*, got None'),
    ((Net(),), dict(pools=2), (TypeError, ValueError), 'pools must be .*, got 2'),
    ((Net(),), dict(where='layer1'), TypeError, "where must be .*'layer1'"),
    ((Net(), ('max',)), {}, TypeError, 'positional'),
], ids=['a name', 'a class', 'a string', 'no kind', 'an unknown kind', 'None', 'a number', 'where', 'positional'])
def test_a_bad_argument_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        swap_pooling(*arguments, **options)


@pytest.mark.parametrize('options', [dict(pools='max'), dict(where='layer1')], ids=str)
def test_a_bad_argument_leaves_the_model_as_it_was(options):
    model = Net()
    with pytest.raises((TypeError, ValueError)):
        swap_pooling(model, **options)
    assert not soft_pools(model)
