"""What the documents and the demo show works."""
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from timm_softpool.pretrained import PUBLISHED

ROOT = Path(__file__).parents[1]
EXAMPLES = [(page.name, block) for page in [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
            for block in re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)]


@pytest.mark.parametrize('block', [block for _, block in EXAMPLES], ids=[page for page, _ in EXAMPLES])
def test_an_example_of_the_documents_runs(block):
    exec(compile(block, 'example', 'exec'), {})


def test_the_demo_names_what_it_sees_and_draws_the_comparison(tmp_path):
    run = subprocess.run([sys.executable, ROOT / 'examples' / 'demo.py', '--output', tmp_path],
                         capture_output=True, text=True, check=True)
    classes = re.findall(r'^ +\d+\.\d%  \w', run.stdout, re.MULTILINE)
    assert len(classes) == 10, 'five for each of two photographs'
    table = re.findall(r'^(\w+) +(\w+) +(0\.\d{4}) +(\d+\.\d{2})$', run.stdout, re.MULTILINE)
    scores = {(photograph, pooling): float(ssim) for photograph, pooling, ssim, _ in table}
    for photograph in ('chelsea', 'coffee'):
        assert scores[photograph, 'SoftPool'] > scores[photograph, 'maximum']
    assert re.search(r'coffee\.mp4: rotate clockwise, \d+\.\d%; it was made as: rotate clockwise$', run.stdout,
                     re.MULTILINE)
    assert Image.open(tmp_path / 'comparison.png').size == (4 * 392, 2 * 412)
    assert Image.open(tmp_path / 'coffee_tube.png').size == (2 * 256 + 4, 256 + 18)
    assert '<canvas' in (tmp_path / 'coffee_tube.html').read_text()


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('benchmark', ['video', 'class_regularization', 'evidence', 'explainers'])
def test_a_page_s_figures_are_those_that_were_measured(benchmark, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    script = load(ROOT / 'benchmarks' / f'{benchmark}.py')
    assert script.update(script.PAGE.read_text()) == script.PAGE.read_text()


def test_the_speed_that_the_page_claims_of_the_tubes_was_measured(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    script = load(ROOT / 'benchmarks' / 'explainers.py')
    for rows in json.loads(script.REPORT.read_text())['results'].values():
        assert all(rows[tube]['forwards'] < 1.3 for tube in (script.TUBE, script.BY_GRADIENT) if tube in rows)
        assert rows['grad-cam GradCAM']['ratio'] > 2.5
        assert min(rows[peer]['ratio'] for peer in ('captum LayerGradCam', 'torchcam GradCAM')) >= 0.915
        assert all(row['correlation'] >= 0.99 for name, row in rows.items()
                   if name not in (script.FORWARD, script.OTHER_MAP))


@pytest.mark.parametrize('network', ['resnet50_softpool', 'densenet121_softpool'])
def test_the_networks_compared_with_their_twins_are_those_that_are_published(network, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    last = load(ROOT / 'benchmarks' / 'twins.py').results(network)[-1]
    entry = PUBLISHED[f'{network}.tiny_in200']
    assert (last['sha256'], last['top1'], last['top5']) == (entry['sha256'], *entry['metrics'].values())


def test_the_readmes_figures_are_those_that_were_measured():
    report = load(ROOT / 'benchmarks' / 'report.py')
    figures = json.loads(report.RESULTS.read_text())
    assert report.update(ROOT / 'README.md', figures) == (ROOT / 'README.md').read_text()
    assert report.table(figures).count('\n') == 1 + len(figures['results'])
