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
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

Maps = Tensor | tuple[Tensor, ...] | list[Tensor]
MEMBER = 'class_regularization'  # what a block is called in a Sequential, and all of them in the model

# Where PyTorchVideo's networks have no configuration: large enough for all of their heads.
CLIP = (3, 32, 320, 320)


class ClassRegularization(nn.Module):
    """Scale each channel by its part in the class that the features speak for.

    With z (N, C) the means of the input's maps, W (K, C_L) the classifier's weights and P (C, C_L) a projection (none
    where C = C_L)::

        V = W P^T                      (K, C)    each class's weights at this layer
        k = argmax_k z . V[k]          (N,)      the guess, without a label
        u = z * V[k], from its least to its largest channel scaled to 0..1 (1/2 if all are the same)
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
        side by side -> the same. A model that drops its classes (``reset_classifier(0)``) keeps its features: the last
        classes are remembered, though in no checkpoint.

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
        linear = linear_layer(classifier)
        if linear is None:
            raise TypeError('classifier must be a linear layer with classes, got one without')
        weight = linear.weight.flatten(1)
        if not 1 <= top_k <= len(weight):
            raise ValueError(f'top_k must be between 1 and the number of classes, {len(weight)}, got {top_k}')
        self.channels, self.strength, self.top_k, self.detach_classifier = channels, strength, top_k, detach_classifier
        self._classifier = (classifier,)  # in a tuple, which does not register it
        self._linear = (linear,)
        self.projection: nn.Linear | None = None
        if weight.shape[1] != channels:
            self.projection = nn.Linear(weight.shape[1], channels, bias=False, device=weight.device,
                                        dtype=weight.dtype)
            nn.init.normal_(self.projection.weight, std=channels ** -0.5)
            self.projection.requires_grad_(strength > 0)  # else it has no gradient, which DDP takes for a mistake
        self.register_load_state_dict_pre_hook(_keep_what_is_missing)

    def class_weights(self) -> Tensor:
        """W, (K, C_L), of the last classes there were."""
        linear = linear_layer(self._classifier[0])
        if linear is not None and linear is not self._linear[0]:
            self._linear = (linear,)
        weight = self._linear[0].weight.flatten(1)
        return weight.detach() if self.detach_classifier else weight

    def affinity(self) -> Tensor:
        """V: how much each channel of this layer speaks for each class, (K, C); of the last classes there were."""
        weight = self.class_weights()
        # A classifier that the model has dropped is where it was then.
        return weight if self.projection is None else self.projection(weight.to(self.projection.weight))

    def forward(self, input: Maps) -> Maps:
        if self.strength == 0:
            return input
        projection = None if self.projection is None else self.projection.weight
        arguments = self.class_weights(), projection, self.strength, self.top_k
        if isinstance(input, (tuple, list)):
            return type(input)(emphasized(list(input), *arguments))
        return emphasized([input], *arguments)[0]

    def extra_repr(self) -> str:
        return f'channels={self.channels}, strength={self.strength}, top_k={self.top_k}'


@torch.fx.wrap  # a tracer's proxies know no shapes
def emphasized(streams: list[Tensor], weight: Tensor, projection: Tensor | None, strength: float,
               top_k: int) -> list[Tensor]:
    """The formula of :class:`ClassRegularization` for W (K, C_L) and P (C, C_L); TorchScript can compile it."""
    channels = weight.shape[1] if projection is None else projection.shape[0]
    if not all([stream.ndim in [4, 5] for stream in streams]) or sum([s.shape[1] for s in streams]) != channels:
        raise ValueError(f'input must be (N, C, H, W) or (N, C, T, H, W) with {channels} channels in all, '
                         f'got {" and ".join([str(list(stream.shape)) for stream in streams])}')
    means = torch.cat([channel_means(stream) for stream in streams], 1)
    scales = channel_scales(means, weight, projection, strength, top_k).split([s.shape[1] for s in streams], 1)
    return [stream * scale.to(stream.dtype).reshape(list(scale.shape) + [1] * (stream.ndim - 2))
            for stream, scale in zip(streams, scales)]


def channel_means(maps: Tensor) -> Tensor:
    """(N, C): a sum, whose gradient is an expanded (N, C), where that of ``mean`` is written to memory in full."""
    cells = maps.flatten(2)
    total = cells.sum(2, dtype=torch.promote_types(maps.dtype, torch.float32))  # float16 would overflow
    return (total / cells.shape[2]).to(maps.dtype)


def channel_scales(means: Tensor, weight: Tensor, projection: Tensor | None, strength: float, top_k: int) -> Tensor:
    """What the channels with these ``means`` (N, C) are multiplied by."""
    weight = weight.to(means)  # a classifier that the model has dropped is where it was then
    projected = means
    if projection is not None:  # z . V[k] = (z P) . W[k] and V[k] = P W[k]: cheaper than V, for all K classes
        projection = projection.to(means)
        projected = means @ projection
    response = F.linear(projected, weight)
    if top_k == 1:  # the softmax of one response is 1, without a gradient
        chosen = weight[response.argmax(1)]
    else:
        response, guess = response.topk(min(top_k, weight.shape[0]), dim=1)
        chosen = torch.einsum('nk,nkc->nc', response.softmax(1).to(weight.dtype), weight[guess])
    if projection is not None:
        chosen = F.linear(chosen, projection)
    part = means * chosen
    least, most = part.aminmax(dim=1, keepdim=True)
    span = most - least
    flat = span == 0  # nothing to choose between: the factor is 1
    return 1 - strength + strength * (2 * (part - least) + flat) / (span + flat)


class ClassRegularizations(nn.Module):
    """The blocks of a model, behind its layers: what `add_class_regularization` puts at ``model.class_regularization``.

    Attributes:
        layers: The names of the layers.
        blocks: Their blocks. Each is a part of its layer, so that it shares its fate: the last member of a Sequential;
            of other layers it works by a hook.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[str] = []
        self.blocks: list[ClassRegularization] = []
        self.handles: list[Any] = []

    def append(self, name: str, layer: nn.Module, block: ClassRegularization, channels_last: bool) -> None:
        self.layers.append(name)
        self.blocks.append(block)
        block.train(layer.training)
        if type(layer).forward is nn.Sequential.forward and not channels_last:
            layer.add_module(MEMBER, block)
            return
        self.handles.append(layer.register_forward_hook(_Behind(block, channels_last)))
        while isinstance(layer, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):  # whose members are all called
            layer = next(layer.children())
        layer.add_module(MEMBER, block)

    def remove(self, model: nn.Module) -> None:
        """Take the blocks out of the ``model``."""
        for handle in self.handles:
            handle.remove()
        for layer in list(model.modules()):
            if getattr(layer, MEMBER, None) in self.blocks:
                delattr(layer, MEMBER)

    def affinity(self, layer: str) -> Tensor:
        """How much each channel of ``layer`` speaks for each class, (classes, channels), without gradient.

        Raises:
            ValueError: If there is no block behind this layer.
        """
        if layer not in self.layers:
            raise ValueError(f'layer must be one of {", ".join(self.layers)}, got {layer!r}')
        return self.blocks[self.layers.index(layer)].affinity().detach()


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

    The model keeps its type and the names of its tensors; those of the blocks have ``class_regularization.`` in them,
    and a checkpoint without them loads strictly all the same. The classifier is looked up at each call: timm's
    ``get_classifier()``, PyTorchVideo's ``blocks[-1].proj``.

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
    if linear_layer(model) is None:
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
    blocks = []  # all of them before the model is touched
    for name, output, value in zip(names, outputs, strengths):
        maps = output if isinstance(output, (tuple, list)) else (output,)
        if not maps or not all(isinstance(stream, Tensor) and stream.ndim in (4, 5) for stream in maps):
            raise ValueError(f'layers must give feature maps (N, C, H, W) or (N, C, T, H, W), but {name} gives '
                             f'{_describe(output)}')
        channels = sum(stream.shape[-1 if channels_last else 1] for stream in maps)
        blocks.append(ClassRegularization(model, channels, value, top_k=top_k, detach_classifier=detach_classifier))
    container = ClassRegularizations()
    for name, block in zip(names, blocks):
        container.append(name, known[name], block, channels_last)
    model.class_regularization = container
    return model


