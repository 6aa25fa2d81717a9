"""Batches by workers: exact, and independent of the number of processes and workers."""

import contextlib
import gc
import signal
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from encoded_images import encoded, image_set, png_set, smooth
from torchvision import transforms as T

from ride_timm.data.augment.policies import get_policy
from ride_timm.data.loaders import make_loader
from ride_timm.data.loaders.orders import RankSlices, SequentialOrder
from ride_timm.data.loaders.workers import ViewTransform, WorkerBatches
from ride_timm.errors import InputError, RunError


def test_workers_stay_and_read_ahead():
    data = png_set(4)
    with_workers, without, on_gpu = (
        make_loader(data, "inat", train=True, batch_size=2, seed=0, num_workers=n, device=device).loader
        for n, device in ((2, "cpu"), (0, "cpu"), (2, "cuda"))
    )
    assert with_workers.persistent_workers and with_workers.prefetch_factor == 2
    assert not without.persistent_workers and without.num_workers == 0
    assert on_gpu.pin_memory and not with_workers.pin_memory and not without.pin_memory


@pytest.mark.parametrize("train", [True, False])
def test_the_number_of_workers_changes_nothing(train):
    data = png_set(11, size=(40, 36))
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
    loader = make_loader(png_set(4), "inat", train=True, batch_size=2, seed=0, num_workers=2, input_size=8)
    list(loader)
    workers = loader.loader._iterator._workers
    start = time.perf_counter()
    del loader  # no cycle holds it: this alone ends the workers
    assert not any(worker.is_alive() for worker in workers)
    assert time.perf_counter() - start < 4


class _Interrupted(ViewTransform):
    def augment(self, image):
        signal.raise_signal(signal.SIGINT)  # as Ctrl+C does; Python's own handler is that of workers not forked
        return super().augment(image)


def test_workers_leave_ctrl_c_to_the_main_process():
    data = png_set(4)
    how = dict(order=SequentialOrder(4), slices=RankSlices(4, 2, False), seed=0, num_workers=1)
    labels = [labels.tolist() for _, labels in WorkerBatches(data, _Interrupted("inat", False, 8), **how)]
    assert labels == [data.labels[:2].tolist(), data.labels[2:].tolist()]


def test_the_global_generator_changes_nothing():
    loader = make_loader(png_set(4), "inat", train=True, batch_size=4, seed=0, input_size=16)
    torch.manual_seed(1)
    ((first, _),) = loader
    torch.manual_seed(2)
    ((second, _),) = loader
    assert torch.equal(first, second)


@pytest.mark.parametrize("num_processes", [2, 3])
@pytest.mark.parametrize("train", [True, False])
def test_ranks_with_workers_jointly_see_the_images_of_one_process(num_processes, train):
    data, common = png_set(10), {"train": train, "batch_size": 4, "seed": 2, "input_size": 16}
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
    data = png_set(6, broken=4).select([5, 4, 0, 1])
    with pytest.raises(RunError, match=r"^the image in row 4 of split 'train' cannot be read \([^\n]*\)$"):
        list(make_loader(data, policy, train=True, batch_size=2, seed=0, num_workers=num_workers, input_size=8))


def test_after_an_error_nothing_holds_the_loader_and_its_workers():
    """Else they stop when the garbage collector finds them, each after waiting for five seconds."""
    loader = make_loader(image_set(None), "imagenet", train=True, batch_size=1, seed=0, input_size=48, num_workers=1)
    gone = weakref.ref(loader)
    gc.disable()
    try:
        with contextlib.suppress(RunError):
            list(loader)
        del loader
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("train", [True, False])
def test_the_number_of_workers_changes_nothing_for_jpegs(train):
    rng = np.random.default_rng(0)
    sizes = [tuple(rng.integers(80, 400, 2).tolist()) for _ in range(7)]
    data = image_set(*(encoded(smooth(*size), orientation=i % 9 or None) for i, size in enumerate(sizes)))
    common = {"train": train, "batch_size": 3, "seed": 4, "input_size": 24}
    runs = []
    for num_workers in (0, 1, 2):
        loader = make_loader(data, "imagenet", num_workers=num_workers, **common)
        loader.set_epoch(1)
        runs.append([part for batch in loader for part in batch])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_five_crops_are_torchvisions(num_workers):
    data = png_set(5, size=(52, 40))
    how = dict(train=False, batch_size=2, seed=0, input_size=28)
    normalize = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = T.Compose([T.Resize(32), T.FiveCrop(28), lambda crops: [normalize(T.ToTensor()(c)) for c in crops]])
    plain, position = list(make_loader(data, "imagenet", **how)), 0
    for step, (images, labels) in enumerate(
        make_loader(data, "imagenet", five_crops=True, num_workers=num_workers, **how)
    ):
        crops = images.unflatten(0, (5, -1))
        assert crops.shape[1] == len(labels) and torch.equal(labels, plain[step][1])
        assert torch.equal(crops[4], plain[step][0])  # the centre is the test transform
        for i in range(len(labels)):
            assert torch.equal(crops[:, i], torch.stack(expected(data[position][0])))
            position += 1
    assert position == 5


@pytest.mark.parametrize("policy", ["cifar", replace(get_policy("imagenet"), crop_pct=1.0)])
def test_five_crops_need_a_crop(policy):
    with pytest.raises(InputError, match="crops nothing at 28 pixels; leave --five-crop out"):
        make_loader(png_set(2), policy, train=False, batch_size=2, seed=0, input_size=28, five_crops=True)
