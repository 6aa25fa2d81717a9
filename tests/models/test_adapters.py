"""Experts as low-rank updates of one frozen backbone."""

from copy import deepcopy
from importlib.util import find_spec

import pytest
import timm
import torch
import torch.nn.functional as F
from small_backbones import build, count, images, lively, native
from timm.models import save_for_hf
from timm.models._manipulate import group_parameters
from torch import nn

from ride_timm import InputError, Ride
from ride_timm.models import adapters
from ride_timm.models.adapters import is_update
from ride_timm.models.cuts import CUTS
from ride_timm.training.run_folder import RunFolder

pytest.importorskip("peft")

ATTENTION, MLP = ["attn.proj", "attn.qkv"], ["mlp.fc1", "mlp.fc2"]
LAYERS = {  # layers that take an update
    "test_vit": ATTENTION + MLP,
    "deit3_small_patch16_224": ATTENTION + MLP,
    "vit_small_patch14_reg4_dinov2": ATTENTION + MLP,
    "eva02_tiny_patch14_224": ATTENTION + MLP,
    "eva02_base_patch14_224": ["attn.k_proj", "attn.proj", "attn.q_proj", "attn.v_proj", "mlp.fc1_g", "mlp.fc1_x"],
    "convnext_atto": MLP,  # its MLP is two 1x1 convolutions
    "convnextv2_atto": MLP,
}
FEW = ["deit3_small_patch16_224", "eva02_tiny_patch14_224", "convnext_atto"]
ONE = "eva02_tiny_patch14_224"  # the family with the most exceptions


def adapted(backbone, **kwargs) -> Ride:
    return build(backbone, **dict(dict(adapter="lora", adapter_rank=2), **kwargs))


def trained(backbone, **kwargs) -> Ride:
    """Updates that change the logits, which small layer scales would hide."""
    model = adapted(backbone, **kwargs).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if is_update(name):
                nn.init.normal_(p, std=0.2)
            elif "gamma" in name:
                nn.init.ones_(p)
    return model


@torch.no_grad()
@pytest.mark.parametrize("backbone", LAYERS)
@pytest.mark.parametrize("use_norm", [False, True], ids=["native", "cosine"])
def test_at_first_the_logits_are_those_without_adapters_bit_for_bit(backbone, use_norm, tmp_path):
    torch.save(lively(backbone).state_dict(), tmp_path / "backbone.pth")
    weights = dict(backbone_pretrained=str(tmp_path / "backbone.pth"), use_norm=use_norm)
    model, plain, x = adapted(backbone, **weights).eval(), build(backbone, **weights).eval(), images(backbone)
    for ours, theirs in zip(model.experts, plain.experts, strict=True):
        theirs.fc.load_state_dict(ours.fc.state_dict())
    assert plain(x).std(0).max() > 1e-3  # the images differ
    assert torch.equal(model(x), plain(x))
    assert torch.equal(model.forward_experts(x)[1], plain.forward_experts(x)[1])


@pytest.mark.parametrize("backbone", LAYERS)
def test_the_updates_of_every_block_and_the_heads_train(backbone):
    model, x = trained(backbone, num_experts=2).train(), images(backbone, 4)
    model.set_grad_checkpointing(True)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {name for name, _ in model.named_parameters() if is_update(name) or ".fc." in native(name)[:15]}
    for i, expert in enumerate(model.experts):
        blocks = {name for name, _ in expert.stages.net.named_modules() if name.endswith((".mlp", ".block.mlp"))}
        blocks = {name.removesuffix(".mlp") for name in blocks}
        at = {f"experts.{i}.stages.net.{block}.{layer}" for block in blocks for layer in LAYERS[backbone]}
        assert blocks and {name.rpartition(".lora_A")[0] for name in learns if ".lora_A" in name} >= at
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    F.cross_entropy(model.forward_experts(x)[1].flatten(0, 1), torch.arange(8) % 7).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == learns


def tensors_once(model) -> bool:
    """No two names of a state dict share memory, and these tensors are all parameters."""
    state = model.state_dict()
    return len({value.data_ptr() for value in state.values()}) == len(state) and {
        value.data_ptr() for value in state.values()
    } >= {p.data_ptr() for p in model.parameters()}


@torch.no_grad()
@pytest.mark.parametrize("backbone", LAYERS)
def test_the_backbone_is_held_once(backbone):
    model, one = adapted(backbone, num_experts=3), adapted(backbone, num_experts=1)
    own = sum(p.numel() for name, p in one.named_parameters() if is_update(name) or ".fc." in name[:14])
    assert count(model) == count(one) + 2 * own
    assert model.state_dict().keys() >= one.state_dict().keys() and tensors_once(model)
    empty = deepcopy(model).to("meta").to_empty(device="cpu")
    for same in (deepcopy(model), deepcopy(model).half(), empty, deepcopy(model).to(memory_format=torch.channels_last)):
        assert count(same) == count(model) and tensors_once(same)
        same.load_state_dict(model.state_dict(), assign=True)
        assert count(same) == count(model) and tensors_once(same)
        if not list(model.buffers()):  # Eva's angles, which a state dict does not have
            assert torch.equal(same.eval()(images(backbone)), model.eval()(images(backbone)))


