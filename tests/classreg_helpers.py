"""Classifiers of both zoos and inputs for them."""
import timm
import torch

import video_plugins

# A small one of many families of timm, and PyTorchVideo's and our networks for clips.
IMAGES = '''
    resnet18 densenet121 convnext_atto efficientnet_b0 vgg11 dpn68 mobilenetv3_small_050 regnetx_002 resnetv2_18
    test_nfnet dla34 repvgg_a0 ghostnet_050 hrnet_w18_small edgenext_xx_small mobilevit_xxs
'''.split()
CLIPS = 'r3d_18_w16 srtg_r3d_18_w16 fast_r3d_18_w16 mtnet_xs_w16 slow_r50 x3d_xs'.split()


def create(name, **options):
    """A classifier with 7 classes, and an input for it."""
    torch.manual_seed(0)
    if timm.is_model(name):
        model, is_video = timm.create_model(name, num_classes=7, **options), name in video_plugins.list_models()
    else:
        model, is_video = video_plugins.models.create_from_pytorchvideo(name, model_num_class=7, **options), True
    return model.eval(), torch.randn((2, 3, 4, 33, 40) if is_video else (2, 3, 64, 96))
