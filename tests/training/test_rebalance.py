"""Re-balanced heads against the published formulas, one image at a time."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn.functional import normalize

from ride_timm import InputError
from ride_timm.losses import make_loss
from ride_timm.models import ClassAffine
from ride_timm.training.rebalance import adjust_logits, align_experts, decouple, tau_normalize

COUNTS = [60, 20, 10, 6, 4]


def network(use_norm, num_experts=2, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model("test_ride_resnet", num_experts=num_experts, num_classes=5, use_norm=use_norm, **kwargs)
    for expert in model.experts:  # unequal norms, as after training
        expert.fc.weight.data.mul_(torch.rand(5, 1) + 0.5)
    return model.eval()


def images(batch=3):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def heads(model):
    return [(copy.deepcopy(expert.fc.weight.data), getattr(expert.fc, "bias", None)) for expert in model.experts]


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("use_norm", [False, True])
def test_tau_normalization_divides_class_vectors_by_their_norm(use_norm, tau):
    model = network(use_norm)
    features, before = model.forward_experts(images())
    weights = heads(model)
    tau_normalize(model, tau)
    _, logits = model.forward_experts(images())
    for e, (weight, _) in enumerate(weights):
        f = 30 * normalize(features[:, e], dim=1) if use_norm else features[:, e]
        for c in range(5):
            expected = f @ (weight[c] / weight[c].norm() ** tau)  # no bias
            torch.testing.assert_close(logits[:, e, c], expected, rtol=1e-4, atol=1e-5)
    if use_norm and tau == 1:
        torch.testing.assert_close(logits, before)  # a cosine head is normalised already


@pytest.mark.parametrize("use_norm", [False, True])
def test_logit_adjustment_subtracts_the_prior(use_norm):
    model = network(use_norm, num_experts=3)
    _, before = model.forward_experts(images())
    adjust_logits(model, COUNTS, 1.5)
    expected = before - 1.5 * torch.tensor([0.6, 0.2, 0.1, 0.06, 0.04]).log()
    torch.testing.assert_close(model.forward_experts(images())[1], expected)
    torch.testing.assert_close(model(images()), expected.mean(1))


@pytest.mark.parametrize("use_norm", [False, True])
@pytest.mark.parametrize(("name", "kwargs"), [("balpoe", {"taus": (1, 0, 2)}), ("mdcs", {}), ("sade", {})])
def test_aligned_experts_have_one_prior_and_the_same_ensemble(name, kwargs, use_norm):
    model = network(use_norm, num_experts=3)
    _, before = model.forward_experts(images())
    ensemble, offsets = model(images()), make_loss(name, COUNTS, **kwargs).offsets
    align_experts(model, offsets)
    _, after = model.forward_experts(images())
    torch.testing.assert_close(model(images()), ensemble)
    common = torch.tensor([0.6, 0.2, 0.1, 0.06, 0.04]).log()  # the taus have mean 1, so this is the common prior
    if name == "sade":
        common = (0 + common + common - 2 * common.flip(0)) / 3
    torch.testing.assert_close((after + common).softmax(-1), (before + offsets).softmax(-1))


def test_tau_normalization_leaves_aligned_experts_aligned():
    model = network(True, num_experts=3)
    plain = copy.deepcopy(model)
    tau_normalize(plain, 2.0)
    offsets = make_loss("balpoe", COUNTS).offsets
    align_experts(model, offsets)
    adjust_logits(model, COUNTS, 1.0)  # a bias common to all heads, which tau-normalization removes
    tau_normalize(model, 2.0)
    expected = plain.forward_experts(images())[1] + offsets - offsets.mean(0)
    torch.testing.assert_close(model.forward_experts(images())[1], expected)


def test_alignment_needs_offsets_of_this_model():
    with pytest.raises(InputError, match=r"offsets \(3, 5\) for 2 experts and 5 classes"):
        align_experts(network(True), make_loss("balpoe", COUNTS).offsets)


def test_logit_adjustment_gives_the_balanced_posterior():
    """The adjusted log posterior of training is the balanced log posterior."""
    model = network(False, num_experts=1)
    likelihood = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.4])
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    model.experts[0].fc.weight.data.zero_()
    model.experts[0].fc.bias.data = (likelihood * prior / (likelihood * prior).sum()).log()
    adjust_logits(model, COUNTS, 1.0)
    torch.testing.assert_close(model(images(1))[0].softmax(0), likelihood / likelihood.sum())


@pytest.mark.parametrize("use_norm", [False, True])
@pytest.mark.parametrize("method", ["crt", "lws"])
def test_only_the_parameters_of_the_method_learn(method, use_norm):
    model = network(use_norm, drop_rate=0.5)
    before = copy.deepcopy(model.state_dict())
    logits_before = model.forward_experts(images())[1]
    objective = decouple(model, method, COUNTS, 1.0, seed=3)
    if method == "lws":  # scales start at 1
        torch.testing.assert_close(model.forward_experts(images())[1], logits_before)
    objective.train()
    assert not any(module.training for module in model.modules())
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = "fc.affine.weight" if method == "lws" else "fc.weight"
    assert {f"experts.{e}.{own}" for e in range(2)} <= names
    heads = ("experts.0.fc.", "experts.1.fc.")
    assert all(name.startswith(heads) for name in names) and (method == "crt" or len(names) == 2)
    optimizer = torch.optim.SGD(objective.trainable_parameters(), lr=0.01, momentum=0.9, weight_decay=0.01)
    targets = torch.tensor([4, 0, 3])
    values = []
    for _ in range(4):
        optimizer.zero_grad()
        result = objective(images(), targets)
        result["loss"].backward()
        optimizer.step()
        values.append(result["loss"].item())
    assert values[-1] < values[0]
    after = model.state_dict()
    for name, value in before.items():
        if ".fc." not in name:
            assert torch.equal(after[name], value), name
        elif method == "lws":
            assert torch.equal(after[name.replace(".fc.", ".fc.head.")], value), name
    _, logits = model.forward_experts(images())
    each = sum(F.cross_entropy(logits[:, e], targets) for e in range(2))
    torch.testing.assert_close(objective(images(), targets)["loss"], each)


def test_balanced_softmax_learns_new_heads_while_batch_norm_goes_on():
    model = network(True)
    before = copy.deepcopy(model.state_dict())
    objective = decouple(model, "balanced_softmax", COUNTS, 1.0, seed=3).train()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {"experts.0.fc.weight", "experts.1.fc.weight"}
    targets = torch.tensor([4, 0, 3])
    result = objective(images(), targets)
    _, logits = model.forward_experts(images())  # of the same batch statistics
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    each = sum(F.nll_loss((logits[:, e].exp() * prior / (logits[:, e].exp() * prior).sum(1, True)).log(), targets)
               for e in range(2))  # fmt: skip
    torch.testing.assert_close(result["loss"], each)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    kinds = {name.rpartition(".")[2] for name in changed - names}
    assert names < changed and kinds == {"running_mean", "running_var", "num_batches_tracked"}
    assert "offset" not in objective.state_dict()


@pytest.mark.parametrize(
    ("frozen", "learning"),
    [
        (dict(), {"trunk", "experts"}),
        (dict(freeze_norm=True), set()),
        (dict(freeze="backbone"), set()),
        (dict(freeze="trunk"), {"experts"}),
    ],
)
def test_balanced_softmax_keeps_the_statistics_that_stage_one_kept(frozen, learning):
    model = network(True)
    before = copy.deepcopy(model.state_dict())
    decouple(model, "balanced_softmax", COUNTS, 1.0, seed=3, **frozen).train()(images(), torch.tensor([4, 0, 3]))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed if "running" in name} == learning


def test_new_heads_come_from_the_seed():
    weights = []
    for seed in (3, 3, 4):
        model = network(True)
        decouple(model, "crt", COUNTS, 1.0, seed)
        weights.append(model.experts[0].fc.weight.detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not torch.equal(model.experts[0].fc.weight, model.experts[1].fc.weight)


def test_learned_scales_have_the_gradient_of_scaled_logits():
    model = network(False, num_experts=1)
    _, logits = model.forward_experts(images())
    objective = decouple(model, "lws", COUNTS, 1.0, seed=0)
    scale = model.experts[0].fc.affine.weight
    scale.data = torch.tensor([0.5, 2.0, 1.0, 1.5, 3.0])
    targets = torch.tensor([1, 2, 2])
    objective(images(), targets)["loss"].backward()
    p = (logits[:, 0] * scale).softmax(1) - F.one_hot(targets, 5)
    torch.testing.assert_close(scale.grad, (p * logits[:, 0]).mean(0))


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_resnet"])
def test_round_trip_of_any_backbone(backbone, tmp_path):
    from timm.models._hub import save_for_hf

    kwargs = dict(backbone=backbone, num_experts=2, num_classes=5)
    model = timm.create_model("ride", **kwargs).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    tau_normalize(model, 0.5)
    adjust_logits(model, COUNTS, 1.0)
    save_for_hf(model, tmp_path, safe_serialization=True, model_args=dict(class_affine=True))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.has_class_affine and torch.equal(again(x), model(x))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7).eval()
    assert other(x).shape == (2, 7) and torch.equal(other.experts[0].fc.affine.weight, torch.ones(7))


def test_adding_class_affine_again_keeps_its_scales():
    model = network(True)
    model.add_class_affine()
    model.experts[0].fc.affine.weight.data.fill_(2.0)
    model.add_class_affine()
    head = model.experts[0].fc
    assert isinstance(head, ClassAffine) and not isinstance(head.head, ClassAffine) and head.affine.weight[0] == 2
    model.reset_classifier(3)
    assert not model.has_class_affine and model(images()).shape == (3, 3)


def test_bad_input_is_rejected():
    model = network(True)
    with pytest.raises(InputError, match="tau must be at least 0, got -1"):
        tau_normalize(model, -1)
    with pytest.raises(InputError, match="tau must be at least 0, got nan"):
        adjust_logits(model, COUNTS, float("nan"))
    with pytest.raises(InputError, match="2 class counts for 5 classes"):
        adjust_logits(model, [3, 4], 1.0)
    with pytest.raises(
        InputError, match="unknown decoupling 'hope', expected one of: crt, lws, balanced_softmax, tau_norm"
    ):
        decouple(model, "hope", COUNTS, 1.0, 0)
    assert not model.has_class_affine


def test_new_heads_leave_a_backbones_own_fc_layers_alone():
    """VovNet's squeeze-and-excitation has parameters called fc, too."""
    given = dict(backbone="ese_vovnet19b_dw", use_norm=False)
    model = timm.create_model("ride", **given, num_experts=2, num_classes=len(COUNTS))
    assert any("attn.fc." in name for name, _ in model.named_parameters())
    decouple(model, "crt", COUNTS, 1.0, seed=0)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {f"experts.{e}.fc.{kind}" for e in range(2) for kind in ("weight", "bias")}
