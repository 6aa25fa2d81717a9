import json
import re
from pathlib import Path

import pytest
import timm
import torch
from authors_files import authors_state_dict, save, tiny
from safetensors.torch import load_file

from ride_timm import load_legacy
from ride_timm.errors import InputError
from ride_timm.models.legacy import convert_state_dict, infer_architecture, read_state_dict
from ride_timm.training.objectives import RouterObjective

PARITY = Path(__file__).parents[1] / "parity"
MODELS = json.loads((PARITY / "models.json").read_text())
CASES = ["resnet32_1expert", "resnet32_2experts_linear_full", "resnet32_ea_3experts"]


def golden(case: str):
    """Read a golden file as (the authors' state dict, all other tensors)."""
    tensors = load_file(PARITY / f"{case}.safetensors")
    state = {key.removeprefix("state_dict."): v for key, v in tensors.items() if key.startswith("state_dict.")}
    return state, {key: value for key, value in tensors.items() if not key.startswith("state_dict.")}


# The authors' numbers


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_authors(tmp_path, case):
    state, expected = golden(case)
    model = load_legacy(save(tmp_path / "model.pth", state))
    assert not model.training and model.pretrained_cfg["hf_hub_id"] is None  # it is none of our releases
    assert model.num_classes == MODELS[case]["kwargs"]["num_classes"]
    assert model.num_experts == MODELS[case]["kwargs"]["num_experts"]
    with torch.no_grad():
        expert_logits = model.forward_experts(expected["input"])[1]
        output = model(expected["input"])
    if "params" in MODELS[case]:
        assert sum(parameter.numel() for parameter in model.parameters()) == MODELS[case]["params"]
    # The linear heads of this random network reach logits of 2668, where float32 is off by about 1e-3 from float64 in
    # both implementations: the tolerance is relative, one part in a million.
    atol = 1e-6 * expected["output"].abs().max().item() if case == "resnet32_2experts_linear_full" else 1e-5
    names = {"output": output, "train_output": output, "expert_logits": expert_logits}
    compared = [name for name in names if name in expected]
    assert compared
    for name in compared:
        bound = max(atol, 1e-6 * expected[name].abs().max().item()) if atol > 1e-5 else atol
        torch.testing.assert_close(names[name], expected[name], rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_routing_is_the_authors(tmp_path):
    state, expected = golden("resnet32_ea_3experts")
    model = load_legacy(save(tmp_path / "model.pth", state))
    assert model.router.top_choices_num == 30 and model.router.share_expert_help_pred_fc
    with torch.no_grad():
        logits, used = model.forward_routed(expected["input"])
    assert used.tolist() == MODELS["resnet32_ea_3experts"]["experts_used"] == expected["experts_used"][:, 0].tolist()
    torch.testing.assert_close(logits, expected["routed_output"], rtol=0, atol=1e-5)


def test_the_routers_loss_is_the_authors(tmp_path):
    state, expected = golden("resnet32_ea_3experts")
    objective = RouterObjective(load_legacy(save(tmp_path / "model.pth", state)), pos_weight=100)
    result = objective.train()(expected["input"], expected["target"])
    assert result["loss"].item() == pytest.approx(MODELS["resnet32_ea_3experts"]["train_loss"], rel=1e-5)
    torch.testing.assert_close(result["logits"], expected["train_output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_prefixes_of_data_parallel_are_stripped(tmp_path, prefix):
    state, expected = golden("resnet32_1expert")
    bare = {prefix + key: value for key, value in state.items()}
    headless = {prefix + key.removeprefix("backbone."): value for key, value in state.items()}
    for tensors in (bare, headless):
        model = load_legacy(save(tmp_path / "model.pth", tensors))
        torch.testing.assert_close(model(expected["input"]), expected["output"], rtol=0, atol=1e-5)
    torch.save(bare, tmp_path / "naked.pth")  # the bare state dict
    assert load_legacy(tmp_path / "naked.pth").num_experts == 1


# Other architectures, from our own weights under their names


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("ride_resnet10", dict()),
        ("ride_resnet10", dict(num_experts=1, reduce_dimension=False, use_norm=False)),
        ("ride_resnet10", dict(share_layer3=True, num_experts=2, in_chans=1)),
        ("ride_resnet10", dict(router=True, top_choices_num=4, share_expert_help_pred_fc=False, use_norm=False)),
        ("ride_resnet32", dict(layer2_output_dim=20, layer3_output_dim=40, num_experts=6)),
        ("ride_resnet32", dict(router=True, top_choices_num=7)),
    ],
)
def test_models_survive_the_authors_format(tmp_path, name, kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=9, **kwargs)
    x = torch.randn(4, kwargs.get("in_chans", 3), 48, 48)
    with torch.no_grad():
        model.train()(x)  # moves the running statistics
    model.eval()
    back = load_legacy(save(tmp_path / "model.pth", authors_state_dict(model)))
    assert back.pretrained_cfg["architecture"] == name
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(back(x), model(x))
    if model.router is not None:
        assert all(torch.equal(a, b) for a, b in zip(back.forward_routed(x), model.forward_routed(x), strict=True))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("ride_resnet10", dict(num_experts=3)),
        ("ride_resnet50", dict(num_experts=3)),
        ("ride_resnet50", dict(num_experts=1, reduce_dimension=False)),
        ("ride_resnet50", dict(num_experts=1)),
        ("ride_resnet50", dict(num_experts=6, num_classes=8142)),
        ("ride_resnet50", dict(num_experts=3, share_layer3=True)),
        ("ride_resnet50", dict(num_experts=3, router=True, top_choices_num=50)),
        ("ride_resnet101", dict(num_experts=2, use_norm=False)),
        ("ride_resnet152", dict(num_experts=4)),
        ("ride_resnext50", dict(num_experts=3)),
        ("ride_resnext50", dict(num_experts=1, reduce_dimension=False, use_norm=False)),
        ("ride_resnext50", dict(num_experts=2, layer3_output_dim=128, layer4_output_dim=320)),
        ("ride_resnext101", dict(num_experts=3)),
        ("ride_resnext152", dict(num_experts=3, reduce_dimension=False)),
        ("ride_resnet32", dict(num_experts=4, num_classes=100)),
    ],
)
def test_architectures_are_inferred_from_shapes(name, kwargs):
    model = timm.create_model(name, device="meta", **kwargs)
    theirs = authors_state_dict(model)
    inferred, arguments = infer_architecture({key.removeprefix("backbone."): v for key, v in theirs.items()})
    assert inferred == name
    assert {key: arguments.get(key) for key in kwargs} == kwargs
    again = timm.create_model(inferred, device="meta", **arguments)
    converted = convert_state_dict({key.removeprefix("backbone."): v for key, v in theirs.items()}, again)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in converted.items()} == shapes


