"""What the pages of figures are made with: tables in Markdown, each between a pair of marks."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import mean, stdev


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return '\n'.join(f'| {" | ".join(line)} |' for line in (head, ['---'] * len(head), *rows))


def spread(values: Sequence[float], sign: str = '') -> str:
    """Mean ± sample deviation, where there are two values; ``sign`` is '+' for one in front of the mean."""
    return f'{mean(values):{sign}.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def with_tables(text: str, mark: str, tables: Iterable[str]) -> str:
    """The page ``text`` with what stands between each pair of ``mark`` made anew."""
    parts = text.split(mark)
    parts[1::2] = [f'\n{table}\n' for table in tables]
    return mark.join(parts)
