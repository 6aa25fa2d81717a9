"""Metrics against plain loops over single images, written from the definitions."""

import json
import math
from itertools import combinations

import pytest
import torch

from ride_timm.errors import InputError
from ride_timm.evaluation.counts import CountAccumulator
from ride_timm.evaluation.metrics import compute_metrics, harmonic_mean, head_to_tail
from ride_timm.evaluation.tables import classes_table, groups_table

COUNTS = [500, 101, 100, 20, 19, 3, 50]
GROUPS = {"all": range(7), "many": [0, 1], "medium": [2, 3, 6], "few": [4, 5]}
OTHER = {"all": range(7), "many": [0], "medium": [1, 2, 6], "few": [3, 4, 5]}  # more than 101, fewer than 50
MEMBERS = 3


def draw(B=400, C=7, seed=0):
    """An unbalanced test set, without an image of class 6; the members' logits are independent."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.multinomial(torch.tensor([9.0, 1, 4, 2, 3, 2, 0]), B, replacement=True, generator=generator)
    members = 2 * torch.randn(B, MEMBERS, C, generator=generator)
    members += 2 * torch.nn.functional.one_hot(targets, C)[:, None]
    return members, targets, torch.randint(1, 4, (B,), generator=generator)


def counted(members, targets, used=None, batch=64):
    counts = CountAccumulator(7, 3 if used is not None else None, num_members=MEMBERS)
    for rows in torch.arange(len(targets)).split(batch):
        more = () if used is None else (used[rows],)
        counts.update(members[rows].mean(1), targets[rows], *more, member_logits=members[rows])
    return counts


def softmax(logits):
    powers = [math.exp(v - max(logits)) for v in logits]
    return [p / sum(powers) for p in powers]


def of_group(members, targets, classes):
    """Everything of one group by plain loops; ECE as its definition says, bin by bin."""
    rows = [i for i, target in enumerate(targets.tolist()) if target in classes]
    ensemble = members.mean(1)
    bins = [[] for _ in range(15)]
    alone, differing, divergence = [0] * MEMBERS, 0, 0.0
    for i in rows:
        chances = softmax(ensemble[i].tolist())
        sure, hit = max(chances), int(ensemble[i].argmax()) == int(targets[i])
        for m in range(1, 16):
            if (m - 1) / 15 < sure <= m / 15:
                bins[m - 1].append((sure, hit))
        classes_of = [int(members[i, m].argmax()) for m in range(MEMBERS)]
        alone = [n + (c == int(targets[i])) for n, c in zip(alone, classes_of, strict=True)]
        differing += sum(a != b for a, b in combinations(classes_of, 2))
        for m in range(MEMBERS):
            own = softmax(members[i, m].tolist())
            divergence += sum(p * math.log(p / q) for p, q in zip(chances, own, strict=True))
    sums = [(len(b), sum(s for s, _ in b), sum(h for _, h in b)) for b in bins]
    return dict(
        bins=[(n, 100 * s / n if n else None, 100 * h / n if n else None) for n, s, h in sums],
        ece=100 * sum(n * abs(h / n - s / n) for n, s, h in sums if n) / len(rows),
        confidence=100 * sum(s for _, s, _ in sums) / len(rows),
        accuracy=[100 * n / len(rows) for n in alone],
        disagreement=differing / len(rows) / 3,
        diversity=divergence / len(rows) / MEMBERS,
    )


@pytest.mark.parametrize(("shots", "groups"), [((100, 20), GROUPS), ((101, 50), OTHER)])
def test_calibration_and_experts_by_group(shots, groups):
    members, targets, _ = draw()
    found = compute_metrics(counted(members, targets).reduce(), COUNTS, shots)
    for name, classes in groups.items():
        expected = of_group(members, targets, list(classes))
        assert found["calibration"][name]["ece"] == pytest.approx(expected["ece"], rel=1e-5)
        assert found["calibration"][name]["confidence"] == pytest.approx(expected["confidence"], rel=1e-6)
        for row, (images, confidence, accuracy) in zip(found["reliability"][name], expected["bins"], strict=True):
            assert row["images"] == images and row["accuracy"] == pytest.approx(accuracy)
            assert row["confidence"] == (pytest.approx(confidence, rel=1e-6) if images else None)
        assert found["experts"]["accuracy"][name] == pytest.approx(expected["accuracy"])
        assert found["experts"]["disagreement"][name] == pytest.approx(expected["disagreement"])
        assert found["experts"]["diversity"][name] == pytest.approx(expected["diversity"], rel=1e-4)
    assert json.loads(json.dumps(found)) == found


def test_means_over_classes_and_experts_used_by_group():
    members, targets, used = draw()
    found = compute_metrics(counted(members, targets, used).reduce(), COUNTS)
    right = members.mean(1).argmax(1) == targets
    by_class = {c: 100 * right[targets == c].float().mean().item() for c in range(6)}
    for name, classes in GROUPS.items():
        tested = [by_class[c] for c in classes if c < 6]
        assert found["class_means"][name] == pytest.approx(sum(tested) / len(tested), rel=1e-5)
        inside = torch.isin(targets, torch.tensor(list(classes)))
        fractions = [(used[inside] == n).float().mean().item() for n in (1, 2, 3)]
        assert found["experts_used_by_group"][name] == pytest.approx(fractions, rel=1e-5)
    assert found["class_mean"] == found["class_means"]["all"] != found["all"]
    assert found["worst_class"] == pytest.approx(min(by_class.values()), rel=1e-5)
    assert found["harmonic_mean"] == pytest.approx(6 / sum(1 / a for a in by_class.values()), rel=1e-5)
    assert found["experts_used_by_group"]["all"] == found["experts_used"]


def test_the_order_and_the_batches_change_no_digit():
    members, targets, used = draw()
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(1))
    one = compute_metrics(counted(members, targets, used, 400).reduce(), COUNTS)
    other = counted(members[shuffled], targets[shuffled], used[shuffled], 7)
    found = compute_metrics(other.reduce(), COUNTS)
    for confusion in (*found["confusions"], *one["confusions"]):
        del confusion["examples"]  # positions in the test set
    assert found == one


def test_two_processes_sums_are_those_of_one():
    """all_reduce adds all counts, as integers."""
    members, targets, used = draw()
    parts = [counted(members[rows], targets[rows], used[rows]) for rows in (slice(0, 399), slice(399, 400))]
    total = counted(members, targets, used)
    assert total._counts.dtype == torch.int64
    assert torch.equal(parts[0]._counts + parts[1]._counts, total._counts)


@pytest.mark.parametrize(("logit", "number"), [(0.0, 7), (40.0, 14)])
def test_the_edges_of_the_bins(logit, number):
    """Two even classes: confidence 1/2 lies in the bin (7/15, 8/15]; certainty lies in the last one."""
    counts = CountAccumulator(2)
    counts.update(torch.tensor([[logit, 0.0]]), torch.tensor([0]))
    metrics = compute_metrics(counts.reduce(), None)
    bins = metrics["reliability"]["all"]
    assert [row["images"] for row in bins] == [int(i == number) for i in range(15)]
    assert metrics["calibration"]["all"]["ece"] == pytest.approx(50.0 if logit == 0 else 0.0, abs=1e-6)


def test_members_that_agree_and_one_alone():
    logits = torch.randn(20, 1, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(20) % 7
    same = CountAccumulator(7, num_members=3)
    same.update(logits[:, 0], targets, member_logits=logits.expand(-1, 3, -1))
    experts = compute_metrics(same.reduce(), None)["experts"]
    assert experts["disagreement"]["all"] == 0 and experts["diversity"]["all"] == pytest.approx(0, abs=1e-5)
    alone = CountAccumulator(7, num_members=1)
    alone.update(logits[:, 0], targets, member_logits=logits)
    with pytest.raises(InputError, match=r"expected member_logits \(20, 1, 7\), got None"):
        alone.update(logits[:, 0], targets)
    found = compute_metrics(alone.reduce(), None)
    assert found["experts"]["disagreement"]["all"] is None and found["experts"]["accuracy"]["all"] == [found["all"]]


def test_certain_members_and_logits_that_are_not_finite_do_not_spoil_the_sums():
    counts = CountAccumulator(3, num_members=2)
    members = torch.tensor([[[0.0, -math.inf, -math.inf], [0.0, 0.0, 0.0]], [[math.nan] * 3, [0.0] * 3]])
    counts.update(members.nan_to_num(0, 0, -1e4).mean(1), torch.tensor([0, 0]), member_logits=members)
    found = compute_metrics(counts.reduce(), None)
    assert math.isfinite(found["experts"]["diversity"]["all"]) and math.isfinite(found["calibration"]["all"]["ece"])


@pytest.mark.parametrize(
    ("accuracies", "expected"), [([50.0, 100.0], 200 / 3), ([80.0], 80.0), ([0.0, 90.0], 0.0), ([], None)]
)
def test_harmonic_mean(accuracies, expected):
    assert harmonic_mean(accuracies) == (expected if expected is None else pytest.approx(expected))


def test_head_to_tail_runs_from_the_most_to_the_least_frequent_class():
    curve = head_to_tail([10.0, 20.0, None], [5, 100, 1])
    assert [row["train_images"] for row in curve] == [100, 5, 1]
    assert [row["accuracy"] for row in curve] == [20.0, 10.0, None]
    many = head_to_tail([float(c) for c in range(1000)], list(range(1280, 280, -1)))
    assert [row["classes"] for row in many] == [50] * 20 and many[0]["accuracy"] == 24.5
    uneven = head_to_tail([1.0] * 365, [1] * 365)
    assert sum(row["classes"] for row in uneven) == 365 and {row["classes"] for row in uneven} == {18, 19}


def test_metrics_of_nothing_are_none():
    found = compute_metrics(CountAccumulator(2, num_experts=2, num_members=2).reduce(), [500, 5])
    assert found["worst_class"] is found["harmonic_mean"] is found["calibration"]["all"]["ece"] is None
    assert found["experts"]["accuracy"]["few"] == [None, None] and found["experts_used_by_group"]["many"] is None
    text = groups_table(found)
    assert "worst class –" in text and len(text.splitlines()) == 7


def test_precision_recall_and_f1_against_plain_loops():
    members, targets, _ = draw()
    members[..., 3] -= 100  # a class that is never predicted; class 6 has no test image, but is predicted
    members[:5, :, 6] += 100
    found = compute_metrics(counted(members, targets).reduce(), COUNTS)
    predictions, targets = members.mean(1).argmax(1).tolist(), targets.tolist()
    values, sizes = {"precision": [], "recall": [], "f1": []}, [targets.count(c) for c in range(7)]
    for c in range(7):
        hits = sum(p == t == c for p, t in zip(predictions, targets, strict=True))
        precision = hits / predictions.count(c) if predictions.count(c) else None
        recall = hits / sizes[c] if sizes[c] else None
        f1 = None if recall is None else 2 * recall * (precision or 0) / (recall + (precision or 0)) if hits else 0.0
        for name, value in zip(values, (precision, recall, f1), strict=True):
            values[name].append(None if value is None else 100 * value)
    assert values["precision"][3] is None and values["f1"][3] == 0 and values["precision"][6] == 0
    assert values["recall"][6] is values["f1"][6] is None
    for name, by_class in values.items():
        assert found[name]["per_class"] == [None if v is None else pytest.approx(v) for v in by_class]
        tested = [by_class[c] or 0 for c in range(6)]
        assert found[name]["macro"] == pytest.approx(sum(tested) / 6)
        assert found[name]["weighted"] == pytest.approx(sum(v * n for v, n in zip(tested, sizes, strict=False)) / 400)
    assert found["recall"]["weighted"] == pytest.approx(found["all"])
    assert found["recall"]["macro"] == pytest.approx(found["class_mean"])
    assert f"{found['f1']['macro']:.2f}" in classes_table(found).splitlines()[2]


def test_metrics_of_no_image():
    found = compute_metrics(CountAccumulator(7).reduce(), COUNTS)
    assert found["f1"] == dict(per_class=[None] * 7, macro=None, weighted=None) and found["confusions"] == []