def test_the_authors_key_names():
    keys = set(authors_state_dict(timm.create_model("ride_resnet50", device="meta", router=True)))
    for key in (
        "conv1.weight",
        "layer2.3.bn3.running_var",
        "layer3s.2.0.downsample.1.num_batches_tracked",
        "layer4s.0.2.conv3.weight",
        "linears.1.weight",
        "expert_help_pred_hidden_fcs.1.bias",
        "expert_help_pred_fc.weight",
    ):
        assert f"backbone.{key}" in keys
    assert set(golden("resnet32_ea_3experts")[0]) == set(
        authors_state_dict(timm.create_model("ride_resnet32", device="meta", router=True))
    )


# Tensors that do not fit


@pytest.mark.parametrize(
    "key",
    [
        "conv1.weight",
        "layer1.0.conv1.weight",
        "layer1.4.bn2.running_mean",
        "layer2s.0.0.conv1.weight",
        "layer2s.1.0.conv1.weight",
        "layer3s.0.0.conv2.weight",
        "layer3s.1.4.conv2.weight",
        "layer3s.0.0.conv1.weight",
        "linears.0.weight",
        "linears.1.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path, key):
    state = tiny()
    del state[f"backbone.{key}"]
    with pytest.raises(InputError) as caught:
        load_legacy(save(tmp_path / "model.pth", state))
    assert key in str(caught.value) and "model.pth" in str(caught.value)


def test_an_extra_tensor_is_named(tmp_path):
    for key in ("backbone.layer1.9.weight", "backbone.layer3s.2.0.conv1.weight", "backbone.linears.0.bias", "fc.bias"):
        with pytest.raises(InputError, match=re.escape(key.removeprefix("backbone."))):
            load_legacy(save(tmp_path / "model.pth", tiny() | {key: torch.zeros(4)}))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("layer1.2.conv1.weight", (16, 16, 1, 1)),
        ("layer2s.1.0.conv1.weight", (32, 16, 3, 3)),
        ("bn1.bias", (17,)),
        ("linears.1.weight", (48, 5)),
        ("linears.0.weight", (48,)),
        ("conv1.weight", ()),
        ("conv1.weight", (16,)),
        ("layer2s.0.0.conv2.weight", ()),
        ("layer1.0.conv2.weight", ()),
    ],
)
def test_a_misshapen_tensor_is_named(tmp_path, key, shape):
    with pytest.raises(InputError) as caught:
        load_legacy(save(tmp_path / "model.pth", tiny() | {f"backbone.{key}": torch.zeros(shape)}))
    assert key in str(caught.value)


def test_a_misshapen_tensor_of_an_imagenet_network_is_named():
    model = timm.create_model("ride_resnext50", device="meta", num_classes=10)
    state = {key.removeprefix("backbone."): value for key, value in authors_state_dict(model).items()}
    for key in ("layer1.0.conv2.weight", "layer3s.0.0.conv3.weight", "linears.0.weight", "conv1.weight"):
        for shape in ((), (3,)):
            with pytest.raises(InputError, match=re.escape(key)):
                damaged = state | {key: torch.empty(shape, device="meta")}
                name, kwargs = infer_architecture(damaged)
                convert_state_dict(damaged, timm.create_model(name, device="meta", **kwargs))


def test_a_network_of_another_depth_is_named():
    model = timm.create_model("ride_resnet10", device="meta")
    state = {key.removeprefix("backbone."): value for key, value in authors_state_dict(model).items()}
    extra = {key.replace("layer1.0.", "layer1.1."): v for key, v in state.items() if key.startswith("layer1.0.")}
    with pytest.raises(InputError, match=r"\(2, 1, 1, 1\) blocks"):
        infer_architecture(state | extra)


def test_many_problems_are_counted(tmp_path):
    state = {key: value for key, value in tiny().items() if "layer1.3" not in key}
    with pytest.raises(InputError, match=r"missing layer1\.3\.conv1\.weight; .* and 7 more"):
        load_legacy(save(tmp_path / "model.pth", state))


def test_read_state_dict_keeps_the_tensors(tmp_path):
    state = tiny()
    read = read_state_dict(save(tmp_path / "model.pth", {f"module.{key}": value for key, value in state.items()}))
    assert {f"backbone.{key}" for key in read} == set(state)
    assert all(torch.equal(value, read[key.removeprefix("backbone.")]) for key, value in state.items())
