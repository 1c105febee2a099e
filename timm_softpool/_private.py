"""What of PyTorch is not public and has no public counterpart, in one place."""
from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import nn
from torch._jit_internal import BroadcastingList2  # type: ignore[attr-defined]  # int | list[int] of TorchScript
from torch.autograd import forward_ad

__all__ = ['BroadcastingList2', 'forward_ad_active', 'functorch_active', 'move_hooks', 'parallel_for']

for _owner, _name in ((torch._C, '_are_functorch_transforms_active'), (forward_ad, '_current_level')):
    if not hasattr(_owner, _name):
        raise ImportError(f'timm-softpool needs torch>=2.11 with {_owner.__name__}.{_name}, got {torch.__version__}')

functorch_active = torch._C._are_functorch_transforms_active


def forward_ad_active() -> bool:
    return forward_ad._current_level >= 0


def move_hooks(source: nn.Module, target: nn.Module) -> None:
    """Register the hooks of ``source`` on ``target``; the handles to remove them keep working."""
    vars(target).update({name: value for name, value in vars(source).items() if 'hook' in name})


@cache
def parallel_for() -> int | None:
    """The address of the C function ``torch_parallel_for`` of PyTorch's stable ABI; None if it is not to be found."""
    try:
        function = ctypes.CDLL(torch._C.__file__).torch_parallel_for
    except (OSError, AttributeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value
