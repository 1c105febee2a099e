"""Explainers for any model of either zoo: what in an image or clip speaks for a class, and what a layer looks for."""
from . import metrics
from .base import Explainer, Explanation
from .class_tubes import ClassTubes
from .layers import find_layers, last_spatial_layer
from .minds_eye import MindsEye
from .saliency_tubes import SaliencyTubes

__all__ = ['ClassTubes', 'Explainer', 'Explanation', 'MindsEye', 'SaliencyTubes', 'find_layers', 'last_spatial_layer',
           'metrics']
