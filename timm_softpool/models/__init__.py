"""The image models, which register themselves in timm when this package is imported."""
from . import classreg_twins, softpool_paper, softpool_twins

__all__ = ['classreg_twins', 'softpool_paper', 'softpool_twins']
