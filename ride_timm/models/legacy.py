"""Load the authors' checkpoints without executing anything they contain."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import multimode
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..errors import InputError
from .heads import CosineClassifier
from .release import check_finite
from .ride import Ride
from .ride_resnet import FULL_PLANES, REDUCED_PLANES

_NAMES = {(1, 1, 1, 1): "10", (3, 4, 6, 3): "50", (3, 4, 23, 3): "101", (3, 8, 36, 3): "152"}
_ROUTER_KEYS = {"hidden": "expert_help_pred_hidden_fcs", "fc": "expert_help_pred_fcs"}


class _Inert:
    """Inert object in place of any class that a checkpoint names.

    Such classes are the authors' ConfigParser, paths and loggers.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by the authors' names.

    Prefixes `module.` and `backbone.` are stripped.
    Uses torch's restricted unpickler; objects that need an import are replaced by inert ones.
    Raises InputError for a file that is not a checkpoint of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"checkpoint {path}: no such file.")
    try:
        foreign = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([(_Inert, name) for name in foreign]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any type, from a damaged pickle
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"checkpoint {path}: not a readable torch checkpoint ({reason})") from error
    state_dict = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state_dict, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state_dict.items()
    ):
        raise InputError(f"checkpoint {path}: expected a dict of tensors under 'state_dict'.")
    return {re.sub(r"^(module\.)?(backbone\.)?", "", key): value for key, value in state_dict.items()}


def _size(state_dict: dict[str, Tensor], key: str, dim: int) -> int:
    if key not in state_dict:
        raise InputError(f"not a RIDE checkpoint of the authors: tensor {key!r} is missing.")
    shape = state_dict[key].shape
    if dim >= len(shape):
        raise InputError(f"not a RIDE checkpoint of the authors: tensor {key!r} has shape {list(shape)}.")
    return shape[dim]


