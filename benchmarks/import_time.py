"""Time that `import ride_timm` adds to `import timm`, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from record import ROOT, alternate, parse, parser, record, show, summary

CODE = "import time; started = time.perf_counter(); import {}; print(time.perf_counter() - started)"


def seconds_to_import(module: str) -> float:
    ran = subprocess.run(
        [sys.executable, "-c", CODE.format(module)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(ran.stdout.split()[-1])


def main(argv: list[str] | None = None) -> None:
    args = parse(parser(__doc__, rounds=7), argv)
    variants = {f"import {name}": partial(seconds_to_import, name) for name in ("timm", "ride_timm")}
    if args.rounds > 1:
        for variant in variants.values():
            variant()  # warm the file cache
    figures = {name: summary(values) for name, values in alternate(variants, args.rounds).items()}
    show(figures)
    difference = figures["import ride_timm"]["median"] - figures["import timm"]["median"]
    record("import_time", args, dict(seconds=figures, difference_seconds=difference))
    print(f"difference {difference:.3f} s")


if __name__ == "__main__":
    main()
