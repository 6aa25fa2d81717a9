"""Losses over the logits of all experts: pure functions, and small modules that own what is fixed for a run.

Every loss module maps `expert_logits [B, E, C], targets [B]` to a scalar. Logits of lower precision are widened to
float32 first. All processes of a distributed run must call a loss together, since its batch means are taken over all
of them.
"""

import inspect
from collections.abc import Sequence

from torch import Tensor

from ..errors import InputError
from .adjusted import BalPoELoss, LogitAdjustedLoss, MdcsLoss, OffsetExpertsLoss, SadeLoss, check_taus
from .experts import CrossEntropyLoss, ExpertsLoss, FocalLoss, LDAMLoss, RideLoss
from .terms import batch_mean, cross_entropy, distillation, diversity, focal, router_loss, router_targets, widen

__all__ = [
    "LOSSES",
    "BalPoELoss",
    "CrossEntropyLoss",
    "ExpertsLoss",
    "FocalLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "MdcsLoss",
    "OffsetExpertsLoss",
    "RideLoss",
    "SadeLoss",
    "arguments_of",
    "batch_mean",
    "check_taus",
    "cross_entropy",
    "distillation",
    "diversity",
    "focal",
    "make_loss",
    "router_loss",
    "router_targets",
    "widen",
]

# Name in a recipe -> class, and the arguments that the name stands for.
LOSSES = {
    "ride": (RideLoss, {}),
    "ldam": (LDAMLoss, {}),
    "focal": (FocalLoss, {"class_balanced": False}),
    "cb_focal": (FocalLoss, {"class_balanced": True}),
    "ce": (CrossEntropyLoss, {"class_balanced": False}),
    "cb_ce": (CrossEntropyLoss, {"class_balanced": True}),
    "balanced_softmax": (LogitAdjustedLoss, {"tau": 1.0}),
    "logit_adjustment": (LogitAdjustedLoss, {}),
    "sade": (SadeLoss, {}),
    "balpoe": (BalPoELoss, {}),
    "mdcs": (MdcsLoss, {}),
}


def arguments_of(name: str) -> list[str]:
    """What a loss takes besides class counts; InputError for a name that does not exist."""
    if name not in LOSSES:
        raise InputError(f"unknown loss {name!r}, expected one of: {', '.join(LOSSES)}")
    loss, fixed = LOSSES[name]
    return [key for key in inspect.signature(loss).parameters if key != "class_counts" and key not in fixed]


def make_loss(name: str, class_counts: Sequence[int] | Tensor | None = None, **kwargs) -> ExpertsLoss:
    """Loss by its name in a recipe, see `LOSSES`.

    class_counts [C], training images of each class -> a module. InputError for a name or an argument that does not
    exist, or for a loss of the prior without class counts.
    """
    accepted = arguments_of(name)
    loss, fixed = LOSSES[name]
    unknown = [key for key in kwargs if key not in accepted]
    if unknown:
        raise InputError(
            f"loss {name!r} does not take {', '.join(unknown)}; it takes: {', '.join(accepted) or 'no arguments'}"
        )
    if class_counts is None and inspect.signature(loss).parameters["class_counts"].default is not None:
        raise InputError(f"loss {name!r} needs class counts: it adjusts logits by the training prior")
    return loss(class_counts, **fixed, **kwargs)
