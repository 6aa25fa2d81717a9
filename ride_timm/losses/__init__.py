"""Losses of all experts' logits, one file each.

expert_logits [B, E, C], targets [B] -> scalar. `LOSSES` lists them by their name in a recipe, with paper, summary and
recipe keys. Logits of lower precision are widened to float32. In a distributed run all processes must call a loss
together: its batch means are global.
"""

from importlib import import_module
from pkgutil import iter_modules

from .base import LOSSES, ExpertsLoss, PerExpertPriorLoss, RegisteredLoss, loss_keys, make_loss, register_loss

__all__ = [
    "LOSSES",
    "ExpertsLoss",
    "PerExpertPriorLoss",
    "RegisteredLoss",
    "loss_keys",
    "make_loss",
    "register_loss",
]

for _module in iter_modules(__path__):  # each registers its losses
    import_module(f"{__name__}.{_module.name}")
