"""SoftPool twins of every timm architecture that makes its maps smaller by a local pool.

All local pools of a twin are SoftPools of the same window, stride and padding, also the branch pools of the Inception
and NASNet families. No twin have: token mixers (PoolFormer, EfficientFormer) and pools with stride 1, which make no
map smaller, and windows of one cell (LeViT). The names are those of timm 1.0.31, by timm's module; a name that the
installed timm lacks is passed over.
"""
from ..swap import swap_pooling
from .twin import register_twins

ARCHITECTURES = {
    'byoanet':
        '''
        botnet26t_256 botnet50ts_256 eca_botnext26ts_256 eca_halonext26ts halonet26t halonet50ts halonet_h1
        haloregnetz_b lambda_resnet26rpt_256 lambda_resnet26t lambda_resnet50ts sebotnet33ts_256
        ''',
    'byobnet':
        '''
        bat_resnext26ts eca_resnext26ts gcresnext26ts gcresnext50ts resnet50_clip resnet50_clip_gap resnet50_mlp
        resnet50x4_clip resnet50x4_clip_gap resnet50x16_clip resnet50x16_clip_gap resnet50x64_clip
        resnet50x64_clip_gap resnet101_clip resnet101_clip_gap resnext26ts seresnext26ts test_byobnet
        ''',
    'cspnet': 'cspresnet50 cspresnet50d cspresnet50w cspresnext50 darknetaa53',
    'densenet': 'densenet201 densenet264d densenetblur121d',
    'dla':
        '''
        dla34 dla46_c dla46x_c dla60 dla60_res2net dla60_res2next dla60x dla60x_c dla102 dla102x dla102x2 dla169
        ''',
    'dpn': 'dpn48b dpn68 dpn68b dpn92 dpn98 dpn107 dpn131',
    'gcvit': 'gcvit_base gcvit_small gcvit_tiny gcvit_xtiny gcvit_xxtiny',
    'hgnet': 'hgnet_base hgnet_small hgnet_tiny',
    'hieradet_sam2': 'hieradet_small sam2_hiera_base_plus sam2_hiera_large sam2_hiera_small sam2_hiera_tiny',
    'inception_resnet_v2': 'inception_resnet_v2',
    'inception_v3': 'inception_v3',
    'inception_v4': 'inception_v4',
    'maxxvit':
        '''
        coatnet_0_224 coatnet_0_rw_224 coatnet_1_224 coatnet_1_rw_224 coatnet_2_224 coatnet_2_rw_224 coatnet_3_224
        coatnet_3_rw_224 coatnet_4_224 coatnet_5_224 coatnet_bn_0_rw_224 coatnet_nano_cc_224 coatnet_nano_rw_224
        coatnet_pico_rw_224 coatnet_rmlp_0_rw_224 coatnet_rmlp_1_rw2_224 coatnet_rmlp_1_rw_224 coatnet_rmlp_2_rw_224
        coatnet_rmlp_2_rw_384 coatnet_rmlp_3_rw_224 coatnet_rmlp_nano_rw_224 coatnext_nano_rw_224 maxvit_base_tf_224
        maxvit_base_tf_384 maxvit_base_tf_512 maxvit_large_tf_224 maxvit_large_tf_384 maxvit_large_tf_512
        maxvit_nano_rw_256 maxvit_pico_rw_256 maxvit_rmlp_base_rw_224 maxvit_rmlp_base_rw_384 maxvit_rmlp_nano_rw_256
        maxvit_rmlp_pico_rw_256 maxvit_rmlp_small_rw_224 maxvit_rmlp_small_rw_256 maxvit_rmlp_tiny_rw_256
        maxvit_small_tf_224 maxvit_small_tf_384 maxvit_small_tf_512 maxvit_tiny_pm_256 maxvit_tiny_rw_224
        maxvit_tiny_rw_256 maxvit_tiny_tf_224 maxvit_tiny_tf_384 maxvit_tiny_tf_512 maxvit_xlarge_tf_224
        maxvit_xlarge_tf_384 maxvit_xlarge_tf_512 maxxvit_rmlp_nano_rw_256 maxxvit_rmlp_small_rw_256
        maxxvit_rmlp_tiny_rw_256 maxxvitv2_nano_rw_256 maxxvitv2_rmlp_base_rw_224 maxxvitv2_rmlp_base_rw_384
        maxxvitv2_rmlp_large_rw_224 test_coatnet test_maxvit
        ''',
    'mobilenetv3': 'mobilenetv4_conv_aa_large mobilenetv4_conv_aa_medium',
    'mvitv2':
        '''
        mvitv2_base mvitv2_base_cls mvitv2_huge_cls mvitv2_large mvitv2_large_cls mvitv2_small mvitv2_small_cls
        mvitv2_tiny
        ''',
    'nasnet': 'nasnetalarge',
    'nest': 'nest_base nest_base_jx nest_small nest_small_jx nest_tiny nest_tiny_jx',
    'nextvit': 'nextvit_base nextvit_large nextvit_small',
    'nfnet':
        '''
        dm_nfnet_f0 dm_nfnet_f1 dm_nfnet_f2 dm_nfnet_f3 dm_nfnet_f4 dm_nfnet_f5 dm_nfnet_f6 eca_nfnet_l0 eca_nfnet_l1
        eca_nfnet_l2 eca_nfnet_l3 nf_ecaresnet26 nf_ecaresnet50 nf_ecaresnet101 nf_regnet_b0 nf_regnet_b1 nf_regnet_b2
        nf_regnet_b3 nf_regnet_b4 nf_regnet_b5 nf_resnet26 nf_resnet50 nf_resnet101 nf_seresnet26 nf_seresnet50
        nf_seresnet101 nfnet_f0 nfnet_f1 nfnet_f2 nfnet_f3 nfnet_f4 nfnet_f5 nfnet_f6 nfnet_f7 nfnet_l0 test_nfnet
        ''',
    'pnasnet': 'pnasnet5large',
    'regnet': 'regnetv_064',
    'res2net':
        '''
        res2net50_14w_8s res2net50_26w_4s res2net50_26w_6s res2net50_26w_8s res2net50_48w_2s res2net50d
        res2net101_26w_4s res2net101d res2next50
        ''',
    'resnest':
        '''
        resnest14d resnest26d resnest50d resnest50d_1s4x24d resnest50d_4s2x40d resnest101e resnest200e resnest269e
        ''',
    'resnet':
        '''
        ecaresnet26t ecaresnet50d ecaresnet50d_pruned ecaresnet50t ecaresnet101d ecaresnet101d_pruned ecaresnet200d
        ecaresnet269d ecaresnetlight ecaresnext26t_32x4d ecaresnext50t_32x4d resnet10t resnet14t resnet18d resnet26
        resnet26d resnet26t resnet34d resnet50_gn resnet50c resnet50d resnet50s resnet50t resnet101c resnet101d
        resnet101s resnet152c resnet152d resnet152s resnet200 resnet200d resnetaa34d resnetaa50 resnetaa50d
        resnetaa101d resnetblur50d resnetblur101d resnetrs50 resnetrs101 resnetrs152 resnetrs200 resnetrs270
        resnetrs350 resnetrs420 resnext50d_32x4d resnext101_32x8d resnext101_32x16d resnext101_32x32d resnext101_64x4d
        senet154 seresnet18 seresnet34 seresnet50 seresnet50t seresnet101 seresnet152 seresnet152d seresnet200d
        seresnet269d seresnetaa50d seresnext26d_32x4d seresnext26t_32x4d seresnext50_32x4d seresnext101_32x4d
        seresnext101_32x8d seresnext101_64x4d seresnext101d_32x8d seresnextaa101d_32x8d seresnextaa201d_32x8d
        test_resnet wide_resnet101_2
        ''',
    'resnetv2':
        '''
        resnetv2_18 resnetv2_18d resnetv2_34 resnetv2_34d resnetv2_50 resnetv2_50d resnetv2_50d_evos resnetv2_50d_frn
        resnetv2_50d_gn resnetv2_50t resnetv2_50x1_bit resnetv2_50x3_bit resnetv2_101 resnetv2_101d resnetv2_101x1_bit
        resnetv2_101x3_bit resnetv2_152 resnetv2_152d resnetv2_152x2_bit resnetv2_152x4_bit
        ''',
    'senet':
        '''
        legacy_senet154 legacy_seresnet18 legacy_seresnet34 legacy_seresnet50 legacy_seresnet101 legacy_seresnet152
        legacy_seresnext26_32x4d legacy_seresnext50_32x4d legacy_seresnext101_32x4d
        ''',
    'sknet': 'skresnet18 skresnet34 skresnet50 skresnet50d skresnext50_32x4d',
    'tresnet': 'tresnet_l tresnet_m tresnet_v2_l tresnet_xl',
    'vgg': 'vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn',
    'vision_transformer_hybrid':
        '''
        vit_base_r26_s32_224 vit_base_r50_s16_224 vit_base_r50_s16_384 vit_base_resnet26d_224 vit_base_resnet50d_224
        vit_large_r50_s32_224 vit_large_r50_s32_384 vit_small_r26_s32_224 vit_small_r26_s32_384
        vit_small_resnet26d_224 vit_small_resnet50d_s16_224 vit_tiny_r_s16_p8_224 vit_tiny_r_s16_p8_384
        ''',
    'vitamin':
        '''
        vitamin_base_224 vitamin_large2_224 vitamin_large2_256 vitamin_large2_336 vitamin_large2_384 vitamin_large_224
        vitamin_large_256 vitamin_large_336 vitamin_large_384 vitamin_small_224 vitamin_xlarge_256 vitamin_xlarge_336
        vitamin_xlarge_384
        ''',
    'volo':
        '''
        volo_d1_224 volo_d1_384 volo_d2_224 volo_d2_384 volo_d3_224 volo_d3_448 volo_d4_224 volo_d4_448 volo_d5_224
        volo_d5_448 volo_d5_512
        ''',
    'vovnet':
        '''
        eca_vovnet39b ese_vovnet19b_dw ese_vovnet19b_slim ese_vovnet19b_slim_dw ese_vovnet39b ese_vovnet39b_evos
        ese_vovnet57b ese_vovnet99b vovnet39a vovnet57a
        ''',
    'xception': 'legacy_xception',
}

register_twins(__name__, [name for names in ARCHITECTURES.values() for name in names.split()], swap_pooling)
