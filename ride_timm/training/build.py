"""Build the parts of a run: accelerator, data, model and teacher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch import nn

from ..data.augment.policies import Policy
from ..data.class_order import class_order
from ..data.image_set import ImageSet, LongTailData
from ..data.load import hold_out, load_longtail
from ..data.loaders import make_loader
from ..data.readable import find_unreadable, leave_out
from ..errors import InputError, first_line, listed
from ..evaluation.evaluate import evaluation_batch
from ..files import read_class_values
from ..models import ClassAffine, Ride
from ..models.fused import fuse
from ..models.load import create_ride_model, load_model, load_teacher
from ..models.release import class_names
from ..models.weights_file import weights_sha256
from ..priors import inverse_root_weights
from .options import Options
from .recipe import Recipe, StageSettings
from .state import TrainingState, frozen_sha256, load_trained

_ADVICE = "; replace it and pass --resume, or begin anew with --max-unreadable N, which leaves out up to N such images"


def build_accelerator(recipe: Recipe, options: Options) -> Accelerator:
    """Accelerate's device placement, precision, compilation and trackers for a run.

    InputError for a precision that the device does not have.
    """
    if recipe.compile:  # two graphs, of the full and of the last batch; one of any size would be slower
        os.environ.setdefault("ACCELERATE_DYNAMO_USE_DYNAMIC", "false")
    try:
        return Accelerator(
            # the loop divides the loss itself; the launcher's setting would divide it once more
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            mixed_precision=recipe.mixed_precision,
            dynamo_backend="inductor" if recipe.compile else None,
            log_with=list(options.trackers) or None,
            project_dir=options.output if options.trackers else None,
        )
    except ValueError as error:
        if "mixed precision" not in str(error):
            raise
        raise InputError(
            f"mixed_precision={recipe.mixed_precision}: this device does not have it; pass --mixed-precision no, or "
            f"another ({first_line(error)})."
        ) from error


@dataclass(frozen=True)
class RunData:
    """The image sets of a run, and the loaders over them.

    train: images trained on; held_out: those that select the epoch; size: of the input, in pixels.
    policy, train_policy: augmentation without and with AutoAugment. recipe: with the epochs for so many images.
    contents: numbers of training images, for the state of the run.
    """

    longtail: LongTailData
    train: ImageSet
    held_out: ImageSet | None
    policy: Policy
    train_policy: Policy
    size: int
    recipe: Recipe
    accelerator: Accelerator
    contents: dict[str, Any] | None = None

    @classmethod
    def of(cls, longtail: LongTailData, recipe: Recipe, accelerator: Accelerator) -> RunData:
        """Augmentation, image size, held-out images and epochs as the recipe says."""
        policy = recipe.policy
        train_policy = policy.strong(recipe.auto_augment, recipe.cutout)
        train, held_out = longtail.train, longtail.val
        if recipe.holdout:
            train, held_out = hold_out(longtail.train, recipe.holdout, recipe.split_seed)
        size = policy.input_size(recipe.input_size)
        recipe = recipe.for_images(len(train))
        return cls(longtail, train, held_out, policy, train_policy, size, recipe, accelerator)

    @property
    def num_classes(self) -> int:
        return self.longtail.num_classes

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class, held-out ones included, [C]."""
        return self.longtail.class_counts

    @property
    def train_counts(self) -> list[int]:
        """Images of each class that are trained on, held-out ones left out, [C]."""
        return np.bincount(self.train.labels, minlength=self.num_classes).tolist()

    @property
    def num_views(self) -> int:
        """Views of each image in a training batch: two only where AutoAugment or Cutout make them differ."""
        return self.recipe.num_views if self.train_policy != self.policy else 1

    def train_loader(self, settings: StageSettings, policy: Policy, num_views: int = 1) -> Any:
        """Augmented batches (images [num_views * b, C, H, W], labels [b]) of this process."""
        options: dict[str, Any] = dict(batch_size=settings.batch_size, views=num_views)
        options |= dict(sampler=settings.sampler, epochs=settings.epochs)
        return self._loader(self.train, policy, train=True, **options)

    def test_loader(self, image_set: ImageSet) -> Any:
        """Every image once, test transform: this process' batches."""
        return self._loader(image_set, self.policy, train=False, batch_size=evaluation_batch(self.size))

    def _loader(self, image_set: ImageSet, policy: Policy, **options: Any) -> Any:
        return make_loader(
            image_set,
            policy,
            seed=self.recipe.seed,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_workers=self.recipe.workers,
            device=self.accelerator.device,
            input_size=self.size,
            reduced_decode=self.recipe.reduced_decode,
            **options,
        )


