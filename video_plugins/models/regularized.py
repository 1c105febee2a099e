"""Networks with Class Regularization behind each stage: ours, and PyTorchVideo's own."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorchvideo.models import hub
from torch import nn

from timm_softpool import add_class_regularization

from .net import VideoNet


def create_regularized(builder: Callable[..., VideoNet], *, strength: float = 0.2, **kwargs: Any) -> VideoNet:
    """What ``builder`` makes of ``kwargs``, with Class Regularization of ``strength`` behind each stage.

    A reconstruction: see `timm_softpool.ClassRegularization`. A network without classes has none of it.
    """
    model = builder(**kwargs)
    if model.num_classes:
        add_class_regularization(model, strength=strength)
    return model


def create_from_pytorchvideo(name: str, *, model_num_class: int = 400, **kwargs: Any) -> VideoNet:
    """A network of `pytorchvideo.models.hub` as a `VideoNet`: it gives logits, and for clips of any size.

    X3D's softmax is left out of the head, and its pools average all that there is: at the size that the network was
    made for, they compute the same.
    """
    net = getattr(hub, name)(model_num_class=max(model_num_class, 1), **kwargs)
    head = net.blocks[-1]
    head.in_features, head.activation = head.proj.in_features, None
    pooling = head if isinstance(head.pool, nn.AvgPool3d) else head.pool
    pooling.pool = nn.AdaptiveAvgPool3d(1)
    model = VideoNet(list(net.blocks))
    if not model_num_class:
        model.reset_classifier(0)
    return model
