"""Time the networks that were trained for the documents: inference of one image or clip, in one process, in turn.

    python benchmarks/latency.py [--rounds 31] [--threads 1]

Written are the medians over the rounds, and the median of the ratios to the plain network of the same input within a
round, which holds when the machine's speed drifts.
"""
from __future__ import annotations

import argparse
import json
import statistics
from functools import partial

import timm
import torch
from class_regularization import TRAINED
from pooling import keep_freed_memory, milliseconds, processor
from training import RESULTS, read
from video import TRAINED as VIDEO

import timm_softpool  # noqa: F401
import video_plugins  # noqa: F401

LATENCY = RESULTS / 'cpu_latency.json'
PLAIN = ('resnet18', 'r3d_18_w16')


def trained() -> dict[str, dict[str, dict]]:
    """A result of each network, by the input, as in '3 x 64 x 64', and by the name; the plain network comes first."""
    rows = [row for results in (TRAINED, VIDEO) for row in read(results).values()]
    found: dict[str, dict[str, dict]] = {}
    for row in sorted(rows, key=lambda row: (len(row['input']), row['input'], row['model'] not in PLAIN, row['model'])):
        found.setdefault(' x '.join(map(str, row['input'])), {})[row['model']] = row
    return found


def latencies(rows: dict[str, dict], rounds: int) -> dict[str, dict[str, float]]:
    """Of the networks of one input, the first of which is the plain one."""
    sample = torch.randn(1, *next(iter(rows.values()))['input'])
    calls = {name: partial(timm.create_model(name, num_classes=10).eval(), sample) for name in rows}
    with torch.inference_mode():
        times = [{name: milliseconds(call) for name, call in calls.items()} for _ in range(rounds)]
    plain = next(iter(rows))
    return {name: {'ms': statistics.median(time[name] for time in times),
                   'ratio': statistics.median(time[name] / time[plain] for time in times)} for name in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=31)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    report = {'processor': processor('cpu'), 'torch': torch.__version__, 'threads': args.threads,
              'rounds': args.rounds,
              'results': {size: latencies(rows, args.rounds) for size, rows in trained().items()}}
    print(json.dumps(report, indent=1))
    LATENCY.write_text(json.dumps(report, indent=1) + '\n')


if __name__ == '__main__':
    main()
