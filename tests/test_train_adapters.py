"""End-to-end runs with experts as adapters of a frozen backbone."""

import json

import pytest
import safetensors.torch
import timm
import torch
from journeys import flags_of, rows_of, stop_after_epoch
from small_backbones import lively

from ride_timm.cli.main import main
from ride_timm.training.run_folder import RunFolder

pytest.importorskip("peft")

FC1 = "stages.3.blocks.0.mlp.fc1.weight"


@pytest.fixture
def weights(tmp_path):
    """A file that stands for the backbone's published weights."""
    torch.save(lively("test_convnext").state_dict(), tmp_path / "backbone.pth")
    return tmp_path / "backbone.pth"


def flags_for(colours, output, *more):
    flags = flags_of(colours, output, "--model", "ride", "--backbone", "test_convnext", "--adapter", "lora")
    return [*flags, "--adapter-rank", "2", "--epochs", "2", "--lr", "0.05", "--ema-decay", "0.9", *more]


def test_train_kill_resume_route_and_evaluate(train, colours, weights, tmp_path, monkeypatch, capsys):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    selected = ["--backbone-weights", weights, "--holdout", "0.2", "--select", "best", "--eval-every", "1"]
    assert train(flags_for(colours, whole, *selected)) == 0
    for of in ("experts", "router"):
        with monkeypatch.context() as patched:
            stop_after_epoch(patched, of)
            resume = ["--output", torn, "--resume", "--threads", "1"]
            assert train(flags_for(colours, torn, *selected) if of == "experts" else resume) == 143
    state = RunFolder(torn).state()
    assert not any(name.startswith("trunk.") or "base_layer" in name for name in state.model)

    original = torch.load(weights)
    torch.save(original | {FC1: original[FC1] + 1}, weights)
    assert train(resume) == 2
    assert f"began with {state.frozen}: restore the backbone's weights" in capsys.readouterr().err
    torch.save(original, weights)
    assert train(resume) == 0
    assert (torn / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert rows_of(torn) == rows_of(whole)

    tensors = safetensors.torch.load_file(whole / "model.safetensors")
    frozen = tensors[f"experts.0.stages.net.{FC1}".replace(".weight", ".base_layer.weight")]
    assert torch.equal(frozen, original[FC1])  # under EMA, too
    assert any(value.any() for name, value in tensors.items() if ".lora_B." in name)
    capsys.readouterr()
    main(["evaluate", "--model", str(whole), "--routed", "--json", "--threads", "1"])
    found, stored = json.loads(capsys.readouterr().out), RunFolder(whole).results()["stages"]["router"]
    assert {key: found[key] for key in stored.keys() - {"epochs", "threshold"}}.items() <= stored.items()
    assert timm.create_model(f"local-dir:{whole}", pretrained=True).has_adapters


def test_a_resumed_run_reads_its_source_again(train, colours, weights, tmp_path, monkeypatch):
    stage = ["--stage", "experts"]
    assert train(flags_for(colours, tmp_path / "first", *stage, "--backbone-weights", weights)) == 0
    flags = flags_for(colours, tmp_path / "second", *stage, "--from", tmp_path / "first")
    with monkeypatch.context() as patched:
        stop_after_epoch(patched)
        assert train(flags) == 143
    assert train([*flags, "--resume"]) == 0
    first, second = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    same = {name for name, value in first.items() if torch.equal(value, second[name])}
    assert same == timm.create_model(f"local-dir:{tmp_path / 'second'}").frozen_names()
