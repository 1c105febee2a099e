"""Time resnet50_softpool beside resnet50, in one process, in turn: inference and a training step.

    python benchmarks/models.py [--device cuda] [--rounds 7] [--output results.json]
"""
from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from pooling import keep_freed_memory, milliseconds, processor

NAMES = ('resnet50', 'resnet50_softpool')


def steps(name: str, device: str, batch: int, format: torch.memory_format) -> dict[str, Any]:
    model = timm.create_model(name, num_classes=1000).to(device).to(memory_format=format)
    images = torch.randn(batch, 3, 224, 224, device=device).contiguous(memory_format=format)
    target = torch.arange(batch, device=device)

    def infer() -> None:
        model.eval()
        with torch.inference_mode():
            model(images)

    def train() -> None:
        model.train()
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images), target).backward()

    return {'inference': infer, 'training step': train}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--batch', type=int, default=0, help='images; 8 on a CPU, 128 on a GPU')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--output', type=Path, help='write the figures to this JSON file too')
    args = parser.parse_args()
    keep_freed_memory()
    batch = args.batch or {'cpu': 8, 'cuda': 128}[args.device]
    report: dict[str, Any] = {'processor': processor(args.device), 'torch': torch.__version__, 'batch': batch,
                              'threads': torch.get_num_threads(), 'rounds': args.rounds, 'results': {}}
    for label, format in (('contiguous', torch.contiguous_format), ('channels_last', torch.channels_last)):
        calls = {name: steps(name, args.device, batch, format) for name in NAMES}
        for step in ('inference', 'training step'):
            times: dict[str, list[float]] = {name: [] for name in NAMES}
            for _ in range(args.rounds):
                for name in NAMES:
                    times[name].append(milliseconds(calls[name][step]))
            medians = {name: statistics.median(times[name]) for name in NAMES}
            ratio = statistics.median(soft / plain for plain, soft in zip(*(times[name] for name in NAMES)))
            report['results'][f'{step}, {label}'] = {**{f'{name}_ms': value for name, value in medians.items()},
                                                     'ratio': ratio}
            print(f'{step}, {label}: ' + ', '.join(f'{name} {value:.1f} ms' for name, value in medians.items())
                  + f', ratio {ratio:.3f}', flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
