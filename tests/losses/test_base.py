"""Laws of all losses, and their registry."""

import re

import pytest
import torch
import torch.nn.functional as F
from expert_logits import COUNTS, draw, half_precision

from ride_timm import InputError
from ride_timm.losses import LOSSES, PerExpertPriorLoss, loss_keys, make_loss
from ride_timm.losses.terms import diversity

ONE_PRIOR = [name for name, entry in LOSSES.items() if not issubclass(entry.loss, PerExpertPriorLoss)]


def build(name):
    reweighted = {"reweight_epoch": 0} if "reweight_epoch" in [key.name for key in LOSSES[name].keys] else {}
    return make_loss(name, COUNTS, **reweighted)


@pytest.mark.parametrize("name", ONE_PRIOR)
def test_permuting_experts_changes_nothing(name):
    loss, (x, y) = build(name), draw(E=4)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(loss(x[:, order], y), loss(x, y), rtol=1e-12, atol=0)


def test_without_class_counts_it_is_plain_cross_entropy():
    x, y = draw()
    ce = F.cross_entropy(x.mean(1), y)
    for name, kwargs in [("ldam", {"reweight_epoch": 0}), ("focal", {"gamma": 0}), ("ce", {})]:
        torch.testing.assert_close(make_loss(name, **kwargs)(x, y), ce)
    loss = make_loss("ride", additional_diversity_factor=0, reweight_epoch=0)
    loss.set_epoch(9)
    torch.testing.assert_close(loss(x, y), 3 * ce)
    each = sum(F.cross_entropy(x[:, e], y) for e in range(3))
    torch.testing.assert_close(
        make_loss("ride", additional_diversity_factor=-0.2)(x, y), each - 0.2 * diversity(x, torch.ones(1))
    )


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name].loss.num_views == 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_give_float32_losses(name, dtype):
    loss, (x, y) = build(name).eval(), half_precision(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(x, y)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.dtype == torch.float32 and value.isfinite() and gradient.isfinite().all()
    assert torch.equal(value, loss(x.float(), y))


@pytest.mark.parametrize(
    "loss",
    [*map(build, ONE_PRIOR), *(make_loss("focal", gamma=gamma) for gamma in (0.5, 2.0))],
    ids=lambda m: type(m).__name__,
)
def test_certain_predictions_have_finite_gradients(loss):
    x = torch.zeros(10, 3, 10)
    x[torch.arange(10), :, torch.arange(10)] = 200.0
    x.requires_grad_()
    for targets in (torch.arange(10), torch.arange(10).flip(0)):
        value = loss(x, targets)
        assert value.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()


@pytest.mark.parametrize("name", ["balanced_softmax", "logit_adjustment", "sade", "balpoe"])
def test_label_smoothing_of_adjusted_logits(name):
    x, y = draw()
    loss = make_loss(name, COUNTS, label_smoothing=0.2)
    offsets = loss.offset[None] if loss.offsets is None else loss.offsets
    logits = x.mean(1, keepdim=True) if len(offsets) == 1 else x
    each = [F.cross_entropy(logits[:, e] + offsets[e], y, label_smoothing=0.2) for e in range(len(offsets))]
    torch.testing.assert_close(loss(x, y), sum(each) / (3 if name == "balpoe" else 1))


def test_buffers_follow_the_module_and_stay_out_of_checkpoints():
    loss = make_loss("ride", COUNTS)
    assert not loss.state_dict() and not list(loss.parameters())
    assert {b.device.type for b in loss.to("meta").buffers()} == {"meta"} and len(list(loss.buffers())) == 4


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_states_what_tables_and_cards_show(name):
    entry = LOSSES[name]
    assert entry.citation and re.match(r"[a-z]+s ", entry.summary) and not entry.summary.endswith(".")
    assert entry.paper is None or re.fullmatch(r"\d{4}\.\d{5}", entry.paper)
    per_expert = issubclass(entry.loss, PerExpertPriorLoss)
    loss = make_loss(name, COUNTS)
    assert (loss.offsets is not None and loss.offsets.shape == (3, 10)) if per_expert else loss.offsets is None


def test_losses_that_share_a_key_declare_it_once():
    for name, (item, names) in loss_keys().items():
        for other in (key for loss in names for key in LOSSES[loss].keys if key.name == name):
            assert (other.default, other.metadata, other.type) == (item.default, item.metadata, item.type), name


@pytest.mark.parametrize(
    ("name", "kwargs", "match"),
    [
        ("focal", {"gamma": -1}, "gamma=-1: expected a number, 0 or more"),
        ("ce", {"label_smoothing": 1}, "label_smoothing=1: expected a number, 0 or more and at most 0.9"),
        ("balpoe", {"label_smoothing": -0.1}, "label_smoothing=-0.1: expected a number, 0 or more"),
        ("ride", {"base_diversity_temperature": 0}, "base_diversity_temperature=0: expected a number, above 0"),
        ("ride", {"reweight_epoch": -2}, "reweight_epoch=-2: expected a whole number, -1 or more"),
        ("ride", {"reweight_factor": 2.0}, "reweight_factor=2.0: expected a number, 0 or more and at most 1"),
        ("ldam", {"max_margin": 0}, "max_margin=0: expected a number, above 0"),
        ("logit_adjustment", {"tau": -1}, "tau=-1: expected a number, 0 or more and at most 10"),
        ("logit_adjustment", {"tau": float("nan")}, "tau=nan: expected a number"),
        ("sade", {"inverse_tau": -2}, "inverse_tau=-2: expected a number, 0 or more"),
        ("balpoe", {"taus": (0, 1)}, "taus 0, 1 have a mean of 0.5: expected 1"),
        ("mdcs", {"taus": (0, 1, 3)}, "have a mean of 1.33333: expected 1"),
        ("mdcs", {"consistency": -1}, "consistency=-1: expected a number, 0 or more"),
    ],
)
def test_values_out_of_range_are_named(name, kwargs, match):
    with pytest.raises(InputError, match=match):
        make_loss(name, COUNTS, **kwargs)


def test_an_unknown_loss_lists_the_known():
    with pytest.raises(InputError, match=r"unknown loss 'rid', expected one of: .*, ldam, .*, ride, sade"):
        make_loss("rid", COUNTS)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("ce", {"gamma": 1}),
        ("focal", {"gama": 1}),
        ("cb_ce", {"class_balanced": False}),
        ("balanced_softmax", {"tau": 2}),
    ],
)
def test_arguments_of_other_losses_are_a_type_error(name, kwargs):
    with pytest.raises(TypeError, match=next(iter(kwargs))):
        make_loss(name, COUNTS, **kwargs)


