"""Saliency Tubes (A. Stergiou, G. Kapidis, G. Kalliatakis, C. Chrysoulas, R. Veltkamp, R. Poppe, 1902.01078).

A tube is what each position of a layer adds to the score of a class: ``S[t, h, w] = Σ_k w_k a_k[t, h, w]``. In front of
a global average and a linear classifier ``w`` is the classifier's row (as published; class activation maps), and the
mean of the tube plus the classifier's bias is the logit. Anywhere else ``w_k`` is the sum of the score's gradient over
the positions of channel k: the same number in front of such a head, and Grad-CAM times the number of positions.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Explainer
from .capture import Capture, precise, unwrap
from .layers import Layer, LayerInfo

WEIGHTS = ('auto', 'classifier', 'grad')


class SaliencyTubes(Explainer):
    """One forward pass; a backward pass from the score to the layer only where the head asks for one.

    Args:
        model: See `Explainer`.
        layer: See `Explainer`.
        weights: 'classifier', the row of the linear layer that the pass itself shows to act on the averages of the
            layer's channels; 'grad', the gradient; 'auto', the former where it can be had. ``meta['weights']`` of the
            result tells which, ``meta['why']`` why not the classifier's: a layer farther from the head, more layers in
            the head, or a pool that is no average, such as SoftPool.
        relu: Set what speaks against the target to 0, as Grad-CAM's paper does; the tubes' keeps it.
        **options: See `Explainer`.

    Raises:
        ValueError: If ``weights`` is another word; when called, if 'classifier' has no such head or no class.
    """

    method = 'tubes'

    def __init__(self, model: nn.Module, layer: Layer = 'auto', *, weights: str = 'auto', relu: bool = False,
                 **options: Any) -> None:
        if weights not in WEIGHTS:
            raise ValueError(f'weights must be one of {", ".join(WEIGHTS)}, got {weights!r}')
        super().__init__(model, layer, **options)
        self.weights, self.relu = weights, relu

    def _maps(self, run: Capture, arguments: tuple[Any, ...], logits: Tensor, scores: Tensor,
              target: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        layers: dict[str, list[LayerInfo]] = {}
        for info in self.layers(arguments):
            layers.setdefault(info.name.partition('[')[0], []).append(info)
        tensors = {info.name: info.of(run) for streams in layers.values() for info in streams}
        maps: dict[str, Tensor] = {}
        why: dict[str, str] = {}
        for name, streams in layers.items():
            values = [self.precise_grid(info, tensors[info.name]) for info in streams]
            rows = "weights is 'grad'" if self.weights == 'grad' else self._classifier_rows(values, logits, target)
            if isinstance(rows, str):
                why[name] = rows
            else:
                maps.update((info.name, weighed(value, row)) for info, value, row in zip(streams, values, rows))
        if why and self.weights == 'classifier':
            raise ValueError(f"weights can be 'classifier' only where a head allows it: {why}")
        rest = [info for name in why for info in layers[name]]
        gradients = run.gradients(scores.sum(), [tensors[info.name] for info in rest])
        for info, gradient in zip(rest, gradients):
            value, slope = (self.precise_grid(info, tensor) for tensor in (tensors[info.name], gradient))
            maps[info.name] = weighed(value, slope.flatten(2).sum(2))
        if self.relu:
            maps = {name: map_.relu() for name, map_ in maps.items()}
        weights = {name: 'grad' if name in why else 'classifier' for name in layers}
        return {name: maps[name] for name in tensors}, {'weights': weights, 'why': why}

    def _classifier_rows(self, values: list[Tensor], logits: Tensor, target: Tensor | None) -> list[Tensor] | str:
        """The targets' rows of the classifier for each of the ``values`` (B, C, ...), or why there are none."""
        if target is None or logits.ndim != 2:
            return 'the target is no class of logits (B, classes)'
        width = sum(value.shape[1] for value in values)
        heads = [module for module in unwrap(self.model).modules()
                 if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
                 and module.weight.shape[:2] == (logits.shape[1], width) and module.weight[0, 0].numel() == 1]
        if not heads:
            return f'no linear layer from {width} channels to {logits.shape[1]} classes'
        pooled = torch.cat([value.flatten(2).mean(2) for value in values], 1)
        for head in reversed(heads):
            weight = precise(head.weight).flatten(1)
            bias = torch.zeros_like(weight[:, 0]) if head.bias is None else precise(head.bias)
            # The rounding of the sum that is the logit: of its terms in float32, of the result in shorter types.
            bound = torch.finfo(logits.dtype).eps * (pooled.abs() @ weight.abs().T + bias.abs())
            factor = 16 if logits.dtype.itemsize > 2 else 2
            if ((pooled @ weight.T + bias - logits).abs() <= factor * bound).all():
                return list(weight[target].split([value.shape[1] for value in values], 1))
        return 'the logits are not the linear layer of the averages'


def weighed(value: Tensor, weights: Tensor) -> Tensor:
    """The sum over channels of (B, C, ...) times (B, C): (B, 1, ...)."""
    return torch.einsum('bc...,bc->b...', value, weights).unsqueeze(1)
