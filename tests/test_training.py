"""The trainer: a killed run ends as one that was not, two processes train as one, what is published was measured."""
import csv
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from helpers import write_video
from PIL import Image

from timm_softpool.pretrained import file_hash
from timm_softpool.training import Config
from timm_softpool.training import run as training_run
from timm_softpool.training.data import EpochBatches, create_datasets
from timm_softpool.training.module import TrainingModule
from timm_softpool.training.run import train

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
MODEL = 'test_resnet_softpool'
STEPS = 3


def noise(random, size=(32, 32)):
    return Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """24 images to train on in two shards, 9 to validate with; of three classes."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp('images')
    for name, count in (('train-00', 12), ('train-01', 12), ('val', 9)):
        rows = []
        for index in range(count):
            noise(random).save(buffer := io.BytesIO(), 'PNG')
            rows.append({'image': {'bytes': buffer.getvalue(), 'path': ''}, 'label': index % 3})
        pq.write_table(pa.Table.from_pylist(rows), folder / f'{name}.parquet')
    (folder / 'classes.tsv').write_text('label\twnid\tname\n0\tn01443537\tgoldfish\n1\tn02\tcat\n2\tn03\tdog\n')
    return folder


@pytest.fixture
def settings(images, tmp_path):
    return dict(model=MODEL, data=str(images), format='parquet', output=str(tmp_path / 'run'), input_size=[32, 32],
                epochs=2, batch_size=8, workers=0, lr=0.01, ema=0.5, precision='32-true', accelerator='cpu',
                checkpoint_steps=1)


def state(output):
    checkpoint = torch.load(Path(output, 'last.ckpt'), weights_only=True)
    return {**checkpoint['state_dict'], 'step': torch.tensor(checkpoint['global_step']),
            **{f'best.{name}': value for name, value in checkpoint['best']['weights'].items()}}


def assert_same(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **(tolerance or dict(rtol=0, atol=0)), msg=name)


# Interruption.

class Killed(Exception):
    pass


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    """A run that nobody interrupts."""
    output = tmp_path_factory.mktemp('whole')
    train(Config(model=MODEL, data=str(images), format='parquet', output=str(output), input_size=(32, 32), epochs=2,
                 batch_size=8, workers=0, lr=0.01, ema=0.5, precision='32-true', accelerator='cpu'), 'the recipe')
    return output


@pytest.mark.parametrize('is_written', [False, True])
@pytest.mark.parametrize('step', range(1, 2 * STEPS + 1))
def test_a_run_killed_at_any_step_ends_with_the_weights_of_one_that_was_not(settings, whole, step, is_written,
                                                                          monkeypatch):
    save, count = training_run.AtomicCheckpointIO.save_checkpoint, 0

    def save_and_die(*args, **kwargs):
        nonlocal count
        count += 1
        if count < step or is_written:
            save(*args, **kwargs)
        if count == step:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training_run.AtomicCheckpointIO, 'save_checkpoint', save_and_die)
        train(Config(**settings), '')
    train(Config(**settings), '')
    assert_same(state(settings['output']), state(whole))


def test_sigkill_is_survived_also_with_worker_processes(settings, whole, tmp_path):
    settings |= dict(workers=1)
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump(settings))
    command = [sys.executable, '-m', 'timm_softpool.cli', 'train', tmp_path / 'config.yaml']
    process = subprocess.Popen(command, cwd=ROOT)
    while not Path(settings['output'], 'last.ckpt').exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, check=True)
    assert_same(state(settings['output']), state(whole))


def test_a_finished_run_is_published_again_as_it_was(settings):
    first = train(Config(**settings), '')
    assert train(Config(**settings), '') == first
    assert len(list(first.parent.glob('*.safetensors'))) == 1


def test_another_runs_folder_is_left_alone(settings):
    train(Config(**settings), '')
    before = state(settings['output'])
    with pytest.raises(ValueError, match=r'holds a run with other settings.*: lr was 0.01, not 0.5$'):
        train(Config(**{**settings, 'lr': 0.5, 'workers': 1}), '')
    assert_same(state(settings['output']), before)


@pytest.mark.parametrize('name', ['README.md', 'config.yaml'])
def test_a_folder_that_holds_something_else_is_left_alone(settings, tmp_path, name):
    (tmp_path / name).write_text(text := yaml.safe_dump(settings) + '# mine\n')
    with pytest.raises(ValueError, match='output must be a new folder or that of a run, got .*, which holds something'):
        train(Config(**{**settings, 'output': str(tmp_path)}), '')
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == text


def test_a_run_that_was_killed_before_it_saved_anything_begins_anew(settings):
    Path(settings['output']).mkdir()
    Path(settings['output'], 'config.yaml').write_text(Config(**settings).as_yaml())
    assert train(Config(**{**settings, 'epochs': 1}), '').exists()


def test_a_loss_that_is_no_number_is_not_saved(settings):
    with pytest.raises(ValueError, match='the loss is nan after [1-6] steps'):
        train(Config(**{**settings, 'lr': 1e30, 'warmup_epochs': 0}), '')


# Order.

def test_batches_go_on_where_the_training_was():
    whole = [EpochBatches(11, 4, 0, 0, 1, lambda step=step: step) for step in range(4)]
    first, second = list(whole[0]), list(whole[2])
    assert len(whole[0]) == len(first) == 2 and list(whole[1]) == first[1:] and list(whole[3]) == second[1:]
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    assert sorted(first) != sorted(second)


def test_processes_share_each_batch():
    one, *two = (list(EpochBatches(8, 4, 0, rank, world, lambda: 0)) for rank, world in ((0, 1), (0, 2), (1, 2)))
    for batch, *shares in zip(one, *two, strict=True):
        assert sorted(batch) == sorted(sum(shares, [])) and {len(share) for share in shares} == {2}


def test_a_sample_depends_on_seed_epoch_and_index_alone(settings):
    geometry = dict(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0)
    dataset, _ = create_datasets(Config(**settings), geometry)
    image, label = dataset[1, 5]
    dataset[0, 3]
    assert torch.equal(dataset[1, 5][0], image) and label == 5 % 3
    assert not torch.equal(dataset[0, 5][0], image)
    assert not torch.equal(create_datasets(Config(**settings, seed=1), geometry)[0][1, 5][0], image)


def test_images_grow_with_the_epochs(settings):
    dataset, val = create_datasets(Config(**{**settings, 'epochs': 4, 'train_sizes': [16, 24]}),
                                   dict(mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0))
    assert [dataset[epoch, 0][0].shape[1] for epoch in range(4)] == [16, 16, 24, 24]
    assert val[0, 0][0].shape == (3, 32, 32)


# Processes.

def test_two_processes_train_as_one(settings, whole, tmp_path):
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump(settings))
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2',
                    '-m', 'timm_softpool.cli', 'train', tmp_path / 'config.yaml'], cwd=ROOT, check=True,
                   env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert_same(state(settings['output']), state(whole), rtol=2e-3, atol=2e-4)


def test_a_batch_that_does_not_divide_among_the_processes_is_refused(settings, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '3')
    with pytest.raises(ValueError, match='batch_size must be a multiple of the processes, 3, got 8'):
        train(Config(**settings), '')


@pytest.mark.parametrize(('world', 'size'), [(1, 7), (4, 12)])
def test_mixup_needs_pairs_in_each_process(settings, monkeypatch, world, size):
    monkeypatch.setenv('WORLD_SIZE', str(world))
    with pytest.raises(ValueError, match=f'batch_size must be a multiple of twice the processes, {2 * world}, got'):
        train(Config(**{**settings, 'batch_size': size, 'mixup': 0.2}), '')


# What is published.

def test_the_published_file_is_named_by_its_hash_and_has_the_accuracy_of_its_card(settings, images, capsys):
    path = train(Config(**{**settings, 'tag': 'mine', 'description': 'Noise "of" three classes 🐶',
                           'license': 'MIT'}), 'timm-softpool train a.yaml')
    digest, output = file_hash(path), path.parent
    assert path.name == f'{MODEL}-mine-{digest[:8]}.safetensors'
    manifest = tomllib.loads((output / 'manifest.toml').read_text())
    entry, data = manifest['models'][MODEL]['mine'], manifest['data']['mine']
    assert (entry['file'], entry['sha256'], entry['license']) == (path.name, digest, 'MIT')
    assert entry['recipe'] == 'timm-softpool train a.yaml'
    assert data['description'] == 'Noise "of" three classes 🐶'
    assert data['cfg']['label_names'] == ['n01443537', 'n02', 'n03']
    model = timm.create_model(MODEL, pretrained=True, num_classes=3,
                              pretrained_cfg_overlay=dict(file=str(path), num_classes=3)).eval()
    assert next(model.parameters()).dtype == torch.float32
    _, val = create_datasets(Config(**settings), dict(mean=data['cfg']['mean'], std=data['cfg']['std'], crop_pct=1.0))
    images, labels = zip(*[val[0, index] for index in range(len(val))])
    with torch.inference_mode():
        right = (model(torch.stack(images)).argmax(1) == torch.tensor(labels)).float().mean()
    assert entry['metrics']['top1'] == round(100 * right.item(), 2)
    card = (output / 'README.md').read_text()
    for part in (digest, f'{entry["metrics"]["top1"]} % top-1', 'MIT', '24 samples', '9 to validate',
                 'the epoch was chosen by this accuracy'):
        assert part in card
    assert yaml.safe_load(card.split('```yaml\n')[1].split('```')[0])['tag'] == 'mine'
    result = json.loads((output / 'result.json').read_text())
    assert result['top1'] == entry['metrics']['top1']
    assert result['parameters'] == sum(parameter.numel() for parameter in model.parameters())
    assert '\r' not in (printed := capsys.readouterr().out), 'no bar where there is no terminal'
    assert [json.loads(line)['step'] for line in printed.splitlines()[:2]] == [STEPS, 2 * STEPS]


def test_a_card_says_that_an_epoch_was_chosen_only_where_it_was(settings):
    path = train(Config(**{**settings, 'validate_epochs': 2}), '')
    assert 'chosen' not in path.with_name('README.md').read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_run_on_a_gpu_says_so(settings):
    path = train(Config(**{**settings, 'accelerator': 'gpu'}), '')
    assert json.loads(path.with_name('result.json').read_text())['machine'] == torch.cuda.get_device_name()


def test_logs_are_written_for_spreadsheets_and_for_tensorboard(whole):
    rows = list(csv.DictReader(open(next(whole.glob('csv/*/metrics.csv')))))
    assert {'loss', 'lr', 'top1', 'top5'} <= rows[0].keys()
    assert list(whole.glob('tensorboard/*/events.*'))


def test_a_run_can_start_from_the_weights_of_another(settings, whole):
    weights = next(whole.glob('*.safetensors'))
    path = train(Config(**{**settings, 'init': str(weights), 'lr': 0.0, 'epochs': 1}), '')
    first, second = (timm.models.load_state_dict(str(file)) for file in (weights, path))
    assert torch.equal(first['fc.weight'], second['fc.weight'])


def test_weights_for_other_classes_are_no_start(settings, whole):
    path = next(whole.glob('*.safetensors'))
    with pytest.raises(ValueError, match=f"init does not fit, got '{path}': .*size mismatch"):
        train(Config(**{**settings, 'classes': 2, 'init': str(path)}), '')


# Data.

def test_images_train_in_bfloat16_with_all_of_timms_augmentation(settings):
    assert train(Config(**{**settings, 'epochs': 1, 'precision': 'bf16-mixed', 'mixup': 0.2, 'cutmix': 1.0,
                           'auto_augment': 'rand-m3', 'erase': 0.2, 'color_jitter': 0.2, 'classes': 2}), '').exists()


def test_folders_of_images_train(settings, tmp_path):
    random = np.random.default_rng(0)
    for split, name in ((split, name) for split in ('train', 'val') for name in ('cat', 'dog')):
        (folder := tmp_path / 'data' / split / name).mkdir(parents=True)
        for index in range(4):
            noise(random).save(folder / f'{index}.png')
    settings |= dict(format='folder', data=str(tmp_path / 'data'), epochs=1)
    manifest = train(Config(**settings), '').with_name('manifest.toml')
    assert tomllib.loads(manifest.read_text())['data']['trained']['cfg']['label_names'] == ['cat', 'dog']


VIDEO = dict(model='r3d_18_w16', input_size=[32, 32], num_frames=2, epochs=1, batch_size=4, ema=None)


@pytest.fixture(scope='module')
def videos(tmp_path_factory):
    """Six videos of 7 or 3 frames, each of one grey, as a table with two folds."""
    folder, rows = tmp_path_factory.mktemp('videos'), ['label,id,fold']
    for index in range(6):
        frames = torch.full((7 - 4 * (index % 2), 32, 32, 3), 40 * index, dtype=torch.uint8)
        write_video(folder / f'video{index}.mp4', frames)
        rows.append(f'{"dark" if index < 3 else "bright"},video{index},{int(index in (2, 5))}')
    (folder / 'clips.csv').write_text('\n'.join(rows))
    return folder


def test_clips_of_a_table_train_and_are_decoded_once(settings, videos, tmp_path, monkeypatch):
    settings |= dict(VIDEO, format='clips', data=str(videos / 'clips.csv'), fold=1, cache=str(tmp_path / 'cache'))
    path = train(Config(**settings), '')
    result = json.loads(path.with_name('result.json').read_text())
    assert (result['train_samples'], result['val_samples'], result['fold']) == (4, 2, 1)
    assert tomllib.loads(path.with_name('manifest.toml').read_text())['data']['trained']['cfg']['num_frames'] == 2
    monkeypatch.setattr('video_plugins.load_clips', None)
    fresh, _ = create_datasets(Config(**settings), dict(mean=(0,) * 3, std=(1,) * 3))
    clip, label = fresh[0, 2]
    assert clip.shape == (3, 2, 32, 32) and label == 0, 'the third to train on is video3, bright'
    torch.testing.assert_close(clip, torch.full_like(clip, 120 / 255), rtol=0, atol=0.02)


def test_what_is_trained_on_reaches_worker_processes_that_are_not_forks(settings, videos):
    settings |= dict(VIDEO, format='clips', data=str(videos / 'clips.csv'), fold=1)
    dataset, _ = create_datasets(Config(**settings), dict(mean=(0,) * 3, std=(1,) * 3))
    (clip, _), (copied, _) = dataset[0, 2], pickle.loads(pickle.dumps(dataset))[0, 2]
    assert torch.equal(copied, clip)


def test_a_table_of_classes_may_name_more_of_them(settings, images, tmp_path):
    shutil.copytree(images, tmp_path / 'data')
    with open(tmp_path / 'data' / 'classes.tsv', 'a') as file:
        file.write('3\tn04\tbird\n')
    train_set, _ = create_datasets(Config(**{**settings, 'data': str(tmp_path / 'data')}),
                                   dict(mean=(0,) * 3, std=(1,) * 3, crop_pct=1.0))
    assert train_set.samples.label_names == ['n01443537', 'n02', 'n03']


def test_the_pixels_are_normalised_as_the_tag_says(settings):
    module = TrainingModule(Config(**{**settings, 'model': 'tf_efficientnet_b0.ap_in1k'}))
    assert module.geometry['mean'] == (0.5, 0.5, 0.5)


def test_photographs_train_under_each_motion(settings, tmp_path):
    random, folder = np.random.default_rng(0), tmp_path / 'photographs'
    folder.mkdir()
    for index in range(5):
        noise(random, (40, 48)).save(folder / f'{index}.png')
    settings |= dict(VIDEO, format='camera_motion', data=str(folder), hflip=0, batch_size=16, precision='bf16-mixed')
    with pytest.warns(UserWarning, match='on CPUs, clips are trained with precision 32-true'):
        path = train(Config(**settings), '')
    result = json.loads(path.with_name('result.json').read_text())
    assert (result['train_samples'], result['val_samples']) == (32, 8), 'of four photographs and of the fifth'


@pytest.mark.parametrize(('change', 'error', 'message'), [
    (dict(data='nowhere'), FileNotFoundError, r'there is no train\*.parquet in nowhere'),
    (dict(format='folder'), FileNotFoundError, 'data must be a folder with train and val in it, there is no .*train'),
    (dict(batch_size=32), ValueError, 'data must have at least 32 samples to train with, a batch, got 24 in '),
    (dict(model='resnet0'), ValueError, "model must be a name of timm.list_models.., got 'resnet0'"),
    (dict(model='resnet18.no'), ValueError, "model does not fit, got 'resnet18.no': Invalid pretrained tag"),
    (dict(model_args={'drop_rat': 1}), ValueError, "model_args does not fit, got {'drop_rat': 1}: .*drop_rat"),
    (dict(auto_augment='no'), ValueError, "auto_augment must be a policy that timm knows, .*, got 'no'"),
])
def test_data_and_models_that_do_not_fit_are_named(settings, change, error, message):
    with pytest.raises(error, match=message):
        train(Config(**{**settings, **change}), '')


def test_a_table_without_the_column_is_refused(settings, videos):
    with pytest.raises(ValueError, match='the columns label, path or id, and split, got label, id, fold in '):
        train(Config(**{**settings, **VIDEO, 'format': 'clips', 'data': str(videos / 'clips.csv')}), '')
