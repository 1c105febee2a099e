"""What benchmarks/downsampling.py measures: each pooling is brought back to where its samples lie."""
import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def downsampling(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / 'benchmarks'))
    return importlib.import_module('downsampling')


@pytest.mark.parametrize('window', [2, 3, 5])
def test_restoring_is_pytorchs_bilinear_interpolation_where_samples_lie_amid_their_windows(downsampling, window):
    pooled = torch.rand(1, 3, 6, 7)
    size = (6 * window, 7 * window)
    restored = downsampling.restore(pooled, downsampling.first_sample('average', window), window, size)
    torch.testing.assert_close(restored, F.interpolate(pooled, size, mode='bilinear', align_corners=False))


@pytest.mark.parametrize('window', [2, 3, 5])
@pytest.mark.parametrize('pool', ['average', 'blur'])
def test_a_ramp_pooled_by_a_linear_pool_comes_back_unshifted(downsampling, pool, window):
    ramp = torch.linspace(0, 1, 60)[:, None] + torch.linspace(0, 1, 60)
    pooled = downsampling.POOLS[pool](ramp[None, None], window)
    restored = downsampling.restore(pooled, downsampling.first_sample(pool, window), window, (60, 60))
    torch.testing.assert_close(restored[0, 0, 5:-5, 5:-5], ramp[5:-5, 5:-5])


@pytest.mark.parametrize('window', [2, 3, 5])
@pytest.mark.parametrize('pool', ['SoftPool', 'average', 'maximum', 'L2', 'blur'])
def test_every_pooling_keeps_all_of_a_uniform_image(downsampling, pool, window):
    scores = downsampling.similarity(torch.full((1, 3, 31, 32), 0.3), pool, window)
    assert scores['SSIM'] > 0.9999 and scores['PSNR'] > 120


def test_the_root_of_the_mean_square_is_what_l2_gives(downsampling):
    x = torch.rand(1, 1, 6, 6)
    torch.testing.assert_close(downsampling.POOLS['L2'](x, 3), F.avg_pool2d(x ** 2, 3).sqrt())


def test_differences_are_those_of_the_same_photograph(downsampling):
    scores = {'SoftPool': [{'SSIM': 0.5, 'PSNR': 20.}, {'SSIM': 0.7, 'PSNR': 30.}],
              'average': [{'SSIM': 0.4, 'PSNR': 21.}, {'SSIM': 0.8, 'PSNR': 34.}]}
    row = downsampling.summary(scores)['average']
    assert row['SSIM'] == {'mean': 0.6, 'deviation': 0.282843, 'softpool_minus_this': 0., 'softpool_better': 1}
    assert row['PSNR'] == {'mean': 27.5, 'deviation': 9.192388, 'softpool_minus_this': -2.5, 'softpool_better': 0}


def test_a_missing_photograph_is_named(downsampling, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'01\.png is missing: the photographs must lie in data/kodak and'):
        downsampling.read(tmp_path / '01.png')
