"""Files of weights: those of others become ours, what does not fit is named, and what is damaged is refused."""
import json
import os
import pickle
import re
import runpy
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from checkpoint_helpers import NAME, as_data_parallel, saved, truncated
from torch import nn

import video_plugins  # noqa: F401  (registers the video networks)
from timm_softpool import convert_checkpoint
from timm_softpool.pretrained import PUBLISHED, read_checkpoint, write_safetensors

PARITY = Path(__file__).parent / 'data' / 'parity'


def author_checkpoint(name):
    """A checkpoint in the layout of the paper's authors, an input, and the logits that their network gives for it."""
    filler = runpy.run_path(str(PARITY / 'fill.py'))
    spec = json.loads((PARITY / f'{name}.json').read_text())
    tensors = {name: torch.from_numpy(filler['fill'](name, shape)) for name, shape in spec['tensors'].items()}
    return tensors, torch.from_numpy(filler['fill_input'](spec['input'])), torch.tensor(spec['logits'])


def as_old_densenet(tensors):
    return {re.sub(r'(denselayer\d+\.)(norm|conv)(\d)', r'\1\2.\3', name): value for name, value in tensors.items()}


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
