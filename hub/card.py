"""Render the card of a staged release from its config.json, results.json and recipe.yaml.

python hub/card.py NAME.TAG
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import card_text as text
from folder import CARD, CLASSES, CONFIG, CURVES, HERE, RESULTS, Staged, is_registered
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ride_timm.cli.process import exit_code
from ride_timm.evaluation.tables import (
    GROUPS,
    STAGE_NAMES,
    ensemble_metrics,
    millions,
    number,
    percentages,
    short_threshold,
)
from ride_timm.files import write_text
from ride_timm.losses import LOSSES, PerExpertPriorLoss
from ride_timm.models.release import NAMESPACE
from ride_timm.priors import shot_groups
from ride_timm.training.arguments import Parser
from ride_timm.training.recipe import Recipe

TEMPLATE = HERE / "card.md.jinja"
_TAGS = ["image-classification", "timm", "transformers", "ride", "long-tailed-recognition", "mixture-of-experts"]


def render(staged: Staged) -> str:
    """The card as text: front matter and page."""
    config, results, recipe = staged.json(CONFIG), staged.json(RESULTS), staged.recipe()
    args = {"num_experts": 3, **config["model_args"]}
    title, hub_id, home = text.describe_data(results)
    num_experts, stages = args["num_experts"], results["stages"]
    stated, registered = results.get("repository"), is_registered(staged.name)
    repo = stated or f"owner/{staged.name}"
    curve = _few_points(results.get("routing", {}).get("curve", []))
    loss = LOSSES[recipe.loss if recipe else "ride"]
    papers = [(loss.citation, loss.paper)]
    if recipe and recipe.decouple != "none":
        papers.append(text.DECOUPLED[recipe.decouple])
    base = text.base_of(recipe, results, args.get("adapter"))
    front = ModelCardData(
        **text.licence_of(base),
        base_model=base.repo if base else None,
        base_model_relation=base.relation if base else None,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=_TAGS,
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"],
        widget=text.widget(results) or None,
        model_name=staged.name,
        eval_results=_eval_results(results, title, hub_id) or None,
    )
    card = ModelCard.from_template(
        front,
        template_path=str(TEMPLATE),
        name=staged.name,
        spec=staged.name if registered and not stated else f"hf-hub:{repo}",
        repo=repo,
        published=f"{NAMESPACE}/{staged.name}" if registered and not stated else repo,
        base=base,
        config=config,
        results=results,
        recipe=recipe,
        network=config["architecture"].removeprefix("ride_"),
        num_experts=num_experts,
        router=bool(args.get("router")),
        threshold=stages.get("router", {}).get("threshold", 0.5),
        data=f"[{title}]({home})" if home else title,
        loss=loss,
        aligned="class_affine" in args and recipe.decouple == "none" and issubclass(loss.loss, PerExpertPriorLoss),
        papers=[text.cite(*paper) for paper in papers],
        others=dict.fromkeys(text.cite(*paper) for paper in papers if paper[1] not in (None, LOSSES["ride"].paper)),
        facts=_facts(config, results, shots_of(results, recipe)),
        shots=shots_of(results, recipe),
        results_table=text.markdown(
            ["", *GROUPS, "top-5", "MMACs", "experts used"], [text.result_cells(*stage) for stage in stages.items()]
        ),
        spread_table=text.markdown(["", *GROUPS], text.spread_rows(results)),
        curve_table=text.markdown(["threshold", "MMACs", *GROUPS, "experts used"], list(map(_curve_row, curve))),
        extremes=_extremes(results, config.get("label_names")),
        has_classes=staged.has(CLASSES),
        has_curves=staged.has(CURVES),
        text=text,
        number=number,
    )
    return re.sub(r"\n{3,}", "\n\n", card.content.rstrip()) + "\n"


def write_card(staged: Staged) -> None:
    write_text(staged.path / CARD, render(staged))


def shots_of(results: dict[str, Any], recipe: Recipe | None) -> tuple[int, int]:
    """Thresholds of many- and few-shot classes: of the recipe, or those that a checkpoint was measured with."""
    many, few = recipe.shots if recipe else results.get("shots", (100, 20))
    return many, few


def _eval_results(results: dict[str, Any], title: str, hub_id: str | None) -> list[EvalResult]:
    """The entries of the model-index, one per accuracy; claimed ones are marked."""
    values = {
        f"accuracy, {group}, {STAGE_NAMES[stage]}": round(metrics[group], 2)
        for stage, metrics in results["stages"].items()
        for group in (*GROUPS, "top5")
        if metrics.get(group) is not None
    }
    if claimed := results.get("claimed"):
        values |= {f"accuracy, {group}, claimed by the authors, not measured here": claimed[group] for group in GROUPS}
    facts = dict(task_type="image-classification", task_name="Image Classification", metric_type="accuracy")
    facts |= dict(dataset_name=title, dataset_type=hub_id or "image-folder", dataset_split="test")
    return [EvalResult(**facts, metric_name=name, metric_value=value) for name, value in values.items()]


def _curve_row(point: dict[str, Any]) -> list[str]:
    cells = [short_threshold(point["threshold"]), millions(point["macs"])]
    cells += [number(point[group], 1) for group in GROUPS]
    return [*cells, percentages(point["experts_used"])]


def _few_points(curve: list[dict[str, Any]], most: int = 5) -> list[dict[str, Any]]:
    """At most so many points of a curve, evenly by cost, with both ends."""
    if len(curve) <= most:
        return curve
    low, high = curve[0]["macs"], curve[-1]["macs"]
    wanted = [low + (high - low) * i / (most - 1) for i in range(most)]
    picked = [min(curve, key=lambda point: abs(point["macs"] - cost)) for cost in wanted]
    return [point for i, point in enumerate(picked) if point not in picked[:i]]


def _facts(config: dict[str, Any], results: dict[str, Any], shots: tuple[int, int]) -> dict[str, str]:
    """The table under the summary."""
    network, cfg = results["network"], config["pretrained_cfg"]
    names, counts = config.get("label_names") or [], results.get("class_counts")
    mean, std = (", ".join(f"{value:g}" for value in cfg[key]) for key in ("mean", "std"))
    facts = {
        "parameters": f"{network['params'] / 1e6:.2f} M",
        "MMACs": f"{millions(network['macs'])} (trunk {millions(network['trunk_macs'])}, "
        f"each expert {millions(network['expert_macs'][0])})",
        "input": f"{' x '.join(map(str, cfg['input_size']))}, mean {mean}, std {std}",
        "classes": f"{config['num_classes']}" + (f": {', '.join(names)}" if 0 < len(names) <= 20 else ""),
    }
    if counts:
        groups = ", ".join(f"{int(mask.sum())} {name}" for name, mask in shot_groups(counts, *shots).items())
        images = f"{sum(counts):,}, from {max(counts):,} to {min(counts):,} per class"
        facts |= {"training images": images, "classes by shot": groups}
    return facts | {"sha256 of the weights": f"`{config['sha256']}`"}


def _extremes(results: dict[str, Any], names: list[str] | None) -> list[str]:
    """The worst and the best class by accuracy; [] where it was not measured by class."""
    per_class = ensemble_metrics(results["stages"]).get("per_class") or []
    known = [(accuracy, c) for c, accuracy in enumerate(per_class) if accuracy is not None]
    counts = results.get("class_counts")
    return [
        f"{accuracy:.0f} % ({names[c] if names else f'class {c}'}, {counts[c]:,} training images)"
        for accuracy, c in ((min(known), max(known)) if known else ())
    ]


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", metavar="NAME.TAG")
    parser.add_argument("--root", type=Path, default=HERE, metavar="DIR", help="folder of the staged releases")
    args = parser.parse_args(argv)
    staged = Staged.find(args.name, args.root)
    write_card(staged)
    print(f"rendered {staged.path / CARD}")


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
