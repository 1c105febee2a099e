"""Builders of 3-D networks in the style of PyTorchVideo's ``create_*`` functions."""
from .densenet import create_fast_densenet
from .mtnet import create_mtnet
from .regularized import create_from_pytorchvideo, create_regularized
from .resnet import create_fast_resnet, create_srtg_resnet

__all__ = ['create_fast_densenet', 'create_fast_resnet', 'create_from_pytorchvideo', 'create_mtnet',
           'create_regularized', 'create_srtg_resnet']