def remove_class_regularization(model: nn.Module) -> nn.Module:
    """Take out what :func:`add_class_regularization` put in: the model computes and is named as before it.

    Raises:
        ValueError: If there is nothing of it.
    """
    container = getattr(model, 'class_regularization', None)
    if not isinstance(container, ClassRegularizations):
        raise ValueError('model has no class_regularization')
    container.remove(model)
    del model.class_regularization
    return model


def linear_layer(classifier: Any) -> Any:
    """A linear layer, or the one of a model, that gives the logits; None if it has no classes.

    Raises:
        TypeError: If the classifier is not linear.
    """
    layer = classifier
    if hasattr(classifier, 'get_classifier'):
        layer = classifier.get_classifier()
    elif _is_net(classifier):
        layer = classifier.blocks[-1].proj
    if layer is None or isinstance(layer, nn.Identity):
        return None
    if isinstance(layer, nn.Linear):
        return layer
    if isinstance(layer, (nn.Conv2d, nn.Conv3d)) and math.prod(layer.kernel_size) == layer.groups == 1:
        return layer
    raise TypeError('the classifier must be a linear layer, a 1 x 1 convolution, or a model of timm or PyTorchVideo '
                    f'that has one, got {type(layer).__name__}; any other model needs a get_classifier() that returns '
                    'it, and in add_class_regularization layers= and input=')


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

    def keep(layer: nn.Module, _: Any, output: Any) -> None:
        found[layer] = [*output] if isinstance(output, list) else output  # SlowFast changes its lists

    handles = [layer.register_forward_hook(keep) for layer in layers]
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
