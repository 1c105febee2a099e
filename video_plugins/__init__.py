"""3-D networks for PyTorchVideo and timm: FAST convolutions, MTNet, SRTG; and `load_clip`, which reads their input.

Importing the package registers them in timm, in its own registry and in `pytorchvideo.models.hub`.
"""
try:
    import pytorchvideo  # noqa: F401
except ImportError as error:
    raise ImportError("video_plugins needs PyTorchVideo: pip install 'timm-softpool[video]'") from error

from .camera_motion import CAMERA_MOTIONS, camera_motion
from .clips import clip_config, load_clip, load_clips
from .hub import VIDEO_MODELS, create_model, list_models
from .layers import FASTConv3d, MTConv3d, SqueezeRecursion, temporal_gate
from .models import create_fast_densenet, create_fast_resnet, create_mtnet, create_srtg_resnet

__all__ = [
    'CAMERA_MOTIONS', 'FASTConv3d', 'MTConv3d', 'SqueezeRecursion', 'VIDEO_MODELS', 'camera_motion', 'clip_config',
    'create_fast_densenet', 'create_fast_resnet', 'create_model', 'create_mtnet', 'create_srtg_resnet', 'list_models',
    'load_clip', 'load_clips', 'temporal_gate',
]
