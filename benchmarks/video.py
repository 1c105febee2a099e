"""Train narrow video networks with one recipe for each of two tasks, and tabulate what they reach.

    python benchmarks/video.py            # runs what benchmarks/results/video.jsonl lacks; a killed run goes on
    python benchmarks/video.py --control  # what the published network says of clips stopped or played backwards
    python benchmarks/video.py --report   # only writes the tables of docs/video_results.md

The recipes say where the data lie.
"""
from __future__ import annotations

import argparse
import json
import re
from statistics import mean

from pages import markdown, spread, with_tables
from training import RESULTS, ROOT, Command, command, measure, read

TRAINED, CONTROL = RESULTS / 'video.jsonl', RESULTS / 'video_control.json'
PAGE = ROOT / 'docs' / 'video_results.md'
PUBLISHED = 'r3d_18_w16'
NETWORKS = ('r3d_18_w16', 'fast_r3d_18_w16', 'srtg_r3d_18_w16', 'mtnet_xs_w16', 'mtnet_xs_g8_w16')
# Recipe -> the overrides of each of its runs, and for which networks.
HALF, TWICE, FASTER = 'epochs=6 validate_epochs=6', 'epochs=24 validate_epochs=24', 'lr=6e-3'
RUNS = {'camera_motion': {'epochs=12': NETWORKS, f'epochs=12 {FASTER}': NETWORKS,
                          TWICE: ('fast_r3d_18_w16', 'mtnet_xs_g8_w16'), f'{TWICE} {FASTER}': ('srtg_r3d_18_w16',),
                          HALF: NETWORKS[:3], f'{HALF} seed=1': NETWORKS[:2]},
        'fir_action': {'fold=0': NETWORKS, 'fold=1': NETWORKS, 'fold=2': NETWORKS}}
MARK = '<!-- benchmarks/video.py -->'


def control() -> None:
    import torch

    import video_plugins
    from timm_softpool.training import load_config
    from timm_softpool.training.module import TrainingModule

    val = TrainingModule(load_config(ROOT / 'recipes' / 'camera_motion.yaml')).val_set
    model = video_plugins.create_model(PUBLISHED, pretrained=True).eval()
    clips, labels = zip(*[val[0, index] for index in range(len(val))])
    clips, labels = torch.stack(clips), torch.tensor(labels)
    opposite = labels ^ 1  # the motions come in pairs
    first, last = (clips[:, :, [frame]].expand_as(clips) for frame in (0, -1))
    scores = {}
    with torch.inference_mode():
        for name, shown, wanted in (
                ('as they are', clips, labels), ('backwards, the opposite motion asked for', clips.flip(2), opposite),
                ('the first frame, repeated', first, labels), ('the last frame, repeated', last, labels)):
            right = torch.cat([model(batch).argmax(1) for batch in shown.split(100)]) == wanted
            scores[name] = round(100 * right.sum().item() / len(right), 2)
    CONTROL.write_text(json.dumps(scores) + '\n')


def table(rows: dict[Command, dict], recipe: str) -> str:
    """One line for each network: its accuracy in each run, mean and sample deviation of folds, size and time."""
    runs, is_folds = RUNS[recipe], recipe == 'fir_action'
    head = ['network', *(re.sub(r' validate_epochs=\d+', '', run).replace('=', ' ') for run in runs),
            *['mean ± deviation'] * is_folds, 'parameters, M', 'MAC, M', 'training, s']
    lines = []
    for network in NETWORKS:
        found = [rows[command(recipe, network, run)] if network in runs[run] else None for run in runs]
        scores = [row['top1'] for row in found if row]
        lines.append([f'`{network}`', *(f'{row["top1"]:.2f}' if row else '' for row in found),
                      *([spread(scores)] if is_folds else []),
                      f'{found[0]["parameters"] / 1e6:.2f}', f'{found[0]["macs"] / 1e6:.1f}',
                      f'{mean(row["seconds"] for row in found) if is_folds else found[0]["seconds"]:.0f}'])
    return markdown(head, lines)


def update(text: str) -> str:
    """The page with its tables made anew, each between a pair of marks."""
    rows = read(TRAINED)
    scores = [[name, f'{score:.2f}'] for name, score in json.loads(CONTROL.read_text()).items()]
    return with_tables(text, MARK, [table(rows, 'camera_motion'), markdown(['clips', 'top-1, %'], scores),
                                    table(rows, 'fir_action')])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--control', action='store_true')
    parser.add_argument('--report', action='store_true')
    arguments = parser.parse_args()
    if arguments.control:
        control()
    elif not arguments.report:
        measure(TRAINED, [command(recipe, network, run) for recipe, runs in RUNS.items()
                          for run, networks in runs.items() for network in networks])
    PAGE.write_text(update(PAGE.read_text()))


if __name__ == '__main__':
    main()
