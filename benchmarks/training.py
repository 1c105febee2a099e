"""Runs of `timm-softpool train` whose results are kept, a line of JSON for each command."""
from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

from timm_softpool.cli import main

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'


Command = tuple[str, ...]


def command(recipe: str, network: str, run: str) -> Command:
    output = f'runs/{network}-{recipe}-{run.replace(" ", "-")}'
    return 'timm-softpool', 'train', f'recipes/{recipe}.yaml', f'model={network}', *run.split(), f'output={output}'


def read(results: Path) -> dict[Command, dict]:
    """The results by their commands."""
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return {tuple(shlex.split(row['recipe'])): row for row in rows}


def measure(results: Path, commands: list[Command]) -> None:
    """Run those commands whose results are missing; a killed run goes on."""
    os.chdir(ROOT)  # where the recipes look for data
    for arguments in commands:
        if arguments not in read(results):
            if status := main([*arguments[1:]]):
                raise SystemExit(status)
            with open(results, 'a') as file:
                file.write(Path(arguments[-1].partition('=')[2], 'result.json').read_text())
