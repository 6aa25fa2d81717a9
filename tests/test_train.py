"""End-to-end runs of the training script on image files."""

import gc
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from forked import Python, run_python
from journeys import SCRIPT, damage, flags_of, launch_two_processes, rows_of
from two_ranks import run_two_ranks

from ride_timm.cli.main import main
from ride_timm.cli.process import Interrupted
from ride_timm.training.run_folder import RunFolder


def test_run_writes_its_folder_and_prints_a_table(finished):
    output, printed = finished
    expected = {"recipe.yaml", "state.pt", "metrics.csv", "results.json", "config.json", "model.safetensors"}
    assert expected <= {path.name for path in output.iterdir()}
    assert not [path for path in output.iterdir() if path.name.endswith(".partial")]
    results = json.loads((output / "results.json").read_text())
    assert results["num_processes"] == 1 and results["class_counts"] == [30, 16, 8] and results["seed"] == 0
    experts, router = results["stages"]["experts"], results["stages"]["router"]
    assert experts["all"] > 80  # two of the three colours are 67
    assert experts["many"] is None and experts["epochs"] == 3
    assert sum(router["experts_used"]) == pytest.approx(1) and router["threshold"] == 0.5
    assert router["macs"] <= experts["macs"] * 1.01
    for word in ("ensemble", "routed", "many", "medium", "few", "MACs", "experts used"):
        assert word in printed
    rows = rows_of(output)
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("experts", "1"), ("experts", "2"), ("experts", "3"), ("router", "1"), ("router", "2")
    ]  # fmt: skip
    assert [row["all"] != "" for row in rows] == [False, True, True, False, True]


def test_a_run_and_its_evaluation_hold_out_the_same_test_images(train, colours, tmp_path, capsys):
    flags = flags_of(colours / "train", tmp_path / "run", "--stage", "experts", "--epochs", "1", "--split-seed", "3")
    assert train(flags) == 0
    assert capsys.readouterr().err.count("the 11 test images are 0.2 of train, held out with seed 3") == 1
    results = RunFolder(tmp_path / "run").results()
    assert results["test_source"] == "0.2 of train, held out with seed 3" and results["class_counts"] == [24, 13, 6]
    main(["evaluate", "--model", str(tmp_path / "run"), "--json"])
    printed = capsys.readouterr()
    evaluated = json.loads(printed.out)
    assert evaluated["images"] == 11 and "held out with seed 3" in printed.err
    assert evaluated["all"] == pytest.approx(results["stages"]["experts"]["all"])


@pytest.mark.parametrize("routed", [False, True])
def test_evaluate_reproduces_the_results_exactly(finished, colours, routed, capsys):
    output, _ = finished
    main(["evaluate", "--model", f"local-dir:{output}", "--json", "--threads", "1", *(["--routed"] if routed else [])])
    found = json.loads(capsys.readouterr().out)
    stored = RunFolder(output).results()["stages"]["router" if routed else "experts"]
    for key in set(stored) - {"epochs", "threshold"}:
        assert found[key] == stored[key], key


def test_a_run_in_transformers_has_its_names_and_accuracy(finished, colours):
    transformers = pytest.importorskip("transformers")
    output, _ = finished
    images = sorted(colours.glob("test/*/*"))
    classify = transformers.pipeline("image-classification", model=str(output), device="cpu", top_k=1)
    right = [classify(str(image))[0]["label"] == image.parent.name for image in images]
    assert len(right) > 10
    assert 100 * sum(right) / len(right) == pytest.approx(RunFolder(output).results()["stages"]["experts"]["all"])


def test_existing_run_is_kept_and_a_finished_one_resumes_at_once(train, finished, colours, capsys):
    output, _ = finished
    files = [path for path in output.iterdir() if path.name != ".lock"]
    before = {path.name: path.stat().st_mtime_ns for path in files}
    assert train(flags_of(colours, output)) == 2
    refusal = capsys.readouterr().err
    assert refusal.splitlines()[-1].startswith("error: ") and "--resume" in refusal
    assert train(["--output", output, "--resume"]) == 0
    resumed = capsys.readouterr().out
    assert "is finished" in resumed and "ensemble" in resumed
    assert before == {path.name: path.stat().st_mtime_ns for path in output.iterdir() if path.name != ".lock"}


