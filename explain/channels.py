"""Channels followed through a forward pass: beside each activation goes a tensor of ids (`explain.kernel_sets`).

Products and convolutions with parameters begin a new layer. What merely moves numbers is done to the ids, too, so that
any split, shuffle or reshaping is followed exactly. Sums unite sets, and so do averages over what they are taken of.
A factor that is smaller than what it scales, as of squeeze and excitation, is a gate, and so is attention.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .capture import map_tensors, named_layers, tensors_of
from .kernel_sets import CONSTANT, INPUT, KernelSets, cells, compact

try:
    from torch.utils._python_dispatch import TorchDispatchMode  # so PyTorch's notes on extending it name it
except ImportError as error:
    raise ImportError(f'explain needs torch>=2.11 with torch.utils._python_dispatch, got {torch.__version__}'
                      ) from error

# Names of PyTorch's operators, without the underscore of those that work in place.
CONVOLUTIONS = {'convolution', '_convolution', 'convolution_overrideable'}
PRODUCTS = {'mm': 0, 'bmm': 0, 'mv': 0, 'addmm': 1, 'baddbmm': 1, 'addmv': 1}  # where their factors begin
RECURRENCES = {'lstm', 'gru', 'rnn_tanh', 'rnn_relu', 'mkldnn_rnn_layer', '_cudnn_rnn', 'miopen_rnn'}
SAMPLERS = {'grid_sampler_2d', 'grid_sampler_3d', 'cudnn_grid_sampler', 'roi_align', 'roi_pool'}
VIEWS = {'view', '_unsafe_view', 'reshape', '_reshape_alias'}
MOVES = {'permute', 'transpose', 't', 'movedim', 'expand', 'squeeze', 'unsqueeze', 'slice', 'select', 'narrow',
         'diagonal', 'split', 'split_with_sizes', 'unsafe_split', 'unsafe_split_with_sizes', 'unbind', 'chunk', 'cat',
         'stack', 'index_select', 'gather', 'index', 'flip', 'roll', 'rot90', 'unfold', 'repeat', 'tile', 'im2col',
         'pixel_shuffle', 'pixel_unshuffle', 'channel_shuffle', 'native_channel_shuffle', 'slice_scatter',
         'select_scatter', 'index_put', 'index_copy', 'scatter'}


class FlowLayer(NamedTuple):
    """A convolution or matrix product with parameters.

    Attributes:
        name: The dotted name of ``module``; of a parameter that is not its ``weight``, with the parameter's behind it.
            'functional' for weights that the network computes from its inputs. A `FlowGraph` puts '@0', '@1', ...
            behind the name where it is of several layers.
        module: The dotted name of the module that owns the parameter.
        kernels: How many channels it gives.
        channels: How many it takes, in all groups together.
        groups: Of channels, each read by as many kernels.
    """

    name: str
    module: str
    kernels: int
    channels: int
    groups: int


class ChannelFlow(TorchDispatchMode):
    """Follows the channels of all that is computed in a ``with`` block, by the rules of `explain.channels`.

    Attributes:
        sets: What the ids stand for.
        layers: Of each layer, in order of execution, with the ids of its channels.
        norms: By the number of a layer with a batch normalisation right behind it, that module's name.
        opaque: How often an operator was met whose channels could not be told apart, by its name: each channel of what
            it gave counts as made of all that it took.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sets = KernelSets()
        self.layers: list[tuple[FlowLayer, list[int]]] = []
        self.norms: dict[int, str] = {}
        self.opaque: dict[str, int] = {}
        self._ids = WeakTensorKeyDictionary()
        self._attention = WeakTensorKeyDictionary()  # what a softmax gave
        self._parameters = WeakTensorKeyDictionary()  # and what is computed from them: their module and name
        for path, module in {'': model, **named_layers(model)}.items():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in self._parameters:
                    self._parameters[parameter] = _owner(module, path, name)

    def begin(self, arguments: Any) -> None:
        """Follow these tensors, the inputs of the network, which no kernel made."""
        for tensor in tensors_of(arguments):
            self._ids[tensor] = _ids(INPUT)

    def ids(self, tensor: Tensor, axis: int) -> list[int]:
        """Of each position on ``axis``, united over all others."""
        return self.sets.along(self._of(tensor), axis)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        outputs = [tensor for tensor in tensors_of(output) if _has_ids(tensor)]
        if outputs:
            self._follow(func, args, kwargs or {}, outputs)
        return output

    def _follow(self, func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> None:
        name = func._schema.name.partition('::')[2].rstrip('_')
        given = tensors_of((args, kwargs))
        followed = [tensor for tensor in given if self._is_followed(tensor)]
        made = self._rule(name, func, args, kwargs, followed, outputs) if followed else _ids(CONSTANT)
        for tensor, ids in zip(outputs, [made] * len(outputs) if isinstance(made, Tensor) else made):
            if not _broadcasts(ids.shape, tensor.shape):  # such as statistics, beside what they are of
                ids = self.sets.united(ids, range(ids.ndim)).flatten()[0]
            ids = compact(ids)
            if args and tensor is args[0]:
                self._write(tensor, ids)
            self._ids[tensor] = ids
        parameters = [tensor for tensor in given if tensor in self._parameters]
        if parameters and not followed:
            # Of a weight and its scale the weight; of a product its first factor, whose rows the kernels are.
            weight = max(parameters, key=lambda tensor: tensor.numel() == outputs[0].numel())
            for tensor in outputs:
                self._parameters.update(dict.fromkeys(self._sharing(tensor), self._parameters[weight]))
        if name.endswith('softmax') or (followed and all(tensor in self._attention for tensor in followed)
                                        and name not in PRODUCTS and name not in CONVOLUTIONS):
            self._attention.update(dict.fromkeys(outputs, True))

    def _rule(self, name: str, func: Any, args: Any, kwargs: Any, followed: list[Tensor],
              outputs: list[Tensor]) -> Tensor | list[Tensor]:
        """The ids of each of ``outputs``, or such as broadcast to them."""
        if name.startswith('new_') or name.endswith('_like') or name == 'zero':
            return _ids(CONSTANT)
        if name in CONVOLUTIONS:
            return self._convolution(args[0], args[1], args[8], outputs[0])
        if name in PRODUCTS:
            first = PRODUCTS[name]
            return self.sets.sums([self._product(*args[first:first + 2]), *map(self._of, args[:first])])
        if name in RECURRENCES:
            return self._recurrence(args, followed, outputs)
        if 'scaled_dot_product' in name:
            return self._attend(*args[:3])
        if name == 'col2im':
            patches = self._of(args[0]).unflatten(-2, (outputs[0].shape[-3], -1))
            return self.sets.united(patches, [-2, -1])
        if name in SAMPLERS:  # of maps, at places that the network may compute
            maps = self.sets.united(self._of(args[0]), [0, *range(2, args[0].ndim)])
            return self.sets.gated(maps, self._everything([args[1]]))
        if name in VIEWS:
            return self._of(args[0]).reshape(outputs[0].shape)
        if name in MOVES:
            moved = map_tensors(self._moved, args)
            if name == 'scatter' and not isinstance(moved[3], Tensor):  # a number is no id
                moved = (*moved[:3], CONSTANT, *moved[4:])
            if outputs[0] is args[0]:
                moved = (moved[0].clone(), *moved[1:])
            return tensors_of(func(*moved, **map_tensors(self._moved, kwargs)))
        if name == 'as_strided':
            return self._through(args[0], self._of(args[0]), outputs[0], _ids(CONSTANT))
        if name in ('copy', 'fill'):
            return self._of(args[1]) if isinstance(args[1], Tensor) else _ids(CONSTANT)
        if name == 'constant_pad_nd':  # along an axis on which ids are constant, the border is more of the same
            ids = cells(self._of(args[0]))
            return func(ids, [size if ids.shape[-1 - side // 2] > 1 else 0 for side, size in enumerate(args[1])])
        if name == 'glu':
            return self.sets.sums(self._of(args[0]).chunk(2, args[1] if len(args) > 1 else -1))
        if 'batch_norm' in name and args[1] in self._parameters:
            number = self.sets.layer_of(self.ids(args[0], 1))
            if number is not None:
                self.norms[number] = self._parameters[args[1]][0]
        return self._elements(name, func, args, kwargs, followed, outputs[0])

    # Layers.

    def _layer(self, weight: Tensor, channels: list[int], kernels: int, groups: int = 1) -> Tensor:
        """Begin a layer: the ids (kernels,) of what it gives."""
        module, parameter = self._parameters.get(weight, ('', 'functional'))
        name = module if module and parameter == 'weight' else f'{module}.{parameter}'.lstrip('.')
        self.layers.append((FlowLayer(name, module, kernels, len(channels), groups), channels))
        ids = self.sets.layer(kernels)
        return self.sets.gated(ids, self._everything([weight])) if self._is_followed(weight) else ids

    def _convolution(self, input: Tensor, weight: Tensor, groups: int, output: Tensor) -> Tensor:
        channels, kernels, positions = self.ids(input, 1), output.shape[1], [1] * (output.ndim - 2)
        if weight in self._parameters or self._is_followed(weight):
            return self._layer(weight, channels, kernels, groups).reshape(-1, *positions)
        ids = _ids(channels).reshape(groups, -1)  # a fixed filter, as of blur pools
        return self.sets.united(ids, [1]).expand(-1, kernels // groups).reshape(-1, *positions)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Of matrices: a layer if one is of parameters; else rows of one weigh the columns of the other."""
        first, second = self._of(left), self._of(right)
        if right.ndim == 1:
            second = second[:, None]
        if right in self._parameters:
            made = self._matrices(right, first, -1)
        elif left in self._parameters:
            made = self._matrices(left, second, -2)
        else:
            rows, columns = self.sets.united(first, [-1]), self.sets.united(second, [-2])
            made = self.sets.gated(columns, rows) if left in self._attention else \
                self.sets.gated(rows, columns) if right in self._attention else self.sets.sums([rows, columns])
        return made[..., 0] if right.ndim == 1 else made

    def _matrices(self, weight: Tensor, ids: Tensor, axis: int) -> Tensor:
        """A layer of each matrix of ``weight`` for the channels on this axis, or of each row for those on -2."""
        groups = _period(weight) if weight.ndim == 3 else 1
        parts = ids.reshape(-1, groups, *ids.shape[-2:]).unbind(1)
        channels = [id for part in parts for id in self.sets.along(part, axis)]
        kernels = 1 if weight.ndim == 1 else weight.shape[axis]
        made = self._layer(weight, channels, groups * kernels, groups).reshape(groups, kernels).unsqueeze(-3 - axis)
        return made.repeat(len(parts[0]), 1, 1).squeeze(0) if ids.ndim == 2 else made.repeat(len(parts[0]), 1, 1)

    def _recurrence(self, args: Any, followed: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        weight = next(tensor for tensor in tensors_of(args) if tensor in self._parameters)
        made = self._layer(weight, self.ids(args[0], -1), outputs[0].shape[-1])
        state = self._everything(tensor for tensor in followed if tensor is not args[0])
        return [self.sets.sums([made, state])] * len(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention (..., heads, tokens, channels), of which several heads may share a key and a value."""
        made = self.sets.united(self._of(value), [-2])
        for part in (query, key):
            weights = self.sets.united(self._of(part), [-2, -1])
            if made.ndim > 2:
                heads = max(made.shape[-3], weights.shape[-3])
                made, weights = (ids.repeat_interleave(heads // ids.shape[-3], -3) for ids in (made, weights))
            made = self.sets.gated(made, weights)
        return made

    # What is no layer.

    def _elements(self, name: str, func: Any, args: Any, kwargs: Any, followed: list[Tensor], output: Tensor) -> Tensor:
        """Operators element by element, averages, pools and the like; what is none of them is opaque."""
        known = [argument.name for argument in func._schema.arguments]
        dim = {**dict(zip(known, args)), **kwargs}.get('dim')
        axes = [] if dim is None else [dim] if isinstance(dim, int) else list(dim)
        ids, shape = self._of(followed[0]), followed[0].shape
        if len(followed) == 1 and ('keepdim' in known or not output.ndim):
            axes = axes or [*range(len(shape))]
            ids = self.sets.united(ids, axes)
            return ids if output.ndim == len(shape) else ids.squeeze(tuple(axes))
        matrices = [tensor for tensor in tensors_of((args, kwargs)) if tensor in self._parameters and tensor.ndim > 1]
        if all(_broadcasts(tensor.shape, output.shape) for tensor in [*followed, *matrices]):
            if name in ('mul', 'div') and {tensor.shape == output.shape for tensor in followed} == {True, False}:
                whole, gate = sorted(followed, key=Tensor.numel, reverse=True)
                return self.sets.gated(self._of(whole), self._of(gate))
            ids = self.sets.sums([*map(self._of, followed)])
            return self.sets.united(ids, axes) if axes and 'softmax' not in name else ids
        if len(followed) == 1 and len(shape) == output.ndim and not matrices:
            return self.sets.united(ids, [axis for axis, size in enumerate(shape) if size != output.shape[axis]])
        self.opaque[name] = self.opaque.get(name, 0) + 1
        return self._everything(followed)

    def _write(self, tensor: Tensor, ids: Tensor) -> None:
        """Hand the ids of what was written on to all that shares its memory."""
        if not torch.equal(ids, self._ids.get(tensor, _ids(CONSTANT))):
            for other in {*self._sharing(tensor)} - {tensor}:
                self._ids[other] = compact(self._through(tensor, ids.expand(tensor.shape), other, self._of(other)))

    def _sharing(self, tensor: Tensor) -> list[Tensor]:
        """All there is in the memory of ``tensor``."""
        memory = tensor.untyped_storage().data_ptr()
        return [other for other in self._ids.keys()
                if other.untyped_storage().data_ptr() == memory and other.dtype == tensor.dtype]

    @staticmethod
    def _through(source: Tensor, ids: Tensor, target: Tensor, rest: Tensor) -> Tensor:
        """The ids of ``target``, which shares memory with ``source``; ``rest`` where it reaches further."""
        places = torch.full([source.untyped_storage().nbytes() // source.element_size()], -1)
        at = places.as_strided(source.shape, source.stride(), source.storage_offset())
        at.copy_(torch.arange(source.numel()).reshape(source.shape))
        at = places.as_strided(target.shape, target.stride(), target.storage_offset())
        return torch.where(at < 0, rest, ids.flatten()[at])

    # Ids.

    def _is_followed(self, tensor: Tensor) -> bool:
        """Whether anything of it comes from the network's inputs."""
        ids = self._ids.get(tensor)
        return ids is not None and bool(ids.any())

    def _of(self, tensor: Tensor) -> Tensor:
        """The ids of ``tensor``, of its shape."""
        return self._ids.get(tensor, _ids(CONSTANT)).expand(tensor.shape)

    def _moved(self, tensor: Tensor) -> Tensor:
        """Ids for a tensor; indices are themselves, where ids are: on the CPU."""
        return self._of(tensor) if _has_ids(tensor) else tensor.cpu()

    def _everything(self, tensors: Iterable[Tensor]) -> Tensor:
        """The id () of all that these are made of."""
        found = [cells(self._of(tensor)).unique() for tensor in tensors]
        return self.sets.united(torch.cat([_ids([CONSTANT]), *found]), [0])[0]


def _owner(module: nn.Module, path: str, name: str) -> tuple[str, str]:
    """The name of the module that computes with this parameter of ``module``, and the parameter's name there."""
    outer, _, parametrized = f'.{path}.{name}'.partition('.parametrizations.')
    if parametrized:
        return outer.strip('.'), parametrized.partition('.')[0]
    whole = re.sub('_(orig|v|g)$', '', name)  # so torch.nn.utils.prune, spectral_norm and weight_norm name them
    return path, whole if isinstance(getattr(module, whole, None), Tensor) else name


def _ids(ids: int | list[int]) -> Tensor:
    return torch.tensor(ids, dtype=torch.float64)


def _has_ids(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    return len(shape) <= len(target) and all(
        size in (1, other) for size, other in zip(reversed(shape), reversed(target)))


def _period(matrices: Tensor) -> int:
    """After how many of ``matrices`` the first one comes again, as where they are repeated for each sample."""
    again = (matrices[1:] == matrices[:1]).flatten(1).all(1).nonzero()
    period = int(again[0]) + 1 if len(again) else len(matrices)
    return period if len(matrices) % period == 0 else len(matrices)
