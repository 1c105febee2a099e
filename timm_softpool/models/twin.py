"""A SoftPool twin of a timm architecture: timm builds the network, a swap changes its pools."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import timm
from timm.models import PretrainedCfg, generate_default_cfgs, model_entrypoint, register_model, resolve_pretrained_cfg
from torch import nn

from ..pretrained import locate, pretrained_cfgs

SUFFIX = '_softpool'
PAPER: dict[str, Any] = {
    'paper_name': 'Refining activation downsampling with SoftPool', 'paper_ids': 'arXiv:2101.00440'}


def list_models(pattern: str = '*') -> list[str]:
    """The names that this package has registered in timm and that match the wildcard ``pattern``."""
    package = __name__.split('.')[0]
    return [name for name in timm.list_models(pattern) if model_entrypoint(name).__module__.split('.')[0] == package]


def register_twins(module_name: str, architectures: Iterable[str], swap: Callable[[Any], Any]) -> None:
    """Register ``<architecture>_softpool`` for each of ``architectures`` that this version of timm has.

    Args:
        module_name: Name of the calling module; timm lists the models under its last part.
        architectures: Names of timm models.
        swap: Puts SoftPool into a network in place, and returns it.

    Raises:
        RuntimeError: If another package has registered one of the names.
    """
    module: Any = sys.modules[module_name]
    twins = {base + SUFFIX: base for base in architectures if timm.is_model(base)}
    registered = {name: model_entrypoint(name) for name in twins if timm.is_model(name)}  # ours, if this is a reload
    for name, entrypoint in registered.items():
        if entrypoint.__module__ != module_name:
            raise RuntimeError(f'cannot register the model {name}: {entrypoint.__module__} has registered that name')
    cfgs: dict[str, Any] = {}
    for name, base in twins.items():
        cfg = replace(timm.get_pretrained_cfg(base) or PretrainedCfg(), **PAPER)
        cfgs.update(pretrained_cfgs(name, cfg))
    module.default_cfgs = generate_default_cfgs(cfgs)
    for name, base in twins.items():
        setattr(module, name,
                registered.get(name) or register_model(_entrypoint(module_name, name, base, swap)))
    module.__all__ = list(twins)


def _entrypoint(module_name: str, name: str, base: str, swap: Callable[[Any], Any]) -> Callable:
    def create(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        if pretrained:
            cfg = locate(cfg)
        model = swap(model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=cfg, **kwargs))
        for module in model.modules():  # a feature network keeps its configuration beside the whole network's
            if isinstance(own_cfg := getattr(module, 'pretrained_cfg', None), dict):
                own_cfg.pop('state_dict', None)
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = module_name
    create.__doc__ = f'{base} of timm, pooling by SoftPool.'
    return create
