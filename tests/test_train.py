"""Journeys of the training script: real processes on real image files."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ride_timm.__main__ import main
from ride_timm.checkpoint import RunFolder
from ride_timm.launch import Interrupted

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "train_accelerate.py")
TINY = ["--model", "test_ride_resnet", "--num-experts", "2", "--imb-type", "none", "--augment", "cifar"]
TINY += ["--epochs", "3", "--router-epochs", "2", "--warmup-epochs", "1", "--batch-size", "16", "--lr", "0.02"]
TINY += ["--router-batch-size", "32", "--drop-rate", "0.1", "--eval-every", "2"]


def _environment(**more):
    quiet = dict(HF_DATASETS_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    return {**os.environ, **quiet, **more, "PYTHONPATH": str(ROOT)}


def _run(*flags, launcher=(sys.executable,), **kwargs):
    command = [*launcher, SCRIPT, *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=_environment(), **kwargs)


def _two_processes(port, *flags):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    command = [*launcher, "--main_process_port", port, SCRIPT, *map(str, flags)]
    environment = _environment(ACCELERATE_USE_CPU="1")
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def _flags(colours, output, *more):
    return ["--dataset", str(colours), "--output", str(output), "--threads", "1", *TINY, *more]


def _rows(folder):
    with open(folder / "metrics.csv") as lines:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(lines)]


@pytest.fixture(scope="module")
def finished(colours, tmp_path_factory):
    """An uninterrupted run of both stages."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = _run(*_flags(colours, output))
    assert done.returncode == 0, done.stderr
    return output, done


def test_a_run_leaves_the_whole_folder_and_a_table(finished):
    output, done = finished
    expected = {"recipe.yaml", "state.pt", "metrics.csv", "results.json", "config.json", "model.safetensors"}
    assert expected <= {path.name for path in output.iterdir()}
    assert not [path for path in output.iterdir() if path.name.endswith(".partial")]
    results = json.loads((output / "results.json").read_text())
    assert results["num_processes"] == 1 and results["class_counts"] == [30, 16, 8] and results["seed"] == 0
    experts, router = results["stages"]["experts"], results["stages"]["router"]
    assert experts["all"] > 60  # three colours; chance is a third
    assert experts["many"] is None and experts["epochs"] == 3
    assert sum(router["experts_used"]) == pytest.approx(1) and router["threshold"] == 0.5
    assert router["macs"] <= experts["macs"] * 1.01
    for word in ("ensemble", "routed", "many", "medium", "few", "MACs", "experts used"):
        assert word in done.stdout
    rows = _rows(output)
    assert [(row["stage"], row["epoch"]) for row in rows] == [
        ("experts", "1"), ("experts", "2"), ("experts", "3"), ("router", "1"), ("router", "2")
    ]  # fmt: skip
    assert [row["all"] != "" for row in rows] == [False, True, True, False, True]


@pytest.mark.parametrize("routed", [False, True])
def test_evaluate_gives_the_results_again_exactly(finished, colours, routed, capsys):
    output, _ = finished
    main(["evaluate", "--model", f"local-dir:{output}", "--json", "--threads", "1", *(["--routed"] if routed else [])])
    found = json.loads(capsys.readouterr().out)
    stored = RunFolder(output).results()["stages"]["router" if routed else "experts"]
    for key in set(stored) - {"epochs", "threshold"}:
        assert found[key] == stored[key], key


def test_an_existing_run_is_left_alone_and_a_finished_one_resumes_at_once(finished, colours):
    output, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    again = _run(*_flags(colours, output))
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("error: ") and "--resume" in again.stderr
    resumed = _run("--output", output, "--resume")
    assert resumed.returncode == 0 and "is finished" in resumed.stdout and "ensemble" in resumed.stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in output.iterdir()}


def _kill_when(process, output, stage, epoch, number):
    """Send a signal as soon as an epoch of a stage is on disk."""
    for _ in range(2400):
        time.sleep(0.05)
        rows = _rows(output) if (output / "metrics.csv").exists() else []
        if any(row["stage"] == stage and int(row["epoch"]) >= epoch for row in rows):
            process.send_signal(number)
            return process.wait(60)
        assert process.poll() is None, process.stderr.read()
    raise AssertionError("the epoch never came")


