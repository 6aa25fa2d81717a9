import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.loss import LabelSmoothingCrossEntropy

from ride_timm import losses, priors
from ride_timm.errors import InputError
from ride_timm.losses import CrossEntropyLoss, FocalLoss, LDAMLoss, RideLoss, make_loss

PARITY = Path(__file__).parents[1] / "parity"
GOLDENS = json.loads((PARITY / "losses.json").read_text())
INPUTS = load_file(PARITY / "loss_inputs.safetensors")
COUNTS = [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
ALL = [
    make_loss("ride", COUNTS, reweight_epoch=0),
    make_loss("ldam", COUNTS, reweight_epoch=0),
    make_loss("focal", gamma=2.0),
    make_loss("ce"),
    make_loss("cb_ce", COUNTS),
    make_loss("cb_focal", COUNTS, gamma=2.0),
    make_loss("balanced_softmax", COUNTS),
    make_loss("logit_adjustment", COUNTS, tau=1.5),
]


def draw(B=7, E=3, C=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    expert_logits = 5 * torch.randn(B, E, C, generator=generator, dtype=torch.float64)
    return expert_logits.requires_grad_(), torch.randint(0, C, (B,), generator=generator)


def golden_loss(row):
    """The row's value as a function of expert logits [B, E, C], by our own names."""
    kwargs, counts = dict(row["kwargs"]), row["cls_num_list"]
    temperature = kwargs.pop("distill_temperature", None)
    if row["name"].startswith("RIDELoss"):
        loss = RideLoss(counts, **kwargs)
    elif row["name"] == "LDAMLoss":
        loss = LDAMLoss(counts, **kwargs)
    elif row["name"] == "FocalLoss":
        loss = FocalLoss(counts, **kwargs)
    else:
        loss = CrossEntropyLoss(counts, class_balanced=kwargs.get("reweight_CE", False))
    loss.set_epoch(row["epoch"] - 1)  # theirs count from 1
    if temperature is None:
        return lambda x: loss(x, INPUTS["target"])
    return lambda x: (
        x.shape[1] * (loss(x, INPUTS["target"]) + losses.distillation(x.mean(1), INPUTS["teacher_logits"], temperature))
    )


@pytest.mark.parametrize("row", GOLDENS, ids=lambda r: f"{r['name']}-{r['kwargs']}-{r['epoch']}")
def test_values_and_gradients_equal_the_authors(row):
    x = INPUTS["expert_logits"].clone().requires_grad_()
    value = golden_loss(row)(x)
    (gradient,) = torch.autograd.grad(value, x)
    for ours, key in [(value, "value"), (gradient.abs().sum(), "grad_abs_sum"), (gradient.norm(), "grad_norm")]:
        torch.testing.assert_close(ours.item(), row[key], rtol=1e-5, atol=0, msg=lambda m, key=key: f"{key}: {m}")


def ride_by_hand(x, y, counts, factor, max_m=0.5, s=30.0, T0=1.0, r=0.05, reweighting=True, base_factor=1.0):
    """RIDE's loss with a loop for every sum."""
    n = torch.tensor(counts, dtype=torch.float64)
    B, E, C = x.shape
    margin = n**-0.25 * max_m / (n**-0.25).max()
    weights = (1 - 0.9999) / (1 - 0.9999**n)
    weights = weights / weights.sum() * C if reweighting else torch.ones(C, dtype=torch.float64)
    t = C * n / n.sum() * r + 1 - r
    T = T0 * t / t.max() if reweighting else torch.full((C,), T0, dtype=torch.float64)
    total = 0.0
    for e in range(E):
        base, kl = 0.0, 0.0
        for b in range(B):
            z = (x[b].mean(0) if factor == 0 else x[b, e]).clone()
            z[y[b]] = z[y[b]] - s * margin[y[b]]
            base = base - weights[y[b]] * z.log_softmax(0)[y[b]]
            p = (x[b].mean(0).detach() / T).softmax(0)
            kl = kl + (p * (p.log() - (x[b, e] / T).log_softmax(0))).sum()
        total = total + base_factor * base / weights[y].sum() + factor * T.mean() ** 2 * kl / B
    return total


@pytest.mark.parametrize("factor", [-0.45, 0.0, 0.3])
@pytest.mark.parametrize("reweighting", [False, True])
@pytest.mark.parametrize("num_experts", [1, 2, 4])
def test_ride_equals_brute_force(factor, reweighting, num_experts):
    x, y = draw(E=num_experts)
    knobs = {"max_m": 0.4, "s": 20.0, "base_loss_factor": 0.7}
    loss = RideLoss(
        COUNTS,
        additional_diversity_factor=factor,
        base_diversity_temperature=1.5,
        reweight_epoch=3,
        reweight_factor=0.02,
        **knobs,
    )
    loss.set_epoch(3 if reweighting else 2)
    expected = ride_by_hand(x, y, COUNTS, factor, 0.4, 20.0, 1.5, 0.02, reweighting, 0.7)
    value = loss(x, y)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    ours, theirs = torch.autograd.grad(value, x)[0], torch.autograd.grad(expected, x)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", ALL, ids=lambda m: type(m).__name__)
def test_permuting_experts_changes_nothing(loss):
    x, y = draw(E=4)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(loss(x[:, order], y), loss(x, y), rtol=1e-12, atol=0)


def test_diversity_vanishes_for_equal_experts_and_has_no_gradient_through_the_ensemble():
    x, _ = draw(E=1)
    T = priors.class_temperature(COUNTS)
    same = x.detach().expand(-1, 3, -1).clone().requires_grad_()
    value = losses.diversity(same, T)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-12)
    x, _ = draw(E=3)
    (gradient,) = torch.autograd.grad(losses.diversity(x, torch.ones(10)), x)
    p, q = x.mean(1, keepdim=True).softmax(-1), x.softmax(-1)
    torch.testing.assert_close(gradient, (q - p) / len(x))


def test_weighted_means_follow_torch():
    x, y = draw()
    weights = priors.effective_number_weights(COUNTS)
    expected = F.cross_entropy(x.mean(1), y, weight=weights.double())
    torch.testing.assert_close(CrossEntropyLoss(COUNTS, class_balanced=True)(x, y), expected)
    ldam = LDAMLoss(COUNTS, reweight_epoch=5)
    shifted = x.mean(1) - 30 * priors.ldam_margins(COUNTS) * F.one_hot(y, 10)
    torch.testing.assert_close(ldam(x, y), F.cross_entropy(shifted, y))
    ldam.set_epoch(5)
    torch.testing.assert_close(ldam(x, y), F.cross_entropy(shifted, y, weight=weights.double()))
    ldam.set_epoch(4)
    torch.testing.assert_close(ldam(x, y), F.cross_entropy(shifted, y))


@pytest.mark.parametrize("kwargs", [{"reweight_epoch": -1}, {"reweight": False, "reweight_epoch": 2}, {}])
def test_reweighting_that_is_off_stays_off(kwargs):
    x, y = draw()
    loss = RideLoss(COUNTS, **kwargs)
    first = loss(x, y)
    loss.set_epoch(1000)
    assert torch.equal(loss(x, y), first)
    torch.testing.assert_close(first, ride_by_hand(x, y, COUNTS, -0.2, reweighting=False))


def test_reweighting_from_the_first_epoch():
    x, y = draw()
    loss = RideLoss(COUNTS, reweight_epoch=0)
    torch.testing.assert_close(loss(x, y), ride_by_hand(x, y, COUNTS, -0.2), rtol=1e-6, atol=0)


def test_without_class_counts_it_is_plain_cross_entropy():
    x, y = draw()
    ce = F.cross_entropy(x.mean(1), y)
    for name, kwargs in [("ldam", {"reweight_epoch": 0}), ("focal", {}), ("ce", {})]:
        torch.testing.assert_close(make_loss(name, **kwargs)(x, y), ce)
    loss = RideLoss(additional_diversity_factor=0, reweight_epoch=0)
    loss.set_epoch(9)
    torch.testing.assert_close(loss(x, y), 3 * ce)
    each = sum(F.cross_entropy(x[:, e], y) for e in range(3))
    torch.testing.assert_close(
        RideLoss(additional_diversity_factor=-0.2)(x, y), each - 0.2 * losses.diversity(x, torch.ones(1))
    )


@pytest.mark.parametrize("loss", ALL, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_losses(loss, dtype):
    x = INPUTS["expert_logits"].to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(x, INPUTS["target"])
    (gradient,) = torch.autograd.grad(value, x)
    assert value.dtype == torch.float32 and value.isfinite() and gradient.isfinite().all()
    assert torch.equal(value, loss(x.float(), INPUTS["target"]))


def test_half_precision_distillation_and_routing_are_float32():
    x, teacher, y = INPUTS["expert_logits"].bfloat16(), INPUTS["teacher_logits"].bfloat16(), INPUTS["target"]
    assert losses.distillation(x.mean(1), teacher, 1.5).dtype == torch.float32
    assert losses.router_loss(x[:, :2, 0], x, y).dtype == torch.float32


@pytest.mark.parametrize("loss", [*ALL, FocalLoss(gamma=0.5), FocalLoss(gamma=1.0)], ids=lambda m: type(m).__name__)
def test_certain_answers_have_finite_gradients(loss):
    x = torch.zeros(10, 3, 10)
    x[torch.arange(10), :, torch.arange(10)] = 200.0
    x.requires_grad_()
    for targets in (torch.arange(10), torch.arange(10).flip(0)):
        value = loss(x, targets)
        assert value.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()


def test_focal_closed_form():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    p = torch.tensor([0.5, 1 / (1 + torch.e**-2)])
    for gamma in (0.0, 0.5, 2.0):
        expected = ((1 - p) ** gamma * -p.log()).mean()
        torch.testing.assert_close(losses.focal(logits, torch.zeros(2, dtype=torch.long), gamma), expected)


def test_class_balanced_focal_is_the_focal_loss_weighed_by_effective_numbers():
    x, y = draw()
    n = torch.tensor(COUNTS, dtype=torch.float64)
    weights = (1 - 0.9999) / (1 - 0.9999**n)
    p = x.mean(1).softmax(-1)[torch.arange(len(y)), y]
    expected = (weights[y] * (1 - p) ** 2 * -p.log()).sum() / weights[y].sum()
    value = FocalLoss(COUNTS, gamma=2.0, class_balanced=True)(x, y)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    unweighted = FocalLoss(COUNTS, class_balanced=True)(x, y)  # gamma 0
    torch.testing.assert_close(unweighted, CrossEntropyLoss(COUNTS, class_balanced=True)(x, y))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_label_smoothing_equals_timm(smoothing):
    x, y = draw()
    expected = LabelSmoothingCrossEntropy(smoothing)(x.mean(1), y)
    torch.testing.assert_close(make_loss("ce", label_smoothing=smoothing)(x, y), expected)


def test_distillation_closed_form():
    student, teacher = draw(E=1)[0][:, 0], draw(E=1, seed=1)[0][:, 0]
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(losses.distillation(student, teacher, 2.0), expected)
    assert losses.distillation(student, student, 2.0).abs() < 1e-12
    losses.distillation(student, teacher, 2.0).backward()


def test_router_targets_by_hand():
    right, wrong, doubtful = [5.0, 0.0], [0.0, 3.0], [0.0, 7.0]
    cases = [
        ([wrong, right, right], [1.0, 0.0]),  # prefixes: wrong, right, right
        ([right, doubtful, right], [0.0, 1.0]),  # right, wrong, right
        ([wrong, wrong, wrong], [0.0, 0.0]),  # never right: more experts do not help
        ([right, wrong, doubtful], [0.0, 0.0]),  # right, right, wrong
        ([wrong, wrong, [20.0, 0.0]], [1.0, 1.0]),  # right only together
    ]
    x = torch.tensor([experts for experts, _ in cases])
    y = torch.zeros(len(cases), dtype=torch.long)
    assert losses.router_targets(x, y).tolist() == [wanted for _, wanted in cases]


def test_router_loss_equals_torch():
    x, y = draw(B=200, E=4, C=3)
    gates = torch.randn(200, 3, dtype=torch.float64, requires_grad=True)
    wanted = torch.zeros(200, 3, dtype=torch.float64)
    for b in range(200):
        right = [bool(x[b, :i].mean(0).argmax() == y[b]) for i in range(1, 5)]
        for i in range(3):
            wanted[b, i] = float(not right[i] and any(right[i + 1 :]))
    assert 0 < wanted.mean() < 1
    per_gate = [
        F.binary_cross_entropy_with_logits(gates[:, i], wanted[:, i], pos_weight=torch.tensor(100.0)) for i in range(3)
    ]
    expected, value = sum(per_gate) / 3, losses.router_loss(gates, x, y, pos_weight=100)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, gates)[0], torch.autograd.grad(expected, gates)[0])
    assert torch.autograd.grad(losses.router_loss(gates, x, y), x, allow_unused=True) == (None,)


