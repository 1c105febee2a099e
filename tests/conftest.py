"""What every test starts from, the same random numbers and the default backend; and what several test files use."""
import logging

import pytest
import timm
import torch
from checkpoint_helpers import NAME
from hypothesis import settings

from timm_softpool import set_backend
from timm_softpool.cli import main

settings.register_profile('timm_softpool', derandomize=True, deadline=None, print_blob=True)
settings.load_profile('timm_softpool')


@pytest.fixture(autouse=True)
def same_start():
    torch.manual_seed(0)
    yield
    set_backend(None)


@pytest.fixture
def command(capsys):
    """Runs the command, which has to succeed in silence on stderr, and returns the lines that it prints."""
    def call(*arguments):
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert (status, err) == (0, '')
        return out.splitlines()
    return call


@pytest.fixture
def failure(capsys):
    """Runs the command, which has to fail with status 2 and without a result, and returns what it says."""
    def call(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        assert (status, out) == (2, '')
        return err
    return call


@pytest.fixture
def networks_for_clips():
    """They are registered, or the test is skipped."""
    pytest.importorskip('video_plugins', reason="needs the extra 'video'", exc_type=ImportError)


@pytest.fixture
def model():
    """The smallest of ours."""
    return timm.create_model(NAME).eval()


@pytest.fixture
def tensors(model):
    return dict(model.state_dict())


@pytest.fixture
def log(caplog):
    """What the package logs, from level info on."""
    caplog.set_level(logging.INFO, 'timm_softpool')
    return caplog
