"""The graph of channels of one network of each module of timm, of every builder of PyTorchVideo and of our own."""
import pytest
import timm
import torch
from explain_helpers import clip
from pytorchvideo.models import hub
from timm.models import model_entrypoint
from torch import nn

import video_plugins
from explain import flow_graph
from timm_softpool.models import softpool_twins

TIMM = '''
    beit_base_patch16_224 halonet_h1 mobileone_s0 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
    convnext_atto_rms cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
    deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
    efficientformerv2_s0 efficientnet_b0 efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224
    fasternet_t0 fastvit_mci0 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m_enc ghostnet_050 hardcorenas_b hgnetv2_b0
    hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3
    inception_v4 lcnetv2_small levit_128s lowformer_b0 test_mambaout coatnet_0_224 caformer_s18 gmlp_ti16_224 lcnet_035
    mobilenetv5_300m_enc mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny
    nextvit_small dm_nfnet_f0 pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050
    repvit_m1 res2next50 resnest14d resnet10t resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1
    skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window16_256 swinv2_cr_tiny_224
    tiny_vit_11m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny test_vit
    vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw
    legacy_xception xception41p xcit_nano_12_p16_224
'''.split()
SIZES = {'halonet_h1': 256, 'bat_resnext26ts': 256, 'deepseek_vit_412m': 56, 'gemma4_vit_167m_enc': 96,
         'inception_resnet_v2': 128, 'inception_v3': 128, 'inception_v4': 128}  # where 64 does not do
TWINS = [f'{names.split()[0]}_softpool' for names in softpool_twins.ARCHITECTURES.values()]
# Shorter clips; the heads' pools, which have the size of the usual ones, become global.
HUB = {name: clip(1, 4, 64) for name in (
    'c2d_r50', 'i3d_r50', 'slow_r50', 'r2plus1d_r50', 'csn_r101', 'x3d_xs', 'x3d_s', 'x3d_m', 'x3d_l')}
HUB |= {name: clip(1, 4, 160) for name in ('efficient_x3d_xs', 'efficient_x3d_s')}
HUB |= {name: [clip(1, 2, 64), clip(1, 8, 64)] for name in (
    'slowfast_r50', 'slowfast_r101', 'slowfast_16x8_r101_50_50')}
HUB |= {'slow_r50_detection': (clip(1, 4, 64), torch.tensor([[0., 0, 0, 30, 30]])),
        'slowfast_r50_detection': ([clip(1, 2, 64), clip(1, 8, 64)], torch.tensor([[0., 0, 0, 30, 30]])),
        'mvit_base_16': torch.randn(1, 3, 224, 224)}


def test_the_list_has_a_network_of_every_module_of_timm():
    def modules(names):
        found = {model_entrypoint(name).__module__ for name in names}
        return {name for name in found if name.startswith('timm.models.') and not name.endswith('._registry')}

    assert modules(TIMM) == modules(timm.list_models())


def check(model, *inputs):
    graph = flow_graph(model.eval(), *inputs)
    assert not graph.opaque and graph.outputs and all(graph.outputs)
    modules = dict(model.named_modules())
    for name, layer in graph.layers.items():
        parameters = [f'{layer.module}.{name}'.lstrip('.') for name, _ in modules[layer.module].named_parameters()]
        assert name.partition('@')[0] in {layer.module, *parameters, 'functional'}
        assert layer.kernels % layer.groups == layer.channels % layer.groups == 0


@pytest.mark.all_models
@pytest.mark.parametrize('name', TIMM + TWINS)
def test_no_operator_of_an_image_network_is_opaque(name):
    model = timm.create_model(name, num_classes=5)
    config = model.pretrained_cfg
    size = config['input_size'][-1] if config['fixed_input_size'] else SIZES.get(name.removesuffix('_softpool'), 64)
    check(model, torch.randn(1, 3, size, size))


@pytest.mark.all_models
@pytest.mark.parametrize('name', HUB)
def test_no_operator_of_a_network_of_pytorchvideo_is_opaque(name):
    model = getattr(hub, name)(pretrained=False)
    for module in [*model.modules()]:
        for part, pool in module.named_children():
            if isinstance(pool, nn.AvgPool3d):
                setattr(module, part, nn.AdaptiveAvgPool3d(1))
    check(model, *(HUB[name] if isinstance(HUB[name], tuple) else (HUB[name],)))


@pytest.mark.all_models
@pytest.mark.parametrize('name', video_plugins.list_models())
def test_no_operator_of_our_video_networks_is_opaque(name):
    check(video_plugins.create_model(name, num_classes=5), clip(1, 8, 64))
