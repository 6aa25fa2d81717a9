"""Baseline against ours, and a tiny run of every benchmark."""

import importlib.util
import io
import os
import re
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from forked import run_python

from ride_timm import hardware
from ride_timm.losses import make_loss
from ride_timm.training.objectives import ExpertsObjective

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """Load a benchmark as a module by name; benchmark modules are unloaded afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    threads = torch.get_num_threads()

    def load(name):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    yield load
    sys.path.remove(str(BENCHMARKS))
    for name in {path.stem for path in BENCHMARKS.glob("*.py")} - before:
        sys.modules.pop(name, None)
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)  # the next test may want another precision


@pytest.fixture
def small(benchmark, monkeypatch):
    """Run in this process what a benchmark runs in its own; read the shorter of the published lists."""

    @contextmanager
    def processes(builders, threads):
        yield {name: build() for name, build in builders.items()}

    def run(command, **_):
        code, *flags = command[1:]
        with redirect_stdout(io.StringIO()) as printed:
            exec(flags[0], {}) if code == "-c" else benchmark(Path(code).stem).main(flags)
        return subprocess.CompletedProcess(command, 0, stdout=printed.getvalue())

    for name in ("step", "epoch"):
        monkeypatch.setattr(benchmark(name), "processes", processes)
    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr(benchmark("record"), "_git", lambda *_: None)
    monkeypatch.setattr(benchmark("split"), "LISTS", {"ImageNet-LT": "imagenet_lt"})


def plain_name(name):
    """experts.1.stages.layer2.0.conv1.weight -> layer2s.1.0.conv1.weight"""
    name = re.sub(r"^experts\.(\d+)\.stages\.(layer\d)\.", r"\2s.\1.", name)
    name = re.sub(r"^experts\.(\d+)\.fc\.", r"linears.\1.", name)
    return name.removeprefix("trunk.")


def as_plain(name, value):
    """Transpose our head weight [C, D] to the baseline's [D, C]."""
    return value.T if ".fc." in name else value


@pytest.mark.parametrize(
    ("name", "num_classes", "size", "epoch"),
    [("ride_resnet32", 100, 16, 0), ("ride_resnet32", 100, 16, 160), ("ride_resnext50", 10, 33, 160)],
)
def test_same_logits_loss_and_gradients(benchmark, name, num_classes, size, epoch):
    torch.manual_seed(0)
    class_counts = benchmark("batches").exponential_counts(num_classes, 500, 5)
    model = timm.create_model(name, num_classes=num_classes, num_experts=3)
    loss = make_loss("ride", class_counts, additional_diversity_factor=-0.45, reweight_epoch=160, reweight_factor=0.05)
    objective = ExpertsObjective(model, loss)
    objective.set_epoch(epoch)
    plain = benchmark("baseline").PlainTraining(name, class_counts)
    plain.loss.set_epoch(epoch + 1)
    plain.model.load_state_dict({plain_name(key): as_plain(key, value) for key, value in model.state_dict().items()})
    for module in (objective, plain.model, plain.loss):
        module.double()  # in float32 the order of summation alone differs by more than the tolerance
    images, targets = benchmark("batches").random_batch(2, num_classes, size)

    ours = objective(images.double(), targets)
    ours["loss"].backward()
    mean_logits, logits = plain.model(images.double())
    theirs = plain.loss(mean_logits, logits, targets)
    theirs.backward()

    torch.testing.assert_close(mean_logits, ours["logits"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(theirs, ours["loss"], rtol=1e-4, atol=1e-6)
    gradients = dict(plain.model.named_parameters())
    for key, parameter in model.named_parameters():
        expected, gradient = as_plain(key, parameter.grad), gradients.pop(plain_name(key)).grad
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            gradient, expected, rtol=1e-4, atol=1e-6 * scale, msg=lambda m, key=key: f"{key}: {m}"
        )
    assert not gradients


def test_same_optimizer_settings(benchmark):
    """torch's SGD in the baseline and timm's in the script have the same settings."""
    ours = benchmark("ours")
    counts = benchmark("batches").exponential_counts(100, 500, 5)
    image_set = benchmark("batches").random_images([1] * 100, 32)
    training = ours.Training(ours.make_recipe("ride_resnet32", 4, 32, mixed_precision="no"), image_set, 100)
    plain = benchmark("baseline").PlainTraining("ride_resnet32", counts)
    (group,), (wanted,) = training.stage.optimizer.param_groups, plain.optimizer.param_groups
    for key in ("momentum", "weight_decay", "nesterov", "dampening"):
        assert group[key] == wanted[key], key
    assert training.stage.settings.lr_at(0) == pytest.approx(wanted["lr"])
    assert sum(p.numel() for p in group["params"]) == sum(p.numel() for p in wanted["params"])


def test_class_counts_of_cifar100_lt(benchmark):
    counts = benchmark("batches").class_counts_of(100)
    assert sum(counts) == 10_847 and counts[0] == 500 and counts[-1] == 5


def test_baseline_learns(benchmark):
    """Three steps on one batch lower the loss."""
    torch.manual_seed(0)
    plain = benchmark("baseline").PlainTraining("ride_resnet32", [5] * 100)
    batch = benchmark("batches").random_batch(8, 100, 16)
    losses = [plain.train_epoch([batch])[0] for _ in range(3)]
    assert losses[-1] < losses[0]


def test_forced_routing(benchmark):
    """Samples use the given numbers of experts; the router is restored afterwards."""
    routed = benchmark("routed")
    model = timm.create_model("ride_resnet32", num_experts=3, router=True, top_choices_num=30).eval()
    images, used = torch.randn(6, 3, 32, 32), torch.tensor([1, 3, 2, 1, 3, 3])
    own = model.forward_routed(images)
    with torch.inference_mode(), routed.forced(model.router, used):
        assert torch.equal(model.forward_routed(images)[1], used)
    assert torch.equal(model.forward_routed(images)[1], own[1])
    assert routed.sample_counts(32, routed.FRACTIONS["paper"]) == [13, 3, 16]
    assert sum(routed.sample_counts(7, routed.FRACTIONS["paper"])) == 7


PLAIN = ["--variants", "baseline", "ours bf16, plain norm"]  # nothing to compile
TINY = {
    "step": [*PLAIN, "--steps", "1", "--warm-up", "0", "--batch-size", "4"],
    "epoch": [*PLAIN, "--steps", "1", "--warm-up", "1", "--batch-size", "4"],
    "input": ["--steps", "1", "--warm-up", "1", "--batch-size", "4", "--train-steps", "1"],
    "routed": ["--models", "ride_resnet32", "--batch-sizes", "2", "--seconds", "0"],
    "photos": ["--images", "8", "--batch-size", "4", "--image-size", "32", "--workers", "1"],
    "split": ["--files", "24426"],
    "import_time": [],
    "memory": [*PLAIN, "--steps", "1", "--batch-size", "2"],
    "adapters": ["--backbone", "test_vit", "--image-size", "160", "--batch-size", "2", "--steps", "1"],
}
LAST = {"routed": r"worst deviation [\d.]+ %", "split": r"slowest [\d.]+ s", "import_time": r"difference -?[\d.]+ s"}


def test_every_benchmark_is_run():
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if "def main(" in path.read_text(encoding="utf-8")}
    own = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    assert scripts - own == set(TINY)  # the others have tests of their own