def test_a_killed_run_resumes_bit_identical(finished, colours, tmp_path):
    """Terminated in stage one, killed outright in stage two, resumed each time: nothing differs from one go."""
    whole, _ = finished
    output = tmp_path / "torn"
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=_environment())
    process = subprocess.Popen([sys.executable, SCRIPT, *_flags(colours, output)], **pipes)
    assert _kill_when(process, output, "experts", 1, signal.SIGTERM) == 143
    error = process.stderr.read().splitlines()[-1]
    assert error.startswith("error: interrupted") and "--resume" in error
    assert RunFolder(output).state()["stage"] == "experts"
    process = subprocess.Popen([sys.executable, SCRIPT, "--output", str(output), "--resume", "--threads", "1"], **pipes)
    assert _kill_when(process, output, "router", 1, signal.SIGKILL) == -signal.SIGKILL
    assert _run("--output", output, "--resume", "--threads", "1").returncode == 0
    assert _rows(output) == _rows(whole)
    ours, theirs = RunFolder(output).state(), RunFolder(whole).state()
    assert ours["model"].keys() == theirs["model"].keys()
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    assert (output / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    mine, one_go = (RunFolder(path).results()["stages"] for path in (output, whole))
    assert mine == one_go


def test_two_processes_train_both_stages_and_count_each_sample_once(colours, tmp_path, capsys):
    output = tmp_path / "two"
    done = _two_processes("29531", *_flags(colours, output))
    assert done.returncode == 0, done.stderr
    results = RunFolder(output).results()
    assert results["num_processes"] == 2
    assert results["stages"]["experts"]["all"] > 50
    main(["evaluate", "--model", str(output), "--json", "--threads", "1"])
    alone = json.loads(capsys.readouterr().out)
    assert alone["images"] == 30 and alone["per_class"] == results["stages"]["experts"]["per_class"]
    assert done.stderr.count("experts:") and done.stdout.count("ensemble") == 1


def test_listed_images_and_a_validation_split_that_chooses_the_epoch(colours, tmp_path):
    """The images by annotation lists; half of the test images are a validation list, on which the epoch is chosen."""
    lists = tmp_path / "lists"
    lists.mkdir()
    files = {split: sorted((colours / split).rglob("*.png")) for split in ("train", "test")}
    parts = {"train": files["train"], "val": files["test"][::2], "test": files["test"][1::2]}
    for split, paths in parts.items():
        lines = [f"{path.relative_to(colours)} {path.parent.name.removeprefix('class')}\n" for path in paths]
        (lists / f"colours_{split}.txt").write_text("".join(lines))
    output = tmp_path / "run"
    flags = _flags("colours", output, "--annotations", lists, "--data-dir", colours, "--stage", "experts")
    done = _run(*flags, "--use-val", "--select", "best", "--few-shot", "10", "--many-shot", "20")
    assert done.returncode == 0, done.stderr
    found = RunFolder(output).results()
    assert found["class_counts"] == [30, 16, 8] and found["stages"]["experts"]["epochs"] in (2, 3)
    assert [row["held_out"] != "" for row in _rows(output)] == [False, True, True]
    experts = found["stages"]["experts"]
    assert [experts["many"], experts["medium"], experts["few"]] == experts["per_class"]
    assert len(experts["experts"]["accuracy"]["all"]) == 2
    assert {"head_to_tail.png", "reliability.png", "experts.png"} <= {path.name for path in output.iterdir()}
    (colours.parent / "gone").mkdir(exist_ok=True)
    refused = _run(*_flags("colours", tmp_path / "no", "--annotations", lists, "--data-dir", colours.parent / "gone"))
    assert refused.returncode == 2 and "the image of line 1 is missing" in refused.stderr
    assert not (tmp_path / "no").exists()


def test_router_from_another_run_and_from_the_folder_itself(finished, colours, tmp_path):
    """Stage two alone gives what both stages in a row give."""
    whole, _ = finished
    output, shared = tmp_path / "parts", ["--threads", "1"]
    assert _run(*_flags(colours, output, "--stage", "experts")).returncode == 0
    assert list(RunFolder(output).results()["stages"]) == ["experts"]
    assert _run("--stage", "router", "--output", output, *shared).returncode == 0
    other = tmp_path / "other"
    assert _run(*_flags(colours, other, "--stage", "router", "--from", output)).returncode == 0
    expected = RunFolder(whole).results()["stages"]
    assert RunFolder(output).results()["stages"] == expected
    assert RunFolder(other).results()["stages"]["router"] == expected["router"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "nope"], r"recipe 'nope'"),
        (["--no-such-flag"], r"unrecognized arguments"),
        (["--epochs", "0"], r"epochs='0'"),
        (["--batch-size", "many"], r"batch_size='many'"),
        (["--num-experts", "0"], r"num_experts='0'"),
        (["--lr", "-1"], r"lr='-1'"),
        (["--imb-factor", "100"], r"IF 100 for 0.01"),
        (["--model", "resnet18"], r"no network with experts"),
        (["--dataset", "/no/such/place"], r"/no/such/place"),
        (["--label-column", "genus"], r"no column 'genus'"),
        (["--augment", "sepia"], r"unknown augmentation 'sepia'"),
        (["--optimizer", "hope"], r"optimizer='hope'"),
        (["--tracker", "hope"], r"tracker='hope'"),
        (["--mixed-precision", "fp16"], r"fp16 needs a GPU"),
        (["--stage", "router"], r"no stage one to start from"),
        (["--stage", "router", "--num-experts", "1"], r"num_experts=1"),
        (["--from", "/no/such/run"], r"could not be loaded"),
        (["--distillation"], r"--teacher"),
        (["--threads", "0"], r"threads=0"),
        (["--select", "best"], r"--holdout"),
        (["--loss", "hope"], r"loss='hope': expected one of ride, .*balpoe"),
        (["--loss", "balpoe", "--taus", "0", "1", "3"], r"mean of 1.33333: expected 1"),
        (["--loss", "sade", "--num-experts", "2"], r"num_experts=2: SADE"),
        (["--loss", "logit_adjustment", "--tau", "-1"], r"tau='-1'"),
        (["--mixup-alpha", "-0.4"], r"mixup_alpha='-0.4'"),
        (["--auto-augment", "hope"], r"auto_augment='hope': expected timm's words"),
        (["--decouple", "hope"], r"decouple='hope': expected one of none, crt"),
        (["--decouple", "crt"], r"decouple=crt re-balances a trained network: name one by --from"),
        (["--decouple", "tau_norm", "--decouple-tau", "nan"], r"decouple_tau='nan'"),
        (["--teacher", "/no/such/run"], r"model '/no/such/run' could not be loaded"),
        (["--streaming"], r"stage router; add --no-router-balanced, or train .* --from that run\.$"),
        (["--streaming", "--stage", "router"], r"add --no-router-balanced, or leave --streaming out here\.$"),
        (["--streaming", "--decouple", "crt"], r"of stage experts; train it by --stage experts without --streaming\.$"),
        (["--streaming", "--decouple", "crt", "--no-router-balanced"], r"of stage experts; train it .* --streaming\.$"),
    ],
)
def test_bad_input_ends_in_two_and_writes_nothing(train, flags, message, tmp_path, monkeypatch, capsys):
    if "fp16" in flags and torch.cuda.is_available():
        pytest.skip("fp16 is fine on a GPU")
    monkeypatch.chdir(tmp_path)
    assert train([*flags, "--output", tmp_path / "run"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_model_is_refused(train, finished, colours, tmp_path, capsys):
    output, _ = finished
    flags = _flags(colours, tmp_path / "run", "--from", output)
    flags[flags.index("--num-experts") + 1] = "3"
    assert train(flags) == 2
    assert "holds another model than the recipe's" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_what_only_shows_with_the_data_is_found_before_anything_is_written(train, finished, colours, tmp_path, capsys):
    teacher, _ = finished
    flags = ["--dataset", "fashion_lt", "--augment", "fashion", "--teacher", teacher, "--output", tmp_path / "run"]
    assert train([*flags, "--threads", "1"]) == 2
    assert "has 3 classes" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_names_epoch_and_step_and_keeps_the_checkpoint(train, colours, tmp_path, capsys):
    output = tmp_path / "run"
    flags = _flags(colours, output, "--stage", "experts", "--warmup-epochs", "0", "--schedule", "constant")
    assert train([*flags, "--lr", "1e30", "--epochs", "50"]) == 1
    assert re.search(r"error: the loss is not finite at epoch \d+, step \d+", capsys.readouterr().err)
    state = RunFolder(output).state()
    assert all(torch.isfinite(value).all() for value in state["model"].values())


def test_a_corrupt_image_names_its_row(train, tmp_path, capsys):
    from PIL import Image

    for split in ("train", "test"):
        for label in ("a", "b"):
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(folder / f"{i}.png")
    torn = tmp_path / "images" / "train" / "b" / "1.png"
    torn.write_bytes(torn.read_bytes()[:40])
    assert train(_flags(tmp_path / "images", tmp_path / "run")) == 1
    assert re.search(r"error: .*row 5 of split .train.", capsys.readouterr().err)


def test_selection_accumulation_clipping_and_tracking(train, colours, tmp_path):
    output = tmp_path / "run"
    flags = _flags(colours, output, "--stage", "experts", "--holdout", "0.3", "--select", "best", "--patience", "1")
    flags += ["--gradient-accumulation", "2", "--clip-grad", "1", "--mixed-precision", "bf16", "--eval-every", "1"]
    assert train([*flags, "--optimizer", "adamw", "--schedule", "cosine", "--lr", "0.01", "--epochs", "6"]) == 0
    rows = _rows(output)
    held_out = [float(row["held_out"]) for row in rows]
    best = held_out.index(max(held_out)) + 1
    results = RunFolder(output).results()
    assert results["stages"]["experts"]["epochs"] == best and results["precision"] == "bf16"
    assert len(rows) == min(6, best + 1)  # patience of one evaluation
    assert results["stages"]["experts"]["all"] == float(rows[best - 1]["all"])
    assert results["class_counts"] == [30, 16, 8]


def test_distillation_and_one_expert(train, finished, colours, tmp_path, capsys):
    teacher, _ = finished
    flags = _flags(colours, tmp_path / "student", "--teacher", teacher, "--teacher-mode", "train")
    flags[flags.index("--num-experts") + 1] = "1"
    assert train([*flags, "--distillation", "--loss", "ce", "--epochs", "1"]) == 0
    results = RunFolder(tmp_path / "student").results()
    assert list(results["stages"]) == ["experts"]  # one expert: nothing to route
    assert "routed" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["crt", "lws", "tau_norm", "logit_adjustment"])
def test_the_heads_of_a_run_are_rebalanced_with_its_own_recipe(train, finished, tmp_path, method, monkeypatch, capsys):
    source, _ = finished
    monkeypatch.chdir(tmp_path)
    flags = ["--from", source, "--decouple", method, "--decouple-epochs", "2", "--decouple-batch-size", "16"]
    assert train([*flags, "--decouple-lr", "0.05", "--stage", "experts", "--threads", "1"]) == 0
    output = tmp_path / "runs" / f"whole_{method}"
    results = RunFolder(output).results()
    assert results["recipe"] == f"whole_{method}" and list(results["stages"]) == ["experts"]
    assert results["stages"]["experts"]["epochs"] == (2 if method in ("crt", "lws") else 0)
    ours, theirs = RunFolder(output).state()["model"], RunFolder(source).state()["model"]
    for name, value in ours.items():
        if ".fc." not in name:
            assert torch.equal(value, theirs[name]), name
    capsys.readouterr()
    main(["evaluate", "--model", str(output), "--json", "--threads", "1"])
    assert json.loads(capsys.readouterr().out)["per_class"] == results["stages"]["experts"]["per_class"]
    if method == "lws":  # a router on the re-balanced heads, from the folder itself
        assert train(["--output", output, "--stage", "router", "--threads", "1"]) == 0
        assert list(RunFolder(output).results()["stages"]) == ["experts", "router"]


def test_experts_of_different_priors_are_brought_to_one_once(train, script, colours, tmp_path, monkeypatch, capsys):
    def heads(folder):
        state = RunFolder(folder).state()["model"]
        return [state[f"experts.{e}.fc.affine.bias"] for e in (0, 1)]

    flags = ["--loss", "balpoe", "--epochs", "2", "--router-epochs", "2"]
    run, router, tuned = (tmp_path / name for name in ("run", "router", "tuned"))
    assert train(_flags(colours, run, *flags)) == 0
    log_prior = torch.tensor([30 / 54, 16 / 54, 8 / 54]).log()  # taus 0 and 2
    torch.testing.assert_close(heads(run), [-log_prior, log_prior])
    assert train(_flags(colours, router, *flags, "--stage", "router", "--from", run)) == 0
    torch.testing.assert_close(heads(router), [-log_prior, log_prior])
    more = ["--stage", "experts", "--from", run, "--lr", "1e-6"]
    assert train(_flags(colours, tuned, *flags, *more)) == 0  # moved back before, again after
    for found, aligned in zip(heads(tuned), heads(run), strict=True):
        torch.testing.assert_close(found, aligned, rtol=0, atol=1e-3)
    for stage, epoch in (("experts", 2), ("router", 1)):  # torn before the experts are moved, and after
        torn = tmp_path / f"torn_{stage}"
        with monkeypatch.context() as patched:
            _stop_after_epoch(patched, script, stage, epoch)
            assert train(_flags(colours, torn, *flags)) == 143
        assert train(["--output", torn, "--resume", "--threads", "1"]) == 0
        assert (torn / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    capsys.readouterr()
    main(["evaluate", "--model", str(run), "--json", "--threads", "1"])
    measured, stated = json.loads(capsys.readouterr().out), RunFolder(run).results()["stages"]["experts"]
    assert [measured[key] for key in ("per_class", "experts")] == [stated[key] for key in ("per_class", "experts")]


def _stop_after_epoch(monkeypatch, script, of="experts", last=1):
    original = script.Run.save

    def save(self, stage, epoch, **more):
        original(self, stage, epoch, **more)
        if (stage, epoch) == (of, last):
            raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(script.Run, "save", save)


@pytest.mark.parametrize(
    "more",
    [
        ["--loss", "balpoe", "--mixup-alpha", "0.4", "--cutmix-alpha", "1", "--ema-decay", "0.9"],
        ["--loss", "ce", "--label-smoothing", "0.1", "--auto-augment", "rand-m9-mstd0.5", "--random-erasing", "0.5"],
        ["--loss", "mdcs", "--auto-augment", "original", "--random-erasing", "1"],
        ["--decouple", "lws", "--decouple-epochs", "2", "--decouple-batch-size", "16"],
    ],
)
def test_methods_resume_bit_identical(train, script, finished, colours, tmp_path, monkeypatch, more):
    flags = ["--stage", "experts", "--epochs", "2", *more]
    if "--decouple" in more:
        flags += ["--from", finished[0]]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert train(_flags(colours, whole, *flags)) == 0
    with monkeypatch.context() as patched:
        _stop_after_epoch(patched, script)
        assert train(_flags(colours, torn, *flags)) == 143
    assert train(["--output", torn, "--resume", "--stage", "experts", "--threads", "1"]) == 0
    assert _rows(torn) == _rows(whole)
    assert (torn / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--loss", "balpoe", "--mixup-alpha", "0.4"], ["erase 0.5 1", "mix"]),
        (["--loss", "mdcs", "--auto-augment", "original"], ["erase 0.5 2"]),
        (["--decouple", "lws", "--decouple-epochs", "1", "--decouple-batch-size", "16"], []),
    ],
)
def test_what_is_done_to_batches_in_stage_one(train, script, finished, colours, tmp_path, monkeypatch, flags, expected):
    """Erasing before mixing, in every batch; neither for re-balanced heads nor for the router."""
    done = []

    class Erasing(script.Erasing):
        def __init__(self, probability, views=1):
            super().__init__(probability, views)
            self.name = f"erase {probability} {views}"

        def __call__(self, images, targets):
            done.append(self.name)
            before = images.clone()
            erased, targets = super().__call__(images, targets)
            assert torch.equal(erased[: len(targets)], before[: len(targets)]) == (len(erased) > len(targets))
            return erased, targets

    class Mixing(script.Mixing):
        def __call__(self, images, targets):
            done.append("mix")
            return super().__call__(images, targets)

    monkeypatch.setattr(script, "Erasing", Erasing)
    monkeypatch.setattr(script, "Mixing", Mixing)
    source = ["--from", finished[0]] if "--decouple" in flags else []
    flags = [*flags, *source, "--random-erasing", "0.5", "--epochs", "1", "--router-epochs", "1"]
    assert train(_flags(colours, tmp_path / "run", *flags)) == 0
    assert done[: len(expected)] == expected and len(done) == (done.count(expected[0]) * len(expected) if done else 0)
    assert bool(done) == bool(expected)


def test_the_moving_average_is_what_is_evaluated_and_kept(train, script, colours, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(_flags(colours, output, "--stage", "experts", "--ema-decay", "0.99")) == 0
    state, results = RunFolder(output).state(), RunFolder(output).results()
    plain = tmp_path / "plain"
    assert train(_flags(colours, plain, "--stage", "experts")) == 0
    ours, last = state["model"], RunFolder(plain).state()["model"]
    assert any(not torch.equal(ours[name], value) for name, value in last.items())
    assert [row["loss"] for row in _rows(output)] == [row["loss"] for row in _rows(plain)]  # training is the same
    capsys.readouterr()
    main(["evaluate", "--model", str(output), "--json", "--threads", "1"])
    assert json.loads(capsys.readouterr().out)["per_class"] == results["stages"]["experts"]["per_class"]


def test_a_teacher_is_any_network_of_timm(train, colours, tmp_path, capsys):
    import timm
    from timm.models._hub import save_for_hf

    fixed = dict(dynamic_img_size=False)  # to the 160 pixels that it was made for
    networks = dict(teacher=("test_resnet", 3, {}), stranger=("test_resnet", 4, {}), blind=("test_resnet", 0, {}))
    for name, (network, num_classes, more) in (networks | dict(large=("test_vit", 3, fixed))).items():
        model = timm.create_model(network, num_classes=num_classes, **more)
        save_for_hf(model, tmp_path / name, model_args=more, safe_serialization=True)
    flags = ["--stage", "experts", "--epochs", "1", "--teacher"]
    assert train(_flags(colours, tmp_path / "student", *flags, tmp_path / "teacher")) == 0
    assert RunFolder(tmp_path / "student").results()["stages"]["experts"]["all"] > 0
    refusals = dict(stranger="has 4 classes, the data 3", blind="has 0 classes, the data 3")
    refusals["large"] = "does not take images of 32 x 32 pixels in 3 channels (AssertionError"
    for name, message in refusals.items():
        assert train(_flags(colours, tmp_path / "other", *flags, tmp_path / name)) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_a_teacher_in_train_mode_teaches_two_processes_as_one_with_ghost_batches(train, colours, tmp_path):
    """It normalises by each process' own images, which are one process' ghost batches; its mode makes a difference."""
    import timm
    from timm.models._hub import save_for_hf

    torch.manual_seed(5)
    save_for_hf(timm.create_model("test_resnet", num_classes=3), tmp_path / "teacher", safe_serialization=True)

    def flags(name, mode):
        more = ("--stage", "experts", "--epochs", "2", "--drop-rate", "0", "--batch-size", "18", "--lr", "0.01")
        more += ("--teacher", tmp_path / "teacher", "--teacher-mode", mode, "--mixed-precision", "no")
        return _flags(colours, tmp_path / name, *more)

    done = _two_processes("29533", *flags("two", "train"))
    assert done.returncode == 0, done.stderr
    assert train([*flags("one", "train"), "--ghost-batch", "9"]) == 0
    assert train([*flags("eval", "eval"), "--ghost-batch", "9"]) == 0
    two, one, other = (RunFolder(tmp_path / name).state()["model"] for name in ("two", "one", "eval"))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    name = "experts.0.fc.weight"
    assert (other[name] - one[name]).abs().max() > 1e-3


def test_recipe_without_a_value_lists_them_all(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script.train(["--recipe"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for words in ("cifar100_lt_sade", "inat18_resnet50_distill", "Command: accelerate launch", "Result: "):
        assert words in printed
