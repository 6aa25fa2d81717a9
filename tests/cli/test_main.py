"""All commands: refusals of unusable models and data, and light imports."""

import json
import shutil
import subprocess
import sys

import pytest
import timm
from commands import CLASSES, output, refusal, run_folder

from ride_timm.cli.main import COMMANDS
from ride_timm.training.run_folder import RunFolder

HEAVY = ("datasets", "accelerate", "thop", "matplotlib", "onnx", "onnxruntime", "torch._inductor.codecache")


def test_help_is_complete_and_imports_nothing_heavy():
    code = f"""
import sys
import timm
theirs = set(sys.modules)  # with torch 2.6, timm imports torch's compiler
from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code
names = [command.__name__.rpartition(".")[2] for command in main.__globals__["COMMANDS"]]
codes = {{exit_code(main, argv) for argv in ([name, "--help"] for name in names)}}
print(codes, [name for name in {HEAVY!r} if name in sys.modules and name not in theirs])
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.stdout.endswith("{0} []\n"), ran.stderr
    assert ran.stdout.count("usage: ") == len(COMMANDS) == ran.stdout.count("--json") / 2


def test_unknown_models(capsys, photos):
    assert "ride_resnet77" in refusal(capsys, "flops", "ride_resnet77")
    assert "resnet18" in refusal(capsys, "flops", "resnet18", "--num-experts", "2")
    for command in (("evaluate", "--dataset", "fashion_lt"), ("predict", photos[0])):
        assert "ride_resnet77" in refusal(capsys, command[0], "--model", "ride_resnet77", *command[1:])


@pytest.mark.parametrize("spec", ["nowhere.pth", "nowhere/run", "local-dir:nowhere"])
def test_missing_files(capsys, tmp_path, monkeypatch, photos, spec):
    monkeypatch.chdir(tmp_path)
    assert "nowhere" in refusal(capsys, "predict", "--model", spec, photos[0])
    assert "nowhere" in refusal(capsys, "evaluate", "--model", spec, "--dataset", "fashion_lt")


def test_not_a_run_folder(capsys, tmp_path, photos):
    assert "no config.json" in refusal(capsys, "predict", "--model", tmp_path, photos[0])
    assert "no config.json" in refusal(capsys, "evaluate", "--model", tmp_path, "--dataset", "fashion_lt")


def test_a_damaged_run_folder(capsys, tmp_path, run, photos):
    for name, content in (("model.safetensors", b"short"), ("config.json", b"{")):
        broken = tmp_path / name
        shutil.copytree(run, broken)
        (broken / name).write_bytes(content)
        assert str(broken) in refusal(capsys, "predict", "--model", broken, photos[0])


def test_a_file_that_is_no_checkpoint(capsys, tmp_path, photos):
    (tmp_path / "model.pth").write_text("hello")
    message = refusal(capsys, "predict", "--model", tmp_path / "model.pth", photos[0])
    assert "not a readable torch checkpoint" in message


def test_routed_without_a_router(capsys, tmp_path, photos):
    plain = run_folder(tmp_path, router=False)
    for command in (("evaluate",), ("predict", photos[0])):
        assert "has no router" in refusal(capsys, command[0], "--model", plain, "--routed", *command[1:])


def test_unknown_data(capsys, tmp_path, run):
    missing = tmp_path / "nowhere"
    assert str(missing) in refusal(capsys, "evaluate", "--model", run, "--dataset", missing)
    assert str(missing) in refusal(capsys, "datasets", "show", missing)
    assert "no-such-data" in refusal(capsys, "datasets", "check", "no-such-data")
    assert "no-such-recipe" in refusal(capsys, "evaluate", "--model", run, "--recipe", "no-such-recipe")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refusal(capsys, "datasets", "show", tmp_path / "empty")


@pytest.mark.parametrize("argv", [(), ("train",), ("predict", "--model", "x"), ("evaluate",)])
def test_incomplete_commands(capsys, argv):
    refusal(capsys, *argv)


def test_a_path_without_a_model(capsys, photos, tmp_path):
    missing = str(tmp_path / "mien")
    for argv in (("predict", photos[0]), ("evaluate",), ("export", "--output", tmp_path / "new")):
        message = refusal(capsys, argv[0], "--model", missing, *argv[1:])
        assert f"model '{missing}': no such folder or file (for a Hub repository write hf-hub:owner/name)" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--threshold", "0.9"), "pass --routed as well, or leave --threshold out"),
        (("--routed", "--threshold", "50"), "expected a probability between 0 and 1"),
        (("--routed", "--threshold", "nan"), "expected a probability between 0 and 1"),
    ],
)
def test_a_threshold_needs_a_router_and_a_range(capsys, run, photos, flags, message):
    assert message in refusal(capsys, "predict", "--model", run, photos[0], *flags)
    if "--routed" in flags:
        exported = ("export", "--model", run, "--output", run / "new", "--routed", "masked", *flags[1:])
        assert message in refusal(capsys, *exported)
    if "nan" not in flags:
        refused = refusal(capsys, "evaluate", "--model", run, "--dataset", "fashion_lt", *flags)
        assert message in refused or "threshold='50'" in refused


def test_images_that_a_network_does_not_take(capsys, photos, tmp_path):
    for name, model in (
        ("grey", timm.create_model("test_ride_resnet", num_classes=10, in_chans=1)),
        ("patches", timm.create_model("ride", backbone="test_vit", num_classes=10, num_experts=2)),
    ):
        (tmp_path / name).mkdir()
        RunFolder(tmp_path / name).export(model, dict(input_size=(model.in_chans, 160, 160)), CLASSES)
    grey, patches = tmp_path / "grey", tmp_path / "patches"
    found = json.loads(output(capsys, "predict", "--model", grey, *photos, "--json"))
    assert [row["image"] for row in found] == photos
    data = ("--dataset", "fashion_lt")
    assert "160 x 160 pixels in 3 channels" in refusal(capsys, "evaluate", "--model", grey, *data)
    small = refusal(capsys, "evaluate", "--model", patches, *data, "--input-size", "28")
    assert "28 x 28 pixels in 3 channels" in small
    size = ("--input-size", "100")
    assert "100 x 100 pixels" in refusal(capsys, "flops", "ride", "--backbone", "test_vit", *size)
    message = refusal(capsys, "export", "--model", patches, "--output", tmp_path / "onnx", *size)
    assert "100 x 100 pixels" in message and not (tmp_path / "onnx").exists()
