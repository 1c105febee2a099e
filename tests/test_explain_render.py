"""Pictures of explanations: what is where in them, and files that are read back."""
import json
import os
import re
import shutil
import subprocess

import av
import numpy as np
import pytest
import torch
from PIL import Image

from explain import Explanation
from explain.files import written
from explain.render import captioned, colours, panels, save, save_gallery, to_frames, visualize_tube

SIDE = 224


def explanation(clips=True, batch=1, layers=('stem', 'last')):
    """Maps that are largest at the first row and column of the last frame; class 2 for all."""
    grid = (2, 4, 4) if clips else (4, 4)
    maps = torch.zeros(batch, 1, *grid)
    maps[(..., -1, 0, 0) if clips else (..., 0, 0)] = 1
    size = (4, 16, 16) if clips else (16, 16)
    return Explanation({layer: maps for layer in layers}, torch.full((batch,), 2), torch.zeros(batch, 5), size, 'tubes',
                       {'why': {}})


def inputs(clips=True, batch=1):
    return torch.rand(batch, 3, *((4, 16, 16) if clips else (16, 16)), generator=torch.Generator().manual_seed(0))


def test_pixels_are_what_they_were_before_they_were_normalised():
    pixels = torch.rand(2, 3, 4, 5)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    scaled = (pixels - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
    frames = to_frames(scaled, mean, std)
    assert frames.shape == (2, 1, 4, 5, 3) and frames.dtype == np.uint8
    np.testing.assert_array_equal(frames[:, 0], (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy())


def test_without_mean_and_std_each_image_is_stretched_and_one_channel_is_grey():
    frames = to_frames(torch.linspace(-3, 9, 16).reshape(1, 1, 4, 4))
    assert frames.min() == 0 and frames.max() == 255
    assert (frames[..., 0] == frames[..., 1]).all() and (frames[..., 0] == frames[..., 2]).all()


def test_jet_goes_from_blue_over_green_to_red():
    blue, green, red = colours(np.array([0.0, 0.5, 1.0]))
    assert blue.tolist() == [0, 0, 128] and green.tolist() == [128, 255, 128] and red.tolist() == [128, 0, 0]
    assert colours(np.array([1.0]), 'viridis').tolist() == [[253, 231, 37]]
    with pytest.raises(ValueError, match="cmap must be 'jet' or one of matplotlib's colour maps, got 'no'"):
        colours(np.zeros(1), 'no')


def test_styles():
    frames, tube = np.full((10, 8, 8, 3), 100, np.uint8), np.zeros((10, 8, 8))
    tube[:, 0, 0] = 1
    half = visualize_tube(frames, tube, alpha=0.5)
    assert half[0, 0, 0].tolist() == [114, 50, 50] and half[0, 7, 7].tolist() == [50, 50, 114]
    np.testing.assert_array_equal(visualize_tube(frames, tube, alpha=0), frames)
    focus = visualize_tube(frames, tube, style='focus')
    assert focus[0, 0, 0].tolist() == [100] * 3 and focus[0, 7, 7].tolist() == [8] * 3
    assert visualize_tube(frames, tube, style='strip').shape == (1, 8, 8 * 8 + 7 * 4, 3)  # 8 of the 10 frames
    stack = visualize_tube(frames, tube, style='stack')
    assert stack.shape[0] == 1 and stack.shape[1] > 8


@pytest.mark.parametrize('options, message', [
    (dict(style='heat'), "style must be one of overlay, focus, strip, stack, got 'heat'"),
    (dict(alpha=2), 'alpha must be in 0..1, got 2'),
    (dict(tube=np.zeros((1, 8, 8))), r'tube must have the shape \(2, 8, 8\) of the frames, got \(1, 8, 8\)')])
def test_what_cannot_be_shown(options, message):
    with pytest.raises(ValueError, match=message):
        visualize_tube(**{'frames': np.zeros((2, 8, 8, 3), np.uint8), 'tube': np.zeros((2, 8, 8)), **options})


def test_a_list_of_streams_is_not_shown(tmp_path):
    with pytest.raises(TypeError, match='inputs must be one tensor, of several that which is to be seen, got list'):
        explanation().save(tmp_path / 'tube.png', [inputs()])


def test_inputs_are_as_many_as_were_explained(tmp_path):
    with pytest.raises(ValueError, match='inputs must be the 2 that were explained, got 1'):
        explanation(batch=2).save(tmp_path / 'tube.png', inputs())


def test_a_caption_too_long_for_its_clip_keeps_its_ends():
    panel = np.zeros((1, 10, 60, 3), np.uint8)
    long = captioned(panel, 'clip of a camera 07')
    assert long.shape == (1, 28, 60, 3)
    np.testing.assert_array_equal(long, captioned(panel, 'clip of another camera 07'))
    assert not (long == captioned(panel, 'clip of a camera 08')).all()
    assert captioned(panel, '') is panel


def test_panels_stand_in_rows_of_inputs_and_columns_of_layers():
    both = explanation(clips=False, batch=2)
    fused = panels(both, inputs(clips=False, batch=2))
    assert fused.shape == (1, 2 * (SIDE + 18) + 4, 2 * SIDE + 4, 3)
    assert panels(both, inputs(clips=False, batch=2), layers='all').shape[2] == 3 * SIDE + 8
    assert panels([both, both], inputs(clips=False, batch=2), layers=['last']).shape[1] == 4 * (SIDE + 18) + 12
    shown = panels(both, inputs(clips=False, batch=2), alpha=1)
    assert shown[0, 20, SIDE + 8].tolist() == [128, 0, 0] and shown[0, SIDE, 2 * SIDE].tolist() == [0, 0, 128]
    assert panels(explanation(), inputs()).shape[0] == 4
    strips = panels(explanation(), inputs(), layers='all', style='strip')
    assert strips.shape == (1, 2 * (SIDE + 18) + 4, 5 * SIDE + 4 * 4, 3), 'a row for each layer'


def test_inputs_are_called_by_their_captions(tmp_path):
    both, images = explanation(clips=False, batch=2), inputs(clips=False, batch=2)
    plain, named = panels(both, images), panels(both, images, captions=['one.png', 'input 1'])
    assert not (plain[:, :18] == named[:, :18]).all() and (plain[:, 18:] == named[:, 18:]).all()
    for name in ('tube.png', 'tube.html'):
        with pytest.raises(ValueError, match='captions must be one for each of the 2 inputs, got 1'):
            both.save(tmp_path / name, images, captions=['one.png'])


def test_classes_are_called_by_their_names():
    one, two = ([f'{word}{index}' for index in range(5)] for word in 'ab')
    pictures = [panels(explanation(clips=False), inputs(clips=False), names=names) for names in (one, two, None)]
    assert [picture.shape for picture in pictures] == [pictures[0].shape] * 3
    assert not (pictures[0] == pictures[1]).all() and not (pictures[0] == pictures[2]).all()


@pytest.mark.parametrize('suffix, frames', [('png', 1), ('gif', 4), ('mp4', 4)])
def test_pictures_are_read_back(tmp_path, suffix, frames):
    path = tmp_path / f'tube.{suffix}'
    explanation().save(path, inputs())
    if suffix == 'mp4':
        with av.open(path) as container:
            assert sum(1 for _ in container.decode(video=0)) == frames
    else:
        with Image.open(path) as image:
            assert getattr(image, 'n_frames', 1) == frames
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


def test_numbers_are_read_back_exactly(tmp_path):
    wanted = explanation(batch=2)
    wanted.save(tmp_path / 'tube.npz')
    with np.load(tmp_path / 'tube.npz') as arrays:
        assert set(arrays) == {'maps/stem', 'maps/last', 'logits', 'target', 'meta'}
        np.testing.assert_array_equal(arrays['maps/last'], wanted.maps['last'])
        assert json.loads(str(arrays['meta'])) == {'method': 'tubes', 'input_size': [4, 16, 16], 'why': {}}
    save([wanted, wanted], tmp_path / 'two.npz')
    with np.load(tmp_path / 'two.npz') as arrays:
        assert {'0/maps/last', '1/maps/last'} <= set(arrays)


def test_a_file_that_cannot_be_made_is_called_by_its_name(tmp_path):
    with pytest.raises(OSError, match=r"'.*/none/tube\.png'$"), written(tmp_path / 'none' / 'tube.png'):
        pass


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / 'tube.png'
    path.write_text('old')
    with pytest.raises(ValueError, match='path must end with .png, .gif, .mp4, .npz, .html, got .*bmp'):
        explanation().save(tmp_path / 'tube.bmp', inputs())
    with pytest.raises(FileNotFoundError, match='path must be in a folder that exists, got .*none'):
        explanation().save(tmp_path / 'none' / 'tube.png', inputs())
    monkeypatch.setattr(os, 'access', lambda *_: False)  # root, who may run this, can write everywhere
    with pytest.raises(PermissionError, match='path must be in a folder that can be written to, got .*tube.png'):
        explanation().save(path, inputs())
    monkeypatch.undo()
    with pytest.raises(ValueError, match='inputs must be given to show an explanation as .png, got None'):
        explanation().save(path)
    with pytest.raises(ValueError, match='style must be one of'):
        explanation().save(path, inputs(), style='no')
    assert path.read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_a_gallery_has_the_rows_and_items_that_it_is_given(tmp_path):
    save_gallery([inputs(batch=3), inputs(batch=3)], tmp_path / 'eye.png', [['a', 'b', 'c'], ['d', 'e', 'f']])
    with Image.open(tmp_path / 'eye.png') as image:
        assert image.size == (3 * SIDE + 8, 2 * (18 + SIDE) + 4)
    save_gallery([inputs(batch=2)], tmp_path / 'eye.gif')
    with Image.open(tmp_path / 'eye.gif') as image:
        assert image.n_frames == 4
    with pytest.raises(ValueError, match='path must end with .png, .gif, .mp4, got .*html'):
        save_gallery([inputs()], tmp_path / 'eye.html')


def test_the_page_needs_nothing_else_and_no_name_ends_its_script(tmp_path):
    names = ['', '', '</script><b>', '', '']
    explanation().save(tmp_path / 'tube.html', inputs(), layers='all', names=names)
    page = (tmp_path / 'tube.html').read_text()
    assert not re.search(r'(src|href)=|https?://|@import|</script><b>', page)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert [panel['label'] for panel in data['panels']] == ['</script><b> stem', '</script><b> last']
    assert [len(panel['maps']) for panel in data['panels']] == [4, 4] and len(data['clips'][0]) == 4


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


@pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium')
def test_the_page_draws_the_tube_over_the_clip(tmp_path):
    still = torch.full((1, 3, 16, 16), 0.5)
    explanation(clips=False).save(tmp_path / 'tube.html', still, mean=(0, 0, 0), std=(1, 1, 1), alpha=1.0)
    subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=5000',
                    '--window-size=900,900', f'--screenshot={tmp_path / "page.png"}',
                    (tmp_path / 'tube.html').as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(tmp_path / 'page.png') as image:
        pixels = np.asarray(image.convert('RGB')).astype(int)
    reds = (pixels[..., 0] - pixels[..., 1:].max(-1) > 100).nonzero()
    blues = (pixels[..., 2] - pixels[..., :2].max(-1) > 100).nonzero()
    assert len(reds[0]) > 100 and len(blues[0]) > 1000
    assert reds[0].mean() < blues[0].mean() and reds[1].mean() < blues[1].mean()  # above and to the left
