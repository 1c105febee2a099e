"""Class Feature Pyramids (A. Stergiou, G. Kapidis, G. Kalliatakis, C. Chrysoulas, R. Poppe, R. Veltkamp, 1909.08611).

From a class back through the layers: which channels the kernels of each layer depend on for this sample, and where. The
paper's rule is the product of a kernel's mean weight and a channel's mean activation; beside it there are two of this
package's own. It follows the channels by `flow_graph`, through shortcuts, groups and branches, where the author's code
has lists written by hand for each network, and counts a kernel that several depend on once, with their strengths added.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import base
from .capture import Capture, Tap, arguments_of, capture, named_layers, precise, signature_of, tensors_of
from .channels import FlowLayer
from .class_graph import ClassGraph
from .flow import FlowGraph, Kernel, flow_graph
from .layers import Layer, LayerInfo, Size, find_layers, input_size
from .saliency_tubes import SaliencyTubes

RULES = ('grad', 'folded', 'paper')
SELECTIONS: dict[str, tuple[str, Callable[[float], bool]]] = {
    'topk': ('a whole number of at least 1', lambda count: count >= 1 and count == int(count)),
    'theta': ('between 0 and 1', lambda least: 0 <= least <= 1),
    'mass': ('above 0 and at most 1', lambda share: 0 < share <= 1),
}


class ClassFeaturePyramid(SaliencyTubes):
    """Fine maps that are the class's: its tube times what shallower layers add to it, and the `graph` of its kernels.

    `explain` gives the Saliency Tube of ``layer`` and, for each larger resolution, two maps ``Σ_j relu(g_j a_j)`` of
    the activations a that the first and the last layer of this resolution read, g the gradient of the score (this
    package's choice; the positions of LayerCAM, P.-T. Jiang et al., 2021), a little `blurred`. `Explanation.fuse`
    multiplies them by default: the tube has the class, the others the places.

    Args:
        model: See `Explainer`.
        layer: Of the tube; see `Explainer`.
        depth: How many layers `graph` goes back from the class; None for all.
        rule: What input channel j adds to kernel k of a layer: 'grad', ``Σ_pos g_j a_j``, the same for all kernels, so
            that signs, masks and positions count; 'folded', ``mean(w_kj) mean(a_j)`` with the sign of the batch
            normalisation behind it; 'paper', the same without that sign, as published, but for its division by the sum
            over j, which turns the order around where that sum is negative; for the class, its weights scaled by the
            least and the largest one of all classes. Only what is positive counts.
        select: Which of a kernel's channels are kept: ('topk', n), the n largest; ('theta', t), those whose
            contribution, from the kernel's least to its largest one scaled to 0..1, is t at least (the paper's); or
            ('mass', m), the largest ones that together make up m of the sum.
        **options: See `SaliencyTubes`.

    Raises:
        ValueError: If an argument is out of range.
    """

    method = 'pyramid'
    fusion = 'product'
    gradient = 'all'

    def __init__(self, model: nn.Module, layer: Layer = 'auto', *, depth: int | None = None, rule: str = 'grad',
                 select: tuple[str, float] = ('topk', 5), **options: Any) -> None:
        if depth is not None and depth < 1:
            raise ValueError(f'depth must be None or at least 1, got {depth}')
        if rule not in RULES:
            raise ValueError(f'rule must be one of {", ".join(RULES)}, got {rule!r}')
        how, amount = select if isinstance(select, (tuple, list)) and len(select) == 2 else (select, None)
        if not isinstance(how, str) or how not in SELECTIONS or not isinstance(amount, (int, float)) \
                or not SELECTIONS[how][1](amount):
            allowed = ', '.join(f"('{name}', {what})" for name, (what, _) in SELECTIONS.items())
            raise ValueError(f'select must be one of {allowed}, got {select!r}')
        super().__init__(model, layer, **options)
        self.depth, self.rule, self.select = depth, rule, (how, amount)
        self._read: dict[tuple, list[LayerInfo]] = {}

    def graph(self, inputs: Any, target: int | None = None, additional_forward_args: Any = None) -> ClassGraph:
        """The kernels that a class depends on in one sample.

        The class's strength goes to the channels selected for its kernel, in the ratio of their contributions, and from
        these to all kernels that make them; so on to the image, layer by layer.

        Args:
            inputs: See `explain`, with a batch of one.
            target: The class; None for the largest logit.
            additional_forward_args: See `explain`.

        Raises:
            ValueError: If the batch is larger, or ``target`` is no class.
        """
        arguments = arguments_of(self.model, inputs, additional_forward_args, self.forward)
        if (batch := tensors_of(arguments)[0].shape[0]) != 1:
            raise ValueError(f'inputs must be a batch of one, got {batch}')
        if self.forward is not None:
            raise ValueError('forward must be None for a graph, which is that of model(*inputs)')
        flow = flow_graph(self.model, *arguments)
        infos = {info.name: info for info in self._inputs(arguments) if info.name in flow.layers}
        with capture(self.model, arguments, {Tap(info.module, 'input') for info in infos.values()},
                     gradient='all' if self.rule == 'grad' else None) as run:
            scores, index = base.select(tensors_of(run.output)[0], target)
            if index is None or index.ndim != 1:
                raise ValueError(f'target must be one class, got {target!r}')
            tensors = {name: info.of(run) for name, info in infos.items()}
            gradients = run.gradients(scores.sum(), list(tensors.values())) if self.rule == 'grad' else tensors.values()
        graph = ClassGraph(int(index), self.rule, self.select)
        products = {name: precise(tensor) * precise(gradient) if self.rule == 'grad' else precise(tensor)
                    for (name, tensor), gradient in zip(tensors.items(), gradients)}
        _Walk(self, flow, infos, products, graph).run()
        return graph

    def _inputs(self, arguments: tuple[Any, ...]) -> list[LayerInfo]:
        """What the layers with weights take, in the order in which they end."""
        signature = signature_of(arguments)
        if signature not in self._read:
            modules = named_layers(self.model)
            self._read[signature] = [
                info for info in find_layers(self.model, arguments, forward=self.forward, side='input')
                if isinstance(weight := getattr(modules[info.module], 'weight', None), Tensor) and weight.ndim > 1]
        return self._read[signature]

    def _readers(self, arguments: tuple[Any, ...]) -> list[LayerInfo]:
        """Of each resolution between the image's and the tube's, what its first and its last layer takes."""
        least = max(math.prod(info.grid.size) if info.grid else 1 for info in self.layers(arguments))
        whole = math.prod(input_size(arguments))
        readers: dict[Size, list[LayerInfo]] = {}
        for info in self._inputs(arguments):
            if info.grid and least < math.prod(info.grid.size) < whole:
                readers.setdefault(info.grid.size, []).append(info)
        return [info for infos in readers.values() for info in dict.fromkeys((infos[0], infos[-1]))]

    def _taps(self, arguments: tuple[Any, ...]) -> list[Tap]:
        return [*super()._taps(arguments), *{Tap(info.module, 'input') for info in self._readers(arguments)}]

    def _maps(self, run: Capture, arguments: tuple[Any, ...], logits: Tensor, scores: Tensor,
              target: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        infos = self._readers(arguments)
        tensors = [info.of(run) for info in infos]
        gradients = run.gradients(scores.sum(), tensors, again=True)
        maps, meta = super()._maps(run, arguments, logits, scores, target)
        for info, tensor, gradient in zip(infos, tensors, gradients):
            assert info.grid is not None  # _readers has no others
            product = info.grid.maps(precise(tensor) * precise(gradient))
            maps[f'{info.name}:input'] = blurred(product.relu().sum(1, keepdim=True))
        return maps, meta


def blurred(maps: Tensor) -> Tensor:
    """Maps (..., H, W) by the filter [1, 2, 1] / 4 along rows and columns.

    In front of a layer of stride 2, every second cell has less of the gradient; behind this filter, none has.
    """
    flat = F.pad(maps.reshape(-1, 1, *maps.shape[-2:]), (1, 1, 1, 1), mode='replicate')
    return F.avg_pool2d(F.avg_pool2d(flat, 2, 1), 2, 1).reshape(maps.shape)


class _Walk:
    """From a class back to the image, layer by layer: `run` fills the graph."""

    def __init__(self, pyramid: ClassFeaturePyramid, flow: FlowGraph, infos: dict[str, LayerInfo],
                 values: dict[str, Tensor], graph: ClassGraph) -> None:
        self.pyramid, self.flow, self.infos, self.values, self.graph = pyramid, flow, infos, values, graph
        self.modules = named_layers(pyramid.model)
        self.strengths: dict[str, dict[int, float]] = {}
        self.depths: dict[str, int] = {}

    def run(self) -> None:
        for output in self.flow.outputs[self.graph.target]:
            self._reach(output, 1, 0)
        for name, layer in reversed(self.flow.layers.items()):
            if name not in self.strengths:
                continue
            kernels = sorted(self.strengths[name])
            total = sum(self.strengths[name].values())
            for kernel in kernels:
                self.graph.nodes[name, kernel] = self.strengths[name][kernel] / total
            if self.depths[name] == self.pyramid.depth:
                continue
            if name in self.values:
                self._step(layer, kernels)
            elif self.flow.inputs_of(name):
                self.graph.ends.append(name)

    def _reach(self, kernel: Kernel, strength: float, depth: int) -> None:
        name, index = kernel
        known = self.strengths.setdefault(name, {})
        known[index] = known.get(index, 0) + strength
        self.depths[name] = min(self.depths.get(name, depth), depth)

    def _step(self, layer: FlowLayer, kernels: list[int]) -> None:
        """From the kernels of a layer to those that made the channels selected for them."""
        is_class, graph = not self.depths[layer.name], self.graph
        rows = self._contributions(layer, kernels, is_class)
        for kernel, shares in zip(kernels, self._choose(rows, is_class)):
            node = layer.name, kernel
            first = self.flow.children(*node).start
            graph.channels[node] = {first + position: share for position, share in shares.items()}
            for channel, share in graph.channels[node].items():
                graph.maps.setdefault((layer.name, channel), self._map(layer.name, channel))
                strength = graph.nodes[node] * share
                for producer in self.flow.producers(layer.name, channel):
                    graph.edges[node, producer] = graph.edges.get((node, producer), 0) + strength
                    self._reach(producer, strength, self.depths[layer.name] + 1)

    def _contributions(self, layer: FlowLayer, kernels: list[int], is_class: bool) -> Tensor:
        """Of the channels of each kernel's group to it: (kernels, channels of a group)."""
        module: Any = self.modules[layer.module]
        value = self.values[layer.name]
        axis = -1 if isinstance(module, nn.Linear) or value.shape[1] != layer.channels else 1
        value = value.movedim(axis, 0).flatten(1)  # of one sample
        groups = torch.tensor(kernels, device=value.device) * layer.groups // layer.kernels
        if self.pyramid.rule == 'grad':
            return value.sum(1).reshape(layer.groups, -1)[groups]
        weight = precise(module.weight).flatten(2).mean(2) if module.weight.ndim > 2 else precise(module.weight)
        if getattr(module, 'transposed', False):  # (channels, kernels of a group)
            weight = weight.unflatten(0, (layer.groups, -1)).mT.flatten(0, 1)
        if self.pyramid.rule == 'paper' and is_class:
            return ((weight - weight.min()) / (weight.max() - weight.min()))[kernels]
        if self.pyramid.rule == 'folded' and (norm := self.flow.norms.get(layer.name)):
            # Its deviations, which it may not keep, are positive: a kernel's shares do not depend on them.
            weight = weight * precise(self.modules[norm].weight)[:, None]  # type: ignore[arg-type]
        return weight[kernels] * value.mean(1).reshape(layer.groups, -1)[groups]

    def _choose(self, rows: Tensor, is_class: bool) -> list[dict[int, float]]:
        """The selected positions of each row, the largest first, with their shares."""
        how, amount = self.pyramid.select
        values, order = rows.sort(dim=1, descending=True, stable=True)
        counts = (values > 0).sum(1)
        if how == 'topk':
            counts = counts.clamp(max=int(amount))
        elif how == 'theta':
            published = is_class and self.pyramid.rule == 'paper'  # scaled by the whole matrix
            least = amount if published else values[:, -1:] + amount * (values[:, :1] - values[:, -1:])
            counts = torch.minimum(counts, (values >= least).sum(1))
        else:
            total = values.relu().cumsum(1)
            counts = torch.minimum(counts, (total < amount * total[:, -1:] * (1 - 1e-6)).sum(1) + 1)
        chosen = []
        for value, index, count in zip(values, order, counts.tolist()):
            shares = value[:count] / value[:count].sum()
            chosen.append(dict(zip(index[:count].tolist(), shares.tolist())))
        return chosen

    def _map(self, name: str, channel: int) -> Tensor | None:
        info = self.infos[name]
        if info.grid is None:
            return None
        map_ = info.grid.maps(self.values[name])[0, channel]
        return map_.relu() if self.pyramid.rule == 'grad' else map_
