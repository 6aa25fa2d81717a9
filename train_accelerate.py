"""Train RIDE: stage one trains the experts, stage two the router that skips them where one is enough.

accelerate launch train_accelerate.py [--recipe NAME|FILE] [--stage both|experts|router] [--resume] [--KEY VALUE ...]

`train` prepares a run, `train_stage` trains one stage epoch by epoch, `train_epoch` is the step. Each stage's model,
loss, loader and optimizer are built in ride_timm/training/stages.py.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from ride_timm.cli.process import Signals, exit_code, is_main_process
from ride_timm.hardware import keep_memory, set_threads
from ride_timm.progress import progress_bar
from ride_timm.training.build import (
    build_accelerator,
    build_class_weights,
    build_model,
    build_teacher,
    load_data,
)
from ride_timm.training.heartbeat import Heartbeat
from ride_timm.training.memory import enough_memory
from ride_timm.training.options import parse_arguments
from ride_timm.training.preflight import adapt_to_machine, check_options, preflight
from ride_timm.training.push import Push
from ride_timm.training.run_folder import RunFolder
from ride_timm.training.stages import Stage, build_stage
from ride_timm.training.state import TrainingState
from ride_timm.training.trackers import end_trackers, log_epoch, log_results, start_trackers
from ride_timm.training.watch import Watch


def train(argv: list[str] | None) -> None:
    options, recipe = parse_arguments(argv)
    set_threads(options.threads)
    keep_memory()
    run = RunFolder(options.output)
    push = Push(options.push_to_hub, Path(__file__).with_name("hub"))
    if options.resume and run.has_finished(recipe, options.stages[-1]):
        if is_main_process():
            run.conclude()  # where it was killed just before
            print(f"{options.output} is finished.\n{run.table()}")
            push.run(run.path)
        return

    check_options(recipe, options)
    push.check(recipe)
    recipe = adapt_to_machine(recipe, options)
    accelerator = build_accelerator(recipe, options)
    heartbeat = Heartbeat(accelerator)
    state = run.claim(recipe, options.stage, options.resume, options.router_in_place)
    if state is not None:
        options = options.from_stage(state.stage)
    data = load_data(recipe, accelerator, state)
    recipe = data.recipe  # with the epochs that so many images call for
    push.check_classes(data.num_classes)
    model = build_model(recipe, data, options, state)
    teacher = build_teacher(recipe, data, options, state)
    class_weights = build_class_weights(recipe, data, options, state)
    preflight(recipe, options, data, model, state, accelerator)
    signals = Signals()
    watch = Watch(accelerator, signals, recipe.mixed_precision)
    state = state or TrainingState(stage=options.stages[0], source=options.source)
    state.class_weights = class_weights
    state.contents, state.unreadable = data.contents, list(data.longtail.unreadable)
    if teacher is not None:
        state.teacher = teacher.identity
    if accelerator.is_main_process:
        run.open(recipe, state, options.resume)  # the first line that writes
    if options.trackers:
        start_trackers(accelerator, recipe, run)

    for name in options.stages:
        # no name here holds a stage, so that its memory is free before the next one is built
        how = (recipe, data, model, teacher, accelerator, state.source is None, class_weights)
        train_stage(build_stage(name, *how), state, run, accelerator, watch)
    if options.trackers and accelerator.is_main_process:
        log_results(accelerator, run, step=len(state.history))
    heartbeat.close()
    signals.restore()  # nothing is lost from here on
    end_trackers(accelerator)
    if accelerator.is_main_process:
        run.conclude()
        print(run.table())
        if notice := data.longtail.unreadable_notice:
            print(notice, file=sys.stderr)
        push.trained(run.path)


def train_stage(stage: Stage, state: TrainingState, run: RunFolder, accelerator: Accelerator, watch: Watch) -> None:
    """All epochs of a stage after the last finished one, then its results."""
    epoch = state.restore(stage)
    with stage_bar(stage, epoch, accelerator) as bar:
        while not stage.is_done(epoch):
            started = time.perf_counter()
            loss = train_epoch(stage, epoch, accelerator, watch, bar)
            row = dict(stage=stage.name, epoch=epoch + 1, lr=stage.lr_at(epoch), loss=loss)
            row["seconds"] = round(time.perf_counter() - started, 2)
            epoch += 1
            row |= stage.evaluate_epoch(epoch, watch)
            state.history.append(row)
            state.seconds += time.perf_counter() - started
            state.capture(stage, epoch)
            if accelerator.is_main_process:
                run.save(state)  # atomic: a kill costs at most the running epoch
            log_epoch(accelerator, row, step=len(state.history))
            watch.check()
    stage.finish(epoch, state, run, watch)
    accelerator.free_memory()


def train_epoch(stage: Stage, epoch: int, accelerator: Accelerator, watch: Watch, bar: tqdm) -> float:
    """One epoch; its mean loss. Seed, epoch and rank give all randomness, so that resuming is exact on CPUs."""
    stage.begin_epoch(epoch)
    watch.begin_epoch(stage.name, epoch, len(stage.loader), stage.settings.epochs)
    for images, targets, num_batches, is_last in stage.micro_batches():
        images, targets = stage.transform_batch(images, targets)
        with enough_memory(stage):
            with nullcontext() if is_last else accelerator.no_sync(stage.wrapped):
                loss = stage.wrapped(images, targets)["loss"]
                accelerator.backward(loss / num_batches)
            if is_last:
                stage.step()
        bar.update()
        watch.update(loss)
    return watch.mean()


def stage_bar(stage: Stage, epoch: int, accelerator: Accelerator) -> tqdm:
    return progress_bar(
        total=stage.settings.epochs * len(stage.loader),
        initial=epoch * len(stage.loader),
        desc=stage.name,
        disable=not accelerator.is_main_process,
    )


if __name__ == "__main__":
    sys.exit(exit_code(train, None))
