"""Batches: exact, and independent of the number of processes and workers."""

import io
import time

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image

from ride_timm.data.augment.transforms import build_transform, get_policy
from ride_timm.data.load import ImageSet
from ride_timm.data.loaders.loader import TensorBatches, WorkerBatches, decode, make_loader
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


# in memory


STRONG = get_policy("cifar").with_auto_augment("rand-m9-mstd0.5")


@pytest.mark.parametrize("policy", ["cifar", STRONG], ids=["plain", "auto_augment"])
@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("train, order", [(True, None), (True, "balanced"), (False, None)])
def test_ranks_jointly_see_the_images_of_one_process(num_processes, train, order, policy):
    data = image_set(13)
    common = {"train": train, "batch_size": 5, "seed": 1, "order": order, "num_processes": num_processes}
    one = make_loader(data, policy, **{**common, "num_processes": 1})
    ranks = [make_loader(data, policy, rank=r, **common) for r in range(num_processes)]
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


@pytest.mark.parametrize(
    ("train", "policy", "place"), [(True, "cifar", "meta"), (False, "cifar", "meta"), (True, STRONG, "cpu")]
)
def test_batches_are_made_where_the_pixels_are_and_wait_for_nothing(train, policy, place):
    """A tensor on "meta" holds no values: asking for one, as a synchronisation would, raises."""
    loader = make_loader(image_set(5), policy, train=train, batch_size=3, seed=0, device="meta")
    assert loader.pixels.device.type == place and loader.labels.device.type == "meta"
    assert loader.pixels.dtype == torch.uint8
    for (images, labels), size in zip(loader, (3, 2), strict=True):
        assert images.device.type == labels.device.type == "meta"
        assert images.shape == (size, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)


# workers


def test_workers_stay_and_read_ahead():
    data = image_set(4)
    with_workers, without, on_gpu = (
        make_loader(data, "inat", train=True, batch_size=2, seed=0, num_workers=n, device=device).loader
        for n, device in ((2, "cpu"), (0, "cpu"), (2, "cuda"))
    )
    assert with_workers.persistent_workers and with_workers.prefetch_factor == 2
    assert not without.persistent_workers and without.num_workers == 0
    assert on_gpu.pin_memory and not with_workers.pin_memory and not without.pin_memory


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
