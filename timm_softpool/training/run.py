"""A run from its configuration to its published weights, which goes on where it was stopped."""
from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import yaml

try:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.plugins.io import TorchCheckpointIO
except ImportError as error:
    raise ImportError("training needs Lightning: pip install 'timm-softpool[train]'") from error

from timm_softpool.pretrained import write_whole

from .config import FREE, Config, load_config
from .module import LAST, TrainingModule
from .publish import publish


def train(config: Config, recipe: str) -> Path | None:
    """Train, or go on with, the run in the folder ``config.output``, and publish its best weights there.

    A run that was killed, at whatever step, goes on from ``last.ckpt``, and ends with the weights that it would have
    had. Under torchrun, each process takes its share of every batch. The folder also gets ``config.yaml``, logs in CSV
    and for TensorBoard, and what :func:`publish` writes.

    Args:
        recipe: The command that repeats the run, for those who read about its weights.

    Returns:
        The weights' file; None in all processes but the first.

    Raises:
        OSError: If the data cannot be read or the folder cannot be written.
        ValueError: If a setting does not fit the data, the processes, or the run that is there already.
    """
    output = Path(config.output)
    last = output / LAST
    if config.is_video:
        import video_plugins  # noqa: F401  (registers the networks for clips)
    world, local = (int(os.environ.get(name, 1)) for name in ('WORLD_SIZE', 'LOCAL_WORLD_SIZE'))
    parts, of = (2 * world, 'twice ') if config.mixup or config.cutmix else (world, '')  # they mix pairs
    if config.batch_size % parts:
        raise ValueError(f'batch_size must be a multiple of {of}the processes, {parts}, got {config.batch_size}')
    is_first = os.environ.get('RANK', '0') == '0'  # which alone writes there
    is_run = last.exists() or _is_ours(output / 'config.yaml')
    if is_first and not is_run and output.exists() and any(output.iterdir()):
        raise ValueError(f'output must be a new folder or that of a run, got {output}, which holds something else')
    module = TrainingModule(config)
    output.mkdir(parents=True, exist_ok=True)
    if last.exists():
        _check_same(config, output / 'config.yaml')
    elif is_first:
        write_whole(output / 'config.yaml', config.as_yaml().encode())
    for name in ('lightning.pytorch', 'lightning.fabric'):
        logging.getLogger(name).setLevel(logging.WARNING)
    precision = config.precision
    if config.is_video and precision != '32-true' and (config.accelerator == 'cpu' or not torch.cuda.is_available()):
        # Seen with torch 2.14 and AVX512_BF16, for two frames and kernels of three: uninitialised memory.
        warnings.warn('on CPUs, clips are trained with precision 32-true, as the gradients that PyTorch gives there to '
                      'the weights of bfloat16 3-D convolutions are not to be trusted', stacklevel=2)
        precision = '32-true'
    is_terminal = sys.stdout.isatty()
    trainer = pl.Trainer(
        accelerator=config.accelerator, devices=local, num_nodes=world // local,
        strategy='ddp' if world > 1 else 'auto', precision=precision, max_epochs=config.epochs,
        gradient_clip_val=config.clip_grad, check_val_every_n_epoch=config.validate_epochs, num_sanity_val_steps=0,
        log_every_n_steps=min(10, module.steps_per_epoch), use_distributed_sampler=False, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=is_terminal, plugins=[AtomicCheckpointIO()],
        deterministic='warn' if torch.cuda.is_available() else None, callbacks=[TQDMProgressBar()] * is_terminal,
        logger=[CSVLogger(output, 'csv'), TensorBoardLogger(output, 'tensorboard')])
    with warnings.catch_warnings():
        # What does not hold here, or is meant so: the loader knows its position, the averaged network never trains.
        warnings.filterwarnings('ignore', '.*(not resumable|not have many workers|in eval mode|treespec).*')
        trainer.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
    return publish(module, output, recipe, trainer.strategy.root_device) if trainer.is_global_zero else None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Whole files or none: Lightning's own is moved from another folder, which may copy it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        temporary = Path(path).with_suffix('.tmp')
        super().save_checkpoint(checkpoint, temporary, storage_options)
        os.replace(temporary, path)


def _is_ours(path: Path) -> bool:
    """Whether a run has written it, and not a user."""
    try:
        return path.read_text() == load_config(path).as_yaml()
    except (OSError, TypeError, ValueError):
        return False


def _check_same(config: Config, path: Path) -> None:
    before = yaml.safe_load(load_config(path).as_yaml())
    changed = {key: (before[key], value) for key, value in yaml.safe_load(config.as_yaml()).items()
               if key not in FREE and value != before[key]}
    if changed:
        raise ValueError(f'output {path.parent} holds a run with other settings, choose another folder: ' + ', '.join(
            f'{key} was {old!r}, not {new!r}' for key, (old, new) in changed.items()))
