"""The command ``timm-softpool``: list the models, describe one, classify images."""
from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config

import timm_softpool

from .pretrained import PUBLISHED

DEFAULT_MODEL = 'resnet18_softpool'


class UserError(Exception):
    """Something the user can mend; the message says how."""


def main(argv: list[str] | None = None) -> int:
    """Run the command with ``argv`` (``sys.argv`` by default) and return its exit status: 2 for bad input."""
    parser = argparse.ArgumentParser(prog='timm-softpool', description=__doc__)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    models = commands.add_parser('models', help='list the models', description=list_models.__doc__)
    models.add_argument('pattern', nargs='?', default='*', help="wildcard, such as 'resnet*'")
    models.set_defaults(run=list_models)

    info = commands.add_parser('info', help='describe a model', description=describe.__doc__)
    info.add_argument('name')
    info.set_defaults(run=describe)

    predict = commands.add_parser('predict', help='classify images', description=classify.__doc__)
    predict.add_argument('images', nargs='+', type=Path, metavar='IMAGE')
    predict.add_argument('--model', default=DEFAULT_MODEL, help='any timm model with weights (%(default)s)')
    predict.add_argument('--topk', type=int, default=5, help='classes to print (%(default)s)')
    predict.add_argument('--json', action='store_true', help='print a JSON list with an object for each image')
    predict.set_defaults(run=classify)

    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # of `timm-softpool models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, ValueError) as error:
        print(f'timm-softpool: error: {error}', file=sys.stderr)
        return 2
    return 0


def list_models(arguments: argparse.Namespace) -> None:
    """Print the names of our models, each with the tags of its published weights."""
    names = timm_softpool.list_models(arguments.pattern)
    if not names:
        raise UserError(f'no model matches {arguments.pattern!r}{_nearest(arguments.pattern)}')
    for name in names:
        tags = [key.split('.', 1)[1] for key in PUBLISHED if key.split('.')[0] == name]
        print(f'{name}  ({", ".join(tags)})' if tags else name)


def describe(arguments: argparse.Namespace) -> None:
    """Print a model's parameters, multiply-accumulates (MAC), SoftPool layers and published weights."""
    model = _create(arguments.name, device='meta').eval()
    size = model.pretrained_cfg['input_size']
    macs = count_macs(model, size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f'{arguments.name}: {parameters / 1e6:.2f} M parameters, {macs / 1e9:.3f} GMAC at '
          f'{"x".join(map(str, size))} (convolutions, matrix products and SoftPool)')
    pools = timm_softpool.soft_pools(model)
    print(f'SoftPool in {len(pools)} place{"s" * (len(pools) != 1)}{":" * bool(pools)}')
    for name, pool in pools.items():
        print(f'  {name}: {"functional pools" if hasattr(pool, "soft_pool_origin") else pool}')
    weights = {key: entry for key, entry in PUBLISHED.items() if key.split('.')[0] == arguments.name.split('.')[0]}
    print('Weights:' if weights else 'Weights: none published by timm-softpool')
    for key, entry in weights.items():
        metrics = ', '.join(f'{name} {value}' for name, value in entry.get('metrics', {}).items())
        print(f'  {key}: {metrics or "not measured here"}; licence: {entry["license"]}')


def classify(arguments: argparse.Namespace) -> None:
    """Print the most probable classes of each image."""
    if arguments.topk < 1:
        raise UserError(f'--topk must be at least 1, got {arguments.topk}')
    images = [_read_image(path) for path in arguments.images]
    model = _create(arguments.model, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    names = class_names(model)
    results: list[dict[str, Any]] = []
    for path, image in zip(arguments.images, images):
        with torch.inference_mode():
            probabilities = model(transform(image).unsqueeze(0)).softmax(-1)[0]
        top = probabilities.topk(min(arguments.topk, len(probabilities)))
        results.append({'image': str(path), 'classes': [
            {'index': index, 'name': names[index], 'probability': round(probability, 4)}
            for index, probability in zip(top.indices.tolist(), top.values.tolist())]})
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for result in results:
        print(result['image'])
        for row in result['classes']:
            print(f'  {row["probability"]:6.1%}  {row["name"]}')


def count_macs(model: Any, input_size: tuple[int, ...]) -> int:
    """Multiply-accumulates of one image of ``input_size``, half of what `torch.utils.flop_counter` counts."""
    from torch.utils.flop_counter import FlopCounterMode

    device = next(model.parameters()).device
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *input_size, device=device))
    return counter.get_total_flops() // 2


def class_names(model: Any) -> list[str]:
    """A readable name for each output of ``model``: ImageNet's, as far as timm knows the classes, or the index."""
    cfg, count = model.pretrained_cfg, model.num_classes
    if labels := cfg.get('label_names'):
        synsets = ImageNetInfo('imagenet22k')
        known, own = set(synsets.label_names()), cfg.get('label_descriptions') or {}
        return [own.get(label) or (synsets.label_name_to_description(label) if label in known else label)
                for label in labels]
    if subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(count)]
    return [f'class {index}' for index in range(count)]


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    architecture = name.split('.')[0]
    if ':' not in name and not timm.is_model(architecture):
        raise UserError(f'unknown model {name!r}{_nearest(architecture)}')
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (RuntimeError, KeyError) as error:
        raise UserError(f'cannot make {name}: {error}') from error


def _nearest(name: str) -> str:
    names = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    return f'; did you mean {" or ".join(names)}?' if names else ''


def _read_image(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert('RGB')
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = 'no such file' if isinstance(error, FileNotFoundError) else str(error)
        raise UserError(f'cannot read the image {path}: {reason}') from error


if __name__ == '__main__':
    sys.exit(main())
