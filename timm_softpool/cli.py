"""The command ``timm-softpool``: list and describe models, classify and explain images and videos, train, export."""
from __future__ import annotations

import argparse
import difflib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor

import timm_softpool

from .flops import count_macs
from .pretrained import PUBLISHED, convert_checkpoint, read_checkpoint

DEFAULT_MODEL = 'resnet18_softpool'


class UserError(Exception):
    """Something the user can mend; the message says how."""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text}')
    return int(text)


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

    predict = commands.add_parser('predict', help='classify images or videos', description=classify.__doc__)
    predict.add_argument('files', nargs='+', type=Path, metavar='FILE')
    predict.add_argument('--model', default=DEFAULT_MODEL, help='any timm model with weights; one for clips takes '
                         'videos (%(default)s)')
    predict.add_argument('--checkpoint', type=Path, help='weights of your own for the model: safetensors or PyTorch')
    predict.add_argument('--clips', type=_positive, default=5, help='clips of a video to average (%(default)s)')
    predict.add_argument('--topk', type=_positive, default=5, help='classes to print (%(default)s)')
    predict.add_argument('--json', action='store_true', help='print a JSON list with an object for each file')
    predict.set_defaults(run=classify)

    explain = commands.add_parser('explain', help='show what a model sees', description=explain_files.__doc__)
    explain.add_argument('files', nargs='+', type=Path, metavar='FILE', help='images or videos, or folders of them')
    explain.add_argument('-o', '--output', required=True, type=Path, metavar='OUT',
                         help="a .png, .gif or .mp4 picture, an .html page, or the numbers as .npz; of 'pyramid' also "
                         'the graph of a class as .json or .dot')
    explain.add_argument('--overwrite', action='store_true', help='replace OUT if it exists')
    explain.add_argument('--model', default=DEFAULT_MODEL, help='as for predict (%(default)s)')
    explain.add_argument('--checkpoint', type=Path, help='as for predict')
    explain.add_argument('--method', default='tubes', choices=EXPLAINERS, help='; '.join(
        f"'{name}': {function.__doc__}" for name, function in EXPLAINERS.items()) + ' (%(default)s)')
    explain.add_argument('--target', action='append', metavar='NAME|INDEX',
                         help='a class, several times for several; for each file its most probable one by default')
    explain.add_argument('--layer', action='append', metavar='NAME',
                         help='a layer, or a pattern of names, several times for several (the last one with maps); '
                         "of 'pyramid' that of the coarsest map")
    explain.add_argument('--style', choices=('overlay', 'focus', 'strip', 'stack'), help='of the picture (overlay; '
                         'strip for the PNG of a clip)')
    explain.add_argument('--alpha', type=float, default=0.5, help='of the colours, 0..1 (%(default)s)')
    explain.add_argument('--fit', action='append', type=Path, metavar='FOLDER',
                         help="of 'class': some hundred images or videos such as those to be explained")
    explain.add_argument('--graph', action='store_true', help="of 'pyramid': an .html page of the graph of a class")
    explain.add_argument('--depth', type=_positive, help='of a graph, in layers (all of them)')
    explain.add_argument('--topk', type=_positive, default=5, help='of a graph, channels of each kernel (%(default)s)')
    explain.add_argument('--facets', type=_positive, default=4, help="of 'eye' (%(default)s)")
    explain.add_argument('--steps', type=_positive, default=256, help="of 'eye' (%(default)s)")
    explain.add_argument('--seed', type=int, default=0, help="of 'eye' (%(default)s)")
    explain.set_defaults(run=explain_files, default=explain.get_default)

    train = commands.add_parser('train', help='train a model', description=train_model.__doc__)
    train.add_argument('config', type=Path, metavar='CONFIG.yaml')
    train.add_argument('overrides', nargs='*', metavar='KEY=VALUE', help='settings instead of those of the file')
    train.set_defaults(run=train_model)

    export = commands.add_parser('export', help='write a model as files for others', description=export_files.__doc__)
    export.add_argument('name')
    export.add_argument('--to', required=True, metavar='FOLDER|hf-hub:USER/NAME|FILE.onnx|FILE.pt2',
                        help='a folder as timm and the Hugging Face hub read it, or a program')
    export.add_argument('--checkpoint', type=Path, help='weights of your own for the model: safetensors or PyTorch')
    export.set_defaults(run=export_files)

    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # of `timm-softpool models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, ValueError, ImportError) as error:
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
    if frames := model.pretrained_cfg.get('num_frames'):
        size = (size[0], frames, *size[1:])
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
    """Print the most probable classes of each image or, with a model for clips, of each video."""
    model = _create(arguments.model, pretrained=True, checkpoint=arguments.checkpoint).eval()
    names = class_names(model)
    results: list[dict[str, Any]] = []
    for path in arguments.files:
        with torch.inference_mode():  # one at a time, for little memory
            probabilities = torch.cat([model(x).softmax(-1) for x in _inputs(path, model, arguments.clips)]).mean(0)
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


