"""Objectives: gradients across ranks, frozen parts, mixed targets and errors."""

import copy
import sys

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from two_ranks import run_two_ranks

from ride_timm.data.augment.mixing import MixedTargets
from ride_timm.errors import InputError
from ride_timm.losses import LOSSES, make_loss
from ride_timm.losses.terms import distillation, router_loss
from ride_timm.training.objectives import DistillationObjective, ExpertsObjective, HeadsObjective, RouterObjective

COUNTS = [300, 120, 90, 40, 15, 4]
SHARDS = {"equal": (4, 4), "unequal": (7, 2)}
CASES = ["ride", "ride-collaborative", "ldam", "focal", "ce", "cb_ce", "cb_focal", "sade", "balpoe"]
CASES += ["distillation", "router", "heads"]


class TinyRouter(nn.Module):
    def __init__(self, D, num_experts):
        super().__init__()
        self.norm = nn.BatchNorm1d(D)
        self.gates = nn.ModuleList(nn.Linear(D, 1) for _ in range(num_experts - 1))

    def forward(self, features: Tensor, expert_logits: Tensor) -> Tensor:
        return torch.cat([gate(self.norm(features[:, i])) for i, gate in enumerate(self.gates)], 1)


class TinyExperts(nn.Module):
    """Minimal RIDE model with BatchNorm in the trunk and dropout in the heads."""

    def __init__(self, num_experts=3, router=False, C=6, D=5, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.num_experts, self.num_classes = num_experts, C
        self.trunk = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, D))
        self.drop = nn.Dropout(0.5)
        self.heads = nn.ModuleList(nn.Linear(D, C) for _ in range(num_experts))
        self.router = TinyRouter(D, num_experts) if router else None

    def forward_experts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        logits = torch.stack([head(self.drop(features)) for head in self.heads], 1)
        return features[:, None].expand(-1, self.num_experts, -1), 4 * logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_experts(x)[1].mean(1)


def batch(dtype=torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(9, 1, 4, 4, generator=generator, dtype=dtype), torch.tensor([0, 0, 1, 0, 2, 5, 3, 4, 5])


def build(case: str):
    """Objective in float64 and eval mode, so that BatchNorm does not mix samples."""
    if case == "router":
        objective = RouterObjective(TinyExperts(router=True), pos_weight=10)
    elif case == "heads":
        model = TinyExperts()
        objective = HeadsObjective(model, [f"heads.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")])
    elif case == "distillation":
        loss = make_loss("ride", COUNTS, reweight_epoch=2)
        objective = DistillationObjective(TinyExperts(), loss, TinyExperts(6, seed=1), temperature=1.5)
    elif case.startswith("ride"):
        factor = 0 if case.endswith("collaborative") else -0.45
        loss = make_loss("ride", COUNTS, reweight_epoch=2, additional_diversity_factor=factor)
        objective = ExpertsObjective(TinyExperts(), loss)
    else:
        counts = None if case in ("focal", "ce") else COUNTS
        kwargs = {"ldam": {"reweight_epoch": 2}, "focal": {"gamma": 2.0}}.get(case, {})
        objective = ExpertsObjective(TinyExperts(), make_loss(case, counts, **kwargs))
    objective.set_epoch(2)  # re-weighting is active
    return objective.double().eval()


