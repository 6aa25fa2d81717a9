import json
import sys

import pytest
import torch
import torch.distributed as dist
from two_ranks import run_two_ranks

from ride_timm.errors import InputError, RunError
from ride_timm.evaluation.counts import CountAccumulator
from ride_timm.evaluation.metrics import compute_metrics

COUNTS = [500, 101, 100, 20, 19, 3, 50]


def draw(B=300, C=7, seed=0):
    """Random logits; the last class has no test images."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, C - 1, (B,), generator=generator)
    logits = torch.randn(B, C, generator=generator) + 2 * torch.nn.functional.one_hot(targets, C)
    return logits, targets, torch.randint(1, 4, (B,), generator=generator)


def brute_force(logits, targets, counts):
    groups = {
        "all": lambda n: True,
        "many": lambda n: n > 100,
        "medium": lambda n: 20 <= n <= 100,
        "few": lambda n: n < 20,
    }
    right = [bool(row.argmax() == target) for row, target in zip(logits, targets, strict=True)]
    metrics = {}
    for name, holds in groups.items():
        mine = [hit for hit, target in zip(right, targets, strict=True) if holds(counts[target])]
        metrics[name] = 100 * sum(mine) / len(mine) if mine else None
    ranked = logits.argsort(1, descending=True)[:, :5]
    metrics["top5"] = 100 * sum(int(t) in r.tolist() for r, t in zip(ranked, targets, strict=True)) / len(targets)
    metrics["per_class"] = []
    for c in range(len(counts)):
        mine = [hit for hit, target in zip(right, targets, strict=True) if target == c]
        metrics["per_class"].append(100 * sum(mine) / len(mine) if mine else None)
    tested = [accuracy for accuracy in metrics["per_class"] if accuracy is not None]
    return metrics | {"class_mean": pytest.approx(sum(tested) / len(tested))}


def test_counts_of_a_device_without_float64_are_on_the_cpu():
    counts = CountAccumulator(3, num_experts=2, device="mps")
    counts.update(torch.eye(3), torch.arange(3), experts_used=torch.tensor([1, 2, 2], dtype=torch.int32))
    assert counts.reduce().right.tolist() == [1, 1, 1]


@pytest.mark.parametrize("size", [300, 7, 1])
def test_batches_of_any_size_give_the_brute_force_metrics(size):
    logits, targets, _ = draw()
    counts = CountAccumulator(7)
    for rows in torch.arange(300).split(size):
        counts.update(logits[rows], targets[rows])
    metrics = compute_metrics(counts.reduce(), COUNTS)
    expected = brute_force(logits, targets, COUNTS)
    assert {key: metrics[key] for key in expected} == expected
    assert metrics["per_class"][6] is None and "experts_used" not in metrics
    assert json.loads(json.dumps(metrics)) == metrics


def test_fractions_of_experts_used():
    counts = CountAccumulator(3, num_experts=4)
    counts.update(torch.eye(3), torch.tensor([0, 1, 1]), torch.tensor([1, 1, 3]))
    counts.update(torch.eye(3)[:1], torch.tensor([0]), torch.tensor([3]))
    metrics = compute_metrics(counts.reduce(), None)
    assert metrics["experts_used"] == [0.5, 0.0, 0.5, 0.0]
    assert metrics["all"] == 75 and metrics["class_mean"] == 75 and metrics["per_class"] == [100, 50, None]


def test_group_accuracy_weighs_images_and_class_mean_weighs_classes():
    counts = CountAccumulator(2)
    counts.update(torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 0, 0, 1]))
    metrics = compute_metrics(counts.reduce(), [10, 5])
    assert metrics["all"] == metrics["few"] == 75 and metrics["class_mean"] == 50


def test_what_is_empty_is_none():
    empty = compute_metrics(CountAccumulator(2, num_experts=2).reduce(), [500, 5])
    assert [empty[key] for key in ("all", "many", "medium", "few", "top5", "class_mean")] == [None] * 6
    assert empty["per_class"] == [None, None] and empty["experts_used"] == [0, 0]
    counts = CountAccumulator(2)
    counts.update(torch.eye(2), torch.tensor([0, 1]))
    known, unknown = compute_metrics(counts.reduce(), [500, 400]), compute_metrics(counts.reduce(), None)
    assert (known["many"], known["medium"], known["few"]) == (100, None, None)
    assert (unknown["all"], unknown["many"], unknown["medium"], unknown["few"]) == (100, None, None, None)


def test_top5_of_fewer_classes_is_topc():
    counts = CountAccumulator(3)
    counts.update(torch.randn(8, 3), torch.randint(0, 3, (8,)))
    assert compute_metrics(counts.reduce(), None)["top5"] == 100


def test_a_batch_may_be_empty_and_logits_half_precision():
    counts = CountAccumulator(6, num_experts=2)
    counts.update(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    counts.update(torch.eye(6).bfloat16(), torch.arange(6), torch.ones(6, dtype=torch.int32))
    metrics = compute_metrics(counts.reduce(), None)
    assert metrics["all"] == 100 and metrics["experts_used"] == [1, 0]


def test_misuse_is_named():
    plain, routed = CountAccumulator(3), CountAccumulator(3, num_experts=2)
    one = torch.zeros(1, dtype=torch.long)
    with pytest.raises(InputError, match=r"expected logits \[B, 3\], got shape \(1, 4\)"):
        plain.update(torch.zeros(1, 4), one)
    with pytest.raises(InputError, match="experts_used goes with num_experts"):
        plain.update(torch.zeros(1, 3), one, one + 1)
    with pytest.raises(InputError, match="experts_used goes with num_experts"):
        routed.update(torch.zeros(1, 3), one)
    with pytest.raises(InputError, match="expected 3 class counts, got 2"):
        compute_metrics(plain.reduce(), [1, 2])
    with pytest.raises(RunError, match="start a new CountAccumulator"):
        plain.update(torch.zeros(1, 3), one)


def counted(logits, targets, experts_used):
    """Routed predictions of an ensemble whose second member predicts other classes."""
    counts = CountAccumulator(7, num_experts=3, num_members=2)
    counts.update(logits, targets, experts_used, torch.stack([logits, logits.flip(1)], 1))
    return counts


def worker(out: str) -> None:
    """Count 299 or 1 of 300 samples; a second `reduce` must not count twice."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    logits, targets, experts_used = draw()
    rows = slice(0, 299) if rank == 0 else slice(299, 300)
    counts = counted(logits[rows], targets[rows], experts_used[rows])
    counts.reduce()
    metrics = compute_metrics(counts.reduce(), COUNTS)
    with open(f"{out}.{rank}", "w") as file:
        json.dump({"processes": dist.get_world_size(), "metrics": metrics}, file)
    dist.destroy_process_group()


def test_two_processes_count_each_sample_once(tmp_path):
    run_two_ranks(__file__, tmp_path / "out")
    logits, targets, experts_used = draw()
    fractions = [(experts_used == n).sum().item() / 300 for n in (1, 2, 3)]
    for rank in range(2):
        found = json.loads((tmp_path / f"out.{rank}").read_text())
        assert found["processes"] == 2
        expected = brute_force(logits, targets, COUNTS) | {"experts_used": fractions}
        assert {key: found["metrics"][key] for key in expected} == expected
        # everything else too is to the last digit what one process finds
        assert found["metrics"] == compute_metrics(counted(logits, targets, experts_used).reduce(), COUNTS)


if __name__ == "__main__":
    worker(sys.argv[1])
