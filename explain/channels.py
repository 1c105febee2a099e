"""Channels followed through a forward pass: beside each activation goes a tensor of ids that says where it comes from.

An id stands for a set of kernels (layer, index) and a set of those that only scale it (gates). What merely moves numbers
is done to the ids, too, so that any split, shuffle or reshaping is followed exactly; sums unite sets; products with
parameters begin a new layer. Ids are float64, for which more of PyTorch's operators exist than for integers.
"""
from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from timm_softpool._private import TorchDispatchMode

from .capture import map_tensors, tensors_of

Kernel = tuple[str, int]  # a layer's name, and which of its outputs
Ids = tuple[int, ...]

VIEWS = {'view', '_unsafe_view', 'reshape', '_reshape_alias'}
MOVES = {'permute', 'transpose', 't', 'movedim', 'expand', 'squeeze', 'unsqueeze', 'slice', 'select', 'narrow',
         'diagonal', 'split', 'split_with_sizes', 'unsafe_split', 'unsafe_split_with_sizes', 'unbind', 'chunk', 'cat',
         'stack', 'index_select', 'gather', 'index', 'flip', 'roll', 'unfold', 'repeat', 'tile', 'im2col',
         'pixel_shuffle', 'pixel_unshuffle', 'native_channel_shuffle', 'channel_shuffle', 'slice_scatter',
         'select_scatter', 'index_put', 'constant_pad_nd', 'reflection_pad1d', 'reflection_pad2d', 'reflection_pad3d',
         'replication_pad1d', 'replication_pad2d', 'replication_pad3d'}
WRITES = {'copy_', 'index_put_', 'index_copy_', 'fill_', 'zero_'}  # also into a part of a tensor
FACTORIES = {'empty', 'empty_like', 'new_empty', 'zeros', 'zeros_like', 'new_zeros', 'ones', 'ones_like', 'new_ones',
             'full', 'full_like', 'new_full', 'empty_strided', 'new_empty_strided'}
PRODUCTS = {'mm', 'addmm', 'bmm', 'baddbmm', 'mv', 'linear'}
RECURRENCES = {'lstm', 'gru', 'rnn_tanh', 'rnn_relu', 'mkldnn_rnn_layer', '_cudnn_rnn', 'miopen_rnn'}


class FlowLayer(NamedTuple):
    """A convolution or matrix product with parameters.

    Attributes:
        name: Of its module, with '@1' behind it for its second call where there are several, as `find_layers` has it;
            with the parameter's name behind it where that is not ``weight``.
        module: The module that owns the parameter.
        kernels: What it gives.
        channels: What it takes, of all groups together.
        groups: Of channels, each read by as many kernels.
    """

    name: str
    module: str
    kernels: int
    channels: int
    groups: int


class Sets:
    """What ids stand for: pairs of a set of kernels and a set of gates. Id 0 is of nothing."""

    def __init__(self) -> None:
        self.size = 1
        self.starts, self.names = [0], ['']  # ranges of ids with one kernel each
        self.joined: dict[int, tuple[Ids, Ids]] = {}  # of what, and gated by what
        self.known: dict[tuple[Ids, Ids], int] = {}
        self.found: dict[int, tuple[frozenset[Kernel], frozenset[Kernel]]] = {0: (frozenset(), frozenset())}

    def layer(self, name: str, kernels: int) -> Tensor:
        """New ids (kernels,)."""
        self.starts.append(self.size)
        self.names.append(name)
        self.size += kernels
        return torch.arange(self.size - kernels, self.size, dtype=torch.float64)

    def layer_of(self, indices: Sequence[int]) -> str:
        """The layer that made exactly these, in their order; '' for none."""
        which = bisect_right(self.starts, indices[0]) - 1
        end = self.starts[which + 1] if which + 1 < len(self.starts) else self.size
        return self.names[which] if list(indices) == list(range(self.starts[which], end)) else ''

    def of(self, index: int) -> tuple[frozenset[Kernel], frozenset[Kernel]]:
        if index not in self.found:
            if index in self.joined:
                parts, gates = ([self.of(part) for part in ids] for ids in self.joined[index])
                kernels = frozenset().union(*(made for made, _ in parts))
                self.found[index] = kernels, frozenset().union(*(scaled for _, scaled in parts), *itertools.chain(*gates))
            else:
                which = bisect_right(self.starts, index) - 1
                self.found[index] = frozenset([(self.names[which], index - self.starts[which])]), frozenset()
        return self.found[index]

    def join(self, indices: Iterable[int], gates: Iterable[int] = ()) -> int:
        """The id of all kernels of ``indices``, with their gates and all that ``gates`` stand for as gates."""
        key = tuple(sorted(set(indices) - {0})), tuple(sorted(set(gates) - {0}))
        if len(key[0]) < 2 and not key[1]:
            return key[0][0] if key[0] else 0
        if key not in self.known:
            self.starts.append(self.size)
            self.names.append('')
            self.known[key], self.joined[self.size] = self.size, key
            self.size += 1
        return self.known[key]


