"""Every video network, as PyTorchVideo, timm, torch.hub, hydra and the FLOP counters use it."""
import copy
import importlib
import inspect
import io
import json
import logging
import subprocess
import sys
from importlib.resources import files

import pytest
import timm
import torch
import yaml
from fvcore.nn import FlopCountAnalysis
from pytorchvideo.models import hub as pytorchvideo_hub
from pytorchvideo.models.net import Net
from timm.models import save_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import video_plugins
from timm_softpool import SoftPool3d
from video_plugins import create_fast_resnet, create_srtg_resnet, hub, list_models
from video_plugins.models.resnet import PLACEMENTS

NAMES = list_models()
# One network of each kind; all others have the same modules, more often. Some are made of fewer for speed.
SMALL = ['fast_r3d_18', 'fast_r3d_18_parallel', 'fast_densenet121_parallel', 'mtnet_xs', 'mtnet_xs_g8', 'r2plus1d_18',
         'srtg_r3d_18']
SHALLOW = {'fast_densenet121_parallel': dict(depths=(2, 2, 2, 2)), 'mtnet_xs': dict(depths=(1, 2, 1, 1)),
           'mtnet_xs_g8': dict(depths=(1, 2, 1, 1))}
# Parameters (M) with 400 classes and multiply-accumulates (G) at 16 x 224 x 224 of the authors' networks, in which
# fvcore counts 2 for each element of a BatchNorm and 5 of a GroupNorm.
MEASURED = {
    'r3d_18': (33.37, 25.35), 'r3d_34': (63.68, 42.70), 'r3d_50': (36.73, 26.54), 'r3d_101': (69.06, 39.22),
    'r2plus1d_34': (61.83, 40.42), 'r2plus1d_50': (34.86, 24.96), 'r2plus1d_101': (67.22, 37.64),
    'srtg_r3d_34': (83.86, 42.73), 'srtg_r3d_50': (56.91, 26.57), 'srtg_r3d_101': (107.14, 39.29),
    'srtg_r2plus1d_34': (82.01, 40.45), 'srtg_r2plus1d_50': (55.04, 24.99), 'srtg_r2plus1d_101': (105.29, 37.71),
    'mtnet_xs': (21.84, 15.97), 'mtnet_s': (39.98, 18.60), 'mtnet_m': (44.04, 25.38), 'mtnet_l': (88.13, 38.15),
    'mtnet_xl': (124.45, 53.94), 'mtnet_xxl': (134.85, 78.01), 'mtnet_xs_g8': (7.43, 6.07), 'mtnet_s_g8': (12.21, 6.13),
    'mtnet_m_g8': (13.28, 6.32), 'mtnet_l_g8': (24.88, 6.65),
}
# The same of the reconstructions with 101 classes at 16 x 112 x 112: depth, parallel, fuse.
FAST_MEASURED = {(18, False, 'sum'): (36.3, 6.76), (18, True, 'sum'): (36.3, 6.75), (18, True, 'cat'): (23.8, 4.98),
                 (34, False, 'sum'): (66.7, 11.15), (34, True, 'cat'): (44.0, 7.91), (50, False, 'sum'): (36.6, 6.94),
                 (50, True, 'cat'): (25.3, 5.32)}
# What a count of multiply-accumulates leaves out: elementwise operations, means and other pools.
NOT_COUNTED = {f'aten::{name}' for name in (
    'add', 'mul', 'sub', 'div', 'mean', 'square', 'avg_pool3d', 'max_pool3d', 'cosine_similarity', 'sort', 'topk',
    'upsample_trilinear3d')}
every_name = pytest.mark.parametrize('name', NAMES)
small = pytest.mark.parametrize('name', SMALL)


def create(name, **options):
    """A network that has shapes but no values."""
    return video_plugins.create_model(name, device='meta', **options).eval()


def create_small(name, **options):
    return video_plugins.create_model(name, **SHALLOW.get(name, {}), **options).eval()


