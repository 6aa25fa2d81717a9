"""Phrases and table cells that cards and the tables of results share; all come from results.json and the recipe."""

from __future__ import annotations

import re
import statistics
from typing import Any, NamedTuple

import timm

from ride_timm.data.datasets import BALANCED, KNOWN
from ride_timm.evaluation.tables import GROUPS, STAGE_NAMES, markdown_table, millions, number, percentages
from ride_timm.losses import LOSSES
from ride_timm.models.release import NAMESPACE
from ride_timm.models.ride_any import DEFAULT_BACKBONE, NAMED
from ride_timm.training.recipe import Recipe

DECOUPLED = {  # by `decouple` of the recipe: citation and paper
    "crt": ("cRT", "1910.09217"),
    "lws": ("LWS", "1910.09217"),
    "balanced_softmax": ("late balanced softmax", "2304.01279"),
    "tau_norm": ("tau-normalization", "1910.09217"),
    "logit_adjustment": ("logit adjustment", "2007.07314"),
}
_HUB = "https://huggingface.co"
_SAMPLES = f"{_HUB}/datasets/mishig/sample_images/resolve/main"
_IMAGES = {  # public images of classes that the data have
    "cifar10": {"Cat": f"{_HUB}/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg"},
    "cifar100": {"Tiger": f"{_SAMPLES}/tiger.jpg"},
    "imagenet_lt": {name: f"{_SAMPLES}/{name.lower()}.jpg" for name in ("Tiger", "Teapot", "Palace")},
}
_LICENCES = ("apache-2.0", "apple-amlr", "apple-ascl", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "gemma", "mit")


class Base(NamedTuple):
    """The published weights that a release started from: their Hub id, their licence, and how they were changed."""

    repo: str
    licence: str
    relation: str = "finetune"

    @property
    def url(self) -> str:
        return f"{_HUB}/{self.repo}"


def base_of(recipe: Recipe | None, results: dict[str, Any], adapter: str | None = None) -> Base | None:
    """The backbone that was pretrained, or the release that training started from; None for neither, or a private run.

    adapter: kind of the release's weights, None for merged ones. The licence is the backbone's, MIT that of this
    project's releases, and "unknown" where neither is known.
    """
    source, backbone = results.get("source"), None
    if recipe is not None and recipe.pretrained and (name := _backbone(recipe)):
        cfg = timm.get_pretrained_cfg(name)
        relation = "finetune" if adapter is None else "adapter"
        backbone = Base(cfg.hf_hub_id or f"timm/{cfg.architecture}.{cfg.tag}", cfg.license or "unknown", relation)
    if source is None:
        return backbone
    repo = source.removeprefix("hf-hub:") if source.startswith("hf-hub:") else f"{NAMESPACE}/{source}"
    licence = "mit" if repo.startswith(f"{NAMESPACE}/") else "unknown"
    return Base(repo.partition("@")[0], backbone.licence if backbone else licence)


def _backbone(recipe: Recipe) -> str | None:
    """timm's name of the backbone; None for networks that are no timm backbone."""
    return recipe.backbone or (NAMED | {"ride": DEFAULT_BACKBONE}).get(recipe.model)


def licence_of(base: Base | None) -> dict[str, str]:
    """The front matter's licence: that of the weights a release started from, or MIT."""
    if base is None or base.licence in _LICENCES:
        return dict(license=base.licence if base else "mit")
    return dict(license="other", license_name=base.licence, license_link=base.url)


