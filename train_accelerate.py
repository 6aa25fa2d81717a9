"""Train RIDE: the experts (stage one), then the router that skips them where one is enough (stage two).

accelerate launch train_accelerate.py [--recipe NAME|FILE] [--stage both|experts|router] [flags of the recipe's keys]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from tqdm import tqdm

from ride_timm import InputError, RunError
from ride_timm.cli.process import Signals, exit_code
from ride_timm.data.augment.mixing import BatchChange, batch_changes
from ride_timm.data.augment.policies import Policy, get_policy
from ride_timm.data.load import hold_out, load_longtail
from ride_timm.data.loaders import make_loader
from ride_timm.data.loaders.orders import RankSlices
from ride_timm.evaluation.evaluate import evaluate, evaluation_batch, with_macs
from ride_timm.evaluation.plots import plot_run
from ride_timm.hardware import bf16_pays, has_compiler, keep_memory, set_threads
from ride_timm.losses import OffsetExpertsLoss, make_loss
from ride_timm.models import Router, add_class_affine, has_class_affine
from ride_timm.models.load import load_teacher
from ride_timm.training.arguments import Parser, add_flags, flags_given
from ride_timm.training.ghost_batches import check_parts
from ride_timm.training.objectives import DistillationObjective, ExpertsObjective, Objective, RouterObjective
from ride_timm.training.optimizers import check_optimizer, make_optimizer
from ride_timm.training.rebalance import align_experts, decouple
from ride_timm.training.recipe import DEFAULT_RECIPE, Recipe, Stage, listing, load_recipe
from ride_timm.training.run_folder import RunFolder, create_model
from ride_timm.training.selection import Selection

BALANCED = ("cifar10", "cifar100")  # of which long-tailed subsets are made


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, Recipe]:
    parser = Parser(description="Train RIDE: experts, then router.", allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?", const="", metavar="NAME|FILE",
                        help=f"what to train (default: {DEFAULT_RECIPE}); without a value: describe all")  # fmt: skip
    parser.add_argument("--stage", choices=("both", "experts", "router"), default="both")
    parser.add_argument("--from", dest="source", metavar="RUN|FILE|SPEC", help="weights to start from")
    parser.add_argument("--teacher", metavar="RUN|FILE|SPEC", help="teacher of the distillation")
    parser.add_argument("--output", metavar="DIR", help="run folder (default: runs/<recipe>)")
    parser.add_argument("--resume", action="store_true", help="go on after the last finished epoch of the run folder")
    parser.add_argument("--tracker", metavar="NAME", help="a tracker of Accelerate, such as tensorboard or wandb")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads a process (default: all cores, shared)")
    add_flags(parser)
    args = parser.parse_args(argv)
    if args.recipe == "":
        print(listing())
        raise SystemExit(0)
    args.from_here = args.stage == "router" and args.source is None
    flags, default, theirs = flags_given(args), Path(args.recipe or DEFAULT_RECIPE).stem, None
    if args.source and args.recipe is None and flags.get("decouple", "none") != "none":
        theirs = RunFolder(args.source)  # re-balancing a run needs no recipe but the run's own
        theirs = theirs if theirs.occupied else None
    if theirs is not None:
        default = flags.setdefault("name", f"{theirs.path.resolve().name}_{flags['decouple']}")
    args.output = args.output or os.path.join("runs", default)
    folder = RunFolder(args.output)
    if args.resume and args.recipe is None and not flags and not folder.occupied:
        raise InputError(
            f"nothing to go on with: {args.output} holds no run. Name the run's folder by --output, or what to train "
            "by --recipe."
        )
    continues = folder.occupied and (args.resume or args.from_here)
    goes_on = continues and args.recipe is None
    own = theirs or (folder if goes_on else None)
    recipe = own.recipe() if own is not None else load_recipe(args.recipe or DEFAULT_RECIPE)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no":
        flags.setdefault("mixed_precision", launched)
    elif "mixed_precision" not in flags and recipe.mixed_precision == "bf16" and not goes_on:
        if continues:
            flags["mixed_precision"] = folder.recipe().mixed_precision
        elif not bf16_pays():
            print("notice: bf16 is not faster on this machine, training in fp32", file=sys.stderr)
            flags["mixed_precision"] = "no"
    if flags.get("fused_norm", recipe.fused_norm) and not torch.cuda.is_available() and not has_compiler():
        if "fused_norm" in flags:
            raise InputError("fused_norm needs a C++ compiler (g++) and Python.h: install both or leave it out.")
        print("notice: no C++ compiler with Python.h here, BatchNorm and ReLU stay apart", file=sys.stderr)
        flags["fused_norm"] = False
    if args.teacher:
        flags.setdefault("distillation", True)
    recipe = recipe.override(flags)
    if args.stage == "router" and recipe.num_experts == 1:
        raise InputError("num_experts=1: a router chooses among experts, so it needs at least 2.")
    if args.tracker and args.tracker not in (trackers := [str(name) for name in get_available_trackers()]):
        raise InputError(f"tracker={args.tracker!r}: installed are {', '.join(trackers) or 'none'}.")
    both = ["experts", "router"] if recipe.num_experts > 1 else ["experts"]  # one expert: nothing to route
    args.stages = both if args.stage == "both" else [args.stage]
    if recipe.streaming and (drawn := [name for name in args.stages if recipe.stage(name).balanced]):
        ways = [f"train it by --stage {drawn[0]} without --streaming"]
        if args.stage == "router":
            ways = ["add --no-router-balanced", "leave --streaming out here"]
        elif drawn[0] == "router":
            ways = ["add --no-router-balanced", "train --stage experts with --streaming, and then, without it and with "
                    "another --output, --stage router --from that run"]  # fmt: skip
        raise InputError(f"streaming=True: a stream cannot draw the class-balanced batches of stage {drawn[0]}; "
                         f"{', or '.join(ways)}.")  # fmt: skip
    return args, recipe


class Run:
    """What both stages share: data, model, folder, and what has been reached so far."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe, accelerator: Accelerator) -> None:
        self.args, self.recipe, self.accelerator = args, recipe, accelerator
        self.folder = RunFolder(args.output)
        self.state = self.folder.claim(recipe, args.stage, args.resume, args.from_here)
        self.source = self.state.get("source") if self.state else args.source
        self.folder.check_state(self.state)
        if self.state and args.source:
            self.check_source(args.source)
        self.policy = self.train_policy = get_policy(recipe.augment)
        if recipe.auto_augment is not None and recipe.decouple == "none":
            self.train_policy = self.policy.with_auto_augment(recipe.auto_augment)
        self.size = self.policy.input_size(recipe.input_size)
        with accelerator.local_main_process_first():  # the others find the first one's cache
            self.data = load_longtail(**recipe.data_args)
        self.train_set, self.held_out = self.data.train, self.data.val
        kept, available = len(self.data.train), self.data.available
        if accelerator.is_main_process and kept < available and recipe.dataset not in BALANCED:
            # the default profile is right for balanced data, and data of one's own are rarely that
            left_out = f"imb_type={recipe.imb_type} keeps {kept:,} of {available:,} training images"
            print(f"notice: {left_out}; --imb-type none takes all", file=sys.stderr)
        if recipe.holdout:
            self.train_set, self.held_out = hold_out(self.data.train, recipe.holdout, recipe.split_seed)
        self.decoupling = recipe.decouple != "none" and "experts" in args.stages
        if self.decoupling and not (self.state or args.source):
            raise InputError(f"decouple={recipe.decouple} re-balances a trained network: name one by --from.")
        self.model = create_model(recipe, self.data.num_classes, None if self.state else args.source, self.size)
        if recipe.fused_norm and accelerator.device.type == "cpu":
            self.model.fuse_training()
        self.history: list[dict[str, Any]] = []
        self.reached: dict[str, Any] = {}
        self.seconds = 0.0
        if self.state:
            self.history, self.reached, self.seconds = (self.state[key] for key in ("history", "stages", "seconds"))
            weights = {name: value for name, value in self.state["model"].items() if not name.startswith("router.")}
            if any(".fc.affine." in name for name in weights):
                add_class_affine(self.model)
            try:
                self.model.load_state_dict(weights)
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                raise InputError(
                    f"the weights in {args.output} do not fit a network of the {self.data.num_classes} classes that "
                    f"the data have now ({reason}): restore the data, or choose another --output."
                ) from error
        self.teacher = None
        taught = recipe.distillation and not self.decoupling
        if taught and "experts" in args.stages and "experts" not in self.reached:
            if not args.teacher:
                raise InputError("this recipe learns from a teacher: name one by --teacher.")
            image = (self.model.in_chans, self.size, self.size)
            self.teacher = load_teacher(args.teacher, self.data.num_classes, image)
        for name in args.stages:  # a batch that cannot be shared out is found now, not after stage one
            size = recipe.stage(name).batch_size
            slices = RankSlices(len(self.train_set), size, True, accelerator.process_index, accelerator.num_processes)
            if name == "experts" and name not in self.reached and not (self.decoupling or recipe.sync_bn):
                views = 2 if recipe.loss == "mdcs" and self.train_policy != self.policy else 1
                batches = f"{slices.num_draws} images in batches of {size} (processes: {accelerator.num_processes})"
                check_parts(self.model, self.size, [views * n for n in slices.fewest], recipe.ghost_batch, batches)
        self.signals = Signals()
        accelerator.wait_for_everyone()  # nobody writes before everybody has looked

    def check_source(self, source: str) -> None:
        """InputError for other weights than those that the run to go on with began from, or is itself."""
        places = [Path(place).resolve() for place in (self.args.output, self.source) if place]
        if Path(source).resolve() in places:
            return
        if self.source is None or Path(self.source).exists():
            began = f"from {self.source}" if self.source else "without --from"
            raise InputError(f"from={source}: the run in {self.args.output} began {began}; leave --from out to go on.")
        print(f"notice: the run goes on with its own weights, {source} is not read", file=sys.stderr)

    def training_loader(self, stage: Stage) -> Any:
        """Training batches of a stage, of two views of the images where the loss compares them."""
        if stage.name == "router" or self.train_policy == self.policy:
            return self.loader(self.train_set, self.policy, stage)
        return self.loader(self.train_set, self.train_policy, stage, 2 if self.recipe.loss == "mdcs" else 1)

    def loader(self, image_set: Any, policy: Policy, stage: Stage | None = None, views: int = 1) -> Any:
        """Training batches of a stage, or test batches where there is none."""
        return make_loader(
            image_set,
            policy,
            train=stage is not None,
            batch_size=stage.batch_size if stage else evaluation_batch(self.size),
            seed=self.recipe.seed,
            balanced=stage is not None and stage.balanced,
            views=views,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            num_workers=self.recipe.workers,
            device=self.accelerator.device,
            input_size=self.size,
            reduced_decode=self.recipe.reduced_decode,
        )

    def objective(self, stage: Stage) -> Objective:
        recipe = self.recipe
        if stage.name == "router":
            torch.manual_seed(recipe.seed)
            gates = (recipe.num_experts, self.model.experts[0].head_hidden_size, self.data.num_classes)
            self.model.add_router(Router(*gates, recipe.top_choices_num, recipe.share_expert_help_pred_fc))
            return RouterObjective(self.model, recipe.pos_weight)
        class_counts = np.bincount(self.train_set.labels, minlength=self.data.num_classes).tolist()
        if self.decoupling:
            return decouple(self.model, recipe.decouple, class_counts, recipe.decouple_tau, recipe.seed)
        loss = make_loss(recipe.loss, class_counts, **recipe.loss_args)
        if isinstance(loss, OffsetExpertsLoss) and has_class_affine(self.model):
            align_experts(self.model, -loss.offsets)  # from one prior, where a run ends, to those that are trained
        if self.teacher is None:
            return ExpertsObjective(self.model, loss, recipe.ghost_batch)
        taught = (self.teacher, recipe.distill_temperature, recipe.teacher_mode)
        return DistillationObjective(self.model, loss, *taught, recipe.ghost_batch)

    def evaluate(self, loader: Any, stage: Stage, model: Any) -> dict[str, Any]:
        """In full precision, with the buffers of the main process, which are the ones that are saved."""
        if self.accelerator.num_processes > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        watched = (batch for batch in loader if not self.signals.check())
        routed = stage.name == "router"
        return evaluate(model, watched, self.data.class_counts, routed, self.recipe.threshold, shots=self.recipe.shots)

    def save(self, stage: str, epoch: int, **more: Any) -> None:
        if self.accelerator.is_main_process:
            reached = dict(source=self.source, history=self.history, stages=self.reached, seconds=self.seconds)
            self.folder.save_state(dict(stage=stage, epoch=epoch, model=self.model.state_dict(), **reached, **more))
        self.accelerator.wait_for_everyone()
        self.signals.check()

    def train(self, stage: Stage) -> None:
        """All epochs of a stage from the last finished one, then its figures on the test set."""
        accelerator, recipe = self.accelerator, self.recipe
        loader, test_loader = self.training_loader(stage), self.loader(self.data.test, self.policy)
        held_out_loader = self.loader(self.held_out, self.policy) if self.held_out is not None else None
        objective = self.objective(stage)
        resumed = self.state if self.state and self.state["stage"] == stage.name and self.state["epoch"] else None
        if resumed:
            self.model.load_state_dict(resumed["model"])
        optimizer = make_optimizer(stage, objective, recipe.momentum)
        if recipe.sync_bn:
            convert_sync_batchnorm(objective)
        wrapped, optimizer = accelerator.prepare(objective, optimizer)
        ema, changes = None, []
        if stage.name == "experts" and not self.decoupling:
            views = 2 if recipe.loss == "mdcs" else 1
            changes = batch_changes(recipe.random_erasing, recipe.mixup_alpha, recipe.cutmix_alpha, views)
            if recipe.ema_decay is not None:
                # no warm-up for a run from weights, though timm takes its first two steps as they are
                ema = ModelEmaV3(self.model, recipe.ema_decay, use_warmup=self.source is None)
        scored = self.model if ema is None else ema.module
        selection, metrics, done = Selection(recipe.patience, recipe.eval_every), None, 0
        if resumed:
            done, selection.best = resumed["epoch"], resumed["best"]
            try:
                optimizer.load_state_dict(resumed["optimizer"])
            except ValueError as error:
                raise InputError(
                    f"{self.folder.path} holds the state of an optimizer of other parameter groups, as versions wrote "
                    f"that decayed norms and biases against the recipe ({error}): begin again in another --output."
                ) from error
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(resumed["scaler"])
            if ema is not None:
                ema.module.load_state_dict(resumed["ema"])
        bar = tqdm(
            total=stage.epochs * len(loader),
            initial=done * len(loader),
            desc=stage.name,
            disable=not accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        while done < stage.epochs and not selection.exhausted(done):
            started = time.perf_counter()
            loss = self.train_epoch(stage, done, objective, wrapped, optimizer, loader, bar, ema, changes)
            row = dict(stage=stage.name, epoch=done + 1, lr=stage.lr_at(done), loss=loss)
            row |= dict(seconds=round(time.perf_counter() - started, 2))
            row |= dict.fromkeys(("all", "many", "medium", "few", "held_out"))
            done += 1
            metrics = None
            if done % recipe.eval_every == 0 or done == stage.epochs:
                metrics = self.evaluate(test_loader, stage, scored)
                row |= {name: metrics[name] for name in ("all", "many", "medium", "few")}
                if held_out_loader is not None:
                    row["held_out"] = self.evaluate(held_out_loader, stage, scored)["class_mean"]
                    selection.update(row["held_out"], done, scored)
            self.history.append(row)
            accelerator.log({k: v for k, v in row.items() if isinstance(v, float | int)}, step=len(self.history))
            self.seconds += time.perf_counter() - started
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            more = dict(ema=ema.module.state_dict()) if ema is not None else {}
            more |= dict(optimizer=optimizer.state_dict(), scaler=scaler, best=selection.best)
            self.save(stage.name, done, **more)
        bar.close()
        if ema is not None:
            self.model.load_state_dict(ema.module.state_dict())
        if recipe.select == "best" and selection.best["model"]:
            done, metrics = selection.best["epoch"], None
            self.model.load_state_dict(selection.best["model"])
        loss = getattr(objective, "loss", None)
        if isinstance(loss, OffsetExpertsLoss) and self.model.num_experts > 1:
            align_experts(self.model, loss.offsets)  # a router needs answers of few experts that suit all classes
            metrics = None
        self.finish(stage, metrics or self.evaluate(test_loader, stage, self.model), done)
        accelerator.free_memory()

    def train_epoch(
        self, stage: Stage, epoch: int, objective: Objective, wrapped: Any, optimizer: Any, loader: Any, bar: tqdm,
        ema: ModelEmaV3 | None, changes: list[BatchChange],
    ) -> float:  # fmt: skip
        """One epoch; its mean loss. Everything random in it follows from seed and epoch, so resuming is exact."""
        accelerator, accumulation = self.accelerator, self.recipe.gradient_accumulation
        set_seed((self.recipe.seed * 1_000_003 + epoch) % 2**32, device_specific=True)
        objective.set_epoch(epoch)
        loader.set_epoch(epoch)
        wrapped.train()
        for group in optimizer.param_groups:
            group["lr"] = stage.lr_at(epoch)
        losses = torch.zeros(len(loader), device=accelerator.device)  # looked at once an epoch: no sync per step
        for step, (images, targets) in enumerate(loader):
            start = step - step % accumulation
            size = min(accumulation, len(loader) - start)
            complete = step + 1 == start + size
            for change in changes:
                images, targets = change(images, targets)
            with nullcontext() if complete else accelerator.no_sync(wrapped):
                loss = wrapped(images, targets)["loss"]
                accelerator.backward(loss / size)
            losses[step] = loss.detach()
            if complete:
                if self.recipe.clip_grad is not None:
                    accelerator.clip_grad_norm_(objective.trainable_parameters(), self.recipe.clip_grad)
                optimizer.step()
                optimizer.zero_grad()
                if ema is not None:
                    ema.update(self.model, epoch * -(-len(loader) // accumulation) + step // accumulation)
            bar.update()
            self.signals.check()
        losses = accelerator.reduce(losses, "mean")
        bad = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
        if bad:
            ways = "a lower --lr" + (" or --mixed-precision no" if self.recipe.mixed_precision != "no" else "")
            raise RunError(f"the loss is not finite at epoch {epoch + 1}, step {bad[0] + 1}: try {ways}.")
        return losses.mean().item()

    def finish(self, stage: Stage, metrics: dict[str, Any], epochs: int) -> None:
        """A stage's figures, weights and pictures into the folder."""
        metrics = with_macs(metrics, self.model, (self.model.in_chans, self.size, self.size)) | dict(epochs=epochs)
        self.reached[stage.name] = metrics
        if stage.name == "router":
            metrics["threshold"] = self.recipe.threshold
        if self.accelerator.is_main_process:
            self.folder.export(self.model, self.policy.data_config(self.size), self.data.class_names)
            facts = dict(num_processes=self.accelerator.num_processes, class_counts=self.data.class_counts)
            facts |= dict(seconds=round(self.seconds, 1), **(dict(source=self.source) if self.source else {}))
            self.folder.write_results(self.recipe, self.accelerator.device, self.reached, **facts)
        self.save("router" if stage.name == "experts" else "done", 0)
        if self.accelerator.is_main_process:
            plot_run(self.folder.path, self.history, self.folder.results())
        self.state = None  # what follows goes on from here, not from what was resumed


def train(argv: list[str] | None) -> None:
    args, recipe = parse_arguments(argv)
    set_threads(args.threads)
    keep_memory()
    folder = RunFolder(args.output)
    if args.resume and (folder.path / "results.json").is_file():
        folder.claim(recipe, args.stage, True, False)
        if args.stages[-1] in folder.results()["stages"]:
            return print(f"{args.output} is finished.\n{folder.table()}")
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        dynamo_backend="inductor" if recipe.compile else None,
        log_with=args.tracker,
        project_dir=args.output if args.tracker else None,
    )
    for name in {recipe.optimizer, recipe.router_optimizer}:
        check_optimizer(name, accelerator.device)
    if recipe.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("mixed_precision=fp16 needs a GPU: use bf16 or no on a CPU.")
    if recipe.sync_bn and accelerator.device.type == "cpu":
        raise InputError("sync_bn needs GPUs: leave it out on CPUs.")
    run = Run(args, recipe, accelerator)
    if run.state is None:
        run.save(args.stages[0], 0)
    if accelerator.is_main_process and (run.state is None or not args.resume):
        run.folder.start(recipe)
    if args.tracker:
        accelerator.init_trackers("ride_timm", {key: str(value) for key, value in vars(recipe).items()})
    for name in args.stages:
        if name not in run.reached:
            run.train(recipe.stage(name))
    accelerator.end_training()
    if accelerator.is_main_process:
        print(run.folder.table())


if __name__ == "__main__":
    sys.exit(exit_code(train, None))
