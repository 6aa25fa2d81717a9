"""Correctness of a device against float64 on the CPU: outputs, losses, gradients, routing, fp16, synchronisations."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Any

import timm
import torch
from batches import Clocked, class_counts_of, exponential_counts, random_batch, random_images
from gpu_bench import Bench
from ours import Training, make_recipe
from syncs import Counted, Syncs
from torch import Tensor, nn

import ride_timm
from ride_timm.losses import LOSSES, make_loss
from ride_timm.training.build import Teacher
from ride_timm.training.objectives import ExpertsObjective
from ride_timm.training.state import TrainingState
from ride_timm.training.watch import FIRST_CHECKS

# largest error of outputs, over the largest output, and of gradients, over their norm; bf16 has 8 bits of mantissa and
# fp16 has 11, and their errors add up over some fifty layers
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
MARGIN = 1e-3  # a gate's probability this close to the threshold may fall on either side of it


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision not in ("fp32", "tf32"))


def error_of(found: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected value."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def pair(bench: Bench, name: str, **how: Any) -> tuple[ride_timm.Ride, ride_timm.Ride]:
    """A network on the device in float32, and the same on the CPU in float64."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_experts=3, num_classes=100, **how)
    return model.to(bench.device, memory_format=torch.channels_last), copy.deepcopy(model).cpu().double()


def batch_of(size: int) -> tuple[Tensor, Tensor]:
    """Few small images: a CPU computes them in float64."""
    return random_batch(8, 100, min(size, 96))


def outputs(bench: Bench) -> None:
    """Logits and features of every expert, in eval mode."""
    for name, size in bench.networks.items():
        with bench.row(name):
            model, reference = pair(bench, name)
            images, _ = batch_of(size)
            with torch.inference_mode():
                expected = reference.eval().forward_experts(images.double())
                for precision in filter(bench.has, TOLERANCES):
                    with autocast(bench.device, precision):
                        found = model.eval().forward_experts(images.to(bench.device))
                    error = max(error_of(one, other) for one, other in zip(found, expected, strict=True))
                    bench.check(f"{name} {precision}", error, TOLERANCES[precision])


def losses(bench: Bench) -> None:
    """Every loss and its gradient, in the first epoch and after the last re-weighting."""
    generator = torch.Generator().manual_seed(0)
    for name, entry in LOSSES.items():
        targets = torch.randint(100, (32,), generator=generator)
        logits = 5 * torch.randn(32 * entry.loss.num_views, 3, 100, generator=generator, dtype=torch.float64)
        with bench.row(name):
            errors = [error_of_loss(bench, name, epoch, logits, targets) for epoch in (0, 199)]
            bench.check(name, max(errors), TOLERANCES["fp32"])


def error_of_loss(bench: Bench, name: str, epoch: int, logits: Tensor, targets: Tensor) -> float:
    """The larger error of a loss and its gradient; logits float64 on the CPU."""
    results = []
    for device, dtype in (("cpu", torch.float64), (bench.device, torch.float32)):
        loss = make_loss(name, class_counts_of(100)).to(device=device, dtype=dtype)
        loss.set_epoch(epoch)
        given = logits.detach().clone().to(device, dtype).requires_grad_()
        value = loss(given, targets.to(device))
        value.backward()
        results.append((value, given.grad))
    return max(error_of(found, expected) for expected, found in zip(*results, strict=True))


def gradients(bench: Bench) -> None:
    """Gradients of all parameters in a training step, as one vector, of the networks with a smooth activation.

    ReLU's gradient jumps at zero: rounding the images alone would change it by more than a device's error.
    """
    for name, size in bench.networks.items():
        with bench.row(name):
            model, reference = pair(bench, name)
            for network in (model, reference):
                smooth(network)
            images, targets = batch_of(size)
            expected = gradient_of(reference, images.double(), targets, "fp32")
            for precision in filter(bench.has, TOLERANCES):
                found = gradient_of(model, images.to(bench.device), targets.to(bench.device), precision)
                error = ((found - expected).norm() / expected.norm()).item()
                bench.check(f"{name} {precision}", error, TOLERANCES[precision])


def smooth(model: nn.Module) -> None:
    """Replace every ReLU by Softplus."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())


def gradient_of(model: ride_timm.Ride, images: Tensor, targets: Tensor, precision: str) -> Tensor:
    """The gradient of RIDE's loss in training mode, float64 on the CPU."""
    model = copy.deepcopy(model)
    objective = ExpertsObjective(model, make_loss("ride", class_counts_of(100))).to(images.device).train()
    if images.dtype == torch.float64:
        objective.double()
    with autocast(images.device, precision):
        loss = objective(images, targets)["loss"]
    scale = 64.0  # as GradScaler's: fp16 would flush small gradients to zero
    (scale * loss).backward()
    return torch.cat([p.grad.detach().flatten().double().cpu() / scale for p in model.parameters()])


