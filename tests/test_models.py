"""The registered models: their names, what timm can do with them, and how they come and go."""
import copy
import importlib
import json
import shutil
import sys
from collections import Counter
from types import ModuleType

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_softpool import SoftPool2d, list_models, soft_pools, swap_pooling
from timm_softpool.models import classreg_twins, softpool_paper, softpool_twins
from timm_softpool.models.twin import SOFTPOOL, register_twins

SUFFIX = SOFTPOOL.suffix
NAMES = list_models(f'*{SUFFIX}')
PAPER = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d', 'resnext101_32x4d',
         'wide_resnet50_2', 'densenet121', 'densenet161', 'densenet169')
FEATURE_CLASSES = ('list', 'dict', 'hook', 'fx', 'getter')


def create(name, **options):
    """A model that has shapes but no values, which is all that a look at its structure needs."""
    return timm.create_model(name, device='meta', **options).eval()


class PoolCount(TorchDispatchMode):
    """Counts the kinds of local pools that are computed."""

    def __init__(self):
        super().__init__()
        self.kinds = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.kinds.update(kind for kind in ('soft', 'max', 'avg') if name.startswith(f'{kind}_pool'))
        return func(*args, **(kwargs or {}))


def run(model, *shape):
    """What ``model`` makes of images of ``shape``, and the number of pools of each kind on the way."""
    with PoolCount() as pools, torch.no_grad():
        return model(torch.empty(shape, device='meta')), dict(pools.kinds)


# Names

def test_there_are_many_models_of_many_families():
    plain = {name.removesuffix(SUFFIX) for name in NAMES}
    families = [module for module in timm.list_modules() if plain.intersection(timm.list_models(module=module))]
    assert len(NAMES) >= 200
    assert len(families) >= 25


@pytest.mark.parametrize('name', [f'{name}{SUFFIX}' for name in (*PAPER, 'resnet34d', 'inception_v3', 'vgg11')])
def test_the_best_known_architectures_are_among_them(name):
    assert name in NAMES


def test_each_name_is_that_of_a_timm_model_and_softpool():
    assert not [name for name in NAMES if not name.endswith(SUFFIX)]
    assert not [name for name in NAMES if not timm.is_model(name.removesuffix(SUFFIX))]
    assert not [name for name in NAMES if name.removesuffix(SUFFIX) in NAMES]


def test_each_name_has_a_configuration_of_its_own():
    assert timm.list_models(f'*{SUFFIX}', name_matches_cfg=True) == NAMES
    assert not [name for name in NAMES if timm.get_pretrained_cfg(name).architecture != name]


@pytest.mark.parametrize('name', ['densenet201', 'inception_v3', 'nest_tiny_jx', 'vgg11_bn'])
@pytest.mark.parametrize('field', ['input_size', 'first_conv', 'classifier', 'mean', 'std', 'fixed_input_size'])
def test_a_configuration_says_of_the_network_what_timm_says_of_the_plain_one(name, field):
    cfgs = [timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(f'{name}{SUFFIX}')]
    assert getattr(cfgs[1], field) == getattr(cfgs[0], field)


@pytest.mark.parametrize('name', ['densenet201', 'inception_v3'])
def test_a_model_without_weights_does_not_inherit_those_of_the_plain_one(name):
    cfg = timm.get_pretrained_cfg(f'{name}{SUFFIX}')
    assert timm.get_pretrained_cfg(name).has_weights
    assert not cfg.has_weights
    assert cfg.tag == 'untrained'
    assert f'{name}{SUFFIX}' not in timm.list_models(pretrained=True)


def test_each_model_says_what_it_is_and_where_it_comes_from():
    entry_points = [timm.model_entrypoint(name) for name in NAMES]
    assert [entry_point.__name__ for entry_point in entry_points] == NAMES
    assert not [entry_point for entry_point in entry_points if 'SoftPool' not in entry_point.__doc__]


@pytest.mark.parametrize('pattern', ['*', 'resnet*', 'densenet???_softpool', 'nothing*', 'resnet18_softpool', ''])
def test_list_models_takes_the_wildcards_of_timm(pattern):
    ours = {*NAMES, *(f'{name}_classreg' for name in classreg_twins.ARCHITECTURES)}
    assert list_models(pattern) == [name for name in timm.list_models(pattern) if name in ours]


def test_models_of_others_are_not_listed():
    assert {'resnet18', 'inception_v3'} & set(timm.list_models())
    assert not {'resnet18', 'inception_v3'} & set(NAMES)


def test_our_models_stay_out_of_the_modules_of_timm():
    modules = [name for name in timm.list_modules() if set(timm.list_models(module=name)) & set(NAMES)]
    assert modules == ['softpool_paper', 'softpool_twins']


@pytest.mark.parametrize('module', [softpool_paper, softpool_twins], ids=['paper', 'twins'])
def test_a_model_can_be_called_from_its_module(module):
    assert set(module.__all__) <= set(NAMES)
    model = getattr(module, module.__all__[0])(device='meta')
    assert soft_pools(model)