def explain_files(arguments: argparse.Namespace) -> None:
    """Show where in images or videos a model sees a class, or what one of its layers looks for in many of them."""
    from explain.class_graph import SUFFIXES
    from explain.render import MOVING, WRITERS, checked

    output, method = arguments.output, arguments.method
    arguments.graph |= output.suffix in ('.json', '.dot')
    for option, methods in METHODS.items():
        if getattr(arguments, option) != arguments.default(option) and method not in methods:
            name = 'a graph, by --graph, .json or .dot,' if option == 'graph' else f'--{option}'
            raise UserError(f'{name} needs --method {" or ".join(methods)}, got {method!r}')
    checked(output, SUFFIXES if arguments.graph else {  # before the work begins
        'eye': MOVING, 'pyramid': [*WRITERS, '.json', '.dot']}.get(method, ()))
    if output.exists() and not arguments.overwrite:
        raise UserError(f'{output} exists already; --overwrite replaces it')
    arguments.files = _files(arguments.files)
    model = _create(arguments.model, pretrained=True, checkpoint=arguments.checkpoint).eval()
    EXPLAINERS[method](arguments, model)
    print(output)


def _tubes(arguments: argparse.Namespace, model: Any) -> None:
    """Saliency Tubes, where the evidence for a class is"""
    from explain import SaliencyTubes

    _show(arguments, model, SaliencyTubes(model, arguments.layer or 'auto'))


def _class(arguments: argparse.Namespace, model: Any) -> None:
    """class tubes, weights of a whole layer, from Class Regularization or fitted to the files of --fit"""
    from explain import ClassTubes

    if not (arguments.fit or hasattr(model, 'class_regularization')):
        raise UserError('--method class needs --fit FOLDER, with some hundred images or videos, or a model with Class '
                        'Regularization')
    explainer = ClassTubes(model, arguments.layer or 'auto')
    if arguments.fit:
        files = _files(arguments.fit)
        explainer.fit(x for path in files for x in _inputs(path, model, clips=1))
        print(f'r2 of the logits, fitted to {len(files)} files: '
              + ', '.join(f'{layer} {r2:.2f}' for layer, r2 in explainer.r2.items()))
    _show(arguments, model, explainer)


def _pyramid(arguments: argparse.Namespace, model: Any) -> None:
    """Class Feature Pyramids, one fine map of layers of all resolutions, or a graph of the kernels of a class"""
    from explain import ClassFeaturePyramid

    explainer = ClassFeaturePyramid(model, arguments.layer or 'auto', depth=arguments.depth,
                                    select=('topk', arguments.topk))
    if not arguments.graph:
        _show(arguments, model, explainer)
        return
    for option, given in (('FILE', arguments.files), ('--target', arguments.target or [])):
        if len(given) > 1:
            raise UserError(f'a graph is of one sample and class, {option} must be one, got {len(given)}')
    names = class_names(model)
    inputs, = _inputs(arguments.files[0], model, clips=1)
    graph = explainer.graph(inputs, _class_index(arguments.target[0], names) if arguments.target else None)
    graph.save(arguments.output, inputs, names=names, **_pixels(model))
    print(f'{arguments.files[0]}: {names[graph.target]} ({len(graph.nodes)} kernels of {len(graph.layers)} layers)')


