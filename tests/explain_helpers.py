"""What the tests of `explain` use: small networks of every kind, and a look at what a call leaves behind."""
from functools import partial

import pytorchvideo.models as zoo
import timm
import torch
from torch import nn

import video_plugins
from explain import ClassFeaturePyramid, ClassTubes, MindsEye, SaliencyTubes

CLASSES = 5


class Small(nn.Module):
    """Two convolutions with in-place activations, a pool over all positions, a classifier."""

    def __init__(self, axes=3, channels=8, pool=None, stride=2):
        super().__init__()
        conv, norm = {2: (nn.Conv2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.BatchNorm3d)}[axes]
        self.first = nn.Sequential(conv(3, channels, 3, stride=stride, padding=1), norm(channels), nn.ReLU(True))
        self.last = nn.Sequential(conv(channels, channels, 3, padding=1), norm(channels), nn.ReLU(True))
        self.dropout = nn.Dropout(0.5)
        self.pool = pool
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, input):
        features = self.last(self.first(input))
        pooled = features.flatten(2).mean(2) if self.pool is None else self.pool(features).flatten(1)
        return self.head(self.dropout(pooled))


class Twice(Small):
    """The second block works twice."""

    def forward(self, input):
        return self.head(self.last(self.last(self.first(input))).flatten(2).mean(2))


def clip(batch=2, frames=4, size=16, axes=3):
    return torch.randn(batch, 3, *(frames, size, size)[3 - axes:])


def narrow_slow():
    return zoo.resnet.create_resnet(model_depth=50, model_num_class=CLASSES, stem_dim_out=8,
                                    head_pool_kernel_size=(4, 2, 2))


def narrow_slowfast():
    return zoo.slowfast.create_slowfast(
        model_num_class=CLASSES, slowfast_channel_reduction_ratio=(8,), slowfast_conv_channel_fusion_ratio=2,
        stem_dim_outs=(16, 2), head_pool_kernel_sizes=((2, 2, 2), (8, 2, 2)))


def narrow_x3d():
    return zoo.x3d.create_x3d(input_clip_length=4, input_crop_size=64, model_num_class=CLASSES, depth_factor=1.0)


def narrow_mvit():
    return zoo.vision_transformers.create_multiscale_vision_transformers(
        spatial_size=64, temporal_size=8, depth=3, head_num_classes=CLASSES, patch_embed_dim=16, num_heads=1,
        embed_dim_mul=[[1, 2.0]], atten_head_mul=[[1, 2.0]], pool_q_stride_size=[[1, 1, 2, 2]],
        pool_kv_stride_adaptive=[1, 2, 2], pool_kvq_kernel=[3, 3, 3])


def ours(name, **options):
    return video_plugins.create_model(name, num_classes=CLASSES, **options)


def images(name, size=64, **options):
    return timm.create_model(name, num_classes=CLASSES, **options), torch.randn(2, 3, size, size)


# name -> model and input
NETWORKS = {
    **{name: partial(images, name, **options) for name, options in {
        'resnet18': {}, 'test_convnext': {}, 'test_efficientnet': {}, 'mobilenetv3_small_050': {}, 'densenet121': {},
        'test_vit': dict(img_size=64), 'test_vit3': dict(img_size=64), 'xcit_nano_12_p16_224': {}, 'levit_128s':
        dict(size=224), 'vit_tiny_patch16_224': dict(img_size=64, global_pool='avg', class_token=False),
        'swin_tiny_patch4_window7_224': dict(img_size=64, window_size=2, depths=(1, 1, 1, 1), embed_dim=24),
        'pvt_v2_b0': {}, 'mvitv2_tiny': dict(img_size=64), 'resnet18_softpool': {}}.items()},
    'slow': lambda: (narrow_slow(), clip(frames=4, size=64)),
    'x3d': lambda: (narrow_x3d(), clip(frames=4, size=64)),
    'slowfast': lambda: (narrow_slowfast(), [clip(frames=2, size=64), clip(frames=8, size=64)]),
    'mvit': lambda: (narrow_mvit(), clip(frames=8, size=64)),
    'mtnet': lambda: (ours('mtnet_xs_g8', depths=(1, 1, 1, 1)), clip(frames=8, size=64)),
    'srtg': lambda: (ours('srtg_r3d_18'), clip(frames=4, size=64)),
    'fast': lambda: (ours('fast_r3d_18'), clip(frames=4, size=64)),
}
EXPLAINERS = {
    'tubes': SaliencyTubes,
    'tubes by gradient': partial(SaliencyTubes, weights='grad'),
    'tubes of all layers': partial(SaliencyTubes, layer='*.0'),
    'pyramid': ClassFeaturePyramid,
    'class tubes': lambda model: ClassTubes(model, least_r2=-1e9).fit([clip(8)]),
    "mind's eye": lambda model: MindsEye(model, facets=CLASSES).fit(clip(8)),
}


def hooks(model):
    """How many hooks the modules have."""
    return sum(len(value) for module in model.modules() for name, value in vars(module).items()
               if name.endswith('_hooks'))


def state(model):
    """All that a call could change in a model."""
    return ([(module.training, set(vars(module))) for module in model.modules()], hooks(model),
            [(parameter.requires_grad, parameter.grad, parameter._version) for parameter in model.parameters()],
            {name: value.clone() for name, value in model.state_dict().items()})


def assert_as_found(before, after):
    torch.testing.assert_close(before[3], after[3], rtol=0, atol=0)
    assert before[:3] == after[:3]


def correlation(a, b):
    """Of two batches of maps: for each item."""
    a, b = (maps.flatten(1).double() - maps.flatten(1).double().mean(1, keepdim=True) for maps in (a, b))
    return torch.nn.functional.cosine_similarity(a, b)


