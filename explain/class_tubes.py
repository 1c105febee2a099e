"""Class tubes: the channels of any layer weighed by how much each speaks for a class, over a whole data set.

``S_l[t, h, w] = Σ_j V_l[c, j] a_lj[t, h, w]`` with one matrix V_l (classes, channels) for layer l, where Saliency Tubes
ask for the gradient of each input. A network with Class Regularization has such matrices, the affinities of its blocks
(A. Stergiou, R. Poppe, R. Veltkamp, 2002.02651; the block is a reconstruction). For any other network V_l is fitted;
this is this package's own method, not the paper's.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .base import Explainer
from .capture import Capture, arguments_of, capture, precise, tensors_of, unwrap
from .layers import Layer, LayerInfo
from .saliency_tubes import weighed


class ClassTubes(Explainer):
    """One forward pass without gradient, weights of the whole layer: ``ClassTubes(model, layer).fit(loader)``.

    `fit` finds V_l by ridge regression of the logits on the layer's channels, averaged over positions and divided by
    their deviations. ``r2`` says for each layer how much of the logits' variance that explains in samples that were
    left out. Without `fit`, a model with Class Regularization is explained by its blocks.

    Args:
        model: See `Explainer`.
        layer: See `Explainer`; 'auto' is the last one with a block, if the model has Class Regularization.
        least_r2: A layer whose r2 is smaller is refused: what is fitted badly explains nothing.
        **options: See `Explainer`.

    Raises:
        ValueError: When called, if nothing was fitted and the layer has no block, or a layer's r2 is too small.
    """

    method = 'class'
    gradient = None

    def __init__(self, model: nn.Module, layer: Layer = 'auto', *, least_r2: float = 0.3, **options: Any) -> None:
        super().__init__(model, layer, **options)
        self.least_r2 = least_r2
        self.weights: dict[str, Tensor] = {}
        self.r2: dict[str, float] = {}
        self._blocks: Any = getattr(unwrap(model), 'class_regularization', None)
        if layer == 'auto' and self._blocks is not None:
            self.layer = self._blocks.layers[-1]

    def fit(self, loader: Iterable[Any], *, l2: float = 5.0) -> ClassTubes:
        """Fit the ``weights`` of the layers to the model's own logits; no labels are needed.

        ``V = (ZᵀZ + l2)⁻¹ Zᵀ Y / deviation`` for Z (N, C), the standardised averages, and Y (N, classes), the logits
        less their means.

        Args:
            loader: Batches, or tuples and lists whose first item is the batch. Some hundred samples are needed.
            l2: The weight of |V|².

        Raises:
            ValueError: If there are fewer than two samples, or ``l2`` is not positive.
        """
        if not l2 > 0:
            raise ValueError(f'l2 must be positive, got {l2}')
        features: dict[str, list[Tensor]] = {}
        logits: list[Tensor] = []
        for batch in loader:
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            arguments = arguments_of(self.model, inputs, forward=self.forward)
            with capture(self.model, arguments, self._taps(arguments), forward=self.forward) as run:
                logits.append(precise(tensors_of(run.output)[0]))
                for info in self.layers(arguments):
                    features.setdefault(info.name, []).append(self.precise_grid(info, info.of(run)).flatten(2).mean(2))
        if sum(map(len, logits)) < 2:
            raise ValueError(f'loader must give two samples at least, got {sum(map(len, logits))}')
        for name, parts in features.items():
            self.weights[name], self.r2[name] = ridge(torch.cat(parts), torch.cat(logits), l2)
        return self

    def _maps(self, run: Capture, arguments: tuple[Any, ...], logits: Tensor, scores: Tensor,
              target: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if target is None or logits.ndim != 2:
            raise ValueError('target must be a class of logits (B, classes), as only classes have weights')
        infos = self.layers(arguments)
        maps = {info.name: weighed(self.precise_grid(info, info.of(run)), self._matrix(info, arguments)[target])
                for info in infos}
        return maps, {'weights': {name: 'ridge' if name in self.weights else 'blocks' for name in maps},
                      'r2': {name: self.r2[name] for name in maps if name in self.r2}}

    def _matrix(self, info: LayerInfo, arguments: tuple[Any, ...]) -> Tensor:
        if info.name in self.weights:
            if self.r2[info.name] < self.least_r2:
                raise ValueError(f'layer must tell of the logits by its averages, got {info.name!r} with an r2 of '
                                 f'{self.r2[info.name]:.2f}; fit more samples, or least_r2 is to be smaller')
            return self.weights[info.name]
        if self._blocks is None or info.module not in self._blocks.layers:
            raise ValueError(f'layer must be fitted first, ClassTubes(...).fit(loader), or have a block of Class '
                             f'Regularization, got {info.name!r}')
        affinity = precise(self._blocks.affinity(info.module))
        streams = self.layers(arguments, info.name.partition('[')[0])
        if len(streams) == 1:
            return affinity
        widths = [stream.shape[1] for stream in streams]  # side by side in the block
        return affinity.split(widths, 1)[streams.index(info)]


def ridge(features: Tensor, logits: Tensor, l2: float) -> tuple[Tensor, float]:
    """The weights (classes, C) of a ridge regression of logits (N, classes) on features (N, C), and its r2.

    ``r2`` is 1 - Σ e² / Σ (y - mean)² over all classes, where e is the error for each sample of the regression on all
    the others, as the hat matrix gives it.
    """
    features, centred = features.double(), logits.double() - logits.double().mean(0)
    deviations = features.std(0).clamp(min=1e-12)
    left, scale, right = torch.linalg.svd((features - features.mean(0)) / deviations, full_matrices=False)
    shrunk = scale.square() / (scale.square() + l2)
    weights = (right.T * (shrunk / scale.clamp(min=1e-12))) @ (left.T @ centred) / deviations[:, None]
    leverage = (left.square() @ shrunk + 1 / len(features)).clamp(max=1 - 1e-9)
    errors = (centred - (left * shrunk) @ (left.T @ centred)) / (1 - leverage)[:, None]
    r2 = 1 - errors.square().sum() / centred.square().sum().clamp(min=1e-12)
    return weights.T.to(logits), r2.item()
