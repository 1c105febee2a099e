"""Time our tubes beside the same maps of captum, grad-cam and torchcam, in one process, as tables of their page.

    python benchmarks/explainers.py [--rounds 15] [--networks resnet50 ...]
    python benchmarks/explainers.py --report  # the tables of docs/explain.md

Each explainer makes the map of one layer for one class, what is negative cut off, at the input's size, of the same
model object and batch in evaluation mode. Before anything is timed, the maps must correlate. A round times each once,
in an order of its own; what is timed is one call of a ready object, in seconds of the processor on one thread, as the
machine may have other work. Written are the medians over the rounds, and those of the ratios to one forward pass and to
the tube by gradient within a round.
"""
from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from pages import markdown, with_tables
from pooling import keep_freed_memory, processor
from torch import Tensor, nn
from training import RESULTS, ROOT

from explain import Explanation, SaliencyTubes

REPORT = RESULTS / 'cpu_explain.json'
PAGE, MARK = ROOT / 'docs' / 'explain.md', '<!-- benchmarks/explainers.py -->'
PEERS = ('captum', 'grad-cam', 'torchcam')
FORWARD, TUBE, BY_GRADIENT = 'forward pass', "SaliencyTubes, weights='classifier'", "SaliencyTubes, weights='grad'"
OTHER_MAP = 'grad-cam LayerCAM'  # it weighs each position by what is positive of its own gradient
# Network, input, layer.
CASES = [('resnet18', (1, 3, 224, 224), 'layer4'), ('resnet18', (8, 3, 224, 224), 'layer4'),
         ('resnet50', (1, 3, 224, 224), 'layer4'), ('r3d_18_w16', (1, 3, 8, 64, 64), 'blocks.4'),
         ('r3d_18_w16', (8, 3, 8, 64, 64), 'blocks.4'), ('r3d_18', (1, 3, 16, 112, 112), 'blocks.4'),
         ('x3d', (1, 3, 8, 96, 96), 'blocks.4')]


class Row(NamedTuple):
    """``call`` is timed, on what ``ready`` gives as a context."""

    ready: Callable[[], AbstractContextManager]
    call: Callable[[Any], Tensor]


def network(name: str, size: tuple[int, ...]) -> nn.Module:
    """In evaluation mode, with random weights."""
    import video_plugins  # noqa: F401

    torch.manual_seed(0)
    if name != 'x3d':
        return timm.create_model(name).eval()
    from pytorchvideo.models.x3d import create_x3d

    return create_x3d(input_clip_length=size[-3], input_crop_size=size[-1], depth_factor=1.0,
                      head_activation=None).eval()


def rows(model: nn.Module, input: Tensor, layer: str, target: int) -> dict[str, Row]:
    """The forward pass, and explainers by name, each giving (B, 1, [T,] H, W)."""
    from captum.attr import LayerAttribution, LayerGradCam
    from pytorch_grad_cam import GradCAM, LayerCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchcam.methods import CAM
    from torchcam.methods import GradCAM as TorchGradCAM

    module, size, mode = model.get_submodule(layer), input.shape[2:], ('bilinear', 'trilinear')[input.ndim - 4]
    targets = [ClassifierOutputTarget(target)] * len(input)
    captum = LayerGradCam(model, module)

    def tube(weights: str) -> Row:
        explainer = SaliencyTubes(model, layer, weights=weights, relu=True)
        return Row(lambda: explainer, lambda tubes: tubes.explain(input, target).upsampled())

    def by_captum(_: Any) -> Tensor:
        return LayerAttribution.interpolate(captum.attribute(input, target, relu_attributions=True), size, mode)

    def by_grad_cam(cam: Any) -> Tensor:
        return torch.from_numpy(cam(input_tensor=input, targets=targets))[:, None]

    def cam(extractor: Any) -> Tensor:
        with torch.inference_mode():
            model(input)
        return F.interpolate(extractor(target, normalized=False)[0][:, None].relu(), size, mode=mode)

    def grad_cam(extractor: Any) -> Tensor:
        return F.interpolate(extractor(target, model(input), normalized=False)[0][:, None], size, mode=mode)

    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)][-1]
    found = {
        FORWARD: Row(torch.no_grad, lambda _: model(input)),
        TUBE: tube('classifier'),
        BY_GRADIENT: tube('grad'),
        'captum LayerGradCam': Row(nullcontext, by_captum),
        'grad-cam GradCAM': Row(lambda: GradCAM(model, [module]), by_grad_cam),
        OTHER_MAP: Row(lambda: LayerCAM(model, [module]), by_grad_cam),
        'torchcam CAM': Row(lambda: CAM(model, layer, fc_layer=linear), cam),
        'torchcam GradCAM': Row(lambda: TorchGradCAM(model, layer), grad_cam),
    }
    if SaliencyTubes(model, layer).explain(input, target).meta['why']:
        del found[TUBE], found['torchcam CAM']  # the classifier does not act on averages of the layer
    return found


