"""What every test starts from: the same random numbers, and the backend that serves by default."""
import pytest
import torch
from hypothesis import settings

from timm_softpool import set_backend

settings.register_profile('timm_softpool', derandomize=True, deadline=None, print_blob=True)
settings.load_profile('timm_softpool')


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
    yield
    set_backend(None)
