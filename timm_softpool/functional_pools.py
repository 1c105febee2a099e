"""Pools that a model calls as functions, ``F.max_pool2d(x, 3)``, and that no module stands for."""
from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Collection
from types import CodeType, FunctionType, ModuleType
from typing import Any, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ._private import BroadcastingList2
from .functional import Geometry, geometry, soft_pool

_logger = logging.getLogger('timm_softpool.swap')

_LIBRARIES = ('torch.', 'timm.layers')  # what these pool is a mask, a gate or a head


def swap_functional_pools(model: nn.Module, pools: Collection[str],
                          where: Optional[Callable[[str, nn.Module], bool]] = None) -> None:
    """Make the methods of `model`'s modules call SoftPool where they call ``F.max_pool*`` or ``F.avg_pool*``.

    A module's class becomes a subclass whose methods see SoftPool under these names; the code of the methods is not
    copied. In a traced graph the calls themselves change. Modules of torch and of `timm.layers` are left alone.
    TorchScript takes the 2-D ones only. A method sees its globals as they were when the model was swapped.
    """
    functions = {name: function for kind in pools for name, function in _SOFT_POOLS[kind].items()}
    originals = {getattr(F, name): function for name, function in functions.items()}
    for name, module in list(model.named_modules()):
        if isinstance(module, fx.GraphModule):
            # A feature extractor of torchvision has two graphs, one for training and one for evaluation.
            graphs = {id(value): value for value in vars(module).values() if isinstance(value, fx.Graph)}
            calls = [node for graph in graphs.values() for node in graph.nodes
                     if node.op == 'call_function' and node.target in originals]
            if calls and (where is None or where(name, module)):
                for node in calls:
                    node.target = originals[node.target]
                module.recompile()
                _logger.info('%s: functional pools of the graph -> SoftPool', name)
            continue
        origin: Any = getattr(module, 'soft_pool_origin', (type(module), ()))
        cls, before = origin
        swapped, hidden = _soft_pool_class(cls, tuple(sorted({*pools, *before})))
        hidden = hidden + [key for key, value in vars(module).items() if any(value is pool for pool in originals)]
        if swapped is type(module) and not hidden or where is not None and not where(name, module):
            continue
        if hidden:
            _logger.warning('%s: functional pools of %s left as they are, called in a way that cannot be changed: %s',
                            name, cls.__name__, ', '.join(hidden))
        if swapped is not type(module):
            _logger.info('%s: functional pools of %s -> SoftPool', name, cls.__name__)
            module.__class__ = swapped


def is_local(average: bool, kernel_size: List[int], stride: List[int], padding: List[int]) -> bool:
    """Whether a pool is neither the identity nor a global average in a local pool's clothes (see `swap_pooling`)."""
    if max(kernel_size) == 1:
        return False
    if not average or max(padding) > 0:
        return True
    return max(stride) > 1 and (stride != kernel_size or len(kernel_size) == 1 or min(kernel_size[-2:]) < 7)


