"""Weights of a backbone: load all of them, and warn of those of another network."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.models import get_pretrained_cfg
from timm.models._builder import _resolve_pretrained_source
from timm.models._hub import HF_WEIGHTS_NAME, _get_safe_alternatives, hf_split
from torch import nn

from ..errors import first_line, listed, quiet
from .release import DATA_CONFIG, check_finite


def load_backbone(make: Callable[..., nn.Module], backbone: str, source: bool | str | Path) -> nn.Module:
    """Create a backbone with its published weights (True) or those of a file.

    make: creates it, from arguments of `timm.create_model`. Raises ValueError if weights cannot be loaded, do not fit,
    are not finite, or if tensors outside of the classifier are missing or left over, and at once if the Hub is
    unreachable; warns as `warn_of_twin` does.
    """
    overlay = {} if source is True else dict(pretrained_cfg_overlay=dict(file=str(source)))
    where = "published weights" if source is True else f"weights in {source}"
    if overlay:
        _check_file(Path(str(source)))
    try:
        with quiet("huggingface_hub"), _unmatched_tensors() as unmatched:
            if not overlay:
                _check_hub(backbone)
            net = make(pretrained=True, **overlay)
    except (RuntimeError, OSError, KeyError, ValueError, EOFError, safetensors.SafetensorError, HTTPError) as error:
        if _no_connection(error):
            raise ValueError(
                f"backbone={backbone!r}: its {where} are not in the cache, and the Hub is unreachable or "
                "HF_HUB_OFFLINE is set: go online once, or name a file of them: backbone_pretrained=FILE, "
                "--backbone-weights FILE."
            ) from error
        text = first_line(error) if isinstance(error, KeyError) else str(error)  # of a KeyError, only the key
        lines = [" ".join(line.split()) for line in text.splitlines()]
        reason = "; ".join([line for line in lines if "size mismatch" in line] or lines)[:300]
        way = "" if overlay else " (or name a file of them: backbone_pretrained=FILE, --backbone-weights FILE)"
        raise ValueError(
            f"backbone={backbone!r}: its {where} could not be loaded or do not fit{way}: {reason}"
            + _named_otherwise(backbone, source)
        ) from error
    classifier = net.pretrained_cfg["classifier"] or ()
    classifier = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    beside = tuple(f"{name.rpartition('.')[0]}." for name in classifier if "." in name)
    optional = classifier + beside  # a norm in the classifier's module is not pretrained everywhere, such as by FCMAE
    tensors = net.state_dict()
    lacking = [name for name in unmatched["Missing"] if not name.startswith(optional) and tensors[name].ndim]
    beyond = [name for name in unmatched["Unexpected"] if not name.startswith(optional)]
    for names, what in ((lacking, "lack"), (beyond, "have, beyond its own,")):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(
                f"backbone={backbone!r}: its {where} {what} {', '.join(names[:3])}{more}: not of this network."
                + _named_otherwise(backbone, source)
            )
    check_finite(tensors, f"backbone={backbone!r}: its {where}")
    if overlay:
        warn_of_twin(backbone, Path(str(source)))
    return net


def _named_otherwise(backbone: str, source: bool | str | Path) -> str:
    """A sentence on a file of weights that states another network, empty without one."""
    other = None if source is True else stated_network(Path(str(source)))
    if other in (None, backbone.partition(".")[0]):
        return ""
    return f" By its name or its config.json the file is of {other}: pass --backbone {other}."


def _check_file(path: Path) -> None:
    if path.is_dir():
        files = sorted(file for kind in ("*.safetensors", "*.bin", "*.pth") for file in path.glob(kind))
        way = f"one of {listed(files)}" if files else "it holds no .safetensors, .bin or .pth"
        raise ValueError(f"backbone_pretrained={str(path)!r}: a folder, expected the file of the weights: {way}.")
    if not path.is_file():
        raise ValueError(f"backbone_pretrained={str(path)!r}: no such file.")


def _check_hub(backbone: str) -> None:
    """Raise the client's error if weights must be downloaded and the Hub is unreachable.

    timm asks for one file after the other, and the client retries each for half a minute.
    """
    source, at = _resolve_pretrained_source(get_pretrained_cfg(backbone).to_dict())
    if source != "hf-hub":
        return
    hub_id, name = at if isinstance(at, tuple) else (at, HF_WEIGHTS_NAME)
    repo, revision = hf_split(hub_id)
    names = [*_get_safe_alternatives(name), name]
    if any(isinstance(try_to_load_from_cache(repo, file, revision=revision), str) for file in names):
        return
    with suppress(HfHubHTTPError):  # an answer: timm may find another file
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)


def _no_connection(error: Exception) -> bool:
    """True for errors of the Hub's client that are no answer of the Hub."""
    answered = isinstance(error, HfHubHTTPError)
    return isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | HTTPError) and not answered


