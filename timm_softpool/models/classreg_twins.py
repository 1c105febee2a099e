"""Twins of timm's ResNets, ResNeXts and DenseNets with Class Regularization behind each stage: a reconstruction.

A plain checkpoint of the architecture loads into its twin; a feature network (``features_only``) has no classifier and
therefore is the plain one.
"""
import timm
from torch import nn

from ..class_regularization import add_class_regularization, linear_layer
from ..pretrained import OPTIONAL
from .twin import Kind, register_twins

CLASSREG = Kind('_classreg', {'paper_name': 'Learning Class Regularized Features for Action Recognition',
                              'paper_ids': 'arXiv:2002.02651'}, 'with Class Regularization behind each stage',
                OPTIONAL, ('strength',))


def regularize(model: nn.Module, strength: float = 0.2) -> nn.Module:
    """`add_class_regularization`, where there are classes."""
    if not hasattr(model, 'get_classifier') or linear_layer(model) is None:
        return model
    return add_class_regularization(model, strength=strength)


ARCHITECTURES = [name for module in ('resnet', 'densenet') for name in timm.list_models(module=module)]

register_twins(__name__, ARCHITECTURES, regularize, CLASSREG)
