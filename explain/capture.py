"""What the layers of a model take and give in one forward pass; the model, its inputs and the caller are left as found.

The only room that registers hooks. They exist inside a ``with`` block and are removed when it ends, however it ends.
"""
from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Forward = Callable[..., Any]


class Tap(NamedTuple):
    """What to record: the first positional 'input' or the 'output' of the layer with this dotted name."""

    name: str
    side: str = 'output'


class Shape(tuple):
    """The shape of a tensor, where the tensor stood."""


class Call(NamedTuple):
    """One call of a layer, with a `Shape` in the place of each tensor; ``number`` counts the layer's calls."""

    name: str
    number: int
    module: nn.Module
    inputs: Any
    output: Any


class Capture:
    """One forward pass: its ``output`` and, by tap, a list with the recorded value of each call."""

    def __init__(self, taps: Iterable[Tap]) -> None:
        self.output: Any = None
        self.values: dict[Tap, list[Any]] = {tap: [] for tap in taps}

    def __getitem__(self, tap: Tap | str) -> list[Any]:
        """The values of ``tap`` (a name means the layer's output), one for each call: tensors, or tuples or lists."""
        return self.values[Tap(tap) if isinstance(tap, str) else tap]

    def gradients(self, score: Tensor, tensors: Sequence[Tensor], again: bool = False) -> list[Tensor]:
        """Of the scalar ``score`` to recorded tensors and no further; zeros where it does not depend on one.

        ``again``: whether more gradients will be asked for.
        """
        if not (tensors and score.requires_grad):
            return [torch.zeros_like(tensor) for tensor in tensors]
        found = torch.autograd.grad(score, tensors, allow_unused=True, retain_graph=again)
        return [torch.zeros_like(t) if gradient is None else gradient for t, gradient in zip(tensors, found)]


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and `torch.compile`."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, '_orig_mod', None), nn.Module):  # so torch.compile's documents name it
            model = inner
        else:
            return model


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module below the root by its dotted name, which compiling a submodule does not change."""
    names: dict[str, nn.Module] = {}
    for name, module in unwrap(model).named_modules():
        names.setdefault('.'.join(part for part in name.split('.') if part != '_orig_mod'), module)
    names.pop('', None)
    return names


def layer_named(model: nn.Module, name: str) -> nn.Module:
    """The module of that name in `named_layers`, without a walk through all of them where that can be.

    Raises:
        ValueError: If there is none.
    """
    try:
        if name:
            return model.get_submodule(name)
    except AttributeError:
        pass
    layers = named_layers(model)
    if name not in layers:
        raise ValueError(f'layer must be the name of a module, got {name!r}')
    return layers[name]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with each tensor in its tuples, lists and dictionaries replaced; the containers are new ones."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, '_fields') else type(value)(items)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in ``value``, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def signature_of(arguments: Any) -> tuple[Any, ...]:
    """What is the same of arguments whose layers have the same grids: their shapes but for the batch."""
    return tuple((tensor.ndim, *tensor.shape[1:]) for tensor in tensors_of(arguments))


def arguments_of(model: nn.Module, inputs: Any, additional_forward_args: Any = None,
                 forward: Forward | None = None) -> tuple[Any, ...]:
    """The positional arguments of ``model``: a tuple of inputs is several arguments, a list is one (SlowFast).

    A tuple for a model that takes fewer arguments, as captum hands SlowFast's list on, becomes one list; not where
    ``forward`` calls the model.
    """
    more = () if additional_forward_args is None else additional_forward_args
    more = more if isinstance(more, tuple) else (more,)
    if not isinstance(inputs, tuple):
        return (inputs, *more)
    if len(inputs) > 1 and forward is None:
        kinds = [parameter.kind for parameter in inspect.signature(unwrap(model).forward).parameters.values()]
        taken = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
                    for kind in kinds)
        if inspect.Parameter.VAR_POSITIONAL not in kinds and len(inputs) + len(more) > taken:
            return (list(inputs), *more)
    return (*inputs, *more)


def precise(tensor: Tensor) -> Tensor:
    """``tensor`` without its graph, in float32 or, if it was, in float64."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """A block in which the unwrapped ``model`` runs eagerly, in evaluation mode, and can be differentiated.

    Whatever the caller set: inference mode, compilation, timm's checkpointing of gradients. Afterwards each module is
    in the mode it was in, and so are the random generators; gradient mode is the caller's again.
    """
    model = unwrap(model)
    modes = [(module, module.training, vars(module).get('grad_checkpointing')) for module in model.modules()]
    devices = {parameter.get_device() for parameter in model.parameters() if parameter.is_cuda} \
        if torch.cuda.is_initialized() else ()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        stack.enter_context(torch.random.fork_rng(devices))
        if 'torch._dynamo' in sys.modules:  # otherwise nothing is compiled, and to load it takes seconds
            stack.enter_context(torch.compiler.set_stance('force_eager'))
        try:
            for module, training, checkpointing in modes:
                if training:  # setting a module's attribute is slow, and mostly nothing is to be set
                    module.training = False
                if checkpointing is True:
                    module.grad_checkpointing = False  # type: ignore[assignment]
            yield model
        finally:
            for module, training, checkpointing in modes:
                if module.training is not training:
                    module.training = training
                if checkpointing is True:
                    module.grad_checkpointing = True  # type: ignore[assignment]


@contextmanager
def capture(model: nn.Module, arguments: tuple[Any, ...], taps: Iterable[Tap | str] = (), *,
            gradient: str | None = None, forward: Forward | None = None,
            edit: Callable[[Any], Any] | None = None) -> Iterator[Capture]:
    """One forward pass with the values of ``taps`` recorded; ``with capture(...) as run``.

    The model gets copies: of the arguments (so it may change them) and of each recorded value (so that an in-place
    activation behind the layer does not reach what was recorded).

    Args:
        model: Any module, wrapped or not.
        arguments: As `arguments_of` gives them.
        taps: What to record; a name means the output of that layer.
        gradient: None, for no graph at all; 'layers', for one that starts at the first value recorded, so that
            `Capture.gradients` can go back to every recorded tensor, also of a frozen model, and costs nothing for what
            is in front of it (but of what is recorded as an 'input', the layers called before that one have no part in
            it); 'all', for one that starts at all arguments; 'inputs', at those that require a gradient.
        forward: Called as ``forward(model, *arguments)`` in the place of ``model(*arguments)``.
        edit: Makes what the layer of an 'input' tap gets, at each of its calls, of the value recorded (a copy).

    Raises:
        ValueError: If a tap names no layer, or one that the pass did not call, or ``gradient`` is another word.
    """
    if gradient not in (None, 'layers', 'all', 'inputs'):
        raise ValueError(f"gradient must be None, 'layers', 'all' or 'inputs', got {gradient!r}")
    run = Capture(Tap(tap) if isinstance(tap, str) else tap for tap in taps)

    def keep(tensor: Tensor) -> Tensor:
        if gradient == 'layers' and tensor.is_floating_point():
            torch.set_grad_enabled(True)
            return tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return tensor

    def on_output(tap: Tap) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            run.values[tap].append(map_tensors(keep, output))
            return map_tensors(Tensor.clone, run.values[tap][-1])
        return hook

    def on_input(tap: Tap) -> Callable:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args:
                return None
            run.values[tap].append(map_tensors(keep, args[0]))
            value = map_tensors(Tensor.clone, run.values[tap][-1])
            return (value if edit is None else edit(value), *args[1:])
        return hook

    with undisturbed(model) as network, ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(gradient in ('all', 'inputs')))
        arguments = map_tensors(Tensor.clone, arguments)
        if gradient != 'inputs':
            arguments = map_tensors(Tensor.detach, arguments)
        if gradient == 'all':  # not themselves, as the model may change them in place
            arguments = map_tensors(lambda tensor: tensor.requires_grad_(tensor.is_floating_point()).clone(), arguments)
        with ExitStack() as hooks:
            for tap in run.values:
                layer = layer_named(network, tap.name)
                handle = layer.register_forward_pre_hook(on_input(tap)) if tap.side == 'input' else \
                    layer.register_forward_hook(on_output(tap))
                hooks.callback(handle.remove)
            run.output = network(*arguments) if forward is None else forward(network, *arguments)
        for tap, values in run.values.items():
            if not values:
                raise ValueError(f'layer must be one that the model calls with this input, got {tap.name!r}')
        with torch.set_grad_enabled(gradient is not None):
            yield run


def trace(model: nn.Module, arguments: tuple[Any, ...], *, forward: Forward | None = None) -> list[Call]:
    """The calls of every layer below the root in one forward pass without gradient, in the order in which they end."""
    calls: list[Call] = []
    counts: dict[str, int] = {}

    def on_output(name: str) -> Callable:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            number = counts[name] = counts.get(name, -1) + 1
            calls.append(Call(name, number, module, *map_tensors(lambda tensor: Shape(tensor.shape), (args, output))))
        return hook

    with undisturbed(model) as network, torch.no_grad(), ExitStack() as hooks:
        for name, module in named_layers(network).items():
            hooks.callback(module.register_forward_hook(on_output(name)).remove)
        arguments = map_tensors(lambda tensor: tensor.detach().clone(), arguments)
        network(*arguments) if forward is None else forward(network, *arguments)
    return calls
