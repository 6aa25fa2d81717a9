"""Classifiers from class means: brute force, nearest means, two processes."""

import sys

import pytest
import timm
import torch
from accelerate import Accelerator
from torch.nn.functional import normalize
from two_ranks import run_two_ranks

from ride_timm import InputError
from ride_timm.training.class_means import class_means, heads_from_class_means

C = 3


def network(use_norm=True, num_experts=2, backbone="test_convnext"):
    torch.manual_seed(0)
    options = dict(num_classes=C, num_experts=num_experts, use_norm=use_norm)
    return timm.create_model("ride", backbone=backbone, **options)


def batches(num_batches=3, size=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_batches, size, 3, 64, 64, generator=generator)
    labels = torch.arange(num_batches * size).view(num_batches, size) % C
    return list(zip(images, labels, strict=True))


@torch.no_grad()
def brute_force(model, data):
    images, labels = (torch.cat(part) for part in zip(*data, strict=True))
    features = model.eval().forward_experts(images)[0]  # [B, E, D]
    return torch.stack([features[labels == c].mean(0) for c in range(C)], 1), features.norm(dim=-1).mean()


def test_means_are_those_of_all_images_and_the_mode_is_kept():
    model = network().train()
    expected, norm = brute_force(network(), batches())
    means, scale = class_means(model, batches(), Accelerator(cpu=True))
    torch.testing.assert_close(means, expected)
    torch.testing.assert_close(scale[0], norm)
    assert model.training


@pytest.mark.parametrize("use_norm", [True, False])
@pytest.mark.parametrize("backbone", ["test_convnext", "test_vit", "test_efficientnet"])
def test_logits_are_scaled_cosines_with_the_class_means(use_norm, backbone):
    model = network(use_norm, backbone=backbone)
    heads_from_class_means(model, batches(), Accelerator(cpu=True))
    means, norm = brute_force(model, batches())
    with torch.no_grad():
        features, logits = model.eval().forward_experts(batches()[0][0])
    cosines = torch.einsum("bed,ecd->bec", normalize(features, dim=-1), normalize(means, dim=-1))
    if not use_norm:
        cosines = cosines * features.norm(dim=-1, keepdim=True) / norm
    torch.testing.assert_close(logits, 30 * cosines, rtol=1e-4, atol=1e-4)


def test_another_classifier_is_refused():
    model = network()
    model.add_class_affine()
    with pytest.raises(InputError, match=r"head_init=class_means needs a cosine or linear classifier.*ClassAffine"):
        heads_from_class_means(model, batches(), Accelerator(cpu=True))


def test_two_processes_give_the_means_of_all_images(tmp_path):
    run_two_ranks(__file__, tmp_path / "means")
    expected, _ = brute_force(network(), batches(4))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"means{rank}"), expected)


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    means, _ = class_means(network(), batches(4)[rank::2], accelerator)
    torch.save(means, f"{sys.argv[1]}{rank}")
