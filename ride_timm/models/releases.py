"""Released weights: where a tag's lie on the Hub, what they need, and how they are checked before they are loaded.

A release is a folder or a Hub repository with `config.json` (timm's, and the sha256 of the weights) and
`model.safetensors`. Nothing else in it is ever read here, so no pickle can run.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable
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
from timm.models._hub import hf_split, load_model_config_from_path, save_config_for_hf
from timm.models._input import get_model_args
from torch import Tensor, nn

from ..errors import InputError

NAMESPACE = "ride-timm"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_BY_CALLER = ("file", "url", "state_dict", "hf_hub_id")  # where a caller's overlay may place the weights itself
_BY_NAME = ("block", "layers", "cardinality", "base_width")  # what the network's name decides
_BY_FACTORY = (
    "build",
    "levels",
    "defaults",
    "classifier_layer",
    "pruned",
    "features_only",
    "out_indices",
    "feature_cls",
)
_UNTRAINED = "untrained"  # the tag of a network that has no weights
_SCALARS = (bool, int, float, str, type(None))


@lru_cache
def release_table() -> dict[str, dict[str, Any]]:
    """What stands beside the cfgs, by `name.tag`: model_args that the weights need, their sha256, whether published."""
    return json.loads(files(__package__).joinpath("releases.json").read_text(encoding="utf-8"))


def with_releases(cfgs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cfgs of a family, those of published weights with their place on the Hub.

    The first tag of a network stays its default one, whichever others are published: a bare name keeps its classes and
    its input. timm prefers tags with weights, and to all of them the one with a `*` that comes last.
    """
    places = {tag: dict(hf_hub_id=f"{NAMESPACE}/{tag}") for tag, row in release_table().items() if row.get("published")}
    found = {tag: cfg | places.get(tag, {}) for tag, cfg in cfgs.items()}
    for tag in {tag.partition(".")[0]: tag for tag in reversed(cfgs)}.values():
        found[f"{tag}*"] = found.pop(tag)
    return found


def repository_of(name_and_tag: str) -> str:
    """The Hub repository of a tag: in the namespace RIDE_TIMM_HUB, or in the project's own."""
    namespace = os.environ.get("RIDE_TIMM_HUB") or NAMESPACE
    if not re.fullmatch(r"[A-Za-z0-9]([\w-]|\.(?!\.))*", namespace):
        raise InputError(
            f"RIDE_TIMM_HUB={namespace!r}: expected a user or an organisation of the Hub, like 'ride-timm'."
        )
    return f"{namespace}/{name_and_tag}"


def sha256_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Release:
    """A release whose weights lie on this disk and are what they should be.

    where: what the user would call it; model_args: what the network is to be made with; pretrained_cfg: timm's.
    """

    where: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    weights: Path

    def load_into(
        self,
        model: nn.Module,
        classifier: tuple[str, ...],
        fit: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None = None,
    ) -> None:
        """Every tensor into its place; new classifiers, and a first convolution for other channels, as timm does it.

        classifier: names of what depends on the classes; fit: makes the tensors fit the model, such as one for images
        of another size. InputError where any other tensor is missing, left over or
        of another shape; the model is untouched then.
        """
        try:
            tensors = safetensors.torch.load_file(self.weights)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{self.where}: {WEIGHTS} is damaged, nothing was loaded ({_line(error)}).") from error
        if getattr(model, "router", None) is None and self.model_args.get("router"):  # not wanted: router=False
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
            raise InputError(
                f"{self.where}: the weights do not fit a {cfg['architecture']} made with "
                f"{_arguments(self.model_args) or 'its defaults'} and your own arguments: {problems}."
            )
        cfg = dict(cfg, state_dict=tensors, source=None, classifier=classifier, label_offset=0)
        load_pretrained(model, cfg, num_classes=model.num_classes, in_chans=model.in_chans)


def _differences(theirs: dict[str, Tensor], ours: dict[str, Tensor], adapted: tuple[str, ...]) -> str:
    """What keeps the tensors from being loaded, in one line; tensors whose names start with `adapted` may differ."""
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


def _arguments(args: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in args.items())


