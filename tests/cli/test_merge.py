import dataclasses
import json

import pytest
import timm
import torch
from commands import output, refusal, run_folder
from release_files import set_json
from small_backbones import build, images

from ride_timm.inference.export import export
from ride_timm.training.recipe import Recipe
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.state import TrainingState

pytest.importorskip("peft")

BACKBONE = "test_vit"
CLASSES = tuple("abcdefg")


@pytest.fixture
def adapted(tmp_path):
    """A finished run whose updates change the logits."""
    torch.manual_seed(0)
    model = build(BACKBONE, adapter="lora", router=True, top_choices_num=3).eval()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    run = RunFolder(tmp_path / "adapted")
    recipe = Recipe(model="ride", backbone=BACKBONE, adapter="lora", threshold=0.4)
    run.begin(recipe, TrainingState())
    run.export(model, dict(input_size=(3, 160, 160), mean=(0.5,) * 3, std=(0.2,) * 3, crop_pct=0.9), CLASSES)
    run.write_results(recipe, torch.device("cpu"), {"experts": dict(all=50.0, macs=10**9)})
    of_a_release = dict(network=dict(macs=10**9), routing=dict(curve=[]), examples=[dict(file="example_head.png")])
    set_json(run.path / "results.json", **of_a_release)
    return run.path


@torch.no_grad()
def test_a_merged_run_is_an_ordinary_one(adapted, tmp_path, capsys):
    written = json.loads(output(capsys, "merge", "--model", adapted, "--output", tmp_path / "new" / "merged", "--json"))
    folder = tmp_path / "new" / "merged"
    assert written["folder"] == str(folder) and [path.name for path in (tmp_path / "new").iterdir()] == ["merged"]
    assert written["files"].keys() == {"config.json", "model.safetensors", "recipe.yaml", "results.json"}
    model = timm.create_model(f"local-dir:{adapted}", pretrained=True).eval()
    merged = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images(BACKBONE, 3)
    torch.testing.assert_close(merged.forward_experts(x)[1], model.forward_experts(x)[1], rtol=1e-5, atol=1e-5)
    assert not merged.has_adapters and "adapter" not in (folder / "config.json").read_text()
    kept = ("input_size", "mean", "std", "crop_pct", "label_names")
    assert [merged.pretrained_cfg[key] for key in kept] == [model.pretrained_cfg[key] for key in kept]
    before, after = RunFolder(adapted).results(), RunFolder(folder).results()
    assert before.keys() - after.keys() == {"network", "routing", "examples"}  # of the adapters, or not copied
    before = {key: before[key] for key in after}
    macs = after["stages"]["experts"].pop("macs")
    assert 0 < macs < before["stages"]["experts"].pop("macs") and before == after
    assert RunFolder(folder).recipe() == dataclasses.replace(RunFolder(adapted).recipe(), adapter=None)


def test_refusals(adapted, tmp_path, capsys):
    assert "exists: name a new folder" in refusal(capsys, "merge", "--model", adapted, "--output", tmp_path)
    plain, new = run_folder(tmp_path / "plain"), tmp_path / "new"
    assert "has no adapters: it needs no merging" in refusal(capsys, "merge", "--model", plain, "--output", new)
    assert not new.exists()


@torch.no_grad()
@pytest.mark.parametrize("routed", ["none", "driver"])
def test_adapters_are_exported_unmerged(adapted, tmp_path, routed):
    onnxruntime = pytest.importorskip("onnxruntime")
    from ride_timm.inference.onnx_driver import OnnxRouted

    model, x = timm.create_model(f"local-dir:{adapted}", pretrained=True).eval(), images(BACKBONE, 3)
    folder = export(model, tmp_path / "onnx", routed, 0.5, 160)
    if routed == "none":
        session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        (logits,), expected = session.run(None, {"images": x.numpy()}), model(x)
    else:
        logits, expected = OnnxRouted(folder, 0.5)(x.numpy())[0], model.forward_routed(x, 0.5)[0]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
