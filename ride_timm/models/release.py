"""Released weights: the table of tags, and the checks before a release is loaded.

A release is a folder or a Hub repository with `config.json` (timm's, plus the sha256 of the weights) and
`model.safetensors`. No other file of it is read, so no pickle can run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg, load_pretrained
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from timm.models._input import get_model_args
from torch import Tensor, nn

from ..errors import InputError
from .ride import Ride
from .weights_file import check_weights

NAMESPACE = "ride-timm"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
DATA_CONFIG = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")  # timm's, of the test transform
WEIGHTS_BY_CALLER = ("file", "url", "state_dict", "hf_hub_id")  # a caller's overlay may name the weights itself
_BY_NAME = ("block", "layers", "cardinality", "base_width")  # set by the network's name
_BY_FACTORY = (
    "make_parts",
    "levels",
    "model_cls",
    "defaults",
    "classifier_layer",
    "pruned",
    "features_only",
    "out_indices",
    "feature_cls",
)
_LARGEST = 1024  # arguments up to this are not compared with the weights
LARGEST_IMAGE = 16384  # pixels a side, of which few networks' weights tell
_SCALARS = (bool, int, float, str, type(None))


def class_names(model: nn.Module) -> list[str]:
    """Names of a model's classes; their numbers from 0 where it states none, or those of other classes."""
    names = model.pretrained_cfg.get("label_names") or ()
    return list(map(str, names if len(names) == model.num_classes else range(model.num_classes)))


@lru_cache
def release_table() -> dict[str, dict[str, Any]]:
    """Read facts about tags that timm's cfgs have no field for.

    By `name.tag`: model_args, sha256, published.
    """
    return json.loads(files(__package__).joinpath("releases.json").read_text(encoding="utf-8"))


