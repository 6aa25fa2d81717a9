"""Speed on a device: training steps beside timm's, an epoch with its input, routed inference over its MACs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import epoch
import routed
import step
import timm
import torch
import torch.nn.functional as F
from batches import Clocked, class_counts_of, random_batch, random_photographs
from gpu_bench import Bench
from gpu_checks import autocast
from input import drain
from ours import Training, make_recipe
from record import alternate, summary

from ride_timm.data.loaders import make_loader
from ride_timm.inference.options import fuse_conv_bn
from ride_timm.training.optimizers import begin_momentum

KEYS = {"bf16": "bf16", "fp16": "fp16", "tf32": "no", "fp32": "no"}  # mixed_precision of each, the fastest first


def settings(bench: Bench, model: str, batch_size: int, size: int) -> argparse.Namespace:
    """Arguments of `step` and `epoch`; the fewer steps, the longer they take."""
    shape = dict(model=model, batch_size=batch_size, image_size=size, num_experts=3)
    steps = 1 if bench.toy else 20 if size <= 64 else max(4, 640 // batch_size)
    return argparse.Namespace(**shape, steps=steps, warm_up=0 if bench.toy else 2, data_dir=None)


def our_step(args: argparse.Namespace, precision: str, mode: str | None = None) -> Callable[[], float]:
    """Our training step; mode: torch.compile's, None for eager."""
    os.environ["ACCELERATE_DYNAMO_MODE"] = mode or "default"
    return step.build_ours(dict(mixed_precision=KEYS[precision], fused_norm=False, compile=mode is not None), args)


