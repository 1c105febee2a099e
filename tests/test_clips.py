"""Clips of video files: which frames, how they are cut, and what is said of files that cannot be read."""
import functools
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform
from torchvision.transforms.functional import to_pil_image

from video_plugins import clip_config, create_model, load_clip, load_clips

av = pytest.importorskip('av', reason="needs the extra 'video'")

RAW = dict(size=48, mean=(0, 0, 0), std=(1, 1, 1))  # the pixels themselves, 0..1, of a video of 48 px

# Name -> options of `write`: many ways to store 40 frames at 10 a second.
FILES = {
    'b-frames.mp4': dict(options={'g': '12', 'bf': '3'}),
    'open_gop.mp4': dict(options={'g': '12', 'x264-params': 'open-gop=1:bframes=3:scenecut=0'}),
    'one_keyframe.mkv': {},
    'open_gop.mkv': dict(codec='mpeg2video', rate=25, options={'g': '9', 'bf': '2'}),
    'b-frames.avi': dict(codec='mpeg4', options={'g': '9', 'bf': '2'}),
    'vp8.webm': dict(codec='libvpx', options={'g': '9'}),
    'no_duration.webm': dict(codec='libvpx', options={'g': '9'}, muxer={'live': '1'}),
    'broadcast.ts': dict(options={'g': '10', 'bf': '2'}),
    'flash.flv': dict(codec='flv1', options={'g': '10'}),
    'no_timestamps.h264': dict(options={'g': '10', 'bf': '2'}),
    'animation.gif': dict(codec='gif', pixels='rgb8'),
    'fractional_rate.mp4': dict(rate=Fraction(30000, 1001), options={'g': '10'}),
    'late.mp4': dict(ticks=[5000 + 100 * index for index in range(40)], options={'g': '10'}),
    'late.mkv': dict(ticks=[5000 + 100 * index for index in range(40)], options={'g': '10'}),
}


