"""The kernels behind the operator ``torch.ops.timm_softpool.soft_pool``: a file for each backend."""
from . import op, reference
from .dispatch import available_backends, backend, set_backend
from .window import Window

__all__ = ['Window', 'available_backends', 'backend', 'op', 'reference', 'set_backend']
