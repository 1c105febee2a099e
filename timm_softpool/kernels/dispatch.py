"""Which backend serves a tensor.

A backend is a module with ``forward``, ``backward``, ``supports(input, window) -> bool`` and ``missing() -> str``, the
reason why it cannot run on this machine, empty if it can.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

from torch import Tensor

from . import cpu, cuda, eager
from .window import Window

_logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {'cuda': cuda, 'cpu': cpu, 'eager': eager}  # the fastest first

_forced: str | None = None


def available_backends() -> dict[str, str]:
    """Each backend, and ``'available'`` or the reason why it is not."""
    return {name: module.missing() or 'available' for name, module in BACKENDS.items()}


def set_backend(name: str | None) -> None:
    """Serve every tensor with backend ``name`` from now on; with None, by the fastest that supports it.

    Raises:
        ValueError: If there is no such backend.
        RuntimeError: If it cannot run on this machine.
    """
    global _forced
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f'backend must be one of {", ".join(map(repr, BACKENDS))} or None, got {name!r}')
        if reason := BACKENDS[name].missing():
            raise RuntimeError(f'backend {name!r} is not available: {reason}')
    _forced = name


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """:func:`set_backend` for the duration of a ``with`` block, in all threads."""
    previous = _forced
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def choose(input: Tensor, window: Window) -> ModuleType:
    """The backend for ``input``: the forced one, or the fastest that takes it."""
    if _forced is not None:
        if not BACKENDS[_forced].supports(input, window):
            raise RuntimeError(f'backend {_forced!r} does not take input of shape {tuple(input.shape)} on '
                               f'{input.device} with kernel_size {list(window.kernel_size)}')
        return BACKENDS[_forced]
    for name, module in BACKENDS.items():
        if module.supports(input, window):
            if not (reason := module.missing()):
                return module
            _say_once(name, reason)
    raise AssertionError('the eager backend takes everything')


@cache
def _say_once(name: str, reason: str) -> None:
    _logger.warning('SoftPool runs slower than it could, backend %r is not available: %s', name, reason)