def load_data(recipe: Recipe, accelerator: Accelerator, state: TrainingState | None = None) -> RunData:
    """Read the recipe's data set, and hold out the training images that select the epoch.

    Unreadable training images are left out where the recipe allows it; a resumed run leaves out those that it began
    without, and is refused where its data are others.
    """
    with accelerator.local_main_process_first():  # the other processes read its cache
        longtail = load_longtail(**recipe.data_args)
    contents = dict(available=longtail.available, class_counts=longtail.class_counts)
    if state is not None and state.begun:
        _check_unchanged(contents, state.contents, longtail.class_names)
        longtail = leave_out(longtail, state.unreadable)
    elif recipe.max_unreadable is not None:
        longtail = _readable(longtail, recipe.max_unreadable, recipe.workers, accelerator)
    if accelerator.is_main_process:
        for notice in filter(None, (longtail.notice, longtail.unreadable_notice)):
            print(notice, file=sys.stderr)
    if not recipe.streaming:
        longtail = replace(longtail, train=replace(longtail.train, advice=_ADVICE))
    return replace(RunData.of(longtail, recipe, accelerator), contents=contents)


def _check_unchanged(now: dict[str, Any], then: dict[str, Any] | None, class_names: Sequence[str]) -> None:
    """InputError where the training images have other numbers than when the run began."""
    if then is None or now == then:
        return
    counts, before = now["class_counts"], then["class_counts"]
    if len(counts) != len(before):
        change = f"{len(counts)} classes, {len(before)} then"
    elif counts != before:
        rows = zip(class_names, counts, before, strict=True)
        change = listed(f"class {name!r} has {n} images, {m} then" for name, n, m in rows if n != m)
    else:
        change = f"{now['available']} images to select from, {then['available']} then"
    raise InputError(
        f"the training data have changed since the run began: {change}; restore them, or choose another --output."
    )


def _readable(data: LongTailData, limit: int, workers: int, accelerator: Accelerator) -> LongTailData:
    """The data without its unreadable training images.

    InputError for more than `limit` of them, and for any in another set, whose results would not be comparable.
    """
    sets = [data.train, data.test, *([] if data.val is None else [data.val])]
    part = accelerator.process_index, accelerator.num_processes
    train, *others = [sorted(gather_object(find_unreadable(images, workers, *part))) for images in sets]
    for images, found in zip(sets[1:], others, strict=True):
        if found:
            raise InputError(
                f"unreadable images in split {images.split!r}, which is evaluated, {len(found)}; replace or delete "
                f"them: {listed(error for _, error in found)}"
            )
    if len(train) > limit:
        raise InputError(
            f"max_unreadable={limit}: unreadable training images, {len(train)}: {listed(e for _, e in train)}; "
            f"replace or delete them, or leave them out by --max-unreadable {len(train)}."
        )
    return leave_out(data, train)


def build_model(recipe: Recipe, data: RunData, options: Options, state: TrainingState | None) -> Ride:
    """The recipe's network: from its seed, from `--from`, or from the state of the resumed run."""
    weights = {} if state is None else _without_router(state.model)  # empty before the first epoch has ended
    complete = weights and recipe.adapter is None  # a state lacks what adapters leave frozen
    source = None if complete else options.source or (None if state is None else state.source)
    if source is not None or complete:
        recipe = replace(recipe, backbone_pretrained=False, backbone_weights=None)  # other weights follow
    model = create_model(recipe, data.num_classes, source, data.size, data.longtail.class_names)
    if recipe.fused_norm and data.accelerator.device.type == "cpu":
        fuse(model)
    if state is None or not weights:
        return model
    if state.frozen != (found := frozen_sha256(model)):
        raise InputError(
            f"the frozen weights of the backbone have SHA-256 {found}, those that the run in {options.output} began "
            f"with {state.frozen}: restore the backbone's weights, or choose another --output."
        )
    if any(".fc.affine." in name for name in weights):
        model.add_class_affine()
    load_trained(model, weights)
    return model


