"""A staged release: the folder NAME.TAG with the files of its Hub repository, checked as they are read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

import ride_timm
from ride_timm import InputError
from ride_timm.errors import listed
from ride_timm.evaluation.tables import GROUPS
from ride_timm.files import write_text
from ride_timm.models.download import repository_of
from ride_timm.models.release import CONFIG, NAMESPACE, WEIGHTS, release_table, sha256_of
from ride_timm.training.recipe import Recipe, load_recipe

HERE = Path(__file__).parent
ROOT = HERE.parent
RELEASES = Path(ride_timm.__file__).parent / "models" / "releases.json"
CARD, RESULTS, RECIPE, GOLDEN, LICENCE = "README.md", "results.json", "recipe.yaml", "golden.safetensors", "LICENSE"
CURVES, CLASSES, ROUTING = PICTURES = ("curves.png", "classes.png", "routing.png")
EXAMPLES = ("example_head.png", "example_middle.png", "example_tail.png")
FILES = (CONFIG, WEIGHTS, CARD, RESULTS, RECIPE, GOLDEN, LICENCE, *PICTURES, *EXAMPLES)
STAMP = "verified.json"  # written by verify.py, never uploaded
_NUMBER = int | float
_KEYS: dict[str, dict[str, Any]] = {  # keys that cards, checks and tables read, with their types
    CONFIG: {
        "architecture": str,
        "num_classes": int,
        "model_args": dict,
        "pretrained_cfg.input_size": list,
        "pretrained_cfg.mean": list,
        "pretrained_cfg.std": list,
    },
    RESULTS: {"recipe": str | None, "commit": str | None, "precision": str, "versions": dict, "stages": dict},
}
_STAGE_KEYS = {"macs": _NUMBER, **dict.fromkeys(GROUPS, _NUMBER | None)}

_DATA_ARGS = ("img_size", "backbone_pretrained", "num_classes", "in_chans", "global_pool")  # not of the architecture
_DEFAULTS = dict(num_experts=3, use_norm=True, reduce_dimension=True, share_expert_help_pred_fc=True, router=False)


def parse_name(text: str) -> tuple[str, str]:
    """Split NAME.TAG; InputError for a network that is not ours or a tag that is not a plain word."""
    name, _, tag = text.partition(".")
    if not timm.is_model(name) or not timm.model_entrypoint(name).__module__.startswith("ride_timm."):
        networks = ", ".join(timm.list_models("ride*"))
        raise InputError(f"{text!r}: expected NAME.TAG, with NAME one of {networks}.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", tag):
        raise InputError(f"{text!r}: expected NAME.TAG, with TAG in lower case, digits and _, like cifar100_lt100.")
    return name, tag


def check_num_classes(name: str, num_classes: int) -> None:
    """InputError for a tag of timm that is of another number of classes."""
    if is_registered(name) and (expected := timm.get_pretrained_cfg(name).num_classes) != num_classes:
        raise InputError(f"the source has {num_classes} classes, the tag {name} has {expected}.")


def is_registered(name_and_tag: str) -> bool:
    """True for tags that timm knows, which `create_model(…, pretrained=True)` can download."""
    return name_and_tag in timm.models.get_arch_pretrained_cfgs(name_and_tag.partition(".")[0])


def repository(name: str, namespace: str | None) -> str:
    """The Hub id of a release or a split: in `namespace`, in RIDE_TIMM_HUB or in the project's own."""
    return f"{namespace}/{name}" if namespace else repository_of(name)


def repository_facts(name: str, repo: str) -> dict[str, str]:
    """The entry of results.json by which a card names its repository; none for the project's own of a tag of timm."""
    return {} if is_registered(name) and repo == f"{NAMESPACE}/{name}" else dict(repository=repo)


