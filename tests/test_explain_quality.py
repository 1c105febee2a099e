"""Do the maps show what decides? On clips of moving shapes, of which that is known, beside peers and controls.

Two small networks are trained, on shapes alone and among clutter. A control is the pyramid with other weights of the
same layers' channels: what it reaches is the sharpness of its maps, not the class's doing.
"""
from functools import cached_property, partial

import pytest
import timm
import torch
from moving_shapes import CLASSES, ShapeNet, moving_shapes, train
from torch.nn import functional as F

from explain import ClassFeaturePyramid, ClassTubes, MindsEye, SaliencyTubes, metrics
from explain.capture import Tap, capture
from explain.class_feature_pyramid import blurred

COUNT = 64  # clips
DRAWS = 16  # of new weights: one classifier can be like another by chance


def tube(model, clips, classes, layer='auto', weights='auto'):
    return SaliencyTubes(model, layer, weights=weights).explain(clips, classes).upsampled()


def pyramid(model, clips, classes):
    return ClassFeaturePyramid(model).explain(clips, classes).fuse()


def control(weigh, model, clips, classes):
    """The pyramid with maps ``weigh(activations)`` in the place of those with gradients."""
    explanation = ClassFeaturePyramid(model).explain(clips, classes)
    taps = {name: Tap(name.removesuffix(':input'), 'input') for name in explanation.maps if name.endswith(':input')}
    with capture(model, (clips,), taps.values()) as run:
        explanation.maps.update((name, weigh(run[tap][0])) for name, tap in taps.items())
    return explanation.fuse()


def activation_only(activations):
    return blurred(activations.sum(1, keepdim=True))


