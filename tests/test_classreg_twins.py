"""Networks with Class Regularization by name, and their checkpoints beside the plain ones'."""
import io

import pytest
import timm
import torch
from classreg_helpers import create
from pytorchvideo.models import hub as pytorchvideo_hub

import video_plugins
from timm_softpool import convert_checkpoint, list_models, remove_class_regularization
from timm_softpool.models.classreg_twins import ARCHITECTURES


def test_twins_are_listed_by_timm_and_here():
    assert {'resnet50_classreg', 'resnext50_32x4d_classreg', 'densenet121_classreg'} < set(list_models('*_classreg'))
    assert {'r3d_50_classreg', 'r2plus1d_18_classreg', 'slow_r50_classreg', 'csn_r101_classreg', 'x3d_m_classreg',
            'mtnet_s_classreg'} < set(video_plugins.list_models()) & set(timm.list_models('*_classreg'))
    assert len(ARCHITECTURES) > 80


@pytest.mark.parametrize('name', ['resnet18', 'resnext50_32x4d', 'densenet121', 'r3d_18_w16', 'mtnet_xs_g8_w16'])
@torch.no_grad()
def test_a_plain_checkpoint_and_its_twin_s_go_into_each_other(name):
    (plain, input), (twin, _) = create(name), create(f'{name}_classreg', strength=0)
    buffer = io.BytesIO()
    torch.save(plain.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(convert_checkpoint(torch.load(buffer, weights_only=True), f'{name}_classreg'))
    assert torch.equal(twin(input), plain(input))
    assert remove_class_regularization(twin).state_dict().keys() == plain.state_dict().keys()


@torch.no_grad()
def test_a_twin_s_own_checkpoint_loads_whole(tmp_path):
    twin, input = create('resnet18_classreg')
    torch.save(twin.state_dict(), tmp_path / 'mine.pth')
    again = timm.create_model('resnet18_classreg', num_classes=7, pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'mine.pth'), num_classes=7)).eval()
    assert torch.equal(again(input), twin(input))


@torch.no_grad()
def test_a_feature_network_of_a_twin_is_the_plain_one():
    torch.manual_seed(0)
    plain = timm.create_model('resnet18', features_only=True).eval()
    torch.manual_seed(0)
    twin = timm.create_model('resnet18_classreg', features_only=True).eval()
    input = torch.randn(1, 3, 64, 64)
    assert all(map(torch.equal, plain(input), twin(input)))


@pytest.mark.parametrize('name', ['slow_r50', 'x3d_xs', 'csn_r101'])
@torch.no_grad()
def test_pytorchvideo_s_networks_give_the_logits_of_the_originals(name):
    original = getattr(pytorchvideo_hub, name)(model_num_class=7).eval()
    original.blocks[-1].activation = None
    twin = video_plugins.create_model(f'{name}_classreg', num_classes=7, strength=0).eval()
    twin.load_state_dict(original.state_dict())
    clip = torch.randn(1, 3, *{'slow_r50': (8, 224, 224), 'x3d_xs': (4, 160, 160), 'csn_r101': (32, 224, 224)}[name])
    torch.testing.assert_close(twin(clip), original(clip), rtol=1e-4, atol=1e-5)
