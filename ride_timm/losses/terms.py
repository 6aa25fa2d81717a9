"""The terms that losses are made of, as pure functions of tensors; batch means are taken over all processes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError


def widen(logits: Tensor) -> Tensor:
    """Logits in float32, or as they are where they are wider: half precision is for the network, not for the loss."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def batch_mean(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """(Weighted) mean of a value per sample over the shards of all processes: P * sum_local(w v) / sum_global(w).

    values [B], weights [B] or None -> scalar. P is the number of processes. Averaged over the processes, as DDP does
    with gradients, this is the mean over the joined batch, also for unequal shards; one process' figure is only its
    share of it. Where all weights are 0, so is the mean.
    """
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    total, num_processes = weights.sum(), 1
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        num_processes = dist.get_world_size()
        dist.all_reduce(total)  # a sum of constants: nothing to differentiate
    return (weights * values).sum() * num_processes / total.clamp_min(torch.finfo(total.dtype).tiny)


def cross_entropy(
    expert_logits: Tensor,
    targets: Tensor,
    class_weights: Tensor | None = None,
    margins: Tensor | None = None,
    s: float = 30.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy summed over experts, batch mean; `margins` make it LDAM: s * m_y is taken off the target's logit.

    expert_logits [B, E, C], targets [B], class_weights [C], margins [C] -> scalar. With class weights the mean is
    divided by the sum of the targets' weights, as torch does. LDAM: Cao et al. 2019, arXiv:1906.07413, section 3.
    Smoothed labels share `label_smoothing` evenly among all classes: Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    num_experts, num_classes = expert_logits.shape[1:]
    if margins is not None:
        shift = s * margins[targets, None] * F.one_hot(targets, num_classes)  # [B, C]
        expert_logits = expert_logits - shift[:, None]
    repeated = targets.repeat_interleave(num_experts)
    flat = expert_logits.flatten(0, 1)
    values = F.cross_entropy(flat, repeated, reduction="none", label_smoothing=label_smoothing)
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


def focal(logits: Tensor, targets: Tensor, gamma: float, class_weights: Tensor | None = None) -> Tensor:
    """Focal loss, the (weighted) batch mean of (1 - p_y)^gamma * -log(p_y).

    logits [B, C], targets [B], class_weights [C] -> scalar. Lin et al. 2017, arXiv:1708.02002, equation 4 with the
    softmax' p_y; the class weights stand where its equation 5 has alpha, and the mean is divided by their sum.
    """
    ce = F.cross_entropy(logits, targets, reduction="none")
    # At p_y = 1 the slope of x^gamma is infinite for gamma < 1, and infinity times the zero beside it is NaN.
    miss = (-torch.expm1(-ce)).clamp_min(torch.finfo(ce.dtype).eps)
    return batch_mean(miss**gamma * ce, None if class_weights is None else class_weights[targets])


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


def router_loss(gate_logits: Tensor, expert_logits: Tensor, targets: Tensor, pos_weight: float) -> Tensor:
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
