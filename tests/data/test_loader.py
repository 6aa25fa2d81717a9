"""Orders, shares and batches: exact, and independent of the number of processes and workers."""

import io
import pickle
import time

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image

from ride_timm.data.loader import (
    ClassBalancedOrder,
    SequentialOrder,
    Shares,
    ShuffledOrder,
    TensorBatches,
    WorkerBatches,
    decode,
    make_loader,
)
from ride_timm.data.sources import ImageSet
from ride_timm.data.transforms import build_transform
from ride_timm.errors import InputError, RunError


def image_set(
    n: int = 13, size: tuple[int, int] = (32, 32), num_classes: int = 3, broken: int | None = None
) -> ImageSet:
    rng = np.random.default_rng(0)
    encoded = []
    for i in range(n):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(buffer, "PNG")
        encoded.append({"bytes": b"junk" if i == broken else buffer.getvalue(), "path": None})
    features = Features(img=datasets.Image(), other=Value("int64"))
    images = Dataset.from_dict({"img": encoded, "other": [0] * n}, features=features).select_columns(["img"])
    return ImageSet(images, np.arange(n), np.arange(n) % num_classes, "img")


def joined(loader) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    batches = list(loader)
    assert len(batches) == len(loader)
    return [images for images, _ in batches], [labels for _, labels in batches]


# orders


def test_sequential_and_shuffled_orders():
    assert SequentialOrder(4)(7).tolist() == [0, 1, 2, 3]
    order = ShuffledOrder(100, seed=3)
    assert len(order) == 100 and sorted(order(0)) == list(range(100))
    assert order(5).tolist() == ShuffledOrder(100, seed=3)(5).tolist()
    assert len({tuple(ShuffledOrder(100, seed)(epoch)) for seed in range(3) for epoch in range(3)}) == 9


