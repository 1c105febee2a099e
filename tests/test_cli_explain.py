"""The command ``timm-softpool explain``, as its user sees it."""
import json
import re

import numpy as np
import pytest
import timm
import torch
from helpers import write_video
from PIL import Image

import video_plugins
from timm_softpool.pretrained import write_safetensors
from video_plugins import camera_motion


@pytest.fixture(scope='module')
def photograph(tmp_path_factory):
    path = tmp_path_factory.mktemp('inputs') / 'noise.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), np.uint8)).save(path)
    return path


@pytest.fixture(scope='module')
def video(tmp_path_factory):
    clip = camera_motion(torch.rand(3, 100, 120), 'zoom in', 16, 64, torch.Generator().manual_seed(0))
    return write_video(tmp_path_factory.mktemp('inputs') / 'clip.mp4', (clip.permute(1, 2, 3, 0) * 255).round().byte())


def numbers(path):
    with np.load(path) as arrays:
        return {name: np.array(value) for name, value in arrays.items()}


def test_a_photograph_is_explained_for_its_most_probable_class(command, photograph, tmp_path):
    line, written = command('explain', photograph, '-o', tmp_path / 'tube.npz')
    found = numbers(tmp_path / 'tube.npz')
    best = command('predict', '--topk', 1, photograph)[1].split(maxsplit=1)
    assert line == f'{photograph}: {best[1]} ({best[0]})' and written == str(tmp_path / 'tube.npz')
    assert found['target'] == found['logits'].argmax() and found['maps/layer4'].shape == (1, 1, 2, 2)


def test_targets_by_name_and_index_and_layers_by_pattern(command, photograph, tmp_path):
    lines = command('explain', photograph, '--target', 'espresso', '--target', 3, '--layer', 'layer2', '--layer',
                    'layer3.*', '-o', tmp_path / 'tube.npz')
    found = numbers(tmp_path / 'tube.npz')
    assert {name for name in found if name.startswith('0/maps')} == {'0/maps/layer2', '0/maps/layer3.0',
                                                                    '0/maps/layer3.1'}
    assert 'espresso' in lines[0] and found['1/target'] == 3 and len(lines) == 3


@pytest.mark.parametrize('options, columns', [
    ([], 1), (['--layer', 'layer3'], 1), (['--layer', 'layer3.*'], 2), (['--layer', 'layer2', '--layer', 'layer3'], 2)])
def test_each_layer_has_a_column_of_its_own_beside_the_input(command, photograph, tmp_path, options, columns):
    command('explain', photograph, *options, '-o', tmp_path / 'tube.png')
    with Image.open(tmp_path / 'tube.png') as image:
        assert image.width == 256 + columns * (4 + 256)


def test_several_files_are_called_by_their_names(command, photograph, tmp_path):
    (tmp_path / 'images').mkdir()
    for name in ('one.png', 'two.png'):
        (tmp_path / 'images' / name).write_bytes(photograph.read_bytes())
    command('explain', photograph, tmp_path / 'images', '--target', 'espresso', '-o', tmp_path / 'tube.html')
    labels = re.findall('"label": "(.*?)"', (tmp_path / 'tube.html').read_text())
    assert labels == ['espresso noise.png', 'espresso one.png', 'espresso two.png']


def test_what_exists_is_replaced_only_if_asked_for(command, failure, photograph, tmp_path):
    before = photograph.read_bytes()
    assert f'{photograph} exists already; --overwrite replaces it' in failure('explain', photograph, '-o', photograph)
    assert photograph.read_bytes() == before
    (tmp_path / 'tube.npz').touch()
    command('explain', photograph, '-o', tmp_path / 'tube.npz', '--overwrite')
    assert numbers(tmp_path / 'tube.npz')


@pytest.mark.parametrize('suffix', ['png', 'gif', 'mp4', 'html'])
def test_a_clip_becomes_a_picture(command, video, tmp_path, suffix):
    command('explain', video, '--model', 'r3d_18_w16', '--style', 'focus', '-o', tmp_path / f'tube.{suffix}')
    assert (tmp_path / f'tube.{suffix}').stat().st_size > 1000


