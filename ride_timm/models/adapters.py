"""Low-rank updates (LoRA) of a shared, frozen network, by peft. arXiv:2106.09685"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from importlib.util import find_spec

import torch
from timm.models.eva import EvaAttention
from torch import nn

from ..errors import InputError
from .cuts import CUTS

ADAPTERS = ("lora",)


def check_adapter(adapter: str, rank: int, net: nn.Module, backbone: str, layers: Sequence[str]) -> None:
    """Raise InputError for an adapter that is unknown, not installed or without layers.

    layers: patterns of the layers that take an update in this family.
    """
    if adapter not in ADAPTERS:
        raise InputError(f"adapter={adapter!r}: expected one of {', '.join(ADAPTERS)}.")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise InputError(f"adapter_rank={rank!r}: expected a whole number, 1 or more.")
    if not any(name.endswith(tuple(f".{layer}" for layer in layers)) for name, _ in net.named_modules()):
        families = ", ".join(name for name, cut in CUTS.items() if cut.adapted)
        raise InputError(
            f"adapter={adapter!r}: {backbone} has no layers that take a low-rank update; families that have: "
            f"{families}. Choose such a backbone, or leave adapter out."
        )
    if find_spec("peft") is None:
        raise InputError(f"adapter={adapter!r} needs peft: pip install peft")


def copy_sharing_parameters(net: nn.Module) -> nn.Module:
    """Copy the modules of a network, but not its parameters."""
    return deepcopy(net, {id(parameter): parameter for parameter in net.parameters()})


def freeze(net: nn.Module) -> nn.Module:
    """Freeze a network and let every layer run by a call, as updates need it.

    Eva's fused attention reads the weight of its qkv layer, to add a bias that has no part for the keys.
    """
    for attention in net.modules():
        if isinstance(attention, EvaAttention) and attention.q_bias is not None:
            bias = torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
            attention.qkv.bias = nn.Parameter(bias.detach())
            attention.q_bias = attention.v_bias = None
    return net.requires_grad_(False)


def add_updates(net: nn.Module, layers: Sequence[str], rank: int) -> None:
    """Add trainable low-rank updates, at first zero, to these layers of a network.

    update = B·A with A [rank, in], B [out, rank], added at scale 1 and without dropout.
    """
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers)), net)


def is_update(name: str) -> bool:
    """Tell a parameter of an update by its name."""
    return ".lora_A." in name or ".lora_B." in name


def merge_updates(net: nn.Module) -> None:
    """Add the updates to the weights of their layers, and undo `freeze`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(net.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            net.set_submodule(name, layer.get_base_layer())
    for attention in net.modules():
        if isinstance(attention, EvaAttention) and attention.qkv is not None and attention.qkv.bias is not None:
            q_bias, _, v_bias = attention.qkv.bias.detach().chunk(3)
            attention.q_bias, attention.v_bias = nn.Parameter(q_bias.clone()), nn.Parameter(v_bias.clone())
            attention.qkv.bias = None
    del net.peft_config
    net.requires_grad_(True)