@torch.no_grad()
@pytest.mark.parametrize("backbone", LAYERS)
def test_merged_is_a_network_without_adapters(backbone, tmp_path):
    model, x = trained(backbone, router=True, top_choices_num=3), images(backbone, 4)
    plain = build(backbone, router=True, top_choices_num=3).eval()
    expected, first = model.forward_experts(x)[1], adapted(backbone).eval().forward_experts(x)[1]
    merged = deepcopy(model).merge_adapters()
    torch.testing.assert_close(merged.forward_experts(x)[1], expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, first, atol=1e-3)
    assert torch.equal(model.forward_experts(x)[1], expected) and model.has_adapters  # the original is as before
    assert all(p.requires_grad for p in merged.parameters()) and not merged.has_adapters
    assert {type(module).__module__.split(".")[0] for module in merged.modules()} <= {"torch", "timm", "ride_timm"}
    plain.load_state_dict(merged.state_dict())
    assert torch.equal(plain.forward_experts(x)[1], merged.forward_experts(x)[1])
    for network, name in ((model, "adapted"), (merged, "merged")):
        save_for_hf(network, str(tmp_path / name), safe_serialization=True)
        again = timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True).eval()
        assert torch.equal(again(x), network(x)) and again.has_adapters == network.has_adapters
        for one, other in zip(again.forward_routed(x), network.forward_routed(x), strict=True):
            assert torch.equal(one, other)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("adapted", "merged")]
    assert sizes[0] < sizes[1] and "adapter" not in (tmp_path / "merged" / "config.json").read_text()


@torch.no_grad()
@pytest.mark.parametrize("backbone", FEW)
def test_compile_export_script_half_and_autocast(backbone):
    model, x = trained(backbone), images(backbone)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()  # networks of other tests count towards its limit
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert model.has_adapters
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.1, atol=0.1)
    torch.testing.assert_close(deepcopy(model).bfloat16()(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)


@torch.no_grad()
@pytest.mark.parametrize("backbone", FEW)
def test_features_groups_and_new_classes(backbone):
    model, merged, x = trained(backbone), trained(backbone).merge_adapters(), images(backbone)
    outputs = [network.forward_intermediates(x) for network in (model, merged)]
    for one, other in zip(*(levels for _, levels in outputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert [m.shape for m in build(backbone, features_only=True, adapter="lora").eval()(x)]
    ours = group_parameters(model, model.group_matcher(), reverse=True)
    theirs = group_parameters(merged, merged.group_matcher(), reverse=True)
    for name, group in ours.items():
        layer = name.partition(".lora_")[0].replace(".base_layer", "").removesuffix(".weight").removesuffix(".bias")
        assert {group} == {theirs[key] for key in theirs if key.startswith(f"{layer}.")} or name in theirs, name
    model.reset_classifier(5)
    assert model(x).shape == (2, 5) and all(
        p.requires_grad for head in model.get_classifier() for p in head.parameters()
    )
    model.reset_classifier(0)
    assert model(x).shape == (2, model.head_hidden_size)


@torch.no_grad()
def test_transformers_loads_a_run_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, x = trained(ONE), images(ONE)
    RunFolder(tmp_path).export(model, dict(input_size=(3, 56, 56)), tuple("abcdefg"))
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(x).logits, model(x)) and count(again) == count(model)


def test_frozen_names_are_those_that_do_not_train():
    model = adapted(ONE)
    state, frozen = model.state_dict(), model.frozen_names()
    parameters = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen & set(dict(model.named_parameters())) == parameters and frozen < state.keys()
    assert build(ONE).frozen_names() == set()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(adapter="dora"), "adapter='dora': expected one of lora"),
        (dict(adapter_rank=0), "adapter_rank=0: expected a whole number, 1 or more"),
        (dict(backbone="test_resnet"), "test_resnet has no layers that take a low-rank update; families that have: "),
        (dict(backbone="test_efficientnet"), ", ".join(name for name, cut in CUTS.items() if cut.adapted)),
    ],
    ids=str,
)
def test_bad_arguments_are_named(values, message):
    arguments = dict(dict(backbone="test_vit", adapter="lora", num_classes=7), **values)
    with pytest.raises(InputError, match=message):
        timm.create_model("ride", **arguments)


def test_without_peft(monkeypatch):
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    with pytest.raises(InputError, match="adapter='lora' needs peft: pip install peft"):
        adapted("test_vit")
