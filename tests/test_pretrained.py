"""Where weights come from: the files of others, the published ones, and what is done with a file that is damaged."""
import hashlib
import json
import os
import pickle
import re
import runpy
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import video_plugins  # noqa: F401  (registers the video networks)
from timm_softpool import convert_checkpoint, pretrained
from timm_softpool.pretrained import PUBLISHED, fetch, file_hash, read_checkpoint, write_safetensors

PARITY = Path(__file__).parent / 'data' / 'parity'
NAME = 'test_resnet_softpool'  # the smallest model of ours


def author_checkpoint(name):
    """A checkpoint in the layout of the paper's authors, an input, and the logits that their network gives for it."""
    filler = runpy.run_path(str(PARITY / 'fill.py'))
    spec = json.loads((PARITY / f'{name}.json').read_text())
    tensors = {name: torch.from_numpy(filler['fill'](name, shape)) for name, shape in spec['tensors'].items()}
    return tensors, torch.from_numpy(filler['fill_input'](spec['input'])), torch.tensor(spec['logits'])


def as_data_parallel(tensors):
    return {'epoch': 90, 'state_dict': {f'module.{name}': value for name, value in tensors.items()}}


def as_old_densenet(tensors):
    return {re.sub(r'(denselayer\d+\.)(norm|conv)(\d)', r'\1\2.\3', name): value for name, value in tensors.items()}


@pytest.fixture
def model():
    return timm.create_model(NAME).eval()


@pytest.fixture
def tensors(model):
    return dict(model.state_dict())


def logits(model):
    with torch.no_grad():
        return model(torch.rand(1, model.conv1[0].in_channels, 64, 64, generator=torch.Generator().manual_seed(1)))


def tensors_in(value):
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return [value] if isinstance(value, torch.Tensor) else []


# Checkpoints of the paper's authors

@pytest.mark.parametrize(('name', 'architecture'), [
    *((name, f'{name}_softpool') for name in ('resnet18', 'resnet50', 'densenet121')),
    *((name, name) for name in ('r3d_18', 'srtg_r3d_18', 'srtg_r2plus1d_18', 'mtnet_xs', 'mtnet_xs_g8'))])
def test_a_file_of_the_authors_gives_their_logits(name, architecture, tmp_path):
    tensors, input, expected = author_checkpoint(name)
    torch.save(as_data_parallel(tensors), tmp_path / 'model_best.pth')
    model = timm.create_model(architecture, num_classes=expected.shape[1]).eval()
    converted = convert_checkpoint(read_checkpoint(tmp_path / 'model_best.pth'), architecture)
    assert convert_checkpoint(converted, architecture).keys() == converted.keys()
    model.load_state_dict(converted)
    with torch.no_grad():
        torch.testing.assert_close(model(input), expected, rtol=0, atol=1e-4)


def test_the_file_that_the_author_links_for_two_networks_is_refused_for_the_wrong_one():
    with torch.device('meta'):
        tensors = timm.create_model('srtg_r2plus1d_50', num_classes=200).state_dict()
    with pytest.raises(ValueError, match='does not fit srtg_r2plus1d_101; missing: blocks.3.6'):
        convert_checkpoint(tensors, 'srtg_r2plus1d_101')
    assert PUBLISHED['srtg_r2plus1d_50.stergiou_hacs']['url'] == PUBLISHED['srtg_r2plus1d_101.stergiou_hacs']['url']


@pytest.mark.parametrize('wrap', [lambda tensors: tensors, as_data_parallel, lambda tensors: {'model': tensors},
                                  lambda tensors: {f'module.{name}': value for name, value in tensors.items()}],
                         ids=['bare', 'state_dict of DataParallel', 'model', 'DataParallel'])
def test_the_tensors_are_taken_out_of_whatever_holds_them(wrap, tensors):
    converted = convert_checkpoint(wrap(tensors), NAME)
    assert list(converted) == list(tensors)
    assert all(converted[name] is value for name, value in tensors.items())


def test_old_names_of_densenet_become_the_present_ones():
    with torch.device('meta'):
        tensors = dict(timm.create_model('densenet121_softpool').state_dict())
    old = as_old_densenet(tensors)
    assert 'features.denseblock1.denselayer1.norm.1.weight' in old
    assert list(convert_checkpoint(old, 'densenet121_softpool')) == list(tensors)