def gradients(objective: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


def worker(out: str) -> None:
    """Save the gradients of every case and split on this rank, averaged by DDP."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    assert dist.get_world_size() == 2
    images, targets = batch(torch.float64)
    found = {"processes": torch.tensor(dist.get_world_size())}
    for case in CASES:
        for split, sizes in SHARDS.items():
            shard = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))
            objective = build(case)
            wrapped = DistributedDataParallel(objective)  # its hooks must live until backward
            result = wrapped(images[shard], targets[shard])
            result["loss"].backward()
            found |= {f"{case}/{split}/{name}": grad for name, grad in gradients(objective).items()}
            found[f"{case}/{split}/loss"] = result["loss"].detach()
    save_file(found, f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("gloo")
    run_two_ranks(__file__, folder / "out")
    return [load_file(folder / f"out.{rank}") for rank in range(2)]


@pytest.mark.parametrize("split", SHARDS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(two_processes, case, split):
    images, targets = batch(torch.float64)
    objective, size = build(case), sum(SHARDS[split])
    loss = objective(images[:size], targets[:size])["loss"]
    loss.backward()
    expected = gradients(objective)
    assert expected and all(grad.abs().sum() > 0 for grad in expected.values())
    for found in two_processes:
        assert found["processes"] == 2
        ours = {name: found[f"{case}/{split}/{name}"] for name in expected}
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    mean = sum(found[f"{case}/{split}/loss"] for found in two_processes) / 2
    torch.testing.assert_close(mean, loss.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_experts", [1, 3])
def test_experts_train_end_to_end(num_experts):
    objective = ExpertsObjective(TinyExperts(num_experts), make_loss("ride", COUNTS, reweight_epoch=0))
    images, targets = batch()
    result = objective(images, targets)
    result["loss"].backward()
    assert result["logits"].shape == (9, 6) and not result["logits"].requires_grad
    assert all(p.grad is not None for p in objective.model.parameters())
    assert objective.trainable_parameters() == list(objective.model.parameters())


def test_epochs_reach_the_loss():
    objective = ExpertsObjective(TinyExperts(), make_loss("ldam", COUNTS, reweight_epoch=3)).eval()
    values = []
    for epoch in (2, 3):
        objective.set_epoch(epoch)
        values.append(objective(*batch())["loss"])
    assert values[0] != values[1]


def test_distillation_learns_from_the_mean_before_it_is_rounded():
    """In bf16 the mean of the experts keeps 8 bits, which the loss then could not widen."""
    teacher, loss = TinyExperts(6, seed=1), make_loss("ce", COUNTS)
    objective = DistillationObjective(TinyExperts(), loss, teacher, temperature=1.5).eval()
    images, targets = batch()
    expert_logits = objective.expert_logits(images).detach().bfloat16()
    objective.expert_logits = lambda images: expert_logits
    taught = distillation(expert_logits.float().mean(1), teacher(images), 1.5)
    torch.testing.assert_close(objective(images, targets)["loss"], 3 * (loss(expert_logits, targets) + taught))


def test_distillation_scales_with_the_number_of_experts():
    model, teacher, loss = TinyExperts(), TinyExperts(6, seed=1), make_loss("ride", COUNTS, reweight_epoch=0)
    objective = DistillationObjective(model, loss, teacher, temperature=1.5).eval()
    images, targets = batch()
    expert_logits = model.forward_experts(images)[1]
    expected = 3 * (loss(expert_logits, targets) + distillation(expert_logits.mean(1), teacher(images), 1.5))
    result = objective(images, targets)
    torch.testing.assert_close(result["loss"], expected)
    torch.testing.assert_close(result["logits"], expert_logits.mean(1))
    result["loss"].backward()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_teacher_is_frozen_unregistered_and_in_its_mode(mode):
    teacher = TinyExperts(6, seed=1)
    objective = DistillationObjective(TinyExperts(), make_loss("ce"), teacher, 1.0, teacher_mode=mode)
    assert teacher.training == (mode == "train")
    assert not objective.eval().teacher.training
    assert objective.train().teacher.training == (mode == "train")
    assert all(name.startswith("model.") for name in objective.state_dict())
    assert all(name.startswith("model.") for name, _ in [*objective.named_parameters(), *objective.named_buffers()])
    assert len(objective.trainable_parameters()) == len(list(objective.model.parameters()))
    before, mean = copy.deepcopy(teacher.state_dict()), "trunk.1.running_mean"
    objective(*batch())
    moved = {name for name, value in teacher.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == (set() if mode == "eval" else {mean, "trunk.1.running_var", "trunk.1.num_batches_tracked"})
    objective.double()
    assert teacher.heads[0].weight.dtype == torch.float64
    objective.to("meta")
    assert {t.device.type for t in [*teacher.parameters(), *teacher.buffers()]} == {"meta"}


def test_only_the_router_learns():
    model = TinyExperts(router=True)
    objective = RouterObjective(model, pos_weight=100)
    objective.train()
    assert objective.trainable_parameters() == list(model.router.parameters())
    assert model.router.training and not any(m.training for m in model.trunk.modules()) and not model.drop.training
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(objective.trainable_parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    images, targets = batch()
    values = []
    for _ in range(3):
        objective.train()
        optimizer.zero_grad()
        result = objective(images, targets)
        result["loss"].backward()
        optimizer.step()
        values.append(result["loss"].item())
    assert values[2] < values[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith("router.")}
    assert not objective.eval().model.router.training
    features, expert_logits = model.forward_experts(images)
    expected = router_loss(model.router(features, expert_logits), expert_logits, targets, 100)
    result = objective(images, targets)
    torch.testing.assert_close(result["loss"], expected)
    torch.testing.assert_close(result["logits"], model(images))


def test_bad_combinations_are_rejected():
    routed, plain, loss = TinyExperts(router=True), TinyExperts(), make_loss("ce")
    with pytest.raises(InputError, match="create the model with router=False"):
        ExpertsObjective(routed, loss)
    with pytest.raises(InputError, match="create it with router=True"):
        RouterObjective(plain, 100)
    with pytest.raises(InputError, match="at least 2 experts, the model has 1"):
        RouterObjective(TinyExperts(1, router=True), 100)
    with pytest.raises(InputError, match=r"the model has no parameter heads\.7\.weight"):
        HeadsObjective(plain, ["heads.0.weight", "heads.7.weight"])
    with pytest.raises(InputError, match="the model has no parameter to train"):
        HeadsObjective(plain, [])
    with pytest.raises(InputError, match="pos_weight must be above 0, got 0"):
        RouterObjective(routed, pos_weight=0)
    with pytest.raises(InputError, match="temperature must be above 0, got 0"):
        DistillationObjective(plain, loss, TinyExperts(), temperature=0)
    with pytest.raises(InputError, match="teacher_mode must be 'eval' or 'train', got 'eva'"):
        DistillationObjective(plain, loss, TinyExperts(), 1.0, teacher_mode="eva")
    with pytest.raises(InputError, match="the teacher has 7 classes, the model 6"):
        DistillationObjective(plain, loss, TinyExperts(C=7), 1.0)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mdcs"])  # mdcs takes two views, not mixed targets
def test_mixed_loss_is_the_weighted_mean_of_both(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, 4, generator=generator, dtype=torch.float64)
    one, other = torch.randint(0, 4, (2, 6), generator=generator)
    loss = ExpertsObjective(torch.nn.Identity(), make_loss(name, [50, 20, 9, 4])).eval().loss_of
    value = loss(logits, MixedTargets(one, other, torch.tensor(0.25)))
    torch.testing.assert_close(value, 0.25 * loss(logits, one) + 0.75 * loss(logits, other))
    pure = loss(logits, MixedTargets(one, other, torch.tensor(1.0)))
    torch.testing.assert_close(pure, loss(logits, one))


def test_mixed_cross_entropy_equals_soft_targets():
    logits = torch.randn(6, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, other = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 2, 1, 0, 0, 2])
    soft = 0.3 * F.one_hot(one, 4) + 0.7 * F.one_hot(other, 4)
    value = ExpertsObjective(torch.nn.Identity(), make_loss("ce")).loss_of(
        logits, MixedTargets(one, other, torch.tensor(0.3, dtype=torch.float64))
    )
    torch.testing.assert_close(value, F.cross_entropy(logits[:, 0], soft.double()))


if __name__ == "__main__":
    worker(sys.argv[1])


@pytest.mark.parametrize(
    ("how", "moves"),
    [
        (dict(freeze="none"), {"trunk", "stages", "fc"}),
        (dict(freeze="trunk"), {"stages", "fc"}),
        (dict(freeze="backbone"), {"fc"}),
    ],
)
def test_frozen_parts_and_their_statistics_stay_bit_for_bit(how, moves):
    model = timm.create_model("ride", backbone="test_efficientnet", num_classes=3, num_experts=2)
    before = copy.deepcopy(model.state_dict())
    objective = ExpertsObjective(model, make_loss("ce", [3, 2, 1]), **how).train()
    optimizer = torch.optim.SGD(objective.trainable_parameters(), lr=0.1)
    objective(torch.randn(8, 3, 64, 64), torch.arange(8) % 3)["loss"].backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    parts = {"trunk" if name.startswith("trunk") else name.split(".")[2] for name in moved}
    assert parts == moves


def test_frozen_norms_keep_their_statistics_and_learn_their_scales():
    model = timm.create_model("ride", backbone="test_efficientnet", num_classes=3, num_experts=2)
    before = copy.deepcopy(model.state_dict())
    objective = ExpertsObjective(model, make_loss("ce", [3, 2, 1]), freeze_norm=True).train()
    optimizer = torch.optim.SGD(objective.trainable_parameters(), lr=0.1)
    objective(torch.randn(8, 3, 64, 64), torch.arange(8) % 3)["loss"].backward()
    optimizer.step()
    kept = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert {name for name in before if "running_" in name or "num_batches" in name} <= kept
    norms = [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)]
    assert norms and not kept & set(norms)
