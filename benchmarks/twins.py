"""Train networks and their SoftPool twins on all 200 classes of Tiny-ImageNet: same commands, images, order and seeds.

    OMP_NUM_THREADS=1 python benchmarks/twins.py  # runs what benchmarks/results/twins.jsonl lacks; a killed run goes on
    python benchmarks/evidence.py  # the table of docs/evidence.md

`resnet50_softpool` and `densenet121_softpool` so trained are published, as resnet18_softpool is not: its published
weights had more epochs.
"""
from __future__ import annotations

import sys

from pages import markdown
from training import RESULTS, measure, read

TRAINED = RESULTS / 'twins.jsonl'
FINISH = 'epochs=1 validate_epochs=1 train_sizes=[64] warmup_epochs=0 batch_size=128 lr=0.05'
# Network -> its runs, each from the weights of the one before: the end of the run's name and the settings.
RUNS = {
    'resnet18': [('', 'epochs=6 validate_epochs=6 train_sizes=[40,48,64] batch_size=128 lr=0.2 workers=0')],
    'resnet50': [('', 'epochs=9 validate_epochs=9 train_sizes=[40,48] batch_size=128 lr=0.2 workers=0'),
                 ('-64px', f'{FINISH} workers=0'), ('-64px-again', f'{FINISH} seed=1 workers=0')],
    'densenet121': [
        ('', 'epochs=4 validate_epochs=4 train_sizes=[40,48] batch_size=128 lr=0.2 workers=0'),
        ('-more', 'epochs=3 validate_epochs=3 train_sizes=[48] warmup_epochs=0 batch_size=128 lr=0.1 workers=0'),
        ('-64px', f'{FINISH} workers=0')],
}


def results(network: str, train: bool = False) -> list[dict]:
    """What a network's runs gave, nothing if one is missing; with ``train``, those that are missing are run."""
    rows: list[dict] = []
    for end, settings in RUNS[network.removesuffix('_softpool')]:
        init = [f'init={rows[-1]["config"]["output"]}/{rows[-1]["file"]}'] if rows else []
        command = ('timm-softpool', 'train', 'recipes/tiny_in200.yaml', f'model={network}', 'data=data/tiny-imagenet',
                   *init, *settings.split(), f'output=runs/{network}-tiny_in200{end}')
        if train:
            measure(TRAINED, [command])
        if command not in (known := read(TRAINED)):
            return []
        rows.append(known[command])
    return rows


def table() -> str:
    """Top-1 and top-5 in % of each network and of its twin, one seed each."""
    lines = []
    for network in RUNS:
        plain, twin = results(network), results(f'{network}_softpool')
        if not (plain and twin):
            continue  # until both are trained
        epochs = ', '.join(f'{row["config"]["epochs"]} at {"/".join(map(str, row["config"]["train_sizes"]))} px'
                           for row in plain)
        scores = [[row[-1][top] for top in ('top1', 'top5')] for row in (plain, twin)]
        scores.append([by - without for without, by in zip(*scores)])
        lines.append([f'`{network}`', epochs, *(f'{top1:{sign}.2f} / {top5:{sign}.2f}'
                                                for (top1, top5), sign in zip(scores, ('', '', '+')))])
    return markdown(['network', 'epochs', 'maximum', 'SoftPool', 'difference'], lines)


if __name__ == '__main__':
    for name in sys.argv[1:] or [f'{network}{twin}' for network in RUNS for twin in ('', '_softpool')]:
        results(name, train=True)
