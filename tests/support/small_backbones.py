"""A small network of every backbone family, and RIDE on it."""

import re

import timm
import torch
from torch import nn

import ride_timm  # noqa: F401  (registers the models)
from ride_timm.models import Ride

TINY_SWIN = dict(img_size=64, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
TINY_VIT = dict(img_size=64, embed_dim=48, depth=4, num_heads=2)
# backbone: (image size, arguments that make it small)
BACKBONES = {
    "test_resnet": (64, {}),
    "resnext50_32x4d": (64, dict(layers=(1, 1, 1, 1))),
    "resnetv2_50": (64, dict(layers=(1, 1, 1, 1), channels=(32, 32, 64, 64))),
    "test_convnext": (64, {}),
    "test_convnext2": (64, {}),
    "convnext_atto": (64, dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))),
    "convnextv2_atto": (64, dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))),
    "swin_tiny_patch4_window7_224": (64, TINY_SWIN),
    "swinv2_tiny_window8_256": (64, TINY_SWIN),
    "swinv2_cr_tiny_ns_224": (64, TINY_SWIN),
    "test_vit": (160, {}),
    "test_vit3": (160, {}),
    "deit_tiny_patch16_224": (64, TINY_VIT),
    "vit_base_patch16_siglip_gap_224": (64, TINY_VIT),
    "vit_small_patch14_reg4_dinov2": (64, dict(TINY_VIT, patch_size=16)),
    "deit3_small_patch16_224": (64, dict(TINY_VIT, dynamic_img_size=True)),
    "eva02_tiny_patch14_224": (56, dict(img_size=56, embed_dim=48, depth=4, num_heads=2)),
    "eva02_base_patch14_224": (56, dict(img_size=56, embed_dim=48, depth=4, num_heads=2)),
    "vit_small_patch16_rope_mixed_224": (64, TINY_VIT),
    "vit_tiny_patch16_dinov3_qkvb": (64, dict(TINY_VIT, dynamic_img_size=False)),
    "beit_base_patch16_224": (64, TINY_VIT),
    "test_efficientnet": (64, {}),
    "mobilenetv2_035": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small_035": (64, {}),
    "regnetx_002": (64, {}),
    "regnety_002": (64, {}),
    "test_maxvit": (160, {}),
    "test_coatnet": (160, {}),
    "densenet121": (64, dict(block_config=(2, 2, 2, 2))),
    "test_byobnet": (64, {}),
    "test_mambaout": (64, {}),
    "test_nfnet": (64, {}),
    "cs3darknet_s": (64, {}),
    "davit_tiny": (64, dict(embed_dims=(16, 32, 64, 64), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2))),
    "edgenext_xx_small": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "ghostnet_050": (64, {}),
    "hgnetv2_b0": (64, {}),
    "inception_next_atto": (64, {}),
    "nextvit_small": (64, dict(depths=(1, 1, 5, 1))),
    "poolformerv2_s12": (64, {}),
    "pvt_v2_b0": (64, {}),
    "rdnet_tiny": (64, dict(num_init_features=16, growth_rates=(16,) * 7, num_blocks_list=(1,) * 7)),
    "starnet_s050": (64, {}),
    "tiny_vit_5m_224": (64, {}),
    "ese_vovnet19b_dw": (64, {}),
}
FEW = ["test_resnet", "resnetv2_50", "swin_tiny_patch4_window7_224", "test_vit", "eva02_tiny_patch14_224"]
FEW += ["beit_base_patch16_224", "mobilenetv3_small_050", "test_convnext", "densenet121"]


def build(backbone, seed=0, **kwargs) -> Ride:
    """RIDE on a small backbone, with 7 classes and native heads by default."""
    torch.manual_seed(seed)
    given = dict(backbone=backbone, num_classes=7, use_norm=False) | BACKBONES[backbone][1] | kwargs
    return timm.create_model("ride", **given)


def images(backbone, B=2, seed=1):
    size = BACKBONES[backbone][0]
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(seed))


def lively(backbone) -> nn.Module:
    """Create the backbone with every part active.

    Layer scales are near 1, BatchNorm statistics those of a batch.
    """
    torch.manual_seed(3)
    net = timm.create_model(backbone, num_classes=7, **BACKBONES[backbone][1])
    with torch.no_grad():
        for p in net.parameters():
            nn.init.normal_(p, std=p[0].numel() ** -0.5) if p.ndim > 1 else nn.init.normal_(p, 1.0, 0.1)
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
        net.train()(images(backbone, 4, seed=9))
    return net.eval()


def native(key: str) -> str:
    """Name of a parameter in the backbone."""
    return re.sub(r"^(trunk|experts\.\d+\.stages)\.net\.", "", key)


def weights_of(net: nn.Module, model: Ride) -> dict:
    """Rename the backbone's weights to those of `model`, alike for every expert."""
    head = next(name for name, module in net.named_modules() if module is net.get_classifier())
    theirs, ours = net.state_dict(), {}
    for key in model.state_dict():
        ours[key] = theirs[re.sub(r"^experts\.\d+\.fc\.", f"{head}.", native(key))]
    return ours


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