def create_model(
    recipe: Recipe,
    num_classes: int,
    source: str | None = None,
    size: int | None = None,
    names: Sequence[str] | None = None,
) -> Ride:
    """The recipe's network without a router, from its seed, or with the trunk and experts of `source`.

    size: image size in pixels; names: of the classes, in whose order the classifiers of `source` are put. Raises
    `InputError` for an argument the network does not take, or weights of another.
    """
    torch.manual_seed(recipe.seed)
    model = create_ride_model(recipe.model, size, num_classes=num_classes, router=False, **recipe.model_args)
    if source is not None:
        loaded = load_model(source)
        if loaded.has_class_affine:
            model.add_class_affine()
        try:
            model.load_state_dict(_without_router(loaded.state_dict()))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"{source} holds another model than the recipe's {recipe.model}: {reason}") from error
        if names is not None:
            reorder_classes(model, np.argsort(class_order(class_names(loaded), names, source)).tolist())
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def reorder_classes(model: Ride, classes: Sequence[int]) -> None:
    """Put each expert's classifier in another order of its classes."""
    for expert in model.experts:
        *_, last = (layer for layer in expert.fc.modules() if isinstance(layer, nn.Linear | nn.Conv2d))  # of an MLP
        for layer in (last, *([expert.fc.affine] if isinstance(expert.fc, ClassAffine) else [])):
            for tensor in layer.state_dict().values():
                tensor.copy_(tensor[classes])


def _without_router(weights: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in weights.items() if not name.startswith("router.")}


@dataclass(frozen=True)
class Teacher:
    """The network that distillation learns from, and its identity in the run's state."""

    model: nn.Module
    spec: str

    @cached_property
    def identity(self) -> dict[str, str]:
        """Path or name, and SHA-256 of the weights."""
        return dict(spec=self.spec, sha256=weights_sha256(self.model.state_dict()))


def build_teacher(recipe: Recipe, data: RunData, options: Options, state: TrainingState | None) -> Teacher | None:
    """The teacher of stage one, if the recipe distils; a resumed run's own, by path and hash.

    Raises `InputError` where none is named, or where the weights are not those the run began with.
    """
    if not recipe.distillation or "experts" not in options.stages:
        return None
    known = None if state is None else state.teacher
    spec = options.teacher or (known["spec"] if known else None)
    if spec is None:
        raise InputError("this recipe learns from a teacher: name one by --teacher.")
    if known is not None and options.teacher is None and spec.startswith((".", "/")) and not Path(spec).exists():
        raise InputError(f"the teacher of this run, {spec}, is gone: name its new path by --teacher.")
    teacher = Teacher(load_teacher(spec, data.num_classes, (3, data.size, data.size)), str(spec))
    if hasattr(teacher.model, "pretrained_cfg"):
        order = class_order(class_names(teacher.model), data.longtail.class_names, str(spec))
        if order != sorted(order):
            raise InputError(f"the teacher {spec} has the data's classes in another order: number them as it does.")
    if known is not None and teacher.identity["sha256"] != known["sha256"]:
        raise InputError(
            f"teacher={spec}: its weights differ from those of {known['spec']}, which the run in {options.output} "
            "began with; leave --teacher out, or choose another --output."
        )
    return teacher


def build_class_weights(
    recipe: Recipe, data: RunData, options: Options, state: TrainingState | None
) -> list[float] | None:
    """Class weights of stage one, if the recipe has them; a resumed run's own.

    Raises `InputError` for a file that does not give each class a weight above 0.
    """
    if state is not None and state.class_weights is not None:
        return state.class_weights
    if recipe.class_weights is None or "experts" not in options.stages:
        return None
    if recipe.class_weights == "auto":
        return inverse_root_weights(data.train_counts).tolist()
    weights = read_class_values(recipe.class_weights, data.longtail.class_names)
    if 0 in weights:
        name = data.longtail.class_names[weights.index(0)]
        raise InputError(f"class_weights={recipe.class_weights}: class {name!r} has weight 0, expected one above 0.")
    return weights
