"""Time SoftPool's backends beside other pools, in one process, in turn.

    python benchmarks/pooling.py [--device cuda] [--dtypes float32 bfloat16] [--pools NAME ...] [--output results.json]

Each round times every pool once on each case. Written are the medians over the rounds, and the medians of the ratios to
F.max_pool and F.avg_pool within a round: those hold when the machine's speed drifts. A forward and backward pass gives
the gradient of the input; of the memory that it allocates, the input is not a part. "copy" moves the numbers of input
and output, in a backward pass those of both and of both gradients, and nothing else: the floor of every pool.

On Linux the C library is told to keep freed memory, for otherwise every large tensor is new to the kernel, and
measured are page faults.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

import timm_softpool
from timm_softpool.kernels import Window, cpu, reference

Pool = Callable[[Tensor], Tensor]

# name -> (shape of one sample, kernel_size, stride, padding), and samples on a CPU and on a GPU
CASES: dict[str, tuple[tuple[int, ...], Any, Any, Any]] = {
    'ResNet stem 2x2': ((64, 112, 112), 2, 2, 0),
    'ResNet stem 3x3': ((64, 112, 112), 3, 2, 1),
    'DenseNet transition 2x2': ((256, 56, 56), 2, 2, 0),
    '3-D stem 2x2x2': ((64, 16, 56, 56), 2, 2, 0),
    '3-D stem 1x3x3': ((64, 16, 56, 56), (1, 3, 3), (1, 2, 2), (0, 1, 1)),
}
SAMPLES = {('cpu', 2): 8, ('cpu', 3): 2, ('cuda', 2): 256, ('cuda', 3): 32}


def keep_freed_memory() -> None:
    """Start again with a quiet profiler and glibc's thresholds raised, which are read when a process begins."""
    thresholds = {'MALLOC_MMAP_THRESHOLD_': str(2 ** 33), 'MALLOC_TRIM_THRESHOLD_': str(2 ** 34),
                  'KINETO_LOG_LEVEL': '99'}
    if sys.platform == 'linux' and not thresholds.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **thresholds})


def pools(device: str, compiled: bool, ndim: int, kernel_size: Any, stride: Any, padding: Any) -> dict[str, Pool]:
    """The pools by name."""
    geometry = (kernel_size, stride, padding)
    window = Window.make(*([size] * ndim if isinstance(size, int) else list(size) for size in geometry), False)
    soft_pool = getattr(timm_softpool, f'soft_pool{ndim}d')

    def served_by(name: str, pool: Pool, x: Tensor) -> Tensor:
        with timm_softpool.backend(name):
            return pool(x)

    def unfold(x: Tensor) -> Tensor:  # what one writes without this package, and numerically sound
        x = F.pad(x, [pad for pad in window.padding[::-1] for _ in range(2)], value=-torch.inf)
        for size, step in zip(window.kernel_size, window.stride):
            x = x.unfold(-ndim, size, step)
        x = x.flatten(-ndim)
        return (x.softmax(-1) * x.clamp(min=-1e4)).sum(-1)

    def ratio(x: Tensor) -> Tensor:  # overflows from exp(88) on
        e = x.exp()
        avg_pool = getattr(F, f'avg_pool{ndim}d')
        return avg_pool(e * x, *geometry) / avg_pool(e, *geometry)

    named: dict[str, Pool] = {
        'max_pool': lambda x: getattr(F, f'max_pool{ndim}d')(x, *geometry),
        'avg_pool': lambda x: getattr(F, f'avg_pool{ndim}d')(x, *geometry)}
    if not any(window.padding):
        named['lp_pool'] = lambda x: getattr(F, f'lp_pool{ndim}d')(x, 2, *geometry[:2])
    available = [name for name, state in timm_softpool.available_backends().items()
                 if state == 'available' and name in (device, 'eager')]
    named |= {f'SoftPool {name}': partial(served_by, name, lambda x: soft_pool(x, *geometry)) for name in available}
    named |= {'unfold and softmax': unfold, 'ratio of averages': ratio}
    if compiled:
        named |= {'SoftPool compiled': torch.compile(lambda x: soft_pool(x, *geometry), fullgraph=True),
                  'formula compiled': torch.compile(lambda x: reference.soft_pool(x, window), fullgraph=True)}
    return named


