"""The channels of a network as a graph: which kernels of which layers each channel of each layer comes from.

The graph is of one forward pass and exact for what moves, splits, concatenates, shuffles, groups, adds or gates
channels; this package's own method (`explain.channels` has the rules). Class Feature Pyramids walk along it.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .capture import arguments_of, map_tensors, signature_of, tensors_of, undisturbed, unwrap
from .channels import ChannelFlow
from .kernel_sets import NumberedKernel

Kernel = tuple[str, int]  # a layer's name, and which of its outputs

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

    def __init__(self, flow: ChannelFlow, outputs: list[int]) -> None:
        counts = Counter(layer.name for layer, _ in flow.layers)
        calls: Counter[str] = Counter()
        self._names: list[str] = []
        for layer, _ in flow.layers:
            self._names.append(f'{layer.name}@{calls[layer.name]}' if counts[layer.name] > 1 else layer.name)
            calls[layer.name] += 1
        self.layers = {name: layer._replace(name=name) for name, (layer, _) in zip(self._names, flow.layers)}
        self.norms = {self._names[number]: norm for number, norm in flow.norms.items()}
        self.opaque = flow.opaque
        self._channels = {name: channels for name, (_, channels) in zip(self._names, flow.layers)}
        self._sets = flow.sets
        self.outputs = [self._named(self._sets[id].producers) for id in outputs]

    def producers(self, layer: str, channel: int) -> list[Kernel]:
        """The kernels (layer, index) that make this input channel of ``layer``; none for those of the image or clip."""
        return self._named(self._sets[self._channels[layer][channel]].producers)

    def modulators(self, layer: str, channel: int) -> list[Kernel]:
        """The kernels that only scale this input channel of ``layer``: those of gates and of attention."""
        return self._named(self._sets[self._channels[layer][channel]].modulators)

    def children(self, layer: str, kernel: int) -> range:
        """The input channels that a kernel of ``layer`` reads: those of its group."""
        _, _, kernels, channels, groups = self.layers[layer]
        width = channels // groups
        group = kernel * groups // kernels
        return range(group * width, (group + 1) * width)

    def inputs_of(self, layer: str) -> list[str]:
        """The layers whose kernels make the channels of ``layer``, in the order in which they are executed."""
        found = {number for id in self._channels[layer] for number, _ in self._sets[id].producers}
        return [self._names[number] for number in sorted(found)]

    def _named(self, kernels: Iterable[NumberedKernel]) -> list[Kernel]:
        return sorted((self._names[number], kernel) for number, kernel in kernels)


def flow_graph(model: nn.Module, *inputs: Any) -> FlowGraph:
    """The `FlowGraph` of a forward pass of ``model``.

    The ``inputs`` are images (B, C, H, W), clips (B, C, T, H, W) or lists of such. One pass of the first sample, in
    evaluation mode and without gradient; kept for the model, as long as it has modules of the same names, types and
    shapes of parameters, and for inputs of these shapes. Layers without a module count, too (`torch.nn.functional`),
    but not those of what no input reaches. Where an operator is not known, its outputs count as made of all its inputs.
    A factor counts as a gate where it is smaller than what it scales, so not where maps have one position. LayerNorm,
    GroupNorm and softmax, through which each channel changes all others a little, are passed as if they did not.
    """
    arguments = arguments_of(model, inputs)
    network = unwrap(model)
    key = (signature_of(arguments),
           tuple((name, type(module), *(parameter.shape for parameter in module.parameters(recurse=False)))
                 for name, module in network.named_modules()))
    graphs = _GRAPHS.setdefault(network, {})
    if key not in graphs:
        graphs[key] = _follow(model, arguments)
    return graphs[key]


def _follow(model: nn.Module, arguments: tuple[Any, ...]) -> FlowGraph:
    torch.clear_autocast_cache()  # a weight cast before is not known as that of its layer
    with undisturbed(model) as network, torch.no_grad(), _transformers_in_parts():
        flow = ChannelFlow(network)
        arguments = map_tensors(lambda tensor: tensor[:1].detach().clone(), arguments)
        flow.begin(arguments)
        with flow:
            output = network(*arguments)
    logits: Tensor = tensors_of(output)[0]
    return FlowGraph(flow, flow.ids(logits, min(1, logits.ndim - 1)))


@contextmanager
def _transformers_in_parts() -> Iterator[None]:
    """Without the single operator that PyTorch computes a whole `torch.nn.TransformerEncoderLayer` by."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
