"""Sweeps: with a script that only writes results, and one real run."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import run_python

from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code
from ride_timm.cli.sweep import collect, to_csv, to_markdown

ROOT = Path(__file__).parents[2]
# Takes the flags of the training script, logs its calls and writes the results of a run, or exits as codes say.
SCRIPT = """
import argparse, json, pathlib, sys, time
parser = argparse.ArgumentParser()
for name in ("recipe", "seed", "output", "epochs", "stage"):
    parser.add_argument("--" + name)
parser.add_argument("--resume", action="store_true")
args = parser.parse_args()
here = pathlib.Path(__file__).parent
with open(here / "calls", "a") as calls:
    calls.write(f"{args.recipe} {args.seed} {args.resume} {args.epochs}\\n")
code = json.loads((here / "codes").read_text()).get(f"{args.recipe} {args.seed}", 0)
if code == "wait":
    (here / "waiting").touch()
    time.sleep(60)
if code:
    sys.exit(code)
folder = pathlib.Path(args.output)
folder.mkdir(parents=True, exist_ok=True)
base = {"ce": 40.0, "ride": 44.0}["ce" if args.recipe.endswith("_ce") else "ride"]
metrics = dict(all=base + int(args.seed), many=60.0, medium=base, few=None, top5=70.0, macs=70_100_000, epochs=3)
stages = dict(experts=metrics) if base == 40 else dict(experts=metrics, router=metrics | dict(all=base))
versions = dict(torch="2.9", timm="1.1")
results = dict(stages=stages, seconds=12.0, commit="abc", device="a machine", precision="bf16", versions=versions)
(folder / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def sweep(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(SCRIPT)

    def run(*argv, codes=None):
        (tmp_path / "codes").write_text(json.dumps(codes or {}))
        (tmp_path / "calls").write_text("")
        command = ["sweep", "--script", str(script), "--output", str(tmp_path / "out"), *map(str, argv)]
        return exit_code(main, command), (tmp_path / "calls").read_text().splitlines()

    return run


@pytest.fixture
def one_process(tmp_path):
    """A configuration of `accelerate launch` for one process."""
    config = tmp_path / "cpu.yaml"
    config.write_text("distributed_type: 'NO'\nuse_cpu: true\nnum_processes: 1\nmixed_precision: 'no'\n")
    return config


RECIPES = ("--recipes", "cifar100_lt_ce", "cifar100_lt", "--seeds", 0, 2)


def test_every_recipe_runs_with_every_seed_and_the_table_has_mean_and_spread(sweep, tmp_path, capsys):
    code, calls = sweep(*RECIPES, "--", "--epochs", 5)
    assert code == 0
    assert calls == [
        "cifar100_lt_ce 0 True 5",
        "cifar100_lt 0 True 5",
        "cifar100_lt_ce 2 True 5",
        "cifar100_lt 2 True 5",
    ]
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "cifar100_lt_ce-seed0", "cifar100_lt_ce-seed2", "cifar100_lt-seed0", "cifar100_lt-seed2",
        "results.md", "results.csv",
    }  # fmt: skip
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["recipe"], row["stage"]) for row in rows] == [
        ("cifar100_lt_ce", "experts"), ("cifar100_lt", "experts"), ("cifar100_lt", "router")
    ]  # fmt: skip
    assert float(rows[0]["all"]) == 41 and float(rows[0]["all_std"]) == pytest.approx(2**0.5)
    assert rows[0]["seeds"] == "0 2" and rows[0]["few"] == "" and float(rows[2]["all_std"]) == 0
    text = (out / "results.md").read_text()
    assert "| cifar100_lt_ce | experts | 41.00 ± 1.41 | 60.00 ± 0.00 | 40.00 ± 0.00 | – | 70.00 ± 0.00 | 70.1 |" in text
    for fact in ("`--epochs 5`", "abc", "a machine", "bf16", "torch 2.9", "timm 1.1"):
        assert fact in text
    assert "41.00 ± 1.41" in capsys.readouterr().out


def test_a_failed_run_is_named_and_does_not_stop_the_others(sweep, tmp_path, capsys):
    code, calls = sweep(*RECIPES, codes={"cifar100_lt_ce 0": 1})
    assert code == 1 and len(calls) == 4
    assert "error: cifar100_lt_ce-seed0 failed, see above; the same command tries again." in capsys.readouterr().err
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert rows[0]["seeds"] == "2" and rows[0]["all_std"] == ""  # one seed has no spread
    assert "| cifar100_lt_ce | experts | 42.00 |" in (tmp_path / "out" / "results.md").read_text()
    code, calls = sweep(*RECIPES)
    assert code == 0 and len(calls) == 4  # all resume; a finished run ends at once


