"""What a source distribution holds beside the package."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".ci", "benchmarks", "configs", "hub", "tests")


def test_a_source_distribution_is_whole(monkeypatch):
    """Of the files that MANIFEST.in names, by the very class of setuptools that reads it."""
    egg_info = pytest.importorskip("setuptools.command.egg_info")
    monkeypatch.chdir(ROOT)
    found = egg_info.FileList()
    for line in Path("MANIFEST.in").read_text().splitlines():
        if line and not line.startswith("#"):
            found.process_template_line(line)
    wanted = {path for folder in FOLDERS for path in Path(folder).rglob("*") if path.is_file()}
    wanted = {path for path in wanted if "__pycache__" not in path.parts}
    wanted |= {Path(name) for name in ("train_accelerate.py", "CHANGELOG.md", "CONTRIBUTING.md")}
    assert {Path(name) for name in found.files} == wanted
