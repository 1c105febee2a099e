"""Pixels as what is optimised: how they are parameterised, and how the course of the optimisation keeps them smooth."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

Schedule = float | tuple[float, float]

PARAMETERS = ('pixel', 'fft')
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    'adam': torch.optim.Adam, 'sgd': partial(torch.optim.SGD, momentum=0.9, nesterov=True)}


@dataclass(frozen=True)
class Course:
    """What happens to the images beside the steps of the optimiser; a pair is of the first and the last step.

    Attributes:
        optimizer: 'adam', or 'sgd' with Nesterov's momentum of 0.9.
        lr: Of the optimiser.
        mask: Standard deviation, as a part of the side, of the Gaussian around the centre inside which gradients, blur
            and denoising act; infinite for everywhere.
        blur: Standard deviation in cells of the Gaussian that smooths the images each ``blur_every`` steps.
        denoise: Weight of the total variation that images with a range of 1 lose each ``denoise_every`` steps.
        brightness: Part of the images' range that they gain each ``brightness_every`` steps.
        jitter: Cells that the model sees the images rolled by, at most, at random.

    Raises:
        ValueError: If an attribute has no such value.
    """

    optimizer: str = 'adam'
    lr: Schedule = (0.05, 0.01)
    mask: Schedule = math.inf
    blur: Schedule = (0.6, 0.0)
    blur_every: int = 10
    denoise: Schedule = 0.0
    denoise_every: int = 10
    brightness: Schedule = 0.0
    brightness_every: int = 50
    jitter: int = 2

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f'optimizer must be one of {", ".join(OPTIMIZERS)}, got {self.optimizer!r}')
        for name in ('blur_every', 'denoise_every', 'brightness_every'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} must be at least 1, got {getattr(self, name)}')

    def optimizer_of(self, values: list[Tensor]) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](values, lr=scheduled(self.lr, 0, 1))

    def edit(self, pixels: Tensor, step: int, steps: int, low: Tensor, high: Tensor) -> Tensor:
        """The images after a step: smoothed, denoised, brightened where it is time, and within ``low`` .. ``high``."""
        mask = self.mask_at(pixels, step, steps)
        if (step + 1) % self.blur_every == 0 and (sigma := scheduled(self.blur, step, steps)):
            pixels = pixels + mask * (gaussian_blur(pixels, sigma) - pixels)
        if (step + 1) % self.denoise_every == 0 and (weight := scheduled(self.denoise, step, steps)):
            pixels = pixels + mask * (denoised(pixels / (high - low), weight) * (high - low) - pixels)
        if (step + 1) % self.brightness_every == 0:
            pixels = pixels + scheduled(self.brightness, step, steps) * (high - low)
        return pixels.clamp(low, high)

    def mask_at(self, pixels: Tensor, step: int, steps: int) -> Tensor:
        """(H, W) of 0..1."""
        sigma = scheduled(self.mask, step, steps)
        rows, columns = (torch.linspace(-0.5, 0.5, size).to(pixels) for size in pixels.shape[-2:])
        return torch.exp(-(rows[:, None].square() + columns.square()) / (2 * sigma ** 2))


class Canvas:
    """Images (B, C, *size), made of ``values`` that an optimiser can change.

    'pixel': the values are the pixels. 'fft': the pixels are the inverse transform, over all of ``size``, of values
    divided by their frequency, so that equal steps move coarse structure farther than fine one (C. Olah,
    A. Mordvintsev, L. Schubert, Feature Visualization, Distill 2017).
    """

    def __init__(self, pixels: Tensor, parameter: str = 'pixel') -> None:
        self.parameter, self.size = parameter, tuple(pixels.shape[2:])
        frequencies = [torch.fft.fftfreq(size) for size in self.size[:-1]] + [torch.fft.rfftfreq(self.size[-1])]
        squares = sum(grid.square() for grid in torch.meshgrid(*frequencies, indexing='ij'))
        scale = 1 / torch.as_tensor(squares).sqrt().clamp(min=1 / max(self.size)).to(pixels)
        self.scale = scale / scale.square().mean().sqrt()  # a step goes as far as one of the pixels themselves
        self.axes = tuple(range(2, pixels.ndim))
        self.values = self._values(pixels).requires_grad_()

    def pixels(self) -> Tensor:
        if self.parameter == 'pixel':
            return self.values * 1
        spectrum = torch.view_as_complex(self.values) * self.scale
        return torch.fft.irfftn(spectrum, self.size, self.axes, norm='ortho')

    def set(self, pixels: Tensor) -> None:
        """Change the values to those of ``pixels``."""
        self.values.data.copy_(self._values(pixels))

    def _values(self, pixels: Tensor) -> Tensor:
        if self.parameter == 'pixel':
            return pixels.clone()
        return torch.view_as_real(torch.fft.rfftn(pixels, dim=self.axes, norm='ortho') / self.scale).contiguous()


def scheduled(schedule: Schedule, step: int, steps: int) -> float:
    """The value at ``step`` of 0 .. ``steps`` - 1, on the line between the two of a pair."""
    first, last = schedule if isinstance(schedule, tuple) else (schedule, schedule)
    return first if first == last else first + (last - first) * step / max(steps - 1, 1)


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """(B, C, *size) smoothed along every axis of size; beyond the border lies its nearest cell."""
    radius = max(1, round(4 * sigma))
    kernel = torch.exp(-torch.arange(-radius, radius + 1).square() / (2 * sigma ** 2)).to(images)
    kernel = (kernel / kernel.sum()).reshape(1, 1, -1)
    for axis in range(2, images.ndim):
        lines = images.movedim(axis, -1)
        padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (radius, radius), mode='replicate')
        images = F.conv1d(padded, kernel).reshape(lines.shape).movedim(-1, axis)
    return images


def denoised(images: Tensor, weight: float, iterations: int = 20) -> Tensor:
    """The minimum u of |u - images|² / 2 + weight · total variation of u, for (B, C, *size).

    By the dual projection of A. Chambolle, An algorithm for total variation minimization and applications, 2004.
    """
    axes = range(2, images.ndim)
    duals = [torch.zeros_like(images) for _ in axes]
    rate = 1 / (2 * len(axes))  # twice what is proven to converge, as is usual
    for _ in range(iterations):
        slopes = list(_differences(images / weight - _adjoint(duals)))
        length = torch.stack(slopes).square().sum(0).sqrt()
        duals = [(dual + rate * slope) / (1 + rate * length) for dual, slope in zip(duals, slopes)]
    return images - weight * _adjoint(duals)


def _differences(images: Tensor) -> Iterator[Tensor]:
    """To the next cell of each axis, 0 at its end."""
    for axis in range(2, images.ndim):
        slope = torch.zeros_like(images)
        slope.narrow(axis, 0, images.shape[axis] - 1).copy_(images.diff(dim=axis))
        yield slope


def _adjoint(duals: list[Tensor]) -> Tensor:
    """What is to `_differences` as a matrix's transpose is to it."""
    total = torch.zeros_like(duals[0])
    for axis, dual in enumerate(duals, 2):
        inner = dual.narrow(axis, 0, dual.shape[axis] - 1)
        total.narrow(axis, 1, dual.shape[axis] - 1).add_(inner)
        total.narrow(axis, 0, dual.shape[axis] - 1).sub_(inner)
    return total
