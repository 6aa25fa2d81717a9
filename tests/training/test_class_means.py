"""Classifiers from class means: brute force, nearest means, two processes."""

import sys

import pytest
import timm
import torch
from accelerate import Accelerator
from torch.nn.functional import normalize
from two_ranks import run_two_ranks

from ride_timm import InputError
from ride_timm.losses import make_loss
from ride_timm.training.class_means import class_means, heads_from_class_means
from ride_timm.training.objectives import ExpertsObjective

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
    model = network(use_norm, num_experts=1, backbone=backbone)
    heads_from_class_means(model, batches(), Accelerator(cpu=True), seed=0)
    means, norm = brute_force(model, batches())
    with torch.no_grad():
        features, logits = model.eval().forward_experts(batches()[0][0])
    cosines = torch.einsum("bed,ecd->bec", normalize(features, dim=-1), normalize(means, dim=-1))
    if not use_norm:
        cosines = cosines * features.norm(dim=-1, keepdim=True) / norm
    torch.testing.assert_close(logits, 30 * cosines, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_norm", [True, False])
def test_every_expert_but_the_first_leaves_the_mean_by_half_its_length(use_norm):
    model = network(use_norm, num_experts=3)
    heads_from_class_means(model, batches(), Accelerator(cpu=True), seed=0)
    means, _ = brute_force(model, batches())
    rows = torch.stack([normalize(head.weight.detach(), dim=1) for head in model.get_classifier()])
    cosines = (rows * normalize(means, dim=-1)).sum(-1)
    torch.testing.assert_close(cosines[0], torch.ones(C))
    assert ((cosines[1:] - 0.894).abs() < 0.1).all() and (rows[1] - rows[2]).abs().max() > 0.1


@pytest.mark.parametrize("loss", ["ce", "ride", "balanced_softmax", "balpoe"])
def test_copies_of_one_backbone_grow_apart_under_every_loss(loss):
    model = network(num_experts=2, backbone="test_vit").train()
    model.experts[1].load_state_dict(model.experts[0].state_dict())
    heads_from_class_means(model, batches(), Accelerator(cpu=True), seed=0)
    arguments = dict(taus=(0.9, 1.1)) if loss == "balpoe" else {}
    objective = ExpertsObjective(model, make_loss(loss, [3, 2, 1], **arguments))
    optimizer = torch.optim.AdamW(objective.trainable_parameters(), lr=1e-3)
    for images, labels in batches():
        optimizer.zero_grad()
        objective(images, labels)["loss"].backward()
        optimizer.step()
    one, other = (torch.cat([p.flatten() for p in expert.stages.parameters()]) for expert in model.experts)
    assert (one - other).abs().mean() > 1e-4


def test_another_classifier_is_refused():
    model = network()
    model.experts[1].fc = torch.nn.Sequential(model.experts[1].fc)
    with pytest.raises(InputError, match=r"a Sequential has no weight vector per class: pass --use-norm"):
        heads_from_class_means(model, batches(), Accelerator(cpu=True), seed=0)


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
