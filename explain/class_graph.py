"""What Class Feature Pyramids find: kernels that a class depends on, layer by layer, as a graph to be handed on."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import written
from .flow import Kernel

SUFFIXES = ('.html', '.json', '.dot')


@dataclass
class ClassGraph:
    """Kernels from a class back to the image, for one sample.

    Attributes:
        target: The class.
        nodes: Kernel (layer, index) -> its strength; those of one layer sum to 1. The class's own comes first, and
            every kernel before those that it depends on.
        edges: (Kernel, kernel that it depends on) -> the strength that the one gives to the other.
        channels: Kernel -> the input channels of its layer that were selected for it, with their shares.
        maps: (layer, input channel) -> its map, ([t,] h, w); None where the layer has no positions.
        ends: Layers at which the graph ends though others make their channels: no module of their own takes these, as
            of `torch.nn.functional`, recurrences and `nn.MultiheadAttention`, so that they could not be recorded.
        rule: How contributions were computed.
        select: How channels were selected.
    """

    target: int
    rule: str
    select: tuple[str, float]
    nodes: dict[Kernel, float] = field(default_factory=dict)
    edges: dict[tuple[Kernel, Kernel], float] = field(default_factory=dict)
    channels: dict[Kernel, dict[int, float]] = field(default_factory=dict)
    maps: dict[tuple[str, int], Tensor | None] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[str]:
        """From the class to the image."""
        return list(dict.fromkeys(layer for layer, _ in self.nodes))

    def tube(self, node: Kernel) -> Tensor:
        """Where the kernel finds what it responds to: (1, 1, [t,] h, w), of the resolution that its layer reads.

        The sum of the maps of its channels: with rule 'grad' of what each position adds to the class's score as far as
        it is positive, ``Σ_j relu(g_j a_j)``; with 'paper', as published, of the activations, ``Σ_j a_j``; with
        'folded' of these times their shares.

        Raises:
            ValueError: If the graph has no such node, or its layer reads no maps, or none of its channels.
        """
        if node not in self.nodes:
            raise ValueError(f'node must be a kernel (layer, index) of the graph, got {node!r}')
        shares = self.channels.get(node, {})
        maps = [(self.maps[node[0], channel], share) for channel, share in shares.items()]
        found = [map_ * (share if self.rule == 'folded' else 1) for map_, share in maps if map_ is not None]
        if not found:
            raise ValueError(f'node must read maps, got {node!r}, which reads '
                             f'{"vectors" if maps else "nothing that was selected"}')
        return torch.stack(found).sum(0)[None, None]

    def to_networkx(self) -> Any:
        """A `networkx.DiGraph` from the class to the image with ``strength`` at nodes and edges."""
        import networkx

        graph = networkx.DiGraph(target=self.target, rule=self.rule, select=self.select)
        for (layer, kernel), strength in self.nodes.items():
            graph.add_node((layer, kernel), layer=layer, kernel=kernel, strength=strength)
        for (parent, child), strength in self.edges.items():
            graph.add_edge(parent, child, strength=strength)
        return graph

    def to_dot(self) -> str:
        """Text for Graphviz, a row for each layer."""
        lines = ['digraph {', '  node [shape=box];']
        for layer in self.layers:
            lines.append('  { rank=same; ' + ' '.join(f'"{_name(node)}";' for node in self.nodes if node[0] == layer)
                         + ' }')
        lines += [f'  "{_name(parent)}" -> "{_name(child)}" [penwidth={0.5 + 4 * strength:.3f}];'
                  for (parent, child), strength in self.edges.items()]
        return '\n'.join([*lines, '}']) + '\n'

    def to_json(self, d3: bool = True) -> str:
        """JSON; with ``d3`` as D3's force layouts take it: nodes with ids, links with source, target and value."""
        nodes = [{'id': _name(node), 'layer': node[0], 'kernel': node[1], 'strength': strength}
                 for node, strength in self.nodes.items()]
        links = [{'source': _name(parent), 'target': _name(child), 'value': strength}
                 for (parent, child), strength in self.edges.items()]
        if d3:
            return json.dumps({'nodes': nodes, 'links': links})
        return json.dumps({'target': self.target, 'rule': self.rule, 'select': self.select, 'layers': self.layers,
                           'nodes': nodes, 'edges': links})

    def nested(self, depth: int = 3) -> dict[str, Any]:
        """The author's dictionary: ``{class: {kernel: {kernel: [kernel, ...]}}}``, kernels as 'layer/index'.

        It is a tree, in which a kernel stands below each that depends on it, so ``depth`` (3, as his) should be small.
        """
        children: dict[Kernel, list[Kernel]] = {}
        for parent, child in self.edges:
            children.setdefault(parent, []).append(child)

        def below(node: Kernel, depth: int) -> Any:
            names = children.get(node, [])
            return [_name(child) for child in names] if depth == 1 else {
                _name(child): below(child, depth - 1) for child in names}

        below_others = {child for _, child in self.edges}
        roots = [node for node in self.nodes if node not in below_others]
        if depth < 1:
            raise ValueError(f'depth must be at least 1, got {depth}')
        return {str(self.target): below(roots[0], depth) if len(roots) == 1 else
                {_name(root): below(root, depth) for root in roots}}

    def save(self, path: str | Path, inputs: Tensor | None = None, *, mean: Sequence[float] | None = None,
             std: Sequence[float] | None = None, names: Sequence[str] | None = None) -> None:
        """Write the graph to ``path``, whose suffix says as what. A file is complete or not there.

        '.json' is `to_json` as D3 takes it, '.dot' is `to_dot`. '.html' is a page that needs nothing else: a row of
        kernels for each layer, and for the one that is pointed at or chosen its edges and its tube over the ``inputs``;
        the tube has 32 x 32 cells at most, that of a clip 8 x 16 x 16, and what is negative in it is 0.

        Args:
            path: The file.
            inputs: What the graph is of, one image (1, C, H, W) or clip (1, C, T, H, W); None for tubes on black.
            mean: See `explain.render.to_frames`.
            std: See `explain.render.to_frames`.
            names: Of the classes, by index; 'class 7' if None.

        Raises:
            ValueError: If the suffix is another one, or ``inputs`` are several or no images or clips.
            TypeError: If ``inputs`` are not one tensor.
            FileNotFoundError: If the folder is missing.
        """
        from .render import check_one_tensor, checked

        path = checked(path, SUFFIXES)
        if inputs is not None:
            check_one_tensor(inputs)
        if path.suffix == '.html':
            from .graph_html import page

            text = page(self, inputs, mean=mean, std=std, names=names)
        else:
            text = self.to_json() if path.suffix == '.json' else self.to_dot()
        with written(path) as file:
            file.write(text.encode())


def _name(node: Kernel) -> str:
    return f'{node[0]}/{node[1]}'
