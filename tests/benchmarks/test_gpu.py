"""The GPU benchmark at toy size on a CPU: results, errors of a section, time budget, synchronising operators."""

import importlib
import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code
from ride_timm.losses import LOSSES
from ride_timm.training.watch import CHECK_EVERY, FIRST_CHECKS

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def module():
    """Import a benchmark by name; all are unloaded afterwards."""
    before, threads = set(sys.modules), torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ACCELERATE_USE_CPU", "true")
        patched.setenv("ACCELERATE_DYNAMO_MODE", "default")  # both are set by the benchmark
        AcceleratorState._reset_state(True)
        yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))
    for name in {path.stem for path in BENCHMARKS.glob("*.py")} - before:
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)


@pytest.fixture
def gpu(module, monkeypatch, tmp_path):
    """The benchmark, writing its results to a file of its own."""
    monkeypatch.setattr(module("record"), "RESULTS", tmp_path / "results.jsonl")
    return module("gpu")


def run(gpu, *flags):
    return gpu.measure_all(["--toy", "--device", "cpu", "--threads", "1", "--rounds", "1", *flags])


@pytest.fixture
def in_process(module, train, monkeypatch):
    """Commands run in this process: importing takes longer than all of them."""

    def run_python(arguments):
        script, *flags = arguments
        AcceleratorState._reset_state(True)
        assert (train(flags) if script == "train_accelerate.py" else exit_code(main, flags[1:])) == 0

    monkeypatch.setattr(module("gpu_journey"), "run_python", run_python)


def test_every_section_runs_on_a_cpu(gpu, module, in_process, capsys):
    assert run(gpu) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in module("record").RESULTS.read_text(encoding="utf-8").splitlines()]
    assert [line["benchmark"] for line in lines] == [f"gpu_{name}" for name in gpu.SECTIONS]
    figures = {line["benchmark"].removeprefix("gpu_"): line["figures"] for line in lines}
    assert not any(section["wrong"] for section in figures.values())
    assert {row["name"] for row in figures["losses"]["rows"]} == set(LOSSES)
    rows = [row for section in figures.values() for row in section["rows"]]
    assert all(row["error"] <= row["tolerance"] for row in rows if "error" in row)
    tolerances = [[row["tolerance"] for row in figures[section]["rows"]] for section in ("outputs", "gradients")]
    assert tolerances == [[1e-4, 1e-1] * 2] * 2
    step = next(row for row in figures["steps"]["rows"] if row["name"].startswith("ride_resnext50"))
    assert step["images_per_second_over_timm"] == pytest.approx(step["timm_seconds"] / step["seconds"], rel=1e-3)
    step, loader = figures["photographs"]["rows"]
    assert loader["images_per_second_over_step"] == pytest.approx(
        loader["images_per_second"] / step["images_per_second"], rel=1e-3
    )
    assert [row["name"] for row in figures["journey"]["rows"]] == ["train", "resume", "evaluate", "predict"]
    assert "the scaler's state" in figures["mixed_precision"]["left_out"]  # fp16 needs a GPU
    assert len(figures["compiled"]["left_out"]) == 4
    assert printed.splitlines()[-1].startswith("wrong 0, left out 5")


def broken(bench):
    bench.check("close", 1e-6, 1e-4)
    bench.check("not a number", float("nan"), 1e-4)
    bench.measure("row", 0, lambda: 1 / 0)
    raise RuntimeError("no kernel image is available\nsecond line")


def test_a_failing_section_is_one_line_and_the_others_go_on(gpu, capsys, monkeypatch):
    monkeypatch.setitem(gpu.SECTIONS, "losses", broken)
    monkeypatch.setattr(gpu, "CHECKS", (broken,))
    monkeypatch.setitem(gpu.SECTIONS, "steps", lambda bench: bench.measure("fine", 0, lambda: dict(seconds=1.0)))
    assert run(gpu, "--sections", "losses", "steps") == 1
    printed = capsys.readouterr().out
    assert "  ok: close" in printed and "  WRONG: not a number: nan, at most 0.0001" in printed
    assert "  FAILED: row: ZeroDivisionError: division by zero\n" in printed
    assert "  FAILED: losses: RuntimeError: no kernel image is available\n" in printed and "second line" not in printed
    assert "  fine: seconds 1\n" in printed
    assert printed.splitlines()[-1] == "wrong 3, left out 0"


def test_a_slow_measurement_that_fails_leaves_the_exit_code(gpu, monkeypatch):
    monkeypatch.setitem(gpu.SECTIONS, "steps", broken)
    assert run(gpu, "--sections", "steps") == 0


def endless(bench):
    bench.measure("a year", 3e7, dict)
    while True:
        time.sleep(0.01)


def test_it_stops_in_time_and_says_what_it_left_out(gpu, capsys, monkeypatch):
    monkeypatch.setitem(gpu.SECTIONS, "steps", endless)
    started = time.monotonic()
    assert run(gpu, "--minutes", "0.005", "--sections", "steps", "epochs") == 0
    assert time.monotonic() - started < 10
    left_out = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert left_out == ["left out: steps: a year", "left out: steps: the rest", "left out: epochs: epochs"]


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ("losses", "make_loss"),
        ("outputs", "pair"),
        ("gradients", "pair"),
        ("routing", "pair"),
        ("mixed_precision", "train_with"),
        ("synchronisations", "train_with"),
    ],
)
def test_a_failing_row_leaves_the_others_of_its_section(gpu, module, capsys, monkeypatch, section, part):
    def broken(*args, **how):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(module("gpu_checks"), part, broken)
    assert run(gpu, "--sections", section) == 1
    printed = capsys.readouterr().out
    rows = dict(losses=len(LOSSES), mixed_precision=len(LOSSES) + 1, synchronisations=len(LOSSES) + 6).get(section, 2)
    assert printed.count("  FAILED: ") == printed.count("no kernel image") == rows


