"""Pools that a model calls as functions, ``F.max_pool2d(x, 3)``, and that no module stands for."""
from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from types import FunctionType, ModuleType
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .functional import geometry, soft_pool

_logger = logging.getLogger(__name__)


def swap_functional_pools(model: nn.Module, pools: Collection[str],
                          where: Optional[Callable[[str, nn.Module], bool]] = None) -> None:
    """Make the methods of `model`'s modules call SoftPool where they call ``F.max_pool*`` or ``F.avg_pool*``.

    A module's class becomes a subclass whose methods see SoftPool under these names; the code of the methods is not
    copied. In a traced graph the calls themselves change. Modules of torch and of `timm.layers` are left alone:
    what they pool is a mask, a gate or a head.
    """
    functions = {name: function for kind in pools for name, function in _SOFT_POOLS[kind].items()}
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            _swap_calls(module, functions)
        elif not type(module).__module__.startswith(('torch.', 'timm.layers')) and _pool_calls(type(module), functions):
            if where is not None and not where(name, module):
                continue
            cls: type = type(module)
            swapped, hidden = _soft_pool_class(cls, tuple(sorted(pools)))
            if hidden:
                _logger.warning('%s: %s calls %s in a way that cannot be replaced', name, type(module).__name__, hidden)
            if swapped is not type(module):
                _logger.info('%s: functional pools of %s -> SoftPool', name, type(module).__name__)
                module.__class__ = swapped


def _scripted(input: Tensor, kernel_size: int, stride: Optional[int], padding: int, ceil_mode: bool) -> Tensor:
    axes = input.dim() - 2
    step = kernel_size if stride is None else stride
    return torch.ops.timm_softpool.soft_pool(input, [kernel_size] * axes, [step] * axes, [padding] * axes, ceil_mode)


def _soft_pools(ndim: int) -> tuple[Callable, Callable]:
    """SoftPool with the signatures of ``F.max_pool*`` and ``F.avg_pool*``, in types that TorchScript knows."""

    def max_pool(input: Tensor, kernel_size: int, stride: Optional[int] = None, padding: int = 0, dilation: int = 1,
                 ceil_mode: bool = False, return_indices: bool = False) -> Tensor:
        if torch.jit.is_scripting():
            return _scripted(input, kernel_size, stride, padding, ceil_mode)
        if return_indices or dilation not in (1, (1,) * ndim):
            raise ValueError(f'SoftPool has no return_indices and no dilation, got {return_indices} and {dilation}; '
                             f'keep this pool with the argument `where` of swap_pooling')
        kernel, step, pad = geometry(ndim, kernel_size, stride, padding)
        return soft_pool(input, kernel, step, pad, ceil_mode)

    def avg_pool(input: Tensor, kernel_size: int, stride: Optional[int] = None, padding: int = 0,
                 ceil_mode: bool = False, count_include_pad: bool = True,
                 divisor_override: Optional[int] = None) -> Tensor:
        if torch.jit.is_scripting():
            return _scripted(input, kernel_size, stride, padding, ceil_mode)
        if divisor_override is not None:
            raise ValueError(f'SoftPool has no divisor_override, got {divisor_override}; '
                             f'keep this pool with the argument `where` of swap_pooling')
        kernel, step, pad = geometry(ndim, kernel_size, stride, padding)
        return soft_pool(input, kernel, step, pad, ceil_mode)

    return max_pool, avg_pool


_SOFT_POOLS: dict[str, dict[str, Callable]] = {'max': {}, 'avg': {}}
for _ndim in (1, 2, 3):
    _SOFT_POOLS['max'][f'max_pool{_ndim}d'], _SOFT_POOLS['avg'][f'avg_pool{_ndim}d'] = _soft_pools(_ndim)


def _pool_calls(cls: type, names: Collection[str]) -> dict[str, FunctionType]:
    """The methods of `cls` and its bases in whose code one of `names` occurs."""
    methods: dict[str, FunctionType] = {}
    for base in reversed(cls.__mro__[:cls.__mro__.index(nn.Module)]):
        methods.update((name, value) for name, value in vars(base).items() if isinstance(value, FunctionType))
    return {name: method for name, method in methods.items() if not set(names).isdisjoint(method.__code__.co_names)}


@functools.cache
def _soft_pool_class(cls: type, pools: tuple[str, ...]) -> tuple[type, list[str]]:
    """A subclass of `cls` whose methods pool by SoftPool, and the methods whose calls could not be reached."""
    functions = {name: function for kind in pools for name, function in _SOFT_POOLS[kind].items()}
    # TorchScript looks names up in modules only, so the stand-in for torch.nn.functional has to be one.
    shim = ModuleType('soft_pool_functional')
    vars(shim).update({**vars(F), **functions})
    namespace: dict[str, Any] = {}
    hidden = []
    for name, method in _pool_calls(cls, functions).items():
        used: dict[str, Any] = {key: method.__globals__.get(key) for key in method.__code__.co_names}
        changes: dict[str, Any] = {key: shim for key, value in used.items() if value is F}
        changes.update((key, functions[key]) for key, value in used.items()
                       if key in functions and value is getattr(F, key))
        if not changes:
            hidden.append(f'{cls.__name__}.{name}')
            continue
        rebound = FunctionType(method.__code__, {**method.__globals__, **changes}, name, method.__defaults__,
                               method.__closure__)
        rebound.__kwdefaults__ = method.__kwdefaults__
        rebound.__annotations__ = method.__annotations__
        namespace[name] = rebound
    if not namespace:
        return cls, hidden
    namespace['soft_pool_methods'] = tuple(namespace)
    namespace['__module__'] = cls.__module__
    namespace['__reduce__'] = lambda self: (_rebuild, (cls, pools), self.__dict__)
    return type(cls)(cls.__name__, (cls,), namespace), hidden


def _rebuild(cls: type, pools: tuple[str, ...]) -> Any:
    swapped, _ = _soft_pool_class(cls, pools)
    return object.__new__(swapped)


def _swap_calls(graph_module: fx.GraphModule, functions: dict[str, Callable]) -> None:
    originals = {getattr(F, name): function for name, function in functions.items()}
    for node in graph_module.graph.nodes:
        if node.op == 'call_function':
            node.target = originals.get(node.target, node.target)
    graph_module.recompile()