def find_release(variant: str, named: Any, overlay: dict[str, Any] | None, cache_dir: str | None) -> Release | None:
    """The release that `pretrained=True` means, downloaded if need be and checked.

    named: timm's `pretrained_cfg`: a tag, None for the default one, or the cfg of `hf-hub:` and `local-dir:`.
    None where the caller says itself where the weights lie (a file, a URL, tensors); InputError for everything that
    keeps the release from being what it should be.
    """
    if any((overlay or {}).get(key) for key in _BY_CALLER):
        return None
    named = _registered_tag(variant, named)
    cfg = PretrainedCfg(**named) if isinstance(named, dict) else named
    if isinstance(cfg, PretrainedCfg) and cfg.source == "local-dir":
        return read_folder(Path(cfg.file), variant)
    if isinstance(cfg, PretrainedCfg) and cfg.source == "hf-hub":
        return download(cfg.hf_hub_id, variant, cache_dir)
    if isinstance(cfg, PretrainedCfg) and any(getattr(cfg, key) for key in _BY_CALLER):
        return None
    tag = named if isinstance(named, str) else (cfg or timm.get_pretrained_cfg(variant)).tag
    name = f"{variant}.{tag}"
    timm.get_pretrained_cfg(name)  # complains of an unknown tag
    if tag == _UNTRAINED:
        backbone = ", or start from its backbone's by backbone_pretrained=True" if variant == "ride" else ""
        raise InputError(
            f"{variant} has no weights of its own: leave pretrained=True out, train it, or name a folder by local-dir:"
            f"{backbone}."
        )
    return download(repository_of(name), variant, cache_dir, tag=name)


def _registered_tag(variant: str, named: Any) -> Any:
    """The tag of a registered cfg, which is what timm's scripts hand in for a name; anything else as it is."""
    cfg = PretrainedCfg(**named) if isinstance(named, dict) else named
    if not isinstance(cfg, PretrainedCfg):
        return named
    known = timm.models.get_arch_pretrained_cfgs(variant).get(f"{variant}.{cfg.tag}")
    return cfg.tag if known is not None and known.to_dict() == cfg.to_dict() else named


def tag_arguments(variant: str, named: Any) -> dict[str, Any]:
    """The arguments beside the cfg of a tag that was named; none for a bare name or another cfg."""
    tag = _registered_tag(variant, named)
    if tag is not named and tag == timm.get_pretrained_cfg(variant).tag:
        return {}  # timm's scripts hand in the default tag's cfg for a bare name
    return release_table().get(f"{variant}.{tag}", {}).get("model_args", {}) if isinstance(tag, str) else {}


# folders


def read_config(path: Path, where: str, variant: str | None = None) -> tuple[dict[str, Any], dict[str, Any], str]:
    """A release's config.json, checked: (all of it, timm's pretrained cfg, the sha256 it states or "").

    InputError where it is not timm's, is another network's, or names anything outside its folder.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        cfg, architecture, args = load_model_config_from_path(path.parent)
        cfg = PretrainedCfg(**cfg).to_dict()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{where}: {CONFIG} is none of a timm model ({_line(error)}).") from error
    if variant is not None and architecture != variant:
        raise InputError(f"{where} holds a {architecture}, not the {variant} that was asked for.")
    stated = config["pretrained_cfg"] if isinstance(config.get("pretrained_cfg"), dict) else config
    for key in ("url", "file", "state_dict", "hf_hub_filename", "custom_load"):
        if stated.get(key):
            raise InputError(
                f"{where}: {CONFIG} names weights elsewhere ({key}={stated[key]!r}); only {WEIGHTS} is read."
            )
    size, num_classes = cfg["input_size"], cfg["num_classes"]
    if not (isinstance(size, list | tuple) and len(size) == 3 and all(isinstance(n, int) and n > 0 for n in size)):
        raise InputError(f"{where}: {CONFIG} states input_size={size!r}, expected [channels, height, width].")
    if not isinstance(num_classes, int) or num_classes < 0:
        raise InputError(f"{where}: {CONFIG} states num_classes={num_classes!r}, expected a whole number.")
    sha256 = config.get("sha256", "")
    if sha256 and not (isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256)):
        raise InputError(f"{where}: {CONFIG} states sha256={sha256!r}, expected 64 hexadecimal digits.")
    return config | dict(architecture=architecture, model_args=args), dict(cfg, architecture=architecture), sha256


def check_arguments(
    build: Callable[..., nn.Module], args: dict[str, Any], where: str, also: tuple[str, ...] = ()
) -> None:
    """InputError for model_args of a release that the network does not know, or that reach beyond its folder."""
    known = inspect.signature(build).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    # what timm's factory and ours take, not a network; a backbone of any kind may well take what our names decide
    reserved = {*_BY_FACTORY, *(() if takes_any else _BY_NAME)}
    for factory in (timm.create_model, build_model_with_cfg):
        reserved |= inspect.signature(factory).parameters.keys()
    for key, value in args.items():
        plain = all(isinstance(item, _SCALARS) for item in (value if isinstance(value, list | tuple) else [value]))
        if key in reserved or not (key in known or key in also or takes_any) or not plain:
            raise InputError(f"{where}: {CONFIG} states model_args that the network does not take: {key}={value!r}.")


def without_implied_args(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json whose `model_args` repeat nothing that the loading library passes itself.

    num_classes always goes: transformers passes it too, and fails on the second one. in_chans and global_pool go where
    they are the network's defaults; others stay, because transformers reads them nowhere else.
    """
    args = {key: value for key, value in config["model_args"].items() if key != "num_classes"}
    asked = {key: value for key, value in args.items() if key not in ("in_chans", "global_pool")}
    with torch.device("meta"):
        network = timm.create_model(config["architecture"], num_classes=config["num_classes"], **asked)
    defaults = get_model_args(network)
    return config | dict(model_args={k: v for k, v in args.items() if k in asked or v != defaults.get(k)})


