"""The channels of a network as a graph: which kernels of which layers each channel of each layer comes from.

The graph is of one forward pass and exact for what moves, splits, concatenates, shuffles, groups, adds or gates
channels; this package's own method (`explain.channels` has the rules). Class Feature Pyramids walk along it.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .capture import arguments_of, map_tensors, tensors_of, undisturbed, unwrap
from .channels import ChannelFlow, FlowLayer, Kernel

_GRAPHS: WeakKeyDictionary[nn.Module, dict[Any, FlowGraph]] = WeakKeyDictionary()


class FlowGraph:
    """Where channels come from.

    Attributes:
        layers: The layers by their names, in the order in which they are executed.
        outputs: For each class (channel of the model's first output), the kernels that it is made of.
        norms: Of a layer with a batch normalisation right behind it, the module of that.
        opaque: How often the pass met an operator whose channels could not be told apart, by its name: behind one, each
            channel counts as made of all.
    """

    def __init__(self, layers: Sequence[tuple[FlowLayer, list[int]]], outputs: list[int], flow: ChannelFlow) -> None:
        names = [layer.name.rpartition('@')[0] for layer, _ in layers]
        several = {name for name in names if names.count(name) > 1}
        self._names = {layer.name: layer.name if name in several else name for (layer, _), name in zip(layers, names)}
        self.layers = {self._names[layer.name]: layer._replace(name=self._names[layer.name]) for layer, _ in layers}
        self._channels = {self._names[layer.name]: channels for layer, channels in layers}
        self._sets = flow.sets
        self.opaque = flow.opaque
        self.norms = {self._names[name]: norm for name, norm in flow.norms.items() if name}
        self.outputs = [self._kernels(index, 0) for index in outputs]

    def producers(self, layer: str, channel: int) -> list[Kernel]:
        """The kernels (layer, index) that make this input channel of ``layer``; none for those of the image or clip."""
        return self._kernels(self._channels[layer][channel], 0)

    def modulators(self, layer: str, channel: int) -> list[Kernel]:
        """The kernels that only scale this input channel of ``layer``: those of gates and of attention."""
        return self._kernels(self._channels[layer][channel], 1)

    def children(self, layer: str, kernel: int) -> range:
        """The input channels that a kernel of ``layer`` reads: those of its group."""
        _, _, kernels, channels, groups = self.layers[layer]
        width = channels // groups
        group = kernel * groups // kernels
        return range(group * width, (group + 1) * width)

    def inputs_of(self, layer: str) -> list[str]:
        """The layers whose kernels make the channels of ``layer``, in the order in which they are executed."""
        found = {name for index in set(self._channels[layer]) for name, _ in self._kernels(index, 0)}
        return [name for name in self.layers if name in found]

    def _kernels(self, index: int, which: int) -> list[Kernel]:
        return sorted((self._names[name], kernel) for name, kernel in self._sets.of(index)[which])


def flow_graph(model: nn.Module, *inputs: Any) -> FlowGraph:
    """The `FlowGraph` of a forward pass of ``model`` with ``inputs``: images (B, C, H, W), clips (B, C, T, H, W), lists.

    One pass of the first sample, without gradient; kept for the model, as long as it has the same modules, and for
    inputs of these shapes. Layers without a module count, too (`torch.nn.functional`). Where an operator is not known,
    its outputs count as made of all its inputs. LayerNorm, GroupNorm and softmax, through which each channel changes all others a
    little, are passed as if they did not.
    """
    arguments = arguments_of(model, inputs)
    network = unwrap(model)
    key = (tuple(tuple(tensor.shape[1:]) for tensor in tensors_of(arguments)),
           tuple((name, type(module)) for name, module in network.named_modules()))
    graphs = _GRAPHS.setdefault(network, {})
    if key not in graphs:
        graphs[key] = _follow(model, map_tensors(lambda tensor: tensor[:1].detach().clone(), arguments))
    return graphs[key]


def _follow(model: nn.Module, arguments: tuple[Any, ...]) -> FlowGraph:
    with undisturbed(model) as network, torch.no_grad():
        flow = ChannelFlow(network)
        flow.begin(arguments)
        with flow:
            output = network(*arguments)
    logits: Tensor = tensors_of(output)[0]
    return FlowGraph(flow.layers, flow.ids(logits, min(1, logits.ndim - 1)), flow)
