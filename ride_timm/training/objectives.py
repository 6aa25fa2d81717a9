"""Objectives: a model joined to its loss, what `timm.task` calls a task. `objective(images, targets)` -> loss, logits.

Prepare the objective with Accelerate, not the model: DDP synchronises gradients only through the wrapped `forward`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.augment.mixing import MixedTargets
from ..errors import InputError
from ..losses import ExpertsLoss
from ..losses.terms import cross_entropy, distillation, router_loss, widen
from .ghost_batches import forward_in_parts


class Objective(nn.Module):
    """A model and the loss it is trained with.

    images [B, in_chans, H, W], targets [B] -> {"loss": scalar, "logits": [B, C], detached mean over the experts}.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0."""

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters for the optimizer, in the model's order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def keep_frozen(model: nn.Module, freeze: str, freeze_norm: bool) -> None:
    """Set what is frozen to eval mode, so that it keeps its statistics and drops nothing.

    freeze: "trunk", "backbone" (all but the classifiers) or "none". freeze_norm: every BatchNorm as well.
    """
    if freeze == "backbone":
        model.eval()
    elif freeze == "trunk":
        model.trunk.eval()
    if freeze_norm:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


class ExpertsObjective(Objective):
    """Stage one: trunk and experts under a loss over all experts' logits.

    freeze: "trunk", or "backbone", all but the classifiers; they stay in eval mode. freeze_norm: every BatchNorm keeps
    its statistics, while its scale and shift learn. ghost_batch: images per BatchNorm statistic; None takes the
    process' batch.
    Raises `InputError` for a model with a router, which would get no gradients. RIDE, arXiv:2010.01809, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: ExpertsLoss,
        *,
        freeze: str = "none",
        freeze_norm: bool = False,
        ghost_batch: int | None = None,
    ):
        super().__init__(model)
        self.ghost_batch = ghost_batch
        self.freeze, self.freeze_norm = freeze, freeze_norm
        if getattr(model, "router", None) is not None:
            raise InputError("stage one trains no router: create the model with router=False")
        self.loss = loss
        if freeze == "trunk":
            model.trunk.requires_grad_(False)
        elif freeze == "backbone":
            model.requires_grad_(False)
            for head in model.get_classifier():
                head.requires_grad_(True)
        ExpertsObjective.train(self, self.training)

    def train(self, mode: bool = True) -> "ExpertsObjective":
        """Set the mode; what is frozen stays in eval mode."""
        super().train(mode)
        keep_frozen(self.model, self.freeze, self.freeze_norm)
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch of the loss, counted from 0."""
        self.loss.set_epoch(epoch)

    def expert_logits(self, images: Tensor) -> Tensor:
        """Logits of all experts, [B, E, C]."""
        return forward_in_parts(lambda part: self.model.forward_experts(part)[1], self.model, images, self.ghost_batch)

    def loss_of(self, expert_logits: Tensor, targets: Tensor | MixedTargets) -> Tensor:
        """The loss; of mixed targets, the mean over both labels by their fractions. arXiv:1710.09412, section 2"""
        if not isinstance(targets, MixedTargets):
            return self.loss(expert_logits, targets)
        one, other = (self.loss(expert_logits, labels) for labels in targets[:2])
        return targets.fraction * one + (1 - targets.fraction) * other

    def forward(self, images: Tensor, targets: Tensor | MixedTargets) -> dict[str, Tensor]:
        """Loss and logits of one batch."""
        expert_logits = self.expert_logits(images)
        return {"loss": self.loss_of(expert_logits, targets), "logits": expert_logits.detach().mean(1)}


class DistillationObjective(ExpertsObjective):
    """Stage one with a frozen teacher: E * (loss + distillation of the mean logits).

    teacher: any module, images -> logits [B, C]. It is not a submodule: optimizer, DDP and `state_dict` do not see it,
    but it follows device moves. As in the authors' code, the mean of the experts learns from the teacher, not each
    expert, and the sum counts once per expert; their teacher ran in train mode, normalising by the statistics of each
    process' batch (`teacher_mode="train"`).

    Raises `InputError` for a temperature of 0 or less, an unknown mode, or a teacher with other classes. RIDE,
    arXiv:2010.01809, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: ExpertsLoss,
        teacher: nn.Module,
        temperature: float,
        teacher_mode: str = "eval",
        **how: Any,
    ):
        super().__init__(model, loss, **how)
        if not temperature > 0:
            raise InputError(f"the distillation temperature must be above 0, got {temperature}")
        if teacher_mode not in ("eval", "train"):
            raise InputError(f"teacher_mode must be 'eval' or 'train', got {teacher_mode!r}")
        classes = [getattr(net, "num_classes", None) for net in (model, teacher)]
        if None not in classes and classes[0] != classes[1]:
            raise InputError(f"the teacher has {classes[1]} classes, the model {classes[0]}")
        self.temperature = temperature
        self.teacher_mode = teacher_mode
        self._teacher = (teacher.requires_grad_(False),)  # in a tuple nn.Module does not register it
        self.train(self.training)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._teacher[0]

    def train(self, mode: bool = True) -> "DistillationObjective":
        """Set the mode; the teacher follows only with `teacher_mode="train"`."""
        self.teacher.train(mode and self.teacher_mode == "train")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DistillationObjective":
        self.teacher._apply(fn)  # .to(), .cuda(), .double() all come through here
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Loss and logits of one batch."""
        with torch.no_grad():
            teacher_logits = forward_in_parts(self.teacher, self.teacher, images, self.ghost_batch)
        expert_logits = self.expert_logits(images)
        taught = distillation(widen(expert_logits).mean(1), teacher_logits, self.temperature)
        loss = expert_logits.shape[1] * (self.loss_of(expert_logits, targets) + taught)
        return {"loss": loss, "logits": expert_logits.detach().mean(1)}


class HeadsObjective(Objective):
    """Decoupled training: some parameters of the heads learn, all others are frozen.

    trained: names of the parameters that learn, such as every expert's classifier. The loss is cross entropy per
    expert, summed. Without an offset the batches are class-balanced and the model stays in eval mode (Kang et al. 2020,
    arXiv:1910.09217, section 4). offset [C]: added to the logits, log(prior) for balanced softmax on ordinary batches,
    where BatchNorm stays in train mode (Jin et al. 2023, arXiv:2304.01279, section 4.1) unless it was frozen in stage
    one: freeze and freeze_norm are those of `ExpertsObjective`.
    Raises `InputError` for a name that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Sequence[str],
        offset: Tensor | None = None,
        *,
        freeze: str = "none",
        freeze_norm: bool = False,
    ):
        super().__init__(model)
        self.freeze, self.freeze_norm = freeze, freeze_norm
        self.offset: Tensor | None
        self.register_buffer("offset", offset, persistent=False)
        parameters = dict(model.named_parameters())
        unknown = [name for name in trained if name not in parameters]
        if unknown or not trained:
            raise InputError(f"the model has no parameter {', '.join(unknown) or 'to train'}")
        model.requires_grad_(False)
        for name in trained:
            parameters[name].requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "HeadsObjective":
        """Set the mode; without an offset the model stays in eval mode, so BatchNorm keeps its statistics."""
        super().train(mode)
        keep_frozen(self.model, "backbone" if self.offset is None else self.freeze, self.freeze_norm)
        return self

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Loss and logits of one batch."""
        _, expert_logits = self.model.forward_experts(images)
        adjusted = widen(expert_logits) if self.offset is None else widen(expert_logits) + self.offset
        return {"loss": cross_entropy(adjusted, targets), "logits": expert_logits.detach().mean(1)}


class RouterObjective(Objective):
    """Stage two: the router learns where the next expert helps; trunk and experts are frozen, in eval mode.

    Raises `InputError` for a model without a router or with a single expert. RIDE, arXiv:2010.01809, section 3.
    """

    def __init__(self, model: nn.Module, pos_weight: float):
        super().__init__(model)
        if getattr(model, "router", None) is None:
            raise InputError("stage two trains a router, the model has none: create it with router=True")
        if model.num_experts < 2:
            raise InputError(f"a router chooses between at least 2 experts, the model has {model.num_experts}")
        if not pos_weight > 0:
            raise InputError(f"pos_weight must be above 0, got {pos_weight}")
        self.pos_weight = pos_weight
        model.requires_grad_(False)
        model.router.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "RouterObjective":
        """Set the router's mode; frozen BatchNorm keeps its statistics, frozen dropout stays off."""
        super().train(mode)
        self.model.eval()
        self.model.router.train(mode)
        return self

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Loss and logits of one batch; the logits are those of all experts."""
        with torch.no_grad():
            features, expert_logits = self.model.forward_experts(images)
        gate_logits = self.model.router(features, expert_logits)
        loss = router_loss(gate_logits, expert_logits, targets, self.pos_weight)
        return {"loss": loss, "logits": expert_logits.mean(1)}