class ChannelFlow(TorchDispatchMode):
    """Follows the channels of all that is computed in a ``with`` block, by the module's rules.

    Attributes:
        layers: Of each layer, in order of execution, with the ids of its channels.
        norms: Of a layer with a batch normalisation right behind it, that module's name.
        opaque: How often an operator was met whose channels could not be told apart, by its name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sets = Sets()
        self.layers: list[tuple[FlowLayer, list[int]]] = []
        self.norms: dict[str, str] = {}
        self.opaque: dict[str, int] = {}
        self._ids, self._origins, self._attention = (WeakTensorKeyDictionary() for _ in range(3))
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named():
                self._origins[tensor] = name

    def begin(self, arguments: Any) -> None:
        """Follow these tensors, the inputs of the network, as nothing that a kernel made."""
        for tensor in tensors_of(arguments):
            self._ids[tensor] = torch.zeros((), dtype=torch.float64).expand(tensor.shape)

    def ids(self, tensor: Tensor, axis: int) -> list[int]:
        """Of each position on ``axis``, united over all others."""
        return self._along(self._ids[tensor], axis) if tensor in self._ids else [0] * tensor.shape[axis]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self._follow(func.name().partition('::')[2].partition('.')[0], func, args, kwargs, output)
        return output

    def _follow(self, name: str, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        outputs = [tensor for tensor in tensors_of(output) if tensor.is_floating_point()]
        given = tensors_of((args, kwargs))
        followed = [tensor for tensor in given if tensor in self._ids]
        if not outputs:
            return
        if name in FACTORIES:
            for tensor in outputs:  # memory of its own, as parts of it may be written
                self._ids[tensor] = torch.zeros(tensor.shape, dtype=torch.float64)
        elif not followed:
            origin = next((self._origins[tensor] for tensor in given if tensor in self._origins), None)
            for tensor in outputs if origin else ():
                self._origins[tensor] = origin
        elif name in ('convolution', '_convolution', 'conv2d', 'conv3d'):
            self._convolution(args, outputs[0])
        elif name in PRODUCTS:
            self._product(name, args, outputs[0])
        elif name in RECURRENCES:
            self._layer(args[1] if isinstance(args[1], Tensor) else tensors_of(args)[-1], args[0], -1, outputs[0], -1)
        elif 'scaled_dot_product' in name:
            query, key, value = args[:3]
            self._ids[outputs[0]] = self._gated(self._united(self._of(value), [-2]), [query, key], outputs[0].shape)
        elif name in VIEWS:
            self._ids[outputs[0]] = self._of(args[0]).reshape(outputs[0].shape)
        elif name in MOVES and self._moves(name, args, outputs):
            moved = func(*map_tensors(self._moved, args), **map_tensors(self._moved, kwargs))
            self._ids.update(zip(outputs, tensors_of(moved)))
        elif name in WRITES and self._of(args[0]).is_contiguous():
            func(*map_tensors(self._moved, args))
        elif name == 'glu':
            axis = args[1] if len(args) > 1 else -1
            self._ids[outputs[0]] = self._sum(list(self._of(args[0]).chunk(2, axis)))
        else:
            if 'batch_norm' in name and (origin := self._origins.get(args[1])):
                self.norms[self.sets.layer_of(self._along(self._of(args[0]), 1))] = origin.rpartition('.')[0]
            self._rest(name, func, args, kwargs, followed, outputs)
        if name.endswith('softmax') or followed and any(tensor in self._attention for tensor in followed):
            if name not in PRODUCTS and 'convolution' not in name:
                self._attention.update({tensor: True for tensor in outputs})

    # Layers.

    def _convolution(self, args: Any, output: Tensor) -> None:
        input, weight, groups = args[0], args[1], args[8] if len(args) > 8 else args[-1]
        is_filter = weight in self._origins and not self._is_parameter(weight)
        if is_filter and groups == input.shape[1] == output.shape[1]:  # as in a blur pool
            self._ids[output] = resized(self._united_where(self._of(input), output.shape), output.shape)
        else:
            self._layer(weight, input, 1, output, 1, groups)

    def _product(self, name: str, args: Any, output: Tensor) -> None:
        left, right = args[1:3] if name in ('addmm', 'baddbmm') else args[:2]
        if name == 'linear':
            right = right.t()
            self._origins[right] = self._origins.get(args[1])
        if self._is_activation(left) and self._is_activation(right):
            self._attend(left, right, output)
        elif self._is_activation(left):
            groups = right.shape[0] if name in ('bmm', 'baddbmm') and right.stride(0) and right.shape[0] > 1 else 1
            self._layer(right, left, -1, output, -1, groups)
        else:
            groups = left.shape[0] if name in ('bmm', 'baddbmm') and left.stride(0) and left.shape[0] > 1 else 1
            self._layer(left, right, -2, output, -2, groups)

    def _layer(self, weight: Tensor, input: Tensor, channel_axis: int, output: Tensor, kernel_axis: int,
               groups: int = 1) -> None:
        """Begin a layer; the ``groups`` of a batched product are along its first axis."""
        batched = groups > 1 and channel_axis < 0
        ids = self._of(input)
        if batched:
            channels = [index for part in ids for index in self._along(part, channel_axis)]
        else:
            channels = self._along(ids, channel_axis)
        kernels = output.shape[kernel_axis] * (groups if batched else 1)
        origin = self._origins.get(weight) or 'functional.weight'
        module, _, parameter = origin.partition('.parametrizations.')[0].rpartition('.') if \
            '.parametrizations.' not in origin else (origin.partition('.parametrizations.')[0], '', 'weight')
        name = module if parameter == 'weight' and module else f'{module}.{parameter}'.lstrip('.')
        number = sum(layer.name.rpartition('@')[0] == name for layer, _ in self.layers)
        layer = FlowLayer(f'{name}@{number}', module, kernels, len(channels), groups)
        self.layers.append((layer, channels))
        new = self.sets.layer(layer.name, kernels)
        shape = [1] * output.ndim
        shape[kernel_axis] = output.shape[kernel_axis]
        if batched:
            shape[0] = groups
        self._ids[output] = new.reshape(shape).expand(output.shape)
        if weight in self._ids:  # weights that the input chooses
            self._ids[output] = self._gated(self._ids[output], [weight], output.shape)

    def _attend(self, left: Tensor, right: Tensor, output: Tensor) -> None:
        """A product of two activations: rows of one weigh the columns of the other, if it is attention."""
        first, second = self._of(left), self._of(right)
        rows = self._united(first, [-1]).expand(*output.shape[:-1], 1)
        columns = self._united(second, [-2]).expand(*output.shape[:-2], 1, output.shape[-1])
        if left in self._attention:
            self._ids[output] = self._gated(columns, [left], output.shape)
        elif right in self._attention:
            self._ids[output] = self._gated(rows, [right], output.shape)
        else:
            self._ids[output] = self._sum([rows.expand(output.shape), columns.expand(output.shape)])

    # What is no layer.

    def _moves(self, name: str, args: Any, outputs: list[Tensor]) -> bool:
        """Whether an operator is to be done to ids; padding what is constant needs not."""
        return 'pad' not in name or self._united_where(self._of(args[0]), outputs[0].shape, strict=True) is None

    def _moved(self, tensor: Tensor) -> Tensor:
        """Ids for a tensor; indices are themselves."""
        return self._of(tensor) if tensor.is_floating_point() else tensor

    def _rest(self, name: str, func: Any, args: Any, kwargs: Any, followed: list[Tensor], outputs: list[Tensor]) -> None:
        """Operators element by element, averages, pools and the like; what is none of them is opaque."""
        schema = {argument.name: position for position, argument in enumerate(func._schema.arguments)}
        output = outputs[0]
        if 'keepdim' in schema and (len(followed) == 1):
            axes = _argument('dim', schema, args, kwargs)
            axes = list(range(followed[0].ndim)) if axes is None else [axes] if isinstance(axes, int) else list(axes)
            ids = self._united(self._of(followed[0]), axes or list(range(followed[0].ndim)))
            for axis in sorted((axis % followed[0].ndim for axis in axes), reverse=True) \
                    if output.ndim < followed[0].ndim else ():
                ids = ids.squeeze(axis)
            self._ids[output] = ids.expand(output.shape) if ids.ndim <= output.ndim else ids.reshape(output.shape)
            return
        whole = [tensor for tensor in followed if tensor.shape == output.shape]
        smaller = [tensor for tensor in followed if tensor.shape != output.shape]
        if all(_broadcasts(tensor.shape, output.shape) for tensor in followed):
            if name in ('mul', 'mul_', 'div', 'div_') and whole and smaller:
                self._ids[output] = self._gated(self._of(whole[0]), smaller, output.shape)
            else:
                self._ids[output] = self._sum([self._of(tensor).expand(output.shape) for tensor in followed])
        elif len(followed) == 1 and followed[0].ndim == output.ndim:
            self._ids[output] = resized(self._united_where(self._of(followed[0]), output.shape), output.shape)
        else:
            self.opaque[name] = self.opaque.get(name, 0) + 1
            everything = self.sets.join(index for tensor in followed for index in self._all(tensor))
            for tensor in outputs:
                self._ids[tensor] = torch.tensor(float(everything), dtype=torch.float64).expand(tensor.shape)

    # Ids.

    def _is_activation(self, tensor: Tensor) -> bool:
        return tensor in self._ids

    def _is_parameter(self, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or tensor.requires_grad

    def _of(self, tensor: Tensor) -> Tensor:
        """The ids of ``tensor``, of its shape; zeros for one that is not followed."""
        found = self._ids.get(tensor)
        return torch.zeros((), dtype=torch.float64).expand(tensor.shape) if found is None else found

    def _all(self, tensor: Tensor) -> list[int]:
        return compact(self._of(tensor)).unique().long().tolist()

    def _along(self, ids: Tensor, axis: int) -> list[int]:
        axis %= ids.ndim
        united = self._united(ids, [other for other in range(ids.ndim) if other != axis])
        return united.flatten().long().tolist()

    def _united(self, ids: Tensor, axes: Sequence[int]) -> Tensor:
        """``ids`` with one cell along ``axes``, in which all that was there is."""
        axes = sorted({axis % ids.ndim for axis in axes})
        small = compact(ids)
        if any(small.shape[axis] > 1 for axis in axes):
            rows = small.movedim(axes, [*range(-len(axes), 0)])
            shape = rows.shape[:-len(axes)]
            found, inverse = rows.reshape(shape.numel(), -1).unique(dim=0, return_inverse=True)
            joined = torch.tensor([self.sets.join(row) for row in found.long().tolist()], dtype=torch.float64)
            small = joined[inverse].reshape(shape)
            for axis in axes:
                small = small.unsqueeze(axis)
        return small.expand([1 if axis in axes else size for axis, size in enumerate(ids.shape)])

    def _united_where(self, ids: Tensor, shape: Sequence[int], strict: bool = False) -> Any:
        """``ids`` united along the axes in which ``shape`` differs; None, if ``strict`` and there is more to unite."""
        axes = [axis for axis, (size, other) in enumerate(zip(ids.shape, shape)) if size != other]
        if strict and any(compact(ids).shape[axis] > 1 for axis in axes):
            return None
        return self._united(ids, axes) if axes else ids

    def _sum(self, parts: list[Tensor]) -> Tensor:
        total = parts[0]
        for part in parts[1:]:
            total = self._pairwise(total, part, lambda first, second: self.sets.join([first, second]))
        return total

    def _gated(self, ids: Tensor, gates: list[Tensor], shape: Sequence[int]) -> Tensor:
        for gate in gates:
            cells = self._of(gate)
            if not _broadcasts(cells.shape, shape):
                cells = torch.tensor(float(self.sets.join(self._all(gate))), dtype=torch.float64)
            ids = self._pairwise(ids.expand(shape), cells.expand(shape),
                                 lambda first, second: self.sets.join([first], [second]))
        return ids.expand(shape)

    def _pairwise(self, first: Tensor, second: Tensor, join: Callable[[int, int], int]) -> Tensor:
        shape = first.shape
        first, second = torch.broadcast_tensors(compact(first), compact(second))
        if not second.any():
            return first.expand(shape)
        found, inverse = torch.stack([first.flatten(), second.flatten()], 1).unique(dim=0, return_inverse=True)
        joined = torch.tensor([join(*pair) for pair in found.long().tolist()], dtype=torch.float64)
        return joined[inverse].reshape(first.shape).expand(shape)


def compact(ids: Tensor) -> Tensor:
    """``ids`` with one cell along each axis on which they are constant."""
    for axis in range(ids.ndim):
        if ids.shape[axis] > 1:
            first = ids.narrow(axis, 0, 1)
            if ids.stride(axis) == 0 or bool((ids == first).all()):
                ids = first
    return ids


def resized(ids: Tensor, shape: Sequence[int]) -> Tensor:
    return ids.expand([*shape])


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, other) for size, other in zip(reversed(shape), reversed(target)))


def _argument(name: str, schema: dict[str, int], args: Any, kwargs: Any) -> Any:
    position = schema.get(name, len(args))
    return kwargs.get(name, args[position] if position < len(args) else None)
