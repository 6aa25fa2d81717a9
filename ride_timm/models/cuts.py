"""Cuts of timm networks into a trunk and experts, by a table of families."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Optional

import torch
from torch import Tensor, nn


class Skip(nn.Sequential):
    """Identity in place of a part of a network; accepts any part's arguments."""

    def forward(
        self,
        x: Tensor,
        rope: Optional[Tensor] = None,  # noqa: UP045  (TorchScript)
        shared_rel_pos_bias: Optional[Tensor] = None,  # noqa: UP045
        attn_mask: Optional[Tensor] = None,  # noqa: UP045
        is_causal: bool = False,
        pre_logits: bool = False,
    ) -> Tensor:
        return x

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Do nothing: there is nothing to recompute."""


class SkipEmbed(nn.Module):
    """Identity in place of a patch embedding.

    Takes tokens [B, N, D] or, from callers that expect an image, [B, N, D, 1].
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2)


@dataclass(frozen=True)
class Cut:
    """The parts of a family, as patterns of module names.

    stem: modules before the stages, in order; stages: modules of each stage, the first one naming it, or one pattern
    for stages of one module each; own: fraction of the stages that belongs to each expert by default; tokens: features
    are [B, N, D] with prefix tokens; shared: modules read by every stage, so that trunk and experts keep them;
    adapted: layers in the stages that take a low-rank update where experts are adapters, none if the family has none.
    """

    stem: tuple[str, ...]
    stages: str | tuple[tuple[str, ...], ...]
    own: float = 1 / 2
    tokens: bool = False
    shared: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()


_STEM_STAGES = Cut(("stem",), "stages.*")
_VIT_STEM = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
_ATTENTION = ("attn.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj")
_MLP = ("mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")  # fc1_g and fc1_x: SwiGLU
_PATCH_LAYERS = Cut(("patch_embed",), "layers.*")
_CONV_BLOCKS = Cut(("conv_stem", "bn1"), "blocks.*")
_DENSE_STAGES = (
    ("features.denseblock1",),
    ("features.denseblock2", "features.transition1"),
    ("features.denseblock3", "features.transition2"),
    ("features.denseblock4", "features.transition3", "features.norm5"),
)

CUTS = {
    "Beit": Cut(_VIT_STEM, "blocks.*", own=1 / 3, tokens=True, shared=("rel_pos_bias",)),
    "ByobNet": _STEM_STAGES,
    "ConvNeXt": Cut(("stem",), "stages.*", adapted=_MLP),
    "CspNet": _STEM_STAGES,
    "DaVit": _STEM_STAGES,
    "DenseNet": Cut(("features.conv*", "features.norm[0-4]", "features.pool*"), _DENSE_STAGES),
    "EdgeNeXt": _STEM_STAGES,
    "EfficientNet": _CONV_BLOCKS,
    "Eva": Cut(_VIT_STEM, "blocks.*", own=1 / 3, tokens=True, shared=("rope",), adapted=(*_ATTENTION, *_MLP)),
    "FocalNet": Cut(("stem",), "layers.*"),
    "GhostNet": Cut(("conv_stem", "bn1", "act1"), "blocks.*"),
    "HighPerfGpuNet": _STEM_STAGES,
    "MambaOut": _STEM_STAGES,
    "MaxxVit": _STEM_STAGES,
    "MetaFormer": _STEM_STAGES,
    "MetaNeXt": _STEM_STAGES,
    "MobileNetV3": _CONV_BLOCKS,
    "NextViT": _STEM_STAGES,
    "NormFreeNet": _STEM_STAGES,
    "PyramidVisionTransformerV2": Cut(("patch_embed",), "stages.*"),
    "RDNet": Cut(("stem",), "dense_stages.*"),
    "RegNet": Cut(("stem",), (("s1",), ("s2",), ("s3",), ("s4",))),
    "ResNet": Cut(("conv1", "bn1", "act1", "maxpool"), (("layer1",), ("layer2",), ("layer3",), ("layer4",))),
    "ResNetV2": _STEM_STAGES,
    "StarNet": _STEM_STAGES,
    "SwinTransformer": _PATCH_LAYERS,
    "SwinTransformerV2": _PATCH_LAYERS,
    "SwinTransformerV2Cr": Cut(("patch_embed",), "stages.*"),
    "TinyVit": Cut(("patch_embed",), "stages.*"),
    "VisionTransformer": Cut(_VIT_STEM, "blocks.*", own=1 / 3, tokens=True, adapted=(*_ATTENTION, *_MLP)),
    "VovNet": _STEM_STAGES,
}

