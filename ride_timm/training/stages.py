"""The stages of a run: experts, re-balanced heads, router."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch import Tensor

from ..data.augment.mixing import MixedTargets, batch_changes
from ..evaluation.evaluate import evaluate, with_macs
from ..evaluation.plots import plot_run
from ..evaluation.tables import GROUPS
from ..losses import ExpertsLoss, make_loss
from ..models import Ride, Router
from .build import RunData, Teacher
from .class_means import heads_from_class_means
from .objectives import DistillationObjective, ExpertsObjective, Objective, RouterObjective
from .optimizers import make_optimizer
from .rebalance import align_experts, decouple
from .recipe import Recipe
from .run_folder import RunFolder
from .selection import Selection
from .state import TrainingState, load_trained, trained_tensors
from .watch import Watch


class Stage:
    """One stage of training: everything the loop needs of it.

    name: its key in results.json, one of `Recipe.stages`. objective: model and loss; `wrapped`: the same prepared by
    Accelerate, which is what the loop calls. Subclasses make the objective and override what differs.
    """

    name: str
    routed = False
    loss: ExpertsLoss | None = None

    def __init__(self, recipe: Recipe, data: RunData, accelerator: Accelerator, objective: Objective) -> None:
        self.recipe, self.data, self.accelerator = recipe, data, accelerator
        self.settings = recipe.stage(self.name)
        self.objective, self.model = objective, objective.model
        optimizer = make_optimizer(self.settings, objective, recipe.momentum)
        if recipe.sync_bn:
            convert_sync_batchnorm(objective)
        self.wrapped, self.optimizer = accelerator.prepare(objective, optimizer)
        if accelerator.num_processes > 1:  # `measure` sends the buffers before they are read
            getattr(self.wrapped, "_orig_mod", self.wrapped).broadcast_buffers = False
        self.loader: Any = self.make_loader() if self.settings.epochs else []
        self.test_loader = data.test_loader(data.longtail.test)
        self.held_out_loader = None if data.held_out is None else data.test_loader(data.held_out)
        self.selection = Selection(recipe.patience, recipe.eval_every)
        self.ema: ModelEmaV3 | None = None
        self.changes: list[Any] = []
        self.metrics: dict[str, Any] | None = None  # of the weights as they are now, if measured

    def make_loader(self) -> Any:
        """Training batches of this process."""
        return self.data.train_loader(self.settings, self.data.policy)

    def is_done(self, epochs: int) -> bool:
        """All epochs are trained, or patience has run out."""
        return epochs >= self.settings.epochs or self.selection.exhausted(epochs)

    def begin_epoch(self, epoch: int) -> None:
        """Move seeds, learning rate, order, loss and mode to an epoch, counted from 0."""
        seed_epoch(self.recipe.seed, epoch, self.accelerator.process_index)
        self.objective.set_epoch(epoch)
        self.loader.set_epoch(epoch)
        self.wrapped.train()
        self.updates_per_epoch = -(-len(self.loader) // self.recipe.gradient_accumulation)
        self.num_updates = epoch * self.updates_per_epoch
        self._set_lr(epoch)

    def lr_at(self, time: float) -> float:
        """Learning rate of the step at a time in epochs, counted from 0; of the layers above all others."""
        return self.settings.lr_at(time, 1 / self.updates_per_epoch if self.settings.lr_per == "step" else 1)

    def _set_lr(self, time: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(time) * group.get("lr_scale", 1.0)  # timm's, by layer

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
        """(images, targets, number of batches in this optimizer step, last of them), the last step's being the rest."""
        accumulation = self.recipe.gradient_accumulation
        for i, (images, targets) in enumerate(self.loader):
            start = i - i % accumulation
            size = min(accumulation, len(self.loader) - start)
            yield images, targets, size, i + 1 == start + size

    def transform_batch(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | MixedTargets]:
        """Random erasing, mixup and CutMix, where the stage has them."""
        for change in self.changes:
            images, targets = change(images, targets)
        return images, targets

    def step(self) -> None:
        """Clip the gradients, update the weights and their EMA."""
        if self.recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.objective.trainable_parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, self.num_updates)
        self.num_updates += 1
        if self.settings.lr_per == "step":
            self._set_lr(self.num_updates / self.updates_per_epoch)

    def evaluate_epoch(self, epochs: int, watch: Watch) -> dict[str, float | None]:
        """Test and held-out accuracy after so many epochs, None where this epoch is not evaluated; notes the best."""
        row: dict[str, float | None] = dict.fromkeys((*GROUPS, "held_out"))
        self.metrics = None
        if epochs % self.recipe.eval_every and epochs < self.settings.epochs:
            return row
        model = self.model if self.ema is None else self.ema.module
        self.metrics = self.measure(model, self.test_loader, watch)
        row |= {name: self.metrics[name] for name in GROUPS}
        if self.held_out_loader is not None:
            row["held_out"] = accuracy = self.measure(model, self.held_out_loader, watch)["class_mean"]
            self.selection.update(accuracy, epochs, trained_tensors(model))
        return row

    def measure(self, model: Ride, loader: Any, watch: Watch) -> dict[str, Any]:
        """Metrics in full precision, with the buffers of the main process, which are the ones that are saved."""
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        counts, recipe = self.data.class_counts, self.recipe
        return evaluate(model, watch.batches(loader), counts, self.routed, recipe.threshold, shots=recipe.shots)

    def conclude(self, epochs: int, watch: Watch) -> dict[str, Any]:
        """Settle the weights that the stage leaves; returns their test metrics."""
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        if self.recipe.select == "best" and self.selection.best["model"]:
            epochs, self.metrics = self.selection.best["epoch"], None
            load_trained(self.model, self.selection.best["model"])
        self.settle()
        metrics = self.metrics or self.measure(self.model, self.test_loader, watch)
        return metrics | dict(epochs=epochs)

    def finish(self, epochs: int, state: TrainingState, run: RunFolder, watch: Watch) -> None:
        """Write the stage's weights, results and plots, and the state from which the next stage begins."""
        metrics, shape = self.conclude(epochs, watch), (self.model.in_chans, self.data.size, self.data.size)
        state.results[self.name] = with_macs(metrics, self.model, shape)
        state.advance(self.recipe.stage_after(self.name), trained_tensors(self.model))
        if self.accelerator.is_main_process:
            run.export(self.model, self.data.policy.data_config(self.data.size), self.data.longtail.class_names)
            facts = dict(num_processes=self.accelerator.num_processes, class_counts=self.data.class_counts)
            facts |= dict(test_source=self.data.longtail.test_source, seconds=round(state.seconds, 1))
            facts |= dict(train_counts=self.data.train_counts) if self.recipe.holdout else {}
            stated = ("unreadable", "source", "teacher", "class_weights")
            facts |= {key: value for key in stated if (value := getattr(state, key))}
            run.write_results(self.recipe, self.accelerator.device, state.results, **facts)
            plot_run(run.path, state.history, run.results(), self.data.longtail, self.recipe.shots)
            run.save(state)  # last, so that a run which is resumed before it does all of this again
        self.accelerator.wait_for_everyone()

    def settle(self) -> None:
        """Change the weights once more after the last epoch; sets `metrics` to None where it does."""


