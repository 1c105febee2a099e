"""Explainers for any model of either zoo: what in an image or clip speaks for a class, and what a layer looks for."""
from . import metrics
from .base import Explainer, Explanation
from .class_feature_pyramid import ClassFeaturePyramid
from .class_graph import ClassGraph
from .class_tubes import ClassTubes
from .flow import FlowGraph, flow_graph
from .layers import find_layers, last_spatial_layer
from .minds_eye import MindsEye
from .saliency_tubes import SaliencyTubes

__all__ = [
    'ClassFeaturePyramid', 'ClassGraph', 'ClassTubes', 'Explainer', 'Explanation', 'FlowGraph', 'MindsEye',
    'SaliencyTubes', 'find_layers', 'flow_graph', 'last_spatial_layer', 'metrics',
]
