"""Convert downloaded checkpoints of the authors' model zoo into staged releases.

python hub/zoo.py FILE … [--tag NAME.TAG]

The release of a file follows from its network and, where two fit, from the name of its folder in the zoo; --tag
overrides it. The published metrics are recorded as claimed, not measured; the licence and its notice are copied.
hub/zoo.yaml lists the checkpoints and their URLs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import yaml
from folder import HERE, LICENCE, ROOT, Staged
from stage import stage

from ride_timm import InputError
from ride_timm.cli.process import exit_code
from ride_timm.evaluation.tables import GROUPS
from ride_timm.hardware import set_threads
from ride_timm.models.legacy import infer_architecture, read_state_dict
from ride_timm.training.arguments import Parser
from ride_timm.training.recipe import load_recipe

DOWNLOAD = "https://drive.google.com/file/d/{}/view"


def read_zoo() -> dict[str, Any]:
    """Read hub/zoo.yaml: {"url", "copyright", "data": by start of the tag, "checkpoints": by name.tag}."""
    return yaml.safe_load((HERE / "zoo.yaml").read_text(encoding="utf-8"))


def experts_of(tag: str) -> int:
    """Number of experts of a tag: that in its name, or 3."""
    return next((number for number in (4, 6) if tag.endswith(f"_{number}experts")), 3)


def recognise(path: Path) -> str:
    """Find the tag of a checkpoint; InputError if none or several fit."""
    network, args = infer_architecture(read_state_dict(path))
    fitting = [
        tag
        for tag in read_zoo()["checkpoints"]
        if tag.startswith(f"{network}.")
        and experts_of(tag) == args["num_experts"]
        and timm.get_pretrained_cfg(tag).num_classes == args["num_classes"]
    ]
    if not fitting:
        raise InputError(
            f"{path} holds a {network} of {args['num_experts']} experts and {args['num_classes']} classes, none of the "
            "zoo's: python hub/stage.py stages it under a name of your own."
        )
    named = [tag for tag in fitting if read_zoo()["checkpoints"][tag]["folder"] in str(path.absolute())]
    if len(named or fitting) > 1:
        raise InputError(f"{path} may be {' or '.join(fitting)}: choose one by --tag.")
    return (named or fitting)[0]


def claim(tag: str) -> dict[str, Any]:
    """Further entries of results.json for a checkpoint of the zoo: data, and the metrics that its authors claim."""
    zoo = read_zoo()
    if tag not in zoo["checkpoints"]:
        raise InputError(f"{tag} is no checkpoint of the zoo; expected one of {', '.join(zoo['checkpoints'])}.")
    row = zoo["checkpoints"][tag]
    data = next(facts for start, facts in zoo["data"].items() if tag.partition(".")[2].startswith(start))
    epochs = "100 epochs by the zoo, 200 by its configuration" if data["dataset"] == "cifar100" else "100 epochs"
    claimed = {key: row[key] for key in ("method", "routed", *GROUPS)}
    claimed |= dict(url=zoo["url"], original=DOWNLOAD.format(row["file"]), training=f"{row['method']}, {epochs}")
    return dict(data=data, claimed=claimed)


def notice() -> str:
    """The MIT licence of the authors' code, with their notice."""
    ours = (ROOT / "LICENSE").read_text(encoding="utf-8")
    start, end = ours.index("Permission is hereby granted"), ours.index("SOFTWARE.\n") + len("SOFTWARE.\n")
    return f"MIT License\n\n{read_zoo()['copyright']}\n\n{ours[start:end]}"


def convert(path: Path, tag: str | None = None, root: Path = HERE, **data: Any) -> Staged:
    """Stage one checkpoint; InputError if it is none of the zoo's, or does not fit its tag."""
    tag = tag or recognise(path)
    facts, network, args = claim(tag), *infer_architecture(read_state_dict(path))
    if not tag.startswith(f"{network}.") or args["num_experts"] != experts_of(tag):
        raise InputError(f"{path} holds a {network} of {args['num_experts']} experts, not {tag}.")
    return stage(path, tag, root, facts=facts, files={LICENCE: notice()}, **data)


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="downloaded .pth files")
    parser.add_argument("--tag", metavar="NAME.TAG", help="the release of the one file")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="measure on the data of this recipe as well")
    parser.add_argument("--data-dir", metavar="DIR", help="read the data from this folder instead of the Hub")
    parser.add_argument("--root", type=Path, default=HERE, metavar="DIR", help="folder of the staged releases")
    args = parser.parse_args(argv)
    if args.tag and len(args.files) > 1:
        raise InputError("--tag takes one file: convert the others separately.")
    set_threads(None)
    recipe = load_recipe(args.recipe) if args.recipe else None
    tags = [args.tag or recognise(path) for path in args.files]  # all of them, before the first is converted
    for path, tag in zip(args.files, tags, strict=True):
        staged = convert(path, tag, args.root, recipe=recipe, data_dir=args.data_dir)
        print(f"{path} -> {staged.path}")


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
