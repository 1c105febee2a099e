"""The command ``timm-softpool``, as its user sees it; predict, explain and train have files of their own."""
import re
from types import SimpleNamespace

import pytest
import timm
import torch

from timm_softpool import cli, list_models
from timm_softpool.cli import class_names, main
from timm_softpool.pretrained import PUBLISHED

# models

def test_models_lists_each_model_once_with_the_tags_of_its_weights(command):
    lines = command('models')
    assert [line.split()[0] for line in lines] == list_models()
    line, = [line for line in lines if line.startswith('densenet169_softpool')]
    assert line == 'densenet169_softpool  (stergiou_in1k)'
    assert 'inception_v3_softpool' in lines


@pytest.mark.parametrize('pattern', ['vgg*', 'resnet18_softpool', '*net1?_*'])
def test_models_takes_a_wildcard(pattern, command):
    assert [line.split()[0] for line in command('models', pattern)] == list_models(pattern)


@pytest.mark.parametrize(('pattern', 'nearest'), [('resnet81_softpool', 'resnet18_softpool'), ('xyzzy*', None)])
def test_models_says_that_nothing_matches_and_what_is_near(pattern, nearest, failure):
    message = failure('models', pattern)
    assert f'no model matches {pattern!r}' in message
    assert ('did you mean' in message) == bool(nearest)
    assert (nearest or '') in message


# info

def test_info_tells_the_size_the_cost_the_pools_and_the_weights(command):
    lines = command('info', 'resnet50_softpool.stergiou_in1k')
    assert lines[0].startswith('resnet50_softpool.stergiou_in1k: 25.56 M parameters, ')
    assert re.search(r'\d\.\d+ GMAC at 3x299x299 ', lines[0])
    assert lines[1:3] == ['SoftPool in 1 place:',
                          '  maxpool: SoftPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0))']
    assert lines[3] == 'Weights:'
    assert lines[4].startswith('  resnet50_softpool.tiny_in200: top1 ')
    assert lines[5:] == ['  resnet50_softpool.stergiou_in1k: not measured here; licence: not stated by the authors']


def test_info_counts_what_fvcore_counts(command):
    flop_count = pytest.importorskip('fvcore.nn', reason="needs the extra 'video'").FlopCountAnalysis
    model = timm.create_model('test_resnet_softpool').eval()
    size = model.pretrained_cfg['input_size']
    analysis = flop_count(model, torch.zeros(1, *size)).unsupported_ops_warnings(False)
    counted = analysis.by_operator()
    macs = sum(counted[name] for name in ('conv', 'linear', 'soft_pool'))
    assert cli.count_macs(model, size) == macs
    assert f' {macs / 1e9:.3f} GMAC at ' in command('info', 'test_resnet_softpool')[0]


@pytest.mark.parametrize(('name', 'kinds'), [
    ('test_resnet_softpool', {'SoftPool2d'}), ('inception_v3_softpool', {'SoftPool2d', 'functional'}),
    ('nest_tiny_jx_softpool', {'SoftPool2dSame'}), ('nextvit_small_softpool', {'SoftPool1d', 'SoftPool2d'})])
def test_info_names_each_pool_and_its_kind(name, kinds, command):
    lines = command('info', name)
    pools = [re.fullmatch(r'  ([\w.]+): (\w+).*', line) for line in lines[2:-1]]
    assert lines[1] == f'SoftPool in {len(pools)} places:'
    assert {pool[2] for pool in pools} == kinds
    assert lines[-1] == 'Weights: none published by timm-softpool'


def test_info_shows_what_was_measured(command, monkeypatch):
    entry = {'file': 'x', 'license': 'MIT', 'metrics': {'top1': 61.2, 'top5': 83.4}}
    monkeypatch.setitem(PUBLISHED, 'test_resnet_softpool.unit', entry)
    last = command('info', 'test_resnet_softpool')[-1]
    assert last == '  test_resnet_softpool.unit: top1 61.2, top5 83.4; licence: MIT'


@pytest.mark.parametrize(('name', 'message'), [
    ('resnet19_softpool', "unknown model 'resnet19_softpool'; did you mean resnet1"),
    ('resnet18_softpol', "unknown model 'resnet18_softpol'; did you mean resnet18_softpool or "),
    ('xyzzy', "unknown model 'xyzzy'\n"),
    ('resnet18_softpool.nobody', 'resnet18_softpool.nobody: Invalid pretrained tag (nobody)'),
    ('local-dir:/nowhere', 'nowhere'),
    ('https://example.org', 'https'),
    ('somebody/resnet18', 'somebody/resnet18'),
])
def test_info_of_a_model_that_is_not_there_is_a_clear_error(name, message, failure):
    assert message in failure('info', name)


@pytest.mark.usefixtures('networks_for_clips')
def test_info_of_a_network_for_clips_counts_a_whole_clip(command):
    assert ' GMAC at 3x16x224x224 ' in command('info', 'mtnet_xs_g8')[0]


# Names of classes

@pytest.mark.parametrize(('cfg', 'count', 'index', 'name'), [
    ({}, 1000, 3, 'tiger shark'),
    ({}, 3, 2, 'class 2'),
    ({'label_names': ['n01443537', 'n01629819']}, 2, 0, 'goldfish'),
    ({'label_names': ('cat', 'dog')}, 2, 1, 'dog'),
    ({'label_names': ('cat', 'dog')}, 3, 1, 'class 1'),
], ids=['ImageNet', 'unknown', 'labels of ImageNet', 'own labels', 'labels of other classes'])
def test_class_names_are_readable(cfg, count, index, name):
    names = class_names(SimpleNamespace(pretrained_cfg=cfg, num_classes=count))
    assert len(names) == count
    assert names[index].startswith(name)


# The command line itself

@pytest.mark.parametrize('arguments', [[], ['predict'], ['info'], ['train'], ['predict', '--topk', 'many', 'x.png']],
                         ids=' '.join)
def test_a_command_line_that_is_none_shows_the_usage(arguments, failure):
    assert failure(*arguments).startswith('usage: timm-softpool')


@pytest.mark.parametrize('arguments', [['--help'], ['models', '--help'], ['info', '--help'], ['predict', '--help']],
                         ids=' '.join)
def test_help_succeeds(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 0
    assert 'usage: timm-softpool' in capsys.readouterr().out
