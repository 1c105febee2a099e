"""What SoftPool costs, as fvcore (in MAC) and torch.utils.flop_counter (in FLOP, two for each MAC) count it."""
import json
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_softpool import SoftPool1d, SoftPool2d, SoftPool2dSame, SoftPool3d, flops, soft_pool2d, swap_pooling

# A pool, its input, and its MAC: for each output 3 for each cell of the window, and 1.
COSTS = {
    '1d': (SoftPool1d(2), (2, 3, 8), 2 * 3 * 4 * 7),
    '2d': (SoftPool2d(2), (2, 3, 8, 6), 2 * 3 * 4 * 3 * 13),
    '2d, unbatched': (SoftPool2d(2), (3, 8, 6), 3 * 4 * 3 * 13),
    '2d, overlap and padding': (SoftPool2d(3, 2, 1), (1, 4, 8, 8), 4 * 4 * 4 * 28),
    '2d, another height than width': (SoftPool2d((1, 3)), (1, 4, 6, 6), 4 * 6 * 2 * 10),
    '2d, ceil_mode': (SoftPool2d(2, ceil_mode=True), (1, 4, 7, 7), 4 * 4 * 4 * 13),
    '2d, same': (SoftPool2dSame(3, 2), (1, 4, 7, 7), 4 * 4 * 4 * 28),
    '3d': (SoftPool3d((1, 2, 2)), (1, 2, 3, 4, 4), 2 * 3 * 2 * 2 * 13),
}
every_pool = pytest.mark.parametrize(('pool', 'shape', 'macs'), COSTS.values(), ids=COSTS)

MODEL = "model = timm_softpool.swap_pooling(timm.create_model('resnet18').eval())"
IMPORT_ORDERS = {
    'timm_softpool, a model, fvcore': ('import timm, timm_softpool', MODEL, 'from fvcore.nn import FlopCountAnalysis'),
    'fvcore, timm_softpool, a model': ('from fvcore.nn import FlopCountAnalysis', 'import timm, timm_softpool', MODEL),
}
COUNT = '''
import json, logging, torch
logging.disable()
plain = FlopCountAnalysis(timm.create_model('resnet18').eval(), torch.zeros(1, 3, 64, 64))
analysis = FlopCountAnalysis(model, torch.zeros(1, 3, 64, 64))
print(json.dumps([plain.total(), analysis.total(), analysis.by_operator(), analysis.unsupported_ops()]))
'''


def run(program):
    """What ``program``, in an interpreter of its own, prints as JSON on its last line."""
    process = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


# fvcore

@pytest.mark.parametrize('statements', IMPORT_ORDERS.values(), ids=IMPORT_ORDERS)
def test_a_program_that_only_imports_us_has_soft_pool_counted_by_fvcore(statements):
    plain, total, by_operator, unsupported = run('\n'.join([*statements, COUNT]))
    stem = 64 * 16 * 16 * (3 * 9 + 1)
    assert by_operator['soft_pool'] == stem
    assert total == plain + stem
    assert not [name for name in unsupported if not name.startswith('aten::add')]


@every_pool
def test_fvcore_counts_the_multiply_accumulates_of_every_form(pool, shape, macs):
    flop_count = pytest.importorskip('fvcore.nn').FlopCountAnalysis
    analysis = flop_count(nn.Sequential(pool), torch.zeros(shape))
    assert analysis.by_operator() == {'soft_pool': macs}
    assert analysis.by_module()['0'] == macs


def test_a_handle_of_the_user_counts_instead_of_ours():
    flop_count = pytest.importorskip('fvcore.nn').FlopCountAnalysis
    analysis = flop_count(SoftPool2d(), torch.zeros(1, 3, 8, 8))
    analysis.set_op_handle('timm_softpool::soft_pool', lambda inputs, outputs: 5)
    assert analysis.total() == 5


def test_a_handle_that_was_there_before_ours_stays():
    flop_count = ModuleType('fvcore.nn.flop_count')
    theirs = {'timm_softpool::soft_pool': len, 'aten::lstm': len}
    flop_count._DEFAULT_SUPPORTED_OPS = dict(theirs)
    flops._teach_fvcore(flop_count)
    ours = {name: flop_count._DEFAULT_SUPPORTED_OPS.pop(name)
            for name in ('aten::gru', 'aten::rnn_tanh', 'aten::rnn_relu')}
    assert flop_count._DEFAULT_SUPPORTED_OPS == theirs
    assert len not in ours.values()


