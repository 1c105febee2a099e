"""The frames of a video file at some moments, by PyAV, which brings FFmpeg along."""
from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import av
except ImportError as error:
    raise ImportError("reading a clip needs PyAV: pip install 'timm-softpool[video]'") from error

# A shorter way than this, in seconds, is decoded, a longer one is sought. A keyframe found further away raises it.
PATIENCE = 2.0
# By so many seconds containers overstate how long their frames last.
SLACK = 0.25

TimedFrame = tuple[float, av.VideoFrame]


class Picture(NamedTuple):
    """A frame: uint8 (3, H, W), RGB, upright; and the width of a pixel over its height, as it is to be shown."""

    pixels: Tensor
    aspect: float


class Video:
    """The best video stream of a file, as a context manager; times are in seconds after its first frame.

    Attributes:
        rate: Frames per second: the average that the container states; FFmpeg's guess where frames have no timestamps.
        end: When the last frame ends; None until that frame has been decoded.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it has no video that FFmpeg can decode.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.end: float | None = None
        self._file = open(path, 'rb')
        try:
            self._open()
        except BaseException:
            self._file.close()
            raise
        # Without timestamps there is no start time, and the average rate is a constant of FFmpeg.
        self._seekable = self._stream.start_time is not None
        self.rate = float((self._seekable and self._stream.average_rate) or self._stream.guessed_rate or 25)
        self._origin: float | None = None
        self._patience = PATIENCE

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()
        self._file.close()

    @property
    def duration(self) -> float:
        """What the container states, or else the sum over its packets, which reads the file but decodes nothing."""
        if self._stated is not None:
            return self._stated
        begin, end, untimed = inf, -inf, 0.0
        for packet in self._container.demux(self._stream):
            if packet.size:
                length = self._seconds(packet.duration) or 1 / self.rate
                if packet.pts is None:
                    untimed += length
                else:
                    begin, end = min(begin, self._seconds(packet.pts)), max(end, self._seconds(packet.pts) + length)
        self._open()
        return max(end - begin, untimed)

    def pictures(self, moments: Iterable[float]) -> Iterator[Picture]:
        """For each of the ascending ``moments``, the last frame that begins at most half a frame after it.

        At a constant rate that is the nearest one. After the end, it is the last frame of all. Several moments of one
        frame get the same object.

        Raises:
            ValueError: If a frame that is needed is missing or damaged, or there is none.
        """
        frames = self._frames(0.0)
        if (first := next(frames, None)) is None:
            raise ValueError(f'{self.path} holds no frame that FFmpeg can decode')
        (time, frame), ahead = first, next(frames, None)
        picture = None
        for moment in moments:
            begun = moment + 0.5 / self.rate
            if ahead and self._seekable and begun - time > self._patience:
                frames = self._seek(begun)
                (time, frame), ahead, picture = next(frames), next(frames, None), None
            while ahead and ahead[0] <= begun:
                (time, frame), ahead, picture = ahead, next(frames, None), None
            if ahead is None:
                self.end = time + self._length(frame)
                if self.end <= moment < (self._stated or 0) - SLACK:
                    raise ValueError(f'{self.path} is damaged: it should last {self._stated:.2f} s, but its frames end '
                                     f'after {self.end:.2f} s')
            if frame.is_corrupt:
                raise ValueError(f'{self.path} is damaged at {time:.2f} s: the frame there is not whole')
            picture = picture or self._picture(frame)
            yield picture

    def _open(self) -> None:
        if not self._file.seek(0, os.SEEK_END):
            raise ValueError(f'{self.path} is empty')
        self._file.seek(0)
        try:
            self._container = av.open(self._file, 'r')
        except (av.FFmpegError, UnicodeDecodeError) as error:  # the latter of damaged metadata
            raise ValueError(f'{self.path} is no video that FFmpeg can read: {_reason(error)}') from error
        stream = self._container.streams.best('video')
        if not isinstance(stream, av.VideoStream) or av.stream.Disposition.attached_pic in stream.disposition:
            raise ValueError(f'{self.path} has no video, only {", ".join(s.type for s in self._container.streams)}')
        if stream.codec_context is None:
            raise ValueError(f'{self.path} is coded in a way that FFmpeg cannot decode here')
        stream.thread_type = 'AUTO'
        self._stream, self._tick = stream, stream.time_base or Fraction(1, av.time_base)
        # The container's duration covers the sound as well, and counts from 0, not from the first frame.
        self._stated: float | None = None
        if stream.duration:
            self._stated = self._seconds(stream.duration)
        elif self._container.duration and len(self._container.streams) == 1:
            self._stated = self._container.duration / av.time_base - self._seconds(stream.start_time)

    def _frames(self, time: float) -> Iterator[TimedFrame]:
        """What follows in the order of showing; ``time`` is for frames without timestamps."""
        try:
            for frame in self._container.decode(self._stream):
                if frame.pts is not None:
                    stamp = self._seconds(frame.pts)
                    if self._origin is None:
                        self._origin = stamp
                    time = stamp - self._origin
                yield time, frame
                time += self._length(frame)
        except av.FFmpegError as error:
            raise ValueError(f'{self.path} is damaged after {max(time, 0):.2f} s: {_reason(error)}') from error

    def _seek(self, moment: float) -> Iterator[TimedFrame]:
        """The frames from one at or before ``moment`` on."""
        back = 0.0
        while back < moment:
            target = (self._origin or 0) + moment - back
            try:
                self._container.seek(int(target / self._tick), stream=self._stream)
            except av.FFmpegError:
                break
            frames = self._frames(inf)
            first = next(frames, None)
            if first and first[0] <= moment:
                self._patience = max(self._patience, moment - first[0])
                return chain([first], frames)
            back = 2 * back + 1  # the first frame that can be decoded is shown later: of an open group of pictures
        self._seekable = False
        self._open()
        return self._frames(0.0)

    def _seconds(self, ticks: int | None) -> float:
        return float((ticks or 0) * self._tick)

    def _length(self, frame: av.VideoFrame) -> float:
        return self._seconds(frame.duration) or 1 / self.rate

    def _picture(self, frame: av.VideoFrame) -> Picture:
        quarters = round(frame.rotation / 90)
        pixels = torch.from_numpy(frame.to_ndarray(format='rgb24'))
        if quarters:  # by nothing would be a copy
            pixels = pixels.rot90(quarters)
        aspect = float(self._stream.sample_aspect_ratio or 1)
        return Picture(pixels.permute(2, 0, 1), 1 / aspect if quarters % 2 else aspect)


def _reason(error: Exception) -> str:
    return getattr(error, 'strerror', None) or str(error)
