"""Builders of 3-D networks in the style of PyTorchVideo's ``create_*`` functions."""
from .densenet import create_fast_densenet
from .mtnet import create_mtnet
from .resnet import create_fast_resnet, create_srtg_resnet

__all__ = ['create_fast_densenet', 'create_fast_resnet', 'create_mtnet', 'create_srtg_resnet']
