"""What a training run is told: one flat table of settings, read from YAML, each checked by name."""
from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

Format = Literal['folder', 'parquet', 'clips', 'camera_motion']
Precision = Literal['32-true', 'bf16-mixed']

# Of these a run may change its mind when it goes on: they do not change what it computes.
FREE = ('output', 'cache', 'workers', 'checkpoint_steps', 'description', 'license', 'tag')


def _setting(default: Any, least: float | None = None, most: float | None = None) -> Any:
    return field(default=default, metadata={'least': least, 'most': most})


@dataclass(kw_only=True)
class Config:
    """The settings; docs/training.md explains them.

    Raises:
        TypeError: If a value is not of its setting's type.
        ValueError: If it is out of range, or settings contradict each other.
    """

    model: str
    data: str
    format: Format
    output: str

    # Data.
    fold: int | None = _setting(None, 0)
    classes: int | None = _setting(None, 2)
    cache: str | None = None
    input_size: tuple[int, int] = _setting((224, 224), 1)
    train_sizes: tuple[int, ...] = _setting((), 1)
    num_frames: int = _setting(16, 1)
    frame_stride: int = _setting(2, 1)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal['bilinear', 'bicubic'] = 'bicubic'
    workers: int = _setting(2, 0)

    # Augmentation.
    scale: tuple[float, float] = _setting((0.35, 1.0), 0.01, 1)
    ratio: tuple[float, float] = _setting((3 / 4, 4 / 3), 0.01)
    hflip: float = _setting(0.5, 0, 1)
    color_jitter: float = _setting(0.0, 0)
    auto_augment: str | None = None
    erase: float = _setting(0.0, 0, 1)
    mixup: float = _setting(0.0, 0)
    cutmix: float = _setting(0.0, 0)

    # Network and optimisation.
    model_args: dict[str, Any] = field(default_factory=dict)
    init: str | None = None
    epochs: int = _setting(16, 1)
    batch_size: int = _setting(256, 1)
    opt: str = 'sgd'
    lr: float = _setting(0.3, 0)
    momentum: float = _setting(0.9, 0, 1)
    weight_decay: float = _setting(3e-4, 0)
    sched: Literal['cosine', 'tanh', 'poly'] = 'cosine'
    warmup_epochs: int = _setting(1, 0)
    smoothing: float = _setting(0.1, 0, 0.99)
    clip_grad: float | None = _setting(None, 0)
    ema: float | None = _setting(None, 0, 1)
    validate_epochs: int = _setting(1, 1)

    # Numerics and continuation.
    precision: Precision = 'bf16-mixed'
    accelerator: Literal['auto', 'cpu', 'gpu'] = 'auto'
    channels_last: bool = True
    seed: int = _setting(0, 0)
    checkpoint_steps: int = _setting(100, 1)

    # Publication.
    tag: str = 'trained'
    description: str = ''
    license: str = 'not stated'

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Config)
        for item in fields(self):
            value = _convert(item.name, getattr(self, item.name), hints[item.name])
            setattr(self, item.name, value)
            for bound, allowed in (('least', lambda v, b: v >= b), ('most', lambda v, b: v <= b)):
                limit = item.metadata.get(bound)
                values = value if isinstance(value, tuple) else () if value is None else (value,)
                if limit is not None and not all(allowed(v, limit) for v in values):
                    raise ValueError(f'{item.name} must be at {bound} {limit}, got {value!r}')
        if self.epochs % self.validate_epochs:
            raise ValueError(f'validate_epochs must divide epochs, {self.epochs}, so that the last one is validated, '
                             f'got {self.validate_epochs}')
        for name in ('mixup', 'cutmix', 'train_sizes'):
            if getattr(self, name) and self.is_video:
                raise ValueError(f'{name} is for images only, got {getattr(self, name)!r} with format {self.format!r}')
        if not re.fullmatch(r'\w+', self.tag, re.ASCII):
            raise ValueError(f'tag must be of letters, digits and underscores, got {self.tag!r}')
        if self.hflip and self.format == 'camera_motion':
            raise ValueError(f"hflip must be 0 with format 'camera_motion', whose labels it would turn round, "
                             f'got {self.hflip}')
        if self.fold is not None and self.format != 'clips':
            raise ValueError(f"fold is for format 'clips' only, got {self.fold} with format {self.format!r}")

    @property
    def is_video(self) -> bool:
        return self.format in ('clips', 'camera_motion')

    def as_yaml(self) -> str:
        """All settings, as :func:`load_config` reads them."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return yaml.safe_dump(plain, sort_keys=False, default_flow_style=None, width=120)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a YAML file, some of them replaced by ``overrides``, each ``key=value`` with a value in YAML.

    Raises:
        OSError: If the file cannot be read.
        TypeError: If a value is not of its setting's type.
        ValueError: If the file is no YAML mapping, or a setting is unknown, missing, or has a bad value.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ValueError(f'{path} is no YAML: {error}') from error
    if not isinstance(settings, dict):
        raise ValueError(f'{path} must hold a mapping of settings, got {type(settings).__name__}')
    for override in overrides:
        key, equals, value = override.partition('=')
        if not equals:
            raise ValueError(f'an override must be key=value, got {override!r}')
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f'{key} must be set to a value in YAML, got {value!r}') from error
    known = [item.name for item in fields(Config)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise ValueError(f'unknown setting {key!r} in {path}' + (f'; did you mean {near[0]}?' if near else
                             f'; known are {", ".join(known)}'))
    if missing := [key for key in ('model', 'data', 'format', 'output') if key not in settings]:
        raise ValueError(f'{path} must set {", ".join(missing)}')
    return Config(**settings)


def _convert(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint``; YAML reads 1e-3 as text, and lists where tuples are meant."""
    if isinstance(hint, types.UnionType):
        kinds = [kind for kind in hint.__args__ if kind is not type(None)]
        return None if value is None else _convert(name, value, kinds[0])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f'{name} must be one of {", ".join(arguments)}, got {value!r}')
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f'{name} must be a list, got {value!r}')
        if arguments[-1] is not ... and len(value) != len(arguments):
            raise ValueError(f'{name} must be a list of {len(arguments)} numbers, got {list(value)!r}')
        return tuple(_convert(name, item, arguments[0]) for item in value)
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    kind = origin or hint
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f'{name} must be {kind.__name__}, got {value!r}')
    return value