_TWO_HEADS = "it has two classifiers, one of them for distillation, and an expert has one"
_SIDE_VALUES = "its stages return more than one tensor"
REASONS = {
    "VisionTransformerDistilled": _TWO_HEADS,
    "LevitDistilled": _TWO_HEADS,
    "EfficientFormer": _TWO_HEADS,
    "EfficientFormerV2": _TWO_HEADS,
    "RepVit": _TWO_HEADS,
    "HighResolutionNet": _SIDE_VALUES,
    "MultiScaleVit": _SIDE_VALUES,
    "CrossVit": _SIDE_VALUES,
    "Xcit": _SIDE_VALUES,
    "Ride": "it has experts already",
}


def _name(net: nn.Module) -> str:
    return next((cls.__name__ for cls in type(net).__mro__ if cls.__name__ == "Ride"), type(net).__name__)


def find_cut(net: nn.Module, backbone: str) -> Cut:
    """Look up the cut of a network's class; ValueError if it has none.

    Only the exact class counts, since a subclass may compute something else.
    """
    name = _name(net)
    if name not in CUTS or not type(net).__module__.startswith("timm."):
        reason = REASONS.get(name, "no cut into a trunk and experts is known for this family")
        raise ValueError(
            f"backbone={backbone!r} is a {name} and cannot be cut: {reason}. Families that can: {', '.join(CUTS)}."
        )
    if not isinstance(net.get_classifier(), nn.Module):
        raise ValueError(f"backbone={backbone!r} cannot be cut: {_TWO_HEADS}.")
    return CUTS[name]


def check_positions(net: nn.Module, backbone: str) -> None:
    """Raise ValueError if rotary positions depend on a grid that experts do not see."""
    if getattr(net, "rope", None) is not None:
        for option, attribute in (("dynamic_img_size", "dynamic_img_size"), ("patch_drop_rate", "patch_drop")):
            if getattr(net, attribute, None):
                raise ValueError(
                    f"backbone={backbone!r} with {option} cannot be cut: experts do not see its tokens' positions. "
                    f"Create it with {option}=0 and a fixed img_size."
                )


def _modules(net: nn.Module, pattern: str) -> list[str]:
    depth = pattern.count(".")
    return [name for name, _ in net.named_modules() if name.count(".") == depth and fnmatchcase(name, pattern)]


def stage_names(net: nn.Module, cut: Cut) -> list[tuple[str, ...]]:
    """List the modules of every stage in order; the first one names the stage."""
    if isinstance(cut.stages, str):
        return [(name,) for name in _modules(net, cut.stages)]
    return list(cut.stages)


def resolve_split(net: nn.Module, cut: Cut, backbone: str, split: str | None) -> int:
    """Find the index of the first stage of the experts; ValueError lists the names."""
    names = [stage[0] for stage in stage_names(net, cut)]
    if split is None:
        return len(names) - max(1, int(len(names) * cut.own))
    if split not in names[1:]:
        raise ValueError(f"split={split!r}: {backbone} can be split before {', '.join(names[1:]) or 'no stage'}.")
    return names.index(split)


def stem_names(net: nn.Module, cut: Cut) -> list[str]:
    """List the stem's modules, of a Sequential its children.

    Some networks rely on the length of the Sequential, so it stays.
    """
    names = []
    for name in (name for pattern in cut.stem for name in _modules(net, pattern)):
        stem = net.get_submodule(name)
        inner = [f"{name}.{child}" for child, _ in stem.named_children()] if type(stem) is nn.Sequential else []
        names += inner or [name]
    return names


def skip(net: nn.Module, names: Iterable[str], by: type[nn.Module] = Skip) -> None:
    """Replace these modules by identities."""
    for name in names:
        parent, _, child = name.rpartition(".")
        net.get_submodule(parent)._modules[child] = by().train(net.training)


def keep_trunk(net: nn.Module, cut: Cut, split: int) -> nn.Module:
    """Strip a network to its stem and first `split` stages, without idle parameters."""
    stages = stage_names(net, cut)
    skip(net, (name for stage in stages[split:] for name in stage))
    kept = {name.split(".")[0] for name in (*stem_names(net, cut), *(stage[0] for stage in stages), *cut.shared)}
    skip(net, [name for name, _ in net.named_children() if name not in kept])
    return net


def keep_expert(net: nn.Module, cut: Cut, split: int) -> nn.Module:
    """Strip a network to the stages from `split` on, its norm and its head.

    Names keep their index.
    """
    skip(net, stem_names(net, cut))
    if cut.tokens:
        skip(net, ["patch_embed"], SkipEmbed)
    skip(net, (name for stage in stage_names(net, cut)[:split] for name in stage))
    for name, value in list(net._parameters.items()):  # class token, registers, positions: added in the trunk
        setattr(net, name, None)
        if type(net).__name__ == "Beit" and name == "cls_token":  # always prepended: prepend an empty one
            delattr(net, name)
            net.register_buffer(name, torch.empty_like(value.detach()[:, :0]), persistent=False)
    if cut.tokens and "patch_drop" in dict(net.named_children()) and type(net).__name__ == "Eva":
        net.patch_drop = None  # Eva's returns two values
    return net
