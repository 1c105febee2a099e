"""The networks by name: one table, and the entry points made of it for four registries.

Each entry point is called ``name(pretrained=False, progress=True, **kwargs)`` and takes the builder's arguments; the
classes, input channels and dropout may be given by PyTorchVideo's names or by timm's.
"""
from __future__ import annotations

import contextlib
import fnmatch
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from fvcore.common.registry import Registry
from pytorchvideo.models import hub as pytorchvideo_hub
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    model_entrypoint,
    register_model,
    resolve_pretrained_cfg,
)

from timm_softpool.pretrained import LAYOUTS, locate, pretrained_cfgs

from .checkpoints import rename
from .models import (
    create_fast_densenet,
    create_fast_resnet,
    create_from_pytorchvideo,
    create_mtnet,
    create_regularized,
    create_srtg_resnet,
)
from .models.net import VideoNet

VIDEO_MODELS = Registry('VIDEO_PLUGINS_MODEL')

# timm's name of an argument -> the builder's.
ARGUMENTS = {'num_classes': 'model_num_class', 'in_chans': 'input_channel', 'drop_rate': 'dropout_rate'}

MTNET_DEPTHS = {'xs': (2, 2, 2, 2), 's': (2, 2, 5, 3), 'm': (3, 4, 6, 3), 'l': (3, 4, 23, 3), 'xl': (3, 8, 36, 3),
                'xxl': (3, 24, 36, 3)}

SRTG_PAPER, MTNET_PAPER, FAST_PAPER = 'arXiv:2006.08247', 'arXiv:2011.03949', 'arXiv:1909.13474'
CLASSREG_PAPER = 'arXiv:2002.02651'

# PyTorchVideo's networks that have a twin: what of their clips differs from its others (docs/source/model_zoo.md).
PYTORCHVIDEO: dict[str, dict[str, Any]] = {
    'slow_r50': dict(num_frames=8, frame_stride=8, input_size=(3, 256, 256)),
    'csn_r101': dict(num_frames=32, frame_stride=2, input_size=(3, 256, 256)),
    'x3d_xs': dict(num_frames=4, frame_stride=12, input_size=(3, 182, 182)),
    'x3d_s': dict(num_frames=13, frame_stride=6, input_size=(3, 182, 182)),
    'x3d_m': dict(num_frames=16, frame_stride=5, input_size=(3, 256, 256)),
    'x3d_l': dict(num_frames=16, frame_stride=5, input_size=(3, 356, 356)),
}

# Name -> builder, what the builder is told, what the network is, and its paper.
VARIANTS: dict[str, tuple[Callable[..., VideoNet], dict[str, Any], str, str]] = {}
for _form, _parallel in (('', False), ('_parallel', True)):
    _kind = 'FAST convolutions' + ', horizontal and vertical in parallel' * _parallel
    VARIANTS |= {f'fast_r3d_{depth}{_form}': (
        create_fast_resnet, dict(model_depth=depth, parallel=_parallel), f'ResNet-{depth} of {_kind}: a reconstruction',
        FAST_PAPER) for depth in (18, 34, 50)}
    VARIANTS[f'fast_densenet121{_form}'] = (
        create_fast_densenet, dict(parallel=_parallel), f'DenseNet-121 of {_kind}: a reconstruction', FAST_PAPER)
for _form, _groups in (('', 1), ('_g8', 8)):
    VARIANTS |= {f'mtnet_{size}{_form}': (
        create_mtnet, dict(depths=depths, groups=_groups),
        f'MTNet-{size.upper()}' + f' of {_groups} sub-streams' * (_groups > 1), MTNET_PAPER)
        for size, depths in MTNET_DEPTHS.items()}
for _convolution in ('3d', '2plus1d'):
    for _form, _placement in (('', None), ('srtg_', 'final')):
        _kind = ('(2+1)-D' if _convolution == '2plus1d' else '3-D') + ' ResNet'
        VARIANTS |= {f'{_form}r{_convolution}_{depth}': (
            create_srtg_resnet, dict(model_depth=depth, convolution=_convolution, placement=_placement),
            f'{_kind}-{depth}' + ' with squeeze and recursion behind each block' * bool(_placement), SRTG_PAPER)
            for depth in (18, 34, 50, 101)}
# A quarter as wide. Each sub-stream needs a channel: the inner convolutions of `_g8` are half as wide as the stage.
for _name in ('r3d_18', 'r2plus1d_18', 'srtg_r3d_18', 'fast_r3d_18', 'mtnet_xs', 'mtnet_xs_g8'):
    _builder, _options, _text, _paper = VARIANTS[_name]
    _inner = dict(width_per_group=256) if _options.get('groups', 1) > 1 else {}
    VARIANTS[f'{_name}_w16'] = (_builder, {**_options, **_inner, 'widths': (16, 32, 64, 128)},
                                f'{_text}; with stages of 16, 32, 64 and 128 channels', _paper)
# With Class Regularization behind each stage: some of ours and some of PyTorchVideo's.
for _name in [name for name in VARIANTS if name.startswith(('r3d', 'r2plus1d', 'mtnet'))]:
    _builder, _options, _text, _paper = VARIANTS[_name]
    VARIANTS[f'{_name}_classreg'] = (partial(create_regularized, _builder), _options,
                                     f'{_text}; with Class Regularization, a reconstruction', CLASSREG_PAPER)
VARIANTS |= {f'{name}_classreg': (
    partial(create_regularized, partial(create_from_pytorchvideo, name)), {},
    f"PyTorchVideo's {name} with Class Regularization, a reconstruction", CLASSREG_PAPER) for name in PYTORCHVIDEO}


