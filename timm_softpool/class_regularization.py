"""Class Regularization: channels emphasised by an early guess of the class (A. Stergiou et al., 2002.02651).

A reconstruction: no code was released, and of the paper only a figure's caption could be read. It says that the
activations are pooled to a vector, multiplied with the classifier's weights after these were convolved to the layer's
channels, that the class of the highest result is selected, and that the layer's activations are regularised with it.
The projection's start, the scaling between 1 - strength and 1 + strength, the default strength, the gradients and the
places of the blocks are chosen here.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = Tensor | tuple[Tensor, ...] | list[Tensor]

# Where PyTorchVideo's networks have no configuration: large enough for all of their heads.
CLIP = (3, 32, 320, 320)


class ClassRegularization(nn.Module):
    """Scale each channel by its part in the class that the features speak for.

    With z (N, C) the means of the input's maps, W (K, C_L) the classifier's weights and P (C, C_L) a projection (none
    where C = C_L)::

        V = W P^T                      (K, C)    each class's weights at this layer
        k = argmax_k z . V[k]          (N,)      the guess, without a label
        u = z * V[k], from its least to its largest channel scaled to 0..1
        out = input * (1 + strength * (2 u - 1))

    A reconstruction (see the module's docstring). P starts with normal values of variance 1 / C, which keeps the
    angles between the classes on average, so that the guess means something before it is trained.

    Args:
        classifier: The linear layer or 1 x 1 convolution that gives the logits; or the model that has it, which is
            then asked for it at each call, so that ``reset_classifier`` needs no care. It is not registered here.
        channels: C, of all maps together.
        strength: Between 0, exactly the identity, and 1, exclusive.
        top_k: 1 for the one class of the highest response; more for the mean of so many classes' V, weighted by the
            softmax of their responses. The default is what the caption says.
        detach_classifier: Whether the gradient of the blocks stops before the classifier's weights. By default it does:
            they are then trained as the classifier alone.

    Shape:
        (N, C, H, W) or (N, C, T, H, W) -> the same; or a tuple or list of such (streams), whose channels are taken
        side by side -> the same. Where the model has no classes (``reset_classifier(0)``), the input as it is.

    Raises:
        TypeError: If the classifier is neither linear nor a model that has a linear one.
        ValueError: If `strength`, `channels` or `top_k` is out of range, or the input is not of C feature maps.
    """

    def __init__(self, classifier: nn.Module, channels: int, strength: float = 0.2, *, top_k: int = 1,
                 detach_classifier: bool = True) -> None:
        super().__init__()
        if not 0 <= strength < 1:
            raise ValueError(f'strength must be at least 0 and less than 1, got {strength!r}')
        if channels < 1:
            raise ValueError(f'channels must be at least 1, got {channels}')
        weight = class_weights(classifier)
        if weight is None:
            raise TypeError('classifier must be a linear layer with classes, got one without')
        if not 1 <= top_k <= len(weight):
            raise ValueError(f'top_k must be between 1 and the number of classes, {len(weight)}, got {top_k}')
        self.channels, self.strength, self.top_k, self.detach_classifier = channels, strength, top_k, detach_classifier
        self._classifier = (classifier,)  # in a tuple, which does not register it
        self.projection: nn.Linear | None = None
        if weight.shape[1] != channels:
            self.projection = nn.Linear(weight.shape[1], channels, bias=False, device=weight.device,
                                        dtype=weight.dtype)
            nn.init.normal_(self.projection.weight, std=channels ** -0.5)
            self.projection.requires_grad_(strength > 0)  # else it has no gradient, which DDP takes for a mistake
        self.register_load_state_dict_pre_hook(_keep_what_is_missing)

    def affinity(self) -> Tensor | None:
        """V: how much each channel of this layer speaks for each class, (K, C); None without classes."""
        weight = class_weights(self._classifier[0])
        if weight is None:
            return None
        if self.detach_classifier:
            weight = weight.detach()
        return weight if self.projection is None else self.projection(weight)

    def forward(self, input: Maps) -> Maps:
        if self.strength == 0:
            return input
        maps = tuple(input) if isinstance(input, (tuple, list)) else (input,)
        sizes = [stream.shape[1] for stream in maps]
        if not all(stream.ndim in (4, 5) for stream in maps) or sum(sizes) != self.channels:
            raise ValueError(f'input must be (N, C, H, W) or (N, C, T, H, W) with {self.channels} channels in all, got '
                             f'{" and ".join(str(tuple(stream.shape)) for stream in maps)}')
        affinity = self.affinity()
        if affinity is None:
            return input
        means = torch.cat([stream.flatten(2).mean(2) for stream in maps], dim=1)
        response, guess = F.linear(means, affinity).topk(min(self.top_k, len(affinity)), dim=1)
        chosen = torch.einsum('nk,nkc->nc', response.softmax(1).to(affinity.dtype), affinity[guess])
        part = means * chosen
        least, most = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        part = (part - least) / (most - least).clamp_min(torch.finfo(part.dtype).tiny)
        scale = (1 + self.strength * (2 * part - 1)).to(maps[0].dtype).split(sizes, dim=1)
        scaled = [stream * factor.unflatten(1, (-1, *[1] * (stream.ndim - 2))) for stream, factor in zip(maps, scale)]
        return type(input)(scaled) if isinstance(input, (tuple, list)) else scaled[0]

    def extra_repr(self) -> str:
        return f'channels={self.channels}, strength={self.strength}, top_k={self.top_k}'


class ClassRegularizations(nn.Module):
    """The blocks of a model, behind its layers: what `add_class_regularization` puts at ``model.class_regularization``.

    Attributes:
        layers: The names of the layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = []
        self.channels_last: list[bool] = []
        self.handles: list[Any] = []
        self.blocks = nn.ModuleList()

    def append(self, name: str, layer: nn.Module, block: ClassRegularization, channels_last: bool) -> None:
        self.layers.append(name)
        self.blocks.append(block)
        while type(layer).forward is nn.Sequential.forward and len(layer):  # type: ignore[arg-type]
            layer = layer[-1]  # type: ignore[index]  # timm's gradient checkpoints call the members, not the whole
        self.handles.append(layer.register_forward_hook(_Behind(block, channels_last)))

    def affinity(self, layer: str) -> Tensor:
        """How much each channel of ``layer`` speaks for each class, (classes, channels), without gradient.

        Raises:
            ValueError: If there is no block behind this layer, or the model has no classes.
        """
        if layer not in self.layers:
            raise ValueError(f'layer must be one of {", ".join(self.layers)}, got {layer!r}')
        block: Any = self.blocks[self.layers.index(layer)]
        affinity = block.affinity()
        if affinity is None:
            raise ValueError('the model has no classes, as after reset_classifier(0)')
        return affinity.detach()


class _Behind:
    """A forward hook that gives a layer's output to a block; an object, so that it can be copied and pickled."""

    def __init__(self, block: ClassRegularization, channels_last: bool) -> None:
        self.block, self.channels_last = block, channels_last

    def __call__(self, layer: nn.Module, inputs: Any, output: Any) -> Any:
        if self.channels_last:
            return self.block(output.movedim(-1, 1)).movedim(1, -1)
        return self.block(output)


def add_class_regularization(model: nn.Module, layers: Iterable[str] | None = None,
                             strength: float | Sequence[float] = 0.2, *, top_k: int = 1,
                             detach_classifier: bool = True, input: Any = None) -> nn.Module:
    """Put a :class:`ClassRegularization` behind layers of a classifier of timm or PyTorchVideo, in place.

    The blocks work by forward hooks, so that the model keeps its type and the names of its tensors; their own are
    under ``class_regularization.``, and a checkpoint without them loads strictly all the same. The classifier is
    looked up at each call: timm's ``get_classifier()``, PyTorchVideo's ``blocks[-1].proj``.

    Args:
        model: The classifier.
        layers: Names of modules that give feature maps; by default all stages: the modules of timm's ``feature_info``,
            or PyTorchVideo's ``blocks``, without the stem.
        strength: Of all layers, or one for each.
        top_k: See :class:`ClassRegularization`.
        detach_classifier: See :class:`ClassRegularization`.
        input: What the model takes, if its configuration does not tell: only the shapes of the layers' outputs are
            found with it, on the meta device where that can be.

    Returns:
        `model`, with the blocks at ``model.class_regularization``.

    Raises:
        TypeError: If `model` is not a module, or has no linear classifier.
        ValueError: If it has blocks already or no classes, a layer is unknown or gives no feature map, or an argument
            is out of range.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module, got {type(model).__name__}')
    if hasattr(model, 'class_regularization'):
        raise ValueError('model has class_regularization already; remove_class_regularization takes it out')
    if class_weights(model) is None:
        raise ValueError('model must have classes, got one without, as after reset_classifier(0)')
    known = dict(model.named_modules())
    names = _stages(model) if layers is None else [layers] if isinstance(layers, str) else list(layers)
    for name in names:
        if name not in known or not name:
            raise ValueError(f'layers must be names of modules of the model, such as {", ".join(list(known)[1:4])}, '
                             f'got {name!r}')
    if len(set(names)) < len(names) or not names:
        raise ValueError(f'layers must be one or more different names, got {names!r}')
    strengths = list(strength) if isinstance(strength, Sequence) else [strength] * len(names)
    if len(strengths) != len(names):
        raise ValueError(f'strength must be one number or one for each of the {len(names)} layers, got {strength!r}')
    channels_last = str(getattr(model, 'output_fmt', '')).endswith('NHWC')
    outputs = _outputs(model, [known[name] for name in names], input)
    container = ClassRegularizations()
    for name, output, value in zip(names, outputs, strengths):
        maps = output if isinstance(output, (tuple, list)) else (output,)
        if not maps or not all(isinstance(stream, Tensor) and stream.ndim in (4, 5) for stream in maps):
            raise ValueError(f'layers must give feature maps (N, C, H, W) or (N, C, T, H, W), but {name} gives '
                             f'{_describe(output)}')
        block = ClassRegularization(model, sum(stream.shape[-1 if channels_last else 1] for stream in maps), value,
                                    top_k=top_k, detach_classifier=detach_classifier)
        container.append(name, known[name], block, channels_last)
    model.class_regularization = container.train(model.training)
    return model


def remove_class_regularization(model: nn.Module) -> nn.Module:
    """Take out what :func:`add_class_regularization` put in: the model computes and is named as before it.

    Raises:
        ValueError: If there is nothing of it.
    """
    container = getattr(model, 'class_regularization', None)
    if not isinstance(container, ClassRegularizations):
        raise ValueError('model has no class_regularization')
    for handle in container.handles:
        handle.remove()
    del model.class_regularization
    return model


def class_weights(classifier: Any) -> Tensor | None:
    """The weights (K, C_L) of a linear layer, or of a model's classifier; None if it has no classes.

    Raises:
        TypeError: If the classifier is not linear.
    """
    layer: Any = classifier
    if hasattr(classifier, 'get_classifier'):
        layer = classifier.get_classifier()
    elif _is_net(classifier):
        layer = classifier.blocks[-1].proj
    if layer is None or isinstance(layer, nn.Identity):
        return None
    if isinstance(layer, nn.Linear):
        return layer.weight
    if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and math.prod(layer.kernel_size) == layer.groups == 1:
        return layer.weight.flatten(1)
    raise TypeError(f'the classifier must be a linear layer or a 1 x 1 convolution, got {type(layer).__name__}; models '
                    'are asked by get_classifier() or blocks[-1].proj')


def _is_net(model: Any) -> bool:
    blocks = getattr(model, 'blocks', None)
    return isinstance(blocks, nn.ModuleList) and len(blocks) > 0 and hasattr(blocks[-1], 'proj')


def _stages(model: Any) -> list[str]:
    if info := getattr(model, 'feature_info', None):
        known = dict(model.named_modules())
        names = [stage['module'] for stage in info if stage['module'] in known]  # HRNet names some that it has not
        stages = [name for name in names if name == names[-1] or _count_layers(model.get_submodule(name)) > 1]
        return stages if len(stages) > 1 else names  # in a VGG, no module is a stage
    if _is_net(model):
        return [f'blocks.{index}' for index, block in enumerate(model.blocks[:-1])
                if index and any(isinstance(module, nn.Conv3d) for module in block.modules())]
    raise ValueError(f'layers must be named for a {type(model).__name__}, which has no feature_info and no blocks')


def _count_layers(module: nn.Module) -> int:
    """Convolutions and linear layers: a stem has at most one, or it is none of timm's feature modules."""
    return sum(isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.Linear)) for layer in module.modules())


