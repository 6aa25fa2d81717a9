"""Drawings for the demo: of the classes that a model has, and good enough for the releases to recognise."""

from pathlib import Path

import pytest

from ride_timm.inference.demo.drawings import DRAWINGS, write_drawings
from ride_timm.inference.demo.opinions import load_demo

HUB = Path(__file__).parents[3] / "hub"


def test_drawings_are_those_of_the_models_classes(tmp_path):
    paths = write_drawings(["truck", "ship", "airplane"], tmp_path)
    assert [path.name for path in paths] == ["airplane.png", "ship.png"]
    assert write_drawings(["0", "1"], tmp_path) == []


@pytest.mark.parametrize(("release", "drawn"), [("cifar10_lt100", 2), ("cifar100_lt100", 5)])
def test_releases_recognise_their_drawings(release, drawn, tmp_path):
    demo = load_demo(f"local-dir:{HUB / f'ride_resnet32.{release}'}", "cpu")
    paths = write_drawings(demo.labels, tmp_path)
    assert len(paths) == drawn <= len(DRAWINGS)
    assert [demo.predict(path).ensemble[0].label for path in paths] == [path.stem for path in paths]
