"""Train narrow video networks with one recipe each for two tasks, and tabulate what they reach.

    python benchmarks/video.py             # runs what benchmarks/results/video.jsonl lacks; a killed run goes on
    python benchmarks/video.py --report    # writes docs/video_results.md from that file
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / 'benchmarks' / 'results' / 'video.jsonl', ROOT / 'docs' / 'video_results.md'
NETWORKS = ('r3d_18_w16', 'fast_r3d_18_w16', 'srtg_r3d_18_w16', 'mtnet_xs_w16', 'mtnet_xs_g8_w16')
# Recipe -> the overrides of each of its runs.
RUNS = {'camera_motion': ('epochs=12', 'epochs=6 validate_epochs=6', 'epochs=6 validate_epochs=6 seed=1'),
        'fir_action': ('fold=0', 'fold=1', 'fold=2')}
# Only this one, to see how much a seed changes; the others take their time.
ONCE = {'epochs=6 validate_epochs=6 seed=1': 'r3d_18_w16'}
MARK = '<!-- benchmarks/video.py -->'


def command(recipe: str, network: str, run: str) -> list[str]:
    output = f'runs/{network}-{recipe}-{run.replace(" ", "-")}'
    return ['timm-softpool', 'train', f'recipes/{recipe}.yaml', f'model={network}', *run.split(), f'output={output}']


def read() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def measure() -> None:
    for run, recipe, network in [(run, recipe, network) for recipe, runs in RUNS.items() for run in runs
                                 for network in NETWORKS]:
        arguments = command(recipe, network, run)
        if any(row['recipe'] == ' '.join(arguments) for row in read()):
            continue
        subprocess.run([sys.executable, '-m', 'timm_softpool.cli', *arguments[1:]], cwd=ROOT, check=True)
        result = ROOT / arguments[-1].partition('=')[2] / 'result.json'
        with open(RESULTS, 'a') as file:
            file.write(result.read_text())


def table(rows: list[dict], recipe: str) -> str:
    """One line for each network: its accuracy in each run, mean, sample standard deviation, size and time."""
    runs = RUNS[recipe]
    head = ['network', *(run.replace('=', ' ') for run in runs), 'mean ± deviation', 'parameters, M', 'MAC, M',
            'training, s']
    lines = [head, ['---'] * len(head)]
    for network in NETWORKS:
        found = [next(row for row in rows if row['recipe'] == ' '.join(command(recipe, network, run))) for run in runs]
        scores = [row['top1'] for row in found]
        lines.append([f'`{network}`', *(f'{score:.2f}' for score in scores),
                      f'{mean(scores):.2f} ± {stdev(scores):.2f}', f'{found[0]["parameters"] / 1e6:.2f}',
                      f'{found[0]["macs"] / 1e6:.1f}', f'{mean(row["seconds"] for row in found):.0f}'])
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def update(text: str, rows: list[dict]) -> str:
    """The page with its tables made anew: one between each pair of marks, in the order of the recipes."""
    parts = text.split(MARK)
    parts[1::2] = [f'\n{table(rows, recipe)}\n' for recipe in RUNS]
    return MARK.join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--report', action='store_true', help='only write the tables')
    if not parser.parse_args().report:
        measure()
    PAGE.write_text(update(PAGE.read_text(), read()))


if __name__ == '__main__':
    main()
