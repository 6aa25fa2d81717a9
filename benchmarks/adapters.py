"""Experts as adapters against experts fully fine-tuned: parameters, files and memory.

One process each trains RIDE with 3 experts by AdamW from random weights, which costs the same as from trained ones.
The peak is that beyond the imports, of an allocator that returns every freed tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from batches import Clocked, class_counts_of, labels_only, random_batch
from memory import peak_megabytes
from record import parse, parser, record

VARIANTS = {"fully fine-tuned": {}, "adapters": dict(adapter="lora")}
UNITS = dict(trained="M parameters trained", weights="MB model.safetensors", state="MB state.pt", peak="MiB peak")


def train(args: argparse.Namespace) -> None:
    """Train a few steps and save them; print the figures."""
    import peft  # noqa: F401  (so that its import counts as one)
    from ours import Training, make_recipe

    from ride_timm.training.run_folder import RunFolder
    from ride_timm.training.state import TrainingState

    imported = peak_megabytes()
    keys = dict(backbone=args.backbone, optimizer="adamw", lr=1e-3, loss="ce") | VARIANTS[args.variant]
    recipe = make_recipe("ride", args.batch_size, args.image_size, **keys)
    training = Training(recipe, labels_only(class_counts_of(args.num_classes)), args.num_classes)
    batch = random_batch(args.batch_size, args.num_classes, args.image_size)
    training.train_batches(Clocked([batch] * args.steps, args.steps))
    figures = dict(peak=max(1.0, peak_megabytes() - imported))
    figures["trained"] = sum(p.numel() for p in training.stage.objective.trainable_parameters()) / 1e6
    state = TrainingState()
    state.capture(training.stage, 1)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        run.save(state)
        run.export(training.stage.model, dict(input_size=(3, args.image_size, args.image_size)), ())
        figures |= dict(
            weights=(run.path / "model.safetensors").stat().st_size / 1e6,
            state=(run.path / "state.pt").stat().st_size / 1e6,
        )
    print(json.dumps(figures))


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__, rounds=1)
    flags.add_argument("--backbone", default="vit_small_patch16_224")
    flags.add_argument("--batch-size", type=int, default=32)
    flags.add_argument("--image-size", type=int, default=224)
    flags.add_argument("--num-classes", type=int, default=100)
    flags.add_argument("--steps", type=int, default=2)
    flags.add_argument("--variant", choices=tuple(VARIANTS), help="train this variant alone, in this process")
    args = parse(flags, argv)
    if args.variant:
        return train(args)

    def run(variant: str) -> dict[str, float]:
        command = [sys.executable, str(Path(__file__).resolve()), "--variant", variant]
        for name in ("backbone", "batch_size", "image_size", "num_classes", "steps", "threads"):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_=str(2**16))
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return json.loads(ran.stdout.splitlines()[-1])

    rounds = [{variant: run(variant) for variant in VARIANTS} for _ in range(args.rounds)]
    figures = {
        variant: {name: statistics.median(measured[variant][name] for measured in rounds) for name in UNITS}
        for variant in VARIANTS
    }
    full, adapted = figures.values()
    print(f"{args.backbone} x3, batch {args.batch_size}, {args.image_size} px")
    for name, unit in UNITS.items():
        print(f"{full[name]:8.2f} → {adapted[name]:8.2f} {unit} ({adapted[name] / full[name]:.3f})")
    record("adapters", args, figures)
    print(f"ratio {full['peak'] / adapted['peak']:.2f}")


if __name__ == "__main__":
    main()