# The networks

@pytest.mark.parametrize('name', PAPER)
def test_a_network_of_the_paper_has_one_soft_pool_of_two_by_two_cells(name):
    model = create(f'{name}{SUFFIX}')
    pool, = soft_pools(model).values()
    assert type(pool) is SoftPool2d
    assert (pool.kernel_size, pool.stride, pool.padding) == ((2, 2), (2, 2), (0, 0))
    assert not [module for module in model.modules() if isinstance(module, nn.MaxPool2d)]


@pytest.mark.parametrize('name', [
    'densenet201', 'dla34', 'inception_v3', 'inception_v4', 'legacy_seresnet18', 'nest_tiny_jx', 'nextvit_small',
    'resnet34d', 'resnetv2_50x1_bit', 'test_byobnet', 'test_maxvit', 'vgg11', 'vovnet39a'])
def test_a_twin_pools_by_soft_pool_wherever_the_plain_network_pools(name):
    size = timm.get_pretrained_cfg(name).input_size
    (_, plain), (_, twin) = (run(create(name), 1, *size) for name in (name, f'{name}{SUFFIX}'))
    assert twin == {'soft': sum(plain.values())}


@pytest.mark.parametrize('name', [*PAPER, 'dla34', 'inception_v3', 'test_nfnet', 'test_resnet', 'vgg11'])
def test_a_checkpoint_of_the_plain_network_fits(name):
    plain, twin = create(name, num_classes=5), create(f'{name}{SUFFIX}', num_classes=5)
    assert [(key, value.shape) for key, value in twin.state_dict().items()] == [
        (key, value.shape) for key, value in plain.state_dict().items()]


@pytest.mark.parametrize('options', [dict(num_classes=7), dict(num_classes=0), dict(in_chans=1), dict(drop_rate=0.2),
                                     dict(global_pool='max'), dict(num_classes=7, in_chans=5)], ids=str)
@pytest.mark.parametrize('name', ['resnet34', 'test_resnet', 'vgg11'])
def test_options_of_timm_do_what_they_do_to_the_plain_network(name, options):
    shape = (2, options.get('in_chans', 3), 96, 96)
    (plain, _), (twin, _) = (run(create(name, **options), *shape) for name in (name, f'{name}{SUFFIX}'))
    assert twin.shape == plain.shape


@pytest.mark.parametrize('feature_cls', FEATURE_CLASSES)
@pytest.mark.parametrize(('name', 'pools'), [
    ('test_resnet', {'soft': 4}), ('vgg11', {'soft': 5}), ('densenet121', {'soft': 1, 'avg': 3}),
    ('inception_v3', {'soft': 13})], ids=lambda value: value if isinstance(value, str) else '')
def test_features_have_the_shapes_of_the_plain_network_and_are_pooled_softly(name, pools, feature_cls):
    plain, twin = (create(name, features_only=True, feature_cls=feature_cls, in_chans=1)
                   for name in (name, f'{name}{SUFFIX}'))
    (plain_maps, _), (twin_maps, kinds) = (run(model, 1, 1, 96, 96) for model in (plain, twin))
    assert kinds == pools
    assert twin.feature_info.get_dicts() == plain.feature_info.get_dicts()
    if feature_cls == 'dict':
        assert list(twin_maps) == list(plain_maps)
        plain_maps, twin_maps = plain_maps.values(), twin_maps.values()
    assert [x.shape for x in twin_maps] == [x.shape for x in plain_maps]


def test_a_traced_feature_network_that_trains_is_pooled_softly():
    model = create('inception_v3_softpool', features_only=True, feature_cls='fx').train()
    _, kinds = run(model, 2, 3, 96, 96)
    assert kinds == {'soft': 13}


@pytest.mark.parametrize('out_indices', [(0, 2), (-1,), (1, 2, 3, 4)], ids=str)
def test_the_user_chooses_among_the_features(out_indices):
    model = create('test_resnet_softpool', features_only=True, out_indices=out_indices)
    assert len(run(model, 1, 3, 64, 64)[0]) == len(out_indices)


@torch.no_grad()
def test_intermediates_are_those_of_a_forward_pass():
    model = timm.create_model('test_resnet_softpool').eval()
    images = torch.rand(1, 3, 64, 64)
    final, maps = model.forward_intermediates(images)
    assert torch.equal(final, model.forward_features(images))
    assert torch.equal(maps[-1], final)
    assert len(maps) == 5


@torch.no_grad()
def test_every_kind_of_feature_network_gives_the_same_features():
    images = torch.rand(1, 3, 64, 64)
    results = []
    for feature_cls in FEATURE_CLASSES:
        torch.manual_seed(0)
        maps = timm.create_model('test_resnet_softpool', features_only=True, feature_cls=feature_cls).eval()(images)
        results.append(list(maps.values() if feature_cls == 'dict' else maps))
    for maps in results[1:]:
        torch.testing.assert_close(maps, results[0])