def clip(frames=4, size=32, batch=1, device='cpu'):
    return torch.randn(batch, 3, frames, size, size, device=device)


def size_and_cost(model, *shape):
    norms = []
    for module in model.modules():
        if cost := {nn.BatchNorm3d: 2, nn.GroupNorm: 5}.get(type(module)):
            module.register_forward_hook(lambda module, _, output, cost=cost: norms.append(cost * output.numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, *shape, device='meta'))
    macs = counter.get_total_flops() / 2 + sum(norms)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6, macs / 1e9


# Structure

def test_the_names_are_those_of_the_plan():
    sizes = [f'mtnet_{size}{form}' for size in ('xs', 's', 'm', 'l', 'xl', 'xxl') for form in ('', '_g8')]
    resnets = [f'{kind}_{depth}' for kind in ('r3d', 'srtg_r3d', 'r2plus1d', 'srtg_r2plus1d')
               for depth in (18, 34, 50, 101)]
    fast = [f'fast_{kind}{form}' for kind in ('r3d_18', 'r3d_34', 'r3d_50', 'densenet121')
            for form in ('', '_parallel')]
    narrow = [f'{name}_w16' for name in ('fast_r3d_18', 'mtnet_xs', 'mtnet_xs_g8', 'r2plus1d_18', 'r3d_18',
                                         'srtg_r3d_18')]
    plain = [name for name in (*sizes, *resnets, *narrow) if name.startswith(('r3d', 'r2plus1d', 'mtnet'))]
    regularised = [f'{name}_classreg' for name in (*plain, 'slow_r50', 'csn_r101', 'x3d_xs', 'x3d_s', 'x3d_m', 'x3d_l')]
    assert NAMES == sorted(sizes + resnets + fast + narrow + regularised)
    assert list_models('mtnet_x?_g8') == ['mtnet_xl_g8', 'mtnet_xs_g8']


@every_name
def test_a_network_is_a_net_whose_classifier_can_be_replaced_and_left_out_in_the_ways_of_both_zoos(name):
    model, input = create(name, num_classes=7), clip(1, 33, 2, 'meta')
    assert isinstance(model, Net)
    assert len(model.blocks) == 6
    features = model.forward_features(input)
    assert model.forward_head(features).shape == (2, 7)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    head = model.blocks[-1]
    head.proj = nn.Linear(head.proj.in_features, 5, device='meta')
    assert head(features).shape == (2, 5)
    head.proj = None
    assert head(features).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert model.get_classifier().out_features == model.num_classes == 3
    assert head(features).shape == (2, 3)
    with pytest.raises(RuntimeError):
        model(torch.empty(1, 4, 1, 32, 32, device='meta'))


@small
@torch.no_grad()
def test_clips_may_have_any_length_and_any_size_of_32_pixels_and_more(name):
    model = create_small(name, num_classes=0)
    for frames, size in ((1, 32), (2, 40), (3, 33)):
        assert model(clip(frames, size)).shape == (1, model.num_features)


@small
def test_norm_activation_and_pool_are_the_ones_asked_for(name):
    kinds = {type(module) for module in create(name, norm=nn.InstanceNorm3d, activation=nn.SiLU, pool='soft').modules()}
    assert not kinds & {nn.BatchNorm3d, nn.ReLU, nn.MaxPool3d}
    assert kinds >= {nn.InstanceNorm3d, nn.SiLU, SoftPool3d}


@pytest.mark.parametrize('name', MEASURED)
def test_size_and_cost_are_those_of_the_author_s_network(name):
    parameters, macs = size_and_cost(create(name, num_classes=400), 16, 224, 224)
    assert (parameters, macs) == pytest.approx(MEASURED[name], rel=0.01)


