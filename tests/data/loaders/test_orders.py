"""Orders and slices: exact, repeatable at any epoch, and covering every batch."""

import pickle

import numpy as np
import pytest
import torch

from ride_timm.data.loaders.orders import (
    SAMPLERS,
    RankSlices,
    SampledOrder,
    SequentialOrder,
    ShuffledOrder,
    class_probabilities,
)
from ride_timm.errors import InputError


def test_sequential_and_shuffled_orders():
    assert SequentialOrder(4)(7).tolist() == [0, 1, 2, 3]
    order = ShuffledOrder(100, seed=3)
    assert len(order) == 100 and sorted(order(0)) == list(range(100))
    assert order(5).tolist() == ShuffledOrder(100, seed=3)(5).tolist()
    assert len({tuple(ShuffledOrder(100, seed)(epoch)) for seed in range(3) for epoch in range(3)}) == 9


class PlainSampler:
    """The class-balanced sampler as one would write it: a bucket per class, its position, a shuffle when it is used up.

    Class draws and permutations come from the same streams as `SampledOrder`'s; all book-keeping is its own.
    """

    def __init__(self, labels, seed):
        self.labels, self.seed, self.epoch = list(labels), seed, 0
        self.classes = sorted(set(self.labels))
        self.state = {c: [[], 0] for c in self.classes}  # what is left of the shuffled bucket, the shuffles so far

    def shuffled(self, c, times):
        bucket = [i for i, label in enumerate(self.labels) if label == c]
        keys = np.random.Generator(np.random.PCG64([self.seed, 2, c]))
        for _ in range(times):
            keys.random(len(bucket))
        by_key = sorted(zip(keys.random(len(bucket)), bucket, strict=True))
        return [i for _, i in by_key]

    def next_epoch(self):
        draws = np.random.default_rng([self.seed, 1, self.epoch]).integers(len(self.classes), size=len(self.labels))
        self.epoch += 1
        out = []
        for c in (self.classes[k] for k in draws):
            left, times = self.state[c]
            if not left:
                left, self.state[c][1] = self.shuffled(c, times), times + 1
            out.append(left.pop(0))
            self.state[c][0] = left
        return out


@pytest.mark.parametrize("counts", [[50, 20, 7, 3, 1], [1], [1, 1, 1], [200, 1], [0, 10, 0, 4]])
@pytest.mark.parametrize("seed", [0, 9])
def test_balanced_order_equals_the_plain_sampler(counts, seed):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    plain = PlainSampler(labels.tolist(), seed)
    expected = [plain.next_epoch() for _ in range(6)]
    order = SampledOrder(labels, seed, "class_balanced")
    assert [order(epoch).tolist() for epoch in range(6)] == expected
    for epoch in (5, 0, 3, 3, 4):  # any epoch, in any order, also freshly made: as a resumed run asks
        assert order(epoch).tolist() == expected[epoch]
        assert SampledOrder(labels, seed, "class_balanced")(epoch).tolist() == expected[epoch]
        assert pickle.loads(pickle.dumps(order))(epoch).tolist() == expected[epoch]


@pytest.mark.parametrize(
    ("sampler", "expected"),  # of each epoch, of 900, 90 and 10 images
    [
        ("class_balanced", [[1 / 3, 1 / 3, 1 / 3]] * 3),
        ("square_root", [[30, 90**0.5, 10**0.5]] * 3),
        ("progressive", [[0.9, 0.09, 0.01], [0.9 + 1 / 3, 0.09 + 1 / 3, 0.01 + 1 / 3], [1 / 3, 1 / 3, 1 / 3]]),
    ],
)
def test_samplers_draw_classes_by_their_closed_form(sampler, expected):
    counts = [900, 90, 10]
    expected = np.array(expected) / np.sum(expected, axis=1, keepdims=True)
    for epoch in range(3):
        np.testing.assert_allclose(class_probabilities(counts, sampler, epoch, 3), expected[epoch], rtol=1e-12)
    labels = np.repeat(np.arange(3), counts)
    orders = [SampledOrder(labels, seed, sampler, 3) for seed in range(20)]
    assert all(len(order) == len(order(0)) == 1000 for order in orders)
    for epoch in range(3):
        per_class = sum(np.bincount(labels[order(epoch)], minlength=3) for order in orders)
        spread = (20_000 * expected[epoch] * (1 - expected[epoch])) ** 0.5
        assert (np.abs(per_class - 20_000 * expected[epoch]) < 4 * spread).all()
    for order in orders:  # no image is seen again before all of its class have been
        times = np.bincount(np.concatenate([order(epoch) for epoch in range(3)]), minlength=1000)
        assert all(np.ptp(times[labels == c]) <= 1 for c in range(3))


@pytest.mark.parametrize("sampler", SAMPLERS[1:])
def test_samplers_repeat_at_any_epoch_and_leave_empty_classes_out(sampler):
    labels = np.random.default_rng(1).permutation(np.repeat([1, 4, 5], [40, 9, 1]))
    expected = [SampledOrder(labels, 3, sampler, 5)(epoch).tolist() for epoch in range(6)]  # each made for its epoch
    order = SampledOrder(labels, 3, sampler, 5)
    for epoch in (5, 0, 3, 3, 4, 1, 2):
        assert order(epoch).tolist() == pickle.loads(pickle.dumps(order))(epoch).tolist() == expected[epoch]
    assert len({tuple(epoch) for epoch in expected}) == 6


def test_progressive_sampling_of_one_epoch_is_that_of_the_images():
    assert class_probabilities([3, 1], "progressive", 0, 1).tolist() == [0.75, 0.25]
    assert class_probabilities([3, 1], "instance").tolist() == [0.75, 0.25]


def test_orders_leave_the_global_generators_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    expected = np.random.rand(), torch.rand(1).item()
    np.random.seed(0)
    torch.manual_seed(0)
    SampledOrder([0, 1, 1], 0, "progressive", 3)(2), ShuffledOrder(3, 0)(1)
    assert (np.random.rand(), torch.rand(1).item()) == expected


@pytest.mark.parametrize("n", [1, 2, 7, 8, 23, 24, 25, 26])
@pytest.mark.parametrize("batch_size", [3, 8, 100])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("train", [True, False])
def test_slices_of_all_ranks_make_the_batches(n, batch_size, num_processes, train):
    if train and n < num_processes:
        with pytest.raises(InputError, match=f"a set of {n} is too small for {num_processes} processes"):
            RankSlices(n, batch_size, train, 0, num_processes)
        return
    ranks = [list(RankSlices(n, batch_size, train, r, num_processes)) for r in range(num_processes)]
    assert [len(slices) for slices in ranks] == [
        len(RankSlices(n, batch_size, train, r, num_processes)) for r in range(num_processes)
    ]
    by_step = {}
    for part in (part for slices in ranks for part in slices):
        assert part.start <= part.low < part.high <= part.stop == min(part.start + batch_size, n)
        by_step.setdefault(part.step, []).append(range(part.low, part.high))
    covered = [i for step in sorted(by_step) for part in by_step[step] for i in part]
    dropped = n % batch_size if train and n % batch_size < num_processes else 0
    assert covered == list(range(n - dropped))
    for parts in by_step.values():
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if train:
        assert len({len(slices) for slices in ranks}) == 1
