"""Input that the training script rejects: one error line, nothing lost."""

import re
import shutil

import pytest
import torch
from journeys import flags_of, stop_after_epoch
from small_splits import png, saved, split

from ride_timm import RunError
from ride_timm.training import run_folder
from ride_timm.training.run_folder import RunFolder

SMALL = ["--model", "test_ride_resnet"]  # its last feature map is one pixel

ADAPTED = ["--model", "ride", "--adapter", "lora", "--backbone"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "nope"], r"recipe 'nope'"),
        (["--no-such-flag"], r"unrecognized arguments"),
        (["--epochs", "0"], r"epochs='0'"),
        (["--batch-size", "many"], r"batch_size='many'"),
        (["--num-experts", "0"], r"num_experts='0'"),
        (["--lr", "-1"], r"lr='-1'"),
        (["--seed", "9007199254740993000"], r"seed=.* at most 9007199254740992"),
        (["--imb-factor", "100"], r"0.01 is the imbalance factor 100 of papers"),
        (["--model", "resnet18"], r"not a network with experts"),
        (["--dataset", "/no/such/folder"], r"/no/such/folder"),
        (["--label-column", "genus"], r"no column 'genus'"),
        (["--augment", "sepia"], r"unknown augmentation 'sepia'"),
        (["--optimizer", "hope"], r"optimizer='hope'"),
        (["--optimizer", "adahessian"], r"optimizer='adahessian' does not work here"),
        (["--router-optimizer", "adahessian"], r"optimizer='adahessian' does not work here"),
        (["--resume"], r"nothing to resume: .*run holds no run; pass --output DIR or --recipe NAME\.$"),
        ([*SMALL, "--batch-size", "2477"], r"2478 images in batches of 2477 .processes: 1. leave one image to a step"),
        ([*SMALL, "--batch-size", "3", "--ghost-batch", "2"], r"leave one image to a step or a ghost batch"),
        (["--tracker", "hope"], r"tracker='hope'"),
        (["--mixed-precision", "fp16"], r"fp16 needs a GPU"),
        (["--stage", "router"], r"no stage one to start from"),
        (["--stage", "router", "--num-experts", "1"], r"num_experts=1"),
        (["--from", "/no/such/run"], r"no such folder or file"),
        (["--distillation"], r"--teacher"),
        (
            [*ADAPTED, "test_vit"],
            r"adapter=lora needs pretrained weights: pass --backbone-pretrained, --backbone-",
        ),
        (
            [*ADAPTED, "test_resnet"],
            r"test_resnet has no layers that take a low-rank update; families that have: ",
        ),
        (["--adapter", "lora"], r"model ride_resnet32: it does not take .*'adapter'"),
        (["--gamma", "2"], r"gamma=2 has no effect with loss=ride: leave --gamma out\.$"),
        (["--decouple-lr", "1"], r"decouple_lr=1 has no effect with decouple=none: leave --decouple-lr out"),
        (["--freeze", "backbone", "--freeze-norm"], r"freeze_norm=True has no effect with freeze=backbone, which"),
        (["--adapter-rank", "4"], r"adapter_rank=4 has no effect with adapter=none: leave --adapter-rank out"),
        ([*ADAPTED, "test_vit", "--freeze", "trunk"], r"adapter=lora freezes the backbone itself: leave freeze=trunk"),
        (
            ["--model", "ride", "--backbone", "test_convnext", "--input-size", "64", "--freeze-norm"],
            r"freeze_norm=True: test_convnext has no BatchNorm; leave it out",
        ),
        (["--cutout", "29"], r"cutout=29 covers the whole image of 28 pixels"),
        (["--threads", "0"], r"threads=0"),
        (["--select", "best"], r"--holdout"),
        (["--loss", "hope"], r"loss='hope': expected one of balpoe, .*sade"),
        (["--loss", "balpoe", "--taus", "0", "1", "3"], r"mean of 1.33333: expected 1"),
        (["--loss", "sade", "--num-experts", "2"], r"num_experts=2: loss 'sade' trains 3 experts"),
        (["--loss", "logit_adjustment", "--tau", "-1"], r"tau='-1'"),
        (["--mixup-alpha", "-0.4"], r"mixup_alpha='-0.4'"),
        (["--auto-augment", "hope"], r"auto_augment='hope': expected cifar10, trivial, or timm's name of a policy"),
        (["--decouple", "hope"], r"decouple='hope': expected one of none, crt"),
        (["--decouple", "tau_norm", "--decouple-tau", "nan"], r"decouple_tau='nan'"),
        (["--teacher", "/no/such/run"], r"model ./no/such/run.: no such folder"),
        (["--streaming", "--max-unreadable", "0"], r"max_unreadable=0: the images of a stream cannot be read before"),
        (["--streaming", "--sampler", "progressive"], r"progressive batches of stage experts; leave --sampler or"),
        (["--sampler", "hope"], r"sampler='hope': expected one of instance, class_balanced, square_root, progressive"),
        (["--streaming"], r"stage router; add --no-router-balanced, or train .* --from that run\.$"),
        (["--streaming", "--no-router-balanced"], r"augmentation 'fashion' holds all images in memory; choose another"),
        (["--streaming", "--stage", "router"], r"add --no-router-balanced, or leave --streaming out here\.$"),
        (
            ["--streaming", "--decouple", "crt"],
            r"of stage heads; train the experts with --decouple none, and the heads by",
        ),
    ],
)
def test_bad_input_exits_with_2_and_writes_nothing(train, flags, message, tmp_path, monkeypatch, capsys):
    if "fp16" in flags and torch.cuda.is_available():
        pytest.skip("fp16 is fine on a GPU")
    monkeypatch.chdir(tmp_path)
    assert train([*flags, "--output", tmp_path / "run"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert list(tmp_path.iterdir()) == []


def test_images_of_one_class_are_rejected_before_writing(train, tmp_path, capsys):
    path = saved(tmp_path, train=split([0] * 12, data=[png()] * 12), test=split([0], data=[png()]))
    assert train(flags_of(path, tmp_path / "run")) == 2 and not (tmp_path / "run").exists()
    assert "error: the training images are of one class, '0': expected two or more; --la" in capsys.readouterr().err


def test_checkpoint_of_another_model_is_rejected(train, finished, colours, tmp_path, capsys):
    output, _ = finished
    flags = flags_of(colours, tmp_path / "run", "--from", output)
    flags[flags.index("--num-experts") + 1] = "3"
    assert train(flags) == 2
    assert "holds another model than the recipe's" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_resume_needs_the_state_and_the_initial_weights(train, finished, colours, tmp_path, capsys):
    output = tmp_path / "run"
    flags = flags_of(colours, output, "--stage", "experts", "--epochs", "1")
    assert train([*flags, "--from", finished[0]]) == 0
    assert train([*flags, "--from", tmp_path, "--resume", "--stage", "router"]) == 2
    assert f"the run in {output} began from {finished[0]}; leave --from out" in capsys.readouterr().err
    (output / "state.pt").unlink()
    (output / "state.previous.pt").unlink(missing_ok=True)
    weights = (output / "model.safetensors").read_bytes()
    assert train([*flags, "--resume", "--stage", "both"]) == 2
    assert "holds a run without its state.pt" in capsys.readouterr().err
    assert (output / "model.safetensors").read_bytes() == weights


def test_resume_takes_another_path_to_the_initial_weights(train, finished, colours, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    flags = flags_of(colours, output, "--epochs", "1", "--router-epochs", "1", "--resume")
    assert train([*flags, "--stage", "experts", "--from", finished[0]]) == 0  # --resume may start a run, too
    monkeypatch.chdir(finished[0].parent)
    assert train([*flags, "--stage", "both", "--from", f"{finished[0].name}/"]) == 0
    assert "experts" in RunFolder(output).results()["stages"]


def test_run_without_weights_starts_again(train, colours, tmp_path, capsys):
    output = tmp_path / "run"
    flags = flags_of(colours, output, "--stage", "experts", "--epochs", "1")
    assert train(flags) == 0
    recipe = (output / "recipe.yaml").read_text()
    for path in output.iterdir():
        path.unlink()
    (output / "recipe.yaml").write_text(recipe)
    assert train([*flags, "--resume"]) == 0 and (output / "model.safetensors").is_file()
    assert f"notice: no epoch is finished in {output}; the run starts from the beginning." in capsys.readouterr().err


def test_state_of_another_optimizer_is_rejected(train, colours, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    flags = flags_of(colours, output, "--stage", "experts")
    with monkeypatch.context() as patched:
        stop_after_epoch(patched)
        assert train(flags) != 0
    state = RunFolder(output).state()
    state.optimizer["param_groups"].append(dict(state.optimizer["param_groups"][0], params=[]))
    RunFolder(output).save(state)
    assert train([*flags, "--resume"]) == 2
    assert "the state of the optimizer does not fit" in capsys.readouterr().err


def test_state_of_another_network_is_rejected(train, colours, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after_epoch(patched)
        assert train(flags_of(colours, output, "--stage", "experts")) != 0
    recipe = (output / "recipe.yaml").read_text()
    (output / "recipe.yaml").write_text(recipe.replace("num_experts: 2", "num_experts: 3"))
    assert train(["--output", output, "--resume"]) == 2
    assert "the state is that of another network than the recipe's (Error" in capsys.readouterr().err


def test_a_finished_run_without_its_results_is_rejected(train, finished, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    assert train(["--output", tmp_path / "run", "--resume"]) == 2
    assert "results.json is missing or damaged (FileNotFoundError" in capsys.readouterr().err


def test_resume_on_other_classes_is_rejected(train, colours, tmp_path, capsys):
    output, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(colours, data)
    flags = flags_of(data, output, "--epochs", "1", "--router-epochs", "1")
    assert train([*flags, "--stage", "experts"]) == 0
    shutil.copytree(data / "train" / "class2", data / "train" / "class3")
    assert train([*flags, "--stage", "both", "--resume"]) == 2
    assert "the training data have changed since the run began: 4 classes, 3 then; restore" in capsys.readouterr().err


def test_recipe_not_in_utf8_is_rejected(train, tmp_path, capsys):
    (tmp_path / "own.yaml").write_bytes("name: Käfer".encode("latin-1"))
    assert train(["--recipe", tmp_path / "own.yaml", "--output", tmp_path / "run"]) == 2
    assert "own.yaml is not UTF-8 text." in capsys.readouterr().err


def test_two_views_of_one_image_suffice_for_batch_norm(train, colours, tmp_path):
    flags = ["--stage", "experts", "--epochs", "1", "--batch-size", "53", "--loss", "mdcs", "--num-experts", "3"]
    flags += ["--auto-augment", "rand-m9"]
    assert train(flags_of(colours, tmp_path / "run", *flags)) == 0


def test_run_that_failed_on_a_full_disk_can_start_again(train, colours, tmp_path, monkeypatch):
    output = tmp_path / "run"
    flags = flags_of(colours, output, "--stage", "experts", "--epochs", "1")
    write_text = run_folder.write_text

    def full(path, text):
        if path.name == "recipe.yaml":
            raise RunError("the disk is full")
        write_text(path, text)

    with monkeypatch.context() as patched:
        patched.setattr(run_folder, "write_text", full)
        assert train(flags) == 1
    assert {path.name for path in output.iterdir()} == {"state.pt", ".lock", ".owner"}
    (output / ".recipe.yaml.partial").touch()
    assert train(flags) == 0
    (output / "recipe.yaml").unlink()
    assert train(flags) == 2  # may be the weights of another run


def test_teacher_of_other_classes_is_rejected_before_writing(train, finished, colours, tmp_path, capsys):
    teacher, _ = finished
    flags = ["--dataset", "fashion_lt", "--augment", "fashion", "--teacher", teacher, "--output", tmp_path / "run"]
    assert train([*flags, "--threads", "1"]) == 2
    assert "has 3 classes" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("precision, ways", [("no", "a lower --lr"), ("bf16", "a lower --lr or --mixed-precision no")])
def test_non_finite_loss_reports_its_step_and_keeps_the_checkpoint(train, colours, tmp_path, capsys, precision, ways):
    output = tmp_path / "run"
    flags = flags_of(colours, output, "--stage", "experts", "--warmup-epochs", "0", "--schedule", "constant")
    assert train([*flags, "--lr", "1e30", "--epochs", "50", "--mixed-precision", precision]) == 1
    assert re.search(rf"error: the loss is not finite at epoch \d+, step \d+: try {ways}\.", capsys.readouterr().err)
    state = RunFolder(output).state()
    assert all(torch.isfinite(value).all() for value in state.model.values())


def test_unreadable_images_end_the_run_or_are_left_out(train, colours, tmp_path, monkeypatch, capsys):
    root, output = tmp_path / "images", tmp_path / "run"
    shutil.copytree(colours, root)
    torn = [sorted((root / "train" / f"class{label}").iterdir())[0] for label in (1, 2)]
    for path in torn:
        path.write_bytes(path.read_bytes()[:40])
    flags = flags_of(root, output, "--stage", "experts", "--epochs", "2")
    assert train(flags) == 1
    assert re.search(r"error: .*row 30 of split .train.*class1.*--max-unreadable N", capsys.readouterr().err)
    shutil.rmtree(output)
    assert train([*flags, "--max-unreadable", "1"]) == 2 and not output.exists()
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: max_unreadable=1: unreadable training images, 2: the image")
    assert all(str(path) in error for path in torn) and error.endswith("--max-unreadable 2.")

    with monkeypatch.context() as patched:
        stop_after_epoch(patched)
        assert train([*flags, "--max-unreadable", "2"]) == 143
    shutil.copy(sorted((root / "train" / "class2").iterdir())[1], torn[1])  # the resumed run leaves it out as before
    capsys.readouterr()
    resume = ["--output", output, "--resume", "--stage", "experts", "--threads", "1"]
    content = torn[0].read_bytes()
    torn[0].unlink()  # later images move up one row
    assert train(resume) == 2
    changed = (
        "error: the training data have changed since the run began: class 'class1' has 15 images, 16 then; restore"
    )
    assert capsys.readouterr().err.startswith(changed)
    torn[0].write_bytes(content)
    assert train(resume) == 0
    notices = re.findall("notice: unreadable training images left out, 2: .*", capsys.readouterr().err)
    assert len(notices) == 2 and all(str(path) in notices[-1] for path in torn)
    results = RunFolder(output).results()
    assert results["class_counts"] == [30, 15, 7] and len(results["unreadable"]) == 2

    broken = next((root / "test").rglob("*.png"))
    broken.write_bytes(b"")
    assert train([*flags, "--output", tmp_path / "other", "--max-unreadable", "9"]) == 2
    assert "unreadable images in split 'test', which is evaluated, 1; replace or delete" in capsys.readouterr().err
