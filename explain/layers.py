"""The layers of a model: which there are, which one to explain, and how its values become maps on a grid."""
from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn

from .capture import Capture, Forward, Shape, Tap, arguments_of, capture, named_layers, tensors_of, trace, unwrap

Size = tuple[int, ...]
Layer = str | int | nn.Module | Sequence[str | int | nn.Module]

# What 'auto' does not choose: their outputs are another layer's over again, averaged, or with its channels mixed.
PASSING = (nn.Identity, nn.Linear, nn.Softmax, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.AvgPool2d, nn.AvgPool3d,
           nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
PREFIX_TOKENS = 5  # at most: a class token and four registers
LISTED = 20  # names that an error shows
AT_ONCE = 16  # layers that one pass of the search for 'auto' looks at
NAME = re.compile(r'(?P<name>.*?)(?:@(?P<call>\d+))?(?:\[(?P<stream>\d+)\])?')


class Grid(NamedTuple):
    """Where the positions of a tensor are: ``size`` (h, w) or (t, h, w), on axes behind the channels ('first') or in
    front of them ('last'), or on one axis ('tokens') behind ``prefix`` tokens that have no position."""

    kind: str
    size: Size
    prefix: int = 0

    def maps(self, tensor: Tensor) -> Tensor:
        """``tensor`` as (B, C, *size)."""
        if self.kind == 'first':
            return tensor
        if self.kind == 'tokens':
            tensor = tensor[:, self.prefix:].unflatten(1, self.size)
        return tensor.movedim(-1, 1)


class LayerInfo(NamedTuple):
    """A tensor that a layer gives, or takes; ``name`` can be given as ``layer``.

    ``name`` is the module's dotted name, with '@1' behind it for its second call and '[1]' for the second tensor of a
    pair, where there is more than one. ``grid`` is None where the tensor has no positions; ``stride`` are the input's
    cells for each of its own.
    """

    name: str
    type: str
    shape: Size
    grid: Grid | None
    stride: tuple[float, ...] | None
    side: str = 'output'

    @property
    def module(self) -> str:
        """The module's dotted name."""
        return _parts(self.name)[0]

    def of(self, run: Capture) -> Tensor:
        """The tensor, where ``run`` recorded that side of the layer."""
        name, call, stream = _parts(self.name)
        return tensors_of(run[Tap(name, self.side)][call or 0])[stream or 0]


def find_layers(model: nn.Module, inputs: Any, *, forward: Forward | None = None, side: str = 'output'
                ) -> list[LayerInfo]:
    """Every tensor that a layer gives with these inputs, in the order in which the layers end (one forward pass).

    Args:
        model: Any module.
        inputs: A tensor, a list (one argument) or a tuple (several arguments) with images (B, C, H, W) or clips
            (B, C, T, H, W).
        forward: Called as ``forward(model, *arguments)`` in the place of the model.
        side: 'input' for what layers take as their first positional argument.
    """
    arguments, model = arguments_of(model, inputs, forward=forward), unwrap(model)
    size, batch = input_size(arguments), tensors_of(arguments)[0].shape[0]
    calls = trace(model, arguments, forward=forward)
    several = {call.name for call in calls if call.number}
    known = [tuple(grid) for module in model.modules() if isinstance(grid := getattr(module, 'grid_size', None), tuple)]
    layers = []
    for call in calls:
        sizes = (grid for grid in _sizes_in((call.inputs, call.output)) if len(grid) == len(size))
        known = list(dict.fromkeys([*sizes, *known]))
        shapes = list(_shapes_in(call.output if side == 'output' else call.inputs[:1]))
        name = f'{call.name}@{call.number}' if call.name in several else call.name
        layout = getattr(call.module, 'output_fmt', getattr(model, 'output_fmt', ''))  # of timm
        for stream, shape in enumerate(shapes):
            grid = find_grid(shape, size, batch, known=known, prefix=getattr(model, 'num_prefix_tokens', None),
                             channels_last=str(layout).endswith('NHWC'))
            if grid and grid.size not in known:
                known.append(grid.size)  # of which later tokens may have one more
            stride = grid and tuple(whole / cells for whole, cells in zip(size, grid.size))
            layers.append(LayerInfo(f'{name}[{stream}]' if len(shapes) > 1 else name, type(call.module).__name__,
                                    tuple(shape), grid, stride, side))
    return layers


def last_spatial_layer(model: nn.Module, inputs: Any, *, layers: Sequence[LayerInfo] | None = None,
                       forward: Forward | None = None) -> str:
    """The name of the last layer with more than one row and column at whose positions the scores have a gradient.

    The second condition passes over what a network makes of tokens that only its class token's features use. A name
    stands for all tensors of the layer's output.

    Raises:
        ValueError: If no layer gives maps.
    """
    layers = find_layers(model, inputs, forward=forward) if layers is None else layers
    modules = named_layers(model)
    grids = [layer for layer in layers if layer.grid and not isinstance(modules[layer.module], PASSING)]
    candidates = [[*group] for _, group in groupby(
        (layer for layer in grids if min(layer.grid.size[-2:]) > 1),  # type: ignore[union-attr]
        key=lambda layer: layer.name.partition('[')[0])]
    if not candidates:
        raise ValueError("layer 'auto' must find maps of more than one row and column, got none: use larger inputs")
    arguments = arguments_of(model, inputs, forward=forward)
    for end in range(len(candidates), 0, -AT_ONCE):
        group = candidates[max(0, end - AT_ONCE):end]
        taps = {layer.module for streams in group for layer in streams}
        with capture(model, arguments, taps, gradient='layers', forward=forward) as run:
            score = tensors_of(run.output)[0].flatten(1).amax(1).sum()
            gradients = iter(run.gradients(score, [layer.of(run) for streams in group for layer in streams]))
        used = [any([bool(layer.grid.maps(next(gradients)).any()) for layer in streams])  # type: ignore[union-attr]
                for streams in group]
        if any(used):
            return max(zip(used, range(len(group)), group))[2][0].name.partition('[')[0]
    return candidates[-1][0].name.partition('[')[0]  # of scores that do not depend on the inputs yet


def resolve(model: nn.Module, layer: Layer, layers: Sequence[LayerInfo], auto: str | None = None) -> list[LayerInfo]:
    """The tensors that ``layer`` means among those of `find_layers`.

    Args:
        model: The network.
        layer: A module; a dotted name; a name with wildcards, which do not reach over dots; an index into the layers
            that have a grid, as of a list; 'auto'; or a list of these.
        layers: Of `find_layers`.
        auto: Of `last_spatial_layer`.

    Raises:
        ValueError: If it means nothing.
        TypeError: If it is something else.
    """
    if isinstance(layer, (list, tuple)):
        found = [info for item in layer for info in resolve(model, item, layers, auto)]
        return list({info.name: info for info in found}.values())
    if isinstance(layer, int):
        grids = [info for info in layers if info.grid]
        if not -len(grids) <= layer < len(grids):
            raise ValueError(f'layer must be an index into the {len(grids)} layers that have maps, got {layer}')
        return [grids[layer]]
    if isinstance(layer, nn.Module):
        names = [name for name, module in named_layers(model).items() if module in (layer, unwrap(layer))]
        if not names:
            raise ValueError(f'layer must be a module of the model, got a {type(layer).__name__} that is not in it')
        layer = names[0]
    if not isinstance(layer, str):
        raise TypeError(f'layer must be a module, a name, an index or a list of these, got {layer!r}')
    if layer == 'auto' and auto is not None:
        layer = auto
    whole = [info for info in layers if info.name.startswith(layer)  # cheap, and `module` is parsed for few
             and layer in (info.name, info.name.partition('[')[0], info.module)]
    found = whole or [info for info in layers if _matches(layer, info.module)]
    if not found:
        names = sorted((info.name for info in layers if info.grid), key=lambda name: name.count('.'))
        raise ValueError(f'layer must name a module that the model calls with these inputs, got {layer!r}; with maps, '
                         f'the outermost first, are {", ".join(names[:LISTED])}{", ..." * (len(names) > LISTED)}')
    return found


def input_size(arguments: Any) -> Size:
    """(H, W) or (T, H, W) of the largest image or clip among the arguments.

    Raises:
        ValueError: If there is none.
    """
    sizes = [tuple(tensor.shape[2:]) for tensor in tensors_of(arguments) if tensor.ndim in (4, 5)]
    if not sizes:
        raise ValueError('inputs must hold images (B, C, H, W) or clips (B, C, T, H, W), got tensors of shapes '
                         f'{[tuple(tensor.shape) for tensor in tensors_of(arguments)]}')
    return max(sizes, key=math.prod)


def find_grid(shape: Size, size: Size, batch: int, *, known: Sequence[Size] = (), prefix: int | None = None,
              channels_last: bool = False) -> Grid | None:
    """Where the positions of a tensor of ``shape`` are that a network made of inputs of ``size``; None if nowhere.

    Args:
        shape: (B, C, *grid), (B, *grid, C) or, of tokens, (B, N, C).
        size: (H, W) or (T, H, W).
        batch: The inputs' B.
        known: Grids that tokens can have, the most probable one first; any other must have the input's proportions.
        prefix: How many tokens have no position, if that is known.
        channels_last: How a shape is read that can be read in both ways.
    """
    if shape[:1] != (batch,) or 0 in shape:
        return None
    if len(shape) == len(size) + 2:
        found = [Grid(kind, grid) for kind, grid in (('first', tuple(shape[2:])), ('last', tuple(shape[1:-1])))
                 if _fits(grid, size)]
        return min(found, key=lambda grid: (_distortion(grid.size, size), (grid.kind == 'last') != channels_last),
                   default=None)
    if len(shape) != 3:
        return None
    prefixes = [*range(PREFIX_TOKENS + 1)] if prefix is None else [prefix, 0]
    for grid in known:
        if (count := shape[1] - math.prod(grid)) in prefixes:
            return Grid('tokens', grid, count)
    for count in prefixes:
        if grids := [grid for grid in _factors(shape[1] - count, len(size)) if _fits(grid, size)]:
            return Grid('tokens', min(grids, key=lambda grid: (_distortion(grid, size), -grid[0])), count)
    return None


def _fits(grid: Size, size: Size) -> bool:
    """Whether ``grid`` can be ``size`` divided by a stride, about the same for rows and columns."""
    if any(cells > whole or abs(whole / round(whole / cells) - cells) > 1 + cells / 10
           for cells, whole in zip(grid, size)):
        return False
    return _distortion(grid, size) < 0.25 or (size[-1] != size[-2] and abs(grid[-1] - grid[-2]) <= 1)


def _distortion(grid: Size, size: Size) -> float:
    return abs(math.log(grid[-2] / size[-2]) - math.log(grid[-1] / size[-1]))


def _factors(count: int, axes: int) -> list[Size]:
    if axes == 1:
        return [(count,)]
    return [(first, *rest) for first in range(1, count + 1) if count % first == 0
            for rest in _factors(count // first, axes - 1)]


@lru_cache(4096)  # every layer's name is taken apart in every call of an explainer
def _parts(name: str) -> tuple[str, int | None, int | None]:
    match = NAME.fullmatch(name)
    assert match is not None  # every string matches
    call, stream = (None if text is None else int(text) for text in match.group('call', 'stream'))
    return match['name'], call, stream


def _matches(pattern: str, name: str) -> bool:
    parts, patterns = name.split('.'), pattern.split('.')
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _items(value: Any) -> Iterator[Any]:
    """``value`` and all that it holds."""
    yield value
    if isinstance(value, (tuple, list, dict)) and not isinstance(value, Shape):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _items(item)


def _shapes_in(value: Any) -> Iterator[Shape]:
    return (item for item in _items(value) if isinstance(item, Shape))


def _sizes_in(value: Any) -> Iterator[Size]:
    """Sizes that layers of transformers hand on beside their tokens."""
    return (tuple(item) for item in _items(value) if isinstance(item, (tuple, list)) and not isinstance(item, Shape)
            and item and all(isinstance(number, int) for number in item))
