"""Peak resident memory of training steps: baseline and ours, one process each."""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

from record import alternate, parse, parser, record, show, summary
from step import build
from variants import VARIANTS, add_variants_flag, default_variants


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def train(args: argparse.Namespace) -> None:
    """Train a few steps; print the peak memory after the imports and at the end."""
    importlib.import_module("baseline" if args.variant == "baseline" else "ours")
    imported = peak_megabytes()
    build(args.variant, args)()
    print(json.dumps(dict(imported=imported, peak=peak_megabytes())))


def main(argv: list[str] | None = None) -> None:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--model", choices=("ride_resnet32", "ride_resnext50"), default="ride_resnet32")
    flags.add_argument("--batch-size", type=int, default=128)
    flags.add_argument("--image-size", type=int, default=32)
    flags.add_argument("--steps", type=int, default=3)
    flags.add_argument("--variant", choices=tuple(VARIANTS), help="train this variant alone, in this process")
    flags.set_defaults(num_experts=3, warm_up=0)
    add_variants_flag(flags)
    args = parse(flags, argv)
    if args.variant:
        return train(args)
    args.variants = args.variants or default_variants()

    above: dict[str, list[float]] = {variant: [] for variant in args.variants}

    def run(variant: str) -> float:
        command = [sys.executable, str(Path(__file__).resolve()), "--variant", variant]
        for name in ("model", "batch_size", "image_size", "steps", "threads"):
            command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured = json.loads(ran.stdout.splitlines()[-1])
        above[variant].append(measured["peak"] - measured["imported"])
        return measured["peak"]

    peaks = alternate({variant: partial(run, variant) for variant in args.variants}, args.rounds)
    figures = {name: summary(values) for name, values in peaks.items()}
    figures_above = {name: summary(values) for name, values in above.items()}
    print(f"{args.model} x3, batch {args.batch_size}, {args.image_size} px: peak of the process")
    show(figures, "MiB", 0)
    print("above the peak of the imports")
    show(figures_above, "MiB", 0)
    ratio = figures["baseline"]["median"] / figures[args.variants[-1]]["median"]
    record("memory", args, dict(peak_mib=figures, peak_mib_beyond_imports=figures_above, ratio=ratio))
    print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
