"""The ImageNet networks of the SoftPool paper, with the geometry of its authors' code: a stem pool of 2x2 cells.

Only the max pool behind the first convolution changes, from 3x3 cells with stride 2 and padding 1 to SoftPool(2, 2);
the average pools of DenseNet's transitions and the global pool stay.
Source: main/models/resnet.py and main/models/densenet.py of the authors' repository.
"""
from torch import nn

from ..layers import SoftPool2d
from ..swap import replace_pool
from .twin import register_twins

ARCHITECTURES = (
    'resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnext50_32x4d', 'resnext101_32x4d',
    'wide_resnet50_2', 'densenet121', 'densenet161', 'densenet169')


def swap_stem_pool(model: nn.Module) -> nn.Module:
    """Replace the max pools that halve the map by SoftPool(2, 2), in place."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.MaxPool2d and module.stride == 2:
            replace_pool(model, name, SoftPool2d(2, 2))
    return model


register_twins(__name__, ARCHITECTURES, swap_stem_pool)