def _stand_ins(ndim: int) -> tuple[Callable, Callable]:
    """SoftPool with the signatures of ``F.max_pool*`` and ``F.avg_pool*``; what is not local stays what it was."""
    plain_max_pool, plain_avg_pool = getattr(F, f'max_pool{ndim}d'), getattr(F, f'avg_pool{ndim}d')

    def local_geometry(average: bool, input: Tensor, kernel_size: Any, stride: Any, padding: Any) -> Optional[Geometry]:
        numbers = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size,)
        if not all(isinstance(number, int) for number in numbers):
            return None  # while a graph is traced: a size computed from the map's, which makes the pool global
        window = geometry(ndim, kernel_size, stride, padding)
        if average and isinstance(input, Tensor) and window[0] == tuple(input.shape[-ndim:]):
            return None
        return window if is_local(average, *map(list, window)) else None

    def max_pool(input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
        window = local_geometry(False, input, kernel_size, stride, padding)
        if window is None or return_indices or dilation not in (1, (1,) * ndim):
            return plain_max_pool(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return soft_pool(input, *window, ceil_mode)

    def avg_pool(input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
                 divisor_override=None):
        window = local_geometry(True, input, kernel_size, stride, padding)
        if window is None or divisor_override is not None:
            return plain_avg_pool(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
        return soft_pool(input, *window, ceil_mode)

    return max_pool, avg_pool


soft_max_pool1d, soft_avg_pool1d = _stand_ins(1)
_max_pool2d, _avg_pool2d = _stand_ins(2)
soft_max_pool3d, soft_avg_pool3d = _stand_ins(3)


def soft_max_pool2d(input: Tensor, kernel_size: BroadcastingList2[int], stride: Optional[BroadcastingList2[int]] = None,
                    padding: BroadcastingList2[int] = 0, dilation: BroadcastingList2[int] = 1,
                    ceil_mode: bool = False, return_indices: bool = False) -> Tensor:
    if torch.jit.is_scripting():
        step = kernel_size if stride is None else stride
        if max(dilation) == 1 and is_local(False, kernel_size, step, padding):
            return torch.ops.timm_softpool.soft_pool(input, kernel_size, step, padding, ceil_mode)
        return F.max_pool2d(input, kernel_size, step, padding, dilation, ceil_mode)
    return _max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def soft_avg_pool2d(input: Tensor, kernel_size: BroadcastingList2[int], stride: Optional[BroadcastingList2[int]] = None,
                    padding: BroadcastingList2[int] = 0, ceil_mode: bool = False, count_include_pad: bool = True,
                    divisor_override: Optional[int] = None) -> Tensor:
    if torch.jit.is_scripting():
        step = kernel_size if stride is None else stride
        is_global = kernel_size == input.shape[-2:]
        if divisor_override is None and not is_global and is_local(True, kernel_size, step, padding):
            return torch.ops.timm_softpool.soft_pool(input, kernel_size, step, padding, ceil_mode)
        return F.avg_pool2d(input, kernel_size, step, padding, ceil_mode, count_include_pad, divisor_override)
    return _avg_pool2d(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)


_SOFT_POOLS: dict[str, dict[str, Callable]] = {
    'max': {'max_pool1d': soft_max_pool1d, 'max_pool2d': soft_max_pool2d, 'max_pool3d': soft_max_pool3d},
    'avg': {'avg_pool1d': soft_avg_pool1d, 'avg_pool2d': soft_avg_pool2d, 'avg_pool3d': soft_avg_pool3d}}
for _pools in _SOFT_POOLS.values():
    for _name, _function in _pools.items():
        _function.__name__ = _function.__qualname__ = f'soft_{_name}'  # by which a pickled graph finds it


def _names(code: CodeType) -> set[str]:
    """The names of globals and attributes in a function's code, and in that of the functions inside it."""
    return set(code.co_names).union(*[_names(inner) for inner in code.co_consts if isinstance(inner, CodeType)])


def _pool_calls(cls: type, pools: Collection[str]) -> tuple[dict[str, FunctionType], list[str]]:
    """The methods of `cls` in whose code one of `pools` is named; and those that cannot be given other globals.

    The latter are what only ``super()`` reaches, and what a decorator wraps.
    """
    calls: dict[str, FunctionType] = {}
    hidden = []
    for base in reversed(cls.__mro__[:cls.__mro__.index(nn.Module)]):
        if base.__module__.startswith(_LIBRARIES):
            continue
        for name, attribute in vars(base).items():
            method = attribute.fget if isinstance(attribute, property) else inspect.unwrap(attribute)
            method = getattr(method, '__func__', method)  # of static and class methods
            if not isinstance(method, FunctionType):
                continue
            names = _names(method.__code__)
            if calls.pop(name, None) and 'super' in names:
                hidden.append(f'super().{name}')
            if names.isdisjoint(pools):
                continue
            if method is attribute:
                calls[name] = method
            else:
                hidden.append(name)
    return calls, hidden


@functools.cache
def _soft_pool_class(cls: type, pools: tuple[str, ...]) -> tuple[type, list[str]]:
    """A subclass of `cls` whose methods pool by SoftPool, and the methods whose pools cannot be reached."""
    functions = {name: function for kind in pools for name, function in _SOFT_POOLS[kind].items()}
    calls, hidden = _pool_calls(cls, functions)
    if not calls:
        return cls, hidden
    # TorchScript looks names up in modules only, so the stand-in for torch.nn.functional has to be one.
    shim = ModuleType('soft_pool_functional')
    vars(shim).update({**vars(F), **functions})
    namespace: dict[str, Any] = {}
    for name, method in calls.items():
        names = _names(method.__code__)
        known = {key: method.__globals__[key] for key in names if key in method.__globals__}
        changes: dict[str, Any] = {key: shim for key, value in known.items() if value is F}
        changes |= {key: functions[key] for key, value in known.items()
                    if key in functions and value is getattr(F, key)}
        if not changes or known.get('torch') is torch and 'functional' in names:
            hidden.append(name)
        if not changes:
            continue
        rebound = FunctionType(method.__code__, {**method.__globals__, **changes}, name, method.__defaults__,
                               method.__closure__)
        rebound.__kwdefaults__ = method.__kwdefaults__
        rebound.__annotations__ = method.__annotations__
        namespace[name] = rebound
    if not namespace:
        return cls, hidden
    namespace['soft_pool_origin'] = cls, pools
    namespace['__module__'] = cls.__module__
    namespace['__reduce__'] = lambda self: (_rebuild, (cls, pools), self.__dict__)
    return type(cls)(cls.__name__, (cls,), namespace), hidden


def _rebuild(cls: type, pools: tuple[str, ...]) -> Any:
    swapped, _ = _soft_pool_class(cls, pools)
    return object.__new__(swapped)
