"""The image models, which register themselves in timm when this package is imported."""
from . import softpool_paper, softpool_twins

__all__ = ['softpool_paper', 'softpool_twins']
