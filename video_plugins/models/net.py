"""What the networks have in common: the container, the stem, the head.

The blocks are plain modules: a subclass of PyTorchVideo's own blocks loses its class when it calls their constructor.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pytorchvideo.models.net import Net
from torch import Tensor, nn

from timm_softpool import SoftPool3d

Layer = Callable[..., nn.Module]
Size3 = tuple[int, int, int]


class VideoNet(Net):
    """PyTorchVideo's `Net` of the blocks ``[stem, stage 1 .. stage 4, head]`` with the methods of a timm model.

    `Net` initialises the weights: convolutions He-normal by their outputs, norms 1 and 0, linear layers N(0, 0.01).
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__(blocks=nn.ModuleList(blocks))
        self.num_features = self.head_hidden_size = self.head.in_features
        self.num_classes = self.head.proj.out_features if self.head.proj is not None else 0

    @property
    def head(self) -> Any:
        return self.blocks[-1]

    def forward_features(self, input: Tensor) -> Any:
        """The last stage's features, (N, C, T, H, W); of MTNet, the pair of its two streams."""
        features: Any = input
        for block in self.blocks[:-1]:
            features = block(features)
        return features

    def forward_head(self, features: Any, pre_logits: bool = False) -> Tensor:
        """Logits (N, num_classes) of features, or with ``pre_logits`` the pooled features (N, num_features)."""
        return self.head.pool(features).flatten(1) if pre_logits else self.head(features)

    def get_classifier(self) -> nn.Module | None:
        return self.head.proj

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, or with 0 classes by none: then the network gives pooled features.

        Raises:
            ValueError: If ``global_pool`` is anything but 'avg', the only one there is.
        """
        if global_pool not in (None, 'avg'):
            raise ValueError(f"global_pool must be 'avg', got {global_pool!r}")
        reference = next(self.parameters())
        self.num_classes = num_classes
        self.head.proj = None
        if num_classes:
            proj = nn.Linear(self.num_features, num_classes, device=reference.device, dtype=reference.dtype)
            nn.init.normal_(proj.weight, std=0.01)
            nn.init.zeros_(proj.bias)
            self.head.proj = proj.train(self.training)


class Stem(nn.Sequential):
    """Convolution, norm, activation, pool: (N, 3, T, H, W) -> (N, C, T', H', W')."""

    def __init__(self, conv: nn.Module, norm: nn.Module, activation: nn.Module, pool: nn.Module) -> None:
        super().__init__(OrderedDict(conv=conv, norm=norm, activation=activation, pool=pool))


class Head(nn.Module):
    """The average over all frames and cells, of both streams side by side where there are two, then the logits.

    Shape:
        (N, C, T, H, W), or a pair of such, of any T, H, W -> (N, out_features); (N, C) where ``proj`` is None.
    """

    def __init__(self, in_features: int, out_features: int, dropout_rate: float = 0.0) -> None:
        super().__init__()
        self.in_features = in_features
        self.dropout = nn.Dropout(dropout_rate)
        self.proj: nn.Linear | None = nn.Linear(in_features, out_features) if out_features else None

    def pool(self, features: Tensor | tuple[Tensor, ...]) -> Tensor:
        streams = (features,) if isinstance(features, Tensor) else features
        return torch.cat([stream.mean((2, 3, 4)) for stream in streams], dim=1)

    def forward(self, features: Tensor | tuple[Tensor, ...]) -> Tensor:
        pooled = self.dropout(self.pool(features))
        return pooled if self.proj is None else self.proj(pooled)


def with_options(norm: Layer, eps: float, momentum: float) -> Layer:
    """A norm that still takes ``num_features=``, as PyTorchVideo calls it: eps and momentum by name."""
    return partial(norm, eps=eps, momentum=momentum)


def stem_pool(kind: str, time: bool) -> nn.Module:
    """The pool behind the first convolution, which halves rows and columns, and frames where ``time``.

    'max' has windows of 3 cells on each axis that it halves; 'soft' is SoftPool with windows of 2, as in the
    author's 2-D networks (main/models/resnet.py) and meant by his 3-D ones.

    Raises:
        ValueError: If ``kind`` is another word.
    """
    if kind == 'max':
        kernel, stride, padding = ((3, 2, 1) if time else ((1, 3, 3), (1, 2, 2), (0, 1, 1)))
        return nn.MaxPool3d(kernel, stride, padding)
    if kind == 'soft':
        return SoftPool3d((2 if time else 1, 2, 2), ceil_mode=True)  # a clip of one frame has a window, too
    raise ValueError(f"pool must be 'max' or 'soft', got {kind!r}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises ValueError, naming argument and choices, if ``value`` is none of them."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(map(repr, choices))}, got {value!r}')
