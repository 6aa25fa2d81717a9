"""The Space of a release: its files, its requirements, and that it runs from its own folder."""

import configparser
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from folder import Staged
from release_files import front_matter
from spaces import FILES, MODEL, SPACE, build_space

ROOT = Path(__file__).parents[2]


@pytest.fixture
def space(tmp_path):
    build_space("somebody/ride_resnet50.inat18", tmp_path)
    return tmp_path


def test_it_names_its_release_and_no_other(space):
    card = front_matter((space / "README.md").read_text(encoding="utf-8"))
    assert card["models"] == ["somebody/ride_resnet50.inat18"] and card["title"] == "ride_resnet50.inat18"
    assert 'load_demo("hf-hub:somebody/ride_resnet50.inat18")' in (space / "app.py").read_text(encoding="utf-8")
    assert not any(MODEL.partition("/")[2] in (space / file).read_text(encoding="utf-8") for file in FILES)


def test_a_name_that_begins_with_the_templates(tmp_path):
    build_space(f"me/{MODEL.partition('/')[2]}_v2", tmp_path)
    assert 'load_demo("hf-hub:me/ride_resnet32.fashion_lt_v2")' in (tmp_path / "app.py").read_text(encoding="utf-8")
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "title: ride_resnet32.fashion_lt_v2\n" in page and "_v2_v2" not in page


def test_its_front_matter_is_one_of_the_hub():
    card = front_matter((SPACE / "README.md").read_text(encoding="utf-8"))
    assert card["sdk"] == "gradio" and card["app_file"] in FILES and card["license"] == "mit"
    assert len(card["short_description"]) <= 60 and len(card["emoji"]) == 1
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {card["colorFrom"], card["colorTo"]} <= colours


def test_it_installs_what_the_package_needs():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    needed = parser["options"]["install_requires"].split("\n")[1:]
    stated = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    adapters = parser["options.extras_require"]["adapters"].split()  # which a release may have
    assert [line for line in stated if not line.startswith("--")] == needed + adapters
    bound = parser["options.extras_require"]["demo"].strip().removeprefix("gradio>=")
    version = front_matter((SPACE / "README.md").read_text(encoding="utf-8"))["sdk_version"]
    assert [*map(int, version.split("."))] >= [*map(int, bound.split("."))]


def test_it_carries_the_package(space):
    names = {path.name for path in space.iterdir()}
    assert names == {*FILES, "ride_timm"} and not list(space.rglob("__pycache__"))
    assert (space / "ride_timm" / "data" / "fashion_lt" / "test.parquet").is_file()


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs the extra demo")
def test_it_runs(tmp_path):
    build_space(MODEL, tmp_path)
    staged = Staged.find("ride_resnet32.fashion_lt", ROOT / "hub")
    app = tmp_path / "app.py"
    app.write_text(app.read_text(encoding="utf-8").replace(f"hf-hub:{MODEL}", f"local-dir:{staged.path}"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"GRADIO_SERVER_PORT": port}
    with subprocess.Popen([sys.executable, "app.py"], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL) as server:
        try:
            assert "ride_resnet32.fashion_lt" in _page(f"http://127.0.0.1:{port}/config", server)
        finally:
            server.terminate()


def _page(url, server):
    for _ in range(300):
        try:
            return urllib.request.urlopen(url, timeout=60).read().decode()
        except OSError:
            assert server.poll() is None
            time.sleep(0.2)
    raise AssertionError(f"{url} does not respond")
