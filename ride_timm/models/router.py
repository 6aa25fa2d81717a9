"""The router: a gate after each expert but the last.

The expert assignment module of arXiv:2010.01809, section 3.3.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Router(nn.Module):
    """Gates that decide whether a sample needs the next expert.

    gate_i = w · [top-k(u_i), relu(A_i f_i + a_i)] + b, with u_i the mean logits of experts 1…i and f_i the pooled
    features of expert i scaled to unit norm; all gates use one (w, b) if `share_expert_help_pred_fc`.

    num_features: D; top_choices_num: k, clamped to the number of classes with a warning; hidden_features: rows of A_i.
    """

    def __init__(
        self,
        num_experts: int,
        num_features: int,
        num_classes: int,
        top_choices_num: int = 5,
        share_expert_help_pred_fc: bool = True,
        hidden_features: int = 16,
    ) -> None:
        super().__init__()
        if num_experts < 2:
            raise ValueError(f"num_experts={num_experts}: a router needs at least 2 experts.")
        if top_choices_num < 1:
            raise ValueError(f"top_choices_num={top_choices_num}: expected 1 or more.")
        if top_choices_num > num_classes:
            warnings.warn(
                f"top_choices_num={top_choices_num} is above the number of classes: using {num_classes}.", stacklevel=2
            )
        self.num_experts = num_experts
        self.top_choices_num = min(top_choices_num, num_classes)
        self.share_expert_help_pred_fc = share_expert_help_pred_fc
        self.hidden_features = hidden_features
        self.hidden = nn.ModuleList(nn.Linear(num_features, hidden_features) for _ in range(num_experts - 1))
        num_outputs = 1 if share_expert_help_pred_fc else num_experts - 1
        self.fc = nn.ModuleList(nn.Linear(self.top_choices_num + hidden_features, 1) for _ in range(num_outputs))

    def resized(self, num_features: int, num_classes: int) -> Router:
        """Return a new router of the same kind for other features or classes."""
        return Router(
            self.num_experts,
            num_features,
            num_classes,
            min(self.top_choices_num, num_classes),
            self.share_expert_help_pred_fc,
            self.hidden_features,
        )

    def gate(self, i: int, features: Tensor, mean_logits: Tensor) -> Tensor:
        """Features [B, D] and mean logits so far [B, C] -> gate logits [B].

        i: index of the expert before the gate, from 0.
        """
        choices = mean_logits.topk(self.top_choices_num, dim=1).values  # [B, k]
        hidden = F.relu(self.hidden[i](F.normalize(features, dim=1)))  # [B, 16]
        fc = self.fc[0 if self.share_expert_help_pred_fc else i]
        return fc(torch.cat([choices, hidden], 1)).squeeze(1)

    @torch.jit.ignore  # a scripted ensemble does not route
    def forward(self, features: Tensor, expert_logits: Tensor) -> Tensor:
        """features [B, E, D], expert_logits [B, E, C] -> gate logits [B, E-1]"""
        gates = []
        for i in range(self.num_experts - 1):
            gates.append(self.gate(i, features[:, i], expert_logits[:, : i + 1].mean(1)))
        return torch.stack(gates, 1)