@pytest.mark.parametrize('options', [dict(num_classes=7), dict(in_chans=1), dict(num_classes=7, in_chans=5)], ids=str)
def test_a_classifier_and_a_first_convolution_may_have_sizes_of_their_own(options):
    tensors = timm.create_model(NAME, **options).state_dict()
    assert convert_checkpoint(tensors, NAME).keys() == tensors.keys()


def test_counters_of_batches_may_be_missing_as_in_files_of_old(tensors):
    old = {name: value for name, value in tensors.items() if not name.endswith('num_batches_tracked')}
    assert convert_checkpoint(old, NAME).keys() == old.keys()


def without_first(tensors):
    return dict(list(tensors.items())[1:])


def with_another_shape(tensors):
    return {**tensors, 'layer1.0.conv1.weight': torch.zeros(2, 2, 3, 3)}


@pytest.mark.parametrize(('spoil', 'message'), [
    (without_first, r'missing: conv1\.0\.weight$'),
    (lambda tensors: {**tensors, 'attention.weight': torch.zeros(3)}, r'unknown: attention\.weight$'),
    (with_another_shape, r'shapes: layer1\.0\.conv1\.weight \(2, 2, 3, 3\) instead of \(32, 32, 3, 3\)$'),
    (lambda tensors: with_another_shape(without_first(tensors)), r'missing: conv1\.0\.weight; shapes: layer1\.0'),
    (lambda tensors: {**tensors, 'fc.weight': 3}, r'missing: fc\.weight'),
    (lambda tensors: {'epoch': 3, 'optimizer': {}}, r'missing: conv1\.0\.weight, .* and \d+ more; unknown: epoch, opt'),
    (lambda tensors: {}, r'missing: conv1\.0\.weight, .* and \d+ more$'),
    (lambda tensors: {0: torch.zeros(1)}, r'missing: conv1\.0\.weight, .* and \d+ more; unknown: 0$'),
], ids=['missing', 'unknown', 'shape', 'missing and shape', 'a number', 'no tensors', 'nothing', 'names are numbers'])
def test_what_does_not_fit_is_named(spoil, message, tensors):
    with pytest.raises(ValueError, match=f'the checkpoint does not fit {NAME}; .*{message}'):
        convert_checkpoint(spoil(tensors), NAME)


@pytest.mark.parametrize(('donor', 'architecture', 'message'), [
    ('resnet50', 'resnet18_softpool', 'unknown: layer1.0.conv3.weight'),
    ('vgg11', 'resnet18_softpool', 'unknown: features.0.weight'),
    ('resnet18', 'densenet121_softpool', 'missing: features.conv0.weight'),
])
def test_a_checkpoint_of_another_network_is_refused(donor, architecture, message):
    with torch.device('meta'):
        tensors = timm.create_model(donor).state_dict()
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tensors, architecture)


# Files

def test_what_was_written_is_read(tmp_path, tensors):
    write_safetensors(tensors, tmp_path / 'a.safetensors')
    torch.save(tensors, tmp_path / 'a.pth')
    for path in tmp_path.iterdir():
        actual = read_checkpoint(str(path))
        assert actual.keys() == tensors.keys()
        assert all(torch.equal(actual[name], value) for name, value in tensors.items())


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def truncated(content):
    return content[:len(content) // 2]


def saved(value, folder):
    torch.save(value, folder / 'saved')
    return (folder / 'saved').read_bytes()


CORRUPT = {
    'truncated.safetensors': lambda folder: truncated(safetensors.torch.save({'x': torch.zeros(100)})),
    'headless.safetensors': lambda folder: safetensors.torch.save({'x': torch.zeros(100)})[:20],
    'text.safetensors': lambda folder: b'Quota exceeded',
    'empty.safetensors': lambda folder: b'',
    'truncated.pth': lambda folder: truncated(saved({'x': torch.zeros(100)}, folder)),
    'text.pth': lambda folder: b'<!DOCTYPE html><html>Quota exceeded</html>',
    'empty.pth': lambda folder: b'',
    'module.pth': lambda folder: saved(nn.Linear(2, 2), folder),
    'module_inside.pth': lambda folder: saved({'model': nn.Linear(2, 2)}, folder),
    'code.pth': lambda folder: saved({'x': RunsCode()}, folder),
    'code.pkl': lambda folder: pickle.dumps({'x': RunsCode()}, protocol=2),
    'list.pth': lambda folder: saved([torch.zeros(3)], folder),
    'tensor.pth': lambda folder: saved(torch.zeros(3), folder),
}


@pytest.mark.parametrize('name', CORRUPT)
def test_a_file_that_is_no_whole_checkpoint_of_tensors_is_refused_by_name_and_never_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(CORRUPT[name](tmp_path))
    with pytest.raises(ValueError, match=re.escape(name)):
        read_checkpoint(tmp_path / name)
    assert not Path('executed').exists()


@pytest.mark.parametrize('name', ['nothing.pth', '.'], ids=['missing', 'folder'])
def test_a_file_that_is_not_there_is_refused_by_name(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / name))):
        read_checkpoint(tmp_path / name)