def copies(x: Tensor, output: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Moves as many bytes as a forward pass reads and writes, and as a forward and backward pass does."""
    numbers = x.numel() + output.numel()
    source = torch.ones(numbers // 2 + numbers % 2, dtype=x.dtype, device=x.device)
    more = torch.ones(x.numel() // 2 + x.numel() + output.numel(), dtype=x.dtype, device=x.device)
    target, more_target = torch.ones_like(source), torch.ones_like(more)
    return lambda: target.copy_(source), lambda: more_target.copy_(more)


def milliseconds(function: Callable[[], Any]) -> float:
    return Timer('function()', globals={'function': function}, num_threads=torch.get_num_threads()).timeit(3).mean * 1e3


def allocated(function: Callable[[], Any]) -> float:
    """MB that a call allocates."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profile(activities=activities, profile_memory=True) as profiler:
        function()
    usages = [getattr(event, name, 0) for event in profiler.events()
              for name in ('self_cpu_memory_usage', 'self_device_memory_usage')]
    return sum(usage for usage in usages if usage > 0) / 1e6


def measure(device: str, dtype: torch.dtype, case: tuple, last: bool, rounds: int, only: list[str],
            compiled: bool) -> dict[str, dict]:
    sample, *geometry = case
    ndim = len(sample) - 1
    x = torch.randn(SAMPLES[device, ndim], *sample, device=device).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last if ndim == 2 else torch.channels_last_3d)
    x.requires_grad_()
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name, pool in pools(device, compiled, ndim, *geometry).items():
        if only and name not in only:
            continue
        try:
            output = pool(x)
            grad = torch.ones_like(output)
            torch.autograd.grad(output, x, grad)
        except RuntimeError:  # PyTorch has not every pool for every dtype
            continue
        calls[name] = (partial(pool, x.detach()), lambda pool=pool, grad=grad: torch.autograd.grad(pool(x), x, grad))
    calls['copy'] = copies(x, output)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, (forward, both) in calls.items():
            times[name].append((milliseconds(forward), milliseconds(both)))
    rows = {}
    for name in calls:
        rows[name] = {'allocated_mb': allocated(calls[name][1]) if name != 'copy' else 0.0}
        for i, label in enumerate(('forward', 'forward_backward')):
            rows[name][f'{label}_ms'] = statistics.median(time[i] for time in times[name])
            for base in ('max_pool', 'avg_pool', 'copy'):
                if base in times:
                    rows[name][f'{label}_to_{base}'] = statistics.median(
                        time[i] / other[i] for time, other in zip(times[name], times[base]))
    return rows


def processor(device: str, isa: str = '') -> str:
    """Its name, and for a CPU the instructions that serve from now on."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    lines = Path('/proc/cpuinfo').read_text().splitlines() if sys.platform == 'linux' else []
    names = [line.split(':')[1].strip() for line in lines if line.startswith('model name')]
    instructions = cpu.missing() and 'no native backend' or cpu.set_isa(isa)
    return f'{names[0] if names else platform.processor()}, {instructions}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--dtypes', nargs='+', default=['float32', 'bfloat16'])
    parser.add_argument('--pools', nargs='+', default=[], help='these only')
    parser.add_argument('--isa', default='', help='instructions of the native CPU backend: avx512, avx2 or baseline')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--output', type=Path, help='write the figures to this JSON file too')
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {'processor': processor(args.device, args.isa), 'torch': torch.__version__,
                              'threads': args.threads, 'rounds': args.rounds, 'results': {}}
    print(json.dumps({key: value for key, value in report.items() if key != 'results'}))
    for dtype in args.dtypes:
        for label, case in CASES.items():
            for last in (False, True):
                name = f'{label}, {dtype}' + ', channels_last' * last
                torch.compiler.reset()
                rows = measure(args.device, getattr(torch, dtype), case, last, args.rounds, args.pools,
                               compiled=label.startswith('ResNet') and dtype == 'float32')  # half a minute each
                report['results'][name] = rows
                for pool, row in rows.items():
                    print(f'{name:52}{pool:20}' + ''.join(
                        f'{label:>10} {row[f"{label}_ms"]:8.3f} ms, x max {row.get(f"{label}_to_max_pool", 0):6.3f}'
                        for label in ('forward', 'forward_backward')) + f'{row["allocated_mb"]:9.1f} MB', flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