def widget(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Example images: those of the release with its predictions, or public ones of classes that the data have."""
    found = [
        dict(src=example["file"], output=example["output"],
             example_title=f"{example['class']}{', drawn' if example.get('drawn') else ''} "
                           f"({example['train_images']:,} training images)")
        for example in results.get("examples", ())
    ]  # fmt: skip
    images = _IMAGES.get(results.get("data", {}).get("dataset"), {})
    return found or [dict(src=url, example_title=title) for title, url in images.items()]


def compute(results: dict[str, Any], base: Base | None = None) -> str:
    """The sentences on the time and the hardware of training, of all seeds, and on the weights it started from."""
    processes = results.get("num_processes", 1)
    others = f" in {processes} processes" if processes > 1 else ""
    spans = [run.get("seconds") for run in results.get("seeds", ())]
    seeds = f"; its {len(spans)} seeds took {_span(sum(spans))}" if len(spans) > 1 and all(spans) else ""
    before = ""
    if earlier := results.get("source_seconds"):
        before = f" Before that, the weights it started from took {_span(earlier)}."
    elif base or "source" in results:
        before = " The training of the weights it started from is not included."
    own = f"Training took {_span(results['seconds'])} on {results['device']}{others}, with its evaluations{seeds}."
    return own + before


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def cite(citation: str, paper: str | None) -> str:
    return f"{citation} ([arXiv:{paper}](https://arxiv.org/abs/{paper}))" if paper else citation


def describe_data(results: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Title with the imbalance, Hub id and home page of the training images; None where unknown."""
    data, counts = results.get("data", {}), results.get("class_counts")
    dataset = data.get("dataset")
    known, factor = KNOWN.get(dataset), None
    if known:
        title, hub_id, home = known.title, known.hub_id, known.home
        factor = known.imb_factor
    elif dataset and re.fullmatch(r"\w[\w.-]*/[\w.-]+", dataset):
        title, hub_id, home = dataset, dataset, f"https://huggingface.co/datasets/{dataset}"
    else:
        title, hub_id, home = dataset or "an unnamed data set", None, None
    if data.get("imb_type") in ("exp", "step"):
        factor = data["imb_factor"]
    step = "step, " if data.get("imb_type") == "step" else ""
    if ready_made(results) and min(counts) > 0:
        step, factor = "ready-made, ", 1 / round(max(counts) / min(counts))
    return f"{title} ({step}imbalance factor {1 / factor:g})" if factor else title, hub_id, home


def ready_made(results: dict[str, Any]) -> bool:
    """True where a set that is balanced on the Hub was read from a long-tailed copy."""
    data, long_tailed = results.get("data", {}), len(set(results.get("class_counts", ()))) > 1
    return data.get("dataset") in BALANCED and data.get("imb_type") == "none" and long_tailed


def weights_name(spec: str | None) -> str:
    """The name of the weights of a source or a teacher, None for private ones."""
    return f"`{spec}`" if spec else "an earlier run"


def selection(recipe: Recipe, stages: dict[str, Any]) -> str:
    """The sentence on the epoch of the metrics; stages: those of results.json."""
    if not any(stage["epochs"] for stage in stages.values()):
        return "The metrics are of the test set."
    if recipe.select == "last":
        return "The metrics are those of the last epoch, on the test set."
    images = "validation images" if recipe.use_val else "held-out training images"
    return f"The epoch was selected on {images}, not on the test set."


def training(recipe: Recipe, results: dict[str, Any]) -> str:
    """The sentences on the stages, their length and the weights they started from."""
    stages, parts = results["stages"], []
    heads = "their classifiers" if "experts" in stages else "the classifiers of trained experts"
    names = {"experts": "the experts", "heads": heads, "router": "the router"}
    for name, metrics in stages.items():
        epochs = metrics["epochs"]
        parts.append(f"{names[name]} for {_epochs(epochs)}" if epochs else f"{names[name]} in closed form")
    if "source" in results:
        parts[0] += f" (starting from {weights_name(results['source'])})"
    return f"With `ride_timm`: {', then '.join(parts)}. {selection(recipe, stages)}"


def _epochs(number: int) -> str:
    return "one epoch" if number == 1 else f"{number} epochs"


def command(recipe: Recipe, results: dict[str, Any]) -> str:
    """The command that trains the release from its recipe."""
    stages, flags = results["stages"], ["--recipe recipe.yaml"]
    if ready_made(results):
        flags.append("--data-dir path/to/the/long-tailed/copy")
    if list(stages) == ["router"]:
        flags.append("--stage router")
    elif recipe.num_experts > 1 and "router" not in stages:
        flags.append("--stage experts")
    if "source" in results or "experts" not in stages:
        flags.append(f"--from {results.get('source') or 'path/to/the/trained/run'}")
    elif recipe.distillation:
        flags.append(f"--teacher {results.get('teacher', {}).get('spec') or 'path/to/the/teacher'}")
    return f"accelerate launch train_accelerate.py {' '.join(flags)}"


def loss_settings(recipe: Recipe) -> str:
    """The loss with the recipe keys that it reads and that are set."""
    entry = LOSSES[recipe.loss]
    values, keys = entry.arguments(recipe), [item.name for item in entry.keys]
    return ", ".join([recipe.loss, *(f"{key} {setting(values[key])}" for key in keys if values.get(key) is not None)])


def setting(value: Any) -> str:
    """A value of a recipe, shortest: 0.01, yes, (0, 1, 2)."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return f"({', '.join(map(setting, value))})" if isinstance(value, list | tuple) else str(value)


def result_cells(stage: str, metrics: dict[str, Any]) -> list[str]:
    """Name, accuracies, MMACs and experts used of one stage."""
    accuracies = [number(metrics.get(group), 1) for group in (*GROUPS, "top5")]
    used = percentages(metrics.get("experts_used"))
    return [STAGE_NAMES[stage], *accuracies, millions(metrics["macs"]), used]


def spread_rows(results: dict[str, Any]) -> list[list[str]]:
    """Mean and standard deviation over seeds: name and accuracies of every stage; [] for a single seed."""
    runs, rows = results.get("seeds") or [], []
    for stage in runs[0]["stages"] if len(runs) > 1 else ():
        values = [[run["stages"][stage][group] for run in runs if stage in run["stages"]] for group in GROUPS]
        rows.append([STAGE_NAMES[stage], *map(_spread, values)])
    return rows


def seeds(results: dict[str, Any]) -> str:
    return ", ".join(str(run["seed"]) for run in results["seeds"])


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.1f} ± {statistics.stdev(known):.1f}" if len(known) > 1 else "–"


def run_facts(results: dict[str, Any]) -> list[str]:
    """Seed, precision, processes and commit of a run; of a checkpoint, those of its measurement."""
    precision = {"no": "fp32"}.get(results["precision"], results["precision"])
    facts = [precision] if results.get("seed") is None else [f"seed {results['seed']}", precision]
    if results.get("num_processes", 1) > 1:
        facts.append(f"{results['num_processes']} processes")
    if results["commit"]:
        sha, plus, dirty = results["commit"].partition("+")
        facts.append(f"commit `{sha[:12]}{plus}{dirty}`")
    return facts


def markdown(heading: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; "" without rows."""
    return markdown_table([heading, *rows]) if rows else ""
