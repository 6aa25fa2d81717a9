"""Fixtures of the commands: an untrained run, two images, no network."""

import pytest
import torch
from commands import run_folder
from PIL import Image


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    torch.manual_seed(1)
    for name, mode, size in (("a.png", "RGB", 28), ("b.png", "L", 60)):
        noise = (255 * torch.rand(size, size, 3)).byte().numpy()
        Image.fromarray(noise).convert(mode).save(folder / name)
    return [str(folder / "a.png"), str(folder / "b.png")]
