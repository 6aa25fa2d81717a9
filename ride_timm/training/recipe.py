"""Recipes: one YAML, one command, one checkpoint, one row of the results table."""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from ..data.augment.policies import Policy, backbone_policy, get_policy
from ..data.datasets import default_profile
from ..errors import InputError
from ..keys import coerce
from ..losses import LOSSES, ExpertsLoss
from .recipe_keys import (
    BALANCED_BATCHES,
    LEARNT,
    DataKeys,
    DecouplingKeys,
    LossKeys,
    ModelKeys,
    RouterKeys,
    RunKeys,
    StageOneKeys,
)
from .recipe_yaml import read_yaml
from .schedules import epochs_for, lr_factor

DEFAULT_RECIPE = "fashion_lt"
# keys of the images that are read; `data_args` renames two
_SOURCE = (
    "dataset", "data_dir", "annotations", "dataset_config", "dataset_revision", "streaming", "shuffle_buffer",
    "imb_type", "imb_factor", "split_seed", "image_column", "label_column", "test_split", "use_val",
)  # fmt: skip
_OF_BACKBONE = ("layer_decay", "drop_rate", "drop_path_rate", "grad_checkpointing")  # without effect once it is frozen
_PREFIX = dict(experts="", heads="decouple_", router="router_")  # of a stage's own keys
_PUBLIC_DATA = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # a name, or a Hub id


@dataclass(frozen=True)
class StageSettings:
    """Epochs, batches, optimizer and learning rate of one stage."""

    name: str
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    sampler: str
    decay_norm_and_bias: bool = True
    schedule: dict[str, Any] = field(default_factory=lambda: dict(schedule="cosine"))
    layer_decay: float | None = None
    lr_per: str = "epoch"

    def lr_at(self, time: float, tick: float = 1) -> float:
        """Learning rate at a time in epochs, counted from 0; tick: see `lr_factor`."""
        return self.lr * lr_factor(time, self.epochs, **self.schedule, tick=tick)