def _kill_when(process, output, stage, epoch, number):
    """Send a signal once an epoch of a stage is on disk -> exit code."""
    for _ in range(2400):
        time.sleep(0.05)
        rows = rows_of(output) if (output / "metrics.csv").exists() else []
        if any(row["stage"] == stage and int(row["epoch"]) >= epoch for row in rows):
            os.kill(process.pid, number)
            return process.wait(60)
        assert process.exit_code is None, process.stderr
    raise AssertionError("the epoch was not written")


def test_killed_run_resumes_bit_identical(train, finished, colours, tmp_path, capsys):
    """Resumed after SIGTERM in stage one, and after SIGKILL in stage two from the state before a damaged one."""
    reference, _ = finished
    output = tmp_path / "interrupted"
    process = Python(SCRIPT, *flags_of(colours, output))
    assert _kill_when(process, output, "experts", 1, signal.SIGTERM) == 143
    error = process.stderr.splitlines()[-1]
    assert error.startswith("error: interrupted") and "--resume" in error
    assert RunFolder(output).state().stage == "experts"
    process = Python(SCRIPT, "--output", output, "--resume", "--threads", "1")
    assert _kill_when(process, output, "router", 1, signal.SIGKILL) == -signal.SIGKILL
    damage(output / "state.pt")
    assert train(["--output", output, "--resume", "--threads", "1"]) == 0
    notices = [line for line in capsys.readouterr().err.splitlines() if line.startswith("notice: ")]
    assert len(notices) == 1 and "state.pt is not a readable state" in notices[0] and "state before it" in notices[0]
    assert rows_of(output) == rows_of(reference) and not (output / "state.previous.pt").exists()
    ours, theirs = RunFolder(output).state(), RunFolder(reference).state()
    assert ours.model.keys() == theirs.model.keys()
    for name, value in theirs.model.items():
        assert torch.equal(ours.model[name], value), name
    assert (output / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    resumed, expected = (RunFolder(path).results()["stages"] for path in (output, reference))
    assert resumed == expected


def test_a_run_that_is_killed_after_its_last_epoch_is_completed(train, colours, tmp_path, monkeypatch, capsys):
    """While it plots, and before it deletes the state before the last."""
    output, plotted = tmp_path / "run", []

    def killed(*_):
        raise Interrupted(signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr("ride_timm.training.stages.plot_run", killed)
        assert train(flags_of(colours, output, "--stage", "experts", "--epochs", "1")) == 128 + signal.SIGKILL
    resume = ["--output", output, "--resume", "--stage", "experts", "--threads", "1"]
    results = {path: (output / path).read_bytes() for path in ("model.safetensors", "metrics.csv")}
    with monkeypatch.context() as patched:
        patched.setattr("ride_timm.training.stages.plot_run", lambda folder, *_: plotted.append(folder))
        patched.setattr(RunFolder, "conclude", killed)
        assert train(resume) == 128 + signal.SIGKILL
    assert plotted == [output] and (output / "state.previous.pt").exists()
    assert results == {path: (output / path).read_bytes() for path in results}
    capsys.readouterr()
    assert train(resume) == 0
    assert "is finished" in capsys.readouterr().out and not (output / "state.previous.pt").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files by /proc")
def test_nothing_piles_up_over_the_epochs(train, colours, tmp_path, monkeypatch):
    counts, resident, save = [], [], RunFolder.save

    def counted(self, state):
        save(self, state)
        gc.collect()
        tensors = sum(type(value) in (torch.Tensor, torch.nn.Parameter) for value in gc.get_objects())
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        counts.append((tensors, len(os.listdir("/proc/self/fd")), len(multiprocessing.active_children())))

    monkeypatch.setattr(RunFolder, "save", counted)
    flags = ["--stage", "experts", "--epochs", "4", "--eval-every", "1", "--ema-decay", "0.9"]
    flags += ["--augment", "imagenet", "--input-size", "32", "--workers", "1"]
    gc.freeze()  # what is there already is not looked at again
    try:
        assert train(flags_of(colours, tmp_path / "run", *flags)) == 0
    finally:
        gc.unfreeze()
    begun, *epochs, _ = counts
    assert begun[2] == 0 and len(epochs) == 4 and len(set(epochs[1:])) == 1 and epochs[1][2] == 2
    assert resident[4] - resident[2] < 2**25  # after the epoch that allocates; 1 MB is usual


@pytest.fixture(scope="module")
def of_two_processes(colours, tmp_path_factory):
    """A finished run of two processes, and the process that launched them."""
    output = tmp_path_factory.mktemp("two") / "run"
    done = launch_two_processes("29531", *flags_of(colours, output))
    assert done.returncode == 0, done.stderr
    return output, done


def test_two_processes_train_both_stages_and_count_each_sample_once(of_two_processes, capsys):
    output, done = of_two_processes
    results = RunFolder(output).results()
    assert results["num_processes"] == 2
    losses = [float(row["loss"]) for row in rows_of(output) if row["stage"] == "experts"]
    assert losses[-1] < losses[0] / 2  # in so few steps the accuracy depends on the random numbers
    main(["evaluate", "--model", str(output), "--json", "--threads", "1"])
    alone = json.loads(capsys.readouterr().out)
    assert alone["images"] == 30 and alone["per_class"] == results["stages"]["experts"]["per_class"]
    assert done.stderr.count("experts:") and done.stdout.count("ensemble") == 1


# a signal comes to a rank in a stage, as its second epoch has begun; then flags
INTERRUPTED_RANK = f"""
import os, runpy, sys
from ride_timm.training.stages import Stage

rank, number, stage, *flags = sys.argv[1:]
step = Stage.step

def interrupted(self):
    if (os.environ["RANK"], self.name, self.num_updates) == (rank, stage, self.updates_per_epoch + 1):
        os.kill(os.getpid(), int(number))
    step(self)

Stage.step = interrupted
sys.argv = [{SCRIPT!r}, *flags]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_two_processes_end_together_and_resume_bit_identical(of_two_processes, colours, tmp_path):
    """After SIGKILL to one in stage one, and SIGTERM to the other in stage two."""
    reference, _ = of_two_processes
    output = tmp_path / "interrupted"
    ranks = run_two_ranks("-c", INTERRUPTED_RANK, 1, 9, "experts", *flags_of(colours, output), exits=(1, -9))
    way = "--resume continues after the last finished epoch"
    assert ranks[0][1].splitlines()[-1].startswith(f"error: another process of this run has died; {way}")
    state = RunFolder(output).state()
    assert (state.stage, state.epoch) == ("experts", 1)
    resume = ["--output", output, "--resume", "--threads", "1"]
    for _, error in run_two_ranks("-c", INTERRUPTED_RANK, 0, 15, "router", *resume, exits=(143, 143)):
        assert error.splitlines()[-1] == f"error: interrupted; {way}."
    state = RunFolder(output).state()
    assert (state.stage, state.epoch) == ("router", 1)
    run_two_ranks(SCRIPT, *resume)
    assert rows_of(output) == rows_of(reference)
    assert RunFolder(output).results()["stages"] == RunFolder(reference).results()["stages"]
    assert (output / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


def test_annotation_lists_with_a_validation_split(train, colours, tmp_path, capsys):
    """Half of the test images form a validation list, which selects the epoch."""
    lists = tmp_path / "lists [1]*?"
    lists.mkdir()
    files = {split: sorted((colours / split).rglob("*.png")) for split in ("train", "test")}
    parts = {"train": files["train"], "val": files["test"][::2], "test": files["test"][1::2]}
    for split, paths in parts.items():
        lines = [f"{path.relative_to(colours)} {path.parent.name.removeprefix('class')}\n" for path in paths]
        (lists / f"colours_{split}.txt").write_text("".join(lines))
    output = tmp_path / "run [a]*?#"  # paths are not patterns
    flags = flags_of("colours", output, "--annotations", lists, "--data-dir", colours, "--stage", "experts")
    done = run_python(SCRIPT, *flags, "--use-val", "--select", "best", "--few-shot", "10", "--many-shot", "20")
    assert done.exit_code == 0, done.stderr
    found = RunFolder(output).results()
    assert found["class_counts"] == [30, 16, 8] and found["stages"]["experts"]["epochs"] in (2, 3)
    assert [row["held_out"] != "" for row in rows_of(output)] == [False, True, True]
    experts = found["stages"]["experts"]
    assert [experts["many"], experts["medium"], experts["few"]] == experts["per_class"]
    assert len(experts["experts"]["accuracy"]["all"]) == 2
    pictures = {path.name for path in output.glob("*.png")}
    assert {"curves.png", "long_tail.png", "reliability.png", "experts.png"} <= pictures
    assert ("confusions.png" in pictures) == bool(experts["confusions"])
    assert main(["evaluate", "--model", str(output), "--json", "--threads", "1"]) is None
    assert json.loads(capsys.readouterr().out)["per_class"] == experts["per_class"]
    (colours.parent / "gone").mkdir(exist_ok=True)
    gone = ["--annotations", lists, "--data-dir", colours.parent / "gone"]
    assert train(flags_of("colours", tmp_path / "no", *gone)) == 2
    assert "the image of line 1 is missing" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_router_stage_alone_equals_both_stages(train, finished, colours, tmp_path):
    """Stage two alone, in the same folder and from another run."""
    reference, _ = finished
    output, shared = tmp_path / "parts", ["--threads", "1"]
    assert train(flags_of(colours, output, "--stage", "experts")) == 0
    assert list(RunFolder(output).results()["stages"]) == ["experts"]
    assert train(["--stage", "router", "--output", output, *shared]) == 0
    other = tmp_path / "other"
    assert train(flags_of(colours, other, "--stage", "router", "--from", output)) == 0
    expected = RunFolder(reference).results()["stages"]
    assert RunFolder(output).results()["stages"] == expected
    assert RunFolder(other).results()["stages"]["router"] == expected["router"]
    assert RunFolder(other).results()["source"] == str(output)
    assert "source" not in RunFolder(output).results()


def test_selection_accumulation_clipping_and_tracking(train, colours, tmp_path):
    output = tmp_path / "run"
    flags = flags_of(colours, output, "--stage", "experts", "--holdout", "0.3", "--select", "best", "--patience", "1")
    flags += ["--gradient-accumulation", "2", "--clip-grad", "1", "--mixed-precision", "bf16", "--eval-every", "1"]
    assert train([*flags, "--optimizer", "adamw", "--schedule", "cosine", "--lr", "0.01", "--epochs", "6"]) == 0
    rows = rows_of(output)
    held_out = [float(row["held_out"]) for row in rows]
    best = held_out.index(max(held_out)) + 1
    results = RunFolder(output).results()
    assert results["stages"]["experts"]["epochs"] == best and results["precision"] == "bf16"
    assert len(rows) == min(6, best + 1)  # patience of one evaluation
    assert results["stages"]["experts"]["all"] == float(rows[best - 1]["all"])
    assert results["class_counts"] == [30, 16, 8]


def test_recipe_without_a_value_lists_them_all(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script.train(["--recipe"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for words in ("cifar100_lt_sade", "inat18_resnet50_distill", "Command: accelerate launch", "Result: "):
        assert words in printed


def test_trackers_keep_the_stages_apart(train, colours, tmp_path):
    """A tracker that is named twice logs once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "tracked"
    assert train(flags_of(colours, output, "--tracker", "tensorboard", "--tracker", "tensorboard")) == 0
    (events,) = (output / "ride_timm").glob("events*")
    found = EventAccumulator(str(events)).Reload()
    logged = {tag: [event.step for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert logged["experts/loss"] == [1, 2, 3] and logged["router/loss"] == [4, 5]
    assert logged["experts/all"] == [2, 3] and logged["router/all"] == [5] == logged["results/router/all"]
    losses = [float(row["loss"]) for row in rows_of(output)]
    assert [event.value for event in found.Scalars("router/loss")] == pytest.approx(losses[3:])
    assert found.Tags()["tensors"] == ["results/table/text_summary"]
