"""End-to-end runs: teachers, re-balancing, alignment, EMA, batch transforms."""

import json
import shutil
import signal

import pytest
import torch
from journeys import SCRIPT, flags_of, rows_of, stop_after_epoch
from two_ranks import run_two_ranks

from ride_timm.cli.main import main
from ride_timm.cli.process import Interrupted
from ride_timm.data.augment import mixing
from ride_timm.training import stages
from ride_timm.training.run_folder import RunFolder


def test_distillation_and_one_expert(train, finished, colours, tmp_path, capsys):
    teacher, _ = finished
    flags = flags_of(colours, tmp_path / "student", "--teacher", teacher, "--teacher-mode", "train")
    flags[flags.index("--num-experts") + 1] = "1"
    assert train([*flags, "--distillation", "--loss", "ce", "--epochs", "1"]) == 0
    results = RunFolder(tmp_path / "student").results()
    assert list(results["stages"]) == ["experts"]  # one expert: nothing to route
    assert "routed" not in capsys.readouterr().out


def test_resumed_run_keeps_its_teacher(train, finished, colours, tmp_path, monkeypatch, capsys):
    """Its path is kept and its hash checked: it may move, but not change."""
    teacher, output = tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(finished[0], teacher)
    flags = flags_of(colours, output, "--stage", "experts", "--loss", "ce", "--epochs", "2")
    with monkeypatch.context() as patched:
        stop_after_epoch(patched)
        assert train([*flags, "--teacher", teacher]) == 143
    resume = ["--output", output, "--resume", "--stage", "experts", "--threads", "1"]
    assert train([*flags_of(colours, tmp_path / "other", "--stage", "experts", "--epochs", "1")]) == 0
    assert train([*resume, "--teacher", tmp_path / "other"]) == 2
    assert "its weights differ from those of" in capsys.readouterr().err
    teacher.rename(tmp_path / "moved")
    assert train(resume) == 2
    assert "name its new path by --teacher" in capsys.readouterr().err
    assert train([*resume, "--teacher", tmp_path / "moved"]) == 0
    found = RunFolder(output).results()["teacher"]
    assert found == dict(spec=str(tmp_path / "moved"), sha256=found["sha256"]) and len(found["sha256"]) == 64

    reference = tmp_path / "reference"
    assert train([*flags_of(colours, reference, *flags[4:])[:4], *flags[4:], "--teacher", tmp_path / "moved"]) == 0
    assert (reference / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("more", [["--stage", "experts"], ["--stage", "router"], ["--decouple", "tau_norm"]])
def test_a_run_killed_before_its_first_epoch_begins_from_its_weights_again(
    train, finished, colours, tmp_path, monkeypatch, more
):
    flags = ["--epochs", "1", "--router-epochs", "1", "--from", finished[0], *more]
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    assert train(flags_of(colours, whole, *flags)) == 0

    def stop(*_):
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(stages.Stage, "begin_epoch", stop)
        patched.setattr(stages.Stage, "finish", stop)  # of a stage without epochs
        assert train(flags_of(colours, torn, *flags)) == 143
    resume = more if "--stage" in more else []
    assert train(["--output", torn, "--resume", "--threads", "1", *resume]) == 0
    assert (torn / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["crt", "lws", "tau_norm", "logit_adjustment"])
def test_rebalancing_uses_the_recipe_of_the_source_run(train, finished, tmp_path, method, monkeypatch, capsys):
    source, _ = finished
    monkeypatch.chdir(tmp_path)
    flags = ["--from", source, "--decouple", method, "--decouple-epochs", "2", "--decouple-batch-size", "16"]
    assert train([*flags, "--decouple-lr", "0.05", "--stage", "experts", "--threads", "1"]) == 0
    output = tmp_path / "runs" / f"finished_{method}"
    results = RunFolder(output).results()
    assert results["recipe"] == f"finished_{method}" and list(results["stages"]) == ["heads"]
    assert results["stages"]["heads"]["epochs"] == (2 if method in ("crt", "lws") else 0)
    ours, theirs = RunFolder(output).state().model, RunFolder(source).state().model
    for name, value in ours.items():
        if ".fc." not in name:
            assert torch.equal(value, theirs[name]), name
    capsys.readouterr()
    main(["evaluate", "--model", str(output), "--json", "--threads", "1"])
    assert json.loads(capsys.readouterr().out)["per_class"] == results["stages"]["heads"]["per_class"]
    if method == "lws":  # a router on the re-balanced heads, in the same folder
        assert train(["--output", output, "--stage", "router", "--threads", "1"]) == 0
        results = RunFolder(output).results()
        assert list(results["stages"]) == ["heads", "router"] and results["source"] == str(source)


def test_experts_heads_and_router_are_one_run(train, colours, tmp_path, monkeypatch, capsys):
    flags = ["--loss", "balpoe", "--epochs", "1", "--router-epochs", "1"]
    late = [*flags, "--decouple", "balanced_softmax", "--decouple-epochs", "2", "--decouple-batch-size", "16"]
    plain, reference, stopped = (tmp_path / name for name in ("plain", "reference", "stopped"))
    assert train(flags_of(colours, plain, *flags, "--stage", "experts")) == 0
    assert train(flags_of(colours, reference, *late)) == 0
    results = RunFolder(reference).results()["stages"]
    assert list(results) == ["experts", "heads", "router"] and results["heads"]["epochs"] == 2
    ensemble = RunFolder(plain).results()["stages"]["experts"]
    assert results["experts"]["per_class"] == ensemble["per_class"]
    capsys.readouterr()
    main(["evaluate", "--model", str(reference), "--json", "--threads", "1"])
    assert json.loads(capsys.readouterr().out)["per_class"] == results["heads"]["per_class"]
    ours, theirs = RunFolder(reference).state().model, RunFolder(plain).state().model
    assert not any("affine" in name for name in ours)  # new heads for one prior: nothing to align
    for name in (name for name in ours if "conv" in name):
        assert torch.equal(ours[name], theirs[name]), name
    with monkeypatch.context() as patched:
        stop_after_epoch(patched, "heads")
        assert train(flags_of(colours, stopped, *late)) == 143
    assert train(["--output", stopped, "--resume", "--threads", "1"]) == 0
    assert rows_of(stopped) == rows_of(reference)
    assert (stopped / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


def test_experts_are_prior_aligned_exactly_once(train, colours, tmp_path, monkeypatch, capsys):
    def heads(folder):
        state = RunFolder(folder).state().model
        return [state[f"experts.{e}.fc.affine.bias"] for e in (0, 1)]

    flags = ["--loss", "balpoe", "--epochs", "2", "--router-epochs", "2"]
    run, router, tuned = (tmp_path / name for name in ("run", "router", "tuned"))
    assert train(flags_of(colours, run, *flags)) == 0
    log_prior = torch.tensor([30 / 54, 16 / 54, 8 / 54]).log()  # taus 0 and 2
    torch.testing.assert_close(heads(run), [-log_prior, log_prior])
    assert train(flags_of(colours, router, *flags, "--stage", "router", "--from", run)) == 0
    torch.testing.assert_close(heads(router), [-log_prior, log_prior])
    more = ["--stage", "experts", "--from", run, "--lr", "1e-6"]
    assert train(flags_of(colours, tuned, *flags, *more)) == 0  # alignment is undone before and repeated after
    for found, aligned in zip(heads(tuned), heads(run), strict=True):
        torch.testing.assert_close(found, aligned, rtol=0, atol=1e-3)
    for stage, epoch in (("experts", 2), ("router", 1)):  # interrupted before and after alignment
        stopped = tmp_path / f"stopped_{stage}"
        with monkeypatch.context() as patched:
            stop_after_epoch(patched, stage, epoch)
            assert train(flags_of(colours, stopped, *flags)) == 143
        assert train(["--output", stopped, "--resume", "--threads", "1"]) == 0
        assert (stopped / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    capsys.readouterr()
    main(["evaluate", "--model", str(run), "--json", "--threads", "1"])
    measured, stated = json.loads(capsys.readouterr().out), RunFolder(run).results()["stages"]["experts"]
    assert [measured[key] for key in ("per_class", "experts")] == [stated[key] for key in ("per_class", "experts")]


@pytest.mark.parametrize(
    "more",
    [
        ["--loss", "balpoe", "--mixup-alpha", "0.4", "--cutmix-alpha", "1", "--ema-decay", "0.9"],
        ["--loss", "ce", "--label-smoothing", "0.1", "--auto-augment", "rand-m9-mstd0.5", "--random-erasing", "0.5"],
        ["--loss", "mdcs", "--auto-augment", "original", "--random-erasing", "1"],
        ["--loss", "mutual", "--auto-augment", "cifar10", "--cutout", "8"],
        ["--decouple", "lws", "--decouple-epochs", "2", "--decouple-batch-size", "16"],
    ],
)
def test_methods_resume_bit_identical(train, finished, colours, tmp_path, monkeypatch, more):
    flags = ["--stage", "experts", "--epochs", "2", *more]
    if "--decouple" in more:
        flags += ["--from", finished[0]]
    reference, stopped = tmp_path / "reference", tmp_path / "stopped"
    assert train(flags_of(colours, reference, *flags)) == 0
    with monkeypatch.context() as patched:
        stop_after_epoch(patched, "heads" if "--decouple" in more else "experts")
        assert train(flags_of(colours, stopped, *flags)) == 143
    assert train(["--output", stopped, "--resume", "--stage", "experts", "--threads", "1"]) == 0
    assert rows_of(stopped) == rows_of(reference)
    assert (stopped / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--loss", "balpoe", "--mixup-alpha", "0.4"], ["erase 0.5 1", "mix"]),
        (["--loss", "mdcs", "--auto-augment", "original"], ["erase 0.5 2"]),
        (["--decouple", "lws", "--decouple-epochs", "1", "--decouple-batch-size", "16"], []),
    ],
)
def test_batch_transforms_of_stage_one(train, finished, colours, tmp_path, monkeypatch, flags, expected):
    """Erase, then mix in every batch, but not for re-balanced heads or the router."""
    done = []

    class Erasing(mixing.Erasing):
        def __init__(self, probability, views=1):
            super().__init__(probability, views)
            self.name = f"erase {probability} {views}"

        def __call__(self, images, targets):
            done.append(self.name)
            before = images.clone()
            erased, targets = super().__call__(images, targets)
            assert torch.equal(erased[: len(targets)], before[: len(targets)]) == (len(erased) > len(targets))
            return erased, targets

    class Mixing(mixing.Mixing):
        def __call__(self, images, targets):
            done.append("mix")
            return super().__call__(images, targets)

    monkeypatch.setattr(mixing, "Erasing", Erasing)
    monkeypatch.setattr(mixing, "Mixing", Mixing)
    source = ["--from", finished[0]] if "--decouple" in flags else []
    flags = [*flags, *source, "--random-erasing", "0.5", "--epochs", "1", "--router-epochs", "1"]
    assert train(flags_of(colours, tmp_path / "run", *flags)) == 0
    assert done[: len(expected)] == expected and len(done) == (done.count(expected[0]) * len(expected) if done else 0)
    assert bool(done) == bool(expected)


def test_ema_is_evaluated_and_saved(train, colours, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(flags_of(colours, output, "--stage", "experts", "--ema-decay", "0.99")) == 0
    state, results = RunFolder(output).state(), RunFolder(output).results()
    plain = tmp_path / "plain"
    assert train(flags_of(colours, plain, "--stage", "experts")) == 0
    ours, last = state.model, RunFolder(plain).state().model
    assert any(not torch.equal(ours[name], value) for name, value in last.items())
    assert [row["loss"] for row in rows_of(output)] == [row["loss"] for row in rows_of(plain)]  # training is the same
    capsys.readouterr()
    main(["evaluate", "--model", str(output), "--json", "--threads", "1"])
    assert json.loads(capsys.readouterr().out)["per_class"] == results["stages"]["experts"]["per_class"]


@pytest.mark.parametrize("begun", [False, True])
def test_ema_warms_up_only_from_scratch(train, finished, colours, tmp_path, monkeypatch, begun):
    decays = []

    class Watched(stages.ModelEmaV3):
        def get_decay(self, step=None):
            decays.append(super().get_decay(step))
            return decays[-1]

    monkeypatch.setattr(stages, "ModelEmaV3", Watched)
    flags = ["--stage", "experts", "--epochs", "2", "--ema-decay", "0.9", *(["--from", finished[0]] if begun else [])]
    assert train(flags_of(colours, tmp_path / "run", *flags)) == 0
    assert len(decays) > 3 and max(decays) <= 0.9
    assert all(decay == 0.9 for decay in decays[2:]) == begun  # timm's first two steps copy the weights


def test_ema_follows_the_optimizer_steps(train, colours, tmp_path, monkeypatch):
    steps = []

    class Watched(stages.ModelEmaV3):
        def update(self, model, step=None):
            steps.append(step)

    monkeypatch.setattr(stages, "ModelEmaV3", Watched)
    flags = ["--stage", "experts", "--ema-decay", "0.9", "--epochs", "3", "--batch-size", "8"]  # 7 batches an epoch
    assert train(flags_of(colours, tmp_path / "run", *flags, "--gradient-accumulation", "3")) == 0
    assert steps == list(range(3 * 3))


def test_teacher_may_be_any_timm_model(train, colours, tmp_path, capsys):
    import timm
    from timm.models._hub import save_for_hf

    fixed = dict(dynamic_img_size=False)  # to its image size, 160
    networks = dict(teacher=("test_resnet", 3, {}), stranger=("test_resnet", 4, {}), blind=("test_resnet", 0, {}))
    for name, (network, num_classes, more) in (networks | dict(large=("test_vit", 3, fixed))).items():
        model = timm.create_model(network, num_classes=num_classes, **more)
        save_for_hf(model, tmp_path / name, model_args=more, safe_serialization=True)
    flags = ["--stage", "experts", "--epochs", "1", "--teacher"]
    assert train(flags_of(colours, tmp_path / "student", *flags, tmp_path / "teacher")) == 0
    assert RunFolder(tmp_path / "student").results()["stages"]["experts"]["all"] > 0
    errors = dict(stranger="has 4 classes, the data 3", blind="has 0 classes, the data 3")
    errors["large"] = "does not take images of 32 x 32 pixels in 3 channels (AssertionError"
    for name, message in errors.items():
        assert train(flags_of(colours, tmp_path / "other", *flags, tmp_path / name)) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_teacher_in_train_mode_on_two_ranks_equals_ghost_batches(train, colours, tmp_path):
    """Two ranks normalise as two ghost batches do, and train mode matters."""
    import timm
    from timm.models._hub import save_for_hf

    torch.manual_seed(5)
    save_for_hf(timm.create_model("test_resnet", num_classes=3), tmp_path / "teacher", safe_serialization=True)

    def flags(name, mode):
        more = ("--stage", "experts", "--epochs", "2", "--drop-rate", "0", "--batch-size", "18", "--lr", "0.01")
        more += ("--teacher", tmp_path / "teacher", "--teacher-mode", mode, "--mixed-precision", "no")
        return flags_of(colours, tmp_path / name, *more)

    run_two_ranks(SCRIPT, *flags("two", "train"))
    assert train([*flags("one", "train"), "--ghost-batch", "9"]) == 0
    assert train([*flags("eval", "eval"), "--ghost-batch", "9"]) == 0
    two, one, other = (RunFolder(tmp_path / name).state().model for name in ("two", "one", "eval"))
    # ReLU near zero amplifies rounding of single weights: compare the norm of all
    apart, by_mode = (
        sum((b[name].double() - a[name].double()).square().sum().item() for name in a) ** 0.5
        for a, b in ((one, two), (one, other))
    )
    assert apart < 0.01 and by_mode > 1


@pytest.mark.parametrize(
    ("model", "lr"),  # ten times the rate amplifies rounding to 1 % of the first model's loss
    [(["test_ride_resnet"], "0.00002"), (["ride", "--backbone", "test_resnet"], "0.0001")],
)
def test_fused_norms_train_like_the_modules(train, uncompiled, colours, tmp_path, model, lr):
    more = ["--stage", "experts", "--model", *model, "--epochs", "2", "--lr", lr]
    more += ["--drop-rate", "0", "--mixed-precision", "no"]
    losses = {}
    for flag in ("--fused-norm", "--no-fused-norm"):
        assert train(flags_of(colours, tmp_path / flag, *more, flag)) == 0
        losses[flag] = [float(row["loss"]) for row in rows_of(tmp_path / flag)]
    first, last = losses["--no-fused-norm"]
    assert last < 0.9 * first  # has learned
    assert losses["--fused-norm"] == pytest.approx(losses["--no-fused-norm"], rel=1e-3)


def test_a_resumed_run_keeps_its_class_weights(train, colours, tmp_path, monkeypatch, capsys):
    """The weights are part of the run: the file is not read again."""
    file, output, reference = tmp_path / "weights.txt", tmp_path / "run", tmp_path / "reference"
    file.write_text("1\n2\n4\n")
    more = ["--stage", "experts", "--loss", "ce", "--epochs", "2", "--class-weights", str(file)]
    assert train(flags_of(colours, reference, *more)) == 0
    with monkeypatch.context() as patched:
        stop_after_epoch(patched)
        assert train(flags_of(colours, output, *more)) == 143
    file.write_text("4\n2\n1\n")
    assert train(["--output", output, "--resume", "--stage", "experts", "--threads", "1"]) == 0
    assert RunFolder(output).results()["class_weights"] == [1, 2, 4]
    assert (reference / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    capsys.readouterr()
    other = flags_of(colours, tmp_path / "other", *more)
    for text, message in (("1\n0\n1\n", "has weight 0, expected one above 0"), ("1\n", "has 1 numbers")):
        file.write_text(text)
        assert train(other) == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_automatic_class_weights_are_those_of_the_images_trained_on(train, colours, tmp_path):
    flags = [
        "--stage",
        "experts",
        "--loss",
        "focal",
        "--epochs",
        "1",
        "--class-weights",
        "auto",
        "--sampler",
        "square_root",
    ]
    assert train(flags_of(colours, tmp_path / "run", *flags)) == 0
    results = RunFolder(tmp_path / "run").results()
    expected = torch.tensor(results["class_counts"]) ** -0.5
    torch.testing.assert_close(torch.tensor(results["class_weights"]), expected / expected.mean())
