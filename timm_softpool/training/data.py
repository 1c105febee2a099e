"""What a network is trained on: images and clips, the same ones in the same order whoever asks and whenever.

A sample depends on (seed, epoch, index) alone: neither on the process that makes it, nor on what it made before.
"""
from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from .config import Config
from .samples import SOURCES, Samples

Key = tuple[int, int]  # epoch and index


def create_datasets(config: Config, geometry: dict[str, Any]) -> tuple[SeededDataset, SeededDataset]:
    """Of training and of validation; ``geometry`` has the mean, std and crop_pct of the network's configuration.

    Raises:
        OSError: If the data cannot be read.
        ValueError: If there are none, or fewer than a batch to train on.
    """
    train, val = SOURCES[config.format](config)
    if config.classes is not None:
        train, val = train.first_classes(config.classes), val.first_classes(config.classes)
    for name, samples, least in (('train', train, config.batch_size), ('validate', val, 1)):
        if len(samples.labels) < least:
            raise ValueError(f'data must have at least {least} samples to {name} with, a batch, got '
                             f'{len(samples.labels)} in {config.data}')
    make = _clip_transform if config.is_video else _image_transform
    sizes = [(size, size) for size in config.train_sizes] or [config.input_size]
    return (SeededDataset(train, [make(config, geometry, size, True) for size in sizes], config.epochs, config.seed),
            SeededDataset(val, [make(config, geometry, config.input_size, False)], epochs=1, seed=0))


class SeededDataset(Dataset):
    """Samples by (epoch, index), augmented at random, but by seeds of that key; each transform has its share of epochs.

    Returns:
        The image (3, H, W) or clip (3, T, H, W), float32 and normalised, and its label.
    """

    def __init__(self, samples: Samples, transforms: list[Callable], epochs: int, seed: int) -> None:
        self.samples, self.transforms, self.epochs, self.seed = samples, transforms, epochs, seed

    def __len__(self) -> int:
        return len(self.samples.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        seed_all(self.seed, epoch, index)
        transform = self.transforms[epoch * len(self.transforms) // self.epochs]
        return transform(self.samples.load(index)), self.samples.labels[index]


def seed_all(*key: int) -> None:
    """Seed the random numbers of Python, NumPy and PyTorch with a hash of ``key``."""
    first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third)


class EpochBatches:
    """The batches of keys that one of ``world`` processes takes of an epoch's random order, from the step reached on.

    Args:
        count: Samples.
        batch_size: Of all processes together.
        step: Called when an iteration begins: the steps done since the training began.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world: int, step: Callable[[], int]) -> None:
        self.count, self.batch_size, self.seed, self.rank, self.world, self.step = (
            count, batch_size, seed, rank, world, step)

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, done = divmod(self.step(), len(self))
        order = np.random.default_rng([self.seed, epoch]).permutation(self.count)
        for start in range(done * self.batch_size, len(self) * self.batch_size, self.batch_size):
            yield [(epoch, int(index)) for index in order[start:start + self.batch_size][self.rank::self.world]]


def train_loader(dataset: SeededDataset, config: Config, rank: int, world: int, step: Callable[[], int]) -> DataLoader:
    batches = EpochBatches(len(dataset), config.batch_size, config.seed, rank, world, step)
    return DataLoader(dataset, batch_sampler=batches, num_workers=config.workers)


def val_loader(dataset: SeededDataset, config: Config, rank: int = 0, world: int = 1) -> DataLoader:
    keys = [(0, index) for index in range(rank, len(dataset), world)]
    size = max(1, config.batch_size // world)
    return DataLoader(dataset, batch_sampler=[keys[start:start + size] for start in range(0, len(keys), size)],
                      num_workers=config.workers)


def _image_transform(config: Config, geometry: dict[str, Any], size: tuple[int, int], is_training: bool) -> Callable:
    try:
        return create_transform(
            (3, *size), is_training, scale=config.scale, ratio=config.ratio, hflip=config.hflip,
            color_jitter=config.color_jitter, auto_augment=config.auto_augment, re_prob=config.erase,
            interpolation=config.interpolation, **geometry)
    except AssertionError as error:
        raise ValueError(f'auto_augment must be a policy that timm knows, such as rand-m9, augmix-m3 or original, got '
                         f'{config.auto_augment!r}') from error


def _clip_transform(config: Config, geometry: dict[str, Any], size: tuple[int, int], is_training: bool) -> nn.Module:
    """Of clips (T, 3, H, W) in 0..1, which have their size but for what random crops take; to (3, T, H, W)."""
    steps: list[nn.Module] = []
    if is_training:
        if config.format == 'clips':
            steps += [v2.RandomResizedCrop(size, config.scale, config.ratio, InterpolationMode(config.interpolation)),
                      v2.RandomHorizontalFlip(config.hflip)]
        if config.color_jitter:
            steps.append(v2.ColorJitter(*(config.color_jitter,) * 3))
    steps.append(v2.Normalize(geometry['mean'], geometry['std']))
    if is_training and config.erase:
        steps.append(v2.RandomErasing(config.erase))
    return v2.Compose([*steps, v2.Lambda(_channels_first)])


def _channels_first(clip: Tensor) -> Tensor:  # not a lambda: it has to reach worker processes
    return clip.transpose(0, 1)
