"""Sets of kernels as numbers, ids, so that a tensor can say of each of its cells which kernels it is made of.

Tensors of ids are float64, for which more of PyTorch's operators exist than for integers. Along axes on which they are
constant they are expanded from one cell, and only that is computed with.
"""
from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Ids = tuple[int, ...]
NumberedKernel = tuple[int, int]  # a layer's number, and which of its kernels


class KernelSet(NamedTuple):
    """Kernels that something is made of, and those that only scale it."""

    producers: frozenset[NumberedKernel] = frozenset()
    modulators: frozenset[NumberedKernel] = frozenset()


CONSTANT, INPUT = 0, 1  # ids of what no kernel made


class KernelSets:
    """What ids stand for."""

    def __init__(self) -> None:
        self._size = 2
        self._starts: list[int] = []  # of each layer, the id of its first kernel; the others' follow
        self._counts: list[int] = []
        self._joins: dict[int, tuple[Ids, Ids]] = {}  # of what, and gated by what
        self._known: dict[tuple[Ids, Ids], int] = {}
        self._sets: dict[int, KernelSet] = {CONSTANT: KernelSet(), INPUT: KernelSet()}

    def layer(self, kernels: int) -> Tensor:
        """Ids (kernels,) for the kernels of a further layer; layers are numbered from 0."""
        self._starts.append(self._size)
        self._counts.append(kernels)
        self._size += kernels
        return torch.arange(self._size - kernels, self._size, dtype=torch.float64)

    def layer_of(self, ids: Sequence[int]) -> int | None:
        """The number of the layer that made exactly these, in their order."""
        number = bisect_right(self._starts, ids[0]) - 1
        if number >= 0 and list(ids) == list(range(self._starts[number], self._starts[number] + self._counts[number])):
            return number
        return None

    def __getitem__(self, id: int) -> KernelSet:
        if id not in self._sets:
            if id in self._joins:
                parts, gates = ([self[part] for part in ids] for ids in self._joins[id])
                self._sets[id] = KernelSet(
                    frozenset().union(*(part.producers for part in parts)),
                    frozenset().union(*(part.modulators for part in parts), *itertools.chain(*gates)))
            else:
                number = bisect_right(self._starts, id) - 1
                self._sets[id] = KernelSet(frozenset([(number, id - self._starts[number])]))
        return self._sets[id]

    def join(self, ids: Iterable[int], gates: Sequence[int] = ()) -> int:
        """The id of all that ``ids`` stand for, with all that ``gates`` stand for as modulators."""
        key = tuple(sorted({*ids} - {CONSTANT})), tuple(sorted({*gates} - {CONSTANT})) if gates else ()
        if len(key[0]) < 2 and not key[1]:
            return key[0][0] if key[0] else CONSTANT
        if key not in self._known:
            self._known[key], self._joins[self._size] = self._size, key
            self._size += 1
        return self._known[key]

    def united(self, ids: Tensor, axes: Iterable[int]) -> Tensor:
        """``ids`` with one cell along each of ``axes``, the union of what was there."""
        axes = sorted({axis % ids.ndim for axis in axes})
        small = cells(ids)
        if any(small.shape[axis] > 1 for axis in axes):
            last = [*range(-len(axes), 0)]
            rows = small.movedim(axes, last)
            shape = rows.shape[:-len(axes)]
            found, inverse = rows.reshape(shape.numel(), -1).unique(dim=0, return_inverse=True)
            joined = _tensor([self.join(row) for row in found.long().tolist()])
            small = joined[inverse].reshape(*shape, *[1] * len(axes)).movedim(last, axes)
        return small.expand([1 if axis in axes else size for axis, size in enumerate(ids.shape)])

    def along(self, ids: Tensor, axis: int) -> list[int]:
        """The id of each position on ``axis``, united over the other axes."""
        return self.united(ids, {*range(ids.ndim)} - {axis % ids.ndim}).flatten().long().tolist()

    def sums(self, parts: Sequence[Tensor]) -> Tensor:
        """Cell by cell, the union of ``parts``, which broadcast against each other."""
        total = parts[0]
        for part in parts[1:]:
            total = self._pairs(total, part, lambda first, second: self.join([first, second]))
        return total

    def gated(self, ids: Tensor, gates: Tensor) -> Tensor:
        """Cell by cell, ``ids`` scaled by ``gates``, which broadcast against each other."""
        return self._pairs(ids, gates, lambda first, second: self.join([first], [second]))

    def _pairs(self, first: Tensor, second: Tensor, join: Callable[[int, int], int]) -> Tensor:
        shape = torch.broadcast_shapes(first.shape, second.shape)
        small = torch.broadcast_tensors(cells(first), cells(second))
        if not small[1].any():
            return first if first.shape == shape else first.expand(shape)
        found, inverse = torch.stack([part.flatten() for part in small], 1).unique(dim=0, return_inverse=True)
        joined = _tensor([join(*pair) for pair in found.long().tolist()])
        return joined[inverse].reshape(small[0].shape).expand(shape)


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


def _tensor(ids: list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.float64)
