"""Fully sharded training (FSDP): a process keeps its share of parameters, gradients and optimizer state.

Accelerate shards (its `fsdp_version: 2`, torch's `fully_shard`); here stands what it leaves to its caller. What is
saved is gathered whole first, so that a run's folder is the same however it was launched, and goes on either way.
"""

from __future__ import annotations

import os
import warnings
from copy import deepcopy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, recursively_apply
from timm.optim import get_optimizer_class
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from .errors import InputError
from .objectives import Objective
from .recipe import Recipe


def _launched(name: str) -> str:
    """What the launcher says in the environment, in small letters."""
    return os.environ.get(name, "").lower()


def requested() -> bool:
    """Whether the launcher was asked for FSDP."""
    return _launched("ACCELERATE_USE_FSDP") == "true"


def make_plugin(recipe: Recipe) -> FullyShardedDataParallelPlugin | None:
    """Accelerate's plugin as the launcher's configuration says, or None where it asks for no FSDP.

    InputError for another kind of sharding, or for what does not go together with FSDP.
    """
    for kind in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if _launched(f"ACCELERATE_USE_{kind}") == "true":
            raise InputError(f"launched with {kind}: this script knows data parallelism and FSDP, see configs/.")
    if not requested():
        return None
    refused = {
        f"fsdp_version: {_launched('FSDP_VERSION') or 1}": (_launched("FSDP_VERSION") != "2", "set fsdp_version: 2"),
        "fsdp_auto_wrap_policy: SIZE_BASED_WRAP": (
            _launched("FSDP_AUTO_WRAP_POLICY") == "size_based_wrap",
            "TRANSFORMER_BASED_WRAP makes a unit of each expert",
        ),
        "fsdp_offload_params": (_launched("FSDP_OFFLOAD_PARAMS") == "true", "leave it out"),
        "fsdp_activation_checkpointing": (
            _launched("FSDP_ACTIVATION_CHECKPOINTING") == "true",
            "BatchNorm would count each batch twice",
        ),
        "compile": (recipe.compile, "leave one of them out"),
        "ema_decay": (recipe.ema_decay is not None, "the average follows whole weights at every step"),
        "mixed_precision=fp16": (recipe.mixed_precision == "fp16", "use bf16 or no"),
    }
    for name in (recipe.optimizer, recipe.router_optimizer):
        own = get_optimizer_class(name, bind_defaults=False).__module__.startswith("torch.optim")
        refused[f"optimizer={name}"] = (not own, "use one of torch's own, such as sgd, momentum or adamw")
    for what, (found, advice) in refused.items():
        if found:
            raise InputError(f"{what} does not work with FSDP here: {advice}.")
    return FullyShardedDataParallelPlugin(
        # parameters and exchanges stay in fp32 and autocast chooses the precision, as without FSDP
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,  # every process has made the same model from the seed
    )


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes share the parameters out; InputError where that was asked for in vain."""
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if requested() and not sharded:
        raise InputError(
            "FSDP needs two or more GPUs: Accelerate leaves it out on CPUs and for a single process. "
            "Use another file of configs/."
        )
    return sharded


def shardable(objective: Objective, device: torch.device) -> Objective:
    """A copy on the device for `accelerator.prepare` to shard, an expert a unit; the original's model stays whole.

    Evaluation, counting and saving go on with the whole model, which takes the copy's weights by `gather`.
    """
    copy = deepcopy(objective.to(device)).to(memory_format=torch.contiguous_format)  # which is all FSDP takes
    copy._no_split_modules = [type(copy.model.experts[0]).__name__]  # where Accelerate looks for its units
    return copy


def hook_experts(model: nn.Module) -> None:
    """Let sharded experts gather their parameters where they are entered by another door than `forward`."""
    # pooled features are a view, which nobody writes into
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    for expert in model.experts:
        register_fsdp_forward_method(expert, "forward_both")


def whole(state: Any) -> Any:
    """Nested state with every sharded tensor gathered whole; all processes take part, the rest stays as it is."""
    return recursively_apply(DTensor.full_tensor, state, test_type=lambda value: isinstance(value, DTensor))


def share_out(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's whole state with this process' shares of what is laid out like a sharded parameter."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def share(value: Any, parameter: torch.Tensor) -> Any:
        if not isinstance(parameter, DTensor) or getattr(value, "shape", None) != parameter.shape:
            return value
        value = value.to(parameter.device).contiguous()
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    by_parameter = {
        i: {name: share(value, parameters[i]) for name, value in values.items()} for i, values in state["state"].items()
    }
    return state | dict(state=by_parameter)
