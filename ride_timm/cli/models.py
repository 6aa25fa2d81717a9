"""List the networks with their sizes, MACs and weights."""

from __future__ import annotations

import argparse
from typing import Any

import timm
from timm.models import get_arch_pretrained_cfgs

from ..evaluation.macs import count_macs
from ..evaluation.tables import millions, text_table
from .process import print_json


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("models", help=__doc__, description=__doc__)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    rows = catalogue()
    if args.json:
        print_json(rows)
    else:
        print(format_catalogue(rows))


def describe(name: str, num_experts: int | None = None) -> dict[str, Any]:
    """One network: parameters, MACs by number of experts, input size, tags.

    macs_by_experts[e - 1]: MACs per image of the trunk and e experts, gates excluded. MACs as thop counts them, without
    attention's QK^T and AV. tags: names of weights -> True if a URL to load them from is known.
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
    """The rows as a text table, in millions; `*` marks published weights."""
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