@contextmanager
def _unmatched_tensors() -> Iterator[dict[str, list[str]]]:
    """Collect the names of tensors without weights, and of weights without a tensor: timm may only log them."""
    unmatched: dict[str, list[str]] = dict(Missing=[], Unexpected=[])

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = re.match(r"(Missing|Unexpected) keys \((.*?)\) (discovered|found)", record.getMessage())
            if found:
                unmatched[found[1]].extend(found[2].split(", "))

    logger, handler = logging.getLogger("timm.models._builder"), Collect()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield unmatched
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def stated_network(file: Path) -> str | None:
    """The timm network of a file of weights, by timm's config.json in its folder or by its name; None if unknown."""
    name = _config_beside(file).get("architecture")
    if name is None:
        words = re.split(r"\W", file.name)[0].split("_")  # such as efficientnet_lite0_ra-37913777.pth
        names = ("_".join(words[:n]) for n in range(len(words), 0, -1))
        name = next(filter(timm.is_model, names), None)
    return name if isinstance(name, str) and timm.is_model(name) else None


def _config_beside(file: Path) -> dict[str, Any]:
    """timm's config.json beside a file of weights; empty without one."""
    try:
        config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def differences(name: str, other: str) -> list[str]:
    """Layers, their settings and input in which two networks with the same tensors differ, "A for B" each."""
    with torch.device("meta"):
        ours, theirs = timm.create_model(name), timm.create_model(other)
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return []
    found = []
    others = dict(theirs.named_modules())
    for module, a in ours.named_modules():
        b = others.get(module)
        if b is None:
            continue
        if type(a) is not type(b):
            found.append(f"{type(a).__name__} for {type(b).__name__}")
        elif getattr(a, "eps", None) != getattr(b, "eps", None):
            found.append(f"{type(a).__name__} with eps {a.eps:g} for {b.eps:g}")
        elif getattr(a, "padding", None) != getattr(b, "padding", None):
            found.append(f"{type(a).__name__} with padding {a.padding} for {b.padding}")
    cfgs = [get_pretrained_cfg(net) for net in (name, other)]
    for key in DATA_CONFIG:
        values = [getattr(cfg, key) for cfg in cfgs]
        if values[0] != values[1]:
            found.append(f"{key} {values[0]} for {values[1]}")
    return list(dict.fromkeys(found))


def warn_of_twin(backbone: str, file: Path) -> None:
    """Warn where weights fit the backbone, and may be of another network that computes something else.

    The networks that timm ported from TensorFlow, `tf_…`, pad and normalise unlike those of the same name without the
    prefix, and hold the same tensors.
    """
    architecture = backbone.partition(".")[0]
    other = stated_network(file)
    if other is None:
        other = architecture.removeprefix("tf_") if architecture.startswith("tf_") else f"tf_{architecture}"
    if other == architecture:
        return _warn_of_other_input(backbone, file)
    if not timm.is_model(other):
        return
    found = differences(other, architecture)
    if found:
        warnings.warn(
            f"backbone={backbone!r}: the weights in {file} fit {other} as well, which has {'; '.join(found)}. If they "
            "are of that network, name it: here their logits would be wrong.",
            stacklevel=2,
        )


def _warn_of_other_input(backbone: str, file: Path) -> None:
    """Warn where weights state another normalisation or crop than the backbone as named: those of another tag."""
    stated, cfg = _config_beside(file).get("pretrained_cfg"), get_pretrained_cfg(backbone).to_dict()
    if not isinstance(stated, dict):
        return
    keys = [key for key in DATA_CONFIG if key != "input_size" and key in stated]
    pairs = {key: [tuple(v) if isinstance(v, list) else v for v in (stated[key], cfg.get(key))] for key in keys}
    found = [f"{key} {theirs} for {ours}" for key, (theirs, ours) in pairs.items() if theirs != ours]
    if found:
        tag = f", such as backbone={backbone.partition('.')[0]}.{stated['tag']}" if stated.get("tag") else ""
        warnings.warn(
            f"backbone={backbone!r}: the config.json beside {file} states {'; '.join(found)}. Name the backbone with "
            f"its tag{tag}: here its input would be the other.",
            stacklevel=3,
        )