def timm_step(args: argparse.Namespace, precision: str, device: torch.device) -> Callable[[], float]:
    """A plain training step of timm's ResNeXt-50: cross entropy, fused SGD, channels-last."""
    model = timm.create_model("resnext50_32x4d", num_classes=1000).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True, fused=True)
    begin_momentum(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def loop(batches: Clocked) -> None:
        model.train()
        for images, targets in batches:
            with autocast(device, precision):
                loss = F.cross_entropy(model(images), targets)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    images, targets = random_batch(args.batch_size, 1000, args.image_size)
    return step.timed(loop, (images.to(device, memory_format=torch.channels_last), targets.to(device)), args)


def timed(bench: Bench, run: Callable[[], float]) -> dict[str, float]:
    """Median seconds per step over the rounds, after one that warms up, and peak GPU memory in MiB."""
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run()
    seconds = summary(alternate({"": run}, bench.args.rounds)[""])["median"]
    peak = dict(peak_mib=torch.cuda.max_memory_allocated() / 2**20) if bench.on_gpu else {}
    return dict(seconds=seconds) | peak


def steps(bench: Bench) -> None:
    """Training steps by network, batch and precision; of ResNeXt-50, images/s over timm's.

    On a GPU the fastest precision comes once more with the convolutions that cuDNN finds by trying them.
    """
    first, *others = ["fp32"] if bench.toy else filter(bench.has, KEYS)
    kinds = [(first, False), *[(first, True)] * bench.on_gpu, *((precision, False) for precision in others)]
    for precision, tried in kinds:
        torch.backends.cudnn.benchmark = tried
        for model, batch_size, size in shapes(bench):
            args = settings(bench, model, batch_size, size)
            bench.allow_tf32(precision == "tf32")

            def compare(args: argparse.Namespace = args, precision: str = precision) -> dict[str, float]:
                ours = timed(bench, our_step(args, precision))
                row = ours | dict(images_per_second=args.batch_size / ours["seconds"])
                if args.model != "ride_resnext50":
                    return row
                bench.free()
                theirs = {
                    f"timm_{key}": value
                    for key, value in timed(bench, timm_step(args, precision, bench.device)).items()
                }
                return row | theirs | dict(images_per_second_over_timm=theirs["timm_seconds"] / ours["seconds"])

            seconds = 10 if size <= 64 else 40 if precision == "fp32" else 20
            label = f"{model} x3, batch {batch_size}, {precision}" + ", cudnn.benchmark" * tried
            bench.measure(label, seconds, compare)
    torch.backends.cudnn.benchmark = False


def shapes(bench: Bench) -> list[tuple[str, int, int]]:
    """(network, batch size, image size)"""
    if bench.toy:
        return [("ride_resnet32", 4, 16), ("ride_resnext50", 2, 32)]
    return [("ride_resnet32", 128, 32), ("ride_resnext50", 64, 224), ("ride_resnext50", 256, 224)]


def compiled(bench: Bench) -> None:
    """Training steps compiled, and compiled to CUDA graphs, over eager ones; it may take minutes, so it comes last."""
    precision = "bf16" if bench.has("bf16") else "fp32"
    bench.allow_tf32(True)
    for model, batch_size, size in shapes(bench)[:2]:
        args = settings(bench, model, batch_size, size)
        for name, mode in {"compiled": "default", "CUDA graphs": "reduce-overhead"}.items():

            def compare(args: argparse.Namespace = args, mode: str = mode) -> dict[str, float]:
                eager = timed(bench, our_step(args, precision))
                bench.free()
                try:
                    ours = timed(bench, our_step(args, precision, mode))
                finally:
                    torch.compiler.reset()  # before the memory is freed: CUDA graphs hold theirs
                return ours | dict(
                    eager_seconds=eager["seconds"], eager_over_compiled=eager["seconds"] / ours["seconds"]
                )

            label = f"{model} x3, batch {batch_size}, {precision}, {name}"
            if bench.on_gpu:
                bench.measure(label, 45, compare)
            else:
                bench.skip(label, "a CPU compiles for minutes, and gains nothing")


def epochs(bench: Bench) -> None:
    """An epoch of CIFAR100-LT with its input: plain, and with AutoAugment and Cutout."""
    batch_size = 4 if bench.toy else 128
    num_steps = -(-sum(class_counts_of(100)) // batch_size)
    args = settings(bench, "ride_resnet32", batch_size, 32)
    args.steps, args.warm_up = (1, 0) if bench.toy else (num_steps, 0)
    bench.allow_tf32(True)
    for label, policy in {"plain": {}, "AutoAugment": dict(auto_augment="cifar10", cutout=16)}.items():
        keys = dict(mixed_precision="bf16" if bench.has("bf16") else "no", fused_norm=False, workers=8, **policy)

        def compare(keys: dict[str, Any] = keys) -> dict[str, float]:
            training = Training(make_recipe("ride_resnet32", batch_size, 32, **keys), epoch.images_of(args), 100)
            loader = training.stage.loader
            own = timed(bench, epoch.timed(drain, loader, args))["seconds"]
            row = timed(bench, epoch.timed(training.train_batches, loader, args))
            row |= dict(seconds_per_epoch=row["seconds"] * num_steps, input_images_per_second=batch_size / own)
            return row | dict(input_over_step=own / row["seconds"])

        bench.measure(label, 10, compare)


def photographs(bench: Bench) -> None:
    """Images/s of the loader of photographs, JPEGs of 500x375 pixels cropped to 224, by number of workers.

    Over those of a training step of ResNeXt-50 x3 as well.
    """
    batch_size, size = (2, 32) if bench.toy else (64, 224)
    images = random_photographs(2 * batch_size if bench.toy else 32 * batch_size)
    shape, precision = settings(bench, "ride_resnext50", batch_size, size), "bf16" if bench.has("bf16") else "fp32"

    def train() -> dict[str, float]:
        row = timed(bench, our_step(shape, precision))
        return row | dict(images_per_second=batch_size / row["seconds"])

    bench.measure(f"step of ride_resnext50 x3, {precision}", 10, train)
    step_speed = next((row["images_per_second"] for row in bench.rows if "images_per_second" in row), float("nan"))
    for num_workers in (0,) if bench.toy else (2, 8, 16):
        args = settings(bench, "", batch_size, size)
        how = dict(train=True, batch_size=batch_size, seed=0, input_size=size, device=bench.device)

        def drained(
            args: argparse.Namespace = args, how: Any = how | dict(num_workers=num_workers)
        ) -> dict[str, float]:
            row = timed(bench, epoch.timed(drain, make_loader(images, "imagenet", **how), args))
            speed = args.batch_size / row["seconds"]
            return row | dict(images_per_second=speed, images_per_second_over_step=speed / step_speed)

        bench.measure(f"workers {num_workers}", 15, drained)


def routed_inference(bench: Bench) -> None:
    """Time of routed inference, sparse and masked, over that of all experts, and the ratio of their MACs."""
    bench.allow_tf32(True)
    for name, size in bench.networks.items():
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=100, num_experts=3, router=True, top_choices_num=30).eval()
        try:
            macs = routed.count_macs(model, (3, size, size))
        except ModuleNotFoundError as error:
            macs = None
            bench.skip(f"{name}, MACs", str(error))
        model = fuse_conv_bn(model).to(bench.device, memory_format=torch.channels_last)
        for batch_size in (1, 4) if bench.toy else (1, 32, 256, 1024):

            def compare(
                model: Any = model, batch_size: int = batch_size, size: int = size, macs: Any = macs
            ) -> dict[str, float]:
                images = random_batch(batch_size, 2, size)[0].to(bench.device, memory_format=torch.channels_last)
                time_ratio = macs_ratio = 0.0
                with torch.inference_mode():
                    model.forward_experts(images)  # warm-up
                for weight, used in routed.cases(batch_size, routed.FRACTIONS["paper"]):
                    seconds = 0 if bench.toy else 0.2
                    time_ratio += weight * routed.measure(model, images, used, bench.args.rounds, seconds)
                    if macs is not None:
                        macs_ratio += weight * macs.expected([n / batch_size for n in used]) / macs.ensemble
                variants = {
                    "masked": lambda: routed.seconds_of(lambda: model.forward_routed(images, masked_below=2**31), 5),
                    "experts": lambda: routed.seconds_of(lambda: model.forward_experts(images), 5),
                }
                with torch.inference_mode():
                    times = alternate(variants, bench.args.rounds)
                masked, experts = (summary(times[key])["median"] for key in variants)
                row = dict(time_ratio=time_ratio, masked_time_ratio=masked / experts)
                if macs is None:
                    return row
                return row | dict(macs_ratio=macs_ratio, time_over_macs=time_ratio / macs_ratio)

            bench.measure(f"{name}, batch {batch_size}", 8, compare)


def profile(bench: Bench) -> None:
    """Device time of a training step over its wall time, kernels, and copies to the host."""
    args = settings(bench, "ride_resnet32", 4 if bench.toy else 128, 16 if bench.toy else 32)

    def trace() -> dict[str, float]:
        run = our_step(args, "bf16" if bench.has("bf16") else "fp32")
        run()
        kind = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[kind.CPU] + [kind.CUDA] * bench.on_gpu) as traced:
            seconds = run()
        num_steps = args.steps + args.warm_up
        events = (event for event in traced.events() if not event.is_user_annotation)  # spans of kernels
        on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in on_device) / 1e6 / num_steps
        to_host = sum("DtoH" in event.name for event in on_device) / num_steps
        row = dict(seconds=seconds, device_seconds=busy, device_fraction=busy / seconds)
        return row | dict(kernels_per_step=len(on_device) / num_steps, copies_to_host_per_step=to_host)

    bench.measure("ride_resnet32", 5, trace)
