"""Experts: copies of a network's last stages with their own classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import get_device_dtype
from timm.models import checkpoint_seq
from torch import Tensor, nn

from .heads import create_head, create_pool


class Stages(nn.Sequential):
    """Named modules in sequence, some of them feature levels.

    feature_info: one dict(num_chs, reduction, module) per level, `module` being the name of a child.
    """

    def __init__(self, modules: dict[str, nn.Module], feature_info: list[dict[str, Any]]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.feature_info = feature_info
        self.grad_checkpointing = False

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.forward_levels(x)[0]
        for module in self:
            x = module(x)
        return x

    @torch.jit.ignore
    def forward_levels(
        self, x: Tensor, norm: bool = False, size: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x [B, C, H, W] -> (output, feature maps of all levels in order).

        norm and size are for `TimmStages`: there is no final norm here, and a feature map has its own size.
        """
        tapped = {info["module"] for info in self.feature_info}
        levels = []
        for name, module in self.named_children():
            if self.grad_checkpointing and isinstance(module, nn.Sequential) and len(module):
                x = checkpoint_seq(module, x)
            else:
                x = module(x)
            if name in tapped:
                levels.append(x)
        return x, levels

    def prune(self, num_levels: int) -> None:
        """Drop the modules after the last of the first `num_levels` levels."""
        keep = self.feature_info[num_levels - 1]["module"] if num_levels else None
        names = list(self._modules)
        for name in names[names.index(keep) + 1 if keep else 0 :]:
            del self._modules[name]
        self.feature_info = self.feature_info[:num_levels]


class Expert(nn.Module):
    """The last stages of a network with their own pooling, dropout and classifier.

    Feature map of the trunk -> (pooled features [B, D], logits [B, C]).
    """

    def __init__(
        self,
        stages: Stages,
        num_features: int,
        num_classes: int,
        use_norm: bool,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.stages = stages
        self.num_features = num_features
        self.use_norm = use_norm
        self.drop_rate = drop_rate
        self.global_pool = create_pool(global_pool, num_classes)
        self.head_hidden_size = num_features * self.global_pool.feat_mult()
        self.fc = create_head(self.head_hidden_size, num_classes, use_norm)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (and the pooling); device, dtype and mode stay."""
        if global_pool is not None:
            self.global_pool = create_pool(global_pool, num_classes)
            self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.fc = create_head(self.head_hidden_size, num_classes, self.use_norm).to(**get_device_dtype(self))
        self.train(self.training)

    @torch.jit.ignore
    def prune(self, num_levels: int, prune_norm: bool = False, prune_head: bool = True) -> None:
        """Keep the first levels of the stages; dropping any drops the classifier."""
        pruned = num_levels < len(self.stages.feature_info)
        self.stages.prune(num_levels)
        self.num_features = self.stages.feature_info[-1]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature map of the trunk [B, C, H, W] -> the expert's own [B, D, h, w]."""
        return self.stages(x)

    def forward_pre_logits(self, x: Tensor) -> Tensor:
        """Feature map [B, D, h, w] -> pooled features [B, D] after dropout.

        With pooling '' the features stay a feature map.
        """
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        """Feature map [B, D, h, w] -> logits [B, C]."""
        return self.fc(self.forward_pre_logits(x))

    @torch.jit.ignore
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.forward_pre_logits(self.forward_features(x))
        return features, self.fc(features)


class Experts(nn.ModuleList):
    """E experts on one feature map."""

    @torch.jit.ignore
    def forward(self, x: Tensor, use_experts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Feature map of the trunk -> (pooled features [B, E, D], logits [B, E, C]).

        use_experts: indices of the experts to run, all by default.
        """
        chosen = self if use_experts is None else [self[i] for i in use_experts]
        features, logits = zip(*(expert(x) for expert in chosen), strict=True)
        return torch.stack(features, 1), torch.stack(logits, 1)
