"""A pytest plug-in that points timm's own tests/test_models.py, unmodified, at our models.

Loaded with ``-p``, before that file is imported: the file asks timm for lists of names when it is imported, and gets
the names in ``$SOFTPOOL_SUITE``, separated by commas.
"""
import os

import timm

from timm_softpool import list_models as our_models
from timm_softpool.pretrained import PUBLISHED

SELECTED = set(os.environ['SOFTPOOL_SUITE'].split(','))
assert set(our_models()) >= SELECTED, f'not registered: {SELECTED - set(our_models())}'

_list_models = timm.list_models


def architecture(name):
    return name.split('.')[0]


def list_models(filter='', module='', pretrained=False, **kwargs):
    """timm's function for our models; of those with weights only the ones that can be loaded without a network."""
    names = [name for name in _list_models(filter=filter, pretrained=pretrained, **kwargs)
             if architecture(name) in SELECTED]
    if pretrained:
        names = [name for name in names if 'sha256' in PUBLISHED.get(name, {})]
    if not module:
        return names
    bases = set(_list_models(module=module))
    return [name for name in names if architecture(name).removesuffix('_softpool').removesuffix('_classreg') in bases]


def list_pretrained(filter='', exclude_filters=''):
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


timm.list_models = list_models
timm.list_pretrained = list_pretrained


def pytest_configure(config):
    for marker in 'base forward backward cfg cfg_nonstd torchscript features fxforward fxbackward timeout'.split():
        config.addinivalue_line('markers', f'{marker}: used by timm')


def pytest_collection_modifyitems(config, items):
    """Drop the tests that timm runs for fixed models of its own, and those left without a model.

    And `torch.jit.script` for Class Regularization, whose blocks ask the model for its classifier at each call.
    """
    keep = [item for item in items if getattr(item, 'callspec', None)
            and architecture(name := str(item.callspec.params.get('model_name', ''))) in SELECTED
            and not (name.endswith('_classreg') and item.originalname == 'test_model_forward_torchscript')]
    config.hook.pytest_deselected(items=[item for item in items if item not in keep])
    items[:] = keep
