"""The Mind's Eye: what a layer sees in a set of images (A. Stergiou, ICIP 2021, 2101.12447).

The images fall into facets, groups whose features are alike; for each facet an image is optimised until its features
are the facet's. No class is named anywhere. From vis.py of the author's repository; what differs from it:

- k-means works on the principal components themselves, not on a t-SNE picture of them, which keeps no distances;
- a facet is made of the images nearest to its centre; the released code takes the farthest against its own comment;
- an image is optimised for its own facet only, with an optimiser that lives for the whole run and without rounding to
  8 bits at each step; the released code does otherwise in each of the three;
- the activation term is bounded: unbounded beside a distance that grows linearly it can run away. The author's form is
  ``activation='dot'``;
- the author's adaptive distance, made anew at each step, never adapts: 'robust' is its family (J. Barron, CVPR 2019)
  with a fixed shape;
- his denoising by split Bregman iterations is here the same objective by Chambolle's, with the weight 1 / his;
- the zoom of his octaves is left out: every step sees the whole image;
- clips as well as images.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Explainer, upsample
from .capture import Capture, Tap, capture, tensors_of
from .descent import PARAMETERS, Canvas, Course, Schedule, scheduled
from .files import written
from .layers import Layer, Size
from .saliency_tubes import weighed

COMPONENTS = 50
SAVE_EVERY = 50  # steps
ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    'bounded': lambda f, t: ((f * t).sum(1) / t.square().sum(1).clamp(min=1e-12)).clamp(max=1),
    'cosine': F.cosine_similarity,
    'dot': lambda f, t: (f * t).sum(1),
}
DISTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    'smooth_l1': lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), reduction='none'),
    'l1': torch.abs,
    'l2': torch.square,
    'robust': lambda x: (x.square() + 1).sqrt() - 1,  # of shape 1 and scale 1
}
# The author's, for 2,001 steps at 512 x 512 and 'layer4.2.act3' of a ResNet-152, penalty 'layer4.2.conv3'.
PRESETS: dict[str, dict[str, Any]] = {'stergiou': dict(
    activation='dot', distance='robust', relative=False, l1_weight=(1e-4, 5e-4), course=Course(
        optimizer='sgd', lr=(0.5, 0.08), mask=(420 / 512, 340 / 512), blur=(0.9, 0.2), denoise=(1 / 2, 1 / 8),
        brightness=5 / 255, jitter=0))}


class MindsEye(Explainer):
    """Images of what ``layer`` sees in a set of images: ``MindsEye(model, layer).fit(images).render()``.

    ``L = -act_weight A(f, t) + dist_weight mean ρ(f - t) + l1_weight Σ |penalty's input|`` is minimised over the
    pixels, the sum taken over channels and the mean over positions; f are the averages of the layer's channels over
    all positions, t those of the facet, and A regards the ``channels`` largest of t only.

    As an explainer it shows where an input looks like the facet ``target``: the sum over channels of the layer's values
    times t / |t|². The mean of such a map is the score, 1 for features that are the facet's.

    Args:
        model: See `Explainer`.
        layer: See `Explainer`; the channels of several stand side by side. Looked up when images are fitted.
        channels: How many of t's largest the activation term regards.
        facets: How many groups the images fall into.
        members: How many images a facet is made of, the nearest to its centre.
        activation: A: 'bounded', f·t / |t|² up to 1; 'cosine'; 'dot', f·t.
        distance: ρ: 'smooth_l1', 'l1', 'l2' or 'robust', sqrt(x² + 1) - 1.
        relative: Divide f - t by the root mean square of t, so that layers of any magnitude are alike.
        act_weight: A number or, as the two that follow, the pair of the first and the last step's.
        dist_weight: See above.
        l1_weight: See above.
        penalty: The name of the layer whose input the L1 term regards; None for what ``layer`` gives.
        param: 'pixel' or 'fft', see `Canvas`.
        course: What else happens to the images.
        **options: See `Explainer`.

    Raises:
        ValueError: If an argument has no such choice.
    """

    method = 'eye'

    def __init__(self, model: nn.Module, layer: Layer = 'auto', *, channels: int = 50, facets: int = 10,
                 members: int = 10, activation: str = 'bounded', distance: str = 'smooth_l1', relative: bool = True,
                 act_weight: Schedule = 1.0, dist_weight: Schedule = 1.0, l1_weight: Schedule = 0.0,
                 penalty: str | None = None, param: str = 'pixel', course: Course | None = None,
                 **options: Any) -> None:
        super().__init__(model, layer, **options)
        for name, value, choices in (('activation', activation, ACTIVATIONS), ('distance', distance, DISTANCES),
                                     ('param', param, PARAMETERS)):
            if value not in choices:
                raise ValueError(f'{name} must be one of {", ".join(choices)}, got {value!r}')
        for name, number in (('channels', channels), ('facets', facets), ('members', members)):
            if number < 1:
                raise ValueError(f'{name} must be at least 1, got {number}')
        self.channels, self.facets, self.members = channels, facets, members
        self.activation, self.distance, self.relative = activation, distance, relative
        self.act_weight, self.dist_weight, self.l1_weight, self.penalty = act_weight, dist_weight, l1_weight, penalty
        self.param, self.course = param, course or Course()
        self.targets: Tensor | None = None
        self.history: list[dict[str, float]] = []

    @classmethod
    def preset(cls, name: str, model: nn.Module, layer: Layer = 'auto', **options: Any) -> MindsEye:
        """With the settings called ``name``, 'stergiou' for the author's; ``options`` come before them."""
        if name not in PRESETS:
            raise ValueError(f'name must be one of {", ".join(PRESETS)}, got {name!r}')
        return cls(model, layer, **{**PRESETS[name], **options})

    def fit(self, images: Tensor | Iterable[Any], *, seed: int = 0) -> MindsEye:
        """Find the facets of ``images``, a batch, or batches such as a loader's (of a tuple or list the first counts).

        Sets ``targets`` (facets, C), the features t; ``means`` (facets, C, [T,] H, W), the facets' mean images; and
        ``labels``, the facet of each image. ``seed`` is k-means'.

        Raises:
            ValueError: If there are fewer images than facets.
        """
        batches, features = [], []
        for batch in [images] if isinstance(images, Tensor) else images:
            batches.append(tensors_of(batch)[0])
            self.layer = [info.name for info in self.layers((batches[-1],))]
            with capture(self.model, (batches[-1],), self._taps((batches[-1],)), forward=self.forward) as run:
                features.append(self._features(run, (batches[-1],)))
        with torch.inference_mode(False), torch.no_grad():
            self._find_facets(torch.cat(features), torch.cat(batches).clone(), seed)
        return self

    def _find_facets(self, vectors: Tensor, pixels: Tensor, seed: int) -> None:
        if len(vectors) < self.facets:
            raise ValueError(f'images must be at least as many as the {self.facets} facets, got {len(vectors)}')
        left, scale, _ = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
        scores = (left * scale)[:, :COMPONENTS]
        self.labels, centres = k_means(scores, self.facets, seed)
        targets, means = [], []
        for facet, centre in enumerate(centres):
            distance = (scores - centre).norm(dim=1).masked_fill(self.labels != facet, math.inf)
            near = distance.topk(min(self.members, int((self.labels == facet).sum())), largest=False)
            weights = (1 / near.values.clamp(min=1e-6)).softmax(0)
            targets.append(weights @ vectors[near.indices])
            means.append(torch.tensordot(weights.to(pixels), pixels[near.indices], 1))
        self.targets, self.means = torch.stack(targets), torch.stack(means)
        axes = (0, *range(2, pixels.ndim))
        self.low, self.high = pixels.amin(axes, keepdim=True), pixels.amax(axes, keepdim=True)

    def render(self, steps: int = 256, size: Size | None = None, *, start: str = 'mean', seed: int = 0,
               callback: Callable[[int, Tensor], Any] | None = None, progress: bool = True,
               checkpoint: str | Path | None = None) -> Tensor:
        """An image or clip for each facet, (facets, C, [T,] H, W), in the range of the images that were fitted.

        Sets ``history``, for each step the activation term, the distance, the L1 term and the loss, means over facets.

        Args:
            steps: Of the optimiser.
            size: (H, W) or (T, H, W); that of the fitted images if None.
            start: 'mean', the facets' mean images, or 'noise'.
            seed: Of the noise and the jitter.
            callback: Called with the number of the step and the images.
            progress: Show a bar, on a terminal only.
            checkpoint: A file that is written each 50 steps and when the work ends or is interrupted. If it exists, the
                work goes on from there, as if it had never stopped.

        Raises:
            ValueError: If nothing was fitted, ``steps`` or ``start`` has no such choice, or the checkpoint is of other
                facets or sizes.
        """
        try:
            from tqdm import trange
        except ImportError as error:
            raise ImportError("render needs tqdm: pip install 'timm-softpool[explain]'") from error
        targets = self._fitted()
        if steps < 1:
            raise ValueError(f'steps must be at least 1, got {steps}')
        if start not in ('mean', 'noise'):
            raise ValueError(f"start must be 'mean' or 'noise', got {start!r}")
        path = None if checkpoint is None else Path(checkpoint)
        with torch.inference_mode(False), torch.enable_grad():
            generator = torch.Generator().manual_seed(seed)
            begin = upsample(self.means, size or tuple(self.means.shape[2:]))
            noise = torch.randn(begin.shape, generator=generator).to(begin) * (self.high - self.low)
            canvas = Canvas(begin + 0.01 * noise if start == 'mean' else (self.low + self.high) / 2 + 0.05 * noise,
                            self.param)
            optimizer = self.course.optimizer_of([canvas.values])
            self.history = []
            if path is not None and path.exists():
                self._load(path, canvas, optimizer, generator)
            bar = trange(len(self.history), steps, initial=len(self.history), total=steps, desc='facets',
                         disable=None if progress else True)
            try:
                for step in bar:
                    self.history.append(self._step(step, steps, targets, canvas, optimizer, generator))
                    bar.set_postfix(loss=f'{self.history[-1]["loss"]:.3f}')
                    if callback is not None:
                        callback(step, canvas.pixels().detach())
                    if path is not None and (step + 1) % SAVE_EVERY == 0:
                        self._save(path, canvas, optimizer, generator)
            finally:
                if path is not None:
                    self._save(path, canvas, optimizer, generator)
            return canvas.pixels().detach().clamp(self.low, self.high)  # within the rounding of a transform

    def _step(self, step: int, steps: int, targets: Tensor, canvas: Canvas, optimizer: torch.optim.Optimizer,
              generator: torch.Generator) -> dict[str, float]:
        pixels = canvas.pixels()
        mask = self.course.mask_at(pixels, step, steps)
        pixels = mask * pixels + ((1 - mask) * pixels).detach()  # the same, with a part of the gradient
        jitter = self.course.jitter
        roll = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
        pixels = pixels.roll(roll, (-2, -1))
        taps = self._taps((pixels,)) + ([Tap(self.penalty, 'input')] if self.penalty else [])
        with capture(self.model, (pixels,), taps, gradient='inputs', forward=self.forward) as run:
            features = self._features(run, (pixels,))
            largest = targets.topk(min(self.channels, targets.shape[1])).indices
            activation = ACTIVATIONS[self.activation](features.gather(1, largest), targets.gather(1, largest))
            unit = targets.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12) if self.relative else 1
            distance = DISTANCES[self.distance]((features - targets) / unit).mean(1)
            penalised = tensors_of(run[Tap(self.penalty, 'input')][0])[:1] if self.penalty else \
                [self.grid(info, info.of(run)) for info in self.layers((pixels,))]
            l1 = torch.stack([value.abs().flatten(2).mean(2).sum(1) for value in penalised]).sum(0)
            weights = (scheduled(weight, step, steps) for weight in (self.act_weight, self.dist_weight, self.l1_weight))
            loss = sum(w * term for w, term in zip(weights, (-activation, distance, l1)))
            canvas.values.grad = torch.autograd.grad(torch.as_tensor(loss).sum(), canvas.values)[0]
        optimizer.param_groups[0]['lr'] = scheduled(self.course.lr, step, steps)
        optimizer.step()
        with torch.no_grad():
            canvas.set(self.course.edit(canvas.pixels(), step, steps, self.low, self.high))
        terms = dict(activation=activation, distance=distance, l1=l1, loss=torch.as_tensor(loss))
        return {name: value.mean().item() for name, value in terms.items()}

    def _features(self, run: Capture, arguments: tuple[Any, ...]) -> Tensor:
        """(B, C), the averages over positions."""
        values = [self.grid(info, info.of(run)).flatten(2) for info in self.layers(arguments)]
        features = torch.cat([value.mean(2) for value in values], 1)
        return features.to(torch.promote_types(features.dtype, torch.float32))

    def _fitted(self) -> Tensor:
        if self.targets is None:
            raise ValueError('images must be fitted first: MindsEye(...).fit(images)')
        return self.targets

    # As an explainer.

    def _logits(self, run: Capture, arguments: tuple[Any, ...]) -> Tensor:
        targets = self._fitted()
        return self._features(run, arguments) @ (targets / targets.square().sum(1, keepdim=True)).T

    def _maps(self, run: Capture, arguments: tuple[Any, ...], logits: Tensor, scores: Tensor,
              target: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if target is None:
            raise ValueError('target must be the index of a facet, got a function')
        rows = self._fitted()[target]
        rows = rows / rows.square().sum(1, keepdim=True)
        infos = self.layers(arguments)
        values = [self.precise_grid(info, info.of(run)) for info in infos]
        parts = rows.split([value.shape[1] for value in values], 1)
        return {info.name: weighed(value, part) for info, value, part in zip(infos, values, parts)}, {}

    def _save(self, path: Path, canvas: Canvas, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        with written(path) as file:
            torch.save(dict(values=canvas.values.detach(), optimizer=optimizer.state_dict(), targets=self.targets,
                            generator=generator.get_state(), history=self.history), file)

    def _load(self, path: Path, canvas: Canvas, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        state = torch.load(path, map_location=canvas.values.device, weights_only=True)
        same = state['values'].shape == canvas.values.shape and torch.equal(state['targets'], self._fitted())
        if not same:
            raise ValueError(f'checkpoint must be of the same facets and size, got {str(path)!r}, which is not')
        canvas.values.data.copy_(state['values'])
        optimizer.load_state_dict(state['optimizer'])
        generator.set_state(state['generator'].cpu())
        self.history = state['history']


def k_means(points: Tensor, count: int, seed: int = 0, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ centres: labels (N,) and centres (count, D), the largest cluster first.

    A cluster that loses all its points takes the one farthest from its centre.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator).to(points.device)]
    while len(centres) < count:
        squares = torch.cdist(points, centres).amin(1).square().cpu() + 1e-12
        centres = torch.cat([centres, points[squares.multinomial(1, generator=generator).to(points.device)]])
    labels = torch.full((len(points),), -1, device=points.device)
    for _ in range(iterations):
        distances = torch.cdist(points, centres)
        nearest = distances.argmin(1)
        for empty in set(range(count)) - set(nearest.tolist()):
            alone = nearest.bincount(minlength=count)[nearest] == 1
            far = distances.gather(1, nearest[:, None])[:, 0].masked_fill(alone, -1).argmax()
            nearest[far] = empty
        if torch.equal(nearest, labels):
            break
        labels = nearest
        centres = torch.stack([points[labels == cluster].mean(0) for cluster in range(count)])
    order = labels.bincount(minlength=count).argsort(descending=True, stable=True)
    return order.argsort()[labels], centres[order]
