"""Where the samples come from: folders and parquet shards of images, a table of clips, photographs in motion."""
from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

from timm_softpool.pretrained import read_checkpoint, write_safetensors

from .config import Config

VAL_EVERY = 5  # of the photographs in the order of their names, the last of so many is for validation


@dataclass
class Samples:
    """``load(index)`` gives a PIL image, or a clip (T, 3, H, W) in 0..1; it may draw from PyTorch's random numbers."""

    load: Callable[[int], Any]
    labels: Sequence[int]
    label_names: Sequence[str]

    def first_classes(self, count: int) -> Samples:
        kept = [index for index, label in enumerate(self.labels) if label < count]
        return replace(self, load=_Subset(self.load, kept), labels=[self.labels[index] for index in kept],
                       label_names=self.label_names[:count])


@dataclass
class _Subset:
    load: Callable[[int], Any]
    kept: list[int]

    def __call__(self, index: int) -> Any:
        return self.load(self.kept[index])


def read_folder(config: Config) -> tuple[Samples, Samples]:
    """Images of ``data/train/<class>/`` and ``data/val/<class>/``."""
    from timm.data import create_dataset

    parts = []
    for split in ('train', 'val'):
        if not (root := Path(config.data, split)).is_dir():
            raise FileNotFoundError(f'data must be a folder with train and val in it, there is no {root}')
        reader = create_dataset('', str(root)).reader
        names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
        labels = [label for _, label in reader.samples]
        parts.append(Samples(_Files([path for path, _ in reader.samples]), labels, names))
    if parts[0].label_names != parts[1].label_names:
        raise ValueError(f'data must have the same classes in train and val, only one of which has '
                         f'{", ".join(sorted(set(parts[0].label_names) ^ set(parts[1].label_names)))}')
    return parts[0], parts[1]


@dataclass
class _Files:
    paths: list[str]

    def __call__(self, index: int) -> Image.Image:
        return Image.open(self.paths[index]).convert('RGB')


def read_parquet(config: Config) -> tuple[Samples, Samples]:
    """Shards ``train*.parquet`` and ``val*.parquet`` with the columns ``image`` ({bytes, path}) and ``label``.

    ``classes.tsv`` beside them, with the columns label and wnid or name, names the classes.
    """
    import pyarrow.parquet as pq

    parts = []
    for split in ('train', 'val'):
        if not (shards := sorted(Path(config.data).glob(f'{split}*.parquet'))):
            raise FileNotFoundError(f'data must be a folder of parquet shards, there is no {split}*.parquet in '
                                    f'{config.data}')
        tables = [pq.read_table(shard, columns=['image', 'label']) for shard in shards]
        images = [image['bytes'] for table in tables for image in table['image'].to_pylist()]
        parts.append(([label for table in tables for label in table['label'].to_pylist()], images))
    count = max(max(labels) for labels, _ in parts) + 1
    names = [str(label) for label in range(count)]
    if (table := Path(config.data, 'classes.tsv')).is_file():
        with open(table, newline='') as file:
            for row in csv.DictReader(file, delimiter='\t'):
                if (label := int(row['label'])) < count:
                    names[label] = row.get('wnid') or row['name']
    train, val = (Samples(_Bytes(images), labels, names) for labels, images in parts)
    return train, val


@dataclass
class _Bytes:
    images: list[bytes]

    def __call__(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.images[index])).convert('RGB')


def read_clips(config: Config) -> tuple[Samples, Samples]:
    """Videos of a table, ``data``, in CSV: label; path, or id of a file ``<id>.*`` beside the table; fold or split.

    ``fold`` says which of the folds validates; without it, the rows whose split is val do.
    """
    with open(config.data, newline='') as file:
        rows = list(csv.DictReader(file))
    column, chosen = ('split', 'val') if config.fold is None else ('fold', str(config.fold))
    if not rows or not {'label', column} <= set(rows[0]) or not {'path', 'id'} & set(rows[0]):
        raise ValueError(f'data must be a table with the columns label, path or id, and {column}, got '
                         f'{", ".join(rows[0]) if rows else "nothing"} in {config.data}')
    folder = Path(config.data).parent
    files = {file.stem: file for file in folder.iterdir()}
    paths = [folder / row['path'] if row.get('path') else files.get(row['id'], folder / row['id']) for row in rows]
    names = sorted({row['label'] for row in rows})
    videos = _decode(paths, config)
    parts = []
    for is_val in (False, True):
        kept = [index for index, row in enumerate(rows) if (row[column] == chosen) == is_val]
        clips = _Clips([videos[index] for index in kept], config.num_frames, is_val)
        parts.append(Samples(clips, [names.index(rows[index]['label']) for index in kept], names))
    return parts[0], parts[1]


