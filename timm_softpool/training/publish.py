"""What a run leaves to be published: float16 weights named by their hash, their manifest entry, card and figures."""
from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from timm_softpool.flops import count_macs
from timm_softpool.pretrained import file_hash, write_safetensors

from .module import TrainingModule, evaluate


def publish(module: TrainingModule, output: Path, recipe: str, device: torch.device) -> Path:
    """Write the best weights of a run and what belongs to them into ``output``.

    ``<model>-<tag>-<hash>.safetensors`` in float16; ``manifest.toml``, the sections for weights/manifest.toml;
    ``README.md``, the model card; ``result.json``. The accuracy in them is that of the rounded weights in float32.
    ``device`` is that of the training: Lightning moves the network to the CPU at its end.
    """
    config, best = module.config, module.best
    name, tag = config.model.split('.')[0], config.tag
    module.network.load_state_dict(best['weights'])
    network = module.network.float().to(device)
    metrics = evaluate(network, module.val_set, config, device)
    shape = (3, config.num_frames, *config.input_size) if config.is_video else (3, *config.input_size)
    write_safetensors(best['weights'], unnamed := output / f'{name}-{tag}.safetensors')
    digest = file_hash(unnamed)
    os.replace(unnamed, path := unnamed.with_stem(f'{unnamed.stem}-{digest[:8]}'))
    result: dict[str, Any] = {
        'model': name, 'tag': tag, 'data': Path(config.data).name, 'fold': config.fold, 'seed': config.seed,
        **metrics, 'best_epoch': best['epoch'], 'train_samples': len(module.train_set),
        'val_samples': len(module.val_set), 'input': list(shape),
        'parameters': sum(parameter.numel() for parameter in network.parameters()),
        'macs': count_macs(network.cpu(), shape), 'seconds': round(module.seconds),
        'machine': f'{_processor()}, {torch.get_num_threads()} threads' if device.type == 'cpu'
        else torch.cuda.get_device_name(device), 'torch': torch.__version__, 'file': path.name,
        'sha256': digest, 'recipe': recipe, 'config': json.loads(json.dumps(vars(config)))}
    (output / 'result.json').write_text(json.dumps(result) + '\n')
    (output / 'manifest.toml').write_text(_manifest(module, result), encoding='utf-8')
    (output / 'README.md').write_text(_card(module, result), encoding='utf-8')
    print(f'{path}: {metrics["top1"]} % top-1, {metrics["top5"]} % top-5; {output / "manifest.toml"} has its entry')
    return path


def _manifest(module: TrainingModule, result: dict[str, Any]) -> str:
    config = module.config
    cfg: dict[str, Any] = {'num_classes': module.num_classes, 'input_size': [3, *config.input_size], 'crop_pct': 1.0,
                           'interpolation': config.interpolation, 'mean': list(module.geometry['mean']),
                           'std': list(module.geometry['std'])}
    if config.is_video:
        cfg |= {'num_frames': config.num_frames, 'frame_stride': config.frame_stride}
    cfg['label_names'] = list(module.train_set.samples.label_names)
    entry = {'file': result['file'], 'sha256': result['sha256'], 'data': config.tag, 'recipe': result['recipe']}
    lines = [f'[data.{config.tag}]', f'description = {_toml(config.description)}', '', f'[data.{config.tag}.cfg]',
             *(f'{key} = {_toml(value)}' for key, value in cfg.items()), '',
             f'[models.{result["model"]}.{config.tag}]',
             *(f'{key} = {_toml(value)}' for key, value in entry.items()),
             f'metrics = {{ top1 = {result["top1"]}, top5 = {result["top5"]} }}',
             f'license = {_toml(config.license)}']
    return '\n'.join(lines) + '\n'


def _toml(value: Any) -> str:
    """A string, a list or a number: in JSON they are TOML, but for characters written as pairs of escapes."""
    return json.dumps(value, ensure_ascii=False)


def _card(module: TrainingModule, result: dict[str, Any]) -> str:
    config, names = module.config, module.train_set.samples.label_names
    chosen = '; the epoch was chosen by this accuracy' if config.validate_epochs < config.epochs else ''
    return f"""# {result['model']}.{config.tag}

{config.description or 'No description was given.'}

| | |
|---|---|
| data | {result['train_samples']} samples of `{result['data']}` to train on, {result['val_samples']} to validate \
with, {len(names)} classes{f', fold {config.fold}' if config.fold is not None else ''} |
| accuracy | {result['top1']} % top-1, {result['top5']} % top-5 on the validation samples, in float32, after rounding \
the weights to float16{chosen} |
| size | {result['parameters'] / 1e6:.2f} M parameters, {result['macs'] / 1e9:.3f} GMAC at \
{'x'.join(map(str, result['input']))} |
| training | {config.epochs} epochs, {result['seconds']} s, {result['machine']}, torch {result['torch']} |
| file | `{result['file']}`, SHA-256 `{result['sha256']}` |
| licence | {config.license} |
| limits | it names one of its {len(names)} classes whatever it is shown; its accuracy is known for this data only |

## Recipe

`{result['recipe']}`

```yaml
{config.as_yaml()}```
"""


def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(':')[2].strip() for line in lines if line.startswith('model name')),
                platform.machine())