class ExpertsStage(Stage):
    """Stage one: trunk and experts under the recipe's loss, with a teacher or not. RIDE, section 3.2.

    from_scratch: the run began without `--from`, so that an EMA warms up. class_weights [C]: of the loss, if given.
    """

    name = "experts"
    loss: ExpertsLoss

    def __init__(
        self, recipe: Recipe, data: RunData, model: Ride, accelerator: Accelerator, teacher: Teacher | None,
        from_scratch: bool, class_weights: list[float] | None = None,
    ) -> None:  # fmt: skip
        weights = {} if class_weights is None else dict(weights=class_weights)
        self.loss = make_loss(recipe.loss, data.train_counts, **recipe.loss_args, **weights)
        self.num_views, self.from_scratch = data.num_views, from_scratch
        if self.loss.offsets is not None and model.has_class_affine:
            align_experts(model, -self.loss.offsets)  # back to the priors they are trained for
        if recipe.grad_checkpointing:
            model.set_grad_checkpointing()
        how: dict[str, Any] = dict(freeze=recipe.freeze, freeze_norm=recipe.freeze_norm, ghost_batch=recipe.ghost_batch)
        if teacher is None:
            objective = ExpertsObjective(model, self.loss, **how)
        else:
            objective = DistillationObjective(
                model, self.loss, teacher.model, recipe.distill_temperature, recipe.teacher_mode, **how
            )
        super().__init__(recipe, data, accelerator, objective)
        self.changes = batch_changes(
            recipe.random_erasing, recipe.mixup_alpha, recipe.cutmix_alpha, views=self.num_views
        )
        if recipe.ema_decay is not None:
            self.ema = ModelEmaV3(model, recipe.ema_decay, use_warmup=from_scratch)

    def make_loader(self) -> Any:
        return self.data.train_loader(self.settings, self.data.train_policy, self.num_views)

    def begin_epoch(self, epoch: int) -> None:
        if epoch == 0 and self.from_scratch and self.recipe.head_init == "class_means":
            batches = self.data.test_loader(self.data.train)
            heads_from_class_means(self.model, batches, self.accelerator, self.recipe.seed)
            if self.ema is not None:
                self.ema.set(self.model)
        super().begin_epoch(epoch)

    def settle(self) -> None:
        """Align the experts' priors: the router judges by the first experts alone, which must not be biased."""
        if self.loss.offsets is not None and self.model.num_experts > 1:
            align_experts(self.model, self.loss.offsets)
            self.metrics = None