def with_releases(cfgs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add the Hub repository to the cfgs of published weights.

    The first tag of a network stays its default, whichever others are published, so that a bare name keeps its classes
    and its input size. timm prefers tags with weights, and above them the last one marked by `*`.
    """
    published = {tag for tag, row in release_table().items() if row.get("published")}
    found = {tag: cfg | (dict(hf_hub_id=f"{NAMESPACE}/{tag}") if tag in published else {}) for tag, cfg in cfgs.items()}
    for tag in {tag.partition(".")[0]: tag for tag in reversed(cfgs)}.values():
        found[f"{tag}*"] = found.pop(tag)
    return found


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Release:
    """A release on this disk whose weights have been checked.

    where: its name in messages; model_args: arguments of the network; pretrained_cfg: timm's.
    """

    where: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    weights: Path

    def check_sizes(self) -> None:
        """InputError for arguments far beyond the weights, before a network is built that takes all time or memory."""
        try:
            with safetensors.safe_open(self.weights, "pt") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{self.where}: {WEIGHTS} is damaged: not loaded ({error_line(error)}).") from error
        experts = {name.split(".")[1] for name in shapes if name.startswith("experts.")}
        largest = max(_LARGEST, *(size for shape in shapes.values() for size in shape))
        limits = dict(num_experts=len(experts), input_size=LARGEST_IMAGE)
        stated = self.model_args | {key: self.pretrained_cfg[key] for key in ("num_classes", "input_size")}
        for key, value in stated.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int | float) and not -largest <= number <= limits.get(key, largest):
                    raise InputError(f"{self.where}: {CONFIG} states {key}={value!r}, too large for its weights.")

    def load_into(
        self,
        model: Ride,
        classifier: tuple[str, ...],
        fit: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
    ) -> None:
        """Load every tensor; other classes or input channels are adapted as timm does.

        classifier: names of the modules that depend on the classes; fit: adapts the tensors to the model, for example
        to another image size. Raises InputError, with the model unchanged, if another tensor is missing, left over,
        of another shape or not finite.
        """
        try:
            tensors = safetensors.torch.load_file(self.weights)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{self.where}: {WEIGHTS} is damaged: not loaded ({error_line(error)}).") from error
        check_finite(tensors, f"{self.where}: {WEIGHTS}")
        if model.router is None and self.model_args.get("router"):  # router=False was asked for
            tensors = {name: value for name, value in tensors.items() if not name.startswith("router.")}
        tensors = fit(tensors, model) if fit else tensors
        cfg = self.pretrained_cfg
        same_classes = model.num_classes == cfg["num_classes"]
        adapted = () if same_classes else tuple(f"{name}." for name in classifier)
        first = cfg.get("first_conv") or ()
        first = (first,) if isinstance(first, str) else tuple(first)
        if model.in_chans != cfg["input_size"][0]:
            adapted += tuple(f"{name}.weight" for name in first)
        problems = _differences(tensors, model.state_dict(), adapted)
        if problems:
            args = ", ".join(f"{key}={value!r}" for key, value in self.model_args.items())
            raise InputError(
                f"{self.where}: the weights do not fit a {cfg['architecture']} made with "
                f"{args or 'its defaults'} and your own arguments: {problems}."
            )
        cfg = dict(cfg, state_dict=tensors, source=None, classifier=classifier, label_offset=0)
        load_pretrained(model, cfg, num_classes=model.num_classes, in_chans=model.in_chans)


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """InputError, naming the first, for weights with NaN or infinite values.

    where: the weights, for the error.
    """
    for name, value in tensors.items():
        if value.is_floating_point() and not (finite := value.float().isfinite()).all():
            count = int((~finite).sum())
            raise InputError(
                f"{where}: {count:,} of the {value.numel():,} values of {name} are NaN or infinite: the weights are "
                "damaged, or their training diverged; take others."
            )


def _differences(theirs: dict[str, Tensor], ours: dict[str, Tensor], adapted: tuple[str, ...]) -> str:
    """Describe in one line why tensors cannot be loaded.

    Tensors whose names start with one of `adapted` may differ.
    """
    problems = [f"missing {name}" for name in ours if name not in theirs and not name.startswith(adapted or ("\0",))]
    for name, value in theirs.items():
        if name.startswith(adapted or ("\0",)):
            continue
        if name not in ours:
            problems.append(f"unexpected {name}")
        elif value.shape != ours[name].shape:
            problems.append(f"{name} has shape {list(value.shape)}, expected {list(ours[name].shape)}")
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    return "; ".join(problems[:4]) + more


def registered_tag(variant: str, named: Any) -> Any:
    """Turn a registered cfg into its tag; return anything else.

    timm's scripts pass the cfg instead of the name.
    """
    cfg = PretrainedCfg(**named) if isinstance(named, dict) else named
    if not isinstance(cfg, PretrainedCfg):
        return named
    known = timm.models.get_arch_pretrained_cfgs(variant).get(f"{variant}.{cfg.tag}")
    return cfg.tag if known is not None and known.to_dict() == cfg.to_dict() else named


def tag_arguments(variant: str, named: Any) -> dict[str, Any]:
    """Look up the model_args of a tag; none for a bare name or another cfg."""
    tag = registered_tag(variant, named)
    if tag is not named and tag == timm.get_pretrained_cfg(variant).tag:
        return {}  # timm's scripts pass the default tag's cfg for a bare name
    return release_table().get(f"{variant}.{tag}", {}).get("model_args", {}) if isinstance(tag, str) else {}


def read_config(path: Path, where: str, variant: str | None = None) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Read and check a release's config.json.

    Returns its content, timm's pretrained cfg, and the sha256 it states or "".
    Raises InputError if it is not timm's, belongs to another network, or names a file outside its folder.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        cfg, architecture, args = load_model_config_from_path(path.parent)
        cfg = PretrainedCfg(**cfg).to_dict()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: {CONFIG} is not that of a timm model ({error_line(error)}).") from error
    if variant is not None and architecture != variant:
        raise InputError(f"{where} holds a {architecture}, expected a {variant}.")
    stated = config["pretrained_cfg"] if isinstance(config.get("pretrained_cfg"), dict) else config
    for key in ("url", "file", "state_dict", "hf_hub_filename", "custom_load"):
        if stated.get(key):
            raise InputError(f"{where}: {CONFIG} names other weights ({key}={stated[key]!r}); only {WEIGHTS} is read.")
    size, num_classes = cfg["input_size"], cfg["num_classes"]
    if not (isinstance(size, list | tuple) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        raise InputError(f"{where}: {CONFIG} states input_size={size!r}, expected [channels, height, width].")
    if not isinstance(num_classes, int) or num_classes < 0:
        raise InputError(f"{where}: {CONFIG} states num_classes={num_classes!r}, expected a whole number.")
    names = cfg.get("label_names")
    # a folder that transformers saved repeats the label_names and the sha256 of the weights that it had loaded
    by_transformers = "transformers_version" in config
    if names is not None and len(names) != num_classes:
        stated = f"{where}: {CONFIG} states {len(names)} label_names for num_classes={num_classes}"
        if not by_transformers:
            raise InputError(f"{stated}.")
        warnings.warn(
            f"{stated}: classes are numbered; pass label_names to transformers' from_pretrained.", stacklevel=2
        )
        cfg["label_names"] = None
    sha256 = "" if by_transformers else config.get("sha256", "")
    if sha256 and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
        raise InputError(f"{where}: {CONFIG} states sha256={sha256!r}, expected 64 hexadecimal digits.")
    return (
        config | dict(architecture=architecture, model_args=args),
        dict(cfg, architecture=architecture, input_size=tuple(size)),
        sha256,
    )


def check_arguments(make_parts: Callable[..., Any], args: dict[str, Any], where: str, also: Iterable[str]) -> None:
    """Raise InputError for model_args that the network does not take.

    Arguments that would reach outside the release are among them.
    make_parts: function whose parameters the network takes; also: further parameters.
    """
    known = inspect.signature(make_parts).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    # parameters of the factories, not of a network; a backbone may take those that our names set
    reserved = {*_BY_FACTORY, *(() if takes_any else _BY_NAME)}
    for factory in (timm.create_model, build_model_with_cfg):
        reserved |= inspect.signature(factory).parameters.keys()
    for key, value in args.items():
        plain = all(isinstance(item, _SCALARS) for item in (value if isinstance(value, list | tuple) else [value]))
        if key in reserved or not (key in known or key in also or takes_any) or not plain:
            raise InputError(f"{where}: {CONFIG} states model_args that the network does not take: {key}={value!r}.")


def without_implied_args(config: dict[str, Any]) -> dict[str, Any]:
    """Drop `model_args` that the library which loads config.json passes itself.

    num_classes always goes: transformers passes it too, and fails on the second one. in_chans and global_pool go where
    they are the network's defaults; others stay, because transformers reads them nowhere else.
    """
    args = {key: value for key, value in config["model_args"].items() if key != "num_classes"}
    asked = {key: value for key, value in args.items() if key not in ("in_chans", "global_pool")}
    with torch.device("meta"):
        network = timm.create_model(config["architecture"], num_classes=config["num_classes"], **asked)
    defaults = get_model_args(network)
    return config | dict(model_args={k: v for k, v in args.items() if k in asked or v != defaults.get(k)})


def save_config(model: Ride, path: Path, **facts: Any) -> None:
    """Write the config.json of saved weights.

    facts: arguments of timm's `save_config_for_hf`, such as data_config.
    """
    # timm saves no defaults, which may change
    args: dict[str, Any] = dict(num_experts=model.num_experts, use_norm=model.experts[0].use_norm)
    if model.router is not None:
        args |= {key: getattr(model.router, key) for key in ("top_choices_num", "share_expert_help_pred_fc")}
    if "backbone" in get_model_args(model):
        args["backbone_pretrained"] = False  # the saved weights replace the backbone's
    save_config_for_hf(model, str(path), model_args=args, **facts)
    config = without_implied_args(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")


def read_folder(folder: Path, variant: str | None = None) -> Release:
    """Read a release in a folder; InputError if it fails a check.

    The weights must have the sha256 that its config.json states, or, of a run folder, that they state themselves.
    """
    where = f"folder {folder}"
    config, cfg, sha256 = read_config(folder / CONFIG, where, variant)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{where} holds no {WEIGHTS}: only safetensors are read (load_legacy reads an authors' .pth).")
    if sha256 and sha256_of(weights) != sha256:
        raise InputError(f"{where}: {WEIGHTS} does not have the sha256 stated in {CONFIG}: damaged or changed.")
    if not sha256:
        check_weights(weights)
    return Release(where, config["model_args"], cfg, weights)


def is_release(folder: Path) -> bool:
    """Tell a release, which may come from anyone, from one's own run folder."""
    try:
        return "sha256" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def error_line(error: BaseException) -> str:
    """Type and message of an error in one line, without tokens of the Hub."""
    text = " ".join(str(error).split())[:200]
    return re.sub(r"hf_\w{4,}", "hf_…", f"{type(error).__name__}: {text}" if text else type(error).__name__)
