"""Our variants: the training script's stage, loader and loop, no run folder."""

from __future__ import annotations

import sys
from typing import Any

from accelerate.state import AcceleratorState
from batches import random_images
from record import ROOT
from tqdm import tqdm

sys.path.insert(0, str(ROOT))  # train_accelerate.py is not installed, and this checkout is measured

from ride_timm.cli.process import Signals
from ride_timm.data.image_set import LongTailData
from ride_timm.hardware import keep_memory
from ride_timm.training.build import RunData, Teacher, build_accelerator, build_model
from ride_timm.training.options import parse_arguments
from ride_timm.training.recipe import Recipe, load_recipe
from ride_timm.training.stages import build_stage
from ride_timm.training.watch import Watch
from train_accelerate import train_epoch


def make_recipe(
    model: str, batch_size: int, size: int, num_experts: int = 3, name: str = "cifar100_lt", **run: Any
) -> Recipe:
    """CIFAR-100-LT recipe with another network and batch; `run`: further keys."""
    augment = "cifar" if model == "ride_resnet32" else "imagenet"
    values = dict(model=model, batch_size=batch_size, num_experts=num_experts, augment=augment, input_size=size)
    return load_recipe(name).override(values | run)


class Training:
    """A stage on an image set, built as the training script builds it; it learns from a teacher if one is given."""

    def __init__(
        self, recipe: Recipe, image_set: Any, num_classes: int, stage: str = "experts", teacher: Teacher | None = None
    ) -> None:
        AcceleratorState._reset_state(True)  # one process measures several precisions
        options, _ = parse_arguments([])
        accelerator = build_accelerator(recipe, options)
        names = tuple(map(str, range(num_classes)))
        longtail = LongTailData(image_set, random_images([1], recipe.input_size), names, "random images")
        data = RunData.of(longtail, recipe, accelerator)
        model = build_model(recipe, data, options, None)
        keep_memory()
        self.stage = build_stage(stage, recipe, data, model, teacher, accelerator)
        self.watch = Watch(accelerator, Signals(), recipe.mixed_precision)

    def train_batches(self, batches: Any, epoch: int = 0) -> float:
        """Run the script's loop over these batches as one epoch -> mean loss."""
        self.stage.loader = batches
        return train_epoch(self.stage, epoch, self.stage.accelerator, self.watch, tqdm(disable=True))
