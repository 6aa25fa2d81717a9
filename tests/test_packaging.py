"""Contents of the source distribution and of the installed package."""

import configparser
import importlib
import re
from pathlib import Path

import pytest
import yaml

import ride_timm

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", ".github", "benchmarks", "configs", "docs", "hub", "tests")
FILES = ("train_accelerate.py", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", ".pre-commit-config.yaml")


@pytest.fixture
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def test_source_distribution_is_complete(monkeypatch):
    """Files selected by MANIFEST.in, as setuptools reads it."""
    egg_info = pytest.importorskip("setuptools.command.egg_info")
    monkeypatch.chdir(ROOT)
    found = egg_info.FileList()
    for line in Path("MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            found.process_template_line(line)
    wanted = {path for folder in FOLDERS for path in Path(folder).rglob("*") if path.is_file()}
    wanted = {path for path in wanted if "__pycache__" not in path.parts}
    wanted |= {Path(name) for name in FILES}
    assert {Path(name) for name in found.files} == wanted


def test_console_script_equals_python_m_ride_timm(setup_cfg, monkeypatch, capsys):
    name, target = setup_cfg["options.entry_points"]["console_scripts"].split(" = ")
    module, function = target.split(":")
    monkeypatch.setattr("sys.argv", [name, "flops", "test_ride_resnet"])
    assert getattr(importlib.import_module(module), function)() == 0
    assert capsys.readouterr().out.startswith("test_ride_resnet, ")


def test_every_package_data_pattern_matches_files(setup_cfg):
    package = Path(ride_timm.__file__).parent
    patterns = setup_cfg["options.package_data"]["ride_timm"].split()
    assert "py.typed" in patterns
    for pattern in patterns:
        assert list(package.glob(pattern)), pattern


def test_citation_matches_version_and_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == ride_timm.__version__
    paper, readme = citation["preferred-citation"], (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"title=\{(.*)\}", readme)[1] == paper["title"]
    assert re.search(r"url=\{(.*)\}", readme)[1] == paper["url"]


def test_the_lower_bounds_that_are_tested_are_those_of_setup_cfg():
    lines = (ROOT / ".ci/lower_bounds.txt").read_text(encoding="utf-8").splitlines()
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8").split()
    bounds = {line.replace("==", ">=") for line in lines if "==" in line}
    assert bounds - set(setup) == {"pyarrow>=15.0.0"}
