"""A twin of a timm architecture: timm builds the network, a change in place makes the twin of it."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import timm
from timm.models import PretrainedCfg, generate_default_cfgs, model_entrypoint, register_model, resolve_pretrained_cfg
from torch import nn

from ..pretrained import StateDict, locate, pretrained_cfgs, read_checkpoint


@dataclass(frozen=True)
class Kind:
    """What the twins of one kind have in common.

    Attributes:
        suffix: Behind the name of the architecture.
        paper: Fields of timm's `PretrainedCfg`.
        text: What they do that the architecture does not.
        added: What is in the names of the tensors that they alone have.
        arguments: What they take beside the architecture's arguments, for ``change``.
    """

    suffix: str
    paper: dict[str, Any]
    text: str
    added: str | None = None
    arguments: tuple[str, ...] = ()


SOFTPOOL = Kind('_softpool', {'paper_name': 'Refining activation downsampling with SoftPool',
                              'paper_ids': 'arXiv:2101.00440'}, 'pooling by SoftPool')


def list_models(pattern: str = '*') -> list[str]:
    """The names that this package has registered in timm and that match the wildcard ``pattern``."""
    package = __name__.split('.')[0]
    return [name for name in timm.list_models(pattern) if model_entrypoint(name).__module__.split('.')[0] == package]


def register_twins(module_name: str, architectures: Iterable[str], change: Callable[..., Any],
                   kind: Kind = SOFTPOOL) -> None:
    """Register ``<architecture><suffix>`` for each of ``architectures`` that this version of timm has.

    Args:
        module_name: Name of the calling module; timm lists the models under its last part.
        architectures: Names of timm models.
        change: Makes the twin of a network, in place, and returns it.
        kind: What the twins are.

    Raises:
        RuntimeError: If another package has registered one of the names.
    """
    module: Any = sys.modules[module_name]
    twins = {base + kind.suffix: base for base in architectures if timm.is_model(base)}
    registered = {name: model_entrypoint(name) for name in twins if timm.is_model(name)}  # ours, if this is a reload
    for name, entrypoint in registered.items():
        if entrypoint.__module__ != module_name:
            raise RuntimeError(f'cannot register the model {name}: {entrypoint.__module__} has registered that name')
    cfgs: dict[str, Any] = {}
    for name, base in twins.items():
        cfg = replace(timm.get_pretrained_cfg(base) or PretrainedCfg(), **kind.paper)
        cfgs.update(pretrained_cfgs(name, cfg))
    module.default_cfgs = generate_default_cfgs(cfgs)
    for name, base in twins.items():
        setattr(module, name,
                registered.get(name) or register_model(_entrypoint(module_name, name, base, change, kind)))
    module.__all__ = list(twins)


def _entrypoint(module_name: str, name: str, base: str, change: Callable[..., Any], kind: Kind) -> Callable:
    def create(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs) -> nn.Module:
        cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
        own = {argument: kwargs.pop(argument) for argument in kind.arguments if argument in kwargs}
        added: StateDict = {}
        if pretrained:
            cfg, added = _without_added(locate(cfg), kind.added)
        model = change(model_entrypoint(base)(pretrained=pretrained, pretrained_cfg=cfg, **kwargs), **own)
        if added and added.keys() <= model.state_dict().keys():  # a feature network has none of them
            model.load_state_dict(added, strict=False)
        for module in model.modules():  # a feature network keeps its configuration beside the whole network's
            if isinstance(own_cfg := getattr(module, 'pretrained_cfg', None), dict):
                own_cfg.pop('state_dict', None)
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = module_name
    create.__doc__ = f'{base} of timm, {kind.text}.'
    return create


def _without_added(cfg: PretrainedCfg, part: str | None) -> tuple[PretrainedCfg, StateDict]:
    """``cfg`` with the weights that the architecture has, and those that only its twin has."""
    if not part or not (cfg.state_dict or cfg.file):
        return cfg, {}
    weights = cfg.state_dict or read_checkpoint(str(cfg.file))
    added = {name: value for name, value in weights.items() if part in name}
    return replace(cfg, state_dict={name: value for name, value in weights.items() if name not in added}), added
