"""The other road of `decode.Video`, by torchcodec, which needs an FFmpeg of the system.

The pixels are the same for MP4 and WebM files that begin at 0 s. In one that begins later torchcodec 0.17 gave the next
frame, in MPEG transport streams one some frames off, and for the last of an open group of pictures none.
"""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from .decode import Picture

try:
    from torchcodec.decoders import VideoDecoder
except (ImportError, RuntimeError, OSError) as error:  # the latter of versions that load FFmpeg at once
    raise ImportError("decoder='torchcodec' needs pip install 'timm-softpool[torchcodec]' and FFmpeg") from error


class Video:
    """As :class:`decode.Video`, for files whose frames have timestamps and durations."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with open(path, 'rb'):
            pass  # torchcodec has RuntimeError for a file that is missing as well
        try:
            self._decoder = VideoDecoder(self.path)
        except (RuntimeError, ValueError) as error:
            if 'libtorchcodec' in str(error):
                raise ImportError(f"decoder='torchcodec' needs FFmpeg on this machine: {_reason(error)}") from error
            raise ValueError(f'{self.path} is no video that torchcodec can read: {_reason(error)}') from error
        about: Any = self._decoder.metadata
        self._begin = about.begin_stream_seconds
        self.end = self.duration = about.end_stream_seconds - self._begin
        self.rate = float(about.average_fps_from_header or about.average_fps)
        self._aspect = float(about.pixel_aspect_ratio or 1)
        self._turned = round((about.rotation or 0) / 90) % 2

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def pictures(self, moments: Iterable[float]) -> Iterator[Picture]:
        """See :meth:`decode.Video.pictures`."""
        for moment in moments:
            begun = min(moment + 0.5 / self.rate, self.end - 1e-6)  # it knows no moment after the end
            try:
                frame = self._decoder.get_frame_played_at(self._begin + begun)
            except (RuntimeError, IndexError) as error:
                raise ValueError(f'torchcodec cannot read {self.path} at {moment:.2f} s: {_reason(error)}') from error
            yield Picture(frame.data, 1 / self._aspect if self._turned else self._aspect)


def _reason(error: Exception) -> str:
    return str(error).split('\n')[0]
