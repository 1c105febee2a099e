"""A network as files for others gives the network's logits, and replaces nothing."""
import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch

import video_plugins
from timm_softpool import cli
from timm_softpool.export import export_model


def image_model(**options):
    return timm.create_model('resnet18_softpool', **options).eval()


def video_model():
    return video_plugins.create_model('srtg_r3d_18', num_classes=3, pretrained_cfg_overlay=dict(
        input_size=(3, 32, 32), num_frames=2)).eval()


def logits(model, batch=1):
    cfg = model.pretrained_cfg
    frames = [cfg['num_frames']] if cfg.get('num_frames') else []
    with torch.no_grad():
        return model(torch.ones(batch, 3, *frames, *cfg['input_size'][1:]))


@pytest.mark.parametrize('create', [lambda: image_model(pretrained=True), video_model], ids=['image', 'video'])
def test_timm_loads_the_folder(create, tmp_path):
    model = create()
    export_model(model, tmp_path / 'new' / 'model')
    assert {path.name for path in (tmp_path / 'new' / 'model').iterdir()} == {
        'config.json', 'model.safetensors', 'README.md'}
    assert list((tmp_path / 'new').iterdir()) == [tmp_path / 'new' / 'model']
    again = timm.create_model(f'local-dir:{tmp_path}/new/model', pretrained=True).eval()
    assert torch.equal(logits(again), logits(model))


def test_the_card_has_the_published_figures_and_loads_the_model_as_it_says(tmp_path, capsys):
    assert cli.main(['export', 'resnet18_softpool', '--to', str(tmp_path / 'model')]) == 0
    card = (tmp_path / 'model' / 'README.md').read_text()
    assert 'resnet18_softpool.tiny_in200' in card and '41.79 % top1' in card and 'non-commercial' in card
    namespace = {}
    exec(card.split('```python\n')[1].split('```')[0], namespace)
    assert namespace['model'].num_classes == 200


def test_the_card_of_weights_of_your_own_has_no_published_figures(tmp_path):
    torch.save(image_model().state_dict(), tmp_path / 'mine.pth')
    assert cli.main(['export', 'resnet18_softpool', '--checkpoint', str(tmp_path / 'mine.pth'),
                     '--to', str(tmp_path / 'model')]) == 0
    card = (tmp_path / 'model' / 'README.md').read_text()
    assert 'tiny_in200' not in card and '41.79' not in card and 'not stated' in card
    config = (tmp_path / 'model' / 'config.json').read_text()
    assert 'non-commercial' not in config and 'n01443537' not in config


def test_the_card_claims_no_accuracy_of_weights_that_nobody_named(tmp_path):
    export_model(image_model(), tmp_path / 'model')
    assert '41.79' not in (tmp_path / 'model' / 'README.md').read_text()


def test_the_hub_gets_the_folder_but_keeps_its_card(monkeypatch):
    calls = {}

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repository, exist_ok):
            calls['repository'] = repository

        def file_exists(self, repository, name):
            return name == 'README.md'

        def upload_folder(self, *, folder_path, ignore_patterns, **kwargs):
            calls['files'] = {path.name for path in folder_path.iterdir()} - set(ignore_patterns)

    monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
    export_model(image_model(), 'hf-hub:somebody/pools')
    assert calls == {'repository': 'somebody/pools', 'files': {'config.json', 'model.safetensors'}}


@pytest.mark.parametrize('create', [image_model, video_model], ids=['image', 'video'])
@pytest.mark.parametrize('suffix', ['.onnx', '.pt2'])
def test_a_program_runs_without_us_for_any_batch(create, suffix, tmp_path):
    if suffix == '.onnx':
        pytest.importorskip('onnxscript')
    model, path = create(), tmp_path / f'model{suffix}'
    export_model(model, path)
    expected = logits(model, batch=3)
    torch.save(expected, tmp_path / 'expected.pt')
    run = ('torch.export.load(path).module()(x)' if suffix == '.pt2' else
           "torch.from_numpy(__import__('onnxruntime').InferenceSession(path).run(None, {'input': x.numpy()})[0])")
    shape = (3, 3, *((2, 32, 32) if create is video_model else model.pretrained_cfg['input_size'][1:]))
    subprocess.run([sys.executable, '-W', 'ignore', '-c', f'''
import sys, torch
path, x = {str(path)!r}, torch.ones{shape}
actual = {run}
torch.testing.assert_close(actual, torch.load({str(tmp_path / "expected.pt")!r}), rtol=1e-3, atol=1e-4)
assert not any(name.startswith(('timm_softpool', 'video_plugins')) for name in sys.modules)
'''], check=True)


def test_a_repository_s_weights_are_not_overwritten(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, 'file_exists', lambda self, repository, name: True)
    with pytest.raises(FileExistsError, match='hf-hub:somebody/pools has weights already'):
        export_model(image_model(), 'hf-hub:somebody/pools')


def test_a_program_that_is_not_the_network_is_refused_and_not_left_behind(tmp_path, monkeypatch):
    export = torch.export.export
    monkeypatch.setattr(torch.export, 'export', lambda model, *args, **kwargs: export(image_model(), *args, **kwargs))
    with pytest.raises(ValueError, match=r'the \.pt2 program is not the network: its logits differ by up to'):
        export_model(image_model(), tmp_path / 'model.pt2')
    assert not list(tmp_path.iterdir())


def test_what_exists_is_not_overwritten(tmp_path, capsys):
    (tmp_path / 'model.pt2').write_text('mine')
    assert cli.main(['export', 'resnet18_softpool', '--to', str(tmp_path / 'model.pt2')]) == 2
    assert 'exists already' in capsys.readouterr().err
    assert (tmp_path / 'model.pt2').read_text() == 'mine'


def test_a_network_in_training_mode_is_refused(tmp_path):
    with pytest.raises(ValueError, match='evaluation mode'):
        export_model(image_model().train(), tmp_path / 'model')


def test_missing_onnx_packages_are_named_with_their_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ImportError, match=r'timm-softpool\[export\]'):
        export_model(image_model(), tmp_path / 'model.onnx')
    assert not list(tmp_path.iterdir())
