"""Where weights come from: a file of the user, or the published ones, and what is done with one that is damaged."""
import hashlib
import re
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import timm
import torch
from checkpoint_helpers import NAME, as_data_parallel, saved, truncated
from timm.models import save_for_hf

from timm_softpool import pretrained
from timm_softpool.pretrained import PUBLISHED, fetch, file_hash, read_checkpoint, write_safetensors


def logits(model):
    with torch.no_grad():
        return model(torch.rand(1, model.conv1[0].in_channels, 64, 64, generator=torch.Generator().manual_seed(1)))


def tensors_in(value):
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return [value] if isinstance(value, torch.Tensor) else []


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
