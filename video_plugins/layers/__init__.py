"""Layers for 3-D networks: FAST convolutions, multi-temporal convolutions, squeeze and recursion with temporal gates.

They take and give features of the shape (N, C, T, H, W): clips, channels, frames, rows, columns.
"""
from .fast import FASTConv3d
from .mtconv import MTConv3d, select_similar_frames
from .srtg import SqueezeRecursion, temporal_gate

__all__ = ['FASTConv3d', 'MTConv3d', 'SqueezeRecursion', 'select_similar_frames', 'temporal_gate']