@dataclass
class VideoCfg(PretrainedCfg):
    """timm's configuration with the geometry of a clip: ``num_frames``, every ``frame_stride``-th of the video.

    ``input_size`` is that of a frame, (channels, rows, columns). Mean and standard deviation are those of the SRTG
    author's code (network/config.py), for pixels in 0..1.
    """

    num_classes: int = 400
    num_frames: int = 16
    frame_stride: int = 2
    mean: tuple[float, ...] = (124 / 255, 117 / 255, 104 / 255)
    std: tuple[float, ...] = (1 / (0.0167 * 255),) * 3
    interpolation: str = 'bilinear'
    crop_pct: float = 1.0
    first_conv: str = 'blocks.0.conv'
    classifier: str = 'blocks.5.proj'


def list_models(pattern: str = '*') -> list[str]:
    """The names of the networks that match the wildcard ``pattern``."""
    return sorted(fnmatch.filter((name for name, _ in VIDEO_MODELS), pattern))


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> VideoNet:
    """The network ``name``, or the one with the weights of a tag, ``name.tag``.

    Args:
        name: One of :func:`list_models`.
        pretrained: Load the weights of the tag, or of the name's default tag.
        **kwargs: ``num_classes``, ``in_chans``, ``drop_rate`` and all that the network's builder takes.

    Raises:
        ValueError: If there is no such network.
        RuntimeError: If weights are asked for and there are none.
    """
    name, _, tag = name.partition('.')
    if name not in VIDEO_MODELS:
        raise ValueError(f'name must be one of video_plugins.list_models(), got {name!r}')
    return VIDEO_MODELS.get(name)(pretrained, **({'pretrained_cfg': tag} if tag else {}), **kwargs)


def _build(builder: Callable[..., VideoNet], options: dict[str, Any], device: Any = None, dtype: Any = None,
           **kwargs: Any) -> VideoNet:
    with torch.device(device) if device is not None else contextlib.nullcontext():
        model = builder(**{**options, **{ARGUMENTS.get(key, key): value for key, value in kwargs.items()}})
    return model.to(dtype) if dtype is not None else model


def _entry_point(name: str, builder: Callable[..., VideoNet], options: dict[str, Any], text: str) -> Callable:
    timm_names = {theirs: ours for ours, theirs in ARGUMENTS.items()}

    def create(pretrained=False, progress=True, **kwargs):
        kwargs = {timm_names.get(key, key): value for key, value in kwargs.items()}
        if kwargs.pop('features_only', False):
            raise TypeError(f'{name} has no features_only network; its stages are model.blocks')
        cfg: Any = kwargs.pop('pretrained_cfg', None)
        if isinstance(cfg, dict):
            cfg = VideoCfg(**cfg)
        cfg = resolve_pretrained_cfg(name, cfg, kwargs.pop('pretrained_cfg_overlay', None))
        if pretrained:
            if kwargs.get('in_chans', 3) != 3:
                raise ValueError(f'in_chans must be 3 for the weights of {name}, got {kwargs["in_chans"]}')
            cfg = locate(cfg, progress)
        model = build_model_with_cfg(partial(_build, builder, options), name, pretrained, pretrained_cfg=cfg, **kwargs)
        model.pretrained_cfg.pop('state_dict', None)
        return model

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"""{text} ({VARIANTS[name][3]}).

    Args:
        pretrained: Load the published weights of the name's default tag.
        progress: Show the progress of a download on a terminal.
        **kwargs: ``num_classes``, ``in_chans``, ``drop_rate`` and those of
            `video_plugins.models.{getattr(builder, '__name__', 'create_regularized')}`.
    """
    return create


def register() -> None:
    """Register every network in timm, in ``VIDEO_MODELS`` and in `pytorchvideo.models.hub`; once, if called again.

    Raises:
        RuntimeError: If another package has one of the names in timm or in that module. Then nothing is registered.
    """
    module = sys.modules[__name__]
    for name in VARIANTS:
        for place, entry_point in (('timm', model_entrypoint(name) if timm.is_model(name) else None),
                                   ('pytorchvideo.models.hub', getattr(pytorchvideo_hub, name, None))):
            if entry_point is not None and getattr(entry_point, '__module__', None) != __name__:
                raise RuntimeError(f'cannot register the model {name}: {place} has that name from '
                                   f'{getattr(entry_point, "__module__", type(entry_point).__name__)}')
    cfgs: dict[str, Any] = {}
    for name, (_, options, _, paper) in VARIANTS.items():
        factorised = options.get('convolution') == '2plus1d'
        LAYOUTS[name] = partial(rename, factorised=factorised)
        base = VideoCfg(paper_ids=paper)
        if geometry := PYTORCHVIDEO.get(name.removesuffix('_classreg')):
            stem = 'blocks.0.conv.conv_t' if name.startswith('x3d') else base.first_conv
            base = replace(base, mean=(0.45,) * 3, std=(0.225,) * 3, first_conv=stem, **geometry)
        if 'widths' in options:
            base = replace(base, num_frames=8, input_size=(3, 64, 64))
        cfgs |= pretrained_cfgs(name, replace(base, first_conv='blocks.0.conv.spatial') if factorised else base)
    vars(module)['default_cfgs'] = generate_default_cfgs(cfgs)  # where timm looks for them
    for name, (builder, options, text, _) in VARIANTS.items():
        registered = timm.is_model(name)
        entry_point = model_entrypoint(name) if registered else _entry_point(name, builder, options, text)
        if not registered:
            register_model(entry_point)
        if name not in VIDEO_MODELS:
            VIDEO_MODELS.register(entry_point)
        for namespace in (module, pytorchvideo_hub):
            setattr(namespace, name, entry_point)


register()
