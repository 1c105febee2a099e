"""The command ``timm-softpool predict``, as its user sees it."""
import json
import math

import pytest
import timm
import torch
from helpers import write_video
from PIL import Image
from timm.models import save_for_hf

from timm_softpool import cli
from timm_softpool.cli import DEFAULT_MODEL
from timm_softpool.pretrained import PUBLISHED, file_hash, write_safetensors


@pytest.fixture(scope='module')
def weights_folder(tmp_path_factory):
    """A folder with weights of the default model: class 3 has the logit 4, class 1 the logit 3, and all others 0."""
    cfg = timm.get_pretrained_cfg(DEFAULT_MODEL)
    tensors = timm.create_model(DEFAULT_MODEL, num_classes=cfg.num_classes).state_dict()
    tensors['fc.weight'].zero_()
    tensors['fc.bias'].zero_()
    tensors['fc.bias'][3], tensors['fc.bias'][1] = 4, 3
    folder = tmp_path_factory.mktemp('weights')
    write_safetensors(tensors, folder / cfg.file)
    return folder


@pytest.fixture
def weights(weights_folder, monkeypatch):
    """Publishes these weights as the default ones."""
    cfg = timm.get_pretrained_cfg(DEFAULT_MODEL)
    name = f'{DEFAULT_MODEL}.{cfg.tag}'
    monkeypatch.setitem(PUBLISHED, name, {**PUBLISHED[name], 'sha256': file_hash(weights_folder / cfg.file)})
    monkeypatch.setenv('TIMM_SOFTPOOL_WEIGHTS', str(weights_folder))


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """Weights that are neither here nor to be downloaded."""
    def fail(*_, **__):
        raise OSError('no route to host')

    monkeypatch.setenv('TIMM_SOFTPOOL_WEIGHTS', str(tmp_path))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setattr('timm_softpool.pretrained._FOLDER', tmp_path)
    monkeypatch.setattr('torch.hub.urlopen', fail)


@pytest.fixture
def image(tmp_path):
    path = tmp_path / 'image.png'
    Image.effect_noise((80, 60), 90).save(path)
    return path


# Images

@pytest.mark.usefixtures('weights')
def test_predict_prints_the_most_probable_classes_of_an_image(image, command):
    lines = command('predict', image)
    count = timm.get_pretrained_cfg(DEFAULT_MODEL).num_classes
    total = math.exp(4) + math.exp(3) + count - 2
    assert lines[0] == str(image)
    assert len(lines) == 1 + 5
    assert lines[1].startswith(f'  {math.exp(4) / total:6.1%}  ')
    assert lines[2].startswith(f'  {math.exp(3) / total:6.1%}  ')


@pytest.mark.usefixtures('weights')
def test_predict_prints_json_for_programs(image, command):
    first, second = json.loads('\n'.join(command('predict', '--json', '--topk', 2, image, image)))
    assert first == second
    assert first['image'] == str(image)
    assert [row['index'] for row in first['classes']] == [3, 1]
    for row in first['classes']:
        assert set(row) == {'index', 'name', 'probability'}
        assert 0 <= row['probability'] <= 1
        assert row['name'] and isinstance(row['name'], str)


@pytest.mark.usefixtures('weights')
@pytest.mark.parametrize('topk', [7, 10**6])
def test_topk_is_the_number_of_classes_as_far_as_there_are_so_many(topk, image, command):
    result, = json.loads('\n'.join(command('predict', '--json', '--topk', topk, image)))
    classes = result['classes']
    assert len(classes) == min(topk, timm.get_pretrained_cfg(DEFAULT_MODEL).num_classes)
    assert [row['probability'] for row in classes] == sorted((row['probability'] for row in classes), reverse=True)


@pytest.mark.usefixtures('weights')
def test_predict_takes_images_of_any_mode_one_after_the_other(tmp_path, command):
    paths = [tmp_path / f'{mode}.png' for mode in ('L', 'RGB', 'RGBA', 'P', '1', 'I;16')]
    for path in paths:
        Image.new(path.stem, (40, 50)).save(path)
    assert command('predict', '--topk', 1, *paths)[::2] == list(map(str, paths))


@pytest.mark.parametrize('labels', [None, ['cat', 'dog', 'bird'], ['n01443537', 'cat', 'n01629819']],
                         ids=['none', 'words', 'some of ImageNet'])
