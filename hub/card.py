"""The card of a staged release, rendered from its config.json, results.json and recipe.yaml; nothing in it is typed.

python hub/card.py NAME.TAG

renders it again.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from folder import CARD, CLASSES, CONFIG, CURVES, HERE, RESULTS, Staged, is_registered
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from training import as_given, command, licence, numbers, rare_classes, settings, summary, training

from ride_timm.cli.process import exit_code
from ride_timm.data.datasets import KNOWN
from ride_timm.priors import shot_groups
from ride_timm.training.arguments import Parser
from ride_timm.training.recipe import Recipe

TEMPLATE = HERE / "card.md.jinja"
_GROUPS = ("all", "many", "medium", "few")
STAGE_NAMES = {"experts": "ensemble", "router": "routed"}


def render(staged: Staged) -> str:
    """The card as text: front matter and page."""
    config, results, recipe = staged.json(CONFIG), staged.json(RESULTS), staged.recipe()
    stages, claimed, data = results["stages"], results.get("claimed"), results.get("data", {})
    args = {**dict(num_experts=3), **config["model_args"]}
    pretty, hub_id, home = describe_data(results)
    routed, shots = stages.get("router"), shots_of(results, recipe)
    card_data = ModelCardData(
        license="mit",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "ride", "long-tailed-recognition", "mixture-of-experts"],
        datasets=[hub_id] if hub_id else None,
        metrics=["accuracy"],
        model_name=staged.name,
        eval_results=_eval_results(stages, claimed, pretty, hub_id) or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=staged.name,
        spec=staged.name if is_registered(staged.name) else f"hf-hub:owner/{staged.name}",
        summary=summary(config, args, pretty, home, results, recipe),
        has_classes=staged.has(CLASSES),
        has_curves=staged.has(CURVES),
        has_router=bool(args.get("router")),
        has_routing="routing" in results,
        threshold=(routed or {}).get("threshold", 0.5),
        facts=_facts(config, args, results, shots),
        num_classes=config["num_classes"],
        num_experts=args["num_experts"],
        counts_of_experts=" / ".join(map(str, range(1, args["num_experts"] + 1))),
        shots=_shots(*shots),
        measured_rows=[result_row(STAGE_NAMES[stage], metrics) for stage, metrics in stages.items()],
        **seed_facts(results),
        provenance=_provenance(results),
        claimed_row=[claimed["method"], *(_percent(claimed[group]) for group in _GROUPS)] if claimed else None,
        claimed_url=claimed and claimed["url"],
        claimed_note=_claimed_note(claimed, args) if claimed else "",
        curve_rows=[_curve_row(point) for point in _few_points(results.get("routing", {}).get("curve", []))],
        training=training(recipe, results),
        command=command(recipe, results),
        settings=[*settings(recipe, args, stages), *_teacher(results)] if recipe else [],
        tail=_tail(results, shots[1]),
        rare_classes=rare_classes(recipe),
        balanced_note="" if data.get("dataset") != "inat18" else " (three images a class)",
        few_note=_few_note(results, config.get("label_names")),
        licence=licence(staged, recipe, args),
    )
    return re.sub(r"\n{3,}", "\n\n", card.content.rstrip()) + "\n"


def write_card(staged: Staged) -> None:
    (staged.path / CARD).write_text(render(staged), encoding="utf-8")


def describe_data(results: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Pretty name with the imbalance, Hub id and home page of a results.json's training images; None where unknown."""
    data, counts = results.get("data", {}), results.get("class_counts")
    dataset = data.get("dataset")
    known = KNOWN.get(dataset)
    if known:
        pretty, hub_id, home = known.title, known.hub_id, known.home
    elif dataset and re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset):
        pretty, hub_id, home = dataset, dataset, f"https://huggingface.co/datasets/{dataset}"
    else:
        pretty, hub_id, home = dataset or "data that are not named", None, None
    if data.get("imb_type") in ("exp", "step"):
        kind = "" if data["imb_type"] == "exp" else "step, "
        pretty += f" ({kind}imbalance factor {1 / data['imb_factor']:g})"
    elif known and known.imb_factor:
        pretty += f" (imbalance factor {1 / known.imb_factor:g})"
    elif as_given(results) and min(counts) > 0:
        pretty += f" (ready-made, imbalance factor {round(max(counts) / min(counts))})"
    return pretty, hub_id, home