class PlainSampler:
    """The class-balanced sampler as one would write it: a bucket per class, its position, a shuffle when it is used up.

    Class draws and permutations come from the same streams as `ClassBalancedOrder`'s; all book-keeping is its own.
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
    order = ClassBalancedOrder(labels, seed)
    assert [order(epoch).tolist() for epoch in range(6)] == expected
    for epoch in (5, 0, 3, 3, 4):  # any epoch, in any order, also freshly made: as a resumed run asks
        assert order(epoch).tolist() == expected[epoch]
        assert ClassBalancedOrder(labels, seed)(epoch).tolist() == expected[epoch]
        assert pickle.loads(pickle.dumps(order))(epoch).tolist() == expected[epoch]


def test_balanced_order_is_balanced_and_uses_buckets_evenly():
    labels = np.repeat(np.arange(4), [3000, 600, 300, 100])
    order = ClassBalancedOrder(labels, 0)
    drawn = np.concatenate([order(epoch) for epoch in range(3)])
    assert len(order(0)) == len(order) == 4000
    per_class = np.bincount(labels[drawn])
    assert np.abs(per_class - 3000).max() < 5 * (12_000 * 0.25 * 0.75) ** 0.5
    times = np.bincount(drawn, minlength=4000)
    for c in range(4):  # no image is seen again before all of its class have been
        assert np.ptp(times[labels == c]) <= 1


def test_orders_leave_the_global_generators_alone():
    np.random.seed(0)
    torch.manual_seed(0)
    expected = np.random.rand(), torch.rand(1).item()
    np.random.seed(0)
    torch.manual_seed(0)
    ClassBalancedOrder([0, 1, 1], 0)(2), ShuffledOrder(3, 0)(1)
    assert (np.random.rand(), torch.rand(1).item()) == expected


# shares


@pytest.mark.parametrize("n", [1, 2, 7, 8, 23, 24, 25, 26])
@pytest.mark.parametrize("batch_size", [3, 8, 100])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("train", [True, False])
def test_shares_of_all_ranks_make_the_batches(n, batch_size, num_processes, train):
    if train and n < num_processes:
        with pytest.raises(InputError, match=f"{n} images cannot serve {num_processes} processes"):
            Shares(n, batch_size, train, 0, num_processes)
        return
    ranks = [list(Shares(n, batch_size, train, r, num_processes)) for r in range(num_processes)]
    assert [len(shares) for shares in ranks] == [
        len(Shares(n, batch_size, train, r, num_processes)) for r in range(num_processes)
    ]
    by_step = {}
    for share in (share for shares in ranks for share in shares):
        assert share.start <= share.low < share.high <= share.stop == min(share.start + batch_size, n)
        by_step.setdefault(share.step, []).append(range(share.low, share.high))
    covered = [i for step in sorted(by_step) for part in by_step[step] for i in part]
    dropped = n % batch_size if train and n % batch_size < num_processes else 0
    assert covered == list(range(n - dropped))
    for parts in by_step.values():
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if train:
        assert len({len(shares) for shares in ranks}) == 1


# in memory


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("train, order", [(True, None), (True, "balanced"), (False, None)])
def test_ranks_jointly_see_the_images_of_one_process(num_processes, train, order):
    data = image_set(13)
    common = {"train": train, "batch_size": 5, "seed": 1, "order": order, "num_processes": num_processes}
    one = make_loader(data, "cifar", **{**common, "num_processes": 1})
    ranks = [make_loader(data, "cifar", rank=r, **common) for r in range(num_processes)]
    assert isinstance(one, TensorBatches)
    for epoch in (0, 2):
        for loader in (one, *ranks):
            loader.set_epoch(epoch)
        parts = [list(loader) for loader in ranks]
        for step, (images, labels) in enumerate(one):
            mine = [part[step] for part in parts if step < len(part)]
            assert torch.equal(torch.cat([image for image, _ in mine]), images)
            assert torch.equal(torch.cat([label for _, label in mine]), labels)
        assert max(map(len, parts)) == len(one)


def test_training_batches_change_with_the_epoch_and_repeat_exactly():
    data = image_set(13)
    loader, other = (make_loader(data, "cifar", train=True, batch_size=5, seed=0) for _ in range(2))
    first, labels = joined(loader)
    assert [len(images) for images in first] == [5, 5, 3]  # the last, partial batch is kept
    assert all(torch.equal(a, b) for a, b in zip(first, joined(loader)[0], strict=True))
    other.set_epoch(1)
    second = joined(other)[0]
    assert not torch.equal(first[0], second[0])
    loader.set_epoch(1)
    assert all(torch.equal(a, b) for a, b in zip(second, joined(loader)[0], strict=True))
    assert sorted(torch.cat(labels).tolist()) == sorted(data.labels.tolist())
    assert first[0].dtype == torch.float32 and first[0].is_contiguous(memory_format=torch.channels_last)
    assert labels[0].dtype == torch.int64


def test_evaluation_gives_every_image_once_in_order():
    data = image_set(13)
    images, labels = joined(make_loader(data, "cifar", train=False, batch_size=5, seed=0))
    transform = build_transform("cifar", train=False)
    assert torch.equal(torch.cat(images), torch.stack([transform(data[i][0]) for i in range(13)]))
    assert torch.cat(labels).tolist() == data.labels.tolist()


def test_small_images_of_another_size_are_fitted():
    data = image_set(4, size=(40, 24))
    ((images, _),) = make_loader(data, "cifar", train=False, batch_size=4, seed=0)
    assert torch.equal(images, torch.stack([build_transform("cifar", False)(data[i][0]) for i in range(4)]))
    ((images, _),) = make_loader(data, "fashion", train=True, batch_size=4, seed=0, input_size=20)
    assert images.shape == (4, 3, 20, 20)


def test_decode():
    data = image_set(3, size=(5, 4))
    pixels = decode(data)
    assert pixels.shape == (3, 4, 5, 3) and pixels.dtype == torch.uint8
    assert np.array_equal(pixels[2].numpy(), np.asarray(data[2][0]))
    mixed = datasets.concatenate_datasets([data.images, image_set(1, size=(6, 4)).images])
    mixed = ImageSet(mixed, np.arange(4), np.zeros(4, dtype=np.int64), "img")
    with pytest.raises(InputError, match="row 3 of split 'train' is 6x4 pixels, the first one 5x4"):
        decode(mixed)
    assert decode(mixed, 8).shape == (4, 8, 8, 3)


# workers


@pytest.mark.parametrize("train", [True, False])
def test_the_number_of_workers_changes_nothing(train):
    data = image_set(11, size=(40, 36))
    common = {"train": train, "batch_size": 4, "seed": 5, "input_size": 24}
    state = torch.get_rng_state()
    loaders = [make_loader(data, "imagenet", num_workers=n, **common) for n in (0, 1, 2)]
    assert all(isinstance(loader, WorkerBatches) for loader in loaders)
    runs = []
    for loader in loaders:
        runs.append([])
        for epoch in (0, 1):  # the workers persist, the epoch reaches them
            loader.set_epoch(epoch)
            runs[-1] += [part for batch in loader for part in batch]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))
    assert torch.equal(runs[0][0], runs[0][6]) != train
    assert torch.equal(torch.get_rng_state(), state)
    images, labels = runs[0][:2]
    assert images.shape == (4, 3, 24, 24) and images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64


def test_workers_stop_at_once():
    loader = make_loader(image_set(4), "inat", train=True, batch_size=2, seed=0, num_workers=2, input_size=8)
    list(loader)
    workers = loader.loader._iterator._workers
    start = time.perf_counter()
    del loader  # no cycle holds it: this alone ends the workers
    assert not any(worker.is_alive() for worker in workers)
    assert time.perf_counter() - start < 4


def test_the_global_generator_changes_nothing():
    loader = make_loader(image_set(4), "inat", train=True, batch_size=4, seed=0, input_size=16)
    torch.manual_seed(1)
    ((first, _),) = loader
    torch.manual_seed(2)
    ((second, _),) = loader
    assert torch.equal(first, second)


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_with_workers_jointly_see_the_images_of_one_process(num_processes, train):
    data, common = image_set(10), {"train": train, "batch_size": 4, "seed": 2, "input_size": 16}
    parts = [
        list(make_loader(data, "inat", rank=r, num_processes=num_processes, **common)) for r in range(num_processes)
    ]
    # two images are left for the last batch: too few to train three processes, fine for evaluation
    steps = 2 if train and num_processes == 3 else 3
    assert max(map(len, parts)) == steps
    for step, (images, labels) in enumerate(make_loader(data, "inat", **common)):
        if step < steps:
            mine = [part[step] for part in parts if step < len(part)]
            assert torch.equal(torch.cat([image for image, _ in mine]), images)
            assert torch.equal(torch.cat([label for _, label in mine]), labels)


@pytest.mark.parametrize("policy, num_workers", [("cifar", 0), ("imagenet", 0), ("imagenet", 2)])
def test_a_corrupt_image_names_its_row(policy, num_workers):
    data = image_set(6, broken=4).select([5, 4, 0, 1])
    with pytest.raises(RunError, match=r"^the image in row 4 of split 'train' cannot be read \([^\n]*\)$"):
        list(make_loader(data, policy, train=True, batch_size=2, seed=0, num_workers=num_workers, input_size=8))


# arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch size 0 is not an integer of at least 1"),
        ({"batch_size": 2.0}, "batch size 2.0"),
        ({"batch_size": True}, "batch size True"),
        ({"seed": -1}, "seed -1"),
        ({"num_workers": -1}, "number of workers -1"),
        ({"num_processes": 0}, "number of processes 0"),
        ({"rank": 2, "num_processes": 2}, "rank 2 is not below the number of processes, 2"),
        ({"batch_size": 2, "num_processes": 3}, "batch size 2 cannot serve 3 processes"),
        ({"num_processes": 7}, "6 images cannot serve 7 processes"),
        ({"order": "random"}, "unknown order 'random'"),
        ({"order": "balanced", "train": False}, "'balanced' for training"),
        ({"input_size": 0}, "input size 0"),
        ({"policy": "mnist"}, "unknown augmentation 'mnist'"),
    ],
)
def test_arguments_are_checked_before_an_image_is_read(arguments, message):
    data = image_set(6, broken=0)
    with pytest.raises(InputError, match=message):
        make_loader(data, **{"policy": "cifar", "train": True, "batch_size": 16, "seed": 0, **arguments})


def test_empty_sets_and_epochs_below_zero_are_refused():
    with pytest.raises(InputError, match="split 'train' has zero images"):
        make_loader(image_set(3).select([]), "cifar", train=False, batch_size=1, seed=0)
    loader = make_loader(image_set(3), "cifar", train=True, batch_size=2, seed=0)
    for epoch in (-1, 0.5):
        with pytest.raises(InputError, match="epoch"):
            loader.set_epoch(epoch)
