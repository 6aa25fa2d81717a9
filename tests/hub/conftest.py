"""Fixtures of the tests of hub/: its modules, which are outside the package, and the double of the Hub."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from release_files import COMMIT, SIZE, TAG, set_json

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "hub"), str(HERE)]

# the clients of the Hub freeze its address when they are imported: these tests run in a process of their own
collect_ignore = [] if os.environ.get("RIDE_TIMM_LOOPBACK") else ["loopback"]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """Makes a run folder of a tiny network: `make_run(seed=0, accuracy=50.0, **model arguments)`."""

    import timm
    import torch

    from ride_timm.training.recipe import Recipe
    from ride_timm.training.run_folder import RunFolder
    from ride_timm.training.state import TrainingState

    def make(seed=0, accuracy=50.0, **kwargs):
        path = tmp_path_factory.mktemp("run")
        torch.manual_seed(seed)
        model = timm.create_model("test_ride_resnet", num_classes=4, **kwargs).eval()
        args = dict(model="test_ride_resnet", dataset="/home/somebody/beetles", imb_type="none", seed=seed, epochs=3)
        places = dict(data_dir="/home/somebody/data", annotations="/home/somebody/lists")
        places |= dict(backbone_weights="/home/somebody/backbone.pth")
        recipe = Recipe(**args, **places, name="beetles", num_experts=model.num_experts)
        folder = RunFolder(path)
        folder.begin(recipe, TrainingState())
        folder.export(model, dict(input_size=(3, SIZE, SIZE), crop_pct=1.0), ("ant", "bee", "cicada", "drone"))
        metrics = dict(all=accuracy, many=60.0, medium=50.0, few=None, top5=100.0, per_class=[70.0, 50.0, 60.0, 20.0])
        stages = dict(experts=metrics | dict(macs=1000, epochs=3))
        if model.router is not None:
            used = dict(experts_used=[0.5, 0.25, 0.25], threshold=0.5)
            stages["router"] = metrics | dict(macs=700, epochs=5, **used)
        facts = dict(num_processes=1, class_counts=[300, 150, 120, 30], seconds=125.0)
        folder.write_results(recipe, torch.device("cpu"), stages, **facts)
        set_json(path / "results.json", commit=COMMIT)
        return path

    return make


@pytest.fixture(scope="session")
def run(make_run):
    return make_run(router=True, top_choices_num=3)


@pytest.fixture(scope="session")
def staged_once(run, tmp_path_factory):
    from stage import stage

    return stage(run, TAG, tmp_path_factory.mktemp("staged"))


@pytest.fixture
def staged(staged_once, tmp_path):
    """A copy of the staged release that a test may change."""
    shutil.copytree(staged_once.path, tmp_path / TAG)
    return replace(staged_once, path=tmp_path / TAG)
