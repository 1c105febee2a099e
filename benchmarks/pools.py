"""Train a ResNet-18 with each of six pools behind its stem: same recipe, order of images and seeds.

    python benchmarks/pools.py  # runs what benchmarks/results/pools.jsonl lacks; a killed run goes on
    python benchmarks/evidence.py  # the table of docs/evidence.md

The pool is the only one in the network but for the global average. It halves the maps; its windows are 3 x 3 cells, in
`resnet18_softpool` 2 x 2, as in the network of SoftPool's authors.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pages import markdown, spread
from timm.layers import BlurPool2d
from torch import nn
from training import RESULTS, command, measure, read

from timm_softpool import SoftPool2d
from timm_softpool.models.twin import Kind, register_twins

TRAINED, RECIPE, SEEDS = RESULTS / 'pools.jsonl', 'tiny_in20', (0, 1, 2, 3)
# The suffix of the network -> its pool.
POOLS: dict[str, Callable[[], nn.Module]] = {
    '_softpool3': lambda: SoftPool2d(3, 2, 1),
    '_avgpool': lambda: nn.AvgPool2d(3, 2, 1),
    '_blurpool': lambda: BlurPool2d(64, 3, 2),
    '_l2pool': lambda: nn.Sequential(nn.ZeroPad2d(1), nn.LPPool2d(2, 3, 2)),
}
# Network -> what it pools by; the first is what the others are compared with.
NETWORKS = {'resnet18': 'maximum', 'resnet18_softpool': 'SoftPool, 2 x 2', 'resnet18_softpool3': 'SoftPool',
            'resnet18_avgpool': 'average', 'resnet18_blurpool': 'blur', 'resnet18_l2pool': 'L2'}


def with_pool(pool: Callable[[], nn.Module]) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        model.maxpool = pool()
        return model
    return change


for suffix, pool in POOLS.items():
    register_twins(__name__, ['resnet18'], with_pool(pool), Kind(suffix, {}, f'pooling by {suffix[1:]}'))


def table() -> str:
    """Top-1 in %: mean and sample deviation over the seeds, and of the differences from the maximum seed by seed."""
    rows = read(TRAINED)
    scores = {network: {seed: rows[key]['top1'] for seed in SEEDS
                        if (key := command(RECIPE, network, f'seed={seed}')) in rows} for network in NETWORKS}
    lines = []
    for network, pool in NETWORKS.items():
        if not scores[network]:
            continue  # until it is trained
        less = [score - scores['resnet18'][seed] for seed, score in scores[network].items()]
        lines.append([pool, f'`{network}`', str(len(less)), spread([*scores[network].values()]),
                      spread(less, '+') if any(less) else ''])
    return markdown(['pool', 'network', 'seeds', 'top-1, %', 'minus the maximum'], lines)


if __name__ == '__main__':
    measure(TRAINED, [command(RECIPE, network, f'seed={seed}') for seed in SEEDS for network in NETWORKS])
