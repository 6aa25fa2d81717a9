"""Our side: the training script's own loop, loader and objective, without its run folder."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from record import ROOT
from timm.optim import create_optimizer_v2
from tqdm import tqdm

sys.path.insert(0, str(ROOT))  # the training script is no package, and this checkout is what is measured

from ride_timm.data.augment.policies import get_policy
from ride_timm.hardware import keep_memory
from ride_timm.training.recipe import Recipe, load_recipe
from ride_timm.training.run_folder import create_model
from train_accelerate import Run


def make_recipe(
    model: str, batch_size: int, size: int, num_experts: int = 3, name: str = "cifar100_lt", **run: Any
) -> Recipe:
    """A CIFAR-100-LT recipe with another network or batch; `run`: other keys, such as mixed_precision."""
    augment = "cifar" if model == "ride_resnet32" else "imagenet"
    values = dict(model=model, batch_size=batch_size, num_experts=num_experts, augment=augment, input_size=size)
    return load_recipe(name).override(values | run)


class Training(Run):
    """Stage one on an image set, up to the loop: `train_batches(batches)` is one epoch over these.

    Model, objective, loader and loop are the script's; its `train` is where optimizer and `prepare` are taken from.
    """

    def __init__(self, recipe: Recipe, image_set: Any, num_classes: int) -> None:
        AcceleratorState._reset_state(True)  # one process measures several precisions
        self.recipe = recipe
        backend = "inductor" if recipe.compile else None
        self.accelerator = Accelerator(mixed_precision=recipe.mixed_precision, dynamo_backend=backend, cpu=True)
        self.policy = self.train_policy = get_policy(recipe.augment)
        self.decoupling = False
        self.size = self.policy.input_size(recipe.input_size)
        self.signals = SimpleNamespace(check=lambda: None)
        self.train_set, self.data, self.teacher = image_set, SimpleNamespace(num_classes=num_classes), None
        self.model = create_model(recipe, num_classes)
        keep_memory()
        if recipe.fused_norm:
            self.model.fuse_training()
        self.stage = recipe.stage("experts")
        self.stage_objective = self.objective(self.stage)
        optimizer = create_optimizer_v2(
            self.stage_objective.trainable_parameters(),
            opt=recipe.optimizer,
            lr=self.stage.lr,
            weight_decay=self.stage.weight_decay,
            momentum=recipe.momentum,
            fused=True,
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.stage_objective, optimizer)

    def train_batches(self, batches: Any, epoch: int = 0) -> float:
        """The script's loop over these batches, as in an epoch of the recipe; their mean loss."""
        bar = tqdm(disable=True)
        parts = (self.stage_objective, self.wrapped, self.optimizer)
        return self.train_epoch(self.stage, epoch, *parts, batches, bar, ema=None, changes=[])