def _show(arguments: argparse.Namespace, model: Any, explainer: Any) -> None:
    from explain.render import save

    names = class_names(model)
    targets = [_class_index(target, names) for target in arguments.target] if arguments.target else [None]
    inputs = torch.cat([x for path in arguments.files for x in _inputs(path, model, clips=1)])
    explanations = [explainer.explain(inputs, target) for target in targets]
    save(explanations, arguments.output, inputs, names=names, captions=[path.name for path in arguments.files],
         style=arguments.style, alpha=arguments.alpha,
         layers='all' if arguments.layer and arguments.method != 'pyramid' else (), **_pixels(model))
    for explanation in explanations:
        probabilities = explanation.logits.softmax(-1)
        for path, index, row in zip(arguments.files, explanation.target.tolist(), probabilities.tolist()):
            print(f'{path}: {names[index]} ({row[index]:.1%})')


def _eye(arguments: argparse.Namespace, model: Any) -> None:
    """The Mind's Eye, images of what a layer sees in many files"""
    from explain import MindsEye
    from explain.render import save_gallery

    images = torch.cat([x for path in arguments.files for x in _inputs(path, model, clips=1)])
    eye = MindsEye(model, arguments.layer or 'auto', facets=arguments.facets).fit(images, seed=arguments.seed)
    rendered = eye.render(arguments.steps, seed=arguments.seed)
    counts = eye.labels.bincount(minlength=arguments.facets).tolist()
    captions = [[f'facet {facet} ({count} of {len(images)}): {word}' for facet, count in enumerate(counts)]
                for word in ('mean', 'rendered')]
    save_gallery([eye.means, rendered], arguments.output, captions, **_pixels(model))
    for path, facet in zip(arguments.files, eye.labels.tolist()):
        print(f'{path}: facet {facet}')


EXPLAINERS = {'tubes': _tubes, 'class': _class, 'pyramid': _pyramid, 'eye': _eye}
# The options that not every method has -> those that have it.
METHODS = {**dict.fromkeys(('target', 'style', 'alpha'), ('tubes', 'class', 'pyramid')), 'fit': ('class',),
           **dict.fromkeys(('graph', 'depth', 'topk'), ('pyramid',)),
           **dict.fromkeys(('facets', 'steps', 'seed'), ('eye',))}



def _files(paths: Sequence[Path]) -> list[Path]:
    """The files, and those in the folders."""
    files = [path for given in paths for path in (sorted(given.iterdir()) if given.is_dir() else [given])]
    if not files:
        raise UserError(f'nothing is in {", ".join(map(str, paths))}')
    return files


def _pixels(model: Any) -> dict[str, Any]:
    """How pixels became the model's inputs."""
    return {key: model.pretrained_cfg[key] for key in ('mean', 'std')}


def _class_index(target: str, names: Sequence[str]) -> int:
    """The class called ``target``, or with that index; a part of a name is enough where it is in no other."""
    if target.isdecimal() and int(target) < len(names):
        return int(target)
    same = [index for index, name in enumerate(names) if target.lower() in map(str.strip, name.lower().split(','))]
    found = same or [index for index, name in enumerate(names) if target.lower() in name.lower()]
    if len(found) != 1:
        near = [names[index] for index in found[:5]] or difflib.get_close_matches(target, names, n=3, cutoff=0.5)
        raise UserError(f'--target must be a class of the model or its index, 0..{len(names) - 1}, got {target!r}'
                        + (f'; did you mean {" or ".join(near)}?' if near else ''))
    return found[0]


