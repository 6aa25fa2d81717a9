"""Links and commands of README and docs."""

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from ride_timm.cli.main import main

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *(ROOT / f"{name}/README.md" for name in ("hub", "benchmarks", "configs")),
    ]
)


def _anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    return {_anchor(heading) for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


def _commands(page: Path) -> list[str]:
    """The commands in bash blocks and in-line code of a page, continued lines joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    lines += re.findall(
        r"`((?:accelerate launch|python|ride-timm) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    )
    return [command.strip() for line in lines for command in line.split("&&")]


COMMANDS = sorted({(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in _commands(page)})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in _anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:ride_timm|hub|benchmarks|configs|docs|tests)/[\w./]*)`", text):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120


class _Parsed(Exception):
    """The flags of a command are understood; nothing else of it runs."""


@pytest.fixture
def parse_only(monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def stop_after(*args, **kwargs):
        parse_args(*args, **kwargs)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after)


def _words(command: str) -> list[str]:
    return [word for word in shlex.split(command, comments=True) if word != "…"]


@pytest.mark.parametrize(("page", "command"), [(p, c) for p, c in COMMANDS if "train_accelerate.py" in _words(c)])
def test_flags_of_the_training_script_exist(page, command, script, parse_only):
    words = _words(command)
    with pytest.raises(_Parsed):
        script.train(words[words.index("train_accelerate.py") + 1 :])
    for name in re.findall(r"--recipe (\w+)(?![\w.])", command):
        assert (ROOT / f"ride_timm/recipes/{name}.yaml").is_file(), name


@pytest.mark.parametrize(("page", "command"), [(p, c) for p, c in COMMANDS if c.startswith("python -m ride_timm ")])
def test_flags_of_the_commands_exist(page, command, script, parse_only):
    words = _words(command)[3:]
    own, after = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    with pytest.raises(_Parsed):
        main(own)
    with pytest.raises(_Parsed):
        script.train(after)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_scripts_exist(page, command):
    for word in _words(command):
        if re.fullmatch(r"(hub|benchmarks|docs|tests)/[\w/]+\.py", word):
            assert (ROOT / word).is_file(), word


def test_the_figure_shows_the_staged_results(tmp_path):
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("figure", ROOT / "docs" / "figure.py")
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    results = figure.read_results()
    assert figure.description(results) in figure.PICTURE.read_text(encoding="utf-8"), "python docs/figure.py"
    figure.draw(tmp_path / "ride.svg", results)
    assert figure.description(results) in (tmp_path / "ride.svg").read_text(encoding="utf-8")
    axes = figure.Figure().subplots()
    figure.draw_curve(axes, results)
    low, high = axes.get_ylim()
    assert all(low < y < high for line in axes.lines for y in line.get_ydata())
