"""Everything that can be refused before a run begins, and what this machine decides for it."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list, parse_flag_from_env
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.loaders.orders import RankSlices
from ..errors import InputError
from ..hardware import bf16_pays, has_compiler
from ..models import Ride
from ..models.heads import linear_layer
from ..models.load import check_images
from .build import RunData
from .ghost_batches import check_parts
from .optimizers import check_optimizer
from .options import Options
from .recipe import Recipe
from .state import TrainingState

# of a collective: one process downloads a data set while the others wait; those that stop are noticed by `Heartbeat`
_PATIENCE = timedelta(hours=6)
_SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def adapt_to_machine(recipe: Recipe, options: Options) -> Recipe:
    """The recipe with bf16 and fused norms only where they pay; decided by the main process, for all of them.

    What a flag, the launcher or the resumed run states is left as it is.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=_PATIENCE)
    changes: dict[str, object] = {}
    if state.is_main_process:
        for notice in options.notices:
            print(f"notice: {notice}", file=sys.stderr)
        if recipe.mixed_precision == "bf16" and "mixed_precision" not in options.fixed and not bf16_pays():
            changes["mixed_precision"] = "no"
            print("notice: bf16 is not faster on this machine, training in fp32", file=sys.stderr)
        on_cpu = state.device.type == "cpu"
        if recipe.fused_norm and "fused_norm" not in options.fixed and on_cpu and not has_compiler():
            changes["fused_norm"] = False
            print("notice: no C++ compiler with Python.h, BatchNorm and ReLU are not fused", file=sys.stderr)
    return recipe.override(broadcast_object_list([changes])[0])


def check_machine(recipe: Recipe, options: Options, accelerator: Accelerator) -> None:
    """InputError for an optimizer, precision or normalisation that does not work on this machine or launcher."""
    on_cpu = accelerator.device.type == "cpu"
    launched = os.environ.get("WORLD_SIZE", "1")
    if accelerator.num_processes != int(launched):
        raise InputError(
            f"{launched} processes were launched, and each would train by itself: without GPUs, set "
            "ACCELERATE_USE_CPU=true."
        )
    if accelerator.distributed_type in _SHARDED:
        raise InputError(
            f"{accelerator.distributed_type.value} is not supported: launch with --multi_gpu, which is DDP."
        )
    for name in {recipe.optimizer, recipe.router_optimizer}:
        check_optimizer(name, accelerator.device)
    if recipe.mixed_precision == "fp16" and on_cpu:
        raise InputError("mixed_precision=fp16 needs a GPU: use bf16 or no on a CPU.")
    if recipe.sync_bn and on_cpu:
        raise InputError("sync_bn needs GPUs: leave it out on CPUs.")
    if recipe.fused_norm and on_cpu and not has_compiler():
        raise InputError("fused_norm needs a C++ compiler (g++) and Python.h: install both or leave it out.")


def check_options(recipe: Recipe, options: Options) -> None:
    """InputError for a tracker that is not installed, or for a sampler or the reading of all images of a stream."""
    installed = [str(name) for name in get_available_trackers()]
    for name in options.trackers:
        if name not in installed:
            raise InputError(f"tracker={name!r}: installed are {', '.join(installed) or 'none'}.")
    if recipe.streaming and recipe.max_unreadable is not None:
        raise InputError(
            f"max_unreadable={recipe.max_unreadable}: the images of a stream cannot be read before training; leave "
            "--max-unreadable or --streaming out."
        )
    samplers = {name: recipe.stage(name).sampler for name in options.stages}
    sampled = [name for name, sampler in samplers.items() if sampler != "instance"]
    if not recipe.streaming:
        return
    if not sampled:
        if recipe.policy.in_memory:
            raise InputError(
                f"streaming=True: augmentation {recipe.augment!r} holds all images in memory; choose another "
                "--augment, or leave --streaming out."
            )
        return
    if sampled[0] == "experts":
        ways = "leave --sampler or --streaming out"
    elif sampled[0] == "heads":
        ways = "train the experts with --decouple none, and the heads by --from that run without --streaming"
    elif options.stage == "router":
        ways = "add --no-router-balanced, or leave --streaming out here"
    else:
        ways = (
            "add --no-router-balanced, or train --stage experts with --streaming, and then, without it and with "
            "another --output, --stage router --from that run"
        )
    kind = samplers[sampled[0]].replace("class_balanced", "class-balanced")
    raise InputError(f"streaming=True: a stream cannot draw the {kind} batches of stage {sampled[0]}; {ways}.")


