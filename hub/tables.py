"""Render the tables of tags and results from the staged releases, and those of methods from the losses.

python hub/tables.py

fills hub/README.md with the tags, docs/results.md with every measurement and its provenance, docs/methods.md with the
losses and their keys, and README.md with a summary of the measurements. A tag is published (on the Hub), staged (a
folder in hub/), convertible (a checkpoint of the authors) or trainable (from a recipe or the authors' configuration).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import card_text as text
import timm
from folder import CONFIG, HERE, RESULTS, ROOT, Staged, read_releases
from zoo import DOWNLOAD, read_zoo

from ride_timm import InputError
from ride_timm.cli.process import exit_code
from ride_timm.evaluation.tables import GROUPS, ensemble_metrics, markdown_table, millions, number
from ride_timm.files import write_text
from ride_timm.losses import LOSSES, RegisteredLoss
from ride_timm.models.release import NAMESPACE
from ride_timm.training.arguments import Parser

_TAG_COLUMNS = ("our name", "experts", "router", "original", "state")
_SUMMARY_COLUMNS = ("weights", "data set", *GROUPS, "MMACs", "routed", "MMACs")
_COLUMNS = ("weights", "prediction", *GROUPS, "top-5", "MMACs", "experts used")


def tag_states() -> dict[str, str]:
    """The state of every tag that has weights or may get them, by network."""
    releases, checkpoints, states = read_releases(), read_zoo()["checkpoints"], {}
    for name in timm.list_models("ride*"):
        for tag in sorted(timm.models.get_arch_pretrained_cfgs(name)):
            release = releases.get(tag, {})
            if release.get("published"):
                states[tag] = "published"
            elif release.get("sha256") and (HERE / tag / CONFIG).is_file():
                states[tag] = "staged"
            elif not tag.endswith(".untrained"):
                states[tag] = "convertible" if tag in checkpoints else "trainable"
    return states


def render_tags() -> str:
    releases, checkpoints, lines = read_releases(), read_zoo()["checkpoints"], [_TAG_COLUMNS]
    for tag, state in tag_states().items():
        args, original = releases.get(tag, {}).get("model_args", {}), checkpoints.get(tag)
        where = {"published": f"https://huggingface.co/{NAMESPACE}/{tag}", "staged": tag}.get(state)
        lines.append(
            (
                f"`{tag}`",
                str(args.get("num_experts", 3)),
                "yes" if args.get("router") else "no",
                f"[authors' zoo]({DOWNLOAD.format(original['file'])})" if original else "–",
                f"[{state}]({where})" if where else state,
            )
        )
    return markdown_table(lines)


def measured(root: Path) -> list[tuple[Staged, dict[str, Any]]]:
    """The releases of a folder that have measured results, by name, with their results."""
    found = [Staged(path.parent.name, path.parent) for path in sorted(root.glob(f"[!.]*/{CONFIG}"))]
    return [(staged, results) for staged in found if (results := staged.json(RESULTS))["stages"]]


def _rows(staged: Staged, results: dict[str, Any]) -> list[list[str]]:
    model = f"[`{staged.name}`](../hub/{staged.name})"
    rows = [[model, *text.result_cells(*stage)] for stage in results["stages"].items()]
    for stage, *accuracies in text.spread_rows(results):
        rows.append([model, f"{stage}, mean ± deviation of seeds {text.seeds(results)}", *accuracies, *"–––"])
    return rows


def _origin(staged: Staged, results: dict[str, Any]) -> str:
    """Data, recipe, epochs and source of a release, then the facts of each of its runs."""
    facts = [text.describe_data(results)[0]]
    if results.get("claimed"):
        facts.append("the authors' checkpoint, measured")
    if results["recipe"]:
        epochs = " + ".join(str(stage["epochs"]) for stage in results["stages"].values())
        facts += [f"recipe `{results['recipe']}`", f"{epochs} epochs"]
    if "source" in results:
        facts.append(f"starting from {text.weights_name(results['source'])}")
    others = [run for run in results.get("seeds", ()) if run["seed"] != results["seed"] and "device" in run]
    runs = "; ".join(", ".join([*text.run_facts(run), _time(run)]) for run in (results, *others))
    recipe = staged.recipe()
    selection = f" {text.selection(recipe, results['stages'])}" if recipe else ""
    return f"- `{staged.name}`: {', '.join(facts)}, {runs}.{selection}"


def _time(run: dict[str, Any]) -> str:
    return f"{run['seconds']:,.0f} s on {run['device']}" if "seconds" in run else run["device"]


def render_results(root: Path = HERE) -> str:
    """Every stage of every release, means over seeds, and below the table where each number comes from."""
    releases = measured(root)
    table = markdown_table([_COLUMNS, *(row for release in releases for row in _rows(*release))])
    return f"{table}\n\n" + "\n".join(_origin(*release) for release in releases)


def render_summary(root: Path = HERE) -> str:
    """One row per release, by data set and accuracy: the ensemble by shot group, then the routed accuracy and cost."""
    rows = []
    for staged, results in measured(root):
        experts, router = ensemble_metrics(results["stages"]), results["stages"].get("router", {})
        data = text.describe_data(results)[0].partition(" (")[0]
        accuracies = [number(experts.get(group), 1) for group in GROUPS]
        cost = [millions(experts.get("macs")), number(router.get("all"), 1), millions(router.get("macs"))]
        rows.append((data, experts.get("all", 0.0), [f"`{staged.name}`", data, *accuracies, *cost]))
    return markdown_table([_SUMMARY_COLUMNS, *(row for *_, row in sorted(rows))])


def _arxiv(paper: str | None) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if paper else "–"


def _by_paper() -> list[tuple[str, RegisteredLoss]]:
    """The losses from the oldest paper to the latest."""
    return sorted(LOSSES.items(), key=lambda item: item[1].paper or "")


def render_methods() -> str:
    rows = [
        (f"`{name}`", f"{entry.citation}: {entry.summary}".removeprefix("the "), _arxiv(entry.paper), _keys(entry))
        for name, entry in _by_paper()
    ]
    return markdown_table([("`--loss`", "method", "paper", "keys"), *rows])


def _keys(entry: RegisteredLoss) -> str:
    return ", ".join(f"`{item.name}`" for item in entry.keys) or "–"


PAGES = {
    "tags": (HERE / "README.md", render_tags),
    "results": (ROOT / "docs" / "results.md", render_results),
    "methods": (ROOT / "docs" / "methods.md", render_methods),
    "summary": (ROOT / "README.md", render_summary),
}


def fill(page: str, name: str, body: str) -> str:
    """The page with `body` between the two marker lines of a table; InputError where it has none."""
    begin, end = f"<!-- {name}: rendered by hub/tables.py -->\n", f"<!-- {name}: end -->"
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise InputError(f"the page has no lines {begin.strip()} and {end}.")
    return f"{before}{begin}{body}\n{end}{after}"


def refresh() -> None:
    """Render every table into its page."""
    pages: dict[Path, str] = {}
    for name, (path, render) in PAGES.items():
        pages[path] = fill(pages.get(path) or path.read_text(encoding="utf-8"), name, render())
    for path, page in pages.items():
        write_text(path, page)
        print(f"rendered {path}")


def main(argv: list[str] | None) -> None:
    Parser(description=__doc__, allow_abbrev=False).parse_args(argv)
    refresh()


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
