"""The tables of tags and of results, and the committed files that they render."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tables
import zoo
from authors_files import authors_checkpoint
from card import render
from folder import HERE, Staged, read_releases
from release_files import TAG, set_json
from stage import stage

from ride_timm import InputError


@pytest.mark.parametrize("name", tables.PAGES)
def test_the_pages_are_as_rendered(name):
    path, render_table = tables.PAGES[name]
    page = path.read_text(encoding="utf-8")
    assert tables.fill(page, name, render_table()) == page, "python hub/tables.py"


def test_every_release_of_the_package_has_a_state():
    states = tables.tag_states()
    assert set(states.values()) <= {"published", "staged", "convertible", "trainable"}
    assert set(states) >= set(read_releases())


def test_the_results_in_the_readme_are_those_of_the_releases():
    page = tables.PAGES["results"][0].read_text(encoding="utf-8")
    for folder in HERE.glob("*/config.json"):
        stages = json.loads(folder.with_name("results.json").read_text())["stages"]
        accuracies = [f"{metrics['all']:.1f}" for metrics in stages.values()]
        rows = [line.split(" | ") for line in page.splitlines() if line.startswith(f"| [`{folder.parent.name}`]")]
        assert [row[2] for row in rows][: len(accuracies)] == accuracies


def test_results_of_seeds_checkpoints_and_unmeasured_releases(make_run, run, tmp_path):
    seeds = (make_run(seed=1, accuracy=56.0),)
    stage(run, TAG, tmp_path, seeds=seeds, measured=False)
    plain = authors_checkpoint(tmp_path / "plain.pth", "ride_resnet32")
    theirs = zoo.convert(plain, "ride_resnet32.cifar100_lt100_zoo", tmp_path)
    assert len(tables.measured(tmp_path)) == 1 and "zoo" not in tables.render_results(tmp_path)
    shutil.copytree(theirs.path, tmp_path / ".left.over")
    results = theirs.json("results.json")
    results["stages"] = dict(experts=dict(all=48.0, many=60.0, medium=50.0, few=20.0, macs=102_000_000))
    results |= dict(device="cpu", commit=None)
    (theirs.path / "results.json").write_text(json.dumps(results))
    text = tables.render_results(tmp_path)
    assert text.count("ride_resnet32.cifar100_lt100_zoo`](") == 1 and ".left" not in text
    assert "CIFAR100-LT (imbalance factor 100), the authors' checkpoint, measured, fp32, cpu." in text
    assert "| ensemble, mean ± deviation of seeds 0, 1 | 53.0 ± 4.2 |" in text
    of_a_run = r", fp32, (commit `\w{12}`, )?125 s on cpu \([^;]+\)"
    assert re.search(f" seed 0{of_a_run}; seed 1{of_a_run}\\. The metrics are those of the last epoch", text)
    closed = Staged.find(TAG, tmp_path).json("results.json")["stages"]
    for metrics in closed.values():
        metrics["epochs"] = 0  # re-balanced in closed form: no epoch was trained
    set_json(tmp_path / TAG / "results.json", stages=closed)
    assert "those of the last epoch" not in tables.render_results(tmp_path)


def test_a_router_alone_has_a_row(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    stages = json.loads((folder / "results.json").read_text())["stages"]
    set_json(folder / "results.json", stages={"router": stages["router"]}, source=None)
    stage(folder, TAG, tmp_path / "hub", measured=False)
    row = tables.render_summary(tmp_path / "hub").splitlines()[-1]
    assert row.endswith("| – | – | – | – | – | 50.0 | 0.0 |") and f"`{TAG}`" in row


def test_filling_a_page():
    begin, end = "<!-- tags: rendered by hub/tables.py -->", "<!-- tags: end -->"
    with pytest.raises(InputError, match=f"has no lines {begin} and {end}"):
        tables.fill(f"a page\n{end}\n", "tags", "text")
    assert tables.fill(f"x\n{begin}\nold\n{end}\ny", "tags", r"\1 new") == f"x\n{begin}\n\\1 new\n{end}\ny"


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in HERE.glob("*/config.json")))
def test_what_is_staged_here_is_verified_and_stands_in_the_table(folder):
    staged = Staged.find(folder, HERE)
    seen = staged.json("verified.json")["files"]
    assert seen == staged.hashes()
    assert read_releases()[folder]["sha256"] == seen["model.safetensors"] == staged.json("config.json")["sha256"]
    text = (staged.path / "README.md").read_text(encoding="utf-8")
    assert text == render(staged), f"python hub/card.py {folder}, and verify it again"