def routing(bench: Bench) -> None:
    """Routed logits and experts_used, away from the threshold, and one synchronisation at most for each gate."""
    for name, size in bench.networks.items():
        with bench.row(name):
            model, reference = pair(bench, name, router=True)
            images, _ = batch_of(size)
            with torch.inference_mode():
                features, logits = reference.eval().forward_experts(images.double())
                spread_gates([model.router, reference.router], reference.router(features, logits)[:, 0])
                gates = reference.router(features, logits).sigmoid()
                clear = ((gates - 0.5).abs() > MARGIN).all(1)
                expected, used = reference.forward_routed(images.double())
                batch = images.to(bench.device)
                model.eval().forward_routed(batch)
                with Syncs() as syncs:
                    found, found_used = model.forward_routed(batch)
                with Syncs() as masking:
                    masked, masked_used = model.forward_routed(batch, masked_below=len(batch) + 1)
            wrong = (found_used.cpu() != used)[clear].sum().item()
            spread = "/".join(str(int((used == n).sum())) for n in (1, 2, 3))
            bench.check(f"{name} experts_used", float(wrong), 0.0, f"of {int(clear.sum())} images, {spread}")
            error = error_of(found.cpu()[clear], expected[clear])
            bench.check(f"{name} logits", error, TOLERANCES["fp32"])
            bench.check(f"{name} synchronisations", float(syncs.total), float(model.num_experts - 1), str(syncs))
            bench.check(f"{name} masked experts_used", float((masked_used != found_used).cpu()[clear].sum()), 0.0)
            bench.check(f"{name} masked logits", error_of(masked.cpu()[clear], expected[clear]), TOLERANCES["fp32"])
            bench.check(f"{name} masked synchronisations", float(masking.total), 0.0, str(masking))


def mixed_precision(bench: Bench) -> None:
    """Steps of every loss in fp16 (bf16 where there is no fp16) stay finite, and the scaler's state resumes."""
    precision, steps = "fp16" if bench.device.type == "cuda" else "bf16", 2 if bench.toy else 50
    for name in LOSSES:
        with bench.row(name):
            training = train_with(bench, name, precision)
            batch = training_batch(bench, training)
            loss = training.train_batches(repeated(batch, steps))  # RunError for one that is not finite
            bench.check(f"{name} {precision} loss {loss:.3f}", float(not loss < float("inf")), 0.0)
    with bench.row("resumed"):
        resume(bench, precision, steps)


def resume(bench: Bench, precision: str, steps: int) -> None:
    """Loss and scaler of a run that is resumed after so many steps."""
    training = train_with(bench, "ride", precision)
    batch = training_batch(bench, training)
    training.train_batches(repeated(batch, steps))
    state = TrainingState()
    state.capture(training.stage, 1)
    state = copy.deepcopy(state)
    resumed = train_with(bench, "ride", precision)
    state.restore(resumed.stage)
    scalers = [one.stage.accelerator.scaler for one in (training, resumed)]
    expected, found = (one.train_batches(repeated(batch, 3), epoch=1) for one in (training, resumed))
    bench.check("resumed loss", abs(found / expected - 1), TOLERANCES["fp16"])
    if scalers[0] is None:
        return bench.skip("the scaler's state", "only fp16 has one, which needs a GPU")
    before, after = (scaler.state_dict() for scaler in scalers)
    bench.check("resumed scaler", float(before != after), 0.0, f"scale {after['scale']:g}")


def repeated(batch: tuple[Tensor, Tensor], steps: int) -> Clocked:
    return Clocked([batch] * steps, steps)


def spread_gates(routers: list[ride_timm.Router], gate_logits: Tensor) -> None:
    """Scale and shift gates so that the first sends about half of these images on: before training all are equal."""
    mean, scale = gate_logits.mean().item(), 1 / gate_logits.std().item()
    for router in routers:
        for last in router.fc:
            last.bias.copy_(scale * (last.bias - mean))
            last.weight.mul_(scale)


def train_with(
    bench: Bench, loss: str, precision: str, stage: str = "experts", teacher: Teacher | None = None, **keys: Any
) -> Training:
    size, batch_size = (16, 4) if bench.toy else (32, 128)
    keys |= dict(auto_augment="rand-m9-mstd0.5") if loss == "mdcs" else {}
    keys |= dict(mixed_precision=precision, loss=loss, fused_norm=False)
    keys |= dict(router_batch_size=batch_size, decouple_batch_size=batch_size)
    images = random_images(exponential_counts(100, *((2, 2) if bench.toy else (100, 1))), size)  # decoded at each build
    return Training(make_recipe("ride_resnet32", batch_size, size, **keys), images, 100, stage, teacher)


def training_batch(bench: Bench, training: Training) -> tuple[Tensor, Tensor]:
    recipe, device = training.stage.recipe, bench.device
    images, targets = random_batch(recipe.batch_size * training.stage.num_views, 100, recipe.input_size)
    return images.to(device, memory_format=torch.channels_last), targets[: recipe.batch_size].to(device)


def synchronisations(bench: Bench) -> None:
    """Training steps, their input included, never wait for the device between two logged losses."""
    for name in LOSSES:
        count_syncs(bench, name, name, cutout=4)
    changes = dict(random_erasing=0.5, mixup_alpha=0.2, cutmix_alpha=1.0, clip_grad=1.0, ema_decay=0.9)
    count_syncs(bench, "erasing, mixing, clipping, EMA", "ce", **changes)
    teacher = Teacher(timm.create_model("ride_resnet32", num_experts=1, num_classes=100), "teacher")
    count_syncs(bench, "distillation", "ce", teacher=teacher, distillation=True)
    count_syncs(bench, "AutoAugment, Cutout", "ce", auto_augment="cifar10", cutout=16)
    count_syncs(bench, "photographs", "ce", augment="imagenet")
    count_syncs(bench, "heads", "ce", stage="heads", decouple="crt")
    count_syncs(bench, "router", "ce", stage="router")


def count_syncs(bench: Bench, name: str, loss: str, **how: Any) -> None:
    with bench.row(name):
        training = train_with(bench, loss, "bf16" if bench.has("bf16") else "no", **how)
        warm_up, steps = (1, 1) if bench.toy else (max(FIRST_CHECKS), 5)  # before the next look at the losses
        counted = Counted(training.stage.loader, steps, warm_up)
        training.train_batches(counted)
        bench.check(name, float(counted.syncs.total), 0.0, str(counted.syncs))
