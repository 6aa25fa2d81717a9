"""Optimizers of both stages, by timm."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay

from ..errors import InputError, first_line
from .objectives import Objective
from .recipe import StageSettings

_FUSED = ("sgd", "momentum", "adam", "adamw")  # torch's own, which can update all parameters in one pass


def check_optimizer(name: str, device: torch.device) -> None:
    """InputError for an optimizer that timm does not know, or that fails on this device."""
    if name not in list_optimizers():
        raise InputError(f"optimizer={name!r}: timm knows {', '.join(list_optimizers())}.")
    weight = torch.nn.Parameter(torch.ones(2, 2, device=device))
    try:
        optimizer = create_optimizer_v2([weight], opt=name, lr=0.1, weight_decay=0.1, momentum=0.9, **_fused(name))
        weight.square().sum().backward()
        optimizer.step()
    except Exception as error:  # missing packages, missing devices, second derivatives: each has its own
        raise InputError(f"optimizer={name!r} does not work here ({first_line(error)}): choose another.") from error


def make_optimizer(stage: StageSettings, objective: Objective, momentum: float) -> torch.optim.Optimizer:
    """The optimizer of a stage over the parameters its objective trains, fused where torch has it.

    With layer decay, timm's groups by layer have an "lr_scale".
    """
    parameters = objective.trainable_parameters()
    exempt = () if stage.decay_norm_and_bias else objective.model.no_weight_decay()
    if stage.layer_decay is not None:
        parameters = param_groups_layer_decay(
            objective.model,
            stage.weight_decay,
            no_weight_decay_list=exempt,
            weight_decay_exclude_1d=not stage.decay_norm_and_bias,
            layer_decay=stage.layer_decay,
        )
    elif not stage.decay_norm_and_bias:
        exempt = {f"model.{name}" for name in exempt}
        parameters = param_groups_weight_decay(objective, stage.weight_decay, no_weight_decay_list=exempt)
    settings = dict(lr=stage.lr, weight_decay=stage.weight_decay, momentum=momentum)
    optimizer = create_optimizer_v2(parameters, opt=stage.optimizer, **settings, **_fused(stage.optimizer))
    if isinstance(optimizer, torch.optim.SGD):
        begin_momentum(optimizer)
    return optimizer


def begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Begin the momentum at zero, from which the first step is the same.

    Else a fused first step whose gradients overflow in fp16 leaves uninitialised memory as momentum.
    """
    for group in optimizer.param_groups:
        if group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _fused(name: str) -> dict[str, bool]:
    return dict(fused=True) if name in _FUSED else {}
