"""torch.hub's face: ``torch.hub.load('path/to/this/checkout', 'resnet18_softpool', source='local', pretrained=True)``.

Everything is imported inside the entry points, so that torch.hub can list them, and say what is missing, on a machine
without the dependencies.
"""
import sys as _sys

dependencies = ['torch', 'torchvision', 'timm', 'safetensors'] + ['tomli'] * (_sys.version_info < (3, 11))

_NAMES = (
    'resnet18_softpool', 'resnet34_softpool', 'resnet50_softpool', 'resnet101_softpool', 'resnet152_softpool',
    'resnext50_32x4d_softpool', 'resnext101_32x4d_softpool', 'wide_resnet50_2_softpool', 'densenet121_softpool',
    'densenet161_softpool', 'densenet169_softpool',
)


def _entry_point(_name):
    def create(pretrained=False, **kwargs):
        import timm

        import timm_softpool  # noqa: F401  (registers the models)

        return timm.create_model(_name, pretrained=pretrained, **kwargs)

    create.__name__ = create.__qualname__ = _name
    create.__doc__ = f"""{_name[:-len('_softpool')]} of timm with SoftPool in its stem.

    Args:
        pretrained: Load the published weights of the name's default tag.
        **kwargs: Those of `timm.create_model`: `num_classes`, `in_chans`, `features_only`, `pretrained_cfg` (a tag) ...

    Example:
        model = torch.hub.load('path/to/the/checkout', '{_name}', source='local', pretrained=True)
    """
    return create


globals().update((_name, _entry_point(_name)) for _name in _NAMES)