def save_config(model: nn.Module, path: Path, **facts: Any) -> None:
    """Write timm's config.json; facts: of timm's `save_config_for_hf`, such as data_config."""
    save_config_for_hf(model, str(path), **facts)
    config = without_implied_args(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_folder(folder: Path, variant: str | None = None) -> Release:
    """A release in a folder; a sha256 that its config.json states must be that of its weights."""
    where = f"folder {folder}"
    config, cfg, sha256 = read_config(folder / CONFIG, where, variant)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{where} holds no {WEIGHTS}: only safetensors are read (load_legacy reads an authors' .pth).")
    if sha256 and sha256_of(weights) != sha256:
        raise InputError(f"{where}: {WEIGHTS} is not the file whose sha256 {CONFIG} states: damaged, or changed since.")
    return Release(where, config["model_args"], cfg, weights)


def is_release(folder: Path) -> bool:
    """Whether a folder is a release, which may come from anybody, rather than a run of one's own."""
    try:
        return "sha256" in json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


# the Hub


def download(repository: str, variant: str | None = None, cache_dir: Any = None, tag: str | None = None) -> Release:
    """A release of the Hub, `owner/name` or `owner/name@revision`, from the cache where it is there.

    tag: `name.tag` where a tag was asked for: then a sha256 must be stated, in the project's own namespace the very
    one beside the tag's cfg. A file that does not have its sha256 is fetched once more; InputError where that does
    not help, and for everything else that goes wrong.
    """
    from huggingface_hub import constants

    repo, revision = hf_split(repository)
    where = f"Hub repository {repository}"
    place = dict(repo_id=repo, revision=revision, cache_dir=cache_dir)
    known = release_table().get(tag or "", {}).get("sha256") if repo.startswith(f"{NAMESPACE}/") else None
    problem = ""
    for force in (False, True):
        try:
            path = _fetch(CONFIG, force, place, tag)
            config, cfg, sha256 = read_config(path, where, variant)
            if known and sha256 and sha256 != known:
                problem = f"its {CONFIG} states another sha256 than the one released ({known})"
                continue
            weights = _fetch(WEIGHTS, force, place, tag)
        except InputError as error:
            if force and problem:
                raise InputError(f"{where}: {problem}, and fetching it again failed: {error}") from error
            if force or not isinstance(error.__cause__, json.JSONDecodeError):
                raise
            continue  # a config.json that cannot be parsed: perhaps the cached copy is damaged
        expected = known or sha256 or ("" if tag else _blob_hash(weights))
        if not expected and tag:
            raise InputError(f"{where}: its {CONFIG} states no sha256 of the weights, so they are not trusted; "
                             "stage it by hub/stage.py and publish it again.")  # fmt: skip
        if not expected or sha256_of(weights) == expected:
            cfg |= dict(source="hf-hub", hf_hub_id=repository, file=None)
            return Release(where, config["model_args"], cfg, weights)
        problem = f"{WEIGHTS} does not have the stated sha256 {expected}"
        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{where}: the cached {problem}; HF_HUB_OFFLINE is set: go online once to fetch it again.")
    raise InputError(
        f"{where}: {problem}, also after a second download: refused. Tell its owner, or load weights of your own by "
        "local-dir:."
    )


def check_network(repository: str, cache_dir: Any = None) -> None:
    """InputError where a repository of the Hub cannot be read or holds no network of ours; loads no weights."""
    repo, revision = hf_split(repository)
    path = _fetch(CONFIG, False, dict(repo_id=repo, revision=revision, cache_dir=cache_dir), None)
    architecture = read_config(path, f"Hub repository {repository}")[0]["architecture"]
    if not timm.is_model(architecture) or not timm.model_entrypoint(architecture).__module__.startswith(__package__):
        raise InputError(
            f"Hub repository {repository} holds a {architecture}, expected a network with experts (ride_…)."
        )


def _blob_hash(path: Path) -> str:
    """The sha256 under which the cache keeps a large file; "" where the cache has no such names."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else ""


def _fetch(file: str, force: bool, place: dict[str, Any], tag: str | None) -> Path:
    """A file of a Hub repository in the cache; a body that was cut short is asked for once more."""
    from huggingface_hub import hf_hub_download

    for again in (True, False):
        try:
            return Path(hf_hub_download(filename=file, force_download=force, library_name="ride_timm", **place))
        except Exception as error:  # the client, its transport and the disk raise what they like
            if again and "Consistency check failed" in str(error):
                continue
            raise hub_error(error, place["repo_id"], file, tag) from error
    raise AssertionError("unreachable")


def hub_error(error: Exception, repo: str, file: str = CONFIG, tag: str | None = None) -> InputError:
    """What went wrong with a repository of the Hub, in one sentence that says what to do."""
    from huggingface_hub import constants, errors

    at = f"{repo} on {constants.ENDPOINT}"
    row, clone = release_table().get(tag or "", {}), ""
    if tag and not row.get("published"):
        folder = tag if row.get("sha256") else "NAME.TAG"  # what is staged has its sha256 beside the cfg
        clone = f"; in a clone of the project the staged releases are local-dir:hub/{folder}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{repo!r} is no name of a Hub repository: expected owner/name.")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{at} is gated: ask for access on its page, then log in (`hf auth login`, or HF_TOKEN).")
    if isinstance(error, errors.RepositoryNotFoundError):
        message = (
            f"there is no repository {at}, or it is private: log in (`hf auth login`, or HF_TOKEN) if it is yours."
        )
        if tag:
            message = (
                f"the weights {tag} are not published: looked for {at} (missing, or private without your login). Train "
                "them (train_accelerate.py) or convert the authors' (hub/zoo.py) and load the folder by local-dir:, or "
                f"name the owner of a published copy by RIDE_TIMM_HUB{clone}."
            )
        return InputError(message)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{at} has no such revision ({_line(error)}).")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return InputError(
            f"{file} of {at} is not in the cache, and the Hub cannot be reached or HF_HUB_OFFLINE is set: go online "
            f"once, or load a folder by local-dir:{clone}."
        )
    if isinstance(error, errors.EntryNotFoundError):
        if file == CONFIG:
            return InputError(f"{at} has no {CONFIG}: not a timm model.")
        return InputError(f"{at} has no {WEIGHTS}: pickled weights are never read; ask its owner for safetensors.")
    if status in (401, 403):
        return InputError(f"{at} refused your login ({status}): renew it by `hf auth login`, or correct HF_TOKEN.")
    return InputError(f"{file} of {at} could not be downloaded: {_line(error)}")


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:200]
    return re.sub(r"hf_\w{4,}", "hf_…", f"{type(error).__name__}: {text}" if text else type(error).__name__)
