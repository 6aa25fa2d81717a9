"""The command: what it refuses, and what it starts; the page itself is replaced."""

import json
import sys
from types import SimpleNamespace

import pytest
from commands import output, refusal

PAGE = "ride_timm.inference.demo.page"


@pytest.fixture
def started(monkeypatch):
    """Demos that the command started, without gradio."""
    demos = []

    def launch(demo, port, **options):
        demos.append((demo, port))
        return SimpleNamespace(block_thread=lambda: None), f"http://127.0.0.1:{port}/"

    monkeypatch.setitem(sys.modules, PAGE, SimpleNamespace(launch=launch))
    monkeypatch.setattr("ride_timm.cli.demo.find_spec", lambda name: True)
    return demos


def test_it_prints_where_it_runs(started, capsys, run):
    assert output(capsys, "demo", "--model", run, "--port", "7999").endswith(
        "http://127.0.0.1:7999/ (Ctrl+C stops it)\n"
    )
    assert json.loads(output(capsys, "demo", "--model", run, "--port", "8000", "--json")) == dict(
        url="http://127.0.0.1:8000/"
    )
    assert [port for _, port in started] == [7999, 8000] and started[0][0].model.num_experts == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--port", "0"), "port=0: expected a number from 1 to 65535."),
        (("--port", "70000"), "port=70000: expected"),
        (("--model", "no/such/run"), "no such folder or file"),
        (("--device", "cuda:99"), "cuda:99"),
    ],
)
def test_bad_input(started, capsys, run, argv, message):
    assert message in refusal(capsys, "demo", "--model", run, *argv)
    assert not started


def test_without_gradio(monkeypatch, capsys, run):
    monkeypatch.setattr("ride_timm.cli.demo.find_spec", lambda name: None)
    assert refusal(capsys, "demo", "--model", run) == "error: demo needs gradio: pip install gradio\n"