@pytest.mark.parametrize('failing', ['pathlib.Path.write_bytes', 'os.replace'])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(failing, tmp_path, monkeypatch):
    def fail(path, *_):
        path.touch()
        raise OSError('No space left on device')

    path = tmp_path / 'a.safetensors'
    write_safetensors({'x': torch.zeros(3)}, path)
    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match='No space left'):
        write_safetensors({'x': torch.ones(3)}, path)
    assert torch.equal(read_checkpoint(path)['x'], torch.zeros(3))
    assert list(tmp_path.iterdir()) == [path]


# A file that the user names

@pytest.fixture
def own_file(tmp_path, tensors):
    path = tmp_path / 'own.pth'
    torch.save(as_data_parallel(tensors), path)
    return path


def load(path, **options):
    overlay = dict(file=str(path), **options.pop('overlay', {}))
    return timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **options).eval()


@pytest.mark.parametrize('kind', [str, Path])
def test_an_explicit_file_is_loaded(kind, own_file, model):
    loaded = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=kind(own_file))).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize('options', [dict(num_classes=10), dict(in_chans=1), dict(num_classes=0),
                                     dict(num_classes=10, in_chans=5)], ids=str)
def test_an_explicit_file_is_adapted_to_another_head_and_other_channels(options, own_file, tensors):
    loaded = load(own_file, **options)
    plain = timm.create_model(NAME, **options).eval()
    assert logits(loaded).shape == logits(plain).shape
    assert torch.equal(loaded.layer1[0].conv1.weight, tensors['layer1.0.conv1.weight'])
    if options.get('in_chans') == 1:
        torch.testing.assert_close(loaded.conv1[0].weight, tensors['conv1.0.weight'].sum(1, keepdim=True))


def test_an_explicit_file_may_hold_another_number_of_classes(tmp_path):
    own = timm.create_model(NAME, num_classes=7).eval()
    torch.save(own.state_dict(), tmp_path / 'seven.pth')
    loaded = load(tmp_path / 'seven.pth', num_classes=7, overlay=dict(num_classes=7))
    assert torch.equal(logits(loaded), logits(own))


@pytest.mark.parametrize('options', [{}, *(dict(features_only=True, feature_cls=feature_cls)
                                           for feature_cls in ('list', 'dict', 'hook', 'fx', 'getter'))], ids=str)
def test_a_loaded_model_holds_no_second_copy_of_its_tensors(options, own_file):
    loaded = load(own_file, **options)
    configurations = [module.pretrained_cfg for module in loaded.modules() if hasattr(module, 'pretrained_cfg')]
    assert configurations
    assert not [tensor for cfg in configurations for tensor in tensors_in(cfg)]


def test_features_of_an_explicit_file_are_those_of_the_whole_model(own_file, model):
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        maps = load(own_file, features_only=True)(images)
        assert torch.equal(maps[-1], model.forward_features(images))


def test_a_loaded_model_can_be_saved(own_file, model, tmp_path):
    save_for_hf(load(own_file), tmp_path / 'again', safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "again"}', pretrained=True).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(('content', 'error'), [(None, FileNotFoundError), (b'no checkpoint', ValueError)],
                         ids=['missing', 'corrupt'])
