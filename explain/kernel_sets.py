"""Sets of kernels as numbers, ids, so that a tensor can say of each of its cells which kernels it is made of.

Tensors of ids are float64, for which more of PyTorch's operators exist than for integers. Along axes on which they are
constant they are expanded from one cell, and only that is computed with.
"""
from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

NumberedKernel = tuple[int, int]  # a layer's number, and which of its kernels


class KernelSet(NamedTuple):
    """Kernels that something is made of, and those that only scale it."""

    producers: frozenset[NumberedKernel] = frozenset()
    modulators: frozenset[NumberedKernel] = frozenset()


CONSTANT, INPUT = 0, 1  # ids of what no kernel made


class KernelSets:
    """What ids stand for. They are given out in blocks: to the kernels of a layer, or to unions of other ids."""

    def __init__(self) -> None:
        self._size = 2
        self._starts: list[int] = []  # of each block, its first id
        self._blocks: list[int | tuple[np.ndarray, int]] = []  # a layer's number, or what `_joined` was given
        self._layers: dict[range, int] = {}  # by the ids of their kernels
        self._sets: dict[int, KernelSet] = {CONSTANT: KernelSet(), INPUT: KernelSet()}

    def layer(self, kernels: int) -> Tensor:
        """Ids (kernels,) for the kernels of a further layer; layers are numbered from 0."""
        number = len(self._layers)
        self._layers[range(self._size, self._size + kernels)] = number
        return self._block(number, kernels)

    def layer_of(self, ids: Sequence[int]) -> int | None:
        """The number of the layer that made exactly these, in their order."""
        made = range(ids[0], ids[0] + len(ids))
        return self._layers.get(made) if list(ids) == list(made) else None

    def __getitem__(self, id: int) -> KernelSet:
        if id not in self._sets:
            number = bisect_right(self._starts, id) - 1
            block, place = self._blocks[number], id - self._starts[number]
            if isinstance(block, int):
                self._sets[id] = KernelSet(frozenset([(block, place)]))
            else:
                rows, count = block
                row = [self[part] for part in rows[place].tolist()]
                self._sets[id] = KernelSet(
                    frozenset().union(*(part.producers for part in row[:count])),
                    frozenset().union(*(part.modulators for part in row[:count]), *itertools.chain(*row[count:])))
        return self._sets[id]

    def united(self, ids: Tensor, axes: Iterable[int]) -> Tensor:
        """``ids`` with one cell along each of ``axes``, the union of what was there."""
        axes = sorted({axis % ids.ndim for axis in axes})
        small = cells(ids)
        if any(small.shape[axis] > 1 for axis in axes):
            last = [*range(-len(axes), 0)]
            rows = small.movedim(axes, last)
            shape = rows.shape[:-len(axes)]
            rows = rows.reshape(shape.numel(), -1)
            again = (rows[:, 1:] == rows[:, :-1]).all(0)  # as of tokens, all but one alike
            found, inverse = rows[:, F.pad(~again, (1, 0), value=True)].unique(dim=0, return_inverse=True)
            joined = self._joined(found.long(), found.shape[1])
            small = joined[inverse].reshape(*shape, *[1] * len(axes)).movedim(last, axes)
        return small.expand([1 if axis in axes else size for axis, size in enumerate(ids.shape)])

    def along(self, ids: Tensor, axis: int) -> list[int]:
        """The id of each position on ``axis``, united over the other axes."""
        return self.united(ids, {*range(ids.ndim)} - {axis % ids.ndim}).flatten().long().tolist()

    def sums(self, parts: Sequence[Tensor]) -> Tensor:
        """Cell by cell, the union of ``parts``, which broadcast against each other."""
        total = parts[0]
        for part in parts[1:]:
            total = self._pairs(total, part, 2)
        return total

    def gated(self, ids: Tensor, gates: Tensor) -> Tensor:
        """Cell by cell, ``ids`` scaled by ``gates``, which broadcast against each other."""
        return self._pairs(ids, gates, 1)

    def _pairs(self, first: Tensor, second: Tensor, count: int) -> Tensor:
        shape = torch.broadcast_shapes(first.shape, second.shape)
        small = torch.broadcast_tensors(cells(first), cells(second))
        if not small[1].any():
            return first.expand(shape)
        size = self._size  # each pair as one number: numbers are sorted some 30 times faster than rows
        found, inverse = (small[0].long() * size + small[1].long()).unique(return_inverse=True)
        return self._joined(torch.stack([found // size, found % size], 1), count)[inverse].expand(shape)

    def _joined(self, rows: Tensor, count: int) -> Tensor:
        """For each of ``rows`` an id of its first ``count`` ids together, with all of the others as modulators."""
        parts = rows[:, :count]
        ids = parts.amax(1)
        new = ((parts != ids[:, None]) & (parts != CONSTANT)).any(1) | rows[:, count:].any(1)
        ids = ids.double()
        ids[new] = self._block((rows[new].numpy(), count), int(new.sum()))
        return ids

    def _block(self, made: int | tuple[np.ndarray, int], count: int) -> Tensor:
        self._starts.append(self._size)
        self._blocks.append(made)
        self._size += count
        return torch.arange(self._size - count, self._size, dtype=torch.float64)


def cells(ids: Tensor) -> Tensor:
    """``ids`` with one cell along each axis of stride 0."""
    for axis, (size, stride) in enumerate(zip(ids.shape, ids.stride())):
        if size > 1 and stride == 0:
            ids = ids.narrow(axis, 0, 1)
    return ids


def compact(ids: Tensor) -> Tensor:
    """``ids`` with one cell along each axis on which they are constant."""
    ids = cells(ids)
    for axis, size in enumerate(ids.shape):
        if size > 1 and bool((ids == (first := ids.narrow(axis, 0, 1))).all()):
            ids = first
    return ids
