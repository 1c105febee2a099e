"""What every explainer is: one `Explainer.explain`, with a face for captum and one for grad-cam, and its result."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture import Capture, Forward, Tap, arguments_of, capture, map_tensors, precise, signature_of, tensors_of
from .layers import Layer, LayerInfo, Size, find_layers, input_size, last_spatial_layer, resolve

FUSIONS = ('mean', 'max', 'product')


@dataclass
class Explanation:
    """Maps of a batch for one target each.

    Attributes:
        maps: Layer -> (B, 1, h, w) or (B, 1, t, h, w), signed, not normalised, in float32 at least, of the layer's
            resolution.
        target: The explained classes, (B,); None where a function of the logits was explained.
        logits: What the model gave.
        input_size: (H, W) or (T, H, W) of the inputs, of the largest one if there are several.
        method: The explainer's name.
        meta: What the explainer says about how it came to the maps.
        fusion: How `fuse` joins several layers if not told.
    """

    maps: dict[str, Tensor]
    target: Tensor | None
    logits: Tensor
    input_size: Size
    method: str = ''
    meta: dict[str, Any] = field(default_factory=dict)
    fusion: str = 'mean'

    def upsampled(self, layer: str | None = None, *, mode: str = 'linear', size: Size | None = None) -> Tensor:
        """The map of a layer, or of all layers fused, at the inputs' size or ``size``: (B, 1, [T,] H, W), signed.

        ``mode`` is 'linear' (bilinear of images, trilinear of clips) or 'nearest'.
        """
        if layer is None:
            return self.fuse(mode=mode, size=size)
        if layer not in self.maps:
            raise ValueError(f'layer must be one of {", ".join(self.maps)}, got {layer!r}')
        return upsample(self.maps[layer], size or self.input_size, mode)

    def fuse(self, how: str | None = None, layers: Sequence[str] | None = None, *, mode: str = 'linear',
             size: Size | None = None) -> Tensor:
        """The maps of ``layers`` (all) joined at the inputs' size: (B, 1, [T,] H, W).

        Args:
            how: 'mean', signed; 'max' or 'product' of what is positive, each layer divided by its clip's maximum; None
                for the explainer's own. A single map is given as it is.
            layers: Names of `maps`.
            mode: See `upsampled`.
            size: See `upsampled`.
        """
        how = how or self.fusion
        if how not in FUSIONS:
            raise ValueError(f'how must be one of {", ".join(FUSIONS)}, got {how!r}')
        maps = [self.upsampled(layer, mode=mode, size=size) for layer in layers or self.maps]
        if len(maps) == 1:
            return maps[0]
        if how == 'mean':
            return torch.stack(maps).mean(0)
        scaled = torch.stack([normalize(map_.relu(), 'max') for map_ in maps])
        return scaled.amax(0) if how == 'max' else scaled.prod(0)

    def normalized(self, how: str = 'minmax', per: str = 'clip', *, layer: str | None = None,
                   relu: bool = False) -> Tensor:
        """`upsampled` brought to 0..1, see `normalize`; with ``relu`` what speaks against the target is 0 before."""
        maps = self.upsampled(layer)
        return normalize(maps.relu() if relu else maps, how, per)

    def save(self, path: str | Path, inputs: Tensor | None = None, **options: Any) -> None:
        """Write a picture, animation, page or the numbers, by the name's suffix; see `explain.render.save`."""
        from .render import save

        save(self, path, inputs, **options)


