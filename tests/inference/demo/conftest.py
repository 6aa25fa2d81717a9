"""Run folders of untrained weights, with and without a measured curve, and images."""

import json

import pytest
import torch
from commands import run_folder
from PIL import Image

COUNTS = [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]
CURVE = [
    dict(threshold=1.0, macs=9e5, all=40.0, many=50.0, medium=30.0, few=None, experts_used=[1.0, 0.0, 0.0]),
    dict(threshold=0.25, macs=1.2e6, all=45.5, many=55.0, medium=35.0, few=None, experts_used=[0.5, 0.25, 0.25]),
]
RESULTS = dict(
    class_counts=COUNTS,
    stages=dict(experts=dict(all=46.0), router=CURVE[0] | dict(threshold=0.5, macs=1.1e6, all=44.0)),
    routing=dict(curve=CURVE),
)


@pytest.fixture(scope="session")
def bare_run(tmp_path_factory):
    """A run without results.json."""
    return run_folder(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    path = run_folder(tmp_path_factory.mktemp("run"))
    (path / "results.json").write_text(json.dumps(RESULTS))
    return path


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "noise.png"
    noise = (255 * torch.rand(40, 30, 3, generator=torch.Generator().manual_seed(0))).byte()
    Image.fromarray(noise.numpy()).save(path)
    return path
