"""What Class Regularization costs in a training step, and what it changes in accuracy, as tables of its page.

    python benchmarks/class_regularization.py [--device cuda] [--rounds 15]  # the cost
    python benchmarks/class_regularization.py --train                       # with and without, what is still missing
    python benchmarks/class_regularization.py --report                      # the tables of docs/class_regularization.md
"""
from __future__ import annotations

import argparse
import contextlib
import json
import statistics
from collections.abc import Callable

import timm
import torch
from pages import markdown, spread, with_tables
from pooling import keep_freed_memory, milliseconds, processor
from training import RESULTS, ROOT, command, measure, read

import timm_softpool  # noqa: F401

with contextlib.suppress(ImportError):  # its networks are then left out
    import video_plugins  # noqa: F401

COST, TRAINED = RESULTS / 'cpu_class_regularization.json', RESULTS / 'class_regularization.jsonl'
PAGE, MARK = ROOT / 'docs' / 'class_regularization.md', '<!-- benchmarks/class_regularization.py -->'
# Of each network a batch of the size in its configuration, of `r3d_18_w16` as its recipes have it; and a smaller one.
CASES = [('resnet18', (8, 3, 224, 224)), ('resnet18', (16, 3, 128, 128)), ('resnet50', (8, 3, 224, 224)),
         ('resnet50', (8, 3, 128, 128)), ('densenet121', (8, 3, 224, 224)), ('densenet121', (8, 3, 128, 128)),
         ('r3d_18', (2, 3, 16, 224, 224)), ('r3d_18', (2, 3, 8, 64, 64)), ('r3d_18_w16', (32, 3, 8, 64, 64)),
         ('r3d_18_w16', (8, 3, 8, 64, 64))]
# Recipe, network -> the overrides of its runs.
RUNS = {('tiny_in20', 'resnet18'): [f'seed={seed}' for seed in (0, 1, 2, 3)],
        ('fir_action', 'r3d_18_w16'): [f'fold={fold}' + f' seed={seed}' * (seed > 0) for seed in (0, 1, 2)
                                       for fold in (0, 1, 2)]}


def training_step(name: str, size: tuple[int, ...], device: str) -> Callable[[], None]:
    model = timm.create_model(name, num_classes=100).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    input, target = torch.randn(size, device=device), torch.arange(size[0], device=device)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(input), target).backward()
        optimizer.step()

    return step


def cost(device: str, rounds: int) -> None:
    keep_freed_memory()
    report = {'processor': processor(device), 'torch': torch.__version__, 'threads': torch.get_num_threads(),
              'rounds': rounds, 'results': []}
    for name, size in CASES:
        if not timm.is_model(name):
            print(f'{name} is left out: it needs PyTorchVideo')
            continue
        steps = [training_step(name + suffix, size, device) for suffix in ('', '_classreg')]
        pairs = []
        for turn in range(rounds):
            times = {which: milliseconds(steps[which]) for which in ((0, 1), (1, 0))[turn % 2]}
            pairs.append((times[0], times[1]))
        report['results'].append({
            'network': name, 'input': size, 'plain_ms': statistics.median(pair[0] for pair in pairs),
            'classreg_ms': statistics.median(pair[1] for pair in pairs),
            'ratio': statistics.median(after / before for before, after in pairs)})
        print(report['results'][-1], flush=True)
    COST.with_name(COST.name.replace('cpu', device)).write_text(json.dumps(report, indent=1) + '\n')


def cost_table() -> str:
    report = json.loads(COST.read_text())
    head = (f'{report["processor"]}, {report["threads"]} threads, torch {report["torch"]}, float32, medians of '
            f'{report["rounds"]} steps in turn:')
    lines = [[f'`{row["network"]}`', ' x '.join(map(str, row['input'])), f'{row["plain_ms"]:.1f}',
              f'{row["classreg_ms"]:.1f}', f'{row["ratio"]:.3f}'] for row in report['results']]
    return f'{head}\n\n{markdown(["network", "input", "without, ms", "with, ms", "ratio"], lines)}'


def accuracy_table() -> str:
    """Top-1 in %, mean and sample deviation of the runs, and of the differences run by run."""
    rows = read(TRAINED)
    lines = []
    for (recipe, network), runs in RUNS.items():
        without, with_ = ([rows[command(recipe, network + suffix, run)]['top1'] for run in runs]
                          for suffix in ('', '_classreg'))
        lines.append([f'`{recipe}`', f'`{network}`', str(len(runs)), spread(without), spread(with_),
                      spread([b - a for a, b in zip(without, with_)], '+')])
    return markdown(['recipe', 'network', 'runs', 'without', 'with', 'difference'], lines)


def update(text: str) -> str:
    """The page with its tables made anew, each between a pair of marks."""
    return with_tables(text, MARK, (cost_table(), accuracy_table()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--train', action='store_true')
    parser.add_argument('--report', action='store_true')
    args = parser.parse_args()
    if args.train:
        measure(TRAINED, [command(recipe, network + suffix, run) for (recipe, network), runs in RUNS.items()
                          for run in runs for suffix in ('', '_classreg')])
    elif not args.report:
        cost(args.device, args.rounds)
    if args.device == 'cpu':
        PAGE.write_text(update(PAGE.read_text()))


if __name__ == '__main__':
    main()
