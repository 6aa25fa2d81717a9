import copy
import functools
import json

import pytest
import timm
import torch
from torch import nn

from ride_timm.cli.main import main
from ride_timm.cli.process import exit_code
from ride_timm.errors import InputError
from ride_timm.evaluation.evaluate import predictor
from ride_timm.inference import options as inference
from ride_timm.inference.options import Inference, Timed, fuse_conv_bn, prepare
from ride_timm.training.recipe import load_recipe
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.state import TrainingState


def build(name="test_ride_resnet", **kwargs):
    """Untrained, but with BatchNorms that have seen something."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 7, "router": True, **kwargs}).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


@pytest.fixture(scope="module")
def model():
    return build(num_experts=2)


@pytest.fixture(scope="module")
def images():
    return torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def middle_threshold(model, images):
    """A threshold that some samples pass, far from all gates."""
    with torch.no_grad():
        gates = model.router(*model.forward_experts(images))[:, 0].sigmoid().sort().values
    gaps = gates[3:7].diff()
    k = 3 + int(gaps.argmax())
    return float((gates[k] + gates[k + 1]) / 2)


@pytest.mark.parametrize("name", ["test_ride_resnet", "ride_resnet32", "ride_resnet10"])
def test_fused_networks_are_equal(name, images):
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    fused = fuse_conv_bn(model.train())
    assert model.training and not fused.training
    model.eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.no_grad():
        torch.testing.assert_close(fused(images), model(images), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(fused.forward_experts(images), model.forward_experts(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_fused_bottlenecks_and_downsampling():
    from timm.models.resnet import ResNet

    net = ResNet(timm.models.resnet.Bottleneck, (1, 1, 1, 1), cardinality=4, base_width=8, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    fused = fuse_conv_bn(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)


def test_only_a_batchnorm_right_after_a_convolution_is_fused():
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3)  # of other channels: it stands before
            self.conv2, self.bn2 = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)
            self.parts = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3))

    with pytest.raises(InputError, match="no BatchNorm right after"):
        fuse_conv_bn(Norms())


@pytest.mark.parametrize("routed", [False, True])
def test_default_predictions_are_the_models_own(model, images, routed):
    with torch.no_grad():
        expected, used = predictor(model, routed, 0.4)(images)
        logits, own = prepare(model, Inference(), routed, 0.4)(images)
    assert torch.equal(logits, expected) and (torch.equal(own, used) if routed else own is None and used is None)


@pytest.mark.parametrize("options", [dict(fuse=True), dict(runtime="onnx"), dict(compile=True), dict(precision="bf16")])
@pytest.mark.parametrize("routed", [False, True])
def test_faster_predictions_are_equal(monkeypatch, model, images, options, routed):
    if "runtime" in options:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(name)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # inductor takes a minute
    threshold = middle_threshold(model, images)
    atol = 0.3 if "precision" in options else 1e-4  # logits are cosines times 30
    with torch.inference_mode():
        expected, expected_used = predictor(model, routed, threshold)(images)
        predict = prepare(model, Inference(**options), routed, threshold, 32)
        for batch in (slice(0, 9), slice(0, 1), slice(2, 7)):
            logits, used = predict(images[batch])
            assert logits.dtype == torch.float32 and logits.shape == (len(images[batch]), 7)
            if routed:
                assert "precision" in options or torch.equal(used, expected_used[batch])
            else:
                assert used is None
            if not (routed and "precision" in options):
                torch.testing.assert_close(logits, expected[batch], rtol=1e-4, atol=atol)
    assert type(model.trunk).__name__ == "Stages" and "forward" not in vars(model.experts[0])


def test_options_that_do_not_go_together(monkeypatch):
    for options in (dict(compile=True), dict(precision="bf16")):
        with pytest.raises(InputError, match="leave out --compile and --precision"):
            Inference(runtime="onnx", **options).check()
    monkeypatch.setattr(inference, "find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(InputError, match="pip install onnxruntime"):
        Inference(runtime="onnx").check()
    monkeypatch.setattr(inference, "has_compiler", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="C\\+\\+ compiler"):
        Inference(compile=True).check()


def test_a_slow_bf16_is_noticed(monkeypatch, capsys):
    monkeypatch.setattr(inference, "bf16_pays", lambda: False)
    Inference(precision="bf16").check()
    assert "bf16 is not faster" in capsys.readouterr().err


def test_the_stopwatch_leaves_out_the_first_call_of_each_size():
    timed = Timed(lambda images: (images, None))
    timed.calls = [(10, 100.0), (10, 2.0), (10, 3.0), (6, 50.0)]
    assert timed.images_per_second == 4
    timed.calls = [(10, 100.0)]
    assert timed.images_per_second == 0.1


# the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory, colours):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    folder.begin(load_recipe("fashion_lt").override(dict(dataset=str(colours), imb_type="none")), TrainingState())
    config = dict(input_size=(3, 28, 28), mean=(0.286,) * 3, std=(0.353,) * 3, crop_pct=1.0, interpolation="bilinear")
    folder.export(build("ride_resnet32", num_classes=3, top_choices_num=3), config, ("a", "b", "c"))
    return str(folder.path)


def test_time_is_reported_when_asked(capsys, run):
    assert exit_code(main, ["evaluate", "--model", run, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert exit_code(main, ["evaluate", "--model", run, "--json", "--time"]) == 0
    timed = json.loads(capsys.readouterr().out)
    assert timed.pop("images_per_second") > 0 and timed.pop("inference") == "torch, fp32" and timed == plain
    assert exit_code(main, ["evaluate", "--model", run, "--fuse", "--time"]) == 0
    text = capsys.readouterr().out
    assert "images/s (torch, fp32, fuse;" in text and f"{plain['correct']} of 30" in text


def test_predict_takes_the_same_options(capsys, run, colours):
    image = str(next((colours / "test").rglob("*.png")))
    found = []
    for flags in ((), ("--fuse",), ("--fuse", "--routed", "--threshold", "0")):
        assert exit_code(main, ["predict", "--model", run, image, "--json", *flags]) == 0
        found.append(json.loads(capsys.readouterr().out)[0])
    assert found[2]["experts_used"] == 3
    for row in found[1:]:
        assert row["index"] == found[0]["index"]
        assert row["probability"] == pytest.approx(found[0]["probability"], abs=1e-4)


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_bad_options_end_in_exit_code_2(capsys, run, command):
    files = ["nowhere.png"] if command == "predict" else []
    assert exit_code(main, [command, "--model", run, *files, "--runtime", "onnx", "--precision", "bf16"]) == 2
    assert "leave out --compile and --precision" in capsys.readouterr().err
    assert exit_code(main, [command, "--model", run, *files, "--precision", "int8"]) == 2
