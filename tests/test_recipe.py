"""The training recipe: a killed run goes on as if it had not been, and what it publishes is what it measured."""
import importlib.util
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from timm_softpool.pretrained import file_hash

RECIPE = Path(__file__).parents[1] / 'recipes' / 'tiny_in200.py'
MODEL = 'test_resnet_softpool'


@pytest.fixture
def recipe():
    spec = importlib.util.spec_from_file_location('recipe', RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path):
    """24 images to train on in two shards, 8 to validate with."""
    random = np.random.default_rng(0)
    for name in ('train-00', 'train-01', 'val'):
        rows = []
        for label in range(8 if name == 'val' else 12):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, 'PNG')
            rows.append({'image': {'bytes': buffer.getvalue(), 'path': ''}, 'label': label})
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f'{name}.parquet')
    return tmp_path


@pytest.fixture
def train(recipe, data, monkeypatch, capsys):
    def train(output, **options):
        arguments = [f'--{key}={value}' for key, value in
                     {'data': data, 'output': output, 'model': MODEL, 'epochs': 2, 'batch-size': 8, 'sizes': 32,
                      'workers': 0, **options}.items()]
        monkeypatch.setattr('sys.argv', [str(RECIPE), *arguments])
        recipe.main()
        return capsys.readouterr().out
    return train


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(train, recipe, tmp_path, monkeypatch):
    train(tmp_path / 'whole')
    save = recipe.save

    def save_and_die(checkpoint, path):
        save(checkpoint, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recipe, 'save', save_and_die)
        train(tmp_path / 'killed')
    train(tmp_path / 'killed')
    whole, killed = (next((tmp_path / run).glob('*.safetensors')) for run in ('whole', 'killed'))
    assert file_hash(whole) == file_hash(killed)
    assert [json.loads(line)['epoch'] for line in open(tmp_path / 'whole' / 'log.jsonl')] == [0, 1]


def test_the_published_file_is_named_by_its_hash_and_loads_into_timm(train, tmp_path):
    output = train(tmp_path / 'run', epochs=1)
    path = next((tmp_path / 'run').glob('*.safetensors'))
    assert re.search(rf'^sha256 = "{file_hash(path)}"$', output, re.MULTILINE)
    assert path.name == f'{MODEL}-tiny_in200-{file_hash(path)[:8]}.safetensors'
    model = timm.create_model(MODEL, pretrained=True, num_classes=200,
                              pretrained_cfg_overlay=dict(file=str(path), num_classes=200))
    trained = torch.load(tmp_path / 'run' / 'last.pt', weights_only=True)['model']
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, trained[name], rtol=1e-3, atol=1e-6)


def test_a_run_can_start_from_the_weights_of_another(train, tmp_path):
    train(tmp_path / 'first', epochs=1)
    train(tmp_path / 'second', epochs=1, lr=0, init=tmp_path / 'first' / 'last.pt')
    first, second = (torch.load(tmp_path / run / 'last.pt', weights_only=True)['model'] for run in ('first', 'second'))
    assert torch.equal(first['conv1.0.weight'], second['conv1.0.weight'])


def test_a_folder_without_data_is_named(train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path / 'run', data=tmp_path / 'nothing')
    assert f'no train-*.parquet in {tmp_path / "nothing"}' in capsys.readouterr().err
