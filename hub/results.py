"""Render the tables of results from the results.json of every staged release.

python hub/results.py

fills the summary in README.md and every measurement, with its provenance, in docs/results.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from card import STAGE_NAMES, commit_fact, describe_data, result_row, run_facts, seed_facts
from staged import CONFIG, HERE, RESULTS, ROOT, Staged, fill_file
from training import began_from, how_chosen

from ride_timm.cli.process import exit_code
from ride_timm.training.arguments import Parser

PAGE, SUMMARY_PAGE = ROOT / "docs" / "results.md", ROOT / "README.md"
BEGIN, END = "<!-- results: rendered by hub/results.py -->", "<!-- results: end -->"
_SUMMARY = ("weights", "data set", "all", "many", "medium", "few", "MMACs", "routed", "MMACs")
_COLUMNS = ("model", "answer", "all", "many", "medium", "few", "top-5", "MACs", "images that use 1 / 2 / … experts")


def measured(root: Path) -> list[tuple[Staged, dict[str, Any]]]:
    """The releases staged in a folder with figures measured here, by name, each with its results."""
    found = [Staged(path.parent.name, path.parent) for path in sorted(root.glob(f"[!.]*/{CONFIG}"))]
    return [(staged, results) for staged in found if (results := staged.json(RESULTS))["stages"]]


def _rows(staged: Staged, results: dict[str, Any]) -> list[list[str]]:
    model = f"[`{staged.name}`](../hub/{staged.name})"
    rows = [[model, *result_row(STAGE_NAMES[stage], metrics)] for stage, metrics in results["stages"].items()]
    spread = seed_facts(results)
    for name, *accuracies in spread["seed_rows"]:
        rows.append([model, f"{name}, mean ± deviation of seeds {spread['seed_numbers']}", *accuracies, *"–––"])
    return rows


def _origin(staged: Staged, results: dict[str, Any]) -> str:
    """Data, recipe, seed, epochs, precision, commit, time and processor."""
    facts = [describe_data(results)[0]]
    if results.get("claimed"):
        facts.append("the authors' checkpoint, measured")
    if results["recipe"]:
        epochs = " + ".join(str(stage["epochs"]) for stage in results["stages"].values())
        facts += [f"recipe `{results['recipe']}`", f"{epochs} epochs"]
    if "source" in results:
        facts.append(f"from the weights of {began_from(results)}")
    others = [_made(run) for run in results.get("seeds", ()) if run["seed"] != results["seed"] and "device" in run]
    recipe = staged.recipe()
    chosen = f" {how_chosen(recipe, results['stages'])}" if recipe else ""
    return f"- `{staged.name}`: {', '.join(filter(None, facts))}, {'; '.join([_made(results), *others])}.{chosen}"


def _made(run: dict[str, Any]) -> str:
    """Seed, precision, commit, time and processor of one run."""
    time = f"{run['seconds']:,.0f} s on " if "seconds" in run else ""
    return ", ".join(filter(None, (run_facts(run), commit_fact(run), f"{time}{run['device']}")))


def _table(*lines: Sequence[str]) -> str:
    header, *rows = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))


def render_table(root: Path = HERE) -> str:
    """Every stage of every release, means over seeds, and below the table where each number comes from."""
    releases = measured(root)
    table = _table(_COLUMNS, *(row for release in releases for row in _rows(*release)))
    return f"{table}\n\n" + "\n".join(_origin(*release) for release in releases)


def render_summary(root: Path = HERE) -> str:
    """One row per release, by data set and accuracy: the ensemble by shot group, then the routed accuracy and cost."""
    rows = []
    for staged, results in measured(root):
        experts, router = results["stages"]["experts"], results["stages"].get("router", {})
        numbers = [experts[group] for group in ("all", "many", "medium", "few")]
        numbers += [experts["macs"] / 1e6, router.get("all"), router["macs"] / 1e6 if router else None]
        data = describe_data(results)[0].partition(" (")[0]
        rows.append(
            (data, experts["all"], [f"`{staged.name}`", data, *("–" if n is None else f"{n:.1f}" for n in numbers)])
        )
    return _table(_SUMMARY, *(row for *_, row in sorted(rows)))


def main(argv: list[str] | None) -> None:
    Parser(description=__doc__, allow_abbrev=False).parse_args(argv)
    fill_file(PAGE, BEGIN, END, render_table())
    fill_file(SUMMARY_PAGE, BEGIN, END, render_summary())


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