def test_an_explicit_file_that_cannot_be_read_is_named(content, error, tmp_path):
    path = tmp_path / 'own.pth'
    if content:
        path.write_bytes(content)
    with pytest.raises(error, match=re.escape(str(path))):
        load(path)


def test_without_pretrained_no_file_is_looked_at(tmp_path):
    timm.create_model(NAME, pretrained_cfg_overlay=dict(file=str(tmp_path / 'nothing.pth')))


# Published files

class Publication:
    """Weights published under a name of their own, and the places where they may be."""

    name = f'{NAME}.unit'
    file = f'{NAME}-unit.safetensors'

    def __init__(self, folder, monkeypatch, tensors):
        self.folders = {'env': folder / 'env', 'package': folder / 'package', 'cache': folder / 'home/hub/checkpoints'}
        self.source = folder / 'server' / self.file
        for path in (*self.folders.values(), self.source.parent):
            path.mkdir(parents=True)
        write_safetensors(tensors, self.source)
        self.entry = {'file': self.file, 'sha256': file_hash(self.source), 'data': 'in1k', 'license': 'MIT'}
        monkeypatch.setitem(PUBLISHED, self.name, self.entry)
        monkeypatch.setattr(pretrained, '_FOLDER', self.folders['package'])
        monkeypatch.setenv('TIMM_SOFTPOOL_WEIGHTS', str(self.folders['env']))
        monkeypatch.setenv('TORCH_HOME', str(folder / 'home'))

    def put(self, *places, content=None):
        for place in places:
            (self.folders[place] / self.file).write_bytes(content or self.source.read_bytes())

    def place(self, path):
        return next(place for place, folder in self.folders.items() if path.parent == folder)

    def files(self):
        return [path.name for folder in self.folders.values() for path in sorted(folder.iterdir())]


@pytest.fixture
def published(tmp_path, monkeypatch, tensors):
    return Publication(tmp_path, monkeypatch, tensors)


@pytest.fixture
def on_server(published):
    published.entry['url'] = published.source.as_uri()
    return published


@pytest.fixture
def of_authors(on_server, tensors):
    """A file with a name and a content like that of the paper's authors, for which they have published no hash."""
    del on_server.entry['sha256']
    torch.save(as_data_parallel(tensors), on_server.source)
    return on_server


@pytest.mark.parametrize(('places', 'expected'), [
    (['env', 'package', 'cache'], 'env'), (['package', 'cache'], 'package'), (['cache'], 'cache'), (['env'], 'env')],
    ids=' '.join)
def test_places_are_searched_in_order(places, expected, published):
    published.put(*places)
    assert published.place(fetch(published.name)) == expected


@pytest.mark.parametrize('value', ['', '/nowhere'])
def test_a_folder_of_the_user_that_is_not_there_is_passed_over(value, published, monkeypatch):
    monkeypatch.setenv('TIMM_SOFTPOOL_WEIGHTS', value)
    published.put('package')
    assert published.place(fetch(published.name)) == 'package'


@pytest.mark.parametrize('place', ['env', 'package', 'cache'])
def test_a_file_with_another_hash_is_refused_wherever_it_is(place, published):
    other = safetensors.torch.save({'x': torch.zeros(3)})
    published.put(place, content=other)
    with pytest.raises(ValueError) as error:
        fetch(published.name)
    assert str(published.folders[place] / published.file) in str(error.value)
    assert published.entry['sha256'] in str(error.value)
    assert hashlib.sha256(other).hexdigest() in str(error.value)


def test_a_name_under_which_nothing_is_published_is_an_error(published):
    with pytest.raises(KeyError, match='nobody'):
        fetch(f'{NAME}.nobody')


def test_a_published_file_is_loaded(published, model):
    published.put('package')
    loaded = load(published.file, overlay=dict(tag='unit'))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.pretrained_cfg['tag'] == 'unit'
    assert not tensors_in(loaded.pretrained_cfg)


def test_a_damaged_published_file_is_not_loaded(published):
    published.put('package', content=b'damaged')
    with pytest.raises(ValueError, match='SHA-256'):
        load(published.file, overlay=dict(tag='unit'))


