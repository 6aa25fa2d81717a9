"""Metrics of a release by shot group: measured, plotted and written by the recipe's thresholds."""

import measure as measuring
import pytest
import stage as staging
import timm
import torch
from card import main as card_main
from card import render, shots_of
from measure import measure
from release_files import COMMIT, SIZE, TAG, set_json
from stage import stage
from verify import check_accuracy, verify
from verify import main as verify_main

from ride_timm import InputError
from ride_timm.cli.process import exit_code
from ride_timm.evaluation.plots import plot_long_tail
from ride_timm.training.recipe import Recipe
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.state import TrainingState

COUNTS = [30, 16, 8]


@pytest.fixture(scope="module")
def recipe(colours):
    args = dict(dataset=str(colours), imb_type="none", many_shot=20, few_shot=10)
    return Recipe(**args, model="test_ride_resnet", name="colours", workers=0)


@pytest.fixture(scope="module")
def measured_run(recipe, tmp_path_factory):
    """A run of an untrained network, with measured metrics; its model."""
    torch.manual_seed(0)
    model = timm.create_model("test_ride_resnet", num_classes=3, router=True, top_choices_num=3).eval()
    folder = RunFolder(tmp_path_factory.mktemp("measured"))
    folder.begin(recipe, TrainingState())
    folder.export(model, dict(input_size=(3, SIZE, SIZE), crop_pct=1.0), ("red", "green", "blue"))
    stages = {name: dict(figures, epochs=3) for name, figures in measure(model, recipe)["stages"].items()}
    folder.write_results(recipe, torch.device("cpu"), stages, class_counts=COUNTS)
    set_json(folder.path / "results.json", commit=COMMIT)
    return folder.path, model


def test_every_figure_is_by_the_thresholds_of_the_recipe(measured_run, recipe):
    found = measure(measured_run[1], recipe)
    points = [*found["stages"].values(), *found["routing"]["curve"], *found["routing"]["prefixes"]]
    assert len(points) > 3 and all(None not in (p["many"], p["medium"], p["few"]) for p in points)


def test_the_curve_of_the_router_is_left_out_of_a_check(measured_run, recipe, monkeypatch):
    monkeypatch.setattr(measuring, "collect_outcomes", None)  # a pass over the data that no check reads
    results = RunFolder(measured_run[0]).results()
    assert set(check_accuracy(measured_run[1], recipe, results)) == {"experts", "router"}


def test_a_release_of_other_thresholds_says_so_and_is_verified(measured_run, recipe, colours, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(staging, "plot_long_tail", lambda *args: drawn.append(args[-1]) or plot_long_tail(*args))
    staged = stage(measured_run[0], TAG, tmp_path, data_dir=str(colours))
    assert drawn == [(20, 10)]
    text = (staged.path / "README.md").read_text(encoding="utf-8")
    assert "per class: many above 20, few below 10, medium between." in text
    assert "| 1 many, 1 medium, 1 few |" in text
    assert set(verify(staged, recipe)["measured"]) == {"experts", "router"}


def test_without_a_medium_group(measured_run, recipe, tmp_path):
    staged = stage(measured_run[0], TAG, tmp_path, measured=False)
    changed = recipe.override(dict(many_shot=9, few_shot=10))
    (staged.path / "recipe.yaml").write_text(changed.to_yaml(), encoding="utf-8")
    assert "many above 9, few below 10, medium between." in render(staged)


def test_the_thresholds_of_a_checkpoint(recipe):
    """Its release holds no recipe."""
    assert shots_of({}, None) == (100, 20)
    assert shots_of(dict(shots=[40, 10]), None) == (40, 10) and shots_of(dict(shots=[40, 10]), recipe) == (20, 10)


@pytest.mark.parametrize(
    ("few", "message"),
    [(None, r"few: measured \d+\.\d\d %, results\.json states – %\."), (-1.0, r"results\.json states -1\.00")],
)
def test_a_group_that_is_stated_otherwise_is_a_difference(measured_run, recipe, few, message):
    results = RunFolder(measured_run[0]).results()
    results["stages"]["experts"]["few"] = few
    with pytest.raises(InputError, match=message):
        check_accuracy(measured_run[1], recipe, results)


def test_a_group_without_images_is_a_difference_to_a_stated_one(measured_run, recipe):
    """Other thresholds give other groups, and so other metrics."""
    other = recipe.override(dict(many_shot=100, few_shot=20))
    with pytest.raises(InputError, match=r"experts, many: measured – %, results\.json states \d"):
        check_accuracy(measured_run[1], other, RunFolder(measured_run[0]).results())


def test_verifying_without_data_keeps_the_accuracy_of_the_same_files(measured_run, recipe, colours, tmp_path, capsys):
    staged = stage(measured_run[0], TAG, tmp_path, measured=False)
    command = [TAG, "--root", str(tmp_path)]

    def told(*flags):
        assert exit_code(verify_main, [*command, *flags]) == 0
        return staged.json("verified.json")["measured"], capsys.readouterr().out

    assert told()[0] is None
    measured, text = told("--data-dir", str(colours))
    assert set(measured) == {"experts", "router"} and " % measured, " in text
    before = staged.json("verified.json")
    assert told()[0] == measured and staged.json("verified.json") == before
    set_json(staged.path / "verified.json", versions=dict(torch="1.0"))
    for _ in range(2):
        again, text = told()
        assert again == measured and " % measured earlier, " in text and "not measured" not in text
        assert staged.json("verified.json")["measured_with"] == dict(torch="1.0")
        assert staged.json("verified.json")["versions"] != dict(torch="1.0")
    (staged.path / "curves.png").write_bytes(b"another picture")  # neither it nor the card changes the accuracy
    card_main(command)
    assert told()[0] == measured
    recipe = staged.path / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("workers: 0", "workers: 1"), encoding="utf-8")
    card_main(command)
    again, text = told()
    assert again is None and "accuracy not measured" in text
