"""Recipes: one YAML, one command, one checkpoint, one row of the results table."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from textwrap import indent
from typing import Any, get_type_hints

import yaml

from ..errors import InputError
from ..keys import coerce, key
from ..losses import LOSSES
from . import methods
from .schedules import SCHEDULES, lr_factor

DEFAULT_RECIPE = "fashion_lt"
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
    decay_norm_and_bias: bool
    schedule: dict[str, Any]
    balanced: bool

    def lr_at(self, epoch: int) -> float:
        """Learning rate in an epoch, counted from 0."""
        return self.lr * lr_factor(epoch, self.epochs, **self.schedule)


@dataclass(frozen=True)
class Recipe:
    """All that decides a run, read from YAML and flags; unknown keys and values out of range are an `InputError`."""

    # fmt: off
    dataset: str = key("data", "fashion_lt (embedded), imagenet_lt, places_lt, inat18, cifar10, cifar100, a Hub id owner/name, or a local path", "fashion_lt")
    data_dir: str | None = key("data", "read the data set from this folder instead of the Hub")
    annotations: str | None = key("data", "folder of annotation lists, `path label` by line (default for imagenet_lt, places_lt, inat18: data_dir)")
    streaming: bool = key("data", "with annotation lists, read a Hub data set's rows in passing instead of downloading it", False)
    shuffle_buffer: int = key("data", "images a worker holds back for shuffling a stream", 1000, low=1)
    imb_type: str = key("data", "long-tailed profile; none takes the data as they are", "exp", choices=("exp", "step", "none"))
    imb_factor: float = key("data", "images of the rarest class over those of the most frequent (papers write IF 100 for 0.01)", 0.01, above=0, high=1)
    split_seed: int = key("data", "seed of the long-tailed selection; 0 is the published split", 0, low=0, high=2**32 - 1)
    image_column: str | None = key("data", "column of the images (default: the first image column)")
    label_column: str | None = key("data", "column of the labels (default: fine_label, label or labels)")
    test_split: str | None = key("data", "split to test on (default: test, validation or val)")
    use_val: bool = key("data", "choose epochs on the data set's validation split, not on held-out training images", False)
    many_shot: int = key("data", "many-shot classes have more training images than this", 100, low=0)
    few_shot: int = key("data", "few-shot classes have fewer training images than this", 20, low=0)
    augment: str = key("data", "augmentation and normalisation: cifar, fashion, imagenet, inat", "cifar")
    auto_augment: str | None = key("data", "timm's AutoAugment, RandAugment or AugMix on top, such as rand-m9-mstd0.5 or original")
    input_size: int | None = key("data", "side of the input in pixels (default: the augmentation's)", low=8)
    reduced_decode: bool = key("data", "decode large JPEGs at reduced size: faster, slightly other pixels", False)
    holdout: float = key("data", "share of every training class held out for selection", 0.0, low=0, high=0.5)

    model: str = key("model", "timm name of the network", "ride_resnet32")
    backbone: str | None = key("model", "timm network to cut (model: ride)")
    split: str | None = key("model", "first stage of the experts (model: ride; default: its family's)")
    backbone_pretrained: bool = key("model", "start from timm's weights of the backbone (model: ride)", False)
    num_experts: int = key("model", "number of experts", 3, low=1)
    reduce_dimension: bool = key("model", "experts' stages at 3/4 of their width", True)
    use_norm: bool = key("model", "cosine heads", True)
    layer2_output_dim: int | None = key("model", "planes of layer2 (CIFAR networks)", low=1)
    layer3_output_dim: int | None = key("model", "planes of layer3", low=1)
    layer4_output_dim: int | None = key("model", "planes of layer4 (ImageNet networks)", low=1)
    share_layer3: bool = key("model", "layer3 in the shared trunk (ImageNet networks)", False)
    drop_rate: float = key("model", "dropout before the classifiers", 0.0, low=0, high=0.99)
    drop_path_rate: float = key("model", "stochastic depth (networks that know it)", 0.0, low=0, high=0.99)

    loss: str = key("stage one", "training loss", "ride", choices=tuple(LOSSES))
    additional_diversity_factor: float = key("stage one", "RIDE's lambda; 0 means the collaborative loss", -0.45)
    base_diversity_temperature: float = key("stage one", "temperature of the diversity term", 1.0, above=0)
    reweight: bool = key("stage one", "deferred re-weighting by effective numbers", True)
    reweight_epoch: int = key("stage one", "epochs before re-weighting begins; -1 never", 160, low=-1)
    reweight_factor: float = key("stage one", "spread of the class-wise temperature", 0.05, low=0, high=1)
    max_margin: float = key("stage one", "largest LDAM margin", 0.5, above=0)
    gamma: float = key("stage one", "focal loss exponent", 1.0, low=0)
    tau: float = key("stage one", "strength of the loss logit_adjustment", 1.0, low=0, high=10)
    inverse_tau: float = key("stage one", "strength of the inverse prior of SADE's third expert", 2.0, low=0, high=10)
    taus: tuple[float, ...] = key("stage one", "strength of adjustment by expert for balpoe and mdcs, mean 1 (default: evenly from 0 to 2, mdcs from -0.5 to 2.5)", (), low=-10, high=10)
    consistency: float = key("stage one", "weight of mdcs's consistency of the strong view (auto_augment, random_erasing) with the plain one", 0.6, low=0, high=100)
    label_smoothing: float = key("stage one", "share of a label that goes to all classes (losses of plain cross entropy)", 0.0, low=0, high=0.9)
    mixup_alpha: float = key("stage one", "timm's mixup; 0 is none", 0.0, low=0, high=10)
    cutmix_alpha: float = key("stage one", "timm's CutMix; 0 is none, with mixup one of them at random", 0.0, low=0, high=10)
    random_erasing: float = key("stage one", "timm's random erasing: probability of an image (of mdcs: of its strong view)", 0.0, low=0, high=1)
    ema_decay: float | None = key("stage one", "train on, but evaluate and keep timm's moving average of the weights", above=0, high=0.99999)
    distillation: bool = key("stage one", "learn from a teacher as well (needs --teacher)", False)
    distill_temperature: float = key("stage one", "temperature of the distillation", 1.5, above=0)
    teacher_mode: str = key("stage one", "mode of the teacher; the authors' was in train mode", "eval", choices=("eval", "train"))
    epochs: int = key("stage one", "epochs; alone it scales decay and re-weighting epochs with it", 200, low=1)
    batch_size: int = key("stage one", "images a step, over all processes", 128, low=1)
    lr: float = key("stage one", "learning rate", 0.1, above=0)
    weight_decay: float = key("stage one", "weight decay", 5e-4, low=0)
    decay_norm_and_bias: bool = key("stage one", "weight decay on norms and biases too, as the authors do", True)
    schedule: str = key("stage one", "learning-rate schedule", "step", choices=SCHEDULES)
    decay_epochs: tuple[int, ...] = key("stage one", "epochs at which the step schedule decays", (160, 180), low=0)
    decay_rate: float = key("stage one", "factor of each decay", 0.01, above=0, high=1)
    warmup_epochs: int = key("stage one", "epochs of linear warm-up", 5, low=0)

    decouple: str = key("decoupling", "re-balance the heads of --from's network instead of training stage one", "none", choices=methods.DECOUPLINGS)
    decouple_tau: float = key("decoupling", "strength of tau_norm and logit_adjustment", 1.0, low=0, high=10)
    decouple_epochs: int = key("decoupling", "epochs of crt and lws; the others train nothing", 10, low=1)
    decouple_batch_size: int = key("decoupling", "class-balanced images a step, over all processes", 128, low=1)
    decouple_lr: float = key("decoupling", "learning rate, cosine to 0", 0.1, above=0)
    decouple_weight_decay: float = key("decoupling", "weight decay", 5e-4, low=0)

    router_epochs: int = key("router", "epochs", 5, low=1)
    router_batch_size: int = key("router", "images a step, over all processes", 512, low=1)
    router_balanced: bool = key("router", "draw its batches class by class, as the authors do, not as the images come", True)
    router_lr: float = key("router", "learning rate, cosine to 0", 0.01, above=0)
    router_optimizer: str = key("router", "any optimizer of timm", "sgd")
    router_weight_decay: float = key("router", "weight decay", 5e-4, low=0)
    pos_weight: float = key("router", "weight of the samples that a further expert would help", 100.0, above=0)
    top_choices_num: int = key("router", "how many of the largest logits the gates see", 30, low=1)
    share_expert_help_pred_fc: bool = key("router", "one last layer for all gates", True)
    threshold: float = key("router", "a sample goes on to the next expert above this gate probability", 0.5, low=0, high=1)

    name: str = key("run", "name of the recipe in the results (default: that of the file)", "")
    optimizer: str = key("run", "any optimizer of timm; sgd is Nesterov, momentum is not", "sgd")
    momentum: float = key("run", "momentum of SGD", 0.9, low=0, high=0.9999)
    seed: int = key("run", "seed of weights, order and augmentation", 0, low=0, high=2**53)
    mixed_precision: str = key("run", "no, bf16 or fp16", "no", choices=("no", "bf16", "fp16"))
    compile: bool = key("run", "torch.compile the training step (no gain on 2 CPU cores)", False)
    fused_norm: bool = key("run", "on a CPU: BatchNorm, shortcut and ReLU of ResNets in one pass (compiled: needs g++)", False)
    sync_bn: bool = key("run", "BatchNorm statistics over all GPUs instead of each process' share", False)
    ghost_batch: int | None = key("run", "images that BatchNorm takes its statistics from in stage one (default: a process' share); 32 are the authors' 256 on 8 GPUs", low=2)
    gradient_accumulation: int = key("run", "batches per optimizer step", 1, low=1)
    clip_grad: float | None = key("run", "largest gradient norm", above=0)
    workers: int = key("run", "loader processes for large images (small images need none)", 2, low=0)
    eval_every: int = key("run", "epochs between evaluations; the last is always evaluated", 10, low=1)
    select: str = key("run", "which epoch to keep; best is judged on the held-out images", "last", choices=("last", "best"))
    patience: int | None = key("run", "stop after this many evaluations without a better held-out accuracy", low=1)
    # fmt: on

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            object.__setattr__(self, item.name, coerce(item, _types()[item.name], getattr(self, item.name)))
        if self.holdout == 0 and not self.use_val and (self.select == "best" or self.patience is not None):
            raise InputError("select=best and patience judge on held-out training images: set --holdout, say 0.1 "
                             "(or --use-val, where the data set has a validation split).")  # fmt: skip
        if self.holdout and self.use_val:
            raise InputError(f"holdout={self.holdout:g} and use_val: epochs are judged on one set, choose which.")
        if self.few_shot > self.many_shot + 1:
            raise InputError(f"few_shot={self.few_shot}: expected at most many_shot + 1, {self.many_shot + 1}.")
        methods.check(self)
        if self.ghost_batch is not None and self.sync_bn:
            raise InputError("sync_bn widens BatchNorm's batch and ghost_batch narrows it: choose one.")
        if self.ghost_batch is not None and self.compile:
            raise InputError("ghost_batch does not work with compile: leave one of them out.")

    @property
    def model_args(self) -> dict[str, Any]:
        """Arguments for `timm.create_model`; those at None or off are left to the network's own defaults."""
        args = {k: getattr(self, k) for k in ("num_experts", "use_norm", "drop_rate")}
        if not self.reduce_dimension:
            args["reduce_dimension"] = False  # the networks that know it reduce by default
        optional = (
            "backbone",
            "split",
            "backbone_pretrained",
            "layer2_output_dim",
            "layer3_output_dim",
            "layer4_output_dim",
            "share_layer3",
            "drop_path_rate",
        )
        return args | {k: getattr(self, k) for k in optional if getattr(self, k)}

    @property
    def data_args(self) -> dict[str, Any]:
        """Arguments for `data.load.load_longtail`."""
        names = ("dataset", "data_dir", "annotations", "imb_type", "imb_factor", "image_column", "label_column")
        names += ("test_split", "use_val", "streaming", "shuffle_buffer")
        return {name: getattr(self, name) for name in names} | dict(seed=self.split_seed)

    @property
    def on_disk(self) -> dict[str, str]:
        """The keys that name places on a disk, which a recipe from elsewhere must not; a data set by name is none."""
        found = {name: getattr(self, name) for name in ("data_dir", "annotations")}
        if not _PUBLIC_DATA.fullmatch(self.dataset):
            found["dataset"] = self.dataset
        return {name: value for name, value in found.items() if value is not None}

    @property
    def shots(self) -> tuple[int, int]:
        """Thresholds of many- and few-shot classes, for `priors.shot_groups`."""
        return self.many_shot, self.few_shot

    @property
    def num_views(self) -> int:
        """Views of each image that the loss compares."""
        return LOSSES[self.loss][0].num_views

    @property
    def loss_args(self) -> dict[str, Any]:
        """Arguments for `losses.make_loss`."""
        return methods.loss_args(self)

    def stage(self, name: str) -> StageSettings:
        """The settings of stage "experts" or "router"."""
        if name == "router":
            return StageSettings(
                name,
                self.router_epochs,
                self.router_batch_size,
                self.router_optimizer,
                self.router_lr,
                self.router_weight_decay,
                True,
                dict(schedule="cosine"),
                self.router_balanced,
            )
        if self.decouple != "none":
            learns = self.decouple in ("crt", "lws")
            return StageSettings(
                name,
                self.decouple_epochs if learns else 0,
                self.decouple_batch_size,
                self.optimizer,
                self.decouple_lr,
                self.decouple_weight_decay,
                True,
                dict(schedule="cosine" if learns else "constant"),
                learns,
            )
        schedule = dict(
            schedule=self.schedule,
            decay_epochs=self.decay_epochs,
            decay_rate=self.decay_rate,
            warmup_epochs=self.warmup_epochs,
        )
        decay = (self.weight_decay, self.decay_norm_and_bias)
        return StageSettings(name, self.epochs, self.batch_size, self.optimizer, self.lr, *decay, schedule, False)

    def override(self, values: dict[str, Any]) -> Recipe:
        """These values over the recipe's; `epochs` alone scales decay and re-weighting epochs with it."""
        values = dict(values)
        if "epochs" in values:
            item = next(f for f in dataclasses.fields(self) if f.name == "epochs")
            epochs = coerce(item, int, values["epochs"])
            scale = epochs / self.epochs
            if "decay_epochs" not in values:
                values["decay_epochs"] = tuple(round(epoch * scale) for epoch in self.decay_epochs)
            if "reweight_epoch" not in values and self.reweight_epoch > 0:
                values["reweight_epoch"] = round(self.reweight_epoch * scale)
        return dataclasses.replace(self, **values)

    def differing(self, other: Recipe) -> list[str]:
        """Keys in which two recipes disagree, of those that change a run's numbers."""
        free = ("name", "workers", "data_dir", "annotations", "compile", "fused_norm")
        names = [item.name for item in dataclasses.fields(self) if item.name not in free]
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def to_yaml(self) -> str:
        """The recipe as YAML, every key stated."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(Recipe)


def available() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in files("ride_timm").joinpath("recipes").iterdir()
                  if entry.name.endswith(".yaml"))  # fmt: skip


def describe(name: str) -> str:
    """What the head of a shipped recipe says: what it is, its paper, command, cost and result."""
    text = files("ride_timm").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in text.splitlines() if line.startswith("#"))


def listing() -> str:
    """All shipped recipes, each with what its head says."""
    return "\n\n".join(f"{name}\n" + indent(describe(name), "  ") for name in available())


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its name, or from a YAML file; InputError for an unknown name, bad YAML or other keys."""
    if str(name) in available():
        text = files("ride_timm").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    elif os.path.isfile(name):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"recipe {name} is not UTF-8 text.") from error
    else:
        raise InputError(f"recipe {str(name)!r}: no such recipe or file; there are {', '.join(available())} "
                         "(--recipe alone describes them).")  # fmt: skip
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise InputError(f"recipe {name}: not YAML ({str(error).splitlines()[0]}).") from error
    if not isinstance(values, dict):
        raise InputError(f"recipe {name}: expected `key: value` lines.")
    known = [item.name for item in dataclasses.fields(Recipe)]
    unknown = [str(k) for k in values if k not in known]
    if unknown:
        raise InputError(f"recipe {name}: unknown key {', '.join(unknown)}; the keys are {', '.join(known)}.")
    return Recipe(**dict(dict(name=Path(name).stem), **values))
