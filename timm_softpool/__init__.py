"""SoftPool for PyTorch's model zoos. Importing the package registers its image models in timm."""
from . import flops, models
from .class_regularization import ClassRegularization, add_class_regularization, remove_class_regularization
from .functional import soft_pool1d, soft_pool2d, soft_pool3d
from .kernels import available_backends, backend, set_backend
from .layers import SoftPool1d, SoftPool2d, SoftPool2dSame, SoftPool3d
from .models.twin import list_models
from .pretrained import convert_checkpoint
from .swap import soft_pools, swap_pooling

__all__ = [
    'ClassRegularization', 'SoftPool1d', 'SoftPool2d', 'SoftPool2dSame', 'SoftPool3d', 'add_class_regularization',
    'available_backends', 'backend', 'convert_checkpoint', 'flops', 'list_models', 'models',
    'remove_class_regularization', 'set_backend', 'soft_pool1d', 'soft_pool2d', 'soft_pool3d', 'soft_pools',
    'swap_pooling',
]