class Explainer:
    """Explains the scores of ``model`` by maps of its layers. Subclasses say which (`_taps`) and how (`_maps`).

    Args:
        model: Any module; wrapped in DataParallel, DistributedDataParallel or `torch.compile`, or not.
        layer: What to explain: a module, a dotted name ('blocks.4', with '[1]' for the second tensor it gives and '@1'
            for its second call), a name with wildcards, an index into the layers that have maps, a list of these, or
            'auto', the last layer with maps. It is looked up for each new shape of inputs.
        reshape: 'auto', or a function that makes (B, C, [t,] h, w) of what the layer gives.
        forward: Called as ``forward(model, *inputs)`` where the model is not called ``model(*inputs)``.

    The model runs in evaluation mode; afterwards it, its gradients, the inputs and the random generators are as before.
    """

    method: ClassVar[str] = ''
    fusion: ClassVar[str] = 'mean'
    gradient: ClassVar[str | None] = 'layers'  # what `capture` keeps a graph for

    def __init__(self, model: nn.Module, layer: Layer = 'auto', *, reshape: str | Callable[[Tensor], Tensor] = 'auto',
                 forward: Forward | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f'model must be a torch.nn.Module, got {type(model).__name__}')
        if not (reshape == 'auto' or callable(reshape)):
            raise ValueError(f"reshape must be 'auto' or a function, got {reshape!r}")
        self.model, self.layer, self.reshape, self.forward = model, layer, reshape, forward
        self.outputs: Tensor | None = None
        self._found: dict[tuple, tuple[list[LayerInfo], str | None]] = {}

    # What subclasses provide.

    def _taps(self, arguments: tuple[Any, ...]) -> list[Tap]:
        """What to record of a pass with these arguments."""
        return list({Tap(info.module): None for info in self.layers(arguments)})

    def _logits(self, run: Capture, arguments: tuple[Any, ...]) -> Tensor:
        """What targets are chosen from: (B, classes), or with more axes."""
        return tensors_of(run.output)[0]

    def _maps(self, run: Capture, arguments: tuple[Any, ...], logits: Tensor, scores: Tensor,
              target: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The explanation's ``maps`` and ``meta`` of a recorded pass; ``scores`` (B,) are what is explained."""
        raise NotImplementedError(f'{type(self).__name__} must define _maps')  # abstract

    # What they can use.

    def layers(self, arguments: tuple[Any, ...], layer: Layer | None = None) -> list[LayerInfo]:
        """The tensors that ``layer`` (the explainer's own) means for inputs of these shapes.

        Raises:
            ValueError: If it means nothing, or something that has no maps.
        """
        layer = self.layer if layer is None else layer
        signature = signature_of(arguments)
        found, auto = self._found.get(signature, (None, None))
        if found is None:
            found = find_layers(self.model, arguments, forward=self.forward)
        if auto is None and 'auto' in (layer if isinstance(layer, (list, tuple)) else [layer]):
            auto = last_spatial_layer(self.model, arguments, layers=found, forward=self.forward)
        self._found[signature] = found, auto
        chosen = resolve(self.model, layer, found, auto)
        usable = [info for info in chosen if info.grid or callable(self.reshape)]
        if not usable:
            raise ValueError(f'layer must give maps, got {chosen[0].name!r} with the shape {chosen[0].shape}; '
                             f'a function given as reshape can make maps of anything')
        return usable

    def grid(self, info: LayerInfo, tensor: Tensor) -> Tensor:
        """A layer's tensor, or its gradient, as (B, C, [t,] h, w)."""
        if callable(self.reshape):
            return self.reshape(tensor)
        assert info.grid is not None  # layers() gives no others
        return info.grid.maps(tensor)

    def precise_grid(self, info: LayerInfo, tensor: Tensor) -> Tensor:
        """`grid` without its graph, in float32 at least."""
        return precise(self.grid(info, tensor))

    # What users call.

    def explain(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Explanation:
        """Explain a batch of images (B, C, H, W) or clips (B, C, T, H, W).

        Args:
            inputs: A tensor; a list, which is handed on as one argument (SlowFast); or a tuple of several arguments.
            target: An index for all; a list or tensor with one for each; None for the largest logits; tuples of indices
                where the logits have more axes; or a function of one sample's logits, or a list with one for each.
            additional_forward_args: Handed to the model behind the inputs.

        Raises:
            ValueError: If ``target`` is not in the logits, or the layer is none of the model.
            TypeError: If ``target`` is something else.
        """
        arguments = arguments_of(self.model, inputs, additional_forward_args, self.forward)
        taps = self._taps(arguments)
        with capture(self.model, arguments, taps, gradient=self.gradient, forward=self.forward) as run:
            logits = self._logits(run, arguments)
            scores, index = select(logits, target)
            maps, meta = self._maps(run, arguments, logits, scores, index)
        maps = {name: precise(map_) for name, map_ in maps.items()}
        return Explanation(maps, index, logits.detach(), input_size(arguments), self.method, meta, self.fusion)

    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None, *,
                  upsample: bool = True, relu: bool = False) -> Any:
        """As captum's explainers: signed maps as large as the inputs, in their type and on their device.

        Args:
            inputs: See `explain`; a tuple gives a tuple, a list a list, each part with the maps at its own size.
            target: See `explain`.
            additional_forward_args: See `explain`.
            upsample: False gives the layer's own resolution, (B, 1, [t,] h, w).
            relu: Set what speaks against the target to 0.
        """
        explanation = self.explain(inputs, target, additional_forward_args)
        streams = list(explanation.maps)

        def of(position: int, tensor: Tensor) -> Tensor:
            own = streams[position] if len(streams) == count > 1 else None  # a pathway's own maps
            if upsample and tensor.ndim not in (4, 5):
                return torch.zeros_like(tensor)
            maps = explanation.upsampled(own, size=tuple(tensor.shape[2:])) if upsample else \
                explanation.maps[own or streams[0]]
            maps = maps.relu() if relu else maps
            return (maps.expand_as(tensor) if upsample else maps).to(tensor.dtype).contiguous()

        count = len(tensors_of(inputs))
        positions = iter(range(count))
        return map_tensors(lambda tensor: of(next(positions), tensor), inputs)

    def __call__(self, input_tensor: Any, targets: Any = None) -> np.ndarray:
        """As grad-cam's explainers: maps of the inputs' size, (B, [T,] H, W), what is negative cut off, in 0..1.

        ``targets`` is as for `explain`; the logits stay in ``outputs``.
        """
        explanation = self.explain(input_tensor, targets)
        self.outputs = explanation.logits
        return explanation.normalized(relu=True)[:, 0].float().cpu().numpy()

    def __enter__(self) -> Explainer:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to undo: hooks exist only inside a call."""


def select(logits: Tensor, target: Any) -> tuple[Tensor, Tensor | None]:
    """The scores (B,) of a target, see `Explainer.explain`, and its classes if it is one: (B,), or (B, n) of tuples."""
    batch = logits.shape[0]
    if callable(target) or (isinstance(target, (list, tuple)) and target and all(map(callable, target))):
        functions = [target] * batch if callable(target) else list(target)
        if len(functions) != batch:
            raise ValueError(f'target must have a function for each of the {batch} inputs, got {len(functions)}')
        return torch.stack([function(row).reshape(()) for function, row in zip(functions, logits)]), None
    if logits.ndim == 1:
        logits = logits[:, None]
    if target is None:
        if logits.ndim > 2:
            raise ValueError(f'target must be given where the model gives more than (B, classes), here '
                             f'{tuple(logits.shape)}, got None')
        index = logits.argmax(1, keepdim=True)
    else:
        try:
            index = torch.as_tensor(target, device=logits.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f'target must be indices of classes or functions of the logits, got {target!r}') from error
        if index.is_floating_point() or index.dtype is torch.bool:
            raise TypeError(f'target must be of integers, got {index.dtype}')
        axes = logits.ndim - 1
        if isinstance(target, tuple) and axes > 1 or index.ndim == 0:
            index = index.reshape(1, -1)
        index = index.long().reshape(len(index), -1)
        if len(index) not in (1, batch) or index.shape[1] != axes:
            raise ValueError(f'target must have {"an index" if axes == 1 else f"{axes} indices"} for each of the '
                             f'{batch} inputs, got {target!r}')
        index = index.expand(batch, axes)
    if not all(0 <= part < limit for row in index.tolist() for part, limit in zip(row, logits.shape[1:])):
        raise ValueError(f'target must be in the logits of shape {tuple(logits.shape)}, got {target!r}')
    scores = logits[(torch.arange(batch, device=logits.device), *index.unbind(1))]
    return scores, index[:, 0] if index.shape[1] == 1 else index


def upsample(maps: Tensor, size: Size, mode: str = 'linear') -> Tensor:
    """(B, C, *grid) -> (B, C, *size), 'nearest' or 'linear' along every axis.

    Maps of images for inputs that are clips, or the other way round, lose or gain the time axis.
    """
    if mode not in ('linear', 'nearest'):
        raise ValueError(f"mode must be 'linear' or 'nearest', got {mode!r}")
    if maps.ndim - 2 > len(size):
        maps = maps.mean(2)
    elif maps.ndim - 2 < len(size):
        maps = maps.unsqueeze(2)
    if mode == 'nearest':
        return F.interpolate(maps, size)
    return F.interpolate(maps, size, mode={1: 'linear', 2: 'bilinear', 3: 'trilinear'}[len(size)], align_corners=False)


def normalize(maps: Tensor, how: str = 'minmax', per: str = 'clip') -> Tensor:
    """Maps (B, 1, [T,] H, W) brought to 0..1; constant ones become 0, never NaN.

    Args:
        maps: Signed or not.
        how: 'minmax'; 'max', which divides by the largest magnitude and keeps signs (-1..1); 'percentile', as 'minmax'
            between the 1st and the 99th percentile; 'none'.
        per: What shares a scale: a 'clip' (or image), a 'frame' of one, or the whole 'batch'.
    """
    if how not in ('minmax', 'max', 'percentile', 'none'):
        raise ValueError(f"how must be 'minmax', 'max', 'percentile' or 'none', got {how!r}")
    if per not in ('clip', 'frame', 'batch'):
        raise ValueError(f"per must be 'clip', 'frame' or 'batch', got {per!r}")
    if how == 'none':
        return maps
    lead = {'clip': 1, 'frame': maps.ndim - 2, 'batch': 0}[per]
    flat = maps.reshape(*maps.shape[:lead], -1)
    if how == 'max':
        low, high = torch.zeros_like(flat[..., :1]), flat.abs().amax(-1, keepdim=True)
    elif how == 'minmax':
        low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    else:  # by sorting, as torch.quantile has a limit of elements
        ordered = flat.sort(-1).values
        low, high = ordered[..., [(flat.shape[-1] - 1) // 100]], ordered[..., [(flat.shape[-1] - 1) * 99 // 100]]
        flat = flat.clamp(low, high)
    span = high - low
    return torch.where(span > 0, (flat - low) / torch.where(span > 0, span, 1), 0).reshape(maps.shape)