def check_source(recipe: Recipe, options: Options, state: TrainingState | None) -> None:
    """InputError for initial weights that are missing, or are not those that the resumed run began with."""
    if state is None and options.source is None and not recipe.pretrained:
        defaults = dict(freeze="none", freeze_norm=False, head_init="random", adapter=None)
        needy = [key for key, default in defaults.items() if getattr(recipe, key) != default]
        if needy:
            given = ", ".join(f"{key}={getattr(recipe, key)}" for key in needy)
            ways = "--backbone-pretrained, --backbone-weights or --from"
            if "head_init" in needy:  # --from brings its classifiers
                ways = "--backbone-pretrained or --backbone-weights"
            raise InputError(f"{given} {'need' if needy[1:] else 'needs'} pretrained weights: pass {ways}.")
    if state is None or options.source is None:
        return
    if Path(options.source).resolve() in [Path(path).resolve() for path in (options.output, state.source) if path]:
        return
    if state.source is None or Path(state.source).exists():
        began = f"from {state.source}" if state.source else "without --from"
        raise InputError(
            f"from={options.source}: the run in {options.output} began {began}; leave --from out to resume it."
        )
    if PartialState().is_main_process:
        print(f"notice: the run resumes with its own weights, {options.source} is not read", file=sys.stderr)


def check_heads(recipe: Recipe, options: Options, model: Ride, state: TrainingState | None) -> None:
    """InputError for classifiers that are no vectors of the classes, where the recipe needs such."""
    from_means = recipe.head_init == "class_means" and state is None and options.source is None
    needed = {"decouple=tau_norm": recipe.decouple == "tau_norm" and "heads" in options.stages}
    needed |= {"head_init=class_means": from_means and "experts" in options.stages}
    for key in (key for key, is_needed in needed.items() if is_needed):
        try:
            for expert in model.experts:
                linear_layer(expert.fc)
        except InputError as error:
            raise InputError(f"{key}: {error}") from error


def check_grad_checkpointing(model: Ride, recipe: Recipe) -> None:
    """InputError for a network that cannot recompute its activations."""
    try:
        model.set_grad_checkpointing(True)
        model.set_grad_checkpointing(False)
    except (AssertionError, NotImplementedError) as error:
        name = recipe.backbone or recipe.model
        raise InputError(f"grad_checkpointing=True: {name} does not support it; leave it out.") from error


def preflight(
    recipe: Recipe, options: Options, data: RunData, model: Ride, state: TrainingState | None, accelerator: Accelerator
) -> None:
    """The last checks before the first write: classes, machine, initial weights, batches and BatchNorm."""
    if data.num_classes == 1:
        raise InputError(
            f"the training images are of one class, {data.longtail.class_names[0]!r}: expected two or more; "
            "--label-column names another column, --dataset other data."
        )
    check_machine(recipe, options, accelerator)
    stated = recipe.freeze_norm and "freeze_norm" in options.fixed  # of a recipe, it is for any backbone
    if stated and not any(isinstance(module, _BatchNorm) for module in model.modules()):
        name = recipe.backbone or recipe.model
        raise InputError(f"freeze_norm=True: {name} has no BatchNorm; leave it out.")
    check_source(recipe, options, state)
    check_heads(recipe, options, model, state)
    if recipe.backbone is not None:  # those of fixed stages take every size
        check_images(model, (model.in_chans, data.size, data.size), f"backbone={recipe.backbone!r}")
    if recipe.grad_checkpointing:
        check_grad_checkpointing(model, recipe)
    if recipe.cutout > data.size:
        raise InputError(f"cutout={recipe.cutout} covers the whole image of {data.size} pixels: choose a smaller one.")
    processes = accelerator.num_processes
    norms_learn = not (recipe.sync_bn or recipe.freeze_norm or recipe.freeze == "backbone")
    for name in options.stages:
        settings = recipe.stage(name)  # RankSlices refuses batches that leave a process without images
        slices = RankSlices(len(data.train), settings.batch_size, True, accelerator.process_index, processes)
        if norms_learn and (name == "experts" or (name == "heads" and recipe.decouple == "balanced_softmax")):
            batches = f"{slices.num_draws} images in batches of {settings.batch_size} (processes: {processes})"
            views, ghost_batch = (data.num_views, recipe.ghost_batch) if name == "experts" else (1, None)
            check_parts(model, data.size, [views * n for n in slices.fewest], ghost_batch, batches)
    accelerator.wait_for_everyone()  # no process writes before all have passed
