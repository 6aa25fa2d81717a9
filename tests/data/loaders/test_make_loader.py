"""Loaders of two views, and arguments that are refused."""

import pytest
import torch
from encoded_images import png_set

from ride_timm.data.augment.policies import get_policy
from ride_timm.data.loaders import make_loader
from ride_timm.errors import InputError

# two views


@pytest.mark.parametrize(("policy", "num_workers"), [("cifar", 0), ("imagenet", 0), ("imagenet", 2)])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_two_views_are_those_of_two_loaders(policy, num_workers, num_processes):
    """The plain loader's images, then the strong one's: the same images in the same order, bit for bit."""
    data, plain = png_set(11, size=(40, 36)), get_policy(policy)
    strong = plain.strong("rand-m5-mstd0.5")
    common = dict(train=True, batch_size=4, seed=3, rank=num_processes - 1, num_processes=num_processes, input_size=24)
    both = make_loader(data, strong, views=2, num_workers=num_workers, **common)
    alone = [make_loader(data, one, **common) for one in (plain, strong)]
    assert len(both) == len(alone[0])
    for epoch in (0, 1):
        for loader in (both, *alone):
            loader.set_epoch(epoch)
        for (images, labels), (weak, targets), (changed, _) in zip(both, *alone, strict=True):
            assert torch.equal(labels, targets) and not torch.equal(weak, changed)
            assert torch.equal(images, torch.cat([weak, changed]))
            assert images.is_contiguous(memory_format=torch.channels_last)


def test_two_views_decode_and_hold_a_set_once(decoded):
    from encoded_images import encoded, image_set, smooth

    data = image_set(encoded(smooth(40, 40)), encoded(smooth(41, 41)))
    for policy in ("cifar", "imagenet"):
        strong = get_policy(policy).strong("rand-m5-mstd0.5")
        decoded.clear()
        list(make_loader(data, strong, train=True, batch_size=2, seed=0, views=2, input_size=24))
        assert len(decoded) == 2


def test_two_views_without_auto_augment_differ_in_their_crops():
    data = png_set(8)
    ((images, labels),) = make_loader(data, "cifar", train=True, batch_size=8, seed=0, views=2)
    ((first, _),) = make_loader(data, "cifar", train=True, batch_size=8, seed=0)
    assert len(images) == 2 * len(labels) and torch.equal(images[:8], first)
    assert not any(torch.equal(one, other) for one, other in zip(images[:8], images[8:], strict=True))


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
        ({"batch_size": 2, "num_processes": 3}, "a batch of 2 is too small for 3 processes"),
        ({"num_processes": 7}, "a set of 6 is too small for 7 processes"),
        ({"sampler": "class_balanced", "train": False}, "sampler=class_balanced: a sampler is for training"),
        ({"sampler": "cyclic"}, "unknown sampler 'cyclic', expected one of instance, class_balanced, square_root"),
        ({"input_size": 0}, "input size 0"),
        ({"policy": "mnist"}, "unknown augmentation 'mnist'"),
    ],
)
def test_arguments_are_checked_before_an_image_is_read(arguments, message):
    data = png_set(6, broken=0)
    with pytest.raises(InputError, match=message):
        make_loader(data, **{"policy": "cifar", "train": True, "batch_size": 16, "seed": 0, **arguments})


def test_empty_sets_and_epochs_below_zero_are_refused():
    with pytest.raises(InputError, match="split 'train' has zero images"):
        make_loader(png_set(3).select([]), "cifar", train=False, batch_size=1, seed=0)
    loader = make_loader(png_set(3), "cifar", train=True, batch_size=2, seed=0)
    for epoch in (-1, 0.5):
        with pytest.raises(InputError, match="epoch"):
            loader.set_epoch(epoch)
