"""RIDE on any timm backbone listed in `cuts.py`.

timm.create_model("ride", backbone="convnext_tiny")
"""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Callable
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
)
from timm.models._input import get_model_args
from torch import Tensor, nn

from ..errors import first_line
from .adapters import add_updates, check_adapter, copy_sharing_parameters, freeze, is_update, merge_updates
from .backbone_weights import load_backbone
from .create import Parts, create_ride, ride_cfg
from .cuts import (
    check_positions,
    find_cut,
    keep_expert,
    keep_trunk,
    resolve_split,
    stage_names,
)
from .experts import Experts
from .release import with_releases
from .ride import Ride
from .timm_stages import TimmExpert, TimmStages, classifier_name

DEFAULT_BACKBONE = "resnet18"


def _nested(pattern: str) -> str:
    """Extend a native matcher's pattern to the same names inside trunk and experts."""
    return r"^(?:trunk|experts\.\d+\.stages)\.net\.(?:" + re.sub(r"(^|[|(])\^", r"\1", pattern) + ")"


class AnyRide(Ride):
    """`Ride` on stripped timm networks, whose own rules group the parameters.

    Where experts are adapters, all share the frozen parameters of their stages. In a state dict these have the names of
    the first expert.
    """

    __jit_unused_properties__ = (*Ride.__jit_unused_properties__, "has_adapters", "all_tied_weights_keys")

    @property
    def has_adapters(self) -> bool:
        return any(is_update(name) for name, _ in self.experts[0].named_parameters())

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Name of each shared parameter in the further experts -> its name in the first.

        transformers reads this property when it loads a release.
        """
        if not self.has_adapters:
            return {}
        shared = [name for name, _ in self.experts[0].stages.named_parameters() if not is_update(name)]
        further = range(1, self.num_experts)
        return {f"experts.{i}.stages.{name}": f"experts.0.stages.{name}" for i in further for name in shared}

    def _tie(self) -> None:
        for name, first in self.all_tied_weights_keys.items():
            module, _, parameter = name.rpartition(".")
            setattr(self.get_submodule(module), parameter, self.get_parameter(first))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Every tensor once, except on the meta device, where transformers looks for the names to tie."""
        state, prefix = super().state_dict(*args, **kwargs), kwargs.get("prefix", "")
        for name in self.all_tied_weights_keys:
            if not state[prefix + name].is_meta:
                del state[prefix + name]
        return state

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, first in self.all_tied_weights_keys.items():
            if prefix + first in state:
                state[prefix + name] = state[prefix + first]
        super()._load_from_state_dict(state, prefix, *args)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        loaded = super().load_state_dict(*args, **kwargs)
        self._tie()  # `assign` replaces parameters
        return loaded

    def _apply(self, *args: Any, **kwargs: Any) -> AnyRide:
        super()._apply(*args, **kwargs)
        self._tie()  # `to_empty` replaces parameters
        return self

    @torch.jit.ignore
    def frozen_names(self) -> set[str]:
        if not self.has_adapters:
            return set()
        frozen = re.compile(r"trunk\.|experts\.\d+\.stages\.")
        return {name for name in self.state_dict() if frozen.match(name) and not is_update(name)}

    @torch.jit.ignore
    def merge_adapters(self) -> AnyRide:
        """Give each expert stages of its own, with its updates added to their weights.

        The model becomes a network without adapters, all of whose parameters are trainable.
        """
        if self.has_adapters:
            self.experts = Experts(deepcopy(expert) for expert in self.experts)
            for expert in self.experts:
                merge_updates(expert.stages.net)
            self.requires_grad_(True)
            args = get_model_args(self)
            self._model_args = {key: value for key, value in args.items() if not key.startswith("adapter")}
        return self

    def __prepare_scriptable__(self) -> AnyRide:
        """The network that `torch.jit.script` compiles, which has no rule for peft."""
        return deepcopy(self).merge_adapters() if self.has_adapters else self

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        net, cut = self.trunk.net, self.trunk.cut
        if not hasattr(net, "group_matcher"):  # MetaFormer: group by stage
            stages = stage_names(net, cut)[0][0].rpartition(".")[0]
            return dict(stem=_nested("|".join(cut.stem)), blocks=_nested(rf"{re.escape(stages)}\.(\d+)"))
        native = net.group_matcher(coarse)
        groups: dict[str, Any] = {}
        for name, spec in native.items():
            if isinstance(spec, str):
                groups[name] = _nested(spec)
            elif spec is not None:
                groups[name] = [(_nested(pattern), suffix) for pattern, suffix in spec]
        return groups

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names: set[str] = set()
        for prefix, module in self.named_modules():
            if isinstance(module, TimmStages) and hasattr(module.net, "no_weight_decay"):
                patterns = module.net.no_weight_decay()
                for name, _ in module.net.named_parameters():
                    if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
                        names.add(f"{prefix}.net.{name}")
        return names


