"""Every registered name meets timm's contract.

Small networks here, full size with RIDE_TIMM_FULL_SIZE=1.
"""

import copy
import os

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_input_data_config
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, param_groups_weight_decay

import ride_timm  # noqa: F401  (registers the models)
from ride_timm.inference.export import export
from ride_timm.losses import make_loss
from ride_timm.models import Ride
from ride_timm.training.objectives import ExpertsObjective
from ride_timm.training.recipe import load_recipe
from ride_timm.training.run_folder import RunFolder

SWIN = dict(img_size=64, window_size=4, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4))
# name: (image size, arguments that make it small)
SMALL = {
    "test_ride_resnet": (64, {}),
    "ride_resnet32": (32, {}),
    "ride_resnext50": (64, dict(layers=(1, 1, 1, 1))),
    "ride": (64, dict(backbone="test_resnet")),
    "ride_swin_tiny": (64, SWIN),
    "ride_swin_small": (64, dict(SWIN, depths=(1, 1, 1, 1))),
    "ride_convnext_tiny": (64, dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))),
    "ride_vit_small_patch16_224": (64, dict(img_size=64, embed_dim=48, depth=6, num_heads=2)),
}
FULL = {name: (timm.get_pretrained_cfg(name).input_size[-1], {}) for name in timm.list_models("ride*")}
NAMES = FULL if os.environ.get("RIDE_TIMM_FULL_SIZE") else SMALL
IMAGENET_LT = {
    "ride_swin_tiny": "imagenet_lt_swin_tiny",
    "ride_swin_small": "imagenet_lt_swin_small",
    "ride_convnext_tiny": "imagenet_lt_convnext_tiny",
    "ride_vit_small_patch16_224": "imagenet_lt_vit_small",
}
TRANSFORMERS = ("ride_swin_tiny", "ride_swin_small", "ride_vit_small_patch16_224")


def build(name, **kwargs) -> Ride:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 7, **NAMES[name][1], **kwargs}).eval()


def images(name, B=2, in_chans=3, seed=1):
    side = NAMES[name][0]
    return torch.randn(B, in_chans, side, side, generator=torch.Generator().manual_seed(seed))


every_name = pytest.mark.parametrize("name", NAMES)


@torch.no_grad()
@every_name
def test_features_no_classes_channels_and_pooling(name):
    x, model = images(name), build(name)
    features = timm.create_model(name, features_only=True, **NAMES[name][1]).eval()
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels()
    assert [NAMES[name][0] // m.shape[2] for m in maps] == features.feature_info.reduction()
    width = model.head_hidden_size
    assert build(name, num_classes=0)(x).shape == (2, width)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, width)
    assert build(name, in_chans=1)(x[:, :1]).shape == (2, 7)
    other = build(name, global_pool="max")
    other.load_state_dict(model.state_dict(), strict=False)  # a ViT's norm moves with its pooling
    assert other(x).shape == (2, 7) and not torch.equal(other(x), model(x))
    other.reset_classifier(5, "avg")
    assert other(x).shape == (2, 5)
    with pytest.raises((ValueError, AssertionError), match=r"[Pp]ool"):
        build(name, global_pool="nonsense")


@torch.no_grad()
@pytest.mark.parametrize("size", [160, 288])
@every_name
def test_other_sizes_through_timms_scripts(name, size):
    small = {key: value for key, value in NAMES[name][1].items() if key != "img_size"}
    model = timm.create_model(**resolve_model_input_args(name, dict(img_size=size), num_classes=7, **small)).eval()
    config = resolve_input_data_config(model, dict(img_size=size))
    assert config["input_size"] == (3, size, size)
    if name != "ride_resnet32" or size == 160:  # made for 32
        assert model(torch.randn(1, *config["input_size"])).shape == (1, 7)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if name in TRANSFORMERS])
