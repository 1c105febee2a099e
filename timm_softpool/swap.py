"""Any model's max and average pools -> SoftPool."""
from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

from timm.layers import AvgPool2dSame, create_pool2d
from torch import nn

from ._private import move_hooks
from .functional import geometry
from .functional_pools import is_local, swap_functional_pools
from .layers import SoftPool1d, SoftPool2d, SoftPool2dSame, SoftPool3d

_logger = logging.getLogger(__name__)

Where = Callable[[str, nn.Module], bool]

# Exact types: a subclass may pad or permute in a way that its attributes do not tell.
_POOLS: dict[type[nn.Module], tuple[str, type]] = {
    nn.MaxPool1d: ('max', SoftPool1d),
    nn.MaxPool2d: ('max', SoftPool2d),
    nn.MaxPool3d: ('max', SoftPool3d),
    nn.AvgPool1d: ('avg', SoftPool1d),
    nn.AvgPool2d: ('avg', SoftPool2d),
    nn.AvgPool3d: ('avg', SoftPool3d),
    type(create_pool2d('max', 2, padding='same')): ('max', SoftPool2dSame),
    AvgPool2dSame: ('avg', SoftPool2dSame),
}


def swap_pooling(model: nn.Module, *, pools: Collection[str] = ('max', 'avg'),
                 where: Where | None = None) -> nn.Module:
    """Replace the local pools of `model` by SoftPool, in place, with the same window, stride, padding and ceil_mode.

    Replaced are the max and average pools of `torch.nn` and timm's TensorFlow-'same' ones (by their exact type), and
    the calls of `torch.nn.functional`'s pools in the methods of the model's own modules. Left alone are windows of
    one cell, where every pool is the identity; average pools that take the place of a global one (stride 1 without
    padding, 2-D and 3-D windows of 7 cells and more that do not overlap, functional ones as large as the map); adaptive
    pools; and what SoftPool has no form of: ``dilation``, ``return_indices`` and ``divisor_override``. Padded cells
    have weight 0 in a SoftPool, also where an average pool counted them (``count_include_pad``).

    SoftPool has no parameters: a checkpoint of the model fits before and after. What was replaced is logged (level
    INFO, logger ``timm_softpool.swap``), and what could not be, with the reason (level WARNING).

    Args:
        model: Any model of timm, torchvision, PyTorchVideo or your own.
        pools: The kinds to replace: 'max', 'avg' or both.
        where: Called with the name and the module of each pool (for functional pools, the module that calls them);
            those for which it returns False are left alone.

    Returns:
        `model`; or a SoftPool layer where `model` itself is a pool.

    Raises:
        TypeError: If `model` is not a module, or `where` not a function.
        ValueError: If `pools` names another kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module, got {type(model).__name__}')
    if not isinstance(pools, Collection) or isinstance(pools, str) or not pools or not set(pools) <= {'max', 'avg'}:
        raise ValueError(f"pools must be ('max',), ('avg',) or ('max', 'avg'), got {pools!r}")
    if where is not None and not callable(where):
        raise TypeError(f'where must be a function of a name and a module, got {where!r}')
    replaced: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        kind, layer = _POOLS.get(type(module), ('', nn.Identity))
        if kind not in pools or not _is_local(module) or where is not None and not where(name, module):
            continue
        if reason := _obstacle(module):
            _logger.warning('%s: %s left as it is: SoftPool has no %s', name, module, reason)
            continue
        if module not in replaced:
            replaced[module] = layer(module.kernel_size, module.stride, module.padding, module.ceil_mode)
            _logger.info('%s: %s -> %s', name, module, replaced[module])
        model = replace_pool(model, name, replaced[module])
    swap_functional_pools(model, pools, where)
    return model


def replace_pool(model: nn.Module, name: str, pool: nn.Module) -> nn.Module:
    """Put `pool` into the place `name` of `model`, with the hooks and in the mode of what was there.

    Returns `model`, or `pool` where `name` is empty.
    """
    old = model.get_submodule(name)
    pool.train(old.training)
    move_hooks(old, pool)
    if not name:
        return pool
    model.set_submodule(name, pool)
    return model


def _is_local(pool: Any) -> bool:
    layer: Any
    kind, layer = _POOLS[type(pool)]
    window = geometry(layer.ndim, pool.kernel_size, pool.stride, pool.padding)
    # The padding of a 'same' pool is not in its attributes.
    return is_local(kind == 'avg' and type(pool) is not AvgPool2dSame, *map(list, window))


def _obstacle(pool: Any) -> str:
    dilation = getattr(pool, 'dilation', 1)
    if {*dilation} != {1} if isinstance(dilation, (tuple, list)) else dilation != 1:
        return f'dilation={dilation}'
    if getattr(pool, 'return_indices', False):
        return 'return_indices'
    if getattr(pool, 'divisor_override', None):
        return 'divisor_override'
    return ''


def soft_pools(model: nn.Module) -> dict[str, nn.Module]:
    """Where `model` pools by SoftPool: its SoftPool layers, and the modules whose functional pools were swapped."""
    layers = tuple({layer for _, layer in _POOLS.values()})
    return {name: module for name, module in model.named_modules()
            if isinstance(module, layers) or hasattr(module, 'soft_pool_origin')}