def _decode(paths: list[Path], config: Config) -> list[Tensor]:
    """Every frame_stride-th frame of each video from each of the first frame_stride ones on: uint8 (S, N, 3, H, W).

    Kept in the folder ``cache``, if there is one, under a hash of the files' names and of what was made of them.
    """
    from tqdm import tqdm

    from video_plugins import load_clips
    from video_plugins.decode import Video

    what = [str((path.name, path.stat().st_size)) for path in paths]
    what += [str((config.input_size, config.frame_stride, config.interpolation))]
    cache = config.cache and Path(config.cache, hashlib.sha256('\n'.join(what).encode()).hexdigest()[:16]
                                  + '.safetensors')
    if cache and cache.is_file():
        stored = read_checkpoint(cache)
        return [stored[str(index)] for index in range(len(paths))]
    videos = []
    for path in tqdm(paths, 'decoding', disable=None):
        with Video(path) as video:
            rate, frames = video.rate, max(1, round(video.duration * video.rate))
        phases = min(config.frame_stride, frames)
        pixels = load_clips(path, [phase / rate for phase in range(phases)], -(-frames // config.frame_stride),
                            config.frame_stride, config.input_size, interpolation=config.interpolation,
                            mean=(0, 0, 0), std=(1, 1, 1))
        videos.append((pixels * 255).round().byte().transpose(1, 2).contiguous())
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors({str(index): video for index, video in enumerate(videos)}, cache)
    return videos


@dataclass
class _Clips:
    """A clip from a random moment on, or the middle one; a video that is too short repeats its last frame."""

    videos: list[Tensor]
    num_frames: int
    is_middle: bool

    def __call__(self, index: int) -> Tensor:
        video = self.videos[index]
        room = max(1, video.shape[1] - self.num_frames + 1)
        if self.is_middle:
            phase, start = 0, (room - 1) // 2
        else:
            phase, start = (int(torch.randint(count, ())) for count in (len(video), room))
        frames = torch.arange(start, start + self.num_frames).clamp(max=video.shape[1] - 1)
        return video[phase, frames].float() / 255


def read_photographs(config: Config) -> tuple[Samples, Samples]:
    """Photographs of a folder, each under every camera motion: synthetic motion on real photographs."""
    from video_plugins import CAMERA_MOTIONS

    if config.input_size[0] != config.input_size[1]:
        raise ValueError(f"input_size must be square with format 'camera_motion', got {list(config.input_size)}")
    known = Image.registered_extensions()
    paths = [path for path in sorted(Path(config.data).iterdir()) if path.suffix.lower() in known]
    size, names = config.input_size[0], list(CAMERA_MOTIONS)
    parts = []
    for is_val in (False, True):
        photographs = [_photograph(path, 3 * size) for place, path in enumerate(paths)
                       if (place % VAL_EVERY == VAL_EVERY - 1) == is_val]
        parts.append(Samples(_Motions(photographs, names, config.num_frames, size),
                             list(range(len(names))) * len(photographs), names))
    return parts[0], parts[1]


def _photograph(path: Path, short: int) -> Tensor:
    image = Image.open(path).convert('RGB')
    return transforms.pil_to_tensor(transforms.resize(image, short, antialias=True) if min(image.size) > short
                                    else image)


@dataclass
class _Motions:
    photographs: list[Tensor]
    names: list[str]
    num_frames: int
    size: int

    def __call__(self, index: int) -> Tensor:
        from video_plugins import camera_motion

        photograph, motion = divmod(index, len(self.names))
        return camera_motion(self.photographs[photograph].float() / 255, self.names[motion], self.num_frames,
                             self.size).transpose(0, 1)


SOURCES: dict[str, Callable[[Config], tuple[Samples, Samples]]] = {
    'folder': read_folder, 'parquet': read_parquet, 'clips': read_clips, 'camera_motion': read_photographs}
