"""A training step, a validation, and what of them goes into a checkpoint: timm's pieces in Lightning's loop."""
from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_softpool.pretrained import convert_checkpoint, read_checkpoint

from .config import Config
from .data import SeededDataset, create_datasets, seed_all, train_loader, val_loader
from .global_batch_norm import GlobalBatchNorm

LAST = 'last.ckpt'
TOP = 5


class TrainingModule(pl.LightningModule):
    """The network of a configuration with its data.

    Attributes:
        network: The network that is trained.
        best: The best validation so far: its ``top1``, ``epoch`` and ``weights``, floating-point ones in float16.
        seconds: What training has taken, without validation, over all interruptions.

    Raises:
        ValueError: If the network's name is unknown, its weights do not fit, or a setting does not fit the data.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.best: dict[str, Any] = {}
        self.seconds = 0.0
        if not timm.is_model(config.model.split('.')[0]):
            raise ValueError(f'model must be a name of timm.list_models(), got {config.model!r}')
        with _as_value_error('model', config.model):
            cfg: Any = timm.get_pretrained_cfg(config.model)
        self.geometry: dict[str, Any] = {'mean': config.mean or cfg.mean, 'std': config.std or cfg.std, 'crop_pct': 1.0}
        self.train_set, self.val_set = create_datasets(config, self.geometry)
        seed_all(config.seed)
        with _as_value_error('model_args', config.model_args):
            self.network = timm.create_model(config.model, num_classes=self.num_classes, **config.model_args)
        if config.init:
            weights = convert_checkpoint(read_checkpoint(config.init), config.model.split('.')[0])
            with _as_value_error('init', config.init):
                self.network.load_state_dict(weights)
        if config.channels_last:
            for parameter in self.network.parameters():
                if parameter.ndim in (4, 5):
                    parameter.data = parameter.data.contiguous(memory_format=_channels_last(parameter.ndim))
        self.ema = ModelEmaV3(self.network, config.ema).requires_grad_(False) if config.ema else None
        self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing,
                           num_classes=self.num_classes) if config.mixup or config.cutmix else None
        self.criterion = SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(config.smoothing)

    @property
    def num_classes(self) -> int:
        return len(self.train_set.samples.label_names)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_set) // self.config.batch_size

    def train_dataloader(self) -> DataLoader:
        return train_loader(self.train_set, self.config, self.trainer.global_rank, self.trainer.world_size,
                            lambda: self.trainer.global_step)

    def val_dataloader(self) -> DataLoader:
        return val_loader(self.val_set, self.config, self.trainer.global_rank, self.trainer.world_size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.config
        optimizer = create_optimizer_v2(self.network, config.opt, config.lr, config.weight_decay, config.momentum)
        self.scheduler, _ = create_scheduler_v2(
            optimizer, config.sched, config.epochs, warmup_epochs=config.warmup_epochs, warmup_lr=config.lr / 10,
            min_lr=config.lr / 1000, step_on_epochs=False, updates_per_epoch=self.steps_per_epoch)
        return optimizer

    def on_train_start(self) -> None:
        self._began = time.monotonic()

    def on_train_epoch_start(self) -> None:
        self._began = time.monotonic()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        seed_all(self.config.seed, self.global_step, self.global_rank)  # dropout and mixup, whatever came before
        self.scheduler.step_update(self.global_step)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, target = batch
        if self.mixup:
            x, target = self.mixup(x, target)
        with GlobalBatchNorm() if self.trainer.world_size > 1 else contextlib.nullcontext():
            logits = self.network(self._layout(x))
        loss = self.criterion(logits.float(), target)
        self._loss = loss.detach()
        self.log('loss', loss, prog_bar=True, sync_dist=True)
        self.log('lr', self.trainer.optimizers[0].param_groups[0]['lr'])
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.ema:
            self.ema.update(self.network, self.global_step)
        began, self._began = self._began, time.monotonic()
        self.seconds += self._began - began
        if self.global_step % self.config.checkpoint_steps == 0 and not self.trainer.is_last_batch:
            self._save()

    def on_train_epoch_end(self) -> None:  # after validation
        self._save()

    def _save(self) -> None:
        loss = self.trainer.strategy.reduce(self._loss).item()
        if not math.isfinite(loss):
            raise ValueError(f'the loss is {loss} after {self.global_step} steps: lower lr, '
                             f'{self.config.lr}, set clip_grad, or set precision to 32-true, in another output folder')
        self.trainer.save_checkpoint(Path(self.config.output, LAST))

    def on_validation_epoch_start(self) -> None:
        self._counts = torch.zeros(3, dtype=torch.float64)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        network = self.ema.module if self.ema else self.network
        self._counts += count_correct(network(self._layout(batch[0])), batch[1])

    def on_validation_epoch_end(self) -> None:
        counts = self.trainer.strategy.reduce(self._counts.float().to(self.device), reduce_op='sum')
        metrics = accuracies(counts)
        self.log_dict(metrics, sync_dist=True)
        if self.trainer.is_global_zero:
            print(json.dumps({'epoch': self.current_epoch, 'step': self.global_step, **metrics,
                              'seconds': round(self.seconds)}), flush=True)
        if metrics['top1'] > self.best.get('top1', -1):
            network = self.ema.module if self.ema else self.network
            self.best = {**metrics, 'epoch': self.current_epoch, 'weights': {
                name: value.to('cpu', torch.float16, copy=True) if value.is_floating_point() else value.cpu().clone()
                for name, value in network.state_dict().items()}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint['best'], checkpoint['seconds'] = self.best, self.seconds

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.best, self.seconds = checkpoint['best'], checkpoint['seconds']

    def _layout(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=_channels_last(x.ndim)) if self.config.channels_last else x


@contextlib.contextmanager
def _as_value_error(setting: str, value: Any) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'{setting} does not fit, got {value!r}: {" ".join(str(error).split())}') from error


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """How many samples have their label first, and among the first five; and how many there are."""
    top = logits.topk(min(TOP, logits.shape[1])).indices == labels[:, None]
    return torch.tensor([top[:, 0].sum(), top.sum(), len(labels)], dtype=torch.float64)


def accuracies(counts: Tensor) -> dict[str, float]:
    """Top-1 and top-5 in percent."""
    first, among, count = counts.tolist()
    return {'top1': round(100 * first / count, 2), 'top5': round(100 * among / count, 2)}


@torch.inference_mode()
def evaluate(network: nn.Module, dataset: SeededDataset, config: Config, device: torch.device) -> dict[str, float]:
    """Top-1 and top-5 in percent, in float32, by this process alone."""
    network.eval()
    counts = torch.zeros(3, dtype=torch.float64)
    for x, labels in val_loader(dataset, config):
        counts += count_correct(network(x.to(device)).cpu(), labels)
    return accuracies(counts)


def _channels_last(ndim: int) -> torch.memory_format:
    return torch.channels_last if ndim == 4 else torch.channels_last_3d
