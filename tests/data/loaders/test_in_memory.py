"""Batches from memory: exact, and independent of the number of processes."""

from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from encoded_images import encoded, image_set, png_set, smooth

from ride_timm.data.augment.images import build_transform
from ride_timm.data.augment.policies import get_policy
from ride_timm.data.image_set import ImageSet
from ride_timm.data.loaders import make_loader
from ride_timm.data.loaders.in_memory import TensorBatches, decode
from ride_timm.data.loaders.orders import SAMPLERS, RankSlices, ShuffledOrder
from ride_timm.data.loaders.workers import ignore_interrupts
from ride_timm.errors import InputError


def joined(loader) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    batches = list(loader)
    assert len(batches) == len(loader)
    return [images for images, _ in batches], [labels for _, labels in batches]


STRONG = get_policy("cifar").strong("rand-m9-mstd0.5")
BATCHED = get_policy("cifar").strong("cifar10", 8)


@pytest.mark.parametrize("policy", ["cifar", STRONG, BATCHED], ids=["plain", "auto_augment", "batched"])
@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("train, sampler", [*((True, sampler) for sampler in SAMPLERS), (False, "instance")])
def test_ranks_jointly_see_the_images_of_one_process(num_processes, train, sampler, policy):
    data = png_set(13)
    common = {"train": train, "batch_size": 5, "seed": 1, "num_processes": num_processes}
    common |= {"sampler": sampler, "epochs": 3}
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
    data = png_set(13)
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
    data = png_set(13)
    images, labels = joined(make_loader(data, "cifar", train=False, batch_size=5, seed=0))
    transform = build_transform("cifar", train=False)
    assert torch.equal(torch.cat(images), torch.stack([transform(data[i][0]) for i in range(13)]))
    assert torch.cat(labels).tolist() == data.labels.tolist()


def test_small_images_of_another_size_are_fitted():
    data = png_set(4, size=(40, 24))
    ((images, _),) = make_loader(data, "cifar", train=False, batch_size=4, seed=0)
    assert torch.equal(images, torch.stack([build_transform("cifar", False)(data[i][0]) for i in range(4)]))
    ((images, _),) = make_loader(data, "fashion", train=True, batch_size=4, seed=0, input_size=20)
    assert images.shape == (4, 3, 20, 20)


def test_decode():
    data = png_set(3, size=(5, 4))
    pixels = decode(data)
    assert pixels.shape == (3, 4, 5, 3) and pixels.dtype == torch.uint8
    assert np.array_equal(pixels[2].numpy(), np.asarray(data[2][0]))
    mixed = datasets.concatenate_datasets([data.images, png_set(1, size=(6, 4)).images])
    mixed = ImageSet(mixed, np.arange(4), np.zeros(4, dtype=np.int64), "img")
    with pytest.raises(InputError, match="row 3 of split 'train' is 6x4 pixels, the first one 5x4"):
        decode(mixed)
    assert decode(mixed, 8).shape == (4, 8, 8, 3)


CUT = replace(STRONG, cutout=8)


@pytest.mark.parametrize(
    ("train", "policy"), [(True, "cifar"), (False, "cifar"), (True, STRONG), (True, CUT), (True, BATCHED)]
)
def test_batches_are_made_where_the_pixels_are_and_wait_for_nothing(train, policy):
    """A tensor on "meta" holds no values: asking for one, as a synchronisation would, raises."""
    loader = make_loader(png_set(5), policy, train=train, batch_size=3, seed=0, device="meta")
    assert loader.pixels.device.type == loader.labels.device.type == "meta"
    assert loader.pixels.dtype == torch.uint8
    for (images, labels), size in zip(loader, (3, 2), strict=True):
        assert images.device.type == labels.device.type == "meta"
        assert images.shape == (size, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("views", [1, 2])
def test_workers_that_auto_augment_change_nothing(views):
    data = png_set(13)
    how = dict(order=ShuffledOrder(13, 1), slices=RankSlices(13, 5, True), seed=1, views=views)
    loaders = [TensorBatches(decode(data), data.labels, CUT, num_workers=n, **how) for n in (0, 2)]
    assert loaders[1].loader.worker_init_fn is ignore_interrupts
    for epoch in (0, 1):  # the workers persist, the epoch reaches them
        for loader in loaders:
            loader.set_epoch(epoch)
        for (expected, _), (found, _) in zip(*loaders, strict=True):
            assert torch.equal(found, expected)


def test_the_policy_of_cifar10_needs_no_workers():
    data = png_set(5)
    loader, other = (make_loader(data, BATCHED, train=True, batch_size=5, seed=1, num_workers=n) for n in (0, 2))
    assert loader.loader is other.loader is None
    plain = make_loader(data, get_policy("cifar").strong(None, 8), train=True, batch_size=5, seed=1)
    assert not torch.equal(next(iter(loader))[0], next(iter(plain))[0])


@pytest.mark.parametrize(("device", "expected"), [("cpu", 0), ("meta", 2)])
def test_on_a_cpu_training_keeps_all_cores(device, expected, monkeypatch):
    monkeypatch.setattr("ride_timm.data.loaders.usable_cores", lambda: 2)
    how = dict(train=True, batch_size=5, seed=1, num_workers=2, device=device)
    assert make_loader(png_set(5), STRONG, **how).loader.num_workers == expected


def test_small_images_held_in_memory_are_decoded_in_full(decoded):
    data = image_set(encoded(smooth(200, 150)))
    list(make_loader(data, "cifar", train=True, batch_size=1, seed=0, reduced_decode=True))
    assert decoded == [(200, 150)]


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["cifar", CUT, BATCHED], ids=["plain", "strong", "batched"])
def test_a_gpu_yields_the_batches_of_the_cpu(policy):
    data = png_set(13)
    common = dict(train=True, batch_size=5, seed=1, views=2 if policy != "cifar" else 1)
    loaders = [make_loader(data, policy, device=device, **common) for device in ("cpu", "cuda")]
    for (expected, labels), (found, found_labels) in zip(*loaders, strict=True):
        assert found.device.type == "cuda" and torch.equal(found_labels.cpu(), labels)
        # a GPU divides by the reciprocal, and of two nearest pixels it may take the other
        close = torch.isclose(found.cpu(), expected, rtol=1e-5, atol=1e-6)
        assert (~close).float().mean() <= (0.01 if policy == BATCHED else 0)
