"""What a layer sees: facets of a set of images, and an image made for each."""
import pytest
import torch
from explain_helpers import Small, clip, hooks, narrow_slowfast
from skimage.restoration import denoise_tv_chambolle
from torch import nn

from explain import MindsEye
from explain.descent import Canvas, Course, denoised, gaussian_blur, scheduled
from explain.minds_eye import k_means


def groups(count=3, axes=2, each=6, size=16):
    """Images of ``count`` kinds, coloured differently."""
    colours = torch.eye(3)[torch.arange(count) % 3].repeat_interleave(each, 0)
    return colours.reshape(-1, 3, *[1] * axes) * 2 - 1 + 0.2 * clip(count * each, size=size, axes=axes)


@pytest.fixture
def eye():
    model = Small(axes=2, channels=16)
    nn.init.kaiming_normal_(model.first[0].weight)
    return MindsEye(model, 'last', facets=3, members=4)


def test_the_facets_are_the_groups_that_the_layer_tells_apart(eye):
    eye.fit(groups()[:16])  # the last group is smaller
    assert eye.labels.tolist() == [eye.labels[0]] * 6 + [eye.labels[6]] * 6 + [2] * 4
    assert len(set(eye.labels.tolist())) == 3
    assert eye.targets.shape == (3, 16) and eye.means.shape == (3, 3, 16, 16)


def test_a_facet_is_made_of_the_images_nearest_to_its_centre(eye):
    images = groups(1, each=9)
    images[8] += 3
    eye.facets, eye.members = 1, 8
    eye.fit(images)
    assert (eye.means[0] < images[:8].amax(0) + 1e-5).all(), 'the one that lies apart is not among them'
    features = eye.model.eval().last(eye.model.first(images)).mean((2, 3))
    apart = (features - features.mean(0)).norm(dim=1)[:8]
    torch.testing.assert_close(eye.targets[0], (1 / apart).softmax(0) @ features[:8])


def test_batches_of_a_loader_are_one_set(eye):
    images = groups()
    whole = eye.fit(images).targets
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, torch.zeros(18)), batch_size=5)
    torch.testing.assert_close(eye.fit(loader).targets, whole)


@pytest.mark.parametrize('options', [{}, dict(param='fft'), dict(activation='cosine', distance='l2'), dict(
    distance='l1', course=Course(mask=0.4, denoise=(0.05, 0.01), brightness=0.01)), dict(distance='robust')], ids=str)
@pytest.mark.parametrize('axes', [2, 3])
def test_an_image_becomes_what_its_facet_is(options, axes):
    model = Small(axes)
    eye = MindsEye(model, 'last', facets=3, members=4, **options).fit(groups(axes=axes))
    images = eye.render(40, start='noise', progress=False)
    assert images.shape == eye.means.shape and images.isfinite().all()
    assert (images >= eye.low).all() and (images <= eye.high).all()
    first, last = eye.history[0], eye.history[-1]
    assert len(eye.history) == 40 and last['loss'] < first['loss'] and last['distance'] < 0.8 * first['distance']
    scores = eye.explain(images, target=[0, 1, 2]).logits
    assert (scores.diagonal() > 0.6).all()
    assert hooks(model) == 0 and model.training and all(p.grad is None for p in model.parameters())


def test_the_authors_settings_have_a_name_and_the_dot_product_is_not_bounded():
    images = groups()
    model = Small(axes=2)
    bounded = MindsEye(model, 'last', facets=3, course=Course(lr=0.2, blur=0)).fit(images)
    bounded.render(30, progress=False)
    author = MindsEye.preset('stergiou', model, 'last', facets=3, penalty='last.0').fit(images)
    author.render(30, progress=False)
    assert (author.activation, author.course.lr, author.course.optimizer) == ('dot', (0.5, 0.08), 'sgd')
    assert bounded.history[-1]['activation'] <= 1 + 1e-6
    assert author.history[-1]['activation'] > author.history[0]['activation']
    with pytest.raises(ValueError, match="name must be one of stergiou, got 'other'"):
        MindsEye.preset('other', model)


def test_the_same_seed_gives_the_same_images_and_an_interrupted_run_goes_on_as_if_it_had_not_stopped(eye, tmp_path):
    eye.fit(groups())
    expected = eye.render(12, start='noise', seed=3, progress=False)
    history = eye.history
    torch.testing.assert_close(eye.render(12, start='noise', seed=3, progress=False), expected, rtol=0, atol=0)
    assert not torch.equal(eye.render(12, start='noise', seed=4, progress=False), expected)
    file = tmp_path / 'eye.pt'

    def interrupt(step, images):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        eye.render(12, start='noise', seed=3, progress=False, checkpoint=file, callback=interrupt)
    assert len(eye.history) == 7
    resumed = eye.render(12, start='noise', seed=3, progress=False, checkpoint=file)
    torch.testing.assert_close(resumed, expected, rtol=0, atol=0)
    assert eye.history == history
    torch.testing.assert_close(eye.render(12, progress=False, checkpoint=file), expected)
    with pytest.raises(ValueError, match='checkpoint must be of the same facets and size'):
        eye.render(12, (8, 8), progress=False, checkpoint=file)


