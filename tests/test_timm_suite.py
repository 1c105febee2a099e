"""timm's own test suite passes for our models."""
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

from timm_softpool.models import softpool_paper, softpool_twins

FAMILIES = {'the paper': softpool_paper.ARCHITECTURES,
            **{family: names.split() for family, names in softpool_twins.ARCHITECTURES.items()}}
# One small model of each family of timm, two of the paper, and some with Class Regularization.
SMALL = [f'{name}_softpool' for name in '''
    resnet18 densenet121
    halonet_h1 test_byobnet cspresnext50 densenetblur121d dla46x_c dpn48b gcvit_xxtiny hgnet_tiny hieradet_small
    inception_resnet_v2 inception_v3 inception_v4 test_coatnet mobilenetv4_conv_aa_medium mvitv2_tiny nasnetalarge
    nest_tiny nextvit_small test_nfnet pnasnet5large regnetv_064 res2next50 resnest14d test_resnet resnetv2_18
    legacy_seresnet18 skresnet18 tresnet_m vgg11 vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224
    ese_vovnet19b_slim_dw legacy_xception
'''.split()] + ['resnet18_classreg', 'test_resnet_classreg', 'densenet121_classreg']


@pytest.fixture(scope='session')
def timm_source(pytestconfig) -> Path:
    """The folder of timm's tests, out of the source distribution of the installed version."""
    folder = Path(pytestconfig.cache.mkdir('timm')) / timm.__version__
    if not folder.is_dir():
        download = folder.with_suffix('.download')
        subprocess.run([sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
                        '--dest', download, f'timm=={timm.__version__}'], check=True)
        with tarfile.open(download / f'timm-{timm.__version__}.tar.gz') as archive:
            # Not timm itself: it would be imported from there, not from where it is installed.
            members = [member for member in archive.getmembers() if '/tests/' in member.name]
            archive.extractall(download, members, filter='data')
        (download / f'timm-{timm.__version__}').rename(folder)
    return folder


def run_suite(timm_source: Path, names: list[str], processes: int = 2) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, 'SOFTPOOL_SUITE': ','.join(names), 'PYTHONPATH': str(here), 'OMP_NUM_THREADS': '1'}
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'timm_suite_plugin', '-p', 'no:cacheprovider', '-c', os.devnull,
         f'--rootdir={timm_source}', '-n', str(processes), '-q', '-W', 'ignore',
         timm_source / 'tests' / 'test_models.py'],
        env=environment, cwd=timm_source, capture_output=True, text=True)
    passed, skipped = (re.search(rf'(\d+) {outcome}', run.stdout) for outcome in ('passed', 'skipped'))
    assert run.returncode == 0 and passed, run.stdout[-6000:] + run.stderr[-2000:]
    # timm skips what takes inputs of more than its limit of pixels, but no model altogether.
    assert int(passed[1]) >= 2 * len(names), run.stdout[-2000:]
    assert int(passed[1]) + int(skipped[1] if skipped else 0) >= 6 * len(names), run.stdout[-2000:]
    print(run.stdout.splitlines()[-1])


def test_timms_suite_passes_for_a_small_model_of_every_family(timm_source):
    run_suite(timm_source, SMALL)


@pytest.mark.all_models
@pytest.mark.parametrize('family', FAMILIES)
def test_timms_suite_passes_for_every_model(timm_source, family):
    # One model at a time: two of the largest do not fit into 24 GB.
    run_suite(timm_source, [f'{name}_softpool' for name in FAMILIES[family]], processes=1)