@pytest.mark.parametrize(
    "name", ["cb_ce", "cb_focal", "balanced_softmax", "logit_adjustment", "sade", "balpoe", "mdcs"]
)
def test_a_prior_needs_counts_of_every_class(name):
    with pytest.raises(InputError, match="class counts must be a sequence of integers, got None"):
        make_loss(name)
    with pytest.raises(InputError, match="class 1 has 0 images"):
        make_loss(name, [5, 0, 1])


def test_logits_of_other_classes_are_refused():
    x, y = draw(C=9)
    with pytest.raises(InputError, match=r"\[B, E, 10\], got shape \(7, 3, 9\)"):
        make_loss("ride", COUNTS)(x, y)
    with pytest.raises(InputError, match=r"\[B, E, C\], got shape \(7, 9\)"):
        make_loss("focal")(x[:, 0], y)


@pytest.mark.parametrize("name", ["sade", "balpoe"])
def test_another_number_of_experts_is_refused(name):
    x, y = draw(E=2)
    with pytest.raises(InputError, match="this loss trains 3 experts, the model has 2"):
        make_loss(name, COUNTS)(x, y)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_there_is_one_graph_before_and_one_after_a_change_of_epoch(name):
    torch._dynamo.reset()
    loss, graphs = make_loss(name, COUNTS), []
    compiled = torch.compile(  # as `--compile` does
        loss, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True, dynamic=False
    )
    for epoch in (*range(6), 180, 181):
        loss.set_epoch(epoch)
        compiled(torch.randn(8 * loss.num_views, 3, len(COUNTS)), torch.arange(8))
    assert len(graphs) <= 2
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_a_gpu_gives_the_loss_and_gradient_of_the_cpu(name):
    logits = torch.randn(8 * LOSSES[name].loss.num_views, 3, len(COUNTS))
    targets = torch.arange(8) % len(COUNTS)
    results = []
    for device in ("cpu", "cuda"):
        given = logits.to(device, copy=True).requires_grad_()
        value = make_loss(name, COUNTS).to(device)(given, targets.to(device))
        value.backward()
        results.append((value.cpu(), given.grad.cpu()))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
