"""What every family shares when it meets timm's factory: pretrained cfgs, routers, and building with them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timm.models import build_model_with_cfg

from .class_affine import add_class_affine
from .releases import check_arguments, find_release, tag_arguments
from .ride import Expert, Ride, Stages
from .router import Router

_EVERY_NETWORK = ("class_affine",)  # arguments that the factory takes for all of them


def ride_cfg(**kwargs: Any) -> dict[str, Any]:
    """A pretrained cfg for timm: what the weights of a tag expect."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "trunk.conv1",
        "license": "mit",
        "paper_name": "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts",
        "paper_ids": "arXiv:2010.01809",
        **kwargs,
    }


def assemble(
    trunk: Stages,
    make_expert: Callable[[], Expert],
    *,
    num_experts: int,
    num_classes: int,
    in_chans: int,
    router: bool,
    top_choices_num: int,
    share_expert_help_pred_fc: bool,
    routed: bool,
    model_cls: type[Ride] = Ride,
) -> Ride:
    """A `Ride` of one trunk and `num_experts` experts, each made (and initialised) on its own."""
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes}: expected 0 or more.")
    experts = [make_expert() for _ in range(num_experts)]
    gates = None
    if router:
        num_features = experts[0].head_hidden_size
        gates = Router(num_experts, num_features, num_classes, top_choices_num, share_expert_help_pred_fc)
    return model_cls(trunk, experts, num_classes, in_chans, gates, routed)


def create_ride(
    build: Callable[..., Ride],
    variant: str,
    pretrained: bool,
    /,  # a release's arguments of these names are refused below
    *,
    levels: int | tuple[int, ...],
    defaults: dict[str, Any] | None = None,
    classifier_layer: str = "",
    **kwargs: Any,
) -> Ride:
    """Build through timm's factory, with the weights of a release where `pretrained` asks for them.

    What depends on the classes goes with the cfg by name, so timm can swap it: all experts' heads, and the router's
    layers, which read the logits. The network's `defaults` give way to what a release was made with, and that to
    `kwargs`. levels: those of `features_only`, the last so many where it is a number; classifier_layer: where in
    a native classifier of several layers the classes are, such as ".fc2"; class_affine, for every network: heads with a
    scale and an offset a class, as re-balancing and alignment leave them.
    """
    named, overlay = kwargs.get("pretrained_cfg"), dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    check_arguments(build, kwargs.get("pretrained_model_args") or {}, "the release", _EVERY_NETWORK)
    release = find_release(variant, named, overlay, kwargs.get("cache_dir")) if pretrained else None
    released = release.model_args if release else tag_arguments(variant, named)
    check_arguments(build, released, release.where if release else variant, _EVERY_NETWORK)
    kwargs = dict(num_experts=3) | (defaults or {}) | released | kwargs
    if release:
        kwargs["pretrained_cfg"] = release.pretrained_cfg
    if kwargs.get("num_classes") == 0 and (release or kwargs.get("pretrained_model_args")):
        kwargs["router"] = kwargs["routed"] = False  # of a saved network: no logits, no gates
    num_experts = kwargs["num_experts"]
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
        raise ValueError(f"num_experts={num_experts!r}: expected a whole number, 1 or more.")
    layer = "" if kwargs.get("use_norm") else classifier_layer  # a cosine head is one layer
    heads = (f"fc.head{layer}", "fc.affine") if kwargs.get("class_affine") else (f"fc{layer}",)
    classifier = [f"experts.{i}.{head}" for i in range(num_experts) for head in heads]
    if kwargs.get("router"):
        num_last = 1 if kwargs.get("share_expert_help_pred_fc", True) else num_experts - 1
        classifier += [f"router.hidden.{i}" for i in range(num_experts - 1)]
        classifier += [f"router.fc.{i}" for i in range(num_last)]
    overlay.setdefault("classifier", tuple(classifier))

    def build_on(device: Any = None, dtype: torch.dtype | None = None, class_affine: bool = False, **args: Any) -> Ride:
        with torch.device(device) if device is not None else nullcontext():
            model = build(**args)
            if class_affine:
                add_class_affine(model)
        if release:
            release.load_into(model, tuple(classifier), kwargs.get("pretrained_filter_fn"))
        return model.to(dtype=dtype)

    return build_model_with_cfg(
        build_on,
        variant,
        pretrained and release is None,
        pretrained_cfg_overlay=overlay,
        feature_cfg=dict(feature_cls="getter", out_indices=levels),
        **kwargs,
    )