def correlations(cases: dict[str, Row], tube: Explanation) -> dict[str, float]:
    """Of each explainer's maps with the tube's, the least of the batch.

    Raises:
        ValueError: If one is less than 0.99 and not `OTHER_MAP`.
    """
    from pytorch_grad_cam.utils.image import scale_cam_image

    layer, = tube.maps.values()
    # grad-cam resizes clips by a cubic spline from corner to corner, so its maps are compared with ours so resized.
    splined = torch.from_numpy(scale_cam_image(layer[:, 0].numpy(), tube.input_size[::-1]))
    found = {}
    for label, row in cases.items():
        if label == FORWARD:
            continue
        with row.ready() as ready:
            maps = row.call(ready)
        expected = splined if label.startswith('grad-cam') else tube.upsampled()
        found[label] = min(torch.corrcoef(torch.stack(pair))[0, 1].item()
                           for pair in zip(maps.flatten(1), expected.flatten(1)))
        if found[label] < 0.99 and label != OTHER_MAP:
            raise ValueError(f'explainers must give the same map, got a correlation of {found[label]} for {label}')
    return found


def measure(name: str, size: tuple[int, ...], layer: str, rounds: int) -> dict[str, dict[str, float]]:
    model, input = network(name, size), torch.randn(size)
    with torch.no_grad():
        target = int(model(input)[0].argmax())
    cases = rows(model, input, layer, target)
    alike = correlations(cases, SaliencyTubes(model, layer, weights='grad', relu=True).explain(input, target))
    times: list[dict[str, float]] = []
    for _ in range(rounds):
        times.append({})
        for label in random.sample(list(cases), len(cases)):
            with cases[label].ready() as ready:
                start = time.process_time()
                cases[label].call(ready)
                times[-1][label] = 1e3 * (time.process_time() - start)
    return {label: {'ms': statistics.median(taken[label] for taken in times),
                    'forwards': statistics.median(taken[label] / taken[FORWARD] for taken in times),
                    'ratio': statistics.median(taken[label] / taken[BY_GRADIENT] for taken in times)}
            | ({'correlation': alike[label]} if label in alike else {}) for label in cases}


def table(report: dict[str, Any], key: str) -> str:
    """``key`` of every row, a column for each case."""
    cases = report['results']
    lines = []
    if key == 'forwards':
        lines.append([f'{FORWARD}, ms', *(f'{case[FORWARD]["ms"]:.0f}' for case in cases.values())])
    labels = [label for label in next(iter(cases.values())) if label != FORWARD]
    lines += [[label, *(f'{case[label][key]:.2f}' if label in case else '–' for case in cases.values())]
              for label in labels]
    return markdown(['', *cases], lines)


def update(text: str) -> str:
    """The page with its tables made anew, each between a pair of marks."""
    report = json.loads(REPORT.read_text())
    peers = ', '.join(f'{name} {number}' for name, number in report['peers'].items())
    head = (f'{report["processor"]}, one thread, torch {report["torch"]}, {peers}, float32, medians of '
            f'{report["rounds"]} rounds in turn:')
    return with_tables(text, MARK, [f'{head}\n\n{table(report, "forwards")}', table(report, 'ratio')])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--networks', nargs='+', choices=sorted({case[0] for case in CASES}),
                        help='measure these anew and keep the figures of the others')
    parser.add_argument('--report', action='store_true')
    args = parser.parse_args()
    if not args.report:
        keep_freed_memory()
        torch.set_num_threads(1)
        before = json.loads(REPORT.read_text())['results'] if args.networks else {}
        results = {}
        for name, size, layer in CASES:
            case = f'{name}, {" x ".join(map(str, size))}'
            measured = not args.networks or name in args.networks
            results[case] = measure(name, size, layer, args.rounds) if measured else before[case]
            print(case, json.dumps(results[case], indent=1), flush=True)
        report = {'processor': processor('cpu'), 'torch': torch.__version__, 'threads': torch.get_num_threads(),
                  'rounds': args.rounds, 'peers': {peer: version(peer) for peer in PEERS}, 'results': results}
        REPORT.write_text(json.dumps(report, indent=1) + '\n')
    PAGE.write_text(update(PAGE.read_text()))


if __name__ == '__main__':
    main()
