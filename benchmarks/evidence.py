"""Write docs/evidence.md's tables, all from the results that benchmarks/results/ holds.

    python benchmarks/evidence.py
"""
from __future__ import annotations

import json

import class_regularization
import downsampling
import latency
import pools
import twins
import video
from pages import markdown, with_tables
from training import RESULTS, ROOT, read

PAGE, MARK = ROOT / 'docs' / 'evidence.md', '<!-- benchmarks/evidence.py -->'
MODELS = RESULTS / 'cpu_models.json'


def networks_table() -> str:
    """Parameters, MAC and latency of each trained network for each input, and beside the plain one's."""
    report = json.loads(latency.LATENCY.read_text())
    titles = ['network', 'input', 'parameters, M', '/ plain', 'MAC, M', '/ plain', 'inference, ms', '/ plain']
    lines = []
    for size, rows in latency.trained().items():
        plain = next(iter(rows.values()))
        for name, row in rows.items():
            time = report['results'][size][name]
            lines.append([f'`{name}`', size, f'{row["parameters"] / 1e6:.2f}',
                          f'{row["parameters"] / plain["parameters"]:.2f}', f'{row["macs"] / 1e6:.1f}',
                          f'{row["macs"] / plain["macs"]:.2f}', f'{time["ms"]:.0f}', f'{time["ratio"]:.1f}'])
    threads = f'{report["threads"]} thread' + 's' * (report['threads'] > 1)
    head = (f'{report["processor"]}, {threads}, torch {report["torch"]}, float32, '
            f'medians of {report["rounds"]} rounds in turn:')
    return f'{head}\n\n{markdown(titles, lines)}'


def resnet50_table() -> str:
    """resnet50_softpool beside resnet50."""
    report = json.loads(MODELS.read_text())
    head = (f'{report["processor"]}, {report["threads"]} threads, torch {report["torch"]}, float32, '
            f'{report["batch"]} images of 224 px, medians of {report["rounds"]} rounds in turn:')
    lines = [[step, f'{row["resnet50_ms"]:.0f}', f'{row["resnet50_softpool_ms"]:.0f}', f'{row["ratio"]:.2f}']
             for step, row in report['results'].items()]
    return f'{head}\n\n{markdown(["step", "`resnet50`, ms", "`resnet50_softpool`, ms", "ratio"], lines)}'


def update(text: str) -> str:
    """The page with its tables made anew, each between a pair of marks."""
    rows = read(video.TRAINED)
    tables = [*(downsampling.scores_table(dataset) for dataset in downsampling.DATASETS),
              downsampling.differences_table(), pools.table(), twins.table(),
              class_regularization.accuracy_table(), video.table(rows, 'camera_motion'),
              video.table(rows, 'fir_action'), networks_table(), resnet50_table(),
              class_regularization.cost_table()]
    return with_tables(text, MARK, tables)


if __name__ == '__main__':
    PAGE.write_text(update(PAGE.read_text()))