# A dataclass collects the fields of its last base first.
@dataclass(frozen=True, kw_only=True)
class Recipe(RunKeys, RouterKeys, DecouplingKeys, StageOneKeys, LossKeys, ModelKeys, DataKeys):
    """All settings of a run; InputError for values that are invalid or conflict."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, coerce(item, getattr(self, item.name)))
        if self.holdout == 0 and not self.use_val and (self.select == "best" or self.patience is not None):
            raise InputError(
                "select=best and patience need held-out training images: set --holdout, say 0.1, or --use-val "
                "where the data set has a validation split."
            )
        if self.holdout and self.use_val:
            raise InputError(
                f"holdout={self.holdout:g} and use_val exclude each other: epochs are selected on one set."
            )
        if self.few_shot > self.many_shot + 1:
            raise InputError(f"few_shot={self.few_shot}: expected at most many_shot + 1, {self.many_shot + 1}.")
        self._check_frozen()
        if self.teacher_mode == "train" and not self.distillation:
            raise InputError("teacher_mode=train needs distillation: pass --distillation and --teacher.")
        if self.ghost_batch is not None and (self.sync_bn or self.compile):
            other = "sync_bn" if self.sync_bn else "compile"
            raise InputError(f"ghost_batch={self.ghost_batch} and {other} exclude each other.")
        _ = self.loss_args  # the loss checks the keys it depends on

    def _check_frozen(self) -> None:
        """InputError for keys that have no effect on frozen weights."""
        if self.adapter and self.freeze == "trunk":
            raise InputError(f"adapter={self.adapter} freezes the backbone itself: leave freeze=trunk out.")
        unread: tuple[str, ...] = ()
        if self.freeze == "backbone":
            unread += (*_OF_BACKBONE, "adapter")
        if self.freeze == "backbone" or self.freeze_norm:
            unread += ("ghost_batch", "sync_bn")
        if idle := [name for name in unread if getattr(self, name)]:
            frozen = "freeze=backbone" if self.freeze == "backbone" else "freeze_norm=True"
            given = ", ".join(f"{name}={getattr(self, name)}" for name in idle)
            off = " ".join(_flag_off(name, getattr(self, name)) for name in idle)  # the recipe may have set them
            raise InputError(
                f"{frozen} leaves {given} without effect: leave {'them' if idle[1:] else 'it'} out, by {off}."
            )

    @property
    def policy(self) -> Policy:
        """How images become inputs, without AutoAugment."""
        return backbone_policy(self.backbone or self.model) if self.augment == "backbone" else get_policy(self.augment)

    @property
    def pretrained(self) -> bool:
        """The backbone starts from trained weights."""
        return self.backbone_pretrained or self.backbone_weights is not None

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments for `timm.create_model`, without those left at None or off."""
        optional = ["backbone", "split", "layer2_output_dim", "layer3_output_dim"]
        optional += ["layer4_output_dim", "share_layer2", "share_layer3", "drop_path_rate"]
        args = {name: getattr(self, name) for name in ("num_experts", "use_norm", "drop_rate")}
        optional += ["adapter", "adapter_rank"] if self.adapter else []
        args |= {name: value for name in optional if (value := getattr(self, name))}
        args |= dict(backbone_pretrained=self.backbone_weights or True) if self.pretrained else {}
        return args if self.reduce_dimension else args | dict(reduce_dimension=False)

    @property
    def profile(self) -> str:
        """The long-tailed profile: `imb_type`, or the data set's default."""
        return self.imb_type or default_profile(self.dataset)

    @property
    def data_args(self) -> dict[str, Any]:
        """Arguments for `data.load.load_longtail`."""
        values = {name: getattr(self, name) for name in _SOURCE} | dict(imb_type=self.profile)
        return dict(seed=values.pop("split_seed"), **values)

    def on_other_data(self) -> "Recipe":
        """The recipe without what it says of its images: where they are, their columns, splits and profile.

        An epoch that was selected on its validation split, too: the other data may have none.
        """
        names = (*_SOURCE, "select", "patience")
        defaults: dict[str, Any] = {name: Recipe.__dataclass_fields__[name].default for name in names}
        return dataclasses.replace(self, **defaults)

    @property
    def on_disk(self) -> dict[str, str]:
        """Keys that hold a local path, which a published recipe must not."""
        found = {name: getattr(self, name) for name in ("data_dir", "annotations", "backbone_weights")}
        if not _PUBLIC_DATA.fullmatch(self.dataset):
            found["dataset"] = self.dataset
        return {name: value for name, value in found.items() if value is not None}

    @property
    def shots(self) -> tuple[int, int]:
        """Arguments of `priors.shot_groups`: thresholds of many- and few-shot classes."""
        return self.many_shot, self.few_shot

    @property
    def loss_class(self) -> type[ExpertsLoss]:
        """The class of the loss."""
        return LOSSES[self.loss].loss

    @property
    def num_views(self) -> int:
        """Views of each image in a training batch."""
        return self.loss_class.num_views

    @property
    def loss_args(self) -> dict[str, Any]:
        """Arguments for `losses.make_loss`."""
        return LOSSES[self.loss].arguments(self)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages in order: "experts", "heads" where they are re-balanced, "router" of several experts."""
        heads = () if self.decouple == "none" else ("heads",)
        return ("experts", *heads, *(("router",) if self.num_experts > 1 else ()))

    @property
    def ensemble_stage(self) -> str:
        """The stage that leaves the experts as they are used: "heads" or "experts"."""
        return [name for name in self.stages if name != "router"][-1]

    def stage_after(self, name: str) -> str:
        """The stage that follows, "done" after the last."""
        return (*self.stages, "done")[self.stages.index(name) + 1]

    def stage(self, name: str) -> StageSettings:
        """Settings of a stage, one of `stages`."""
        own = ("epochs", "batch_size", "lr", "weight_decay")
        settings: dict[str, Any] = {key: getattr(self, f"{_PREFIX[name]}{key}") for key in own} | dict(name=name)
        if name == "router":
            sampler = "class_balanced" if self.router_balanced else "instance"
            return StageSettings(**settings, optimizer=self.router_optimizer, sampler=sampler)
        settings["optimizer"] = self.optimizer
        if name == "heads":
            settings["epochs"] = self.decouple_epochs if self.decouple in LEARNT else 0
            sampler = "class_balanced" if self.decouple in BALANCED_BATCHES else "instance"
            return StageSettings(**settings, sampler=sampler)
        settings["epochs"] = self.epochs or 0  # not known before the data
        schedule = {key: getattr(self, key) for key in ("schedule", "decay_epochs", "decay_rate", "warmup_epochs")}
        more = ("decay_norm_and_bias", "sampler", "layer_decay", "lr_per")
        return StageSettings(**settings, schedule=schedule, **{key: getattr(self, key) for key in more})

    def for_images(self, num_images: int) -> "Recipe":
        """The recipe with the epochs that so many training images call for, where it leaves them open."""
        return self if self.epochs else self.with_epochs(epochs_for(num_images))

    def with_epochs(self, epochs: int) -> "Recipe":
        """The recipe in so many epochs, those of decay and re-weighting in proportion.

        Where it leaves its epochs open, the defaults among them are parts of the default number of epochs.
        """
        default: Any = Recipe.__dataclass_fields__["epochs"].default
        points = [item for item in dataclasses.fields(self) if item.metadata["in_epochs"]]
        if not self.epochs:
            points = [item for item in points if getattr(self, item.name) == item.default]
        scale = epochs / (self.epochs or default)
        values = {item.name: _scaled(getattr(self, item.name), scale) for item in points}
        return dataclasses.replace(self, epochs=epochs, **values)

    def override(self, values: dict[str, Any]) -> "Recipe":
        """Replace keys, and those that depend on them.

        Other `epochs` alone scale those of decay and re-weighting, and a fifth limits the warm-up. A frozen backbone
        turns off what only its training reads.
        """
        recipe, epochs = self, dataclasses.replace(self, epochs=values.get("epochs", self.epochs)).epochs
        if epochs and epochs != self.epochs:
            recipe = self.with_epochs(epochs)
            values = dict(warmup_epochs=min(self.warmup_epochs, round(epochs / 5))) | values
        if values.get("freeze") == "backbone":
            values = {name: Recipe.__dataclass_fields__[name].default for name in _OF_BACKBONE} | values
        recipe = dataclasses.replace(recipe, **values)
        if "imb_factor" in values and recipe.profile == "none":
            raise InputError(
                f"imb_factor={recipe.imb_factor:g} needs a long-tailed profile: add --imb-type exp or step."
            )
        return recipe

    def differing(self, other: "Recipe") -> list[str]:
        """Names of the keys that differ, of those that change the numbers of a run."""
        free = ("name", "workers", "data_dir", "annotations", "compile", "fused_norm")
        items = [item for item in dataclasses.fields(self) if item.name not in free]
        items = [item for item in items if not (item.metadata["by_data"] and getattr(self, item.name) is None)]
        mine = self.with_epochs(other.epochs) if other.epochs and not self.epochs else self
        changed = [item.name for item in items if getattr(mine, item.name) != getattr(other, item.name)]
        return [name for name in changed if name != "imb_type" or self.profile != other.profile]

    def to_yaml(self) -> str:
        """All keys as YAML."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def stage_flag(stage: str, key: str) -> str:
    """The flag of a stage's own key, such as "lr" or "batch_size"."""
    return "--" + f"{_PREFIX[stage]}{key}".replace("_", "-")


