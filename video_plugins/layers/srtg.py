"""Squeeze and recursion with temporal gates (A. Stergiou, R. Poppe, Pattern Recognition Letters 141, 2021, 2006.08247).

Source: network/srtg_resnet.py of the author's repository for the block, train/test_cyclic.py for the gate: the gate in
his network sets every clip's decision to "closed" and is not followed here.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

RECURRENCES = {'lstm': 'LSTM', 'gru': 'GRU'}


class Recurrence(nn.RNNBase):
    """`nn.LSTM` or `nn.GRU` of ``channels`` features and as many states, one direction, starting from zeros.

    The same parameters, names and operator as those classes, which `torch.compile` refuses to look into.

    Shape:
        (T, N, C) -> (T, N, C), all frames' states of the last layer.
    """

    def __init__(self, channels: int, kind: str, num_layers: int = 2) -> None:
        if kind not in RECURRENCES:
            raise ValueError(f'recurrent must be one of {", ".join(map(repr, RECURRENCES))}, got {kind!r}')
        super().__init__(RECURRENCES[kind], channels, channels, num_layers)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        weights: list[Tensor] = [weight for layer in self.all_weights for weight in layer]
        state = input.new_zeros(self.num_layers, input.shape[1], self.hidden_size)
        options = (True, self.num_layers, 0.0, self.training, False, False)
        if self.mode == 'LSTM':
            return torch.lstm(input, (state, state), weights, *options)[0]
        return torch.gru(input, state, weights, *options)[0]


def temporal_gate(squeezed: Tensor, recursed: Tensor, mode: str = 'or') -> Tensor:
    """Whether each clip's recursion is cyclic-consistent with its frames: the clips whose gate is open.

    With ``D[t, j] = |squeezed[t] - recursed[j]|^2``, a clip is consistent forward if the nearest recursed feature of
    every frame t is that of t itself, and backward if the nearest frame of every recursed feature j is j; a frame that
    is as near as the nearest counts as the nearest. Distances are taken in float32 at least and have no gradient.

    Args:
        squeezed: Features of the frames, (N, C, T).
        recursed: The recursion's answers to them, (N, C, T).
        mode: 'or' opens for clips consistent forward or backward, 'and' for those consistent both ways. Which of them
            the paper means is not known; the author's reference code has 'or'.

    Returns:
        Booleans, (N,).

    Raises:
        ValueError: If `mode` is another word, or the shapes differ or are not (N, C, T).
    """
    if mode not in ('or', 'and'):
        raise ValueError(f"mode must be 'or' or 'and', got {mode!r}")
    if squeezed.ndim != 3 or squeezed.shape != recursed.shape:
        raise ValueError('squeezed and recursed must have one shape (N, C, T), got '
                         f'{tuple(squeezed.shape)} and {tuple(recursed.shape)}')
    dtype = torch.promote_types(squeezed.dtype, torch.float32)
    s, z = squeezed.detach().to(dtype), recursed.detach().to(dtype)
    distance = (s[:, :, :, None] - z[:, :, None, :]).square().sum(1)  # (N, T, T)
    own = distance.diagonal(dim1=1, dim2=2)
    forward, backward = ((own <= distance.amin(axis)).all(1) for axis in (2, 1))
    return forward | backward if mode == 'or' else forward & backward


class SqueezeRecursion(nn.Module):
    """Multiply each frame's features by a recursion over the frames' means.

    ``s[t] = mean over H, W of x[t]``, ``z = recurrence(s)``, ``out[t] = x[t] * z[t]``: z is the raw state of two layers
    of an LSTM (or GRU), between -1 and 1. With a gate, a clip whose gate is closed passes through unchanged, and the
    recursion learns nothing from it.

    Args:
        channels: C.
        recurrent: 'lstm' (SRTG) or 'gru' (MTNet).
        gate: None for a gate that is always open, as in all of the author's released networks; 'or' or 'and' for
            :func:`temporal_gate`.

    Shape:
        (N, C, T, H, W) -> the same.

    Raises:
        ValueError: If `recurrent` or `gate` is another word.
    """

    def __init__(self, channels: int, *, recurrent: str = 'lstm', gate: str | None = None) -> None:
        super().__init__()
        if gate not in (None, 'or', 'and'):
            raise ValueError(f"gate must be None, 'or' or 'and', got {gate!r}")
        self.rnn = Recurrence(channels, recurrent)
        self.gate = gate

    def forward(self, input: Tensor) -> Tensor:
        squeezed = input.mean((3, 4))
        recursed = self.rnn(squeezed.permute(2, 0, 1)).permute(1, 2, 0)
        if self.gate is not None:
            is_open = temporal_gate(squeezed, recursed, self.gate)
            recursed = torch.where(is_open[:, None, None], recursed, 1)
        return input * recursed[..., None, None].to(input.dtype)

    def extra_repr(self) -> str:
        return f'gate={self.gate!r}'
