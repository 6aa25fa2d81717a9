"""Terms of the losses as pure functions; batch means are over all processes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


def widen(logits: Tensor) -> Tensor:
    """Logits in float32, or wider if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sum_processes(constants: Tensor) -> int:
    """Add up constants over all processes, in place and without gradients; returns the number of processes."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return 1
    dist.all_reduce(constants)
    return dist.get_world_size()


def batch_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """(Weighted) mean over the batch of all processes.

    values [B], weights [B] or None -> scalar: P * sum_local(w v) / sum_global(w) for P processes. The mean over
    processes, as DDP takes it of gradients, is the mean over the global batch, also for unequal local batches; the
    value of one process alone is not. 0 where all weights are.
    """
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    total = weights.sum()
    num_processes = sum_processes(total)
    return (weights * values).sum() * num_processes / total.clamp_min(torch.finfo(total.dtype).tiny)


def cross_entropy(
    expert_logits: Tensor,
    targets: Tensor,
    class_weights: Tensor | None = None,
    margins: Tensor | None = None,
    s: float = 30.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy summed over experts, batch mean; with margins, LDAM.

    expert_logits [B, E, C], targets [B], class_weights [C], margins [C] -> scalar. Class weights enter the divisor of
    the mean, as in torch. LDAM subtracts s * m_y from the target's logit: Cao et al. 2019, arXiv:1906.07413, section 3.
    Label smoothing: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    num_experts, num_classes = expert_logits.shape[1:]
    if margins is not None:
        chosen = torch.arange(num_classes, device=targets.device) == targets[:, None]  # [B, C]; one_hot reads targets
        shift = s * margins[targets, None] * chosen
        expert_logits = expert_logits - shift[:, None]
    repeated = targets.repeat_interleave(num_experts)
    flat = expert_logits.flatten(0, 1)
    values = F.cross_entropy(flat, repeated, reduction="none", label_smoothing=label_smoothing)
    return batch_mean(values.view(-1, num_experts).sum(1), None if class_weights is None else class_weights[targets])


def diversity(expert_logits: Tensor, temperature: Tensor) -> Tensor:
    """mean(T)^2 * KL(ensemble || expert), summed over experts, batch mean.

    expert_logits [B, E, C], temperature [C] -> scalar, at least 0. The ensemble is detached. RIDE, arXiv:2010.01809,
    section 3; as in the authors' code, each expert is compared with the mean of all, not with each other expert.
    """
    ensemble = (expert_logits.mean(1, keepdim=True) / temperature).log_softmax(-1).detach()
    log_expert = (expert_logits / temperature).log_softmax(-1)
    kl = F.kl_div(log_expert, ensemble.expand_as(log_expert), reduction="none", log_target=True).sum(-1)  # [B, E]
    return temperature.mean() ** 2 * batch_mean(kl.sum(1))


def focal(logits: Tensor, targets: Tensor, gamma: float, class_weights: Tensor | None = None) -> Tensor:
    """Focal loss: (weighted) batch mean of (1 - p_y)^gamma * -log(p_y).

    logits [B, C], targets [B], class_weights [C] -> scalar. Class weights enter the divisor of the mean. Lin et al.
    2017, arXiv:1708.02002, equation 4, with p_y of a softmax; the class weights are the alpha of equation 5.
    """
    ce = F.cross_entropy(logits, targets, reduction="none")
    # At p_y = 1 the slope of x^gamma is infinite for gamma < 1, and infinity times 0 is NaN.
    miss = (-torch.expm1(-ce)).clamp_min(torch.finfo(ce.dtype).eps)
    return batch_mean(miss**gamma * ce, None if class_weights is None else class_weights[targets])


def distillation(mean_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of the ensemble's logits, batch mean.

    mean_logits [B, C], teacher_logits [B, C] -> scalar, at least 0. Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    teacher = (widen(teacher_logits) / temperature).log_softmax(-1).detach()
    student = (widen(mean_logits) / temperature).log_softmax(-1)
    return temperature**2 * batch_mean(F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1))


def router_targets(expert_logits: Tensor, targets: Tensor) -> Tensor:
    """1 where experts 1..i together are wrong and a longer prefix is right.

    expert_logits [B, E, C], targets [B] -> [B, E-1] for i = 1..E-1, in the logits' dtype. InputError for fewer than two
    experts. RIDE, arXiv:2010.01809, section 3.
    """
    num_experts = expert_logits.shape[1]
    if num_experts < 2:
        raise InputError(f"a router chooses between at least 2 experts, the model has {num_experts}")
    right = expert_logits.detach().cumsum(1).argmax(-1) == targets[:, None]  # [B, E]; sum and mean have one argmax
    right_later = right[:, 1:].flip(1).cumsum(1).flip(1) > 0  # [B, E-1]: a longer prefix than i
    return (~right[:, :-1] & right_later).to(expert_logits.dtype)


def router_loss(gate_logits: Tensor, expert_logits: Tensor, targets: Tensor, pos_weight: float) -> Tensor:
    """Binary cross entropy of the gates with `router_targets`, averaged.

    gate_logits [B, E-1], expert_logits [B, E, C], targets [B] -> scalar. `pos_weight` multiplies the positives and,
    unlike class weights, does not enter the divisor of the mean. InputError for fewer than two experts, or another
    number of gates. RIDE, arXiv:2010.01809, section 3.
    """
    gate_logits, expert_logits = widen(gate_logits), widen(expert_logits)
    wanted = router_targets(expert_logits, targets)
    if gate_logits.shape != wanted.shape:
        raise InputError(f"expected gate logits of shape {tuple(wanted.shape)}, got {tuple(gate_logits.shape)}")
    # BCEWithLogits takes pos_weight as a tensor, which is a copy to the device in each step.
    bce = pos_weight * wanted * F.softplus(-gate_logits) + (1 - wanted) * F.softplus(gate_logits)
    return batch_mean(bce.mean(1))