@pytest.mark.parametrize(('depth', 'parallel', 'fuse'), FAST_MEASURED)
def test_size_and_cost_are_those_measured_for_the_reconstruction(depth, parallel, fuse):
    with torch.device('meta'):
        model = create_fast_resnet(model_depth=depth, parallel=parallel, fuse=fuse, model_num_class=101).eval()
    parameters, macs = size_and_cost(model, 16, 112, 112)
    assert (parameters, macs) == pytest.approx(FAST_MEASURED[depth, parallel, fuse], rel=0.01)


@pytest.mark.parametrize('name', list_models('*_w16'))
def test_a_narrow_network_is_a_quarter_as_wide_as_its_model_and_else_the_same(name):
    narrow, model = create(name), create(name.removesuffix('_w16'))
    assert list(narrow.state_dict()) == list(model.state_dict())
    assert narrow.num_features == model.num_features / 4 == 128
    assert (narrow.pretrained_cfg['num_frames'], narrow.pretrained_cfg['input_size']) == (8, (3, 64, 64))


def test_a_simple_block_has_no_place_behind_its_first_of_three_convolutions():
    with pytest.raises(ValueError, match="'top' needs bottlenecks"):
        create_srtg_resnet(model_depth=18, placement='top')


@pytest.mark.parametrize(('placement', 'depth'),
                         [(place, 50 if place == 'top' else 18) for place in PLACEMENTS])
def test_a_recursion_can_stand_in_each_of_the_places(placement, depth):
    model = create_srtg_resnet(model_depth=depth, placement=placement, model_num_class=3)
    model(clip(2, 32, 2)).sum().backward()
    recursions = [block.recursion for stage in model.blocks[1:-1] for block in stage]
    assert all(weight.grad.isfinite().all() for recursion in recursions for weight in recursion.parameters())
    assert any(weight.grad.any() for recursion in recursions for weight in recursion.parameters())


@pytest.mark.parametrize(('options', 'message'), [
    (dict(model_depth=19), r'model_depth must be one of 18, 34, 50, 101, got 19'),
    (dict(convolution='4d'), "convolution must be one of '3d', '2plus1d', got '4d'"),
    (dict(placement='skip'), "placement must be one of None, 'start'.*got 'skip'"),
    (dict(pool='avg'), "pool must be 'max' or 'soft', got 'avg'"),
    (dict(widths=(16, 32, 64)), r'widths must be 4 positive numbers of channels, got \(16, 32, 64\)'),
    (dict(gate='xor'), "gate must be None, 'or' or 'and', got 'xor'"),
], ids=str)
def test_a_builder_says_what_it_takes(options, message):
    with pytest.raises(ValueError, match=message):
        create_srtg_resnet(**options)


# Use

@small
def test_logits_train_every_parameter(name):
    model = create_small(name, num_classes=5).train()
    logits = model(clip(4, 64, 2))
    nn.functional.cross_entropy(logits, torch.tensor([1, 3])).backward()
    assert not [n for n, parameter in model.named_parameters()
                if parameter.grad is None or not parameter.grad.isfinite().all()]


