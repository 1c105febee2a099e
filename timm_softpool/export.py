"""Networks as files for others: a folder for timm and the Hugging Face hub, an ONNX file, a `torch.export` one."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from .pretrained import PUBLISHED

PROGRAMS = ('.onnx', '.pt2')
HUB = 'hf-hub:'
# How far a program's logits may be from the network's, as a part of the largest of them.
TOLERANCE = 1e-3


def export_model(model: nn.Module, to: str | os.PathLike[str], name: str | None = None) -> str:
    """Write a network of timm's registry, whole or not at all.

    Args:
        model: In evaluation mode; its ``pretrained_cfg`` says what its input is.
        to: A new folder, for config.json, model.safetensors and a model card, README.md, which
            ``timm.create_model('local-dir:FOLDER', pretrained=True)`` loads; ``hf-hub:USER/NAME``, for the same on the
            Hugging Face hub; or a new file, FILE.onnx or FILE.pt2 (`torch.export`), which takes batches of any number,
            needs none of our packages, and has been compared with the network.
        name: Of published weights, ``model.tag``, if they are the network's: the card has what is known of them.

    Returns:
        What was written, in a sentence.

    Raises:
        FileExistsError: If there is such a file or folder, or weights in such a repository.
        ImportError: If a package is missing; the extra ``export`` has it.
        ValueError: If the network is in training mode, or a program does not give its logits.
    """
    if model.training:
        raise ValueError('model must be in evaluation mode; call model.eval()')
    if str(to).startswith(HUB):
        return _push(model, str(to).removeprefix(HUB), name)
    path = Path(to)
    if path.exists():
        raise FileExistsError(f'{path} exists already and is not overwritten')
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as scratch:
        written = Path(scratch, path.name)
        if path.suffix in PROGRAMS:
            difference = _write_program(model, written)
            note = f'its logits are within {difference:.0e} of the network\'s'
        else:
            _write_folder(model, written, f'local-dir:{path}', name)
            note = f"timm.create_model('local-dir:{path}', pretrained=True) loads it"
        os.rename(written, path)
    return f'{path}: {note}'


def _write_folder(model: Any, folder: Path, source: str, name: str | None) -> None:
    save_for_hf(model, str(folder), safe_serialization=True)
    (folder / 'README.md').write_text(_card(model, source, name), encoding='utf-8')


def _push(model: Any, repository: str, name: str | None) -> str:
    from huggingface_hub import HfApi  # a dependency of timm

    api = HfApi(library_name='timm-softpool')
    if api.file_exists(repository, 'model.safetensors'):
        raise FileExistsError(f'{HUB}{repository} has weights already, which are not overwritten')
    with tempfile.TemporaryDirectory() as scratch:
        _write_folder(model, folder := Path(scratch, 'model'), f'{HUB}{repository}', name)
        api.create_repo(repository, exist_ok=True)
        # A card that somebody has written there stays.
        kept = ['README.md'] if api.file_exists(repository, 'README.md') else None
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=kept,
                          commit_message='Upload the model')
    return f"{HUB}{repository}: timm.create_model('{HUB}{repository}', pretrained=True) loads it"


def _write_program(model: nn.Module, path: Path) -> float:
    """Write an ONNX or `torch.export` file; the largest difference of its logits, for a batch of another size."""
    example = _input(model, 2)
    batch = ({0: torch.export.Dim('batch')},)
    with torch.no_grad():
        if path.suffix == '.pt2':
            torch.export.save(torch.export.export(model, (example,), dynamic_shapes=batch), path)
        else:
            try:
                import onnxruntime
                import onnxscript  # noqa: F401  (torch.onnx needs it)
            except ImportError as error:
                raise ImportError(f'ONNX files need the extra: pip install timm-softpool[export] ({error})') from error
            torch.onnx.export(model, (example,), path, dynamo=True, dynamic_shapes=batch, input_names=['input'],
                              output_names=['logits'], external_data=False, verbose=False)
        probe = _input(model, 3)
        expected = model(probe)
        actual = (torch.export.load(path).module()(probe) if path.suffix == '.pt2' else
                  torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {'input': probe.numpy()})[0]))
    difference = float((actual - expected).abs().max())
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise ValueError(f'the {path.suffix} program is not the network: its logits differ by up to {difference:.2g}, '
                         f'of up to {float(expected.abs().max()):.2g}')
    return difference


def _input(model: Any, batch: int) -> Tensor:
    cfg = model.pretrained_cfg
    channels, *size = cfg['input_size']
    shape = (batch, channels, *([cfg['num_frames']] if cfg.get('num_frames') else []), *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _card(model: Any, source: str, name: str | None) -> str:
    cfg = model.pretrained_cfg
    entry = PUBLISHED.get(name or '', {})
    is_video = bool(cfg.get('num_frames'))
    metrics = ', '.join(f'{value} % {metric}' for metric, value in entry.get('metrics', {}).items())
    rows = {'parameters': f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M',
            'input': 'x'.join(map(str, _input(model, 1).shape[1:])), 'classes': model.num_classes,
            'data': cfg.get('description') if name else None, 'accuracy': metrics,
            'licence of the weights': entry.get('license')}
    recipe = f'\n## Recipe\n\n```\n{entry["recipe"].strip()}\n```\n' if 'recipe' in entry else ''
    table = '\n'.join(f'- **{key}:** {" ".join(str(value).split())}' for key, value in rows.items() if value)
    return f"""---
library_name: timm
pipeline_tag: {'video' if is_video else 'image'}-classification
license: other
license_name: {entry.get('license', 'not stated')!r}
---
# {name or cfg['architecture']}

{table}

```python
import timm
import {'video_plugins' if is_video else 'timm_softpool'}  # registers the architecture

model = timm.create_model({source!r}, pretrained=True).eval()
```
{recipe}"""
