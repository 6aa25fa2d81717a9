"""A staged release: one folder with what its Hub repository will hold, and nothing else."""

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
from ride_timm.models.release import CONFIG, WEIGHTS, sha256_of
from ride_timm.training.recipe import Recipe, load_recipe

HERE = Path(__file__).parent
ROOT = HERE.parent
TABLE = Path(ride_timm.__file__).parent / "models" / "releases.json"
CARD, RESULTS, RECIPE, GOLDEN = "README.md", "results.json", "recipe.yaml", "golden.safetensors"
LICENCE = "LICENSE"
PICTURES = ("curves.png", "classes.png", "routing.png")
PUBLISHED_FILES = (CONFIG, WEIGHTS, CARD, RESULTS, RECIPE, GOLDEN, LICENCE, *PICTURES)
_NEEDED: dict[str, dict[str, Any]] = {  # what cards, checks and tables read of a file, and of which type
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
_OF_A_STAGE = {"macs": int | float, **dict.fromkeys(("all", "many", "medium", "few"), int | float | None)}
STAMP = "verified.json"  # stays here: what verify.py found, for which files


def parse_name(text: str) -> tuple[str, str]:
    """`NAME.TAG` as (network, tag); InputError for a network that is none of ours or a tag that is no plain word."""
    name, _, tag = text.partition(".")
    if not timm.is_model(name) or not timm.model_entrypoint(name).__module__.startswith("ride_timm."):
        networks = ", ".join(timm.list_models("ride*"))
        raise InputError(f"{text!r}: expected NAME.TAG, the NAME one of {networks}.")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_]*", tag):
        raise InputError(f"{text!r}: expected NAME.TAG, the TAG of small letters, digits and _, like cifar100_lt100.")
    return name, tag


def is_registered(name_and_tag: str) -> bool:
    """Whether timm knows this tag, so that `create_model(…, pretrained=True)` may ask for it."""
    name, _, tag = name_and_tag.partition(".")
    return f"{name}.{tag}" in timm.models.get_arch_pretrained_cfgs(name)


def read_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def write_table(table: dict[str, Any]) -> None:
    """The releases beside the cfgs, a line each, in order."""
    lines = [f"  {json.dumps(tag)}: {json.dumps(row)}" for tag, row in sorted(table.items())]
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def fill(page: str, begin: str, end: str, body: str) -> str:
    """The page with `body` between the two lines; InputError where it has no such lines."""
    before, found, rest = page.partition(f"{begin}\n")
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise InputError(f"the page has no lines {begin} and {end} to render between.")
    return f"{before}{begin}\n{body}\n{end}{after}"


def fill_file(path: Path, begin: str, end: str, body: str) -> None:
    """The same in a file; what it now says is printed."""
    path.write_text(fill(path.read_text(encoding="utf-8"), begin, end, body), encoding="utf-8")
    print(body)


def read_json(path: Path, way_out: str = "stage it again", **needed: Any) -> dict[str, Any]:
    """A JSON file of a run or a release; InputError where it is missing or none, or lacks what a release tells.

    needed: further keys it must have, each with its type.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}): {way_out}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}, expected an object of keys: {way_out}.")
    needed |= _NEEDED.get(path.name, {})
    if path.name == RESULTS and isinstance(found.get("stages"), dict):
        needed |= {f"stages.{name}.{key}": kind for name in found["stages"] for key, kind in _OF_A_STAGE.items()}
    if lacking := [key for key, kind in needed.items() if not _holds(found, key, kind)]:
        raise InputError(f"{path} does not say {listed(lacking)}: {way_out}.")
    return found


def _holds(found: Any, key: str, kind: Any) -> bool:
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found:
            return False
        found = found[part]
    return isinstance(found, kind)


def read_recipe(path: Path, way_out: str = "stage it again") -> Recipe:
    """The recipe of a run or a release; InputError where it is none."""
    try:
        return load_recipe(path)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}: {way_out}.") from error


@dataclass(frozen=True)
class Staged:
    """The folder `root/NAME.TAG`."""

    name: str
    path: Path

    @classmethod
    def find(cls, name: str, root: Path) -> Staged:
        """InputError where nothing is staged under this name."""
        parse_name(name)
        path = root / name
        if not (path / CONFIG).is_file():
            raise InputError(f"{path} is not staged: python hub/stage.py SOURCE {name}")
        return cls(name, path)

    def json(self, file: str) -> dict[str, Any]:
        """A JSON file of the folder; InputError where it is missing or damaged."""
        return read_json(self.path / file, **(dict(network=dict) if file == RESULTS else {}))

    def card(self) -> str:
        """The card as it stands; "" where there is none, InputError where it is no text."""
        path = self.path / CARD
        try:
            return path.read_text(encoding="utf-8") if path.is_file() else ""
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text: mend it, or delete it and what was written by hand in it, "
                             f"then python hub/card.py {self.name}") from error  # fmt: skip

    def recipe(self) -> Recipe | None:
        """The recipe it was trained by; None for a checkpoint. InputError where a run's is lost."""
        path = self.path / RECIPE
        if path.is_file():
            return read_recipe(path)
        if (name := self.json(RESULTS)["recipe"]) is not None:
            raise InputError(f"{path} is missing, and {RESULTS} says that recipe {name!r} trained this release: "
                             "stage it again.")  # fmt: skip
        return None

    def stamp(self) -> dict[str, Any]:
        """What verify.py found at last; {} where it has not looked, or where its file does not say at which files."""
        try:
            found = json.loads((self.path / STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}

    def hashes(self) -> dict[str, str]:
        """sha256 by file, of all that will be published.

        InputError for files that a release does not have, such as pickles, links and folders.
        """
        found = {}
        for path in sorted(self.path.iterdir()):
            if path.name == STAMP:
                continue
            if path.name not in PUBLISHED_FILES or path.is_symlink() or not path.is_file():
                raise InputError(f"{path} does not belong to a release (there are {', '.join(PUBLISHED_FILES)}).")
            found[path.name] = sha256_of(path)
        for file in (CONFIG, WEIGHTS, CARD, RESULTS, GOLDEN):
            if file not in found:
                raise InputError(f"{self.path} holds no {file}: stage it again.")
        return found