def test_weights_of_your_own(command, video, tmp_path):
    model = video_plugins.create_model('r3d_18_w16', num_classes=3)
    write_safetensors(model.state_dict(), tmp_path / 'own.safetensors')
    lines = command('explain', video, '--model', 'r3d_18_w16', '--checkpoint', tmp_path / 'own.safetensors',
                    '--target', 2, '-o', tmp_path / 'tube.npz')
    assert numbers(tmp_path / 'tube.npz')['logits'].shape == (1, 3) and ': class 2 (' in lines[0]


def test_class_tubes_are_fitted_to_a_folder_or_read_from_class_regularization(command, failure, photograph, tmp_path):
    (tmp_path / 'images').mkdir()
    for index in range(4):
        Image.new('RGB', (64, 64), (60 * index, 0, 255 - 60 * index)).save(tmp_path / 'images' / f'{index}.png')
    out = tmp_path / 'tube.npz'
    assert '--method class needs --fit FOLDER' in failure('explain', photograph, '--method', 'class', '-o', out)
    (tmp_path / 'empty').mkdir()
    assert 'nothing is in' in failure('explain', tmp_path / 'empty', '--method', 'eye', '-o', tmp_path / 'eye.png')
    lines = command('explain', photograph, '--method', 'class', '--fit', tmp_path / 'images', '--layer', 'layer4', '-o',
                    out)
    assert re.fullmatch(r'r2 of the logits, fitted to 4 files: layer4 0\.\d\d', lines[0])
    model = timm.create_model('resnet18_classreg', num_classes=3)
    write_safetensors(model.state_dict(), tmp_path / 'own.safetensors')
    command('explain', photograph, '--method', 'class', '--model', 'resnet18_classreg', '--checkpoint',
            tmp_path / 'own.safetensors', '-o', tmp_path / 'blocks.npz')
    assert json.loads(str(numbers(tmp_path / 'blocks.npz')['meta']))['weights'] == {'layer4': 'blocks'}


@pytest.mark.parametrize('options', [[], ['--layer', 'layer3'], ['--layer', 'layer3.*', '--layer', 'layer4']])
def test_a_pyramid_is_one_fused_map_whatever_layers_its_tubes_are_of(command, photograph, tmp_path, options):
    command('explain', photograph, '--method', 'pyramid', *options, '-o', tmp_path / 'pyramid.png')
    with Image.open(tmp_path / 'pyramid.png') as image:
        assert image.width == 256 + 4 + 256
    command('explain', photograph, '--method', 'pyramid', *options, '-o', tmp_path / 'pyramid.npz')
    found = numbers(tmp_path / 'pyramid.npz')
    tubes = {name for name in found if name.startswith('maps/') and ':' not in name}
    assert len(tubes) == {0: 1, 2: 1, 4: 3}[len(options)] and any(found[name].shape[-1] == 16 for name in found
                                                                 if name.endswith(':input'))
    assert json.loads(str(found['meta']))['method'] == 'pyramid'


def test_the_maps_of_two_streams_are_one(command, video, tmp_path):
    weights = tmp_path / 'own.safetensors'
    write_safetensors(video_plugins.create_model('mtnet_xs_g8', num_classes=3).state_dict(), weights)
    command('explain', video, '--model', 'mtnet_xs_g8', '--checkpoint', weights, '--style', 'focus', '-o',
            tmp_path / 'tube.png')
    with Image.open(tmp_path / 'tube.png') as image:
        assert image.width == 2 * (image.height - 18) + 4


@pytest.mark.parametrize('name', ['graph.json', 'graph.dot', 'graph.html'])
def test_a_pyramid_is_a_graph_where_the_name_says_so_or_the_option(command, photograph, tmp_path, name):
    out = tmp_path / name
    lines = command('explain', photograph, '--method', 'pyramid', *['--graph'] * (name == 'graph.html'), '--target',
                    'espresso', '--depth', 1, '--topk', 2, '-o', out)
    said = re.fullmatch(r'.*noise.png: espresso.* \((\d+) kernels of (\d+) layers\)', lines[0])
    assert lines[1] == str(out)
    if name == 'graph.json':
        nodes = json.loads(out.read_text())['nodes']
        assert nodes[0]['layer'] == 'fc' and len(nodes) == int(said[1]) == 1 + 2 * (int(said[2]) - 1)
    elif name == 'graph.html':
        assert 'espresso' in out.read_text() and 'data:image/jpeg' in out.read_text()
    else:
        assert out.read_text().startswith('digraph {')