def _teacher(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The row of the teacher: its public name, if it has one, and the hash of its weights."""
    if "teacher" not in results:
        return []
    spec, digest = results["teacher"]["spec"], results["teacher"]["sha256"]
    return [("teacher", f"{f'`{spec}`, ' if spec else ''}sha256 of its weights {digest[:12]}")]


def shots_of(results: dict[str, Any], recipe: Recipe | None) -> tuple[int, int]:
    """Thresholds of many- and few-shot classes in the figures: the recipe's, or those of a checkpoint's measurement."""
    many, few = recipe.shots if recipe else results.get("shots", (100, 20))
    return many, few


def _shots(many: int, few: int) -> str:
    medium = f"medium {few} to {many}" if few <= many else "medium none"
    return f"many above {many}, {medium}, few\nbelow {few}"


def _eval_results(
    stages: dict[str, Any], claimed: dict[str, Any] | None, pretty: str, hub_id: str | None
) -> list[EvalResult]:
    """One entry an accuracy for the model-index; claimed ones name their source."""
    place = dict(task_type="image-classification", task_name="Image Classification", dataset_name=pretty)
    place |= dict(dataset_type=hub_id or "image-folder", dataset_split="test", metric_type="accuracy")
    found = []
    for stage, metrics in stages.items():
        for group in (*_GROUPS, "top5"):
            if metrics.get(group) is not None:
                name = f"accuracy, {group}, {STAGE_NAMES[stage]}"
                found.append(EvalResult(**place, metric_name=name, metric_value=round(metrics[group], 2)))
    for group in _GROUPS if claimed else ():
        name = f"accuracy, {group}, claimed by the authors, not measured here"
        found.append(EvalResult(**place, metric_name=name, metric_value=claimed[group]))
    return found


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _macs(value: float) -> str:
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"


def _shares(used: list[float] | None) -> str:
    return " / ".join(f"{100 * share:.1f}" for share in used) + " %" if used else "–"


def result_row(name: str, metrics: dict[str, Any]) -> list[str]:
    accuracies = [_percent(metrics.get(group)) for group in (*_GROUPS, "top5")]
    return [name, *accuracies, _macs(metrics["macs"]), _shares(metrics.get("experts_used"))]


def _curve_row(point: dict[str, Any]) -> list[str]:
    accuracies = [_percent(point[group]) for group in _GROUPS]
    return [f"{point['threshold']:.6g}", _macs(point["macs"]), *accuracies, _shares(point["experts_used"])]


def _few_points(curve: list[dict[str, Any]], most: int = 5) -> list[dict[str, Any]]:
    """A handful of points of a curve, evenly by cost, both ends among them."""
    if len(curve) <= most:
        return curve
    low, high = curve[0]["macs"], curve[-1]["macs"]
    wanted = [low + (high - low) * i / (most - 1) for i in range(most)]
    picked = [min(curve, key=lambda point: abs(point["macs"] - cost)) for cost in wanted]
    return [point for i, point in enumerate(picked) if point not in picked[:i]]


def _facts(
    config: dict[str, Any], args: dict[str, Any], results: dict[str, Any], shots: tuple[int, int]
) -> list[tuple[str, str]]:
    network, size = results["network"], config["pretrained_cfg"]["input_size"]
    router = " and a router" if args.get("router") else ""
    facts = [
        ("network", f"`{config['architecture']}`, {_experts(args['num_experts'])}{router}"),
        ("parameters", f"{network['params'] / 1e6:.2f} M"),
        ("MACs", f"{_macs(network['macs'])} (trunk {_macs(network['trunk_macs'])}, "
                 f"each expert {_macs(network['expert_macs'][0])})"),
        ("input", f"{size[0]} x {size[1]} x {size[2]}, normalised by mean {numbers(config['pretrained_cfg']['mean'])} "
                  f"and std {numbers(config['pretrained_cfg']['std'])}"),
        ("classes", f"{config['num_classes']}" + _class_list(config)),
    ]  # fmt: skip
    if counts := results.get("class_counts"):
        groups = {name: int(mask.sum()) for name, mask in shot_groups(counts, *shots).items()}
        told = ", ".join(f"{number} {name}-shot" for name, number in groups.items())
        range_ = f"{max(counts):,} to {min(counts):,} a class"
        facts.append(("training images", f"{sum(counts):,}, {range_} (classes: {told})"))
    facts.append(("sha256 of the weights", f"`{config['sha256']}`"))
    return facts


def _experts(number: int) -> str:
    return "one expert" if number == 1 else f"{number} experts"


def _class_list(config: dict[str, Any]) -> str:
    names = config.get("label_names") or []
    return f": {', '.join(names)}" if 0 < len(names) <= 20 else ""


def seed_facts(results: dict[str, Any]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, or the plain word that there is one only."""
    runs = results.get("seeds") or []
    if len(runs) < 2:
        one = "One run of one seed: how far other seeds would spread was not measured." if runs else ""
        return dict(spread=one, seed_rows=[], seed_numbers="")
    rows = []
    for stage in runs[0]["stages"]:
        values = {group: [run["stages"][stage][group] for run in runs if stage in run["stages"]] for group in _GROUPS}
        rows.append([STAGE_NAMES[stage], *(_spread(values[group]) for group in _GROUPS)])
    text = f"Over {len(runs)} runs of this recipe with different seeds, this one among them, mean ± standard deviation:"
    return dict(spread=text, seed_rows=rows, seed_numbers=", ".join(str(run["seed"]) for run in runs))


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return "–"
    return f"{statistics.mean(known):.1f} ± {statistics.stdev(known):.1f}"


def run_facts(results: dict[str, Any]) -> str:
    """Seed, precision and number of processes of a run; of a checkpoint, the precision it was measured in."""
    if results.get("seed") is None:
        return "fp32"
    facts = [f"seed {results['seed']}", {"no": "fp32"}.get(results["precision"], results["precision"])]
    if results.get("num_processes", 1) > 1:
        facts.append(f"{results['num_processes']} processes")
    return ", ".join(facts)


def commit_fact(results: dict[str, Any]) -> str:
    return f"commit `{results['commit'][:12]}`" if results["commit"] else ""


def _provenance(results: dict[str, Any]) -> str:
    versions = results["versions"]
    verb = "Measured" if results.get("seed") is None else "Made"
    time = f", {results['seconds'] / 60:.0f} minutes" if results.get("seconds", 0) >= 60 else ""
    made = ", ".join(f"{name} {versions[name]}" for name in ("ride-timm", "torch", "timm") if name in versions)
    made = ", ".join(filter(None, (made, commit_fact(results))))
    return f"{verb} with {made}: {run_facts(results)}, on {results['device']}{time}." if results.get("device") else ""


def _claimed_note(claimed: dict[str, Any], args: dict[str, Any]) -> str:
    if claimed["routed"] and not args.get("router"):
        return "They were measured with a router, which this checkpoint does not have: its own figures differ."
    return f"They were measured {'with' if claimed['routed'] else 'without'} a router."


def _tail(results: dict[str, Any], few_shot: int) -> str:
    counts = results.get("class_counts")
    if not counts:
        return "a few classes have most of the images."
    few = sum(1 for count in counts if count < few_shot)
    return (
        f"from {max(counts):,} images of the most frequent class to {min(counts):,} of the rarest, "
        f"{few} of {len(counts)} classes with fewer than {few_shot}."
    )


def _few_note(results: dict[str, Any], names: list[str] | None) -> str:
    """The worst and the best class, where the accuracy by class was measured."""
    per_class = results["stages"].get("experts", {}).get("per_class")
    if not per_class:
        return ""
    known = [(accuracy, c) for c, accuracy in enumerate(per_class) if accuracy is not None]
    counts = results["class_counts"]

    def told(accuracy: float, c: int) -> str:
        return f"{accuracy:.0f} % ({names[c] if names else f'class {c}'}, {counts[c]:,} training images)"

    return (
        f"Accuracy by class goes from {told(*min(known))} to {told(*max(known))}: do not rely on a class without "
        "looking at its own."
    )


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
