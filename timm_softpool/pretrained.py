"""Where published weights come from, and the proof that they are the published ones.

``weights/manifest.toml`` describes every published file. A file is searched in ``$TIMM_SOFTPOOL_WEIGHTS`` (a folder),
in the ``weights/`` of the installed package or of the checkout, in PyTorch's hub cache, and at its URL at last; what is
found is used only if its SHA-256 is the published one.
"""
from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

StateDict = dict[str, Tensor]

_FOLDER = next((folder for folder in (Path(__file__).parent / 'weights', Path(__file__).parents[1] / 'weights')
                if (folder / 'manifest.toml').is_file()), None)


def _read_manifest() -> dict[str, Any]:
    if _FOLDER is None:
        raise ImportError('timm-softpool is not whole: its weights/manifest.toml is missing; install it again')
    with open(_FOLDER / 'manifest.toml', 'rb') as file:
        return tomllib.load(file)


_MANIFEST = _read_manifest()
PUBLISHED: dict[str, dict[str, Any]] = {f'{name}.{tag}': entry for name, tags in _MANIFEST['models'].items()
                                        for tag, entry in tags.items()}

# The names of tensors in the authors' layout -> ours, by architecture; packages with other architectures add theirs.
LAYOUTS: dict[str, Callable[[str], str]] = {}

# In the names of tensors that may be missing: a network with Class Regularization begins with its plain one's weights.
OPTIONAL = 'class_regularization.'


def pretrained_cfgs(name: str, base: PretrainedCfg) -> dict[str, PretrainedCfg]:
    """timm's configurations of the weights published for model ``name``, by ``name.tag``; the first is the default.

    What an entry of the manifest does not say is taken from ``base``, the configuration of the plain architecture.
    """
    source: dict[str, Any] = dict(
        url=None, file=None, hf_hub_id=None, hf_hub_filename=None, source=None, custom_load=False, license=None,
        origin_url=None, label_offset=None, architecture=name)
    cfgs: dict[str, PretrainedCfg] = {}
    for tag, entry in _MANIFEST['models'].get(name, {}).items():
        data = _MANIFEST['data'][entry['data']]
        fields = {key: tuple(value) if isinstance(value, list) else value
                  for key, value in {**data['cfg'], **entry.get('cfg', {})}.items()}
        cfgs[f'{name}.{tag}'] = replace(base, **{
            **source, 'tag': tag, 'description': data['description'], 'test_input_size': None, 'test_crop_pct': None,
            **{key: entry.get(key) for key in ('url', 'file', 'license')}, **fields})
    return cfgs or {f'{name}.untrained': replace(base, **source, tag='untrained', description=None)}


def locate(cfg: PretrainedCfg, progress: bool = True) -> PretrainedCfg:
    """``cfg`` with the weights it names at hand: a verified file, or the tensors of a file given by the user.

    ``progress``: show the progress of a download on a terminal.

    Raises:
        FileNotFoundError: If a file is in none of the places where it is searched.
        ValueError: If it is damaged, or not what its name says.
    """
    entry = PUBLISHED.get(f'{cfg.architecture}.{cfg.tag}', {})
    if cfg.source or cfg.state_dict or not cfg.file:
        return cfg
    if cfg.file != entry.get('file'):
        return replace(cfg, state_dict=_unwrap(read_checkpoint(cfg.file), cfg.architecture))
    if cfg.url != entry.get('url') or cfg.hf_hub_id:
        return replace(cfg, file=None)  # the user has named another source
    return replace(cfg, file=str(fetch(f'{cfg.architecture}.{cfg.tag}', progress)), url=None)


def fetch(name: str, progress: bool = True) -> Path:
    """The verified local file of the published weights ``name`` (``model.tag``), downloaded if need be.

    Raises:
        KeyError: If nothing is published under this name.
        FileNotFoundError: If the file is nowhere to be found, with all places that were searched.
        ValueError: If its SHA-256 is not the published one; for the paper's authors' files, whose hashes were never
            published, the one recorded at the first download.
    """
    entry = PUBLISHED[name]
    cache = Path(torch.hub.get_dir(), 'checkpoints')
    folders = [Path(folder) for folder in (os.environ.get('TIMM_SOFTPOOL_WEIGHTS'), _FOLDER, cache) if folder]
    for path in (folder / entry['file'] for folder in folders):
        if path.is_file():
            _verify(path, entry.get('sha256') or _recorded_hash(path))
            return path
    where = ', '.join(map(str, folders))
    if 'url' not in entry:
        raise FileNotFoundError(f"the weights {name}, file {entry['file']}, are in none of {where}; a checkout of "
                                f'timm-softpool has the file in weights/: set TIMM_SOFTPOOL_WEIGHTS to that folder')
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / entry['file']
    download = path.with_name(f'{path.name}.{os.getpid()}.download')
    try:
        torch.hub.download_url_to_file(entry['url'], str(download), progress=progress and sys.stderr.isatty())
    except OSError as error:  # URLError is one
        raise FileNotFoundError(f"the weights {name}, file {entry['file']}, are in none of {where}, and could not be "
                                f"downloaded from {entry['url']}: {error}") from error
    try:
        if 'sha256' in entry:
            _verify(download, entry['sha256'])
            os.replace(download, path)
        else:
            content = _to_safetensors(convert_checkpoint(read_checkpoint(download), name.split('.')[0]))
            # The record first: whoever sees the file has to find it.
            write_whole(path.with_name(path.name + '.sha256'), f'{hashlib.sha256(content).hexdigest()}\n'.encode())
            write_whole(path, content)
    finally:
        download.unlink(missing_ok=True)
    return path


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file: safetensors, or a PyTorch file of tensors, numbers and strings.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, is no checkpoint, or contains pickled code, which is never run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no checkpoint {path}')
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # what torch.load raises for a file that is none of its own depends on the first bytes
        reason = str(error).split('. ')[0].split('\n')[0]  # what follows in PyTorch is advice to run pickled code
        raise ValueError(f'{path} is not a whole checkpoint of tensors: {type(error).__name__} {reason}') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds {type(checkpoint).__name__}, not a dictionary of tensors')
    return checkpoint