def read_json(path: Path, way_out: str = "stage it again", **keys: Any) -> dict[str, Any]:
    """Read a JSON file of a run or a release.

    keys: further required keys with their types. InputError where the file is missing, damaged or lacks a key.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}): {way_out}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, expected an object: {way_out}.")
    keys |= _KEYS.get(path.name, {})
    if path.name == RESULTS and isinstance(found.get("stages"), dict):
        keys |= {f"stages.{name}.{key}": kind for name in found["stages"] for key, kind in _STAGE_KEYS.items()}
    if missing := [key for key, kind in keys.items() if not _has(found, key, kind)]:
        raise InputError(f"{path} lacks {listed(missing)}: {way_out}.")
    return found


def _has(found: Any, key: str, kind: Any) -> bool:
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return False
        found = found[part]
    return isinstance(found, kind)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_recipe(path: Path, way_out: str = "stage it again") -> Recipe:
    """Read the recipe of a run or a release; InputError where it is damaged."""
    try:
        return load_recipe(path)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}: {way_out}.") from error


@dataclass(frozen=True)
class Staged:
    """The release `name` (NAME.TAG) in the folder `path`."""

    name: str
    path: Path

    @classmethod
    def find(cls, name: str, root: Path) -> Staged:
        """Open root/NAME.TAG; InputError where nothing is staged under this name."""
        parse_name(name)
        path = root / name
        if not (path / CONFIG).is_file():
            raise InputError(f"{path} is not staged: python hub/stage.py SOURCE {name}")
        return cls(name, path)

    def json(self, file: str) -> dict[str, Any]:
        """Read a JSON file of the folder; InputError where it is missing or damaged."""
        return read_json(self.path / file, **(dict(network=dict) if file == RESULTS else {}))

    def has(self, file: str) -> bool:
        return (self.path / file).is_file()

    def recipe(self) -> Recipe | None:
        """The recipe of a trained release, None for a converted checkpoint; InputError where it is lost."""
        path = self.path / RECIPE
        if path.is_file():
            return read_recipe(path)
        if (name := self.json(RESULTS)["recipe"]) is not None:
            raise InputError(f"{path} is missing, but {RESULTS} names recipe {name!r}: stage it again.")
        return None

    def stamp(self) -> dict[str, Any]:
        """The last findings of verify.py; {} where there are none or the file is damaged."""
        try:
            found = json.loads((self.path / STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}

    def hashes(self) -> dict[str, str]:
        """The sha256 of every file to publish.

        InputError where a file is missing or does not belong to a release, such as pickles, links and folders.
        """
        found = {}
        for path in sorted(self.path.iterdir()):
            if path.name == STAMP:
                continue
            if path.name not in FILES or path.is_symlink() or not path.is_file():
                raise InputError(f"{path} does not belong to a release (expected only {', '.join(FILES)}).")
            found[path.name] = sha256_of(path)
        for file in (CONFIG, WEIGHTS, CARD, RESULTS, GOLDEN):
            if file not in found:
                raise InputError(f"{self.path} has no {file}: stage it again.")
        return found


# the package's table of releases: the arguments of a tag's network, the sha256 of its weights, whether it is published


def read_releases() -> dict[str, Any]:
    return json.loads(RELEASES.read_text(encoding="utf-8"))


def _write_releases(table: dict[str, Any]) -> None:
    lines = [f"  {json.dumps(tag)}: {json.dumps(row)}" for tag, row in sorted(table.items())]
    write_text(RELEASES, "{\n" + ",\n".join(lines) + "\n}\n")
    release_table.cache_clear()


def record(staged: Staged) -> None:
    """Record the arguments and the sha256 of a staged release; new weights are not published yet."""
    config, table = staged.json(CONFIG), read_releases()
    given = config["model_args"].items()
    args = {key: value for key, value in given if key not in _DATA_ARGS and _DEFAULTS.get(key) != value}
    old = table.get(staged.name, {})
    kept = old if old.get("sha256") == config["sha256"] else {}
    table[staged.name] = kept | dict(model_args=args, sha256=config["sha256"])
    _write_releases(table)


def record_published(name: str) -> None:
    """Record that a release is on the Hub, so that timm lists its weights."""
    table = read_releases()
    table[name]["published"] = True
    _write_releases(table)