def random_kernels(generator, activations):
    """A quarter of the channels, chosen for each clip."""
    order = torch.rand(activations.shape[:2], generator=generator).argsort(1)
    chosen = order < max(1, activations.shape[1] // 4)
    return blurred(torch.einsum('bc...,bc->b...', activations, chosen.float())[:, None])


def grad_cam(model, clips, classes):
    """That of the package grad-cam."""
    peer = pytest.importorskip('pytorch_grad_cam', reason="needs the extra 'dev'")
    targets = [peer.utils.model_targets.ClassifierOutputTarget(index) for index in classes.tolist()]
    with peer.GradCAM(model, [model.l3]) as explainer:
        return torch.as_tensor(explainer(clips, targets))[:, None]


METHODS = {'tube': tube, 'pyramid': pyramid, 'grad-cam': grad_cam, 'activations': partial(control, activation_only)}


class Study:
    """A trained network, clips that it classifies correctly, and the maps of each method of them."""

    def __init__(self, clutter):
        self.clutter, seed, epochs = clutter, 0 if clutter else 1, 12 if clutter else 8
        torch.manual_seed(seed)
        self.training = moving_shapes(1536 if clutter else 1024, 1000 + seed, clutter)
        self.model = train(ShapeNet(), self.training, epochs)
        held = moving_shapes(256, 5000 + seed, clutter)
        with torch.no_grad():
            correct = self.model(held.clips).argmax(1) == held.classes
        self.accuracy, self.held = correct.float().mean().item(), held[correct][:COUNT]
        self.two = moving_shapes(COUNT, 7000 + seed, clutter, two=True)
        self.kept = {}

    def maps(self, method):
        if method not in self.kept:
            self.kept[method] = METHODS[method](self.model, self.held.clips, self.held.classes)
        return self.kept[method]

    def energy(self, method, over='space'):
        return metrics.energy_pointing_game(self.maps(method), self.held.masks, over).mean()

    def hits(self, maps):
        return metrics.pointing_game(maps, self.held.masks).float().mean()

    @cached_property
    def random_energy(self):
        """The mean of five controls with random kernels."""
        found = []
        for seed in range(5):
            weigh = partial(random_kernels, torch.Generator().manual_seed(seed))
            maps = control(weigh, self.model, self.held.clips, self.held.classes)
            found.append(metrics.energy_pointing_game(maps, self.held.masks).mean())
        return torch.stack(found).mean()


def studied(clutter):
    study, least = Study(clutter), 0.8 if clutter else 0.93
    if study.accuracy < least:
        pytest.skip(f'the network classifies {study.accuracy:.0%} of the clips correctly, less than {least:.0%}: '
                    f'its maps say nothing about the methods')
    return study


@pytest.fixture(scope='module')
def plain():
    return studied(clutter=False)


@pytest.fixture(scope='module')
def clutter():
    return studied(clutter=True)


@pytest.fixture(params=['plain', 'clutter'])
def study(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize('rival', ['tube', 'grad-cam'])
def test_the_pyramid_has_three_times_the_mass_on_the_shape_that_grad_cam_has(study, rival):
    """In front of an average and a linear layer the tube is Grad-CAM."""
    assert study.energy('pyramid') >= 3 * study.energy(rival)


def test_a_third_of_the_pyramids_mass_is_on_the_shape(study):
    assert study.energy('pyramid') >= (0.3 if study.clutter else 0.35)


def test_among_clutter_the_gradient_makes_the_pyramid_better_than_the_same_activations_without(clutter):
    assert clutter.energy('pyramid') >= 1.25 * clutter.energy('activations')


def test_among_clutter_the_pyramid_is_better_than_with_random_kernels(clutter):
    assert clutter.energy('pyramid') >= 1.2 * clutter.random_energy


def test_the_pyramid_finds_the_frames_with_the_shape_better_than_grad_cam(study):
    assert study.energy('pyramid', 'time') >= study.energy('grad-cam', 'time') + 0.05


def test_the_pyramids_maximum_is_on_the_shape_as_often_as_grad_cams(study):
    assert study.hits(study.maps('pyramid')) >= study.hits(study.maps('grad-cam')) - 0.1  # six of 64 clips


@pytest.mark.parametrize(('method', 'least'), [(tube, 0.95), (pyramid, 0.85)])
def test_of_two_shapes_each_class_gets_its_own(study, method, least):
    two = study.two
    wins = [metrics.class_contrast(method(study.model, two.clips, classes), mask, other) > 0.5
            for classes, mask, other in ((two.classes, two.masks, two.other_masks),
                                         (two.others, two.other_masks, two.masks))]
    assert torch.cat(wins).float().mean() >= least


@pytest.mark.parametrize('explainer', [SaliencyTubes, ClassFeaturePyramid])
def test_a_random_classifier_has_other_maps(study, explainer):
    clips, classes = study.held.clips[:16], study.held.classes[:16]
    found = [metrics.parameter_randomisation(explainer(study.model), clips, classes, seed=seed, depth=1)
             for seed in range(DRAWS)]
    assert {name for ((name, _),) in found} == {'fc'}
    assert torch.stack([values for ((_, values),) in found]).mean() <= 0.35


@pytest.mark.parametrize('method', ['tube', 'pyramid'])
def test_another_class_has_another_map(study, method):
    other = METHODS[method](study.model, study.held.clips, (study.held.classes + 1) % len(CLASSES))
    assert metrics.rank_correlation(study.maps(method), other).mean() <= 0.35


@pytest.mark.parametrize('method', [tube, pyramid])
def test_untrained_networks_find_nothing(study, method):
    held = study.held[:16]
    found = [metrics.energy_pointing_game(method(ShapeNet().eval(), held.clips, held.classes), held.masks).mean()
             for _ in range(DRAWS)]
    assert torch.stack(found).mean() <= 0.15


def test_the_pixels_that_the_pyramid_names_decide_as_much_as_the_tubes(study):
    with torch.no_grad():  # what a network says of noise alone no deletion changes
        default = study.model(0.35 * torch.randn_like(study.held.clips[:16])).mean(0).argmax()
    chosen = (study.held.classes != default).nonzero()[:32, 0]
    clips, classes = study.held.clips[chosen], study.held.classes[chosen]
    areas = [metrics.insertion_deletion(study.model, clips, study.maps(method)[chosen], classes)
             for method in ('pyramid', 'tube')]
    (inserted, deleted), (inserted_tube, deleted_tube) = areas
    assert inserted.mean() >= inserted_tube.mean() - 0.02
    assert deleted.mean() <= deleted_tube.mean() + 0.02


def test_behind_the_first_block_the_kernels_of_the_graph_matter_more_than_random_ones(study):
    clips, classes = study.held.clips[:32], study.held.classes[:32]
    explainer = ClassFeaturePyramid(study.model, select=('mass', 1.0))
    graphs = [explainer.graph(clip[None], int(index)) for clip, index in zip(clips, classes)]
    generator = torch.Generator().manual_seed(0)
    # Not of the first block: any two of the stem's eight channels matter, in one network more than those of the graph.
    for layer, width in {'fc': 32, 'l3.c2': 32, 'l3.c1': 16, 'l2.c1': 8}.items():
        strengths = torch.zeros(len(clips), width)
        for row, graph in zip(strengths, graphs):
            for kernel, shares in graph.channels.items():
                if kernel[0] == layer:
                    row[list(shares)] = torch.tensor(list(shares.values()))
        falls = [metrics.kernel_ablation(study.model, clips, classes, layer, strength).mean() for strength in (
            strengths, *(torch.rand(strengths.shape, generator=generator) for _ in range(5)))]
        assert falls[0] >= 1.3 * torch.stack(falls[1:]).mean(), layer


def test_class_tubes_of_a_middle_layer_find_the_shape_more_often_than_its_grad_cam(clutter):
    explainer = ClassTubes(clutter.model, 'l2').fit(clutter.training.clips[:512].split(128))
    fitted = explainer.explain(clutter.held.clips, clutter.held.classes).upsampled()
    gradients = tube(clutter.model, clutter.held.clips, clutter.held.classes, 'l2', 'grad')
    assert clutter.hits(fitted) >= clutter.hits(gradients) + 0.03


def test_the_minds_eye_makes_of_noise_what_the_network_takes_for_the_images_class(study):
    likeness, probabilities = [], []
    for index in range(len(CLASSES)):
        explainer = MindsEye(study.model, facets=1).fit(study.held.clips[study.held.classes == index])
        found = explainer.render(steps=256 if study.clutter else 128, start='noise', progress=False)
        assert found.isfinite().all()
        with capture(study.model, (found,), ['l3']) as run:
            likeness.append(F.cosine_similarity(run['l3'][0].flatten(2).mean(2), explainer.targets).item())
            probabilities.append(run.output.softmax(1)[0, index].item())
    assert min(likeness) >= 0.8
    assert sum(probability >= 0.7 for probability in probabilities) >= 3


def test_in_a_registered_network_the_pyramid_has_three_times_the_mass_on_the_shape_that_tubes_have(networks_for_clips):
    """At 'blocks.2', as at the last layer 32 pixels have become 2."""
    model = train(timm.create_model('r3d_18_w16', num_classes=len(CLASSES)), moving_shapes(1024, 1000), 8)
    held = moving_shapes(256, 5000)
    with torch.no_grad():
        correct = model(held.clips).argmax(1) == held.classes
    if correct.float().mean() < 0.6:
        pytest.skip(f'the network classifies {correct.float().mean():.0%} of the clips correctly, less than 60%')
    held = held[correct][:COUNT]
    maps = [explainer(model, 'blocks.2').explain(held.clips, held.classes).upsampled()
            for explainer in (ClassFeaturePyramid, SaliencyTubes)]
    fine, coarse = (metrics.energy_pointing_game(map_, held.masks).mean() for map_ in maps)
    assert fine >= 0.1 and fine >= 3 * coarse


@pytest.mark.parametrize('explainer', [SaliencyTubes, ClassFeaturePyramid])
def test_a_little_noise_changes_little(study, explainer):
    captum = pytest.importorskip('captum.metrics', reason="needs the extra 'dev'")
    clips, classes = study.held.clips[:16], study.held.classes[:16]
    change = captum.sensitivity_max(explainer(study.model).attribute, clips, target=classes, n_perturb_samples=4)
    assert change.mean() < 0.3


@pytest.mark.parametrize('metric', ['PointingGame', 'RelevanceMassAccuracy', 'RelevanceRankAccuracy',
                                    'TopKIntersection', 'Sparseness', 'Complexity', 'PixelFlipping', 'MaxSensitivity'])
def test_the_metrics_of_quantus_take_the_explainers(plain, metric):
    quantus = pytest.importorskip('quantus', reason='no test extra, as it installs another OpenCV over theirs')

    def explain(model, inputs, targets, **options):
        return ClassFeaturePyramid(model).explain(torch.as_tensor(inputs), torch.as_tensor(targets)).fuse().numpy()

    held = plain.held[:4]
    clips, classes, masks = held.clips.numpy(), held.classes.numpy(), held.masks.numpy()
    values = getattr(quantus, metric)(disable_warnings=True)(
        plain.model, clips, classes, explain(plain.model, clips, classes), s_batch=masks[:, None],
        explain_func=explain, channel_first=True)
    assert torch.as_tensor(values).isfinite().all()
