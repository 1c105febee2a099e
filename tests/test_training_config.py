"""Settings: read from YAML, each checked by its name."""
import re
import sys
from pathlib import Path

import pytest
import yaml

from timm_softpool.cli import main
from timm_softpool.training import Config, load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture
def settings(tmp_path):
    return dict(model='test_resnet_softpool', data=str(tmp_path), format='parquet', output=str(tmp_path / 'run'),
                input_size=[32, 32], epochs=2, batch_size=8, workers=0, lr=0.01, ema=0.5, accelerator='cpu')


@pytest.mark.parametrize(('override', 'message'), [
    ('epochs=0', 'epochs must be at least 1, got 0'),
    ('tag=v1.0', "tag must be of letters, digits and underscores, got 'v1.0'"),
    ('epochs=many', "epochs must be int, got 'many'"),
    ('hflip=1.5', 'hflip must be at most 1, got 1.5'),
    ('lr=fast', "lr must be float, got 'fast'"),
    ('channels_last=1', 'channels_last must be bool, got 1'),
    ('format=zip', "format must be one of folder, parquet, clips, camera_motion, got 'zip'"),
    ('input_size=64', 'input_size must be a list, got 64'),
    ('mean=[0.5]', r'mean must be a list of 3 numbers, got \[0.5\]'),
    ('epoch=3', "unknown setting 'epoch' in .*; did you mean epochs?"),
    ('epochs', "an override must be key=value, got 'epochs'"),
    ('validate_epochs=3', 'validate_epochs must divide epochs, 2, so that the last one is validated, got 3'),
    ('fold=1', "fold is for format 'clips' only, got 1 with format 'parquet'"),
    ('format=camera_motion', "hflip must be 0 with format 'camera_motion', whose labels it would turn round, got 0.5"),
    ('model=[', "model must be set to a value in YAML, got '\\['"),
])
def test_a_bad_setting_is_named_with_its_value_and_what_is_allowed(settings, tmp_path, capsys, override, message):
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump(settings))
    assert main(['train', str(tmp_path / 'config.yaml'), override]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(('text', 'message'), [
    ('model: a\n', 'must set data, format, output'), ('- a\n', 'must hold a mapping of settings, got list'),
    ('a: [', 'is no YAML')])
def test_a_file_that_holds_no_settings_is_refused(tmp_path, text, message):
    (tmp_path / 'config.yaml').write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(tmp_path / 'config.yaml')


def test_settings_survive_their_yaml(settings, tmp_path):
    config = Config(**settings)
    (tmp_path / 'config.yaml').write_text(config.as_yaml())
    assert load_config(tmp_path / 'config.yaml') == config
    assert load_config(tmp_path / 'config.yaml', ['lr=1e-3', 'ema=null']).lr == 1e-3, 'which YAML reads as text'


@pytest.mark.parametrize('recipe', sorted((ROOT / 'recipes').glob('*.yaml')), ids=lambda path: path.stem)
def test_the_recipes_are_valid(recipe):
    assert load_config(recipe).tag == recipe.stem


def test_each_setting_is_explained():
    page = (ROOT / 'docs' / 'training.md').read_text()
    assert [name for name in Config.__dataclass_fields__ if f'`{name}`' not in page] == []


def test_the_extra_is_named_where_lightning_is_missing(settings, tmp_path, capsys, monkeypatch):
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump(settings))
    monkeypatch.delitem(sys.modules, 'timm_softpool.training.run', raising=False)
    monkeypatch.setitem(sys.modules, 'lightning.pytorch', None)
    assert main(['train', str(tmp_path / 'config.yaml')]) == 2
    assert "training needs Lightning: pip install 'timm-softpool[train]'" in capsys.readouterr().err
