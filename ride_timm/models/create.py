"""Build any RIDE network through timm's factory: its cfg, its release, its parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from timm.models import build_model_with_cfg
from torch import nn

from .download import find_release
from .experts import Expert
from .release import check_arguments, tag_arguments
from .ride import Ride
from .router import Router

Parts = tuple[nn.Module, Callable[[], Expert]]  # a trunk, and a function that makes (and initialises) one expert


def ride_cfg(**kwargs: Any) -> dict[str, Any]:
    """A pretrained cfg for timm: what the weights of a tag expect as input."""
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
    parts: Parts,
    num_classes: int,
    in_chans: int,
    model_cls: type[Ride],
    *,
    num_experts: int = 3,
    router: bool = False,
    top_choices_num: int = 5,
    share_expert_help_pred_fc: bool = True,
    routed: bool = False,
    class_affine: bool = False,
) -> Ride:
    """Join a trunk, `num_experts` experts and, for `router`, the gates of stage two.

    top_choices_num, share_expert_help_pred_fc: see `Router`; routed: `forward` uses the router in eval mode;
    class_affine: classifiers with a scale and an offset per class, as re-balancing and alignment leave them.
    """
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes}: expected 0 or more.")
    trunk, make_expert = parts
    experts = [make_expert() for _ in range(num_experts)]
    gates = None
    if router:
        num_features = experts[0].head_hidden_size
        gates = Router(num_experts, num_features, num_classes, top_choices_num, share_expert_help_pred_fc)
    model = model_cls(trunk, experts, num_classes, in_chans, gates, routed)
    if class_affine:
        model.add_class_affine()
    return model


_ENSEMBLE = inspect.getfullargspec(assemble).kwonlydefaults or {}  # arguments that every network takes


def _classifier_names(layer: str, args: dict[str, Any]) -> tuple[str, ...]:
    """Name the modules that depend on the classes.

    These are all classifiers, and the router's layers, which read the logits.
    """
    num_experts = args["num_experts"]
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
        raise ValueError(f"num_experts={num_experts!r}: expected a whole number, 1 or more.")
    layer = "" if args.get("use_norm", True) else layer  # a cosine head is one layer
    heads = (f"fc.head{layer}", "fc.affine") if args["class_affine"] else (f"fc{layer}",)
    names = [f"experts.{i}.{head}" for i in range(num_experts) for head in heads]
    if args["router"]:
        num_last = 1 if args["share_expert_help_pred_fc"] else num_experts - 1
        names += [f"router.hidden.{i}" for i in range(num_experts - 1)]
        names += [f"router.fc.{i}" for i in range(num_last)]
    return tuple(names)


def create_ride(
    make_parts: Callable[..., Parts],
    variant: str,
    pretrained: bool,
    /,  # names that a release's model_args may not use
    *,
    levels: int | tuple[int, ...],
    model_cls: type[Ride] = Ride,
    defaults: dict[str, Any] | None = None,
    classifier_layer: str = "",
    **kwargs: Any,
) -> Ride:
    """Build a network through timm's factory, with released weights if `pretrained`.

    Arguments in `kwargs` take precedence over those of the release, which take precedence over `defaults`.
    levels: out_indices of `features_only`, the last n levels if a number; classifier_layer: the layer of a native
    classifier that depends on the classes, such as ".fc2", "" if it is one layer.
    Raises TypeError for an unknown argument, InputError for a release that cannot be loaded.
    """
    named, overlay = kwargs.get("pretrained_cfg"), dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    saved_args = kwargs.get("pretrained_model_args") or {}
    check_arguments(make_parts, saved_args, "the release", _ENSEMBLE)
    release = find_release(variant, named, overlay, kwargs.get("cache_dir")) if pretrained else None
    released = release.model_args if release else tag_arguments(variant, named)
    check_arguments(make_parts, released, release.where if release else variant, _ENSEMBLE)
    kwargs = _ENSEMBLE | (defaults or {}) | released | kwargs
    if release:
        release.check_sizes()
        kwargs["pretrained_cfg"] = release.pretrained_cfg
    if kwargs.get("num_classes") == 0:
        kwargs["router"] = kwargs["routed"] = False  # gates need logits
    classifier = _classifier_names(classifier_layer, kwargs)
    overlay.setdefault("classifier", classifier)

    def build(device: Any = None, dtype: torch.dtype | None = None, **args: Any) -> Ride:
        ensemble = {key: args.pop(key) for key in _ENSEMBLE if key in args}
        with torch.device(device) if device is not None else nullcontext():
            model = assemble(make_parts(**args), args["num_classes"], args["in_chans"], model_cls, **ensemble)
        if release:
            release.load_into(model, classifier, kwargs.get("pretrained_filter_fn"))
        return model.to(dtype=dtype)

    return build_model_with_cfg(
        build,
        variant,
        pretrained and release is None,
        pretrained_cfg_overlay=overlay,
        feature_cfg=dict(feature_cls="getter", out_indices=levels),
        **kwargs,
    )
