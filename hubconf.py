"""torch.hub's face: ``torch.hub.load('path/to/this/checkout', 'resnet18_softpool', source='local', pretrained=True)``.

Everything is imported inside the entry points, so that torch.hub can list them, and say what is missing, on a machine
without the dependencies. Those of the video networks are no dependencies of the image models: `video_plugins` itself
says what it lacks.
"""
import sys as _sys

dependencies = ['torch', 'torchvision', 'timm', 'safetensors'] + ['tomli'] * (_sys.version_info < (3, 11))

_IMAGE_NAMES = (
    'resnet18_softpool', 'resnet34_softpool', 'resnet50_softpool', 'resnet101_softpool', 'resnet152_softpool',
    'resnext50_32x4d_softpool', 'resnext101_32x4d_softpool', 'wide_resnet50_2_softpool', 'densenet121_softpool',
    'densenet161_softpool', 'densenet169_softpool',
)
_VIDEO_NAMES = (
    *(f'fast_{network}{form}' for network in ('r3d_18', 'r3d_34', 'r3d_50', 'densenet121')
      for form in ('', '_parallel')),
    *(f'mtnet_{size}{form}' for size in ('xs', 's', 'm', 'l', 'xl', 'xxl') for form in ('', '_g8')),
    *(f'{network}_{depth}' for network in ('r3d', 'srtg_r3d', 'r2plus1d', 'srtg_r2plus1d')
      for depth in (18, 34, 50, 101)),
    *(f'{network}_w16' for network in ('fast_r3d_18', 'mtnet_xs', 'mtnet_xs_g8', 'r2plus1d_18', 'r3d_18',
                                       'srtg_r3d_18')),
)
_VIDEO_NAMES += (
    *(f'{name}_classreg' for name in _VIDEO_NAMES if name.startswith(('r3d', 'r2plus1d', 'mtnet'))),
    *(f'{name}_classreg' for name in ('slow_r50', 'csn_r101', 'x3d_xs', 'x3d_s', 'x3d_m', 'x3d_l')),
)


def _entry_point(_name, _package, _what):
    def create(pretrained=False, **kwargs):
        import importlib

        import timm

        importlib.import_module(_package)  # registers the models
        return timm.create_model(_name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = _name
    create.__doc__ = f"""{_what}

    Args:
        pretrained: Load the published weights of the name's default tag.
        **kwargs: Those of `timm.create_model`: `num_classes`, `in_chans`, `pretrained_cfg` (a tag) ...

    Example:
        model = torch.hub.load('path/to/the/checkout', '{_name}', source='local', pretrained=True)
    """
    return create


globals().update((_name, _entry_point(_name, 'timm_softpool', f"{_name[:-len('_softpool')]} of timm with SoftPool in "
                                      'its stem.')) for _name in _IMAGE_NAMES)
globals().update((_name, _entry_point(_name, 'video_plugins', f'The video network {_name}, clips (N, 3, T, H, W) -> '
                                      'logits; needs PyTorchVideo.')) for _name in _VIDEO_NAMES)
