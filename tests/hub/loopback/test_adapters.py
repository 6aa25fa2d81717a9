"""Runs with experts as adapters, and merged ones, on a Hub and back."""

import pytest
import timm
import torch
from double import WRITER
from journeys import flags_of
from publish import RELEASE
from release_files import COMMIT
from small_backbones import lively

from ride_timm.cli.main import main
from ride_timm.training import run_folder

pytest.importorskip("peft")


def test_an_adapted_run_and_its_merged_one(train, colours, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "_commit", lambda: COMMIT)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    torch.save(lively("test_convnext").state_dict(), tmp_path / "backbone.pth")
    adapted, merged = tmp_path / "run", tmp_path / "merged"
    flags = flags_of(colours, adapted, "--model", "ride", "--backbone", "test_convnext", "--adapter", "lora")
    flags += ["--backbone-weights", tmp_path / "backbone.pth", "--lr", "0.05", "--epochs", "1", "--router-epochs", "1"]
    assert train([*flags, "--push-to-hub", "alice/ride.adapted"]) == 0
    main(["merge", "--model", str(adapted), "--output", str(merged)])
    assert train(["--output", str(merged), "--resume", "--push-to-hub", "alice/ride.merged"]) == 0

    x = torch.rand(2, 3, 32, 32)
    expected = timm.create_model(f"local-dir:{adapted}", pretrained=True).eval().forward_experts(x)[1]
    for name, has_adapters in (("adapted", True), ("merged", False)):
        repo = hub.repos["model", f"alice/ride.{name}"]
        assert repo.tags == {RELEASE: repo.main}
        model = timm.create_model(f"hf-hub:alice/ride.{name}", pretrained=True, cache_dir=str(tmp_path / "cache"))
        assert model.has_adapters is has_adapters
        torch.testing.assert_close(model.eval().forward_experts(x)[1], expected, rtol=1e-5, atol=1e-5)
        card = hub.content(repo.files()["README.md"]).decode()
        assert ('pip install ".[adapters]"' in card) is has_adapters