class HeadsStage(Stage):
    """Re-balanced heads on frozen trunk and experts; closed-form methods have no epochs."""

    name = "heads"

    def __init__(self, recipe: Recipe, data: RunData, model: Ride, accelerator: Accelerator) -> None:
        frozen = dict(freeze=recipe.freeze, freeze_norm=recipe.freeze_norm)
        objective = decouple(model, recipe.decouple, data.train_counts, recipe.decouple_tau, recipe.seed, **frozen)
        super().__init__(recipe, data, accelerator, objective)

    def make_loader(self) -> Any:
        strong = self.recipe.decouple == "balanced_softmax"  # batches as in stage one
        return self.data.train_loader(self.settings, self.data.train_policy if strong else self.data.policy)


class RouterStage(Stage):
    """Stage two: a router on frozen experts. RIDE, section 3.3."""

    name = "router"
    routed = True

    def __init__(self, recipe: Recipe, data: RunData, model: Ride, accelerator: Accelerator) -> None:
        torch.manual_seed(recipe.seed)
        gates = (recipe.num_experts, model.experts[0].head_hidden_size, data.num_classes)
        model.add_router(Router(*gates, recipe.top_choices_num, recipe.share_expert_help_pred_fc))
        super().__init__(recipe, data, accelerator, RouterObjective(model, recipe.pos_weight))

    def conclude(self, epochs: int, watch: Watch) -> dict[str, Any]:
        return super().conclude(epochs, watch) | dict(threshold=self.recipe.threshold)


def build_stage(
    name: str, recipe: Recipe, data: RunData, model: Ride, teacher: Teacher | None, accelerator: Accelerator,
    from_scratch: bool = True, class_weights: list[float] | None = None,
) -> Stage:  # fmt: skip
    """One of a recipe's stages, ready for its first epoch."""
    if name == "router":
        return RouterStage(recipe, data, model, accelerator)
    if name == "heads":
        return HeadsStage(recipe, data, model, accelerator)
    return ExpertsStage(recipe, data, model, accelerator, teacher, from_scratch, class_weights)


def seed_epoch(seed: int, epoch: int, rank: int) -> None:
    """Seed Python, NumPy and torch so that no two (epoch, rank) pairs of a stage share a stream."""
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.manual_seed(int.from_bytes(words[:2].tobytes(), "little"))