def _highest(state_dict: dict[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the pattern's group matches; or 0."""
    return max((int(match[1]) + 1 for key in state_dict if (match := re.match(pattern, key))), default=0)


def _has(state_dict: dict[str, Tensor], pattern: str) -> bool:
    return any(re.match(pattern, key) for key in state_dict)


def infer_architecture(state_dict: dict[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Infer model name and arguments from an authors' checkpoint.

    They are for `timm.create_model`, and follow from names and shapes of the tensors.
    """
    # the most frequent count, so that a single missing or extra tensor is reported as such
    counts = [_highest(state_dict, rf"{part}s\.(\d+)\.") for part in ("layer2", "layer3", "layer4", "linear")]
    num_experts = max(multimode(count for count in counts if count), default=1)
    head = "linears.0" if _has(state_dict, r"linears\.") else "linear"
    use_norm = not _has(state_dict, r"linears?\.(\d+\.)?bias")
    kernel_size = _size(state_dict, "conv1.weight", 3)
    kwargs: dict[str, Any] = dict(
        num_experts=num_experts,
        num_classes=_size(state_dict, f"{head}.weight", 1 if use_norm else 0),
        use_norm=use_norm,
        in_chans=_size(state_dict, "conv1.weight", 1),
    )

    def width(stage: int) -> int:
        name = f"layer{stage}s.0" if _has(state_dict, rf"layer{stage}s\.") else f"layer{stage}"
        if _has(state_dict, r"layer\w+\.(0\.)?0\.conv3\."):
            return _size(state_dict, f"{name}.0.conv3.weight", 0) // 4
        return _size(state_dict, f"{name}.0.conv2.weight", 0)

    if kernel_size == 3:
        name, own, reduced, full = "ride_resnet32", (2, 3), (24, 48), (32, 64)
    else:
        blocks = tuple(_highest(state_dict, rf"layer{i}(?:s\.\d+)?\.(\d+)\.") for i in (1, 2, 3, 4))
        if blocks not in _NAMES:
            raise InputError(f"the authors have no network of {blocks} blocks: expected one of {list(_NAMES)}.")
        middle = [_size(state_dict, "layer1.0.conv2.weight", dim) for dim in (0, 1)]
        resnext = "layer1.0.conv3.weight" in state_dict and middle[0] != middle[1]
        name, own = ("ride_resnext" if resnext else "ride_resnet") + _NAMES[blocks], (3, 4)
        reduced, full = REDUCED_PLANES[2:], FULL_PLANES[2:]
        if num_experts > 1 and _has(state_dict, r"layer3\.") and not _has(state_dict, r"layer3s\."):
            kwargs["share_layer3"] = True
    widths = (width(own[0]), width(own[1]))
    kwargs["reduce_dimension"] = widths != full
    if widths not in (reduced, full):
        kwargs.update({f"layer{stage}_output_dim": planes for stage, planes in zip(own, widths, strict=True)})
    if _has(state_dict, r"expert_help_pred_"):
        shared = not _has(state_dict, r"expert_help_pred_fcs\.")
        last = "expert_help_pred_fc.weight" if shared else "expert_help_pred_fcs.0.weight"
        hidden = _size(state_dict, "expert_help_pred_hidden_fcs.0.weight", 0)
        kwargs.update(
            router=True,
            top_choices_num=_size(state_dict, last, 1) - hidden,
            share_expert_help_pred_fc=shared,
        )
    return name, kwargs


def _legacy_key(key: str, model: Ride) -> str:
    """Translate the name of a tensor to the authors'."""
    part, _, rest = key.partition(".")
    if part == "trunk":
        return rest
    if part == "router":
        kind, i, rest = rest.split(".", 2)
        if kind == "fc" and model.router and model.router.share_expert_help_pred_fc:
            return f"expert_help_pred_fc.{rest}"
        return f"{_ROUTER_KEYS[kind]}.{i}.{rest}"
    i, rest = rest.split(".", 1)
    if rest.startswith("fc."):
        return rest.replace("fc.", f"linears.{i}." if model.num_experts > 1 else "linear.")
    _, stage, rest = rest.split(".", 2)
    return f"{stage}s.{i}.{rest}" if model.num_experts > 1 else f"{stage}.{rest}"


def convert_state_dict(state_dict: dict[str, Tensor], model: Ride) -> dict[str, Tensor]:
    """Convert the authors' tensors to the names and layout of `model`.

    Raises InputError that lists tensors that are missing, unexpected or of another shape.
    """
    cosine = isinstance(model.get_classifier()[0], CosineClassifier)
    converted, problems, used = {}, [], set()
    for key, ours in model.state_dict().items():
        legacy = _legacy_key(key, model)
        used.add(legacy)
        if legacy not in state_dict:
            problems.append(f"missing {legacy}")
            continue
        transposed = cosine and re.fullmatch(r"experts\.\d+\.fc\.weight", key)  # theirs is [D, C]
        found, expected = list(state_dict[legacy].shape), list(ours.shape)[:: -1 if transposed else 1]
        if found != expected:
            problems.append(f"{legacy} has shape {found}, expected {expected}")
            continue
        converted[key] = state_dict[legacy].t().contiguous() if transposed else state_dict[legacy]
    problems += [f"unexpected {key}" for key in state_dict if key not in used]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise InputError(f"the checkpoint does not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}")
    return converted


def load_legacy(path: str | Path) -> Ride:
    """Load an authors' `.pth` checkpoint as a model in eval mode.

    The architecture is inferred from the tensors.
    Raises InputError for a file that cannot be read, is not such a checkpoint, or holds values that are not finite.
    """
    state_dict = read_state_dict(path)
    check_finite(state_dict, f"checkpoint {path}")
    try:
        name, kwargs = infer_architecture(state_dict)
        tags = get_arch_pretrained_cfgs(name)
        tag = next((t for t, cfg in tags.items() if cfg.num_classes == kwargs["num_classes"]), None)
        model = timm.create_model(tag or name, **(dict(router=False) | kwargs))  # a tag may ask for a router
        model.load_state_dict(convert_state_dict(state_dict, model))
        model.pretrained_cfg = {**model.pretrained_cfg, "hf_hub_id": None}  # the tag's release is another network
    except (ValueError, TypeError, RuntimeError) as error:  # also of shapes that no network can be built with
        raise InputError(f"checkpoint {path}: {error}") from error
    return model.eval()
