"""The training script's options: which stages, from which weights, into which folder."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg

from ..data.datasets import EMBEDDED, KNOWN
from ..data.first_image import first_image_size
from ..errors import InputError
from ..losses import loss_keys
from .arguments import Parser, add_flags, flags_given
from .recipe import DEFAULT_RECIPE, Recipe, listing, load_recipe
from .recipe_keys import DecouplingKeys
from .run_folder import RunFolder

FINETUNE = "finetune"
_SMALL = 32  # pixels of the longer edge
_WEIGHTS = ("backbone_weights", "backbone_pretrained")
_PLACES = ("data_dir", "annotations", "image_column", "dataset_config", "dataset_revision")


@dataclass(frozen=True)
class Options:
    """The flags that are not recipe keys.

    stages: those to train, in order. fixed: recipe keys that the machine must not change, since a flag, the launcher
    or the resumed run states them. notices: choices made for the user, printed once.
    """

    stage: str
    stages: tuple[str, ...]
    source: str | None
    teacher: str | None
    output: str
    resume: bool
    trackers: tuple[str, ...]
    push_to_hub: str | None
    threads: int | None
    fixed: frozenset[str]
    notices: tuple[str, ...] = ()

    @property
    def router_in_place(self) -> bool:
        """The router is trained on the experts of the run folder itself."""
        return self.stage == "router" and self.source is None

    def from_stage(self, name: str) -> Options:
        """The options of a resumed run, without the stages before the one it is in."""
        later = self.stages[self.stages.index(name) :] if name in self.stages else ()
        return dataclasses.replace(self, stages=later)


def parse_arguments(argv: list[str] | None) -> tuple[Options, Recipe]:
    """Parse the command line; flags override the recipe, the recipe overrides the defaults.

    Raises `InputError` for flags that do not go together, and `SystemExit` after `--help` or a bare `--recipe`.
    """
    args = _parser().parse_args(argv)
    if args.recipe == "":
        print(listing())
        raise SystemExit(0)
    flags = flags_given(args)
    rebalanced = _run_to_rebalance(args, flags)
    chosen, defaults, notices = (args.recipe, {}, ()) if args.recipe else recipe_for(flags)
    name = Path(chosen).stem
    if rebalanced is not None:
        name = flags.setdefault("name", f"{rebalanced.path.resolve().name}_{flags['decouple']}")
    output = args.output or os.path.join("runs", name)
    folder = RunFolder(output)
    if args.resume and args.recipe is None and not flags and not folder.occupied:
        raise InputError(f"nothing to resume: {output} holds no run; pass --output DIR or --recipe NAME.")
    continued = folder.occupied and (args.resume or (args.stage == "router" and args.source is None))
    own = rebalanced or (folder if continued and args.recipe is None else None)
    recipe = load_recipe(chosen) if own is None else own.recipe()
    if own is None:
        flags = defaults | flags
    if (launched := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        flags.setdefault("mixed_precision", launched)
    fixed = frozenset(flags)
    if continued:
        flags.setdefault("mixed_precision", folder.recipe().mixed_precision)
        fixed |= {"mixed_precision"}
    if args.teacher:
        flags.setdefault("distillation", True)
    recipe = recipe.override(flags)
    check_effect(flags, recipe, args.source)
    backbone = next((name for name in ("backbone", *_WEIGHTS) if getattr(recipe, name)), None)
    if backbone is not None and recipe.model != "ride":
        raise InputError(
            f"{backbone}={getattr(recipe, backbone)} is for the model ride, which cuts a backbone, not for "
            f"{recipe.model}: fine-tune it by --recipe {FINETUNE}, or train it from scratch by --model ride."
        )
    if args.stage == "router" and recipe.num_experts == 1:
        raise InputError("num_experts=1: a router needs at least 2 experts to choose from.")
    stages = recipe.stages
    if recipe.decouple != "none" and args.source is not None:  # trained experts
        stages = tuple(name for name in stages if name != "experts")
    if args.stage != "both":
        stages = tuple(name for name in stages if (name == "router") == (args.stage == "router"))
    if flags.get("decouple", "none") != "none" and "heads" not in stages:
        raise InputError(f"decouple={flags['decouple']} has no effect with --stage router: leave one of them out.")
    options = Options(
        stage=args.stage,
        stages=stages,
        source=args.source,
        teacher=args.teacher,
        output=output,
        resume=args.resume,
        trackers=tuple(args.tracker),
        push_to_hub=args.push_to_hub,
        threads=args.threads,
        fixed=fixed,
        notices=notices if own is None else (),
    )
    return options, recipe


def check_effect(flags: dict[str, Any], recipe: Recipe, source: str | None = None) -> None:
    """InputError for a flag that this recipe, or a run that starts from `source`, does not read.

    It would change nothing: `--from` gives all weights but those that adapters leave out.
    """
    unread = {name: f"loss={recipe.loss}" for name, (_, losses) in loss_keys().items() if recipe.loss not in losses}
    if recipe.decouple == "none":
        unread |= {item.name: "decouple=none" for item in dataclasses.fields(DecouplingKeys)}
    if recipe.adapter is None:
        unread["adapter_rank"] = "adapter=none"
    if recipe.freeze == "backbone":
        unread["freeze_norm"] = "freeze=backbone, which keeps them all"
    if source is not None:
        if flags.get("head_init") == "class_means":
            unread["head_init"] = "--from, whose classifiers are kept"
        if recipe.adapter is None:
            unread |= {name: "--from, which holds all weights" for name in _WEIGHTS if flags.get(name)}
    for name in flags.keys() & unread.keys() - {"decouple"}:
        raise InputError(
            f"{name}={flags[name]} has no effect with {unread[name]}: leave --{name.replace('_', '-')} out."
        )


def recipe_for(flags: dict[str, Any]) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """The recipe of a data set for which none is named, keys that the data set changes in it, and a notice.

    A known data set has its own. Images of one's own, as small as CIFAR's or for a network of such images, train the
    default with CIFAR's mean; others fine-tune a backbone, or train the network of `--model` from scratch, as
    ImageNet-LT is trained.
    """
    dataset = str(flags.get("dataset", EMBEDDED[0]))
    known = KNOWN.get(dataset)
    if known is not None:
        name = known.recipe or (FINETUNE if known.lists else DEFAULT_RECIPE)
        notice = f"dataset={dataset}: recipe {name}; --recipe names another"
        return name, {}, () if name == DEFAULT_RECIPE else (notice,)
    size, model = first_image_size(dataset, **{key: flags[key] for key in _PLACES if key in flags}), flags.get("model")
    if (size is not None and max(size) <= _SMALL) or _takes_small_images(model):
        name, chosen = DEFAULT_RECIPE, dict[str, Any](augment="cifar")
    elif model in (None, "ride"):
        name, chosen = FINETUNE, {}
    else:
        name, chosen = "imagenet_lt_resnet50", dict(imb_type="none")
    values = "".join(f", {key}={flags.get(key, value)}" for key, value in chosen.items())
    return name, chosen, (f"dataset={dataset}: recipe {name}{values}; --recipe names another",)


def _takes_small_images(model: str | None) -> bool:
    cfg = get_pretrained_cfg(model) if model and timm.is_model(model.partition(".")[0]) else None
    return cfg is not None and cfg.input_size[-1] <= _SMALL


def _parser() -> Parser:
    parser = Parser(description="Train RIDE: experts, then router.", allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?", const="", metavar="NAME|FILE",
                        help=f"recipe (default: {DEFAULT_RECIPE}); without a value: list all")  # fmt: skip
    parser.add_argument("--stage", choices=("both", "experts", "router"), default="both")
    parser.add_argument("--from", dest="source", metavar="RUN|FILE|SPEC", help="initial weights")
    parser.add_argument("--teacher", metavar="RUN|FILE|SPEC", help="teacher for distillation")
    parser.add_argument("--output", metavar="DIR", help="run folder (default: runs/<recipe>)")
    parser.add_argument(
        "--resume", action="store_true", help="continue after the last finished epoch of the run folder"
    )
    parser.add_argument("--tracker", metavar="NAME", action="append", default=[],
                        help="a tracker of Accelerate, such as tensorboard or wandb; may be repeated")  # fmt: skip
    parser.add_argument("--push-to-hub", metavar="[OWNER/]NAME.TAG",
                        help="release the finished run on the Hub (default owner: RIDE_TIMM_HUB)")  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads per process (default: all cores, shared)")
    add_flags(parser)
    return parser


def _run_to_rebalance(args: argparse.Namespace, flags: dict[str, object]) -> RunFolder | None:
    """The run whose heads are re-balanced by its own recipe, if `--from` names one and `--recipe` is absent."""
    if args.source is None or args.recipe is not None or flags.get("decouple", "none") == "none":
        return None
    run = RunFolder(args.source)
    return run if run.occupied else None