def test_a_file_that_is_nowhere_is_an_error_that_names_the_places(published):
    with pytest.raises(FileNotFoundError, match='TIMM_SOFTPOOL_WEIGHTS') as error:
        fetch(published.name)
    for fact in (published.name, published.file, *published.folders.values()):
        assert str(fact) in str(error.value)


def test_a_download_lands_whole_in_the_cache_and_is_not_repeated(on_server):
    for _ in range(2):
        path = fetch(on_server.name)
        assert on_server.place(path) == 'cache'
        assert file_hash(path) == on_server.entry['sha256']
        assert on_server.files() == [on_server.file]
        on_server.source.unlink(missing_ok=True)


def test_a_download_makes_the_cache_folder(on_server):
    on_server.folders['cache'].rmdir()
    assert fetch(on_server.name).is_file()


@pytest.mark.parametrize('spoil', [truncated, lambda content: content[:-1] + b'x', lambda content: b'<html>'],
                         ids=['truncated', 'tampered', 'a page'])
def test_a_download_that_is_not_the_published_file_is_refused_and_not_kept(spoil, on_server):
    on_server.source.write_bytes(spoil(on_server.source.read_bytes()))
    with pytest.raises(ValueError, match=f'SHA-256.*{on_server.entry["sha256"]}'):
        fetch(on_server.name)
    assert on_server.files() == []


@pytest.mark.parametrize('error', [URLError('no route to host'), TimeoutError('timed out'),
                                   ConnectionResetError('reset')], ids=lambda error: type(error).__name__)
def test_without_a_network_the_error_names_the_places_and_the_address(error, on_server, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr('torch.hub.urlopen', fail)
    with pytest.raises(FileNotFoundError) as caught:
        fetch(on_server.name)
    for fact in (on_server.name, on_server.file, *on_server.folders.values(), on_server.entry['url'], error.args[0]):
        assert str(fact) in str(caught.value)
    assert on_server.files() == []


def test_an_address_where_nothing_is_leaves_nothing_behind(on_server):
    on_server.source.unlink()
    with pytest.raises(FileNotFoundError, match='could not be downloaded'):
        fetch(on_server.name)
    assert on_server.files() == []


# Files of the paper's authors, who publish no hashes

def test_the_first_download_of_an_author_file_is_converted_and_its_hash_recorded(of_authors, model):
    path = fetch(of_authors.name)
    assert of_authors.files() == [of_authors.file, f'{of_authors.file}.sha256']
    assert read_checkpoint(path).keys() == model.state_dict().keys()
    assert path.with_name(f'{of_authors.file}.sha256').read_text().strip() == file_hash(path)


def test_the_second_load_of_an_author_file_needs_no_network(of_authors, model):
    first = fetch(of_authors.name)
    of_authors.source.unlink()
    assert fetch(of_authors.name) == first
    overlay = dict(tag='unit', url=of_authors.entry['url'])
    assert torch.equal(logits(load(of_authors.file, overlay=overlay)), logits(model))


@pytest.mark.parametrize(('spoil', 'message'), [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'SHA-256 is .*, expected'),
    (lambda path: path.with_name(f'{path.name}.sha256').unlink(), r'no record of its SHA-256.*remove it'),
    (lambda path: path.with_name(f'{path.name}.sha256').write_text(''), 'SHA-256'),
], ids=['another file', 'no record', 'an empty record'])
def test_an_author_file_that_is_not_the_recorded_one_is_refused(spoil, message, of_authors):
    spoil(fetch(of_authors.name))
    with pytest.raises(ValueError, match=message):
        fetch(of_authors.name)


@pytest.mark.parametrize(('content', 'message'), [
    (lambda folder: b'<!DOCTYPE html>Quota exceeded', 'not a whole checkpoint'),
    (lambda folder: truncated(saved({'state_dict': {'x': torch.zeros(99)}}, folder)), 'not a whole checkpoint'),
    (lambda folder: saved({'state_dict': {'x': torch.zeros(99)}}, folder), f'does not fit {NAME}.*unknown: x'),
], ids=['a page', 'truncated', 'another network'])
def test_a_download_that_is_no_author_file_is_refused_and_not_kept(content, message, of_authors, tmp_path):
    of_authors.source.write_bytes(content(tmp_path))
    with pytest.raises(ValueError, match=message):
        fetch(of_authors.name)
    assert of_authors.files() == []


# The manifest

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
