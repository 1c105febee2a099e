"""Classify two photographs and name the motion of a clip with the shipped weights, halve the photographs, and explain.

The halves show what SoftPool keeps of them. The clip needs the extra `video`.

    python examples/demo.py --output demo
"""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from timm_softpool import soft_pool2d
from timm_softpool.cli import main as timm_softpool_command

PHOTOGRAPHS = {'chelsea': skimage.data.chelsea, 'coffee': skimage.data.coffee}
MOTION_MODEL = 'r3d_18_w16'
POOLS = {'SoftPool': soft_pool2d, 'average': F.avg_pool2d, 'maximum': F.max_pool2d}


def to_tensor(photograph: np.ndarray) -> Tensor:
    """(H, W, 3) of 0..255 -> (1, 3, H', W') of 0..1 with even sizes."""
    height, width = (size // 2 * 2 for size in photograph.shape[:2])
    return torch.from_numpy(photograph[:height, :width].copy()).permute(2, 0, 1)[None].float() / 255


def to_array(image: Tensor) -> np.ndarray:
    return image[0].permute(1, 2, 0).numpy()


def halve_and_restore(image: Tensor, pool) -> Tensor:
    """Pool 2x2 cells to one, then go back to the full size by bilinear interpolation."""
    return F.interpolate(pool(image, 2), scale_factor=2, mode='bilinear', align_corners=False)


def similarity(image: Tensor, restored: Tensor) -> tuple[float, float]:
    """SSIM and PSNR in dB."""
    original, copy = to_array(image), to_array(restored)
    return (structural_similarity(original, copy, channel_axis=-1, data_range=1),
            peak_signal_noise_ratio(original, copy, data_range=1))


def panel(title: str, image: Tensor) -> Image.Image:
    """The middle 96x96 cells, four times as large, under a title."""
    top, left = (size // 2 - 48 for size in image.shape[2:])
    crop = (to_array(image[..., top:top + 96, left:left + 96]) * 255).round().astype(np.uint8)
    canvas = Image.new('RGB', (392, 412), 'white')
    canvas.paste(Image.fromarray(crop).resize((384, 384), Image.Resampling.NEAREST), (4, 24))
    ImageDraw.Draw(canvas).text((6, 6), title, fill='black')
    return canvas


def name_a_motion(output: Path) -> None:
    """Write a clip of a photograph under a camera motion, read it back, and say what the network sees in it."""
    try:
        import av

        from video_plugins import camera_motion, clip_config, create_model, load_clip
    except ImportError as error:
        print(f'\nNo motion is named here: {error}')
        return
    motion, path = 'rotate clockwise', output / 'coffee.mp4'
    clip = camera_motion(to_tensor(skimage.data.coffee())[0], motion, 16, 128, torch.Generator().manual_seed(0))
    with av.open(path, 'w') as container:
        stream = container.add_stream('mpeg4', rate=25, width=128, height=128, bit_rate=4_000_000)
        for frame in (clip.permute(1, 2, 3, 0) * 255).round().byte().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    model = create_model(MOTION_MODEL, pretrained=True).eval()
    with torch.inference_mode():
        probabilities = model(load_clip(path, **clip_config(model)))[0].softmax(0)
    names, best = model.pretrained_cfg['label_names'], int(probabilities.argmax())
    print(f'\nWhat does the camera do? ({MOTION_MODEL}.camera_motion, synthetic motion on a real photograph)\n')
    print(f'{path}: {names[best]}, {probabilities[best]:.1%}; it was made as: {motion}')


def explain(output: Path) -> None:
    """Show where the networks see their classes: in a photograph and, if it is there, in the clip."""
    print('\nWhere do the networks see it? (Saliency Tubes)\n')
    calls = [[output / 'coffee.png', '--layer', 'layer3', '-o', output / 'coffee_tube.png']]
    if (clip := output / 'coffee.mp4').exists():
        calls.append([clip, '--model', MOTION_MODEL, '-o', output / 'coffee_tube.html'])
    for call in calls:
        if status := timm_softpool_command(['explain', *map(str, call), '--overwrite']):
            raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=Path, default=Path('demo'), help='folder for the pictures (%(default)s)')
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)

    print('What is in the photographs? (resnet18_softpool.tiny_in200, 64 px, 200 classes)\n')
    files = []
    for name, load in PHOTOGRAPHS.items():
        files.append(output / f'{name}.png')
        Image.fromarray(load()).save(files[-1])
    if status := timm_softpool_command(['predict', *map(str, files)]):
        raise SystemExit(status)

    name_a_motion(output)

    print('\nWhat is left of a photograph at half its size? (2x2 pooling of pixels in 0..1, bilinear upsampling)\n')
    print(f'{"photograph":12}{"pooling":12}{"SSIM":>8}{"PSNR dB":>10}')
    rows = []
    for name, load in PHOTOGRAPHS.items():
        image = to_tensor(load())
        panels = [panel(f'{name}, original', image)]
        for pooling, pool in POOLS.items():
            restored = halve_and_restore(image, pool)
            ssim, psnr = similarity(image, restored)
            print(f'{name:12}{pooling:12}{ssim:8.4f}{psnr:10.2f}')
            panels.append(panel(f'{pooling}: SSIM {ssim:.4f}, PSNR {psnr:.2f} dB', restored))
        rows.append(panels)
    picture = Image.new('RGB', (392 * len(rows[0]), 412 * len(rows)), 'white')
    for y, panels in enumerate(rows):
        for x, item in enumerate(panels):
            picture.paste(item, (392 * x, 412 * y))
    picture.save(output / 'comparison.png')
    print(f'\nThe pictures side by side: {output / "comparison.png"}')

    explain(output)


if __name__ == '__main__':
    main()
