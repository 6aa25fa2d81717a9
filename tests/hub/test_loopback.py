"""Every flow between this project and a Hub, in a process whose clients know no other Hub than the one on loopback."""

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FLOWS = [
    f"{path.stem}::{node.name}"
    for path in sorted((HERE / "loopback").glob("test_*.py"))
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{flow: its cases' failures, "" for those that passed, or why its module was skipped}."""
    report = tmp_path_factory.mktemp("loopback") / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        f"--junitxml={report}",
        "tests/hub/loopback",
    ]
    env = os.environ | {"RIDE_TIMM_LOOPBACK": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    ran = subprocess.run(command, cwd=HERE.parents[1], env=env, capture_output=True, text=True, timeout=1800)
    assert report.is_file(), ran.stdout + ran.stderr
    found: dict[str, list[str] | str] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        skipped = case.find("skipped")
        if not case.get("classname") and skipped is not None:  # a module as a whole
            module, reason = case.get("name").rpartition(".")[2], skipped.text or skipped.get("message")
            found |= {flow: reason for flow in FLOWS if flow.startswith(f"{module}::")}
            continue
        flow = f"{case.get('classname').rpartition('.')[2]}::{case.get('name').partition('[')[0]}"
        failures = [child.text or "" for child in case if child.tag in ("failure", "error", "skipped")]
        found.setdefault(flow, []).append("".join(failures))
    return found


def test_no_flow_is_forgotten(outcomes):
    assert set(outcomes) == set(FLOWS) and len(FLOWS) > 25


@pytest.mark.parametrize("flow", FLOWS)
def test_flow(outcomes, flow):
    assert flow in outcomes
    if isinstance(outcomes[flow], str):
        pytest.skip(outcomes[flow])
    assert not any(outcomes[flow]), "\n".join(outcomes[flow])