def test_a_refused_run_stops_the_sweep(sweep, capsys):
    code, calls = sweep(*RECIPES, codes={"cifar100_lt 0": 2})
    assert code == 2 and len(calls) == 2
    assert "cifar100_lt-seed0 was refused" in capsys.readouterr().err


def test_a_run_that_a_launcher_ends_before_it_begins_stops_the_sweep(sweep, one_process, capsys):
    """The launcher makes a 1 of the script's 2."""
    code, calls = sweep(*RECIPES, "--config", one_process, codes={"cifar100_lt_ce 0": 2})
    assert code == 2 and len(calls) == 1
    assert "cifar100_lt_ce-seed0 was refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kill", "number", "code"),
    [("killpg", signal.SIGINT, 130), ("kill", signal.SIGTERM, -signal.SIGTERM)],  # the first as a terminal does
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a run does not end with its parent")
def test_a_signal_stops_the_run_and_the_sweep(sweep, tmp_path, kill, number, code):
    sweep("--recipes", "cifar100_lt", codes={"cifar100_lt 0": 2})  # leaves the script's files
    (tmp_path / "codes").write_text(json.dumps({"cifar100_lt 0": "wait"}))
    command = [sys.executable, "-m", "ride_timm", "sweep", "--script", str(tmp_path / "fake.py")]
    command += ["--recipes", "cifar100_lt", "--output", str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    for _ in range(1200):
        if (tmp_path / "waiting").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    getattr(os, kill)(process.pid, number)
    assert process.wait(30) == code and ("error: interrupted." in process.stderr.read()) == (code == 130)
    with pytest.raises(ProcessLookupError):  # the run ends, too
        for _ in range(200):
            os.killpg(process.pid, 0)
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recipes", "hope"], "recipe 'hope': no such recipe or file"),
        (["--recipes", "cifar100_lt", "--seeds", "-1"], "seeds -1: expected different whole numbers"),
        (["--recipes", "cifar100_lt", "--seeds", "1", "1"], "seeds 1 1: expected different"),
        (["--recipes", "cifar100_lt", "cifar100_lt"], "would write to the same folders"),
        (["--recipes", "cifar100_lt", "--script", "no.py"], "no training script at no.py"),
        (["--recipes", "cifar100_lt", "--config", "no.yaml"], "config no.yaml: no such file"),
        (["--recipes", "cifar100_lt", "--", "--epochs", "0"], "epochs='0'"),
        (["--recipes", "cifar100_lt", "--", "--seed", "3"], "--seed is set by the sweep"),
        (["--recipes", "cifar100_lt", "--", "--hope"], "unrecognized arguments: --hope"),
        (["--recipes", "cifar100_lt", "--", "--output", "x"], "unrecognized arguments: --output x"),
        (
            ["--recipes", "cifar100_lt", "cifar100_lt_sade", "--", "--num-experts", "2"],
            "num_experts=2: loss 'sade' trains 3 experts",
        ),
        (["--recipes", "cifar100_lt", "cifar100_lt_ce", "--", "--reweight-epoch", "6"], "no effect with loss=ce"),
        (["--recipes", "cifar100_lt", "cifar100_lt_distill"], "recipe cifar100_lt_distill learns from a teacher"),
    ],
)
def test_bad_input_is_found_before_the_first_run(sweep, argv, message, tmp_path, capsys):
    code, calls = sweep(*argv)
    assert code == 2 and calls == [] and not (tmp_path / "out").exists()
    assert message in capsys.readouterr().err


def test_nothing_finished_is_no_row(tmp_path):
    assert collect(tmp_path, ["cifar100_lt"], [0]) == []


def test_a_real_run_and_its_resumption(colours, tmp_path, monkeypatch, capsys):
    def run(command, preexec_fn):
        done = run_python(*command[1:])
        return subprocess.CompletedProcess(command, done.exit_code, done.stdout, done.stderr)

    monkeypatch.setattr(subprocess, "run", run)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text("model: test_ride_resnet\nnum_experts: 2\nimb_type: none\nloss: balpoe\nepochs: 1\n"
                      "batch_size: 16\nwarmup_epochs: 1\nlr: 0.02\n")  # fmt: skip
    command = ["sweep", "--recipes", str(recipe), "--output", str(tmp_path / "out"), "--json"]
    command += ["--", "--dataset", str(colours), "--stage", "experts", "--threads", "1"]
    assert exit_code(main, command) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (
        row["recipe"] == "tiny"
        and row["stage"] == "experts"
        and row["all"] > 0
        and row["class_mean"] == pytest.approx(row["all"])
    )
    before = (tmp_path / "out" / "tiny-seed0" / "results.json").stat().st_mtime_ns
    assert exit_code(main, command) == 0
    assert (tmp_path / "out" / "tiny-seed0" / "results.json").stat().st_mtime_ns == before
    assert to_csv([row]).count("\n") == 2 and to_markdown([row]).count("\n") == 2