def fit_to_size(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resample positions and windows of weights saved at another image size.

    Uses the rule of the native network.
    """
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    for prefix, stages in model.named_modules():
        if not isinstance(stages, TimmStages):
            continue
        start = f"{prefix}.net."
        own = {key: value for key, value in state.items() if key.startswith(start)}
        rule = getattr(sys.modules[type(stages.net).__module__], "checkpoint_filter_fn", None)
        if rule is not None and any(value.shape != shapes.get(key, value.shape) for key, value in own.items()):
            fitted = rule({key.removeprefix(start): value for key, value in own.items()}, stages.net)
            others = {key: value for key, value in state.items() if key not in own}
            state = others | {start + key: value for key, value in fitted.items()}
    return state


def _backbone_cfg(backbone: str) -> PretrainedCfg:
    """Get timm's pretrained cfg of a backbone; ValueError if there is no such model."""
    if not isinstance(backbone, str) or not timm.is_model(backbone.partition(".")[0]):
        close = get_close_matches(str(backbone), timm.list_models(), 3)
        raise ValueError(
            f"backbone={backbone!r}: timm has no such model" + (f"; did you mean {', '.join(close)}?" if close else ".")
        )
    try:
        return get_pretrained_cfg(backbone)
    except RuntimeError as error:
        raise ValueError(f"backbone={backbone!r}: {error}") from error


def timm_parts(
    backbone: str,
    num_classes: int,
    in_chans: int,
    split: str | None = None,
    backbone_pretrained: bool | str | Path = False,
    use_norm: bool = True,
    adapter: str | None = None,
    adapter_rank: int = 8,
    **backbone_args: Any,
) -> Parts:
    """Share the stem and first stages of a timm network; the rest per expert.

    split: name of the first stage owned by each expert (default: the last half of the stages, for a plain transformer
    the last third of the blocks); backbone_pretrained: initialise trunk and experts from the backbone's published
    weights, or from a file of such weights, so that experts differ only by their new classifiers;
    use_norm: cosine heads (scale 30) instead of the native ones; adapter: "lora" shares the whole backbone, frozen, and
    gives each expert low-rank updates of rank `adapter_rank` and a classifier; backbone_args: arguments of the
    backbone, such as img_size, drop_path_rate, global_pool.
    """
    _backbone_cfg(backbone)

    def make(**kwargs: Any) -> nn.Module:
        return timm.create_model(backbone, num_classes=num_classes, in_chans=in_chans, **backbone_args, **kwargs)

    net = load_backbone(make, backbone, backbone_pretrained) if backbone_pretrained else make()
    cut = find_cut(net, backbone)
    check_positions(net, backbone)
    source: nn.Module | None = None
    copy: Callable[[nn.Module], nn.Module] = deepcopy
    if adapter is not None:
        check_adapter(adapter, adapter_rank, net, backbone, cut.adapted)
        source, copy = freeze(deepcopy(net)), copy_sharing_parameters
        net.requires_grad_(False)
    elif backbone_pretrained:
        source = deepcopy(net)
    first = resolve_split(net, cut, backbone, split)
    total = len(stage_names(net, cut))

    def make_expert() -> TimmExpert:
        tail = make() if source is None else copy(source)
        if source is not None:
            tail.reset_classifier(num_classes)
        expert = TimmExpert(TimmStages(keep_expert(tail, cut, first), cut, range(first, total)), use_norm)
        expert.drop_rate = backbone_args.get("drop_rate", 0.0)
        if adapter is not None:
            add_updates(expert.stages.net, cut.adapted, adapter_rank)
        return expert

    return TimmStages(keep_trunk(net, cut, first), cut, range(first)), make_expert


_FROM_BACKBONE = ("input_size", "test_input_size", "min_input_size", "fixed_input_size", "pool_size", "crop_pct",
                  "crop_mode", "interpolation", "mean", "std", "num_classes")  # fmt: skip


def _cfg(backbone: str, **kwargs: Any) -> dict[str, Any]:
    """Translate the backbone's pretrained cfg: the same input, our module names."""
    cfg = _backbone_cfg(backbone)
    first_conv = (cfg.first_conv,) if isinstance(cfg.first_conv, str) else tuple(cfg.first_conv or ())
    ours = {key: getattr(cfg, key) for key in _FROM_BACKBONE}
    return ride_cfg(**ours, first_conv=tuple(f"trunk.net.{name}" for name in first_conv), **kwargs)


def _create(variant: str, backbone: str, pretrained: bool, kwargs: dict[str, Any]) -> Ride:
    _backbone_cfg(backbone)
    probe = _probe(backbone, **kwargs)
    kwargs["pretrained_filter_fn"] = fit_to_size
    levels = 3 if find_cut(probe, backbone).tokens else tuple(range(len(probe.feature_info)))  # timm's defaults
    saved = kwargs.get("pretrained_model_args") or {}
    if pretrained or kwargs.get("backbone_pretrained") == saved.get("backbone_pretrained"):
        kwargs["backbone_pretrained"] = False  # of a saved network, whose own weights follow
    return create_ride(
        timm_parts,
        variant,
        pretrained,
        levels=levels,
        model_cls=AnyRide,
        classifier_layer=_classifier_layer(probe),
        backbone=backbone,
        **kwargs,
    )


def _probe(backbone: str, img_size: Any = None, patch_size: Any = None, **_: Any) -> nn.Module:
    """The backbone on the meta device; ValueError if it does not take images as small as `img_size`."""
    given = {key: value for key, value in (("img_size", img_size), ("patch_size", patch_size)) if value is not None}
    try:
        with torch.device("meta"):
            probe = timm.create_model(backbone, **given)
    except RuntimeError as error:  # of windows: a dimension below 0
        if img_size is None:
            raise
        raise ValueError(_too_small(backbone, img_size, first_line(error))) from error
    patch = getattr(getattr(probe, "patch_embed", None), "patch_size", None)
    if img_size is not None and patch is not None and min(to_2tuple(img_size)) < max(to_2tuple(patch)):
        edges = to_2tuple(patch)
        raise ValueError(_too_small(backbone, img_size, f"its patches are of {edges[0]} x {edges[1]}"))
    return probe


def _too_small(backbone: str, img_size: Any, reason: str) -> str:
    size = " x ".join(map(str, to_2tuple(img_size)))
    return (
        f"backbone={backbone!r} takes no images of {size} pixels ({reason}): choose a larger image size (img_size, "
        "--input-size)."
    )


def _classifier_layer(net: nn.Module) -> str:
    """The layer of a native classifier that depends on the classes, such as ".fc2".

    "" if the classifier is one layer.
    """
    name, layer = classifier_name(net), net.pretrained_cfg["classifier"]
    return layer.removeprefix(name) if isinstance(layer, str) and layer.startswith(f"{name}.") else ""


NAMED = {
    "ride_swin_tiny": "swin_tiny_patch4_window7_224",
    "ride_swin_small": "swin_small_patch4_window7_224",
    "ride_convnext_tiny": "convnext_tiny",
    "ride_vit_small_patch16_224": "vit_small_patch16_224",
}

default_cfgs = generate_default_cfgs(
    with_releases(
        {f"{name}.imagenet_lt": _cfg(backbone) for name, backbone in NAMED.items()}
        | {"ride.untrained": _cfg(DEFAULT_BACKBONE)}
    )
)


def _create_named(name: str, pretrained: bool, kwargs: dict[str, Any]) -> Ride:
    return _create(name, NAMED[name], pretrained, kwargs)


@register_model
def ride(pretrained: bool = False, **kwargs: Any) -> Ride:
    """Any timm backbone listed in `cuts.py`, by default ResNet-18; cosine heads."""
    backbone = kwargs.pop("backbone", DEFAULT_BACKBONE)
    given = kwargs.get("pretrained_cfg")
    given = given.to_dict() if isinstance(given, PretrainedCfg) else given
    # the cfg of a saved network is kept; timm's scripts pass the registered one
    if not isinstance(given, dict) or given == get_pretrained_cfg("ride").to_dict():
        cfg = {key: value for key, value in _cfg(backbone).items() if key in (*_FROM_BACKBONE, "first_conv")}
        kwargs["pretrained_cfg_overlay"] = cfg | (kwargs.get("pretrained_cfg_overlay") or {})
    return _create("ride", backbone, pretrained, kwargs)


@register_model
def ride_swin_tiny(pretrained: bool = False, **kwargs: Any) -> Ride:
    """Swin-T, patches and stages 1-2 shared, stages 3-4 per expert; cosine heads."""
    return _create_named("ride_swin_tiny", pretrained, kwargs)


@register_model
def ride_swin_small(pretrained: bool = False, **kwargs: Any) -> Ride:
    """Swin-S, patches and stages 1-2 shared, stages 3-4 per expert; cosine heads."""
    return _create_named("ride_swin_small", pretrained, kwargs)


@register_model
def ride_convnext_tiny(pretrained: bool = False, **kwargs: Any) -> Ride:
    """ConvNeXt-T, stem and stages 1-2 shared, stages 3-4 per expert; cosine heads."""
    return _create_named("ride_convnext_tiny", pretrained, kwargs)


@register_model
def ride_vit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Ride:
    """ViT-S/16, embedding and blocks 1-8 shared, blocks 9-12 per expert; cosine heads."""
    return _create_named("ride_vit_small_patch16_224", pretrained, kwargs)