def test_saved_weights_serve_other_sizes(name, tmp_path):
    model = build(name)
    RunFolder(tmp_path).export(model, dict(input_size=(3, NAMES[name][0], NAMES[name][0])), tuple("abcdefg"))
    other = dict(img_size=96, window_size=6) if "swin" in name else dict(img_size=96)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **other).eval()
    assert again(torch.randn(1, 3, 96, 96)).shape == (1, 7)
    saved, shown = model.state_dict(), again.state_dict()
    resampled = [key for key in saved if saved[key].shape != shown[key].shape]
    assert resampled and all("pos_embed" in key or "relative_position_bias" in key for key in resampled)
    assert all(torch.equal(saved[key], shown[key]) for key in saved if key not in resampled)
    # resampling keeps a constant
    constant = {key: torch.full_like(value, 0.5) if key in resampled else value for key, value in saved.items()}
    model.load_state_dict(constant)
    RunFolder(tmp_path).export(model, dict(input_size=(3, NAMES[name][0], NAMES[name][0])), tuple("abcdefg"))
    shown = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **other).state_dict()
    for key in resampled:
        torch.testing.assert_close(shown[key], torch.full_like(shown[key], 0.5))


@every_name
def test_dropout_and_checkpointing(name):
    model, x = build(name, drop_rate=0.5).double(), images(name).double()
    saving = copy.deepcopy(model)
    saving.set_grad_checkpointing()
    assert model.drop_rate == 0.5
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
    outputs = []
    for net in (model, saving):
        torch.manual_seed(2)
        outputs.append(net.train()(x))
        F.cross_entropy(outputs[-1], torch.tensor([0, 1])).backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    for (key, ours), theirs in zip(saving.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-9, msg=key)
    assert not torch.equal(model(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if name != "ride_swin_small" or NAMES is FULL])  # as tiny
def test_compile_export_bfloat16_and_channels_last(name):
    model, x = build(name, num_experts=2), images(name)
    expected = model(x)
    torch._dynamo.reset()  # networks of other tests count towards its limit
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-4)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.contiguous(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-3)
    scale = expected.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(x) - expected).abs().max() < 0.1 * scale
    low = model.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16 and (low - expected).abs().max() < 0.1 * scale


# ResNets and the other kinds: tests/inference/test_export.py
ONNX = [("ride_convnext_tiny", "none"), ("ride_swin_tiny", "masked"), ("ride_vit_small_patch16_224", "masked")]
if NAMES is FULL:
    ONNX = [(name, kind) for name in NAMES for kind in ("none", "masked")]


@torch.no_grad()
@pytest.mark.parametrize(("name", "kind"), ONNX)
def test_onnx(name, kind, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = build(name, num_experts=2, router=kind == "masked"), images(name, B=5)
    inputs = dict(images=x.numpy())
    if kind == "masked":
        for hidden in model.router.hidden:
            hidden.weight.normal_(0, 2)
        gates = model.router(*model.forward_experts(x))[:, 0].sigmoid().sort().values
        gap = gates.diff().argmax()
        inputs["threshold"] = gates[gap : gap + 2].mean().numpy()  # some samples continue, none is close to it
    folder = export(model, tmp_path / "onnx", kind, size=NAMES[name][0])
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    logits, *used = session.run(None, inputs)
    if kind == "masked":
        expected, expected_used = model.forward_routed(x, float(inputs["threshold"]))
        assert used[0].tolist() == expected_used.tolist() and len(set(used[0].tolist())) > 1
    else:
        expected = model(x)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if name in IMAGENET_LT])
def test_the_recipe_for_imagenet_lt_trains(name):
    recipe = load_recipe(IMAGENET_LT[name])
    assert recipe.model == name and recipe.dataset == "imagenet_lt" and recipe.additional_diversity_factor == -0.2
    model = build(name, **recipe.model_args)
    objective = ExpertsObjective(model, make_loss(recipe.loss, [40, 30, 20, 9, 5, 3, 2], **recipe.loss_args))
    stage = recipe.stage("experts")
    exempt = {f"model.{key}" for key in model.no_weight_decay()}
    groups = param_groups_weight_decay(objective, stage.weight_decay, exempt)
    optimizer = create_optimizer_v2(groups, opt=stage.optimizer, lr=stage.lr_at(0), weight_decay=stage.weight_decay)
    before = {key: value.clone() for key, value in model.named_parameters()}
    for epoch in (1, recipe.reweight_epoch + 1):  # before and after re-weighting
        objective.train().set_epoch(epoch)
        optimizer.zero_grad()
        loss = objective(images(name, B=4), torch.tensor([0, 1, 5, 6]))["loss"]
        loss.backward()
        assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    moved = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert any(key.startswith("trunk") for key in moved)
    assert all(any(key.startswith(f"experts.{i}.") for key in moved) for i in range(recipe.num_experts))
