"""Re-balancing trained heads: cRT, LWS, balanced softmax, tau-normalization, post-hoc logit adjustment, alignment.

Each expert's head is re-balanced on its own. Cosine heads divide out the norms of their class vectors, so scales and
offsets are a per-class affine layer after the head (`models.ClassAffine`), after linear heads too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import priors
from ..errors import InputError
from ..models import ClassAffine, CosineClassifier, Ride
from ..models.heads import linear_layer
from .objectives import HeadsObjective


def _affine_heads(model: Ride) -> list[ClassAffine]:
    model.add_class_affine()
    return [expert.fc for expert in model.experts]


@torch.no_grad()
def tau_normalize(model: Ride, tau: float) -> None:
    """tau-normalisation: divide each class vector by its norm to the power tau, and drop the biases.

    w_c / |w_c|^tau. Of the per-class offsets the mean over experts is dropped; the alignment of experts
    (`align_experts`) stays. tau 0 leaves a linear head but for its bias, tau 1 leaves a cosine head; larger values
    favour classes of small norm, the rare ones. Raises `InputError` for a tau below 0, or an MLP as a head.
    Kang et al. 2020, arXiv:1910.09217, section 4, equation 5; the features of a cosine head stay normalised.
    """
    if not 0 <= tau < float("inf"):
        raise InputError(f"tau must be at least 0, got {tau}")
    heads = _affine_heads(model)
    common = torch.stack([fc.affine.bias for fc in heads]).mean(0)
    for fc in heads:
        norms = linear_layer(fc).weight.flatten(1).norm(dim=1)
        fc.affine.weight.copy_(norms ** ((1 if isinstance(fc.head, CosineClassifier) else 0) - tau))
        fc.affine.bias.sub_(common)
        if getattr(fc.head, "bias", None) is not None:
            fc.head.bias.zero_()


@torch.no_grad()
def adjust_logits(model: Ride, class_counts: Sequence[int] | Tensor, tau: float) -> None:
    """Post-hoc logit adjustment: subtract tau * log(prior) from the logits of every head.

    class_counts [C], of the training set. Raises `InputError` for a tau below 0, an empty class, or a number of classes
    that is not the model's. Menon et al. 2021, arXiv:2007.07314, equation 9.
    """
    if not 0 <= tau < float("inf"):
        raise InputError(f"tau must be at least 0, got {tau}")
    if len(class_counts) != model.num_classes:
        raise InputError(f"{len(class_counts)} class counts for {model.num_classes} classes")
    offset = tau * priors.log_prior(class_counts)
    for fc in _affine_heads(model):
        fc.affine.bias.sub_(offset.to(fc.affine.bias))


@torch.no_grad()
def align_experts(model: Ride, offsets: Tensor) -> None:
    """Align the experts' priors: add offsets_e - mean(offsets) to the logits of expert e.

    offsets [E, C], which the loss added to each expert's logits in training (`ExpertsLoss.offsets`). The additions sum
    to zero over the experts, so the ensemble is unchanged, while the mean of the first experts, which the router judges
    by, leans to frequent or rare classes no more than the ensemble does. Apply once to experts as they were trained;
    -offsets reverts it. Raises `InputError` for another number of experts or classes.
    """
    if offsets.shape != (model.num_experts, model.num_classes):
        raise InputError(
            f"offsets {tuple(offsets.shape)} for {model.num_experts} experts and {model.num_classes} classes"
        )
    for fc, offset in zip(_affine_heads(model), offsets - offsets.mean(0), strict=True):
        fc.affine.bias.add_(offset.to(fc.affine.bias))


def decouple(
    model: Ride, method: str, class_counts: Sequence[int] | Tensor, tau: float, seed: int, **frozen: Any
) -> HeadsObjective:
    """Re-balance a trained network's heads; returns the objective for what is left to train.

    method: "crt" trains new heads, drawn from `seed`, on class-balanced batches, and "balanced_softmax" on ordinary
    ones with log(prior) added; "lws" trains one scale per class, from 1; "tau_norm" and "logit_adjustment" are
    closed-form. frozen: freeze and freeze_norm of `HeadsObjective`, for "balanced_softmax". Kang et al. 2020,
    arXiv:1910.09217, section 4; balanced softmax as in arXiv:2304.01279, section 4.1.
    """
    if method in ("crt", "balanced_softmax"):
        torch.manual_seed(seed)
        model.reset_classifier(model.num_classes)
        heads = tuple(f"{name}." for name in model.get_classifier(name_only=True))
        learnt = [name for name, _ in model.named_parameters() if name.startswith(heads)]
        offset = priors.log_prior(class_counts) if method == "balanced_softmax" else None
        return HeadsObjective(model, learnt, offset, **frozen)
    if method == "tau_norm":
        tau_normalize(model, tau)
    elif method == "logit_adjustment":
        adjust_logits(model, class_counts, tau)
    elif method == "lws":
        model.add_class_affine()
    else:
        expected = "crt, lws, balanced_softmax, tau_norm, logit_adjustment"
        raise InputError(f"unknown decoupling {method!r}, expected one of: {expected}")
    return HeadsObjective(model, [f"experts.{i}.fc.affine.weight" for i in range(model.num_experts)])
