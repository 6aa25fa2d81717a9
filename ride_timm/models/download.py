"""Find, download and check the weights that `pretrained=True` loads."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg
from timm.models._hub import hf_split

from ..errors import InputError
from .release import (
    CONFIG,
    NAMESPACE,
    WEIGHTS,
    WEIGHTS_BY_CALLER,
    Release,
    error_line,
    read_config,
    read_folder,
    registered_tag,
    release_table,
    sha256_of,
)

# errors of a client that does not resume a download by itself
_CUT_SHORT = ("Consistency check failed", "peer closed connection without sending complete message body")


def repository_of(name_and_tag: str) -> str:
    """Hub repository of a tag, in the namespace RIDE_TIMM_HUB or the project's own."""
    namespace = os.environ.get("RIDE_TIMM_HUB") or NAMESPACE
    if not re.fullmatch(r"[A-Za-z0-9]([\w-]|\.(?!\.))*", namespace):
        raise InputError(
            f"RIDE_TIMM_HUB={namespace!r}: expected a user or an organisation on the Hub, such as 'ride-timm'."
        )
    return f"{namespace}/{name_and_tag}"


def find_release(variant: str, named: Any, overlay: dict[str, Any], cache_dir: str | None) -> Release | None:
    """Find the release for `pretrained=True`, download it if needed, and check it.

    named: timm's `pretrained_cfg`: a tag, None for the default one, or the cfg of `hf-hub:` and `local-dir:`.
    Returns None if the caller names the weights (a file, a URL, tensors). Raises InputError if the release cannot be
    read or fails a check.
    """
    if any(overlay.get(key) for key in WEIGHTS_BY_CALLER):
        return None
    named = registered_tag(variant, named)
    cfg = PretrainedCfg(**named) if isinstance(named, dict) else named
    if isinstance(cfg, PretrainedCfg):
        if cfg.source == "local-dir":
            return read_folder(Path(cfg.file), variant)
        if cfg.source == "hf-hub":
            return download(cfg.hf_hub_id, variant, cache_dir)
        if any(getattr(cfg, key) for key in WEIGHTS_BY_CALLER):
            return None
    tag = named if isinstance(named, str) else (cfg or timm.get_pretrained_cfg(variant)).tag
    name = f"{variant}.{tag}"
    timm.get_pretrained_cfg(name)  # raises for an unknown tag
    if tag == "untrained":
        backbone = ", or pass backbone_pretrained=True to start from its backbone's" if variant == "ride" else ""
        raise InputError(
            f"{variant} has no weights of its own: drop pretrained=True, or name a trained folder by local-dir:"
            f"{backbone}."
        )
    return download(repository_of(name), variant, cache_dir, tag=name)


def download(repository: str, variant: str | None = None, cache_dir: Any = None, tag: str | None = None) -> Release:
    """Get a release from the Hub or the cache: `owner/name` or `owner/name@revision`.

    tag: `name.tag` if a tag was asked for: its config.json must state a sha256, in the project's own namespace the one
    in releases.json. Weights with another sha256 are downloaded once more. Raises InputError if that does not help,
    and for every other failure.
    """
    from huggingface_hub import constants

    repo, revision = hf_split(repository)
    where = f"Hub repository {repository}"
    source = dict(repo_id=repo, revision=revision, cache_dir=cache_dir)
    known = release_table().get(tag or "", {}).get("sha256") if repo.startswith(f"{NAMESPACE}/") else None
    problem = ""
    for force in (False, True):
        try:
            path = _fetch(CONFIG, force, source, tag)
            config, cfg, sha256 = read_config(path, where, variant)
            if known and sha256 and sha256 != known:
                problem = f"its {CONFIG} does not state the released sha256 {known}"
                continue
            weights = _fetch(WEIGHTS, force, source, tag)
        except InputError as error:
            if force and problem:
                raise InputError(f"{where}: {problem}, and the second download failed: {error}") from error
            if force or not isinstance(error.__cause__, json.JSONDecodeError):
                raise
            continue  # the cached config.json may be damaged
        expected = known or sha256 or ("" if tag else _blob_hash(weights))
        if not expected and tag:
            raise InputError(f"{where}: its {CONFIG} states no sha256 of the weights: not loaded; "
                             "stage it with hub/stage.py and publish it again.")  # fmt: skip
        if not expected or sha256_of(weights) == expected:
            cfg |= dict(source="hf-hub", hf_hub_id=repository, file=None)
            return Release(where, config["model_args"], cfg, weights)
        problem = f"{WEIGHTS} does not have the stated sha256 {expected}"
        if constants.HF_HUB_OFFLINE:
            raise InputError(f"{where}: the cached {problem}; unset HF_HUB_OFFLINE to download it again.")
    raise InputError(
        f"{where}: {problem}, also after a second download: not loaded. Report it to the owner, or load a folder of "
        "your own by local-dir:."
    )