def _flag_off(name: str, value: Any) -> str:
    """The flag that turns off a key of this value, whose default is off: False, 0 or None."""
    flag, default = name.replace("_", "-"), Recipe.__dataclass_fields__[name].default
    return f"--no-{flag}" if value is True else f"--{flag} {'none' if default is None else f'{default:g}'}"


def _scaled(epochs: Any, scale: float) -> Any:
    if isinstance(epochs, tuple):
        return tuple(_scaled(epoch, scale) for epoch in epochs)
    return round(epochs * scale) if epochs > 0 else epochs  # -1 is never


def available() -> list[str]:
    """Names of the shipped recipes."""
    entries = files("ride_timm").joinpath("recipes").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def _shipped(name: str) -> Any:
    return files("ride_timm").joinpath("recipes").joinpath(f"{name}.yaml")


def describe(name: str) -> str:
    """Head of a shipped recipe: title, paper, command, cost and result."""
    lines = _shipped(name).read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines if line.startswith("#"))


def listing() -> str:
    """Names and heads of all shipped recipes."""
    return "\n\n".join(f"{name}\n" + indent(describe(name), "  ") for name in available())


def load_recipe(name: str | Path) -> Recipe:
    """Load a recipe by its name or from a YAML file.

    InputError for an unknown name, invalid YAML, unknown keys or bad values.
    """
    if str(name) in available():
        data = _shipped(str(name)).read_bytes()
    elif os.path.isfile(name):
        data = Path(name).read_bytes()
    else:
        raise InputError(
            f"recipe {str(name)!r}: no such recipe or file; there are {', '.join(available())} (--recipe alone "
            "describes them)."
        )
    values = read_yaml(data, str(name))
    known = [item.name for item in dataclasses.fields(Recipe)]
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        raise InputError(f"recipe {name}: unknown key {', '.join(unknown)}; the keys are {', '.join(known)}.")
    return Recipe(**dict(dict(name=Path(name).stem), **values))
