"""Multi-temporal convolutions (A. Stergiou, R. Poppe, IJCNN 2021, 2011.03949).

Source: network/MTnet.py of the author's repository at its last version (January 2021).
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = Callable[..., nn.Module]
Streams = tuple[Tensor, Tensor]
Size = int | tuple[int, int, int]


def select_similar_frames(input: Tensor) -> Tensor:
    """Half of the frames: those most similar to their neighbours, in their order.

    With ``g[t]`` the mean of frame t over H and W, and ``s[t] = cos(g[t], g[t+1])^2``, frame t + 1 scores
    ``(s[t] + s[t+1]) / 2``; the T // 2 best frames are kept, each clip's own. The first and the last frame have no two
    neighbours and are never kept; clips of one and two frames, which have no other frames, come back whole. The choice
    has no gradient.

    Shape:
        (N, C, T, H, W) -> (N, C, T // 2, H, W) for T > 2.
    """
    frames = input.shape[2]
    if frames <= 2:
        return input
    means = input.detach().mean((3, 4))
    similarity = F.cosine_similarity(means[:, :, :-1], means[:, :, 1:], dim=1, eps=1e-4).square()
    score = (similarity[:, :-1] + similarity[:, 1:]) / 2
    index = score.topk(frames // 2, dim=1).indices.sort(dim=1).values + 1
    return input.gather(2, index[:, None, :, None, None].expand(-1, input.shape[1], -1, *input.shape[3:]))


def halve(input: Tensor, time: bool = False) -> Tensor:
    """The average of 2 x 2 cells of each frame, and of 2 frames if ``time``; an axis of one cell keeps it."""
    frames, height, width = input.shape[2:]
    return F.avg_pool3d(input, (min(frames, 2) if time else 1, min(height, 2), min(width, 2)))


def resize(input: Tensor, size: torch.Size) -> Tensor:
    """`input` with T, H and W of ``size``, trilinear; as it is where they agree."""
    return input if input.shape[2:] == size else F.interpolate(input, size, mode='trilinear')


def split_channels(channels: int, ratio: float) -> tuple[int, int]:
    """How many of ``channels`` the short and the long stream have."""
    short = int(channels * ratio)
    return short, channels - short


class MTConv3d(nn.Module):
    """A convolution of two streams, a short and a long one in time, with a lateral path from short to long.

    ::

        short ---> conv_short ---+------------> norm_short --------> short
                                 |
                                 +-> halve, select frames, resize, conv_lateral (1x1x1) -> norm_long -+
                                                                                                      v
        long ----> conv_long ------------------> norm_long ----------------------------------------> + -> long

    The long stream holds half of the short one's frames, rows and columns. Both terms of the long output pass through
    one and the same norm, which therefore sees two batches in each training step; so it is in the author's code.

    Args:
        in_channels: Channels of both input streams together.
        out_channels: Channels of both output streams together.
        kernel_size: Of both convolutions.
        stride: Of both convolutions.
        padding: Of both convolutions.
        ratio: Share of the channels in the short stream.
        groups: Sub-streams: the convolutions' groups, ``max(int(groups * ratio), 1)`` of them short and the rest, at
            least one, long. With more than one, the norms are GroupNorms of as many groups.
        lateral: Whether there is the lateral path.
        norm: Called with ``num_features=`` for groups=1.

    Shape:
        (N, C_s, T, H, W) and (N, C_l, T', H', W') -> the same pair with the channels of the output, strided.

    Raises:
        ValueError: If a stream has no channels, or not a multiple of its groups.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Size = 3, stride: Size = 1, padding: Size = 0,
                 *, ratio: float = 0.875, groups: int = 1, lateral: bool = True,
                 norm: Layer = nn.BatchNorm3d) -> None:
        super().__init__()
        groups_short = max(int(groups * ratio), 1)
        groups_long = max(groups - groups_short, 1)
        in_short = int(in_channels * ratio) // groups_short * groups_short
        in_long = in_channels - in_short
        out_short, out_long = split_channels(out_channels, ratio)
        for name, channels, divisor in (('short', in_short, groups_short), ('long', in_long, groups_long),
                                        ('short', out_short, groups_short), ('long', out_long, groups_long)):
            if channels < 1 or channels % divisor:
                raise ValueError(f'in_channels={in_channels}, out_channels={out_channels}, ratio={ratio} and groups='
                                 f'{groups} leave {channels} channels in the {name} stream of {divisor} groups')

        def make_norm(channels: int, norm_groups: int) -> nn.Module:
            return norm(num_features=channels) if groups == 1 else nn.GroupNorm(norm_groups, channels)

        self.conv_short = nn.Conv3d(in_short, out_short, kernel_size, stride, padding, groups=groups_short, bias=False)
        self.conv_long = nn.Conv3d(in_long, out_long, kernel_size, stride, padding, groups=groups_long, bias=False)
        self.conv_lateral = nn.Conv3d(out_short, out_long, 1, bias=False) if lateral else None
        self.norm_short = make_norm(out_short, groups_short)
        self.norm_long = make_norm(out_long, groups_long)

    def forward(self, streams: Streams) -> Streams:
        short, long = self.conv_short(streams[0]), self.conv_long(streams[1])
        normed = self.norm_long(long)
        if self.conv_lateral is not None:
            lateral = resize(select_similar_frames(halve(short)), long.shape[2:])
            normed = normed + self.norm_long(self.conv_lateral(lateral))
        return self.norm_short(short), normed