def check_network(repository: str, cache_dir: Any = None) -> None:
    """Raise InputError if a Hub repository is unreadable or not a RIDE network.

    Downloads no weights.
    """
    repo, revision = hf_split(repository)
    path = _fetch(CONFIG, False, dict(repo_id=repo, revision=revision, cache_dir=cache_dir), None)
    architecture = read_config(path, f"Hub repository {repository}")[0]["architecture"]
    if not timm.is_model(architecture) or not timm.model_entrypoint(architecture).__module__.startswith(__package__):
        raise InputError(
            f"Hub repository {repository} holds a {architecture}, expected a network with experts (ride_…)."
        )


def download_if_there(repository: str, file: str) -> Path | None:
    """Get a further file of a Hub repository; None where it, or offline the cache, has none."""
    from huggingface_hub.errors import EntryNotFoundError

    repo, revision = hf_split(repository)
    try:
        return _fetch(file, False, dict(repo_id=repo, revision=revision, cache_dir=None), None)
    except InputError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise


def _blob_hash(path: Path) -> str:
    """The sha256 that names a large file in the cache; "" if it is named otherwise."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else ""


def _fetch(file: str, force: bool, source: dict[str, Any], tag: str | None) -> Path:
    """Download a file of a Hub repository to the cache; retry once if it is cut short."""
    from huggingface_hub import hf_hub_download

    for again in (True, False):
        try:
            return Path(hf_hub_download(filename=file, force_download=force, library_name="ride_timm", **source))
        except Exception as error:  # of any type: from the client, its transport or the disk
            if again and any(text in str(error) for text in _CUT_SHORT):
                continue
            raise hub_error(error, source["repo_id"], file, tag) from error
    raise AssertionError("unreachable")


def hub_error(error: Exception, repo: str, file: str = CONFIG, tag: str | None = None) -> InputError:
    """Translate an error of the Hub's client into one sentence with a way out."""
    from huggingface_hub import constants, errors

    at = f"{repo} on {constants.ENDPOINT}"
    row, clone = release_table().get(tag or "", {}), ""
    if tag and not row.get("published"):
        folder = tag if row.get("sha256") else "NAME.TAG"  # a staged tag has its sha256 in the table
        clone = f"; in a clone of the project the staged releases are local-dir:hub/{folder}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{repo!r} is not the name of a Hub repository: expected owner/name.")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{at} is gated: request access on its page, then log in (`hf auth login`, or HF_TOKEN).")
    if isinstance(error, errors.RepositoryNotFoundError):
        message = f"{at} does not exist or is private: log in (`hf auth login`, or HF_TOKEN) if it is yours."
        if tag:
            message = (
                f"the weights {tag} are not published: {at} does not exist or is private. Train them "
                "(train_accelerate.py) or convert the authors' (hub/zoo.py) and load the folder by local-dir:, or set "
                f"RIDE_TIMM_HUB to the owner of a published copy{clone}."
            )
        return InputError(message)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{at} has no such revision ({error_line(error)}).")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return InputError(
            f"{file} of {at} is not in the cache, and the Hub is unreachable or HF_HUB_OFFLINE is set: go online "
            f"once, or load a folder by local-dir:{clone}."
        )
    if isinstance(error, errors.EntryNotFoundError):
        if file == CONFIG:
            return InputError(f"{at} has no {CONFIG}: not a timm model.")
        return InputError(f"{at} has no {WEIGHTS}, and pickled weights are never read: ask its owner for safetensors.")
    if status in (401, 403):
        return InputError(f"{at} refused your login ({status}): run `hf auth login` again, or correct HF_TOKEN.")
    return InputError(f"{file} of {at} could not be downloaded: {error_line(error)}")
