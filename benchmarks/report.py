"""Turn the figures of `pooling.py` into the README's table and a plot.

    python benchmarks/report.py [RESULTS.json] [--readme README.md] [--plot PLOT.png]
"""
from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / 'results' / 'cpu.json'
MARK = '<!-- benchmarks/report.py -->'


def table(report: dict[str, Any]) -> str:
    """What SoftPool takes, in milliseconds and beside PyTorch's pools, as Markdown."""
    lines = ['| case | forward | / max_pool | / avg_pool | forward + backward | / max_pool | / eager backend |',
             '|---|---|---|---|---|---|---|']
    for case, rows in report['results'].items():
        row = next(row for name, row in rows.items() if name in ('SoftPool cpu', 'SoftPool cuda'))
        average = f'{row["forward_to_avg_pool"]:.2f}' if 'forward_to_avg_pool' in row else 'has none'
        eager = row['forward_backward_ms'] / rows['SoftPool eager']['forward_backward_ms']
        lines.append(f'| {case} | {row["forward_ms"]:.2f} ms | {row["forward_to_max_pool"]:.2f} | {average} '
                     f'| {row["forward_backward_ms"]:.2f} ms | {row["forward_backward_to_max_pool"]:.2f} '
                     f'| {eager:.2f} |')
    return '\n'.join(lines)


def section(report: dict[str, Any]) -> str:
    on_cpu = all('SoftPool cuda' not in rows for rows in report['results'].values())
    threads = f', {report["threads"]} threads' * on_cpu
    return (f'{MARK}\n{report["processor"]}{threads}, torch {report["torch"]}, medians of {report["rounds"]} rounds in '
            f'turn:\n\n{table(report)}\n{MARK}')


def update(readme: Path, report: dict[str, Any]) -> str:
    """The text of ``readme`` with the table between its two marks made anew."""
    return re.sub(f'{MARK}.*{MARK}', lambda _: section(report), readme.read_text(), flags=re.DOTALL)


def plot(report: dict[str, Any], path: Path) -> None:
    """Bars of the forward and backward pass beside F.max_pool, logarithmic."""
    from matplotlib.figure import Figure

    names = ['max_pool', 'avg_pool', 'SoftPool cpu', 'SoftPool cuda', 'SoftPool eager', 'unfold and softmax', 'copy']
    cases = report['results']
    names = [name for name in names if any(name in rows for rows in cases.values())]
    figure = Figure(figsize=(10, 0.5 * len(cases) + 1.5), layout='constrained')
    axes = figure.subplots()
    for offset, name in enumerate(names):
        present = [i for i, rows in enumerate(cases.values()) if name in rows]
        ratios = [list(cases.values())[i][name]['forward_backward_to_max_pool'] for i in present]
        axes.barh([i + 0.8 * offset / len(names) for i in present], ratios, 0.8 / len(names), label=name)
    axes.set_yticks([i + 0.4 for i in range(len(cases))], cases)
    axes.set_xscale('log')
    axes.set_xlabel('time of a forward and backward pass / F.max_pool')
    axes.set_title(f'{report["processor"]}, torch {report["torch"]}')
    axes.invert_yaxis()
    figure.legend(loc='outside lower center', ncols=4)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('results', nargs='?', type=Path, default=RESULTS)
    parser.add_argument('--readme', type=Path, help='write the table between the marks of this file')
    parser.add_argument('--plot', type=Path, help='write a picture')
    args = parser.parse_args()
    report = json.loads(args.results.read_text())
    print(table(report))
    if args.readme:
        args.readme.write_text(update(args.readme, report))
    if args.plot:
        plot(report, args.plot)


if __name__ == '__main__':
    main()