@contextmanager
def _evaluating(model: nn.Module):
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _outputs(model: Any, layers: list[nn.Module], input: Any) -> list[Any]:
    """What each layer gives in a forward pass, for its shape."""
    if input is None:
        cfg = getattr(model, 'pretrained_cfg', {})
        size = cfg.get('input_size', CLIP)[1:]
        frames = [cfg['num_frames']] if cfg.get('num_frames') else []
        first = next((module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))), None)
        input = torch.zeros(1, first.in_channels if first else 3, *frames, *size, device='meta')
    found: dict[nn.Module, Any] = {}
    handles = [layer.register_forward_hook(lambda module, _, output: found.__setitem__(module, output))
               for layer in layers]
    tensors = {name: tensor.to('meta') for named in (model.named_parameters, model.named_buffers)
               for name, tensor in named()}
    try:
        with _evaluating(model), torch.no_grad():
            torch.func.functional_call(model, tensors, (_on_meta(input),))
    except Exception as error:
        raise ValueError(f'the shapes of the layers could not be found; give an input= of the model ({error})'
                         ) from error
    finally:
        for handle in handles:
            handle.remove()
    return [found.get(layer) for layer in layers]


def _on_meta(input: Any) -> Any:
    return [_on_meta(item) for item in input] if isinstance(input, (list, tuple)) else input.to('meta')


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    return ' and '.join(map(_describe, output)) if isinstance(output, (tuple, list)) else type(output).__name__


def _keep_what_is_missing(block: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name, value in block.state_dict().items():
        state_dict.setdefault(prefix + name, value)