def test_images_of_another_size_and_networks_of_two_pathways():
    eye = MindsEye(Small(axes=2), 'last', facets=2).fit(groups(2))
    assert eye.render(2, (24, 20), progress=False).shape == (2, 3, 24, 20)
    model = narrow_slowfast()
    eye = MindsEye(model, 'blocks.4', facets=2, forward=lambda model, x: model([x[:, :, ::4], x]))
    eye.fit(clip(4, frames=8, size=64))
    assert eye.render(1, progress=False).shape == (2, 3, 8, 64, 64)
    assert [map_.shape[2:] for map_ in eye.explain(clip(1, 8, 64), 0).maps.values()] == [(2, 2, 2), (8, 2, 2)]


def test_work_under_inference_mode_and_a_bar_on_no_terminal(eye, capsys):
    with torch.inference_mode():
        eye.fit(groups()).render(2)
    assert capsys.readouterr().err == ''


def test_as_an_explainer_the_mean_of_the_map_is_the_likeness(eye):
    eye.fit(groups())
    result = eye.explain(groups(), target=1)
    torch.testing.assert_close(result.maps['last'].mean((1, 2, 3)), result.logits[:, 1])
    with pytest.raises(ValueError, match='target must be the index of a facet, got a function'):
        eye.explain(groups(), target=lambda likeness: likeness[0])


@pytest.mark.parametrize(('options', 'message'), [
    (dict(activation='sum'), "activation must be one of bounded, cosine, dot, got 'sum'"),
    (dict(distance='l3'), "distance must be one of .*, got 'l3'"),
    (dict(param='wavelet'), "param must be one of pixel, fft, got 'wavelet'"),
    (dict(facets=0), 'facets must be at least 1, got 0'),
])
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MindsEye(Small(), **options)
    with pytest.raises(ValueError, match="optimizer must be one of adam, sgd, got 'lbfgs'"):
        Course(optimizer='lbfgs')
    with pytest.raises(ValueError, match='blur_every must be at least 1, got 0'):
        Course(blur_every=0)


def test_work_in_the_wrong_order_is_refused(eye):
    with pytest.raises(ValueError, match=r'images must be fitted first'):
        eye.render(1)
    with pytest.raises(ValueError, match='images must be at least as many as the 3 facets, got 2'):
        eye.fit(groups()[:2])
    with pytest.raises(ValueError, match="start must be 'mean' or 'noise', got 'zero'"):
        eye.fit(groups()).render(1, start='zero')


def test_k_means_leaves_no_cluster_empty_and_is_at_rest():
    points = torch.cat([torch.randn(9, 2), torch.randn(5, 2) + 8, torch.zeros(4, 2) - 8])
    labels, centres = k_means(points, 5)
    assert labels.bincount(minlength=5).min() > 0
    assert labels.bincount().tolist() == sorted(labels.bincount().tolist(), reverse=True)
    three, _ = k_means(points, 3)
    assert three.tolist() == [0] * 9 + [1] * 5 + [2] * 4
    torch.testing.assert_close(centres, torch.stack([points[labels == k].mean(0) for k in range(5)]))
    assert k_means(torch.zeros(4, 2), 4)[0].bincount().tolist() == [1, 1, 1, 1], 'equal points, too'


@pytest.mark.parametrize('shape', [(2, 3, 9, 12), (1, 2, 4, 6, 5), (1, 1, 5, 7)])
@pytest.mark.parametrize('parameter', ['pixel', 'fft'])
def test_a_canvas_holds_any_image(shape, parameter):
    image = torch.randn(shape)
    canvas = Canvas(image, parameter)
    torch.testing.assert_close(canvas.pixels(), image)
    canvas.set(2 * image)
    torch.testing.assert_close(canvas.pixels(), 2 * image)
    canvas.pixels().sum().backward()
    assert canvas.values.grad.any()


def test_total_variation_is_taken_off_as_by_scikit_image():
    image = torch.rand(20, 24, dtype=torch.float64)
    expected = denoise_tv_chambolle(image.numpy(), weight=0.2, eps=0, max_num_iter=100)
    actual = denoised(image[None, None], 0.2, iterations=100)[0, 0]
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0, atol=1e-3)


def test_smoothing_keeps_the_mean_of_a_flat_image_and_spreads_a_point_along_every_axis():
    torch.testing.assert_close(gaussian_blur(torch.ones(1, 1, 4, 5, 6), 0.8), torch.ones(1, 1, 4, 5, 6))
    point = torch.zeros(1, 1, 9, 9, 9)
    point[..., 4, 4, 4] = 1
    smooth = gaussian_blur(point, 1.0)
    assert smooth.sum().item() == pytest.approx(1, abs=1e-3) and smooth.argmax() == point.argmax()
    torch.testing.assert_close(smooth, smooth.transpose(2, 4))


def test_a_schedule_is_a_line():
    assert [scheduled((1.0, 0.0), step, 5) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert scheduled(3.0, 7, 9) == 3 and scheduled((1.0, 0.0), 0, 1) == 1