@small
@torch.no_grad()
def test_a_network_comes_back_from_its_state_a_copy_and_a_file(name):
    model, input = create_small(name, num_classes=5), clip()
    expected = model(input)
    assert not torch.allclose(expected.sum(1), torch.ones(1))  # no probabilities
    fresh = create_small(name, num_classes=5)
    fresh.load_state_dict(model.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    again = copy.deepcopy(model)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (fresh, again):
        assert type(other) is type(model)
        assert torch.equal(other(input), expected)


@small
@torch.no_grad()
def test_compiled_exported_and_traced_networks_give_the_same_logits(name):
    model, input = create_small(name, num_classes=5), clip()
    expected = model(input)
    torch.compiler.reset()
    for other in (torch.compile(model, fullgraph=True, backend='eager'), torch.export.export(model, (input,)).module(),
                  torch.jit.trace(model, input, check_trace=False)):
        torch.testing.assert_close(other(input), expected)


@small
def test_autocast_trains_in_bfloat16(name):
    model = create_small(name, num_classes=5).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits = model(clip(4, 64, 2))
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    # PyTorch 2.14 on a CPU gives NaN as bfloat16 gradients of weights of plain convolutions in time over two frames.
    in_time = {f'{n}.weight' for n, conv in model.named_modules()
               if isinstance(conv, nn.Conv3d) and conv.kernel_size[0] > 1}
    assert not [n for n, parameter in model.named_parameters()
                if parameter.grad is None or n not in in_time and not parameter.grad.isfinite().all()]


@pytest.mark.parametrize('gate', ['or', 'and'])
def test_a_gated_network_compiles_whole_and_uses_all_parameters(gate):
    torch.compiler.reset()
    model = create_srtg_resnet(model_depth=18, gate=gate, model_num_class=3)
    compiled = torch.compile(model, fullgraph=True, backend='eager')
    compiled(clip(2, 32, 2)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(('name', 'options'), [('mtnet_xs_w16', {}), ('srtg_r3d_18_w16', dict(gate='or')),
                                               ('fast_r3d_18_w16', {})])
def test_two_processes_train_as_one(name, options, tmp_path):
    subprocess.run([sys.executable, '-W', 'ignore', '-c', f'''
import torch, torch.distributed as dist, torch.multiprocessing as mp, video_plugins
from torch.nn.parallel import DistributedDataParallel

def make():  # without norms, which see the batch of their process alone
    torch.manual_seed(0)
    return video_plugins.create_model({name!r}, num_classes=3, norm=lambda num_features, **_: torch.nn.Identity(),
                                      **{options!r}).double()

def work(rank):
    torch.manual_seed(1)
    clips, alone = torch.randn(4, 3, 4, 32, 32, dtype=torch.double), make()
    alone(clips).square().mean().backward()
    dist.init_process_group('gloo', init_method='file://{tmp_path}/rendezvous', rank=rank, world_size=2)
    model = DistributedDataParallel(make())
    for _ in range(2):
        model.zero_grad()
        model(clips[rank::2]).square().mean().backward()
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(model.module.get_parameter(name).grad, parameter.grad, msg=name)
    dist.destroy_process_group()

mp.start_processes(work, nprocs=2, start_method='fork')
'''], check=True)


# Registries

@every_name
def test_every_registry_has_the_same_entry_point(name):
    entry_point = video_plugins.VIDEO_MODELS.get(name)
    assert entry_point is timm.models.model_entrypoint(name) is getattr(pytorchvideo_hub, name)
    parameters = inspect.signature(entry_point).parameters
    assert {key: value.default for key, value in list(parameters.items())[:2]} == dict(pretrained=False, progress=True)
    assert parameters['kwargs'].kind is inspect.Parameter.VAR_KEYWORD


def test_the_configuration_tells_the_geometry_of_the_clip():
    cfg = timm.create_model('mtnet_s', num_classes=3, device='meta').pretrained_cfg
    assert (cfg['num_frames'], cfg['frame_stride'], cfg['input_size']) == (16, 2, (3, 256, 256))
    assert cfg['mean'] == pytest.approx((124 / 255, 117 / 255, 104 / 255))
    assert cfg['std'] == pytest.approx((0.2348,) * 3, abs=1e-4)


@pytest.mark.parametrize('options', [dict(num_classes=3, in_chans=1), dict(model_num_class=3, input_channel=1)],
                         ids=str)
def test_arguments_may_have_the_names_of_either_zoo(options):
    assert create('r3d_18', **options)(torch.empty(1, 1, 2, 32, 32, device='meta')).shape == (1, 3)


@torch.no_grad()
def test_a_saved_network_comes_back_from_its_folder(tmp_path):
    model, input = timm.create_model('r3d_18', num_classes=3).eval(), clip()
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(input), model(input))
    assert again.pretrained_cfg['num_frames'] == 16


def test_registering_again_changes_nothing():
    before = {name: timm.models.model_entrypoint(name) for name in NAMES}
    hub.register()
    assert before == {name: timm.models.model_entrypoint(name) for name in NAMES}
    assert list_models() == NAMES


@pytest.mark.parametrize('place', ['timm', 'pytorchvideo.models.hub'])
def test_a_name_that_another_package_has_is_never_taken(place, monkeypatch):
    def foreign(pretrained=False):
        return None

    if place == 'timm':
        monkeypatch.setitem(timm.models._registry._model_entrypoints, 'r3d_18', foreign)
    else:
        monkeypatch.setattr(pytorchvideo_hub, 'r3d_18', foreign)
    with pytest.raises(RuntimeError, match=f'cannot register the model r3d_18: {place} has that name from {__name__}'):
        hub.register()


@pytest.mark.parametrize(('call', 'error', 'message'), [
    (lambda: video_plugins.create_model('r3d_19'), ValueError, "list_models.*got 'r3d_19'"),
    (lambda: create('r3d_18', colour='red'), TypeError, 'colour'),
    (lambda: create('r3d_18', features_only=True), TypeError, 'r3d_18 has no features_only'),
    (lambda: create('r3d_18', pretrained=True), RuntimeError, 'No pretrained weights exist for r3d_18'),
    (lambda: create('mtnet_s', pretrained=True, in_chans=1), ValueError, 'in_chans must be 3 for the weights'),
])
def test_what_cannot_be_made_is_a_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize('path', sorted(files('video_plugins.conf').joinpath('module/model').iterdir()),
                         ids=lambda path: path.name)
def test_a_configuration_of_hydra_makes_its_network(path):
    config = yaml.safe_load(path.read_text())
    module, _, name = config['_target_'].rpartition('.')
    by_hand = getattr(importlib.import_module(module), name)(
        **{key: value for key, value in config.items() if key != '_target_'})
    hydra = pytest.importorskip('hydra.utils')
    model = hydra.instantiate(config, model_num_class=3, _convert_='all').eval()
    assert model(clip(2)).shape == (1, 3)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in by_hand.named_parameters()]