def test_a_graph_is_of_one_file(failure, photograph, tmp_path):
    said = failure('explain', photograph, photograph, '--method', 'pyramid', '-o', tmp_path / 'graph.json')
    assert 'a graph is of one sample and class, FILE must be one, got 2' in said and not list(tmp_path.iterdir())


def test_the_eye_sees_a_folder(command, photograph, tmp_path):
    (tmp_path / 'images').mkdir()
    for index in range(5):
        Image.new('RGB', (64, 64), (50 * index, 0, 255 - 50 * index)).save(tmp_path / 'images' / f'{index}.png')
    lines = command('explain', tmp_path / 'images', photograph, '--method', 'eye', '--facets', 3, '--steps', 2,
                    '--layer', 'layer2', '-o', tmp_path / 'eye.png')
    assert len(lines) == 7 and re.fullmatch(f'{re.escape(str(photograph))}: facet [012]', lines[5])
    with Image.open(tmp_path / 'eye.png') as image:
        assert image.size == (3 * 256 + 8, 2 * (18 + 256) + 4)


@pytest.mark.parametrize('arguments, message', [
    (['--target', 'no such class'], "--target must be a class of the model or its index, 0..199, got 'no such class'"),
    (['--target', '200'], "got '200'"),
    (['--target', 'cat'], 'did you mean'),
    (['--layer', 'layer9'], "layer must name a module that the model calls with these inputs, got 'layer9'; with maps, "
     'the outermost first, are conv1, bn1, act1, maxpool, layer1, layer2, layer3, layer4, layer1.0, layer1.1,'),
    (['--alpha', '3'], 'alpha must be in 0..1, got 3.0'),
    (['--alpha', '3', '-o', 'x.html'], 'alpha must be in 0..1, got 3.0'),
    (['--fit', 'folder'], "--fit needs --method class, got 'tubes'"),
    (['-o', 'x.bmp'], "path must end with .png, .gif, .mp4, .npz, .html, got 'x.bmp'"),
    (['-o', 'none/x.png'], "path must be in a folder that exists, got 'none/x.png'"),
    (['-o', 'x.json'], "a graph, by --graph, .json or .dot, needs --method pyramid, got 'tubes'"),
    (['--method', 'pyramid', '-o', 'x.bmp'], "must end with .png, .gif, .mp4, .npz, .html, .json, .dot, got 'x.bmp'"),
    (['--method', 'pyramid', '--graph', '-o', 'x.png'], "path must end with .html, .json, .dot, got 'x.png'"),
    (['--graph', '-o', 'x.html'], "a graph, by --graph, .json or .dot, needs --method pyramid, got 'tubes'"),
    (['--method', 'pyramid', '-o', 'x.json', '--target', '1', '--target', '2'],
     'a graph is of one sample and class, --target must be one, got 2'),
    (['--method', 'pyramid', '--depth', '0'], 'argument --depth: must be a whole number of at least 1, got 0'),
    (['--method', 'eye', '-o', 'x.html'], "path must end with .png, .gif, .mp4, got 'x.html'"),
    (['--method', 'eye', '--target', '3'], "--target needs --method tubes or class or pyramid, got 'eye'"),
    (['--method', 'eye', '--style', 'strip'], "--style needs --method tubes or class or pyramid, got 'eye'"),
    (['--method', 'pyramid', '--steps', '9'], "--steps needs --method eye, got 'pyramid'"),
    (['--topk', '9'], "--topk needs --method pyramid, got 'tubes'"),
    (['--method', 'pyramid', '--topk', '0'], 'argument --topk: must be a whole number of at least 1, got 0'),
    (['--method', 'eye', '--facets', '0'], 'argument --facets: must be a whole number of at least 1, got 0'),
    (['--method', 'eye', '--steps', '0'], 'argument --steps: must be a whole number of at least 1, got 0'),
    (['--method', 'eye', '--facets', '9'], 'images must be at least as many as the 9 facets, got 1')])
def test_what_cannot_be_explained(failure, photograph, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in failure('explain', photograph, '-o', 'tube.png', *arguments)
    assert not list(tmp_path.iterdir())


def test_json_of_the_result_says_how_it_came_about(command, photograph, tmp_path):
    command('explain', photograph, '--model', 'resnet18_softpool', '--layer', 'layer3', '-o', tmp_path / 'tube.npz')
    meta = json.loads(str(numbers(tmp_path / 'tube.npz')['meta']))
    assert meta['method'] == 'tubes' and meta['weights'] == {'layer3': 'grad'}
