"""A GPU against the CPU, then its speed: training, input, routed inference, memory.

Prints each result as it is measured and appends each section to results.jsonl. Stops within `--minutes` and names what
it left out. The exit code is 1 where a check is wrong or failed. Needs no network and no data.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from record import ROOT, parse, parser, record

sys.path.insert(0, str(ROOT))  # this checkout is measured, installed or not

import gpu_checks
import gpu_journey
import gpu_speed
from gpu_bench import Bench, OutOfTime

from ride_timm.hardware import choose_device, device_name

CHECKS = (
    gpu_checks.losses,
    gpu_checks.outputs,
    gpu_checks.gradients,
    gpu_checks.routing,
    gpu_checks.mixed_precision,
    gpu_checks.synchronisations,
    gpu_journey.journey,
)
SPEEDS = (
    gpu_speed.steps,
    gpu_speed.epochs,
    gpu_speed.routed_inference,
    gpu_speed.photographs,
    gpu_speed.profile,
    gpu_speed.compiled,
)
SECTIONS: dict[str, Callable[[Bench], None]] = {one.__name__: one for one in (*CHECKS, *SPEEDS)}


def run_section(name: str, bench: Bench) -> None:
    """Run one section to its end, its first error, or the end of the time."""
    bench.rows, bench.wrong, bench.left_out = [], [], []
    started = time.monotonic()
    print(f"{name} ({bench.left():.0f} s left)", flush=True)
    if bench.left() <= 0:
        bench.skip(name, "no time is left")
    else:
        bench.allow_tf32(False)
        try:
            SECTIONS[name](bench)
        except OutOfTime:
            bench.skip("the rest", "no time is left")
        except Exception as error:
            bench.fail(name, error)
        bench.free()
    seconds = time.monotonic() - started
    figures: dict[str, Any] = dict(device=device_name(bench.device), rows=bench.rows, seconds=seconds)
    record(f"gpu_{name}", bench.args, figures | dict(wrong=bench.wrong, left_out=bench.left_out))


def gpu_tests() -> list[str]:
    """Files with tests marked `gpu`, alone: the others import packages that a machine lent for its GPU may lack."""
    mark = re.compile(r"^(@|pytestmark = )pytest\.mark\.gpu\b", re.MULTILINE)
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if mark.search(path.read_text(encoding="utf-8"))]


def _stop(number: int, frame: Any) -> None:
    raise OutOfTime


def measure_all(argv: list[str] | None = None) -> int:
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--device", help="device of torch (default: the GPU if there is one)")
    flags.add_argument("--toy", action="store_true", help="tiny sizes, to try all of this on a CPU")
    flags.add_argument("--minutes", type=float, default=8.0, help="time budget, the tests not included")
    flags.add_argument("--sections", nargs="+", choices=tuple(SECTIONS), default=list(SECTIONS))
    flags.add_argument("--tests", action="store_true", help="run the tests marked gpu as well, after all else")
    args = parse(flags, argv)
    if args.minutes <= 0:
        flags.error(f"--minutes {args.minutes:g}: expected more than 0")
    device = choose_device(args.device)
    if device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # also where there is a GPU
    bench = Bench(args, device, time.monotonic() + 60 * args.minutes)
    print(f"{device_name(device)}, torch {torch.__version__}", flush=True)

    wrong, left_out = [], []
    before = signal.signal(signal.SIGALRM, _stop)  # for what takes longer than was thought
    signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    try:
        for name in args.sections:
            run_section(name, bench)
            if SECTIONS[name] in CHECKS:
                wrong += [f"{name}: {what}" for what in bench.wrong]
            left_out += [f"{name}: {what}" for what in bench.left_out]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if args.tests:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "--continue-on-collection-errors"]
        if subprocess.run([*command, *gpu_tests()], cwd=ROOT).returncode:
            wrong.append("tests")
    for what in left_out:
        print(f"left out: {what}")
    for what in wrong:
        print(f"wrong: {what}")
    print(f"wrong {len(wrong)}, left out {len(left_out)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(measure_all())