def frame(index, size=(48, 48)):
    """Frame ``index`` of our videos, uint8 (H, W, 3): a colour of its own, and a brighter corner on the upper left."""
    array = torch.tensor([[[index * 5, 255 - index * 5, index * 50 % 256]]]).repeat(size[1], size[0], 1).byte()
    array[:size[1] // 4, :size[0] // 4] = 255
    return array


def write(path, codec='libx264', rate=10, count=40, size=(48, 48), pixels='yuv420p', options=None, ticks=None,
          muxer=None, rotation=0, aspect=None, sound=False):
    """A video of ``count`` frames; ``ticks`` are their times in milliseconds."""
    with av.open(path, 'w', options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if rotation:
            stream.set_display_rotation(rotation)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        base = Fraction(1, 1000) if ticks else 1 / Fraction(rate)
        stream.codec_context.time_base = base
        if sound:
            write_sound(container)
        for index in range(len(ticks or range(count))):
            picture = av.VideoFrame.from_ndarray(frame(index, size).numpy(), format='rgb24')
            picture.pts, picture.time_base = ticks[index] if ticks else index, base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def write_sound(container):
    stream = container.add_stream('pcm_s16le' if container.format.name == 'wav' else 'aac', rate=8000)
    stream.layout = 'mono'
    sound = av.AudioFrame.from_ndarray(torch.zeros(1, 8000).short().numpy(), format='s16', layout='mono')
    sound.rate, sound.pts = 8000, 0
    container.mux(stream.encode(sound))
    container.mux(stream.encode())


def decode(path):
    """All frames of a file, uint8 (3, T, H, W), and their times in seconds after the first."""
    with av.open(path) as container:
        frames = list(container.decode(video=0))
    images = torch.stack([torch.from_numpy(image.to_ndarray(format='rgb24')) for image in frames])
    times = [float((image.pts - frames[0].pts) * image.time_base) for image in frames if image.pts is not None]
    return images.permute(3, 0, 1, 2), times


def read(path, **arguments):
    """The pixels of a clip, uint8 (3, T, H, W)."""
    return (load_clip(path, **{**RAW, **arguments})[0] * 255).round().byte()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """The path of one of `FILES`."""
    folder = tmp_path_factory.mktemp('clips')
    return functools.cache(lambda name: write(folder / name, **FILES[name]))


@pytest.fixture
def impatient(monkeypatch):
    """Seeks wherever there is something to skip."""
    monkeypatch.setattr('video_plugins.decode.PATIENCE', 0.0)


# Which frames

@pytest.mark.usefixtures('impatient')
@pytest.mark.parametrize('name', FILES)
def test_every_clip_of_every_kind_of_file_has_the_frames_of_a_full_decode(name, files):
    images, _ = decode(files(name))
    rate = float(FILES[name].get('rate', 10))
    assert images.shape[1] == 40
    for first in range(0, 40, 3):
        indices = [min(first + 7 * step, 39) for step in range(4)]
        clip = read(files(name), start=first / rate, num_frames=4, frame_stride=7)
        assert torch.equal(clip, images[:, indices]), first


@pytest.mark.parametrize('name', FILES)
def test_clips_spread_from_the_first_frame_to_the_last(name, files):
    images, _ = decode(files(name))
    clips = (load_clips(files(name), 3, num_frames=4, frame_stride=3, **RAW) * 255).round().byte()
    for clip, first in zip(clips, (0, 15, 30)):
        assert torch.equal(clip, images[:, first:first + 10:3])


def test_a_single_clip_of_a_number_of_clips_is_the_middle_of_the_video(files):
    images, _ = decode(files('b-frames.mp4'))
    middle = load_clips(files('b-frames.mp4'), 1, num_frames=4, frame_stride=3, **RAW)
    assert torch.equal((middle[0] * 255).round().byte(), images[:, 15:25:3])


def test_clips_come_in_the_order_of_their_starts(files):
    path, starts = files('b-frames.mp4'), [2.1, 0.4, 0.4, 3.0]
    clips = load_clips(path, starts, num_frames=3, **RAW)
    assert torch.equal(clips, torch.cat([load_clip(path, 3, start=start, **RAW) for start in starts]))


@settings(max_examples=25)
@given(st.data())
def test_the_moments_are_evenly_spaced_at_a_variable_rate(tmp_path_factory, data):
    gaps = data.draw(st.lists(st.sampled_from([20, 30, 70, 110, 400]), min_size=10, max_size=20))
    path = tmp_path_factory.mktemp('variable') / 'variable.mkv'
    write(path, ticks=[sum(gaps[:index]) for index in range(len(gaps))], options={'g': '6', 'bf': '0'})
    images, times = decode(path)
    with av.open(path) as container:
        rate = float(container.streams.video[0].average_rate)
    start = data.draw(st.floats(0, times[-1]))
    stride = data.draw(st.sampled_from([1, 1.5, 4]))
    moments = [start + (step * stride + 0.5) / rate for step in range(5)]
    expected = [max(index for index, time in enumerate(times) if time <= moment) for moment in moments]
    assert torch.equal(read(path, start=start, num_frames=5, frame_stride=stride), images[:, expected])


def test_a_clip_that_reaches_beyond_the_end_repeats_the_last_frame(files):
    images, _ = decode(files('b-frames.mp4'))
    assert torch.equal(read(files('b-frames.mp4'), start=3.5, num_frames=6), images[:, [35, 37, 39, 39, 39, 39]])


def test_clips_of_a_video_shorter_than_one_begin_with_it(tmp_path):
    path = write(tmp_path / 'short.mp4', count=3)
    assert torch.equal(load_clips(path, 2, **RAW), load_clip(path, **RAW).expand(2, -1, -1, -1, -1))


def test_a_start_between_two_frames_takes_the_nearer(files):
    images, _ = decode(files('b-frames.mp4'))
    assert torch.equal(read(files('b-frames.mp4'), start=1.24, num_frames=1), images[:, [12]])
    assert torch.equal(read(files('b-frames.mp4'), start=1.26, num_frames=1), images[:, [13]])
    assert torch.equal(read(files('b-frames.mp4'), start=3.99, num_frames=1), images[:, [39]]), 'there is none after it'


@pytest.mark.parametrize('name', ['still.png', 'still.jpg', 'still.bmp'])
def test_a_still_image_is_a_video_of_one_frame(name, tmp_path):
    Image.fromarray(frame(7).numpy()).save(tmp_path / name)
    expected, _ = decode(tmp_path / name)
    assert torch.equal(read(tmp_path / name, num_frames=3), expected.expand(-1, 3, -1, -1))


@pytest.mark.parametrize('name', ['sound.mp4', 'sound.mkv'])
def test_sound_does_no_harm(name, tmp_path):
    path = write(tmp_path / name, sound=True)
    assert torch.equal(read(path, start=2), decode(path)[0][:, [min(20 + 2 * index, 39) for index in range(16)]])


# How they are cut

def test_by_default_a_clip_is_as_our_networks_take_it(files):
    clip = load_clip(files('b-frames.mp4'))
    assert (clip.shape, clip.dtype, clip.is_contiguous()) == ((1, 3, 16, 224, 224), torch.float32, True)
    config = clip_config(create_model('mtnet_xs', device='meta'))
    assert torch.equal(clip, load_clips(files('b-frames.mp4'), [0], **config))


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
@pytest.mark.parametrize(('shape', 'size', 'crop_pct'), [
    ((96, 64), (32, 32), 1.0), ((64, 97), (32, 32), 0.875), ((50, 50), (65, 65), 0.9), ((96, 64), (40, 24), 1.0)])
def test_scaling_cutting_and_normalising_are_those_of_timm(shape, size, crop_pct, interpolation, tmp_path):
    path = write(tmp_path / 'video.mkv', codec='ffv1', pixels='bgr0', size=shape, count=1)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    transform = create_transform((3, *size), interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct)
    expected = transform(to_pil_image(decode(path)[0][:, 0]))
    clip = load_clip(path, 1, size=size, crop_pct=crop_pct, interpolation=interpolation, mean=mean, std=std)
    torch.testing.assert_close(clip[0, :, 0], expected, atol=2.01 / 255 / min(std), rtol=0)


@pytest.mark.parametrize('rotation', [90, 180, -90])
def test_a_rotated_video_is_turned_upright(rotation, tmp_path):
    path = write(tmp_path / 'turned.mp4', size=(64, 48), rotation=rotation, count=5)
    upright = decode(path)[0].rot90(rotation // 90, (2, 3))
    assert torch.equal(read(path, num_frames=2, size=upright.shape[2:]), upright[:, [0, 2]])


@pytest.mark.parametrize(('rotation', 'size'), [(0, (48, 96)), (90, (96, 48))])
def test_pixels_become_square(rotation, size, tmp_path):
    path = write(tmp_path / 'wide.mp4', rotation=rotation, aspect=Fraction(2, 1), count=1)
    whole = read(path, num_frames=1, size=size)[:, 0]
    corner = whole[0] > 128
    assert [int(corner.any(axis).sum()) for axis in (1, 0)] == [side // 4 for side in size]
    top, left = size[0] // 2 - 24, size[1] // 2 - 24
    assert torch.equal(read(path, num_frames=1)[:, 0], whole[:, top:top + 48, left:left + 48])


@pytest.mark.parametrize(('codec', 'pixels'), [
    ('ffv1', 'gray'), ('ffv1', 'yuv420p10le'), ('ffv1', 'gray16le'), ('ffv1', 'bgra'), ('ffv1', 'yuva420p'),
    ('ffv1', 'rgb48le'), ('mjpeg', 'yuvj420p')])
def test_grey_deep_and_transparent_pixels_become_rgb(codec, pixels, tmp_path):
    path = write(tmp_path / 'video.mkv', codec=codec, pixels=pixels, count=6)
    clip = read(path, num_frames=3).int()
    assert torch.equal(clip, decode(path)[0][:, :5:2].int())
    if pixels.startswith('gray'):
        assert torch.equal(clip[0], clip[2])
    else:
        colours = torch.stack([frame(index)[-1, -1] for index in (0, 2, 4)], 1)
        torch.testing.assert_close(clip[:, :, -1, -1], colours.int(), atol=8, rtol=0)


def test_odd_sizes_are_read(tmp_path):
    path = write(tmp_path / 'odd.mkv', codec='ffv1', size=(51, 37), count=4)
    assert torch.equal(read(path, num_frames=2, size=(37, 51)), decode(path)[0][:, [0, 2]])


# What cannot be read

@pytest.mark.parametrize(('content', 'message'), [
    (b'', 'is empty'), (b'no video at all' * 99, 'is no video'), (b'RIFF\0\0\0\0AVI LIST', 'is no video')])
def test_a_file_that_is_no_video_is_named(content, message, tmp_path):
    (tmp_path / 'broken.mp4').write_bytes(content)
    with pytest.raises(ValueError, match=f'broken.mp4 {message}'):
        load_clip(tmp_path / 'broken.mp4')


@pytest.mark.parametrize(('name', 'error'), [('.', IsADirectoryError), ('nothing.mp4', FileNotFoundError)])
def test_a_path_without_a_file_raises_what_open_raises(name, error, tmp_path):
    with pytest.raises(error, match=str(tmp_path)):
        load_clip(tmp_path / name)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(tmp_path / 'sound.wav', 'w') as container:
        write_sound(container)
    with pytest.raises(ValueError, match='sound.wav has no video, only audio'):
        load_clip(tmp_path / 'sound.wav')


def test_a_video_without_frames_is_an_error(files, tmp_path):
    (tmp_path / 'header.mkv').write_bytes(files('one_keyframe.mkv').read_bytes()[:900])
    with pytest.raises(ValueError, match='header.mkv holds no frame'):
        load_clip(tmp_path / 'header.mkv')


@pytest.mark.parametrize('name', FILES)
def test_a_start_beyond_the_end_names_the_duration(name, files):
    end = 40 / float(FILES[name].get('rate', 10))
    with pytest.raises(ValueError, match=rf'start must be less than the duration of .*{name}, {end:.3f} s, got 4.1'):
        load_clip(files(name), start=4.1, **RAW)


@pytest.fixture
def torn(tmp_path):
    """A file of ten keyframes whose second half is missing, and the whole one."""
    whole = write(tmp_path / 'whole.mkv', count=100, codec='mpeg4', options={'g': '10'})
    data = whole.read_bytes()
    (tmp_path / 'torn.mkv').write_bytes(data[:len(data) // 2])
    return tmp_path / 'torn.mkv', whole


def test_a_clip_before_the_damage_is_read(torn):
    assert torch.equal(*(read(path, start=1.5) for path in torn))


@pytest.mark.parametrize('start', [4.0, 9.0])
def test_missing_frames_are_not_made_up(start, torn):
    with pytest.raises(ValueError, match=r'torn.mkv is damaged: it should last 10.00 s, .* frames end after 4.\d\d s'):
        load_clip(torn[0], start=start)


def test_clips_spread_over_a_torn_file_are_an_error(torn):
    with pytest.raises(ValueError, match='torn.mkv is damaged'):
        load_clips(torn[0], 3)


@pytest.fixture
def spoilt(tmp_path):
    """A file of ten keyframes with a spoilt one at 3 s, and the whole one."""
    whole = write(tmp_path / 'whole.mp4', count=100, options={'g': '10', 'x264-params': 'scenecut=0'})
    with av.open(whole) as container:
        packet = [packet for packet in container.demux(video=0) if packet.is_keyframe][3]
        data = bytearray(whole.read_bytes())
        data[packet.pos:packet.pos + packet.size] = bytes(packet.size)
    (tmp_path / 'spoilt.mp4').write_bytes(data)
    return tmp_path / 'spoilt.mp4', whole


def test_a_clip_that_needs_damaged_frames_is_an_error(spoilt):
    with pytest.raises(ValueError, match=r'spoilt.mp4 is damaged after [23].\d\d s: Invalid data'):
        load_clip(spoilt[0], start=2)


def test_a_clip_behind_the_damage_is_read_for_what_lies_before_is_not_decoded(spoilt):
    assert torch.equal(*(read(path, start=5.5) for path in spoilt))


# Arguments

@pytest.mark.parametrize(('arguments', 'error', 'message'), [
    (dict(num_frames=0), ValueError, 'num_frames must be positive and finite, got 0'),
    (dict(num_frames=1.5), TypeError, 'float'),
    (dict(frame_stride=0), ValueError, 'frame_stride must be positive and finite, got 0'),
    (dict(size=0), ValueError, 'size must be positive and finite, got 0'),
    (dict(size=(1, 2, 3)), ValueError, 'size must be an integer or a sequence of 2 integers'),
    (dict(crop_pct=1.5), ValueError, 'crop_pct must be at most 1, got 1.5'),
    (dict(std=(1, 0, 1)), ValueError, 'std must be positive and finite, got 0'),
    (dict(mean=(1, 2)), ValueError, r'mean must have a number for each of red, green and blue, got \(1, 2\)'),
    (dict(interpolation='linear'), ValueError, "'linear' is not a valid InterpolationMode"),
    (dict(decoder='cv2'), ValueError, "decoder must be one of pyav, torchcodec, got 'cv2'"),
    (dict(start=-1), ValueError, r'starts must be moments of the video, from 0 s on, .*, got \[-1\]'),
    (dict(start=float('nan')), ValueError, r'got \[nan\]'),
], ids=str)
def test_an_argument_that_makes_no_sense_is_named(arguments, error, message, files):
    with pytest.raises(error, match=message):
        load_clip(files('b-frames.mp4'), **arguments)


@pytest.mark.parametrize('starts', [0, -1, []])
def test_at_least_one_clip_has_to_be_asked_for(starts, files):
    with pytest.raises(ValueError, match='starts must be'):
        load_clips(files('b-frames.mp4'), starts)


def test_the_configuration_of_an_image_network_is_none_for_clips():
    model = torch.nn.Linear(1, 1)
    model.pretrained_cfg = {'architecture': 'resnet18'}
    with pytest.raises(ValueError, match='model must be a network for clips, .*, got resnet18'):
        clip_config(model)


# Decoders

def test_without_pyav_the_networks_work_and_a_clip_names_the_extra():
    program = '''if True:
        import sys
        sys.modules['av'] = None
        import video_plugins
        try:
            video_plugins.load_clip('clip.mp4')
        except ImportError as error:
            print(error)
    '''
    run = subprocess.run([sys.executable, '-W', 'ignore', '-c', program], capture_output=True, text=True, check=True)
    assert "PyAV: pip install 'timm-softpool[video]'" in run.stdout


@pytest.mark.parametrize('name', ['b-frames.mp4', 'vp8.webm', 'fractional_rate.mp4'])
def test_torchcodec_gives_the_same_pixels(name, files):
    arguments = dict(num_frames=5, frame_stride=3, decoder='torchcodec')
    try:
        clips = load_clips(files(name), 4, **arguments)
    except ImportError as error:
        pytest.skip(f'torchcodec cannot decode here: {error}')
    assert torch.equal(clips, load_clips(files(name), 4, **{**arguments, 'decoder': 'pyav'}))