def test_a_router_needs_two_experts_and_fitting_gates():
    x, y = draw(E=1)
    with pytest.raises(InputError, match="at least 2 experts, the model has 1"):
        losses.router_loss(torch.zeros(7, 0), x, y)
    with pytest.raises(InputError, match=r"gate logits of shape \(7, 2\), got \(7, 3\)"):
        losses.router_loss(torch.zeros(7, 3), draw()[0], y)


def test_buffers_follow_the_module_and_stay_out_of_checkpoints():
    loss = make_loss("ride", COUNTS)
    assert not loss.state_dict() and not list(loss.parameters())
    assert {b.device.type for b in loss.to("meta").buffers()} == {"meta"} and len(list(loss.buffers())) == 4


@pytest.mark.parametrize(
    "name, counts, kwargs, match",
    [
        ("rid", COUNTS, {}, "unknown loss 'rid', expected one of: ride, ldam, focal, cb_focal, ce, cb_ce, balanced"),
        ("ce", COUNTS, {"gamma": 1}, "loss 'ce' does not take gamma; it takes: label_smoothing"),
        ("focal", COUNTS, {"gama": 1, "s": 2}, "does not take gama, s; it takes: gamma"),
        ("cb_ce", COUNTS, {"class_balanced": False}, "does not take class_balanced"),
        ("ldam", COUNTS, {"reweight": True}, "it takes: max_m, s, reweight_epoch"),
        ("cb_ce", None, {}, "needs class counts"),
        ("cb_focal", None, {}, "needs class counts"),
        ("ce", None, {"label_smoothing": 1}, "label_smoothing must be at least 0 and below 1, got 1"),
        ("focal", None, {"gamma": -1}, "gamma must be at least 0, got -1"),
        ("ride", COUNTS, {"s": 0}, "max_m and s must be above 0, got 0.5 and 0"),
        ("ride", COUNTS, {"base_diversity_temperature": 0}, "must be above 0, got 0"),
        ("ride", COUNTS, {"reweight_epoch": -2}, "or -1 for never, got -2"),
        ("ride", COUNTS, {"reweight_factor": 2.0}, "reweight_factor 2.0 below 1"),
        ("ride", [5, 0, 1], {}, "class 1 has 0 images"),
    ],
)
def test_bad_arguments_are_named(name, counts, kwargs, match):
    with pytest.raises(InputError, match=match):
        make_loss(name, counts, **kwargs)


def test_logits_of_other_classes_are_refused():
    x, y = draw(C=9)
    with pytest.raises(InputError, match=r"\[B, E, 10\], got shape \(7, 3, 9\)"):
        RideLoss(COUNTS)(x, y)
    with pytest.raises(InputError, match=r"\[B, E, C\], got shape \(7, 9\)"):
        FocalLoss()(x[:, 0], y)