def test_an_error_that_cuda_repeats_does_not_end_the_benchmark(module, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    module("gpu_bench").Bench(Namespace(toy=True), torch.device("cuda"), time.monotonic()).free()


def test_a_failing_command_is_one_line_with_its_error(module):
    with pytest.raises(RuntimeError, match=r"^-c .* returned 3: the reason$"):
        module("gpu_journey").run_python(["-c", "import sys; sys.stderr.write('first\\nthe reason\\n'); sys.exit(3)"])


def test_commands_are_left_out_where_they_cannot_run(module, gpu, capsys, monkeypatch):
    monkeypatch.setattr(module("gpu_journey"), "find_spec", lambda name: None)
    assert run(gpu, "--sections", "journey") == 0
    assert "left out: all commands: datasets is not installed" in capsys.readouterr().out


def test_gradients_are_compared_where_rounding_changes_them_little(module):
    """At ReLU's kink the rounding of float32 alone can exceed the tolerance."""
    checks, errors = module("gpu_checks"), []
    bench = module("gpu_bench").Bench(Namespace(toy=True), torch.device("cpu"), time.monotonic())
    images, targets = checks.batch_of(32)
    for change in (lambda model: None, checks.smooth):
        model, reference = checks.pair(bench, "ride_resnet32")
        change(model)
        change(reference)
        expected = checks.gradient_of(reference, images.double(), targets, "fp32")
        found = checks.gradient_of(model, images, targets, "fp32")
        errors.append(((found - expected).norm() / expected.norm()).item())
    assert 10 * errors[1] < min(errors[0], checks.TOLERANCES["fp32"]), errors


def test_steps_enough_for_the_counted_ones_are_decoded(module):
    """Beyond the first looks at the losses; fewer images than CIFAR100-LT's, which every row would decode anew."""
    bench = module("gpu_bench").Bench(Namespace(toy=False), torch.device("cpu"), time.monotonic())
    loader = module("gpu_checks").train_with(bench, "ce", "no").stage.loader
    assert max(FIRST_CHECKS) + 5 <= len(loader) < 20 and max(FIRST_CHECKS) + 5 < CHECK_EVERY


def test_the_tests_of_a_gpu_are_the_marked_ones(gpu, monkeypatch):
    commands = []
    monkeypatch.setattr("subprocess.run", lambda command, **_: commands.append(command) or Namespace(returncode=1))
    monkeypatch.setitem(gpu.SECTIONS, "steps", lambda bench: None)
    assert run(gpu, "--sections", "steps", "--tests", "--no-record") == 1
    files = [part for part in commands[-1] if part.endswith(".py")]
    assert {"tests/losses/test_base.py", "tests/models/test_ride.py"} <= set(files)
    assert not {"tests/benchmarks/test_gpu.py", "tests/test_hardware.py"} & set(files)


@pytest.mark.parametrize("minutes", ["0", "-1"])
def test_no_time_is_rejected(gpu, capsys, minutes):
    with pytest.raises(SystemExit):
        run(gpu, "--minutes", minutes)
    assert "expected more than 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("waits", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: float(x[0]), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.detach().index_put_([x > 0], torch.ones(2)[:1]), "index_put_"),
        (lambda x: torch.tensor([1.0], device=x.device), "tensor"),
        (lambda x: torch.as_tensor([1.0], device=x.device), "as_tensor"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x.long().unique(), "_unique2"),
        (lambda x: x.sum().backward() or x.grad.max().item(), "_local_scalar_dense"),
        (lambda x: torch.repeat_interleave(x, torch.tensor([1, 2])), "repeat_interleave"),
    ],
)
def test_synchronising_operators_are_counted(module, waits, name):
    x = torch.tensor([1.0, -1.0], requires_grad=True)
    with module("syncs").Syncs() as syncs:
        waits(x)
    assert syncs.found[name] == 1 and name in str(syncs)


def test_other_operators_are_not(module):
    x, rows = torch.randn(4, 3), torch.tensor([0, 2])
    with module("syncs").Syncs() as syncs:
        torch.where(x > 0, x[rows][:1], 0).sum().to(torch.float64)
        x.repeat_interleave(2)
        x[x > 0] = 1.0  # masked_fill on a GPU
        torch.tensor([1.0]).to("cpu", non_blocking=True)
    assert syncs.total == 0, str(syncs)


def test_steps_are_counted_without_their_warm_up(module):
    counted = module("syncs").Counted([(torch.ones(()), torch.ones(()))] * 4, steps=3, warm_up=1)
    for images, _ in counted:
        images.item()
    assert counted.syncs.found == {"_local_scalar_dense": 3}


def test_time_is_left_out_of_a_bench_without_any(module):
    bench = module("gpu_bench").Bench(Namespace(toy=True), torch.device("cpu"), time.monotonic() + 5)
    bench.measure("long", 60, lambda: pytest.fail("measured"))
    assert bench.left_out == ["long"] and 0 < bench.left() < 5
    assert bench.has("fp32") and not bench.has("fp16") and not bench.has("tf32")
