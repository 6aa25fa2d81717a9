"""Initial weights of RIDE on a backbone, and files without weights."""

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from small_backbones import FEW, build, images, lively, weights_of
from torch import nn

from ride_timm.training.run_folder import RunFolder


@pytest.mark.parametrize("backbone", FEW)
def test_experts_start_from_the_backbone_and_differ_by_their_heads(backbone, tmp_path):
    net, file = lively(backbone), tmp_path / "backbone.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in net.state_dict().items()}, file)
    model = build(backbone, backbone_pretrained=str(file))
    expected = weights_of(net, model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]) is (".fc." not in key or ("bias" in key and not value.any())), key
    first, *rest = model.get_classifier()
    assert all(not torch.equal(first.weight, other.weight) for other in rest)
    assert model._model_args["backbone"] == backbone


def test_without_weights_experts_differ():
    model = build("test_vit")
    for key, first in model.experts[0].named_parameters():
        if first.ndim > 1:
            assert all(not torch.equal(first, dict(e.named_parameters())[key]) for e in model.experts[1:]), key


def test_weights_for_other_channels_are_adapted(tmp_path):
    net, file = lively("test_resnet"), tmp_path / "backbone.safetensors"
    safetensors.torch.save_file(net.state_dict(), file)
    model = build("test_resnet", backbone_pretrained=str(file), in_chans=1)
    torch.testing.assert_close(model.trunk.net.conv1[0].weight, net.conv1[0].weight.sum(1, keepdim=True))


def test_a_saved_network_needs_no_backbone_weights(tmp_path):
    net, file = lively("test_resnet"), tmp_path / "backbone.safetensors"
    safetensors.torch.save_file(net.state_dict(), file)
    model = build("test_resnet", backbone_pretrained=str(file), split="layer4").eval()
    cfg = model.pretrained_cfg
    RunFolder(tmp_path / "run").path.mkdir()
    RunFolder(tmp_path / "run").export(model, dict(input_size=cfg["input_size"]), ())
    Path(file).unlink()
    again = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    x = images("test_resnet")
    assert torch.equal(again(x), model(x)) and not isinstance(again.experts[0].stages.net.layer4, nn.Identity)


def test_weights_of_another_width_are_refused(tmp_path):
    file = tmp_path / "narrow.safetensors"
    safetensors.torch.save_file(lively("test_vit").state_dict(), file)
    with pytest.raises(ValueError, match=r"backbone='test_vit': its weights in .*narrow.* do not fit: size mismatch"):
        timm.create_model("ride", backbone="test_vit", embed_dim=96, backbone_pretrained=str(file))


class Evil:
    """Writes a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["empty.pth", "evil.pth", "evil_checkpoint.pth", "noise.safetensors"])
def test_files_that_hold_no_weights_are_refused(name, tmp_path):
    file, marker = tmp_path / name, tmp_path / "executed"
    if name == "evil_checkpoint.pth":
        torch.save(dict(state_dict={}, args=Evil(marker)), file)
    else:
        file.write_bytes(dict(empty=b"", evil=pickle.dumps(Evil(marker)), noise=b"noise")[file.stem])
    marker.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=rf"backbone='test_vit': its weights in .*{name} could not be loaded"):
        timm.create_model("ride", backbone="test_vit", backbone_pretrained=str(file))
    assert not marker.exists()