# FLOPs

@small
def test_fvcore_counts_what_costs_and_twice_as_much_for_two_clips(name, caplog):
    model = create_small(name, pool='soft')
    with caplog.at_level(logging.ERROR):
        one, two = (FlopCountAnalysis(model, clip(batch=batch)) for batch in (1, 2))
        assert two.total() == 2 * one.total()
    assert set(one.unsupported_ops()) <= NOT_COUNTED
    counted = one.by_operator()
    assert counted['soft_pool']
    assert bool(counted['lstm'] + counted['gru']) == ('srtg' in name or 'mtnet' in name)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(clip())
    norms = sum(count for operator, count in counted.items() if 'norm' in operator)
    assert counter.get_total_flops() == 2 * (one.total() - norms)


def test_a_program_that_only_imports_us_has_recursions_counted():
    process = subprocess.run([sys.executable, '-W', 'ignore', '-c', '''
import json, torch, video_plugins
from fvcore.nn import FlopCountAnalysis
model = torch.nn.Sequential(torch.nn.Conv3d(3, 4, 1), video_plugins.SqueezeRecursion(4), torch.nn.Flatten(2))
print(json.dumps(FlopCountAnalysis(model, torch.zeros(2, 3, 5, 6, 7)).total()))
'''], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    # The convolution, then two layers of four gates of two 4 x 4 matrices for each of 5 frames of 2 clips.
    assert json.loads(process.stdout.splitlines()[-1]) == 2 * 5 * (6 * 7 * 3 * 4 + 2 * 4 * 2 * 4 * 4)


# Without PyTorchVideo

def test_without_pytorchvideo_the_error_names_the_extra():
    process = subprocess.run([sys.executable, '-W', 'ignore', '-c', '''
import sys
sys.modules['pytorchvideo'] = None
import timm_softpool
assert not {'fvcore', 'video_plugins'} & set(sys.modules)
import video_plugins
'''], capture_output=True, text=True)
    assert "pip install 'timm-softpool[video]'" in process.stderr