def test_the_classifier_can_be_replaced():
    model = create('test_resnet_softpool', num_classes=3)
    model.reset_classifier(11)
    assert run(model, 1, 3, 64, 64)[0].shape == (1, 11)
    model.reset_classifier(0)
    assert run(model, 1, 3, 64, 64)[0].shape == (1, model.num_features)


def test_an_unknown_option_is_refused_as_by_the_plain_network():
    with pytest.raises(TypeError, match='colour'):
        create('test_resnet_softpool', colour='red')


# Saved folders and the Hugging Face hub

@pytest.fixture
def saved(tmp_path):
    """A model, some images, its logits, and the folder in which timm has saved it."""
    model = timm.create_model('test_resnet_softpool', num_classes=7, in_chans=1).eval()
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    images = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        return tmp_path / 'saved', images, model(images)


@torch.no_grad()
def test_a_model_comes_back_from_a_folder(saved):
    folder, images, expected = saved
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(model(images), expected)
    assert len(soft_pools(model)) == 4


def test_the_head_of_a_model_from_a_folder_can_be_another(saved):
    folder, images, _ = saved
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=3).eval()
    assert model(images).shape == (2, 3)


def test_a_saved_model_names_the_architecture_it_needs(saved):
    config = json.loads((saved[0] / 'config.json').read_text())
    assert config['architecture'] == 'test_resnet_softpool'


@torch.no_grad()
def test_a_model_comes_back_from_the_hub(saved, monkeypatch):
    folder, images, expected = saved

    def download(repo_id, filename, **_):
        assert repo_id == 'somebody/test_resnet_softpool'
        return str(folder / filename)

    monkeypatch.setattr('timm.models._hub.hf_hub_download', download)
    model = timm.create_model('hf-hub:somebody/test_resnet_softpool', pretrained=True).eval()
    assert torch.equal(model(images), expected)


@torch.no_grad()
def test_a_model_comes_back_from_the_cache_of_the_hub_without_a_network(saved, tmp_path, monkeypatch):
    folder, images, expected = saved
    repository = tmp_path / 'cache' / 'models--somebody--test_resnet_softpool'
    commit = '0123456789' * 4
    shutil.copytree(folder, repository / 'snapshots' / commit)
    (repository / 'refs').mkdir()
    (repository / 'refs' / 'main').write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    model = timm.create_model(
        'hf-hub:somebody/test_resnet_softpool', pretrained=True, cache_dir=tmp_path / 'cache').eval()
    assert torch.equal(model(images), expected)


# Weights that there are not

@pytest.mark.parametrize('name', ['test_resnet_softpool', 'inception_v3_softpool'])
def test_pretrained_without_published_weights_is_a_clear_error(name):
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
        create(name, pretrained=True)


def test_an_unknown_tag_is_a_clear_error():
    with pytest.raises(RuntimeError, match=r'Invalid pretrained tag \(nobody_in1k\) for resnet18_softpool'):
        create('resnet18_softpool.nobody_in1k')


# Registration

@pytest.mark.parametrize('module', [softpool_paper, softpool_twins], ids=['paper', 'twins'])
@pytest.mark.filterwarnings('error')
def test_importing_twice_changes_nothing(module, monkeypatch):
    for name in ('__all__', 'default_cfgs'):
        monkeypatch.setattr(module, name, copy.copy(getattr(module, name)))

    def everything():
        return (list_models(), timm.list_pretrained('*softpool*'), module.__all__, module.default_cfgs,
                {name: timm.get_pretrained_cfg(name) for name in NAMES})

    before = copy.deepcopy(everything())
    importlib.reload(module)
    assert everything() == before


@pytest.fixture
def foreign(monkeypatch):
    """A model that another package has registered under a name that could be ours."""
    def test_vit_softpool(pretrained=False, **kwargs):
        raise NotImplementedError

    monkeypatch.setitem(timm.models._registry._model_entrypoints, 'test_vit_softpool', test_vit_softpool)
    return test_vit_softpool


def test_a_name_that_another_package_has_is_never_taken(foreign, monkeypatch):
    monkeypatch.setitem(sys.modules, 'softpool_late', ModuleType('softpool_late'))
    with pytest.raises(RuntimeError, match=f'test_vit_softpool: {__name__} has registered that name'):
        register_twins('softpool_late', ['test_vit2', 'test_vit'], swap_pooling)
    assert timm.model_entrypoint('test_vit_softpool') is foreign
    assert not timm.is_model('test_vit2_softpool')


def test_a_model_of_another_package_is_not_listed_as_ours(foreign):
    assert 'test_vit_softpool' in timm.list_models('*_softpool')
    assert list_models(f'*{SUFFIX}') == NAMES


def test_an_architecture_that_this_timm_lacks_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, 'softpool_late', ModuleType('softpool_late'))
    register_twins('softpool_late', ['resnet9000'], swap_pooling)
    assert list_models(f'*{SUFFIX}') == NAMES