def train_model(arguments: argparse.Namespace) -> None:
    """Train a model as a YAML file says, or go on with a training that was stopped, and write what is to be published.

    docs/training.md explains the settings. On several GPUs: torchrun --nproc-per-node N -m timm_softpool.cli train ...
    """
    try:
        from .training import load_config
        from .training.run import train

        config = load_config(arguments.config, arguments.overrides)
    except (ImportError, TypeError) as error:
        raise UserError(str(error)) from error
    train(config, shlex.join(['timm-softpool', 'train', str(arguments.config), *arguments.overrides]))


def export_files(arguments: argparse.Namespace) -> None:
    """Write a model with its weights as a folder for timm, to the Hugging Face hub, or as an ONNX or torch.export file.
    """
    from .export import export_model

    model = _create(arguments.name, pretrained=True, checkpoint=arguments.checkpoint).eval()
    cfg, name = model.pretrained_cfg, None
    if arguments.checkpoint:  # nothing that is known of the published weights is of these
        cfg.update(tag=None, description=None, license=None, label_names=None, label_descriptions=None)
    else:
        name = '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))
    print(export_model(model, arguments.to, name))


def class_names(model: Any) -> list[str]:
    """A readable name for each output of ``model``: ImageNet's, as far as timm knows the classes, or the index."""
    cfg, count = model.pretrained_cfg, model.num_classes
    if len(labels := cfg.get('label_names') or ()) == count:
        synsets = ImageNetInfo('imagenet22k')
        known, own = set(synsets.label_names()), cfg.get('label_descriptions') or {}
        return [own.get(label) or (synsets.label_name_to_description(label) if label in known else label)
                for label in labels]
    if subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
        return [info.index_to_description(index) for index in range(count)]
    return [f'class {index}' for index in range(count)]


def _create(name: str, pretrained: bool = False, checkpoint: Path | None = None, **kwargs: Any) -> Any:
    architecture, missing = name.split('.')[0], ''
    if not timm.is_model(architecture):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', FutureWarning)  # of fvcore, about itself
                import video_plugins  # noqa: F401  (registers the models for clips)
        except ImportError as error:
            missing = f'; {error}'
    if ':' not in name and not timm.is_model(architecture):
        raise UserError(f'unknown model {name!r}{_nearest(architecture)}{missing}')
    try:
        if checkpoint is None:
            return timm.create_model(name, pretrained=pretrained, **kwargs)
        weights = convert_checkpoint(read_checkpoint(checkpoint), architecture)
        cfg = timm.get_pretrained_cfg(architecture)
        if cfg and (classifier := f'{cfg.classifier}.weight') in weights:
            kwargs['num_classes'] = len(weights[classifier])
        model = timm.create_model(name, **kwargs)
        model.load_state_dict(weights)
        return model
    except (RuntimeError, KeyError) as error:
        raise UserError(f'cannot make {name}: {error}') from error


def _nearest(name: str) -> str:
    names = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    return f'; did you mean {" or ".join(names)}?' if names else ''


def _inputs(path: Path, model: Any, clips: int) -> Sequence[Tensor]:
    """What ``model`` takes of a file, in batches of one: an image, or some clips of a video."""
    if model.pretrained_cfg.get('num_frames'):
        from video_plugins import clip_config, load_clips

        return load_clips(path, clips, **clip_config(model)).split(1)
    return [create_transform(**resolve_model_data_config(model), is_training=False)(_read_image(path)).unsqueeze(0)]


def _read_image(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert('RGB')
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = 'no such file' if isinstance(error, FileNotFoundError) else str(error)
        if isinstance(error, UnidentifiedImageError):
            reason += '; if it is a video, name a --model for clips, such as mtnet_xs_g8'
        raise UserError(f'cannot read the image {path}: {reason}') from error


if __name__ == '__main__':
    sys.exit(main())