@pytest.mark.parametrize("name", TINY)
def test_last_line_is_the_result(benchmark, capsys, uncompiled, small, name):
    results = BENCHMARKS / "results.jsonl"
    before = results.read_bytes() if results.exists() else None
    benchmark(name).main(["--rounds", "1", "--no-record", *TINY[name]])
    assert re.fullmatch(LAST.get(name, r"ratio [\d.]+"), capsys.readouterr().out.splitlines()[-1])
    assert before == (results.read_bytes() if results.exists() else None)


def test_variants_have_processes_of_their_own(benchmark):
    with benchmark("record").processes(dict.fromkeys("ab", partial(partial, os.getpid)), 1) as variants:
        found = [variants[name]() for name in "abab"]
    assert found[:2] == found[2:] and len({os.getpid(), *found}) == 3


@pytest.mark.parametrize(
    ("pays", "chosen"),
    [
        (True, ["baseline", "ours fp32", "ours bf16"]),
        (False, ["baseline", "ours fp32"]),
    ],
)
def test_bf16_is_a_default_only_where_it_is_faster(benchmark, monkeypatch, pays, chosen):
    monkeypatch.setattr(hardware, "bf16_pays", lambda: pays)
    assert benchmark("variants").default_variants() == chosen


def test_memory_of_the_baseline_excludes_ride_timm():
    code = (
        "import memory; memory.train = lambda *_: None; memory.main(['--variant', 'baseline']);"
        "assert 'ride_timm' not in sys.modules"
    )
    ran = run_python("-c", f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); {code}")
    assert ran.exit_code == 0, ran.stderr


@pytest.mark.parametrize("flag", ["--rounds", "--threads"])
def test_zero_is_rejected(benchmark, capsys, flag):
    record = benchmark("record")
    with pytest.raises(SystemExit):
        record.parse(record.parser("A title."), [flag, "0"])
    assert f"{flag} 0: expected 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("flagged", [False, True])
def test_recorded_line(benchmark, tmp_path, monkeypatch, flagged):
    import json

    record, results = benchmark("record"), tmp_path / "results.jsonl"
    monkeypatch.setattr(record, "RESULTS", tmp_path / "other.jsonl" if flagged else results)
    args = record.parse(record.parser("A title."), ["--rounds", "2", *(["--results", str(results)] * flagged)])
    args.data_dir = tmp_path / "cifar"
    record.record("step", args, dict(ratio=2.3456789, rows=[dict(time=1 / 3)]))
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    line = json.loads(results.read_text())
    assert line["benchmark"] == "step" and line["figures"] == {"ratio": 2.3457, "rows": [{"time": 0.33333}]}
    assert line["arguments"] == {"rounds": 2, "threads": args.threads, "data_dir": "cifar"}
    assert {"commit", "versions", "processor", "threads", "date"} <= set(line)
    assert str(tmp_path) not in results.read_text()


def test_results_in_no_folder_are_rejected_before_anything_is_measured(benchmark, tmp_path, capsys):
    record, results = benchmark("record"), tmp_path / "none" / "results.jsonl"
    with pytest.raises(SystemExit):
        record.parse(record.parser("A title."), ["--results", str(results)])
    assert f"--results {results}: its folder does not exist" in capsys.readouterr().err
