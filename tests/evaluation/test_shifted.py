"""Shifted test sets: sizes, order and contents by the protocol, accuracies against brute force."""

import numpy as np
import pytest
import torch

from ride_timm.data.longtail import longtail_indices
from ride_timm.evaluation.shifted import shifted_accuracies, shifted_sets, shifted_table


def sizes(part, targets, num_classes):
    return np.bincount(targets[part.rows], minlength=num_classes).tolist()


def test_the_sets_of_cifar100_have_the_protocols_sizes_and_images():
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 100))
    sets, skipped = shifted_sets(targets, list(range(600, 500, -1)))
    assert [(part.direction, part.ratio) for part in sets] == [
        *(("forward", ratio) for ratio in (50, 25, 10, 5, 2)),
        ("uniform", 1),
        *(("backward", ratio) for ratio in (2, 5, 10, 25, 50)),
    ]
    assert skipped == [] and len(sets[5].rows) == 10_000
    for part in (*sets[:5], *sets[6:]):
        expected = [int(100 * (1 / part.ratio) ** (c / 99)) for c in range(100)]
        assert sizes(part, targets, 100) == (expected if part.direction == "forward" else expected[::-1])
    # the rows that the authors' long-tailed CIFAR selects with this factor, which their code applies to the test set
    assert sets[0].rows.tolist() == sorted(longtail_indices(targets, "exp", 1 / 50, 0))


def test_sets_follow_the_training_frequency_and_the_rarest_test_class():
    targets = np.repeat([0, 1, 3, 4], [9, 7, 6, 20])  # class 2 has no test images
    sets, skipped = shifted_sets(targets, [5, 80, 60, 20, 300])
    assert skipped == [50, 25, 10]
    assert [sizes(part, targets, 5) for part in sets] == [
        [1, 3, 0, 2, 6],  # forward 5: int(6 * 5^(-k/3)) for classes 4, 1, 3, 0
        [3, 4, 0, 3, 6],
        [6, 6, 0, 6, 6],
        [6, 3, 0, 4, 3],
        [6, 2, 0, 3, 1],
    ]
    assert all(set(sets[0].rows) <= set(part.rows) for part in sets[1:3])


def test_accuracies_are_those_of_the_subsets():
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(4).repeat_interleave(30)
    logits = torch.randn(120, 4, generator=generator) + 1.5 * torch.eye(4)[targets]
    counts, model_prior = [100, 50, 20, 5], torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    found = shifted_accuracies(logits, targets, counts, model_prior)
    sets = shifted_sets(targets.numpy(), counts)[0]
    assert [(row["direction"], row["ratio"], row["images"]) for row in found] == [
        (part.direction, part.ratio, len(part.rows)) for part in sets
    ]
    for row, part in zip(found, sets, strict=True):
        labels = targets[part.rows].tolist()
        prior = torch.tensor([labels.count(c) / len(labels) for c in range(4)])
        for key, shift in (("accuracy", 0), ("known_prior", prior.log() - model_prior)):
            right = [z.argmax().item() == label for z, label in zip(logits[part.rows] + shift, labels, strict=True)]
            assert row[key] == pytest.approx(100 * sum(right) / len(labels))
    assert found[0]["known_prior"] > found[0]["accuracy"] and 0 <= found[0]["estimated_prior"] <= 100
    lines = shifted_table(found).splitlines()
    assert lines[0].split() == ["test", "set", "images", "accuracy", "known", "prior", "estimated", "prior"]
    assert [line.split()[0] for line in lines[2:]] == ["forward"] * 4 + ["uniform"] + ["backward"] * 4