def convert_checkpoint(state_dict: Mapping[str, Any], architecture: str) -> StateDict:
    """A checkpoint of the paper's authors, or of their code, in the layout of timm's ``architecture``.

    Takes the tensors out of a training checkpoint, drops the prefixes of `DataParallel` and `torch.compile`, and gives
    the layers of DenseNet (``norm.1`` -> ``norm1``) and of the video networks, once `video_plugins` is imported, their
    names here. A checkpoint in the architecture's own layout comes back as it is. Every name and shape is compared with
    the architecture's, for the classifier's and the first convolution's own sizes.

    Raises:
        ValueError: If tensors are missing, left over or of another shape, with their names.
    """
    converted = _unwrap(state_dict, architecture)
    expected = _expected_shapes(converted, architecture)
    given = {name: tuple(value.shape) for name, value in converted.items() if isinstance(value, Tensor)}
    missing = [name for name in expected if name not in given and not name.endswith('num_batches_tracked')
               and OPTIONAL not in name]
    surplus = [name for name in converted if name not in expected]
    shapes = [f'{name} {given[name]} instead of {expected[name]}' for name in given
              if name in expected and given[name] != expected[name]]
    problems = [f'{label} {", ".join(names[:5])}{f" and {len(names) - 5} more" * (len(names) > 5)}'
                for label, names in (('missing:', missing), ('unknown:', surplus), ('shapes:', shapes)) if names]
    if problems:
        raise ValueError(f'the checkpoint does not fit {architecture}; ' + '; '.join(problems))
    return converted


def _unwrap(state_dict: Mapping[str, Any], architecture: str | None) -> StateDict:
    for key in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):  # timm's order
        if isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
    rename = LAYOUTS.get(architecture or '', _rename_dense_layer)
    converted = {}
    for name, value in state_dict.items():
        converted[rename(re.sub(r'^(module\.|_orig_mod\.)+', '', str(name)))] = value
    return converted


def _rename_dense_layer(name: str) -> str:
    return re.sub(r'(denselayer\d+\.(?:norm|conv))\.([12])\.', r'\1\2.', name)


def _expected_shapes(state_dict: Mapping[str, Any], architecture: str) -> dict[str, tuple[int, ...]]:
    cfg = timm.get_pretrained_cfg(architecture)
    sizes: dict[str, Any] = {}
    if cfg is not None:
        for argument, layer, axis in (('num_classes', cfg.classifier, 0), ('in_chans', cfg.first_conv, 1)):
            weight = state_dict.get(f'{layer}.weight')
            if isinstance(weight, Tensor) and weight.ndim > axis:
                sizes[argument] = weight.shape[axis]
    with torch.device('meta'):
        model = timm.create_model(architecture, **sizes)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def write_safetensors(state_dict: StateDict, path: Path) -> None:
    """Write ``path`` whole or not at all."""
    write_whole(path, _to_safetensors(state_dict))


def _to_safetensors(state_dict: StateDict) -> bytes:
    return safetensors.torch.save({name: value.detach().cpu().contiguous() for name, value in state_dict.items()})


def file_hash(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _recorded_hash(path: Path) -> str:
    record = path.with_name(path.name + '.sha256')
    if not record.is_file():
        raise ValueError(f'{path} has no record of its SHA-256, {record.name}; remove it to download it again')
    return record.read_text().strip()


def _verify(path: Path, expected: str) -> None:
    actual = file_hash(path)
    if actual != expected:
        raise ValueError(f'{path} is damaged or not the published file: its SHA-256 is {actual}, expected {expected}')


def write_whole(path: Path, content: bytes) -> None:
    """Write ``path`` whole or not at all."""
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
