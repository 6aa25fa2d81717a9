"""The notebook of the docs runs, offline, and holds its outputs."""

import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
NOTEBOOK = DOCS / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def source(kind):
    return ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind]


def printed(cell):
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def words_and_numbers(text):
    numbers = r"\d[\d,]*(?:\.\d+)?"
    return re.sub(numbers, "#", text), [float(number.replace(",", "")) for number in re.findall(numbers, text)]


def test_the_code_runs(monkeypatch, capsys):
    """With 2 steps of fine-tuning; what is printed before that is what the notebook shows."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(DOCS)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("QUICKSTART_STEPS", "2")
    scope = {}
    *before, last = [cell for cell in CELLS if cell["cell_type"] == "code"]
    for cell in before:
        exec("".join(cell["source"]), scope)
        (words, numbers), (shown, expected) = map(words_and_numbers, (capsys.readouterr().out, printed(cell)))
        assert words == shown and numbers == pytest.approx(expected, abs=1)  # percentages; another machine rounds
    exec("".join(last["source"]), scope)
    assert re.fullmatch(r"fine-tuned: [\d.]+ % \(many .*\)\n", capsys.readouterr().out)


def test_what_is_shown_is_that_of_the_release():
    shown = "".join(printed(cell) for cell in CELLS if cell["cell_type"] == "code")
    stages = json.loads((DOCS.parent / "hub/ride_resnet32.fashion_lt/results.json").read_text())["stages"]
    assert (
        f"ensemble: {stages['experts']['all']:.1f} %" in shown and f"routed: {stages['router']['all']:.1f} %" in shown
    )


def test_outputs_are_small_and_of_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 100_000 and not re.search(r"/(home|tmp|root|work|usr)/", text)
    assert all(cell.get("metadata") == {} for cell in CELLS)
    assert all(
        output["output_type"] != "error" and output.get("name") != "stderr"
        for cell in CELLS
        for output in cell.get("outputs", ())
    )


@pytest.mark.parametrize("text", source("markdown"))
def test_links_resolve(text):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (DOCS / target).exists(), target
