"""What there is to choose from: every network with its size, its cost by number of experts, and its weights."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs

from ..evaluation.macs import count_macs


def describe(name: str, num_experts: int | None = None) -> dict[str, Any]:
    """One network: parameters and MACs of the ensemble, of the trunk and of each expert, input size, tags.

    macs_by_experts[e - 1] is what one image costs with e experts, which is also what routing spends on an image that
    uses e (without the gates). MACs as thop counts them: attention's products of activations are not among them.
    tags: the weights' names, each with whether a place to load them from is stated.
    """
    kwargs = dict(num_experts=num_experts) if num_experts else {}
    model = timm.create_model(name, device="meta", **kwargs)
    size = tuple(model.pretrained_cfg["input_size"])
    macs = count_macs(model, size)
    by_experts = [round(macs.trunk + sum(macs.experts[: e + 1])) for e in range(len(macs.experts))]
    tags = {
        full.partition(".")[2]: bool(cfg.has_weights) for full, cfg in sorted(get_arch_pretrained_cfgs(name).items())
    }
    return dict(
        name=name,
        params=macs.params,
        macs=round(macs.ensemble),
        trunk_macs=round(macs.trunk),
        expert_macs=[round(own) for own in macs.experts],
        macs_by_experts=by_experts,
        num_experts=model.num_experts,
        num_classes=model.num_classes,
        input_size=size[-1],
        tags=tags,
    )


def catalogue(pattern: str = "ride*") -> list[dict[str, Any]]:
    """Every registered network that matches, in timm's order."""
    return [describe(name) for name in timm.list_models(pattern)]


def _short(count: float) -> str:
    return f"{count / 1e9:.2f}G" if count >= 1e9 else f"{count / 1e6:.1f}M"


def format_catalogue(rows: list[dict[str, Any]]) -> str:
    """The rows as a table for people; `*` marks published weights."""
    width = max(len(row["name"]) for row in rows)
    most = max(len(row["macs_by_experts"]) for row in rows)
    costs = "".join(f"{f'{e + 1} exp.':>9}" for e in range(most))
    lines = [f"{'name':<{width}} {'params':>8} {'trunk':>8} {'expert':>8}{costs} {'input':>6}  weights (* published)"]
    for row in rows:
        by_experts = [_short(macs) for macs in row["macs_by_experts"]]
        costs = "".join(f"{cost:>9}" for cost in by_experts + [""] * (most - len(by_experts)))
        own = _short(row["expert_macs"][0])
        tags = ", ".join(tag + ("*" if published else "") for tag, published in row["tags"].items())
        start = f"{row['name']:<{width}} {_short(row['params']):>8} {_short(row['trunk_macs']):>8} {own:>8}"
        lines.append(f"{start}{costs} {row['input_size']:>6}  {tags}")
    return "\n".join(lines)