def test_fvcore_still_keeps_its_handles_where_we_put_ours():
    flop_count = pytest.importorskip('fvcore.nn.flop_count')
    assert 'timm_softpool::soft_pool' in flop_count._DEFAULT_SUPPORTED_OPS


def test_an_fvcore_without_that_place_is_warned_of():
    with pytest.warns(UserWarning, match='does not know this fvcore.*_DEFAULT_SUPPORTED_OPS'):
        flops._teach_fvcore(ModuleType('fvcore.nn.flop_count'))


# torch.utils.flop_counter

@every_pool
@torch.no_grad()
def test_flop_counter_counts_two_flop_for_each_multiply_accumulate(pool, shape, macs):
    with FlopCounterMode(display=False) as counter:
        pool(torch.zeros(shape))
    assert counter.get_flop_counts()['Global'] == {torch.ops.timm_softpool.soft_pool: 2 * macs}


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_the_backward_pass_costs_five_for_each_cell_and_one(device):
    input = torch.zeros(2, 3, 8, 8, device=device, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        soft_pool2d(input, 3, 2, 1).sum().backward()
    outputs = 2 * 3 * 4 * 4
    assert counter.get_flop_counts()['Global'] == {
        torch.ops.timm_softpool.soft_pool: 2 * outputs * (3 * 9 + 1),
        torch.ops.timm_softpool.soft_pool_backward: 2 * outputs * (5 * 9 + 1)}


@torch.no_grad()
def test_both_counters_agree_on_a_network():
    flop_count = pytest.importorskip('fvcore.nn').FlopCountAnalysis
    model = swap_pooling(nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2), nn.Conv2d(4, 4, 3), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(5)))
    input = torch.zeros(1, 3, 16, 16)
    model(input)
    with FlopCounterMode(display=False) as counter:
        model(input)
    analysis = flop_count(model, input)
    assert counter.get_total_flops() == 2 * analysis.total()
    assert counter.get_flop_counts()['Sequential.1'] == {
        torch.ops.timm_softpool.soft_pool: 2 * analysis.by_module()['1']}


@pytest.mark.parametrize(('count', 'macs'), [(flops.forward_macs, 10 * (3 * 6 + 1)),
                                             (flops.backward_macs, 10 * (5 * 6 + 1))], ids=['forward', 'backward'])
def test_the_formulas_take_the_number_of_outputs_and_the_window(count, macs):
    assert count(10, (2, 3)) == macs
    assert count(0, (2, 3)) == 0


# Imports

@pytest.fixture
def lesson(tmp_path, monkeypatch):
    """What is noted about ``taught_module`` right after it has been imported."""
    (tmp_path / 'taught_module.py').write_text('value = 3\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'taught_module', raising=False)
    notes = []
    finder = flops._AfterImport('taught_module', lambda module: notes.append(module.value))
    monkeypatch.setattr(sys, 'meta_path', [finder, *sys.meta_path])
    return notes


def test_a_counter_is_taught_once_right_after_it_was_imported(lesson):
    assert lesson == []
    for _ in range(2):
        __import__('taught_module')
        assert lesson == [3]


def test_a_look_for_a_counter_does_not_spend_the_lesson(lesson):
    assert find_spec('taught_module') is not None
    assert lesson == []
    __import__('taught_module')
    assert lesson == [3]


def test_importing_us_imports_nothing_optional_that_timm_does_not():
    before, ours = run('''
import json, sys
import timm
before = set(sys.modules)
import timm_softpool
print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))
''')
    optional = {'fvcore', 'iopath', 'matplotlib', 'pytorchvideo', 'pyarrow', 'skimage', 'onnx', 'tqdm', 'IPython',
                'timm_softpool.cli', 'torch.utils.flop_counter'}
    assert 'timm' in before
    assert 'timm_softpool.swap' in ours
    assert not {name for name in ours if name in optional or name.split('.')[0] in optional}
