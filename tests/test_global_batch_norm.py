"""GlobalBatchNorm: batch norm over the batches of all processes; test_training.py has two of them."""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from timm_softpool.training.global_batch_norm import GlobalBatchNorm


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('shape', [(5, 3), (4, 3, 2, 5), (2, 3, 2, 3, 2)])
@pytest.mark.parametrize('affine', [True, False])
def test_a_batch_norm_over_one_process_is_pytorchs(one_process, shape, affine):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(3, dtype=torch.float64, requires_grad=True) if affine else None for _ in range(2))
    results = []
    for is_global in (False, True):
        running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        with GlobalBatchNorm() if is_global else torch.enable_grad():
            out = F.batch_norm(x, *running, weight, bias, True, 0.2)
        grads = torch.autograd.grad(out.sin().sum(), [x, weight, bias] if affine else [x])
        results.append([out, *grads, *running])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs)
