"""How much of real photographs each pooling keeps.

    python benchmarks/downsampling.py           # measures all of benchmarks/results/downsampling.json: some minutes
    python benchmarks/downsampling.py --report  # only prints its tables

A photograph, RGB in 0..1, is cropped to a multiple of the window, pooled with windows of 2, 3 and 5 pixels that do not
overlap, and brought back to its size by bilinear interpolation. "L2" is the square root of a window's mean square;
"blur" is timm's BlurPool2d with its own filter, [1, 2, 1] / 4 along each axis, at that stride. Written are SSIM
(scikit-image: windows of 7 x 7, mean of the channels) and PSNR in dB against the original, mean and sample deviation
over a data set, and SoftPool's difference to each other pooling, photograph by photograph.

The data are looked for in data/kodak (the 24 photographs of the Kodak set) and data/set5-set14 (the 5 of Set5, the 14
of Set14), as PNG.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from pages import markdown
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from timm.layers import BlurPool2d
from torch import Tensor

from timm_softpool import soft_pool2d

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'downsampling.json'
SET5 = ('baby', 'bird', 'butterfly', 'head', 'woman')
SET14 = ('baboon', 'barbara', 'bridge', 'coastguard', 'comic', 'face', 'flowers', 'foreman', 'lenna', 'man', 'monarch',
         'pepper', 'ppt3', 'zebra')
DATASETS = {'Kodak': [f'data/kodak/{number:02}.png' for number in range(1, 25)],
            'Set5': [f'data/set5-set14/{name}.png' for name in SET5],
            'Set14': [f'data/set5-set14/{name}.png' for name in SET14]}
WINDOWS = (2, 3, 5)
SIZES = [f'x{window}' for window in WINDOWS]
METRICS = {'SSIM': 4, 'PSNR': 2}  # and their decimals in a table


def l2_pool(x: Tensor, window: int) -> Tensor:
    return F.lp_pool2d(x, 2, window) / window  # it takes the sum of squares, not their mean


POOLS: dict[str, Callable[[Tensor, int], Tensor]] = {
    'SoftPool': soft_pool2d, 'average': F.avg_pool2d, 'maximum': F.max_pool2d, 'L2': l2_pool,
    'blur': lambda x, window: BlurPool2d(stride=window)(x)}


def read(path: Path) -> Tensor:
    """The photograph as (1, 3, H, W) in 0..1.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path} is missing: the photographs must lie in data/kodak and data/set5-set14 of '
                                'this checkout')
    return torch.from_numpy(np.array(Image.open(path).convert('RGB'))).permute(2, 0, 1)[None].float() / 255


def first_sample(pool: str, window: int) -> float:
    """Where a pool's first sample lies, in pixels from the image's first: timm's blur is not centred on windows."""
    blur = BlurPool2d(stride=window)
    return (blur.filt_size - 1) / 2 - blur.padding[0] if pool == 'blur' else (window - 1) / 2


def restore(pooled: Tensor, first: float, window: int, size: tuple[int, int]) -> Tensor:
    """Interpolate (N, C, h, w) bilinearly to (N, C, *size); sample i lies `first + i * window` pixels from the first.

    Beyond the outer samples their values are repeated. Where `first` is the middle of the window, this is
    `F.interpolate(mode='bilinear', align_corners=False)`.
    """
    y, x = (2 * (torch.arange(full) - first) / (window * (samples - 1)) - 1
            for full, samples in zip(size, pooled.shape[2:]))
    grid = torch.stack(torch.meshgrid(x, y, indexing='xy'), -1).expand(len(pooled), -1, -1, -1)
    return F.grid_sample(pooled, grid, mode='bilinear', padding_mode='border', align_corners=True)


def similarity(image: Tensor, pool: str, window: int) -> dict[str, float]:
    """What a pool keeps of an image (1, 3, H, W) in 0..1: its SSIM, and its PSNR in dB."""
    height, width = (size // window * window for size in image.shape[2:])
    image = image[..., :height, :width]
    restored = restore(POOLS[pool](image, window), first_sample(pool, window), window, (height, width))
    original, copy = (tensor[0].permute(1, 2, 0).numpy() for tensor in (image, restored))
    return {'SSIM': float(structural_similarity(original, copy, channel_axis=-1, data_range=1)),
            'PSNR': float(peak_signal_noise_ratio(original, copy, data_range=1))}


def summary(scores: dict[str, list[dict[str, float]]]) -> dict[str, dict]:
    """From the scores of the same photographs by each pooling, the figures that are written."""
    rows: dict[str, dict] = {}
    for pool, found in scores.items():
        rows[pool] = {}
        for metric in METRICS:
            values = [score[metric] for score in found]
            differences = [soft[metric] - value for soft, value in zip(scores['SoftPool'], values)]
            rows[pool][metric] = {'mean': round(mean(values), 6), 'deviation': round(stdev(values), 6)}
            if pool != 'SoftPool':
                rows[pool][metric] |= {'softpool_minus_this': round(mean(differences), 6),
                                       'softpool_better': sum(difference > 0 for difference in differences)}
    return rows


def measure() -> dict:
    report: dict = {'torch': torch.__version__, 'results': {}}
    for dataset, paths in DATASETS.items():
        images = [read(ROOT / path) for path in paths]
        report['results'][dataset] = {'photographs': len(images)} | {
            size: summary({pool: [similarity(image, pool, window) for image in images] for pool in POOLS})
            for size, window in zip(SIZES, WINDOWS)}
    return report


def scores_table(dataset: str) -> str:
    """One line for each pooling, mean ± sample deviation; the best means of a column are bold."""
    results = json.loads(RESULTS.read_text())['results'][dataset]
    columns = []
    for metric, digits in METRICS.items():
        for size in SIZES:
            rows = [results[size][pool][metric] for pool in POOLS]
            means = [f'{row["mean"]:.{digits}f}' for row in rows]
            columns.append([f'{metric} {size}', *(
                ('**' + score + '**' if score == max(means, key=float) else score) + f' ± {row["deviation"]:.{digits}f}'
                for score, row in zip(means, rows))])
    head, *lines = zip(['pooling', *POOLS], *columns)
    return markdown(head, lines)


def differences_table() -> str:
    """SoftPool minus each other pooling, and in how many of the photographs it is better."""
    columns = [(metric, size) for metric in METRICS for size in SIZES]
    lines = []
    for dataset, results in json.loads(RESULTS.read_text())['results'].items():
        for pool in list(POOLS)[1:]:
            rows = [(results[size][pool][metric], METRICS[metric]) for metric, size in columns]
            lines.append([dataset, pool, *(f'{row["softpool_minus_this"]:+.{digits}f} '
                                           f'({row["softpool_better"]}/{results["photographs"]})'
                                           for row, digits in rows)])
    return markdown(['data', 'SoftPool minus', *map(' '.join, columns)], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--report', action='store_true', help='measure nothing')
    if not parser.parse_args().report:
        RESULTS.write_text(json.dumps(measure(), indent=1) + '\n')
    for dataset in DATASETS:
        print(f'{dataset}\n\n{scores_table(dataset)}\n')
    print(differences_table())


if __name__ == '__main__':
    main()
