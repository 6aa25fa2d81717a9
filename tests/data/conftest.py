"""Fixtures of the tests of data."""

import pytest
from PIL.JpegImagePlugin import JpegImageFile


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of each test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[int, int]]:
    """The sizes that JPEGs were decoded at."""
    sizes, load = [], JpegImageFile.load

    def spy(self):
        if self.tile:
            sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(JpegImageFile, "load", spy)
    return sizes
