"""One trainer for images and clips: ``timm-softpool train CONFIG.yaml key=value ...`` (extra ``train``)."""
from .config import Config, load_config

__all__ = ['Config', 'load_config']
