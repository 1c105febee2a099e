"""How good maps are: beside masks of what they should show, and by what the model makes of inputs and weights changed.

Maps and masks are (B, 1, H, W) or (B, H, W) of images, (B, 1, T, H, W) or (B, T, H, W) of clips; an image is a clip of
one frame. The mass of a map is what is positive in it. A mask is true, or not 0, where the object is.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Explainer, select
from .capture import Forward, Tap, arguments_of, capture, named_layers, precise, tensors_of, trace, undisturbed, unwrap
from .layers import Layer, find_layers, resolve


def energy_pointing_game(maps: Tensor, mask: Tensor, over: str = 'space') -> Tensor:
    """The share of the mass that is where it should be: (B,) in 0..1; 0 of a map without mass.

    The energy-based pointing game of Score-CAM (1910.01279), and for clips two games of this package.

    Args:
        maps: Signed or not.
        mask: Of the maps' size.
        over: 'space', mass inside the mask / mass; 'time', mass of the frames in which the mask is anywhere / mass;
            'frame', the mean over these frames of the mass inside the mask / mass of the frame.

    Raises:
        ValueError: If ``over`` is another word, or the sizes differ.
    """
    if over not in ('space', 'time', 'frame'):
        raise ValueError(f"over must be 'space', 'time' or 'frame', got {over!r}")
    mass = _frames('maps', maps).relu()
    inside = _mask('mask', mask, mass)
    seen = inside.flatten(2).any(2)
    if over == 'frame':
        shares = _share(torch.where(inside, mass, 0).sum((2, 3)), mass.sum((2, 3)))
        return _share(torch.where(seen, shares, 0).sum(1), seen.sum(1).to(mass))
    inside = inside if over == 'space' else seen[:, :, None, None]
    return _share(torch.where(inside, mass, 0).sum((1, 2, 3)), mass.sum((1, 2, 3)))


def pointing_game(maps: Tensor, mask: Tensor, slack: int = 2) -> Tensor:
    """Whether the maximum is positive and in the mask grown by ``slack`` pixels: (B,), bool.

    Of several equal maxima all must be, so that a map that says nothing does not win. Source: J. Zhang et al.,
    1608.00507, with a slack of 15 pixels in photographs.

    Args:
        maps: Signed or not.
        mask: Of the maps' size.
        slack: In rows and columns (Chebyshev distance), not in time.

    Raises:
        ValueError: If ``slack`` is negative, or the sizes differ.
    """
    if slack < 0:
        raise ValueError(f'slack must be at least 0, got {slack}')
    maps = _frames('maps', maps)
    inside = _mask('mask', mask, maps)
    grown = F.max_pool2d(inside.to(maps.dtype), 2 * slack + 1, stride=1, padding=slack) > 0
    highest = maps.amax((1, 2, 3), keepdim=True)
    return (grown | (maps < highest)).flatten(1).all(1) & (highest.flatten() > 0)


def class_contrast(maps: Tensor, target_mask: Tensor, other_mask: Tensor) -> Tensor:
    """Mass on the target / mass on the target and on another object: (B,) in 0..1; 0 if there is none on either.

    Args:
        maps: Of the target's class, signed or not.
        target_mask: Of the maps' size.
        other_mask: Of the maps' size.

    Raises:
        ValueError: If the sizes differ.
    """
    mass = _frames('maps', maps).relu()
    target, other = (torch.where(_mask(name, mask, mass), mass, 0).sum((1, 2, 3))
                     for name, mask in (('target_mask', target_mask), ('other_mask', other_mask)))
    return _share(target, target + other)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of each item: (B,) in -1..1, ties with their mean rank; 0 if an item is constant.

    Args:
        a: (B, ...).
        b: Of the same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise ValueError(f'a and b must have one shape (B, ...), got {tuple(a.shape)} and {tuple(b.shape)}')
    return F.cosine_similarity(_centred_ranks(a), _centred_ranks(b))


def insertion_deletion(model: nn.Module, inputs: Tensor, maps: Tensor, target: Any = None, *, steps: int = 32,
                       baseline: Tensor | float | None = None, seed: int = 0,
                       forward: Forward | None = None) -> tuple[Tensor, Tensor]:
    """The areas under the softmax probability of a class as pixels come in and go out: two (B,) in 0..1.

    Insertion starts from the baseline and puts the input's pixels in, those with the map's highest values first, a
    ``steps``-th of them at a time; a good map has a large area. Deletion starts from the input and puts the baseline
    in, in the same order; a good map has a small one. Trapezoidal rule over the share of pixels. Source: RISE,
    1806.07421, where the baseline is a constant or a blur.

    Args:
        model: See `Explainer`.
        inputs: (B, C, H, W) or (B, C, T, H, W).
        maps: Of the inputs' size, signed or not; equal values come in an order drawn with ``seed``.
        target: Indices of classes, see `Explainer.explain`; None for the largest logits of the inputs.
        steps: At least 1; the model runs twice for each.
        baseline: What is in the place of a pixel, broadcast to the inputs; None for normal noise with the mean and the
            standard deviation of each channel of each input, drawn with ``seed``.
        seed: Of the noise and of the order of equal values.
        forward: See `Explainer`.

    Raises:
        ValueError: If ``steps`` is less than 1, the sizes differ, or the target is not in the logits.
        TypeError: If ``inputs`` is no tensor or ``target`` no class.
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(f'inputs must be one tensor, got {type(inputs).__name__}')
    if steps < 1:
        raise ValueError(f'steps must be at least 1, got {steps}')
    flat = _frames('maps', maps)
    size = (len(inputs), *inputs.shape[2:])
    if flat.shape != (size if inputs.ndim == 5 else (size[0], 1, *size[1:])):
        raise ValueError(f"maps must have the inputs' size {size}, got {tuple(maps.shape)}")
    generator = torch.Generator().manual_seed(seed)
    flat = flat.flatten(1).to(inputs.device)
    shuffled = torch.randperm(flat.shape[1], generator=generator).to(inputs.device)
    order = shuffled[flat[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    place = order.argsort(1).reshape(size).unsqueeze(1)
    inputs = inputs.detach()
    absent = _noise(inputs, generator) if baseline is None else torch.as_tensor(baseline).to(inputs)
    try:
        absent = absent.broadcast_to(inputs.shape)
    except RuntimeError as error:
        raise ValueError(f"baseline must be broadcast to the inputs' shape {tuple(inputs.shape)}, "
                         f'got {tuple(absent.shape)}') from error
    _, index = _probability(model, (inputs,), target, forward=forward)
    areas = []
    for first, then in ((inputs, absent), (absent, inputs)):
        curve = [_probability(model, (torch.where(place < step * flat.shape[1] // steps, first, then),), index,
                              forward=forward)[0] for step in range(steps + 1)]
        areas.append(torch.trapezoid(torch.stack(curve), dx=1 / steps, dim=0))
    return areas[0], areas[1]


def kernel_ablation(model: nn.Module, inputs: Any, target: Any, layer: Layer, strengths: Tensor, share: float = 0.25,
                    *, forward: Forward | None = None) -> Tensor:
    """How much the softmax probability of a class falls when a layer gets its strongest channels as 0: (B,) in -1..1.

    Args:
        model: See `Explainer`.
        inputs: See `Explainer.explain`.
        target: Indices of classes, see `Explainer.explain`; None for the largest logits.
        layer: A module or a name, see `Explainer`; one layer, that takes (B, C, ...), or (B, ..., C) if it is
            `torch.nn.Linear` or has no C channels on the second axis.
        strengths: (B, C), or (C,) for all; the largest are the strongest.
        share: Of the C channels that are set to 0, above 0 and at most 1; one channel at least.

    Raises:
        ValueError: If ``share`` is out of range, ``layer`` is not one layer of the model that takes a tensor of
            so many channels, or the target is not in the logits.
        TypeError: If ``target`` is no class.
    """
    if not 0 < share <= 1:
        raise ValueError(f'share must be more than 0 and at most 1, got {share}')
    arguments = arguments_of(model, inputs, forward=forward)
    names = list({info.module: None for info in resolve(model, layer, find_layers(model, arguments, forward=forward))})
    if len(names) != 1:
        raise ValueError(f'layer must mean one layer, got {layer!r}, which means {", ".join(names)}')
    if strengths.ndim not in (1, 2):
        raise ValueError(f'strengths must be (C,) or (B, C), got {tuple(strengths.shape)}')
    given, linear = tuple(strengths.shape), isinstance(named_layers(model)[names[0]], nn.Linear)
    strengths = torch.atleast_2d(strengths)
    channels = strengths.shape[1]
    strongest = strengths.topk(max(1, round(share * channels))).indices
    silent = torch.zeros_like(strengths, dtype=torch.bool).scatter(1, strongest, True)

    def silence(value: Any) -> Tensor:
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        axis = len(shape) - 1 if linear or shape[1:2] != (channels,) else 1
        if axis < 1 or shape[axis] != channels or len(silent) not in (1, shape[0]):
            raise ValueError(f'strengths must be (C,) or (B, C) of what {names[0]!r} takes, {shape or type(value)}, '
                             f'got {given}')
        where = silent.to(value.device).reshape(-1, *(channels if i == axis else 1 for i in range(1, value.ndim)))
        return value.masked_fill(where, 0)

    before, index = _probability(model, arguments, target, forward=forward)
    after, _ = _probability(model, arguments, index, forward=forward, taps=[Tap(names[0], 'input')], edit=silence)
    return before - after


def parameter_randomisation(explainer: Explainer, inputs: Any, target: Any = None, order: str = 'cascading',
                            seed: int = 0, *, depth: int | None = None) -> list[tuple[str, Tensor]]:
    """How much of its map an explainer keeps as the model's layers are randomised, from the classifier down.

    For each layer its name and the `rank_correlation` (B,) of the map (of all explained layers, fused at the inputs'
    size) with that of the intact model. The layers come from the last one called to the first; the parameters that
    belong to none, such as a class token, come at the end and have the name ''. A map that explains the model loses its
    likeness. Source: J. Adebayo et al., 'Sanity Checks for Saliency Maps', 1810.03292; there layers are initialised
    anew, here each parameter is drawn from the normal distribution with its mean and standard deviation (so a constant
    one stays), for which the type of the layer does not matter and activations keep about their scale. Buffers stay.
    Afterwards the parameters have their own storage again.

    Args:
        explainer: Any of this package.
        inputs: See `Explainer.explain`.
        target: See `Explainer.explain`; None for the largest logits of the intact model.
        order: 'cascading', each layer besides those before it; 'independent', each alone.
        seed: Of what is drawn. One draw says little: new weights of a classifier can be like the old ones by chance.
        depth: How many layers, from the classifier down; None for all.

    Raises:
        ValueError: If ``order`` is another word, or ``depth`` is less than 1; see `Explainer.explain`.
    """
    if order not in ('cascading', 'independent'):
        raise ValueError(f"order must be 'cascading' or 'independent', got {order!r}")
    if depth is not None and depth < 1:
        raise ValueError(f'depth must be None or at least 1, got {depth}')
    original = explainer.explain(inputs, target)
    target = target if original.target is None else original.target
    intact = original.upsampled()
    layers = _parameters(explainer, inputs)
    kept = {parameter: parameter.data for parameters in layers.values() for parameter in parameters}

    def restore() -> None:
        for parameter, data in kept.items():
            parameter.data = data

    generator = torch.Generator().manual_seed(seed)
    found = []
    with undisturbed(explainer.model), torch.no_grad():
        try:
            for name, parameters in list(layers.items())[:depth]:
                if order == 'independent':
                    restore()
                for parameter in parameters:
                    parameter.data = _noise(kept[parameter][None, None], generator)[0, 0]
                maps = explainer.explain(inputs, target).upsampled()
                found.append((name, rank_correlation(maps, intact)))
        finally:
            restore()
    return found


def _parameters(explainer: Explainer, inputs: Any) -> dict[str, list[nn.Parameter]]:
    """Layer -> its own parameters and those of modules in it that the model does not call, from the last call on."""
    calls = trace(explainer.model, arguments_of(explainer.model, inputs, forward=explainer.forward),
                  forward=explainer.forward)
    last = {call.name: position for position, call in enumerate(calls)}
    layers: dict[str, list[nn.Parameter]] = {}
    for name, module in {'': unwrap(explainer.model), **named_layers(explainer.model)}.items():
        while name and name not in last:
            name = name.rpartition('.')[0]
        layers.setdefault(name, []).extend(module.parameters(recurse=False))
    names = sorted(filter(layers.get, layers), key=lambda name: last.get(name, -1), reverse=True)
    return {name: layers[name] for name in names}


def _probability(model: nn.Module, arguments: tuple[Any, ...], target: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """The softmax probabilities (B,) of classes, and the classes; ``options`` are of `capture`."""
    with capture(model, arguments, **options) as run:
        logits = precise(tensors_of(run.output)[0])
    if logits.ndim != 2:
        raise ValueError(f'model must give logits (B, classes), got {tuple(logits.shape)}')
    scores, index = select(logits.softmax(1), target)
    if index is None:
        raise TypeError('target must be indices of classes, got a function')
    return scores, index


def _noise(values: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise like (B, C, ...), with the mean and the standard deviation of each channel of each item."""
    flat = precise(values).reshape(*values.shape[:2], -1)
    noise = torch.randn(flat.shape, generator=generator).to(flat)
    noise = flat.mean(2, keepdim=True) + flat.std(2, correction=0, keepdim=True) * noise
    return noise.reshape(values.shape).to(values.dtype)


def _frames(name: str, maps: Tensor) -> Tensor:
    """Maps of images or clips as (B, T, H, W)."""
    if maps.ndim not in (3, 4, 5) or maps.ndim == 5 and maps.shape[1] != 1:
        raise ValueError(f'{name} must be (B, H, W), (B, 1, H, W), (B, T, H, W) or (B, 1, T, H, W), '
                         f'got {tuple(maps.shape)}')
    return precise(maps.unsqueeze(1) if maps.ndim == 3 else maps.squeeze(1) if maps.ndim == 5 else maps)


def _mask(name: str, mask: Tensor, maps: Tensor) -> Tensor:
    """A mask of maps (B, T, H, W) as such, bool."""
    frames = _frames(name, mask)
    if frames.shape != maps.shape:
        raise ValueError(f"{name} must have the maps' size {tuple(maps.shape)}, got {tuple(mask.shape)}")
    return frames.to(maps.device) != 0


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / whole.clamp_min(torch.finfo(whole.dtype).tiny)


def _centred_ranks(values: Tensor) -> Tensor:
    """The rank of each value of an item, equal ones with the mean of theirs, less the mean rank: (B, N), float64."""
    values = precise(values).flatten(1)
    ordered = values.sort(1).values
    below, upto = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + upto - values.shape[1]).double() / 2
