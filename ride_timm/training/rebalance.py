"""Re-balancing the heads of a trained network: cRT, LWS, tau-normalization, post-hoc logit adjustment, alignment.

Every expert's head is treated on its own. Cosine heads divide the norms of their class vectors out, so that scales and
offsets stand behind the heads (`models.ClassAffine`), linear ones included; the class vectors stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import priors
from ..errors import InputError
from ..models import ClassAffine, CosineClassifier, Ride, add_class_affine
from .objectives import HeadsObjective


def _affine_heads(model: Ride) -> list[ClassAffine]:
    add_class_affine(model)
    return [expert.fc for expert in model.experts]


def _class_vectors(head: nn.Module) -> Tensor:
    """The weights of a classifier, [C, D]; InputError for a head of another kind."""
    weight = getattr(head, "weight", None)
    if weight is None:
        raise InputError(
            f"a {type(head).__name__} has no class vectors to normalise: tau_norm needs linear or cosine heads"
        )
    return weight.detach().flatten(1)


@torch.no_grad()
def tau_normalize(model: Ride, tau: float) -> None:
    """Divide every class vector of every head by its norm to the power tau, and drop the offsets: w_c / |w_c|^tau.

    Of offsets behind the heads their mean is dropped; what brings the experts to one prior (`align_experts`) stays.

    tau 0 leaves a linear head but for its bias, tau 1 leaves a cosine head, which divides by the norms itself; larger
    values favour classes of small norm, the rare ones. InputError for a tau below 0. Kang et al. 2020,
    arXiv:1910.09217, section 4, equation 5; for a cosine head the features stay normalised.
    """
    if not 0 <= tau < float("inf"):
        raise InputError(f"tau must be at least 0, got {tau}")
    heads = _affine_heads(model)
    common = torch.stack([fc.affine.bias for fc in heads]).mean(0)
    for fc in heads:
        norms = _class_vectors(fc.head).norm(dim=1)
        fc.affine.weight.copy_(norms ** ((1 if isinstance(fc.head, CosineClassifier) else 0) - tau))
        fc.affine.bias.sub_(common)
        if getattr(fc.head, "bias", None) is not None:
            fc.head.bias.zero_()


@torch.no_grad()
def adjust_logits(model: Ride, class_counts: Sequence[int] | Tensor, tau: float) -> None:
    """Take tau * log(prior) off the logits of every head, for a balanced test set after training on a long-tailed one.

    class_counts [C], those of the training set. InputError for a tau below 0, an empty class or other classes than the
    model's. Menon et al. 2021, arXiv:2007.07314, equation 9.
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
    """Move every expert to the class prior that the ensemble suits, so that answers of a few experts suit it too.

    offsets [E, C], what the loss added to each expert's logits in training (`losses.OffsetExpertsLoss`): expert e gets
    offsets_e - mean(offsets). These sum to zero, so that the mean of all experts stays as it is, while an answer of
    one or two of them leans to frequent or rare classes no more than the ensemble does; a router needs such answers.
    Once, on experts as they were trained; -offsets move them back. InputError for another number of experts or classes.
    """
    if offsets.shape != (model.num_experts, model.num_classes):
        raise InputError(
            f"offsets {tuple(offsets.shape)} for {model.num_experts} experts and {model.num_classes} classes"
        )
    for fc, offset in zip(_affine_heads(model), offsets - offsets.mean(0), strict=True):
        fc.affine.bias.add_(offset.to(fc.affine.bias))


def decouple(model: Ride, method: str, class_counts: Sequence[int] | Tensor, tau: float, seed: int) -> HeadsObjective:
    """Re-balance a trained network's heads, or make them ready for it; the objective trains what is left to train.

    method: "crt", new heads from `seed`, all of which learns; "lws", a scale for each class learns; "tau_norm" and
    "logit_adjustment", done at once. Kang et al. 2020, arXiv:1910.09217, section 4 (the learned scales start at 1).
    """
    if method == "crt":
        torch.manual_seed(seed)
        model.reset_classifier(model.num_classes)
        return HeadsObjective(model, [name for name, _ in model.named_parameters() if ".fc." in name])
    if method == "tau_norm":
        tau_normalize(model, tau)
    elif method == "logit_adjustment":
        adjust_logits(model, class_counts, tau)
    elif method == "lws":
        add_class_affine(model)
    else:
        raise InputError(f"unknown decoupling {method!r}, expected one of: crt, lws, tau_norm, logit_adjustment")
    return HeadsObjective(model, [f"experts.{i}.fc.affine.weight" for i in range(model.num_experts)])
