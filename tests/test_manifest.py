"""The manifest of published weights, and what timm is told of it."""
from dataclasses import replace
from pathlib import Path

import pytest
import timm

import video_plugins  # noqa: F401  (registers the video networks)
from timm_softpool import pretrained
from timm_softpool.pretrained import PUBLISHED, file_hash, tomllib


@pytest.mark.parametrize('name', PUBLISHED)
def test_a_published_name_is_one_of_timm_with_a_whole_entry(name):
    entry, cfg = PUBLISHED[name], timm.get_pretrained_cfg(name)
    assert cfg.has_weights
    assert f'{cfg.architecture}.{cfg.tag}' == name
    assert (cfg.file, cfg.url, cfg.license) == (entry['file'], entry.get('url'), entry['license'])
    assert entry['file'].endswith('.safetensors')
    assert 'url' in entry or 'sha256' in entry
    assert cfg.hf_hub_id is None
    assert isinstance(cfg.input_size, tuple)
    assert cfg.first_conv and cfg.classifier
    assert not cfg.label_names or len(cfg.label_names) == cfg.num_classes


def test_a_file_with_a_known_hash_carries_its_beginning_in_its_name():
    assert not [entry['file'] for entry in PUBLISHED.values()
                if 'sha256' in entry and entry['sha256'][:8] not in entry['file']]


def test_the_files_of_the_checkout_are_the_published_ones():
    expected = {entry['file']: entry['sha256'] for entry in PUBLISHED.values() if 'sha256' in entry}
    folder = Path(__file__).parents[1] / 'weights'
    assert {path.name: file_hash(path) for path in folder.glob('*.safetensors')}.items() <= expected.items()


def test_a_wheel_carries_less_than_30_mb_of_weights():
    root = Path(__file__).parents[1]
    left_out = tomllib.loads((root / 'pyproject.toml').read_text())['tool']['setuptools']['exclude-package-data']
    carried = [path for path in root.glob('weights/*.safetensors')
               if not any(path.match(pattern) for pattern in left_out['timm_softpool.weights'])]
    assert carried
    assert sum(path.stat().st_size for path in carried) < 30e6


def test_the_first_tag_of_a_model_is_its_default():
    names = [name.split('.')[0] for name in PUBLISHED]
    assert [timm.get_pretrained_cfg(name).tag for name in dict.fromkeys(names)] == [
        next(key.split('.')[1] for key in PUBLISHED if key.startswith(f'{name}.')) for name in dict.fromkeys(names)]


@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'resnext101_32x4d', 'wide_resnet50_2', 'densenet161'])
def test_the_files_of_the_authors_are_published(name):
    entry = PUBLISHED[f'{name}_softpool.stergiou_in1k']
    assert entry['url'].startswith('https://drive.usercontent.google.com/')
    assert timm.get_pretrained_cfg(f'{name}_softpool.stergiou_in1k').num_classes == 1000


@pytest.mark.parametrize('source', [dict(url='file:///nowhere/mine.pth'), dict(hf_hub_id='me/mine')], ids=str)
def test_a_source_of_the_user_is_not_replaced_by_the_published_file(source):
    cfg = replace(timm.get_pretrained_cfg('resnet18_softpool.tiny_in200'), **source)
    assert pretrained.locate(cfg) == replace(cfg, file=None)
