"""What there is to choose from: every network with its size, its cost by number of experts, and its weights."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs

from ..evaluation.macs import count_macs
from ..evaluation.tables import millions, text_table


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


def format_catalogue(rows: list[dict[str, Any]]) -> str:
    """The rows as a text table, in millions of parameters and of MACs per image; `*` marks published weights."""
    most = max(len(row["macs_by_experts"]) for row in rows)
    heading = ["", "M params", "MMACs: trunk", "an expert", *(f"{e + 1} exp." for e in range(most)), "input"]
    lines, tags = [heading], ["weights (* published)", "-" * 21]
    for row in rows:
        counts = [row["params"], row["trunk_macs"], row["expert_macs"][0], *row["macs_by_experts"]]
        cells = [*map(millions, counts), *[""] * (most - len(row["macs_by_experts"]))]
        lines.append([row["name"], *cells, str(row["input_size"])])
        tags.append(", ".join(tag + "*" * published for tag, published in row["tags"].items()))
    table = text_table(lines).split("\n")
    return "\n".join(f"{line}  {weights}".rstrip() for line, weights in zip(table, tags, strict=True))
