"""torch.hub finds, describes and makes our models, from a copy of the repository or from the checkout."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import video_plugins
from timm_softpool import list_models, soft_pools
from timm_softpool.pretrained import PUBLISHED

ROOT = Path(__file__).parents[1]
REPOSITORY = 'somebody/timm-softpool:main'
IMAGE_ENTRY_POINTS = [
    'densenet121_softpool', 'densenet161_softpool', 'densenet169_softpool', 'resnet101_softpool', 'resnet152_softpool',
    'resnet18_softpool', 'resnet34_softpool', 'resnet50_softpool', 'resnext101_32x4d_softpool',
    'resnext50_32x4d_softpool', 'wide_resnet50_2_softpool']
ENTRY_POINTS = sorted(IMAGE_ENTRY_POINTS + video_plugins.list_models())


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """A TORCH_HOME in which torch.hub finds a copy of the checkout, as if it had downloaded it."""
    home = tmp_path_factory.mktemp('torch')
    copy = home / 'hub' / 'somebody_timm-softpool_main'
    copy.mkdir(parents=True)
    shutil.copy(ROOT / 'hubconf.py', copy)
    for folder in ('timm_softpool', 'video_plugins', 'weights'):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns('__pycache__', '*.safetensors'))
    return home


@pytest.fixture
def hub(home, monkeypatch):
    """``hub(function, ...)`` calls that function of torch.hub for the copy, without questions and without a network."""
    monkeypatch.setenv('TORCH_HOME', str(home))
    options = dict(skip_validation=True, trust_repo=True)
    return lambda function, *arguments, **kwargs: function(REPOSITORY, *arguments, **options, **kwargs)


def run(program, home):
    """Run ``program`` in an interpreter of its own, away from the checkout."""
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', program], capture_output=True, text=True, cwd=home,
                          env={**os.environ, 'TORCH_HOME': str(home), 'PYTHONPATH': ''})


def test_list_names_the_entry_points_and_nothing_else(hub):
    assert sorted(hub(torch.hub.list)) == ENTRY_POINTS


def test_entry_points_are_models_of_ours():
    assert set(IMAGE_ENTRY_POINTS) <= set(list_models())


@pytest.mark.parametrize('name', ENTRY_POINTS)
def test_help_says_what_a_model_is_and_how_to_load_it(name, hub):
    text = hub(torch.hub.help, name)
    assert name.removesuffix('_softpool') in text
    assert 'pretrained' in text
    assert f"'{name}'" in text[text.index('torch.hub.load('):]


@pytest.mark.parametrize('name', ['resnet18_softpool', 'densenet121_softpool'])
def test_load_makes_a_model_with_the_options_of_timm(name, hub):
    model = hub(torch.hub.load, name, num_classes=3, in_chans=1, device='meta')
    assert model(torch.empty(2, 1, 64, 64, device='meta')).shape == (2, 3)
    assert len(soft_pools(model)) == 1


def test_load_makes_a_feature_network(hub):
    model = hub(torch.hub.load, 'resnet18_softpool', features_only=True, device='meta')
    assert len(model(torch.empty(2, 3, 64, 64, device='meta'))) == 5


def test_load_takes_a_local_checkout():
    model = torch.hub.load(str(ROOT), 'resnet18_softpool', source='local', num_classes=3, device='meta')
    assert model.num_classes == 3


def test_load_makes_a_video_network(hub):
    model = hub(torch.hub.load, 'mtnet_xs', num_classes=3, device='meta')
    assert model(torch.empty(2, 3, 2, 32, 32, device='meta')).shape == (2, 3)


@pytest.mark.parametrize('name', IMAGE_ENTRY_POINTS)
def test_pretrained_and_options_reach_timm(name, hub, monkeypatch):
    calls = []
    monkeypatch.setattr('timm.create_model', lambda *arguments, **options: calls.append((arguments, options)))
    hub(torch.hub.load, name, True, pretrained_cfg='stergiou_in1k', num_classes=3)
    (arguments, options), = calls
    assert arguments == (name,)
    assert options == dict(pretrained=True, pretrained_cfg='stergiou_in1k', num_classes=3)


OWN = [name for name, entry in PUBLISHED.items() if 'sha256' in entry]  # the authors' need a download


def logits(model):
    cfg = model.pretrained_cfg
    frames = [cfg['num_frames']] if cfg.get('num_frames') else []
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return model.eval()(torch.randn(2, 3, *frames, *cfg['input_size'][1:], generator=generator))


@pytest.mark.parametrize('name', OWN)
def test_published_weights_of_a_checkout_give_the_logits_that_timm_gives(name):
    architecture, tag = name.split('.')
    model = torch.hub.load(str(ROOT), architecture, source='local', pretrained=True, pretrained_cfg=tag)
    torch.testing.assert_close(logits(model), logits(timm.create_model(name, pretrained=True)), rtol=0, atol=0)


@pytest.mark.parametrize('name', OWN)
def test_published_weights_of_a_seeded_cache_give_the_logits_that_timm_gives(name, home, tmp_path):
    (home / 'hub' / 'checkpoints').mkdir(exist_ok=True)
    shutil.copy(ROOT / 'weights' / PUBLISHED[name]['file'], home / 'hub' / 'checkpoints')
    architecture, tag = name.split('.')
    process = run(f'''
import sys, torch
model = torch.hub.load({REPOSITORY!r}, {architecture!r}, pretrained=True, pretrained_cfg={tag!r}, skip_validation=True,
                       trust_repo=True)
sys.path.append({str(ROOT / "tests")!r})
from test_hub import logits
torch.save(logits(model), {str(tmp_path / "logits.pt")!r})
print(sys.modules['timm_softpool'].__file__)
''', home)
    assert process.returncode == 0, process.stderr
    assert Path(process.stdout.splitlines()[-1]).is_relative_to(home)
    torch.testing.assert_close(torch.load(tmp_path / 'logits.pt'), logits(timm.create_model(name, pretrained=True)))


def test_an_unknown_model_is_a_clear_error(hub):
    with pytest.raises(RuntimeError, match='Cannot find callable resnet19_softpool in hubconf'):
        hub(torch.hub.load, 'resnet19_softpool')


def test_the_package_of_the_copy_is_loaded_and_not_an_installed_one(home):
    process = run(f'''
import json, sys, torch
options = dict(skip_validation=True, trust_repo=True)
model = torch.hub.load({REPOSITORY!r}, 'resnet18_softpool', num_classes=3, **options)
model(torch.zeros(2, 3, 64, 64)).sum().backward()
print(json.dumps([sys.modules['timm_softpool'].__file__, str(model.maxpool)]))
''', home)
    assert process.returncode == 0, process.stderr
    file, pool = json.loads(process.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(home)
    assert pool == 'SoftPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(0, 0))'


def test_without_timm_list_works_and_load_and_help_say_what_is_missing(home):
    process = run(f'''
import sys, torch

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('timm', 'timm_softpool'):
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == 'timm' else find_spec(name, *rest)
sys.meta_path.insert(0, Hidden())
options = dict(skip_validation=True, trust_repo=True)
print(len(torch.hub.list({REPOSITORY!r}, **options)))
for function in (torch.hub.load, torch.hub.help):
    try:
        function({REPOSITORY!r}, 'resnet18_softpool', **options)
    except RuntimeError as error:
        print(error)
''', home)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines() == [str(len(ENTRY_POINTS)), *['Missing dependencies: timm'] * 2]
