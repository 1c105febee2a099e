"""Time SoftPool's backends beside the pools of PyTorch, in one process, in turn.

    python benchmarks/pooling.py [--rounds 15] [--threads 2] [--output results.json]

Each round times every pool once on each case; the table gives the median over the rounds, and the median of the
ratios to F.max_pool within a round. "forward + backward" includes the gradient of the input.
"""
from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

import timm_softpool

# name -> (shape, kernel_size, stride, padding, memory format)
CASES = {
    'ResNet stem 2x2': ((8, 64, 112, 112), 2, 2, 0, torch.contiguous_format),
    'ResNet stem 3x3': ((8, 64, 112, 112), 3, 2, 1, torch.contiguous_format),
    'ResNet stem 2x2, channels_last': ((8, 64, 112, 112), 2, 2, 0, torch.channels_last),
    'ResNet stem 3x3, channels_last': ((8, 64, 112, 112), 3, 2, 1, torch.channels_last),
    'DenseNet transition 2x2': ((8, 256, 56, 56), 2, 2, 0, torch.contiguous_format),
    '3-D stem 2x2x2': ((2, 64, 16, 56, 56), 2, 2, 0, torch.contiguous_format),
}


def pools(ndim: int) -> dict[str, Callable[..., Tensor]]:
    """The pools by name; F.max_pool first, as the others are compared with it."""
    def on(name: str) -> Callable[..., Tensor]:
        def pool(*args: object) -> Tensor:
            with timm_softpool.backend(name):
                return getattr(timm_softpool, f'soft_pool{ndim}d')(*args)
        return pool

    available = [name for name, state in timm_softpool.available_backends().items() if state == 'available']
    return {'max_pool': getattr(F, f'max_pool{ndim}d'), 'avg_pool': getattr(F, f'avg_pool{ndim}d'),
            **{f'SoftPool {name}': on(name) for name in available}}


def time_once(statement: str, **names: object) -> float:
    """Milliseconds of one call, the mean of a few."""
    timer = Timer(statement, globals=names, num_threads=torch.get_num_threads())
    return timer.timeit(3).mean * 1e3


def measure(case: tuple, rounds: int) -> dict[str, dict[str, float]]:
    shape, *geometry, memory_format = case
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    candidates = pools(len(shape) - 2)
    forward: dict[str, list[float]] = {name: [] for name in candidates}
    both: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, pool in candidates.items():
            with torch.no_grad():
                forward[name].append(time_once('pool(x, *geometry)', pool=pool, x=x, geometry=geometry))
            both[name].append(time_once('torch.autograd.grad(pool(x, *geometry).sum(), x)',
                                        pool=pool, x=x, geometry=geometry, torch=torch))

    def ratio(times: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times['max_pool']))

    return {name: {
        'forward_ms': statistics.median(forward[name]), 'forward_ratio': ratio(forward, name),
        'forward_backward_ms': statistics.median(both[name]), 'forward_backward_ratio': ratio(both, name),
    } for name in candidates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--output', help='write the figures to this JSON file too')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    print(f'torch {torch.__version__}, {args.threads} threads, float32, median of {args.rounds} rounds\n')
    print('| case | pool | forward ms | / max_pool | forward + backward ms | / max_pool |')
    print('|---|---|---|---|---|---|')
    for label, case in CASES.items():
        results[label] = measure(case, args.rounds)
        for name, row in results[label].items():
            print(f'| {label} | {name} | {row["forward_ms"]:.2f} | {row["forward_ratio"]:.2f} '
                  f'| {row["forward_backward_ms"]:.2f} | {row["forward_backward_ratio"]:.2f} |', flush=True)
    if args.output:
        with open(args.output, 'w') as file:
            json.dump({'torch': torch.__version__, 'threads': args.threads, 'rounds': args.rounds,
                       'results': results}, file, indent=2)


if __name__ == '__main__':
    main()
