"""Losses over the logits of all experts: pure functions, and small modules that own what is fixed for a run.

Every loss module maps `expert_logits [B, E, C], targets [B]` to a scalar. Logits of lower precision are widened to
float32 first. All processes of a distributed run must call a loss together, since its batch means are taken over all
of them.
"""

import inspect
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import priors
from .errors import InputError


def widen(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are where they are wider: half precision is for the network, not for the loss."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def batch_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """(Weighted) mean of a value per sample over the shards of all processes: P * sum_local(w v) / sum_global(w).

    values [B], weights [B] or None -> scalar. P is the number of processes. Averaged over the processes, as DDP does
    with gradients, this is the mean over the joined batch, also for unequal shards; one process' figure is only its
    share of it.
    """
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    total, num_processes = weights.sum(), 1
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        num_processes = dist.get_world_size()
        dist.all_reduce(total)  # a sum of constants: nothing to differentiate
    return (weights * values).sum() * num_processes / total


def cross_entropy(
    expert_logits: Tensor,
    targets: Tensor,
    class_weights: Tensor | None = None,
    margins: Tensor | None = None,
    s: float = 30.0,
) -> Tensor:
    """Cross entropy summed over experts, batch mean; `margins` make it LDAM: s * m_y is taken off the target's logit.

    expert_logits [B, E, C], targets [B], class_weights [C], margins [C] -> scalar. With class weights the mean is
    divided by the sum of the targets' weights, as torch does. LDAM: Cao et al. 2019, arXiv:1906.07413, section 3.
    """
    num_experts, num_classes = expert_logits.shape[1:]
    if margins is not None:
        shift = s * margins[targets, None] * F.one_hot(targets, num_classes)  # [B, C]
        expert_logits = expert_logits - shift[:, None]
    values = F.cross_entropy(expert_logits.flatten(0, 1), targets.repeat_interleave(num_experts), reduction="none")
    return batch_mean(values.view(-1, num_experts).sum(1), None if class_weights is None else class_weights[targets])


def diversity(expert_logits: Tensor, temperature: Tensor) -> Tensor:
    """KL(ensemble || expert) summed over experts, times mean(T)^2; no gradient flows through the ensemble.

    expert_logits [B, E, C], temperature [C] -> scalar, at least 0. RIDE, arXiv:2010.01809, section 3; the authors'
    code measures each expert against the mean of all, not against each other expert, and so do we.
    """
    ensemble = (expert_logits.mean(1, keepdim=True) / temperature).log_softmax(-1).detach()
    log_expert = (expert_logits / temperature).log_softmax(-1)
    kl = F.kl_div(log_expert, ensemble.expand_as(log_expert), reduction="none", log_target=True).sum(-1)  # [B, E]
    return temperature.mean() ** 2 * batch_mean(kl.sum(1))


def focal(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Focal loss, the batch mean of (1 - p_y)^gamma * -log(p_y).

    logits [B, C], targets [B] -> scalar. Lin et al. 2017, arXiv:1708.02002, equation 4, without alpha.
    """
    ce = F.cross_entropy(logits, targets, reduction="none")
    # At p_y = 1 the slope of x^gamma is infinite for gamma < 1, and infinity times the zero beside it is NaN.
    miss = (-torch.expm1(-ce)).clamp_min(torch.finfo(ce.dtype).eps)
    return batch_mean(miss**gamma * ce)


def distillation(mean_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of the logits averaged over experts, batch mean.

    mean_logits [B, C], teacher_logits [B, C] -> scalar, at least 0. Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    teacher = (widen(teacher_logits) / temperature).log_softmax(-1).detach()
    student = (widen(mean_logits) / temperature).log_softmax(-1)
    return temperature**2 * batch_mean(F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1))


def router_targets(expert_logits: Tensor, targets: Tensor) -> Tensor:
    """1 where experts 1..i together are wrong and some longer prefix of the experts is right, for i = 1..E-1.

    expert_logits [B, E, C], targets [B] -> [B, E-1], in the logits' floating type. InputError for fewer than two
    experts. RIDE, arXiv:2010.01809, section 3.
    """
    num_experts = expert_logits.shape[1]
    if num_experts < 2:
        raise InputError(f"a router chooses between at least 2 experts, the model has {num_experts}")
    right = expert_logits.detach().cumsum(1).argmax(-1) == targets[:, None]  # [B, E]; a sum ranks as its mean does
    right_later = right[:, 1:].flip(1).cumsum(1).flip(1) > 0  # [B, E-1]: some prefix longer than i
    return (~right[:, :-1] & right_later).to(expert_logits.dtype)


def router_loss(gate_logits: Tensor, expert_logits: Tensor, targets: Tensor, pos_weight: float = 20.0) -> Tensor:
    """Binary cross entropy of every gate against whether asking for more experts helps, mean over gates and batch.

    gate_logits [B, E-1], expert_logits [B, E, C], targets [B] -> scalar. `pos_weight` multiplies the positives (their
    configurations say 100) and, unlike class weights, does not enter the mean's divisor. InputError for fewer than
    two experts, or gates that do not fit them. RIDE, arXiv:2010.01809, section 3.
    """
    gate_logits, expert_logits = widen(gate_logits), widen(expert_logits)
    wanted = router_targets(expert_logits, targets)
    if gate_logits.shape != wanted.shape:
        raise InputError(f"expected gate logits of shape {tuple(wanted.shape)}, got {tuple(gate_logits.shape)}")
    # By hand where BCEWithLogits would want pos_weight as a tensor, that is a copy to the device at every step.
    bce = pos_weight * wanted * F.softplus(-gate_logits) + (1 - wanted) * F.softplus(gate_logits)
    return batch_mean(bce.mean(1))


class ExpertsLoss(nn.Module):
    """A loss over all experts: buffers follow device moves and stay out of `state_dict`, the recipe restores them.

    expert_logits [B, E, C], targets [B] -> scalar. InputError where C is not the number of class counts.
    """

    def __init__(self, class_counts: Sequence[int] | Tensor | None = None):
        super().__init__()
        self.num_classes = None if class_counts is None else len(class_counts)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, counted from 0; most losses are the same in all of them."""

    def forward(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of one batch."""
        if expert_logits.ndim != 3 or self.num_classes not in (None, expert_logits.shape[-1]):
            raise InputError(
                f"expected expert logits [B, E, {self.num_classes or 'C'}], got shape {tuple(expert_logits.shape)}"
            )
        return self.compute(widen(expert_logits), targets)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        """The loss itself, of checked and widened logits."""
        raise NotImplementedError

    def _keep(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)


class CrossEntropyLoss(ExpertsLoss):
    """Cross entropy of the mean of the experts' logits; `class_balanced` weighs it by effective numbers from the start.

    InputError for `class_balanced` without class counts. Cui et al. 2019, arXiv:1901.05555, section 4.
    """

    def __init__(self, class_counts: Sequence[int] | Tensor | None = None, class_balanced: bool = False):
        super().__init__(class_counts)
        if class_balanced and class_counts is None:
            raise InputError("class-balanced cross entropy needs class counts")
        self._keep("class_weights", priors.effective_number_weights(class_counts) if class_balanced else None)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(expert_logits.mean(1, keepdim=True), targets, self.class_weights)


class FocalLoss(ExpertsLoss):
    """Focal loss of the mean of the experts' logits; gamma 0, the authors' default, is plain cross entropy.

    InputError for a negative gamma. Lin et al. 2017, arXiv:1708.02002, equation 4.
    """

    def __init__(self, gamma: float = 0.0):
        super().__init__()
        if not gamma >= 0:
            raise InputError(f"gamma must be at least 0, got {gamma}")
        self.gamma = gamma

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        return focal(expert_logits.mean(1), targets, self.gamma)


class LDAMLoss(ExpertsLoss):
    """LDAM with deferred re-weighting (LDAM-DRW) on the mean of the experts' logits; without counts, cross entropy.

    Kept from the authors: the margin is multiplied by s although the logits of a cosine head already carry that
    scale, so with a linear head it is s times as large as it looks. Re-weighting starts at epoch > reweight_epoch of
    epochs counted from 1, which is epoch >= reweight_epoch of ours; -1 means never. InputError for an s or max_m that
    is not above 0, or a reweight_epoch below -1. Cao et al. 2019, arXiv:1906.07413, section 3 and algorithm 1.
    """

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor | None = None,
        max_m: float = 0.5,
        s: float = 30.0,
        reweight_epoch: int = -1,
    ):
        super().__init__(class_counts)
        if not (s > 0 and max_m > 0):
            raise InputError(f"max_m and s must be above 0, got {max_m} and {s}")
        if not reweight_epoch >= -1:
            raise InputError(f"reweight_epoch must be an epoch, or -1 for never, got {reweight_epoch}")
        self.s = s
        self.reweight_epoch = reweight_epoch
        known = class_counts is not None
        self._keep("margins", priors.ldam_margins(class_counts, max_m) if known else None)
        self._keep("class_weights", priors.effective_number_weights(class_counts) if known else None)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, counted from 0; the class weights act in epochs >= reweight_epoch."""
        self.reweighting = self.reweight_epoch != -1 and epoch >= self.reweight_epoch and self.class_weights is not None

    def over_experts(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        """The same loss of every expert on its own, summed over them."""
        class_weights = self.class_weights if self.reweighting else None
        return cross_entropy(expert_logits, targets, class_weights, self.margins, self.s)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        return self.over_experts(expert_logits.mean(1, keepdim=True), targets)


class RideLoss(ExpertsLoss):
    """RIDE's stage one: LDAM of each expert plus a distribution-aware diversity term, summed over the experts.

    Sum over e of base_loss_factor * LDAM(z_e) + additional_diversity_factor * mean(T)^2 * KL(ensemble / T || z_e /
    T). A negative factor drives the experts apart. From `reweight_epoch` on (see `LDAMLoss`) class weights enter LDAM
    and T becomes class-wise (`priors.class_temperature`); before, and with `reweight` off, T =
    base_diversity_temperature. Kept from the authors: factor 0 does not only drop the diversity term, it makes the
    loss collaborative, LDAM of the mean logits once for every expert; the KL is to the detached mean of the experts;
    LDAM's margin is scaled by s once more. InputError for a temperature or s out of range. RIDE, arXiv:2010.01809,
    section 3.2, equations 2 to 4.
    """

    def __init__(
        self,
        class_counts: Sequence[int] | Tensor | None = None,
        base_loss_factor: float = 1.0,
        max_m: float = 0.5,
        s: float = 30.0,
        additional_diversity_factor: float = -0.2,
        base_diversity_temperature: float = 1.0,
        reweight: bool = True,
        reweight_epoch: int = -1,
        reweight_factor: float = 0.05,
    ):
        super().__init__(class_counts)
        if not base_diversity_temperature > 0:
            raise InputError(f"base_diversity_temperature must be above 0, got {base_diversity_temperature}")
        self.base = LDAMLoss(class_counts, max_m, s, reweight_epoch if reweight else -1)
        self.base_loss_factor = base_loss_factor
        self.additional_diversity_factor = additional_diversity_factor
        self._keep("temperature", torch.tensor([float(base_diversity_temperature)]))  # [1], the same for every class
        class_temperature = None
        if class_counts is not None:
            class_temperature = priors.class_temperature(class_counts, base_diversity_temperature, reweight_factor)
        self._keep("class_temperature", class_temperature)

    def set_epoch(self, epoch: int) -> None:
        """Begins an epoch, counted from 0; class weights and temperatures act in epochs >= reweight_epoch."""
        self.base.set_epoch(epoch)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        if self.additional_diversity_factor == 0:
            return self.base_loss_factor * expert_logits.shape[1] * self.base.compute(expert_logits, targets)
        temperature = self.class_temperature if self.base.reweighting else self.temperature
        base = self.base.over_experts(expert_logits, targets)
        diverse = diversity(expert_logits, temperature)
        return self.base_loss_factor * base + self.additional_diversity_factor * diverse


# Name in a recipe -> class, and the arguments that the name stands for.
LOSSES = {
    "ride": (RideLoss, {}),
    "ldam": (LDAMLoss, {}),
    "focal": (FocalLoss, {}),
    "ce": (CrossEntropyLoss, {"class_balanced": False}),
    "cb_ce": (CrossEntropyLoss, {"class_balanced": True}),
}


def make_loss(name: str, class_counts: Sequence[int] | Tensor | None = None, **kwargs) -> ExpertsLoss:
    """Loss by its name in a recipe, see `LOSSES`.

    class_counts [C], training images of each class -> a module. InputError for a name or an argument that does not
    exist.
    """
    if name not in LOSSES:
        raise InputError(f"unknown loss {name!r}, expected one of: {', '.join(LOSSES)}")
    loss, fixed = LOSSES[name]
    parameters = inspect.signature(loss).parameters
    accepted = [key for key in parameters if key != "class_counts" and key not in fixed]
    unknown = [key for key in kwargs if key not in accepted]
    if unknown:
        raise InputError(
            f"loss {name!r} does not take {', '.join(unknown)}; it takes: {', '.join(accepted) or 'no arguments'}"
        )
    counts = {"class_counts": class_counts} if "class_counts" in parameters else {}
    return loss(**counts, **fixed, **kwargs)