def test_predict_takes_a_model_from_a_folder_and_its_labels(labels, image, tmp_path, command):
    model = timm.create_model('test_resnet_softpool', num_classes=3)
    save_for_hf(model, tmp_path / 'own', model_config=dict(label_names=labels) if labels else None)
    lines = command('predict', '--model', f'local-dir:{tmp_path / "own"}', image)
    names = {line.split('  ')[-1] for line in lines[1:]}
    assert len(names) == 3
    assert names >= {label for label in labels or ['class 0', 'class 1', 'class 2'] if not label.startswith('n0')}


@pytest.mark.parametrize('option', ['--topk', '--clips'])
@pytest.mark.parametrize('value', [0, -1])
def test_numbers_below_one_are_refused_before_any_work(option, value, failure):
    message = failure('predict', option, value, 'nothing.png')
    assert f'argument {option}: must be a whole number of at least 1, got {value}' in message


@pytest.mark.parametrize(('content', 'message'), [
    (None, 'no such file'),
    (lambda png: png[:len(png) // 2], 'truncated'),
    (lambda png: png[:10], 'cannot identify image file'),
    (lambda png: b'no picture', 'cannot identify image file'),
    (lambda png: b'', 'cannot identify image file'),
], ids=['missing', 'truncated', 'hardly begun', 'text', 'empty'])
def test_an_image_that_cannot_be_read_is_named_with_the_reason(content, message, image, failure):
    png = image.read_bytes()
    image.unlink()
    if content:
        image.write_bytes(content(png))
    text = failure('predict', image)
    assert text.startswith(f'timm-softpool: error: cannot read the image {image}: ')
    assert message in text


def test_a_folder_is_no_image(tmp_path, failure):
    assert f'cannot read the image {tmp_path}: ' in failure('predict', tmp_path)


def test_an_image_beyond_the_limit_of_pillow_is_named(image, failure, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    assert f'cannot read the image {image}: ' in failure('predict', image)


@pytest.mark.usefixtures('weights')
def test_one_bad_image_among_good_ones_is_an_error_without_a_result(image, tmp_path, failure):
    assert 'nothing.png' in failure('predict', image, tmp_path / 'nothing.png')


@pytest.mark.parametrize(('name', 'message'), [
    ('inception_v3_softpool', 'No pretrained weights exist for inception_v3_softpool'),
    ('resnet18_softpol', 'did you mean resnet18_softpool'),
])
def test_predict_with_a_model_that_cannot_is_a_clear_error(name, message, image, failure):
    assert message in failure('predict', '--model', name, image)


@pytest.mark.usefixtures('no_weights')
def test_weights_out_of_reach_are_a_clear_error(image, failure, tmp_path):
    message = failure('predict', '--model', 'resnet34_softpool.stergiou_in1k', image)
    assert 'resnet34_softpool-stergiou_in1k.safetensors' in message
    assert str(tmp_path) in message
    assert 'Traceback' not in message


@pytest.mark.usefixtures('weights')
def test_damaged_weights_are_a_clear_error(image, failure, tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_SOFTPOOL_WEIGHTS', str(tmp_path))
    path = tmp_path / timm.get_pretrained_cfg(DEFAULT_MODEL).file
    path.write_bytes(b'damaged')
    assert f'{path} is damaged' in failure('predict', image)


# Weights of one's own, and videos

@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """``checkpoint(name, suffix)``: weights of a model of three classes whose logits are always 0, 2 and 1."""
    def write(name, suffix='.safetensors'):
        model = timm.create_model(name, num_classes=3)
        classifier = model.get_submodule(model.pretrained_cfg['classifier'])
        torch.nn.init.zeros_(classifier.weight)
        classifier.bias.data = torch.tensor([0., 2, 1])
        path = tmp_path_factory.mktemp('checkpoint') / f'own{suffix}'
        if suffix == '.safetensors':
            write_safetensors(model.state_dict(), path)
        else:
            torch.save({'state_dict': {f'module.{key}': value for key, value in model.state_dict().items()}}, path)
        return path
    return write


@pytest.fixture
def video(networks_for_clips, tmp_path):
    """40 frames, each of one grey: 10, 13, ..., 127."""
    frames = torch.arange(10, 130, 3, dtype=torch.uint8)[:, None, None, None].repeat(1, 48, 64, 3)
    return write_video(tmp_path / 'video.avi', frames, 'mjpeg', 10, 'yuvj420p')


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_predict_takes_a_checkpoint_of_ones_own_with_as_many_classes_as_it_has(suffix, checkpoint, image, command):
    path = checkpoint('test_resnet_softpool', suffix)
    lines = command('predict', image, '--model', 'test_resnet_softpool', '--checkpoint', path)
    assert [line.split('  ')[-1] for line in lines[1:]] == ['class 1', 'class 2', 'class 0']
    assert lines[1].startswith(f'  {math.exp(2) / (1 + math.exp(1) + math.exp(2)):6.1%}  ')


def test_a_checkpoint_of_another_model_is_a_clear_error(checkpoint, image, failure):
    path = checkpoint('test_resnet_softpool')
    message = failure('predict', image, '--model', 'resnet18_softpool', '--checkpoint', path)
    assert 'the checkpoint does not fit resnet18_softpool; missing: ' in message


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('none.pth', None, 'there is no checkpoint'), ('bad.safetensors', b'bad', 'is not a whole checkpoint of tensors')])
def test_a_checkpoint_that_cannot_be_read_is_a_clear_error(name, content, message, image, tmp_path, failure):
    if content:
        (tmp_path / name).write_bytes(content)
    assert message in failure('predict', image, '--model', 'test_resnet_softpool', '--checkpoint', tmp_path / name)


def test_predict_averages_the_clips_of_a_video(video, checkpoint, command, monkeypatch):
    seen = []

    class Brightness(torch.nn.Module):
        """Its logits are ten times the mean of the clip, and 0."""
        pretrained_cfg = dict(num_frames=4, frame_stride=2, input_size=(3, 32, 32), mean=(0,) * 3, std=(1,) * 3)
        num_classes = 2

        def forward(self, clip):
            seen.append(clip)
            return torch.stack([clip.mean() * 10, torch.tensor(0.)])[None]

    monkeypatch.setattr(cli, '_create', lambda *_, **__: Brightness())
    result, = json.loads('\n'.join(command('predict', video, '--clips', 2, '--json')))
    assert [clip.shape for clip in seen] == [(1, 3, 4, 32, 32)] * 2
    levels = torch.stack([clip.mean((0, 1, 3, 4)) * 255 for clip in seen])
    expected = 10 + 3 * torch.tensor([[0., 2, 4, 6], [33, 35, 37, 39]])
    torch.testing.assert_close(levels, expected, atol=2, rtol=0)
    expected = sum(torch.sigmoid(clip.mean() * 10).item() for clip in seen) / 2
    assert result['image'] == str(video)
    assert result['classes'][0] == {'index': 0, 'name': 'class 0', 'probability': pytest.approx(expected, abs=1e-4)}


def test_a_network_for_clips_classifies_videos_and_still_images(video, image, checkpoint, command):
    options = '--model', 'mtnet_xs_g8', '--checkpoint', checkpoint('mtnet_xs_g8'), '--clips', 1, '--topk', 1
    lines = command('predict', video, image, *options)
    assert lines[::2] == [str(video), str(image)]
    assert {line.split('  ')[-1] for line in lines[1::2]} == {'class 1'}


@pytest.mark.usefixtures('weights')
def test_a_video_for_an_image_network_is_an_error_that_names_the_way(video, failure):
    message = failure('predict', video)
    assert f'cannot read the image {video}: ' in message
    assert 'if it is a video, name a --model for clips, such as mtnet_xs_g8' in message


@pytest.mark.usefixtures('networks_for_clips')
def test_a_video_that_cannot_be_read_is_named(tmp_path, checkpoint, failure):
    (tmp_path / 'broken.mp4').write_bytes(b'broken')
    options = '--model', 'mtnet_xs_g8', '--checkpoint', checkpoint('mtnet_xs_g8')
    assert f'{tmp_path / "broken.mp4"} is no video that FFmpeg can read' in failure(
        'predict', tmp_path / 'broken.mp4', *options)


def test_a_network_for_clips_without_weights_is_a_clear_error(video, failure):
    assert 'No pretrained weights exist for mtnet_xs_g8' in failure('predict', '--model', 'mtnet_xs_g8', video)
