"""Common flags, alternating runs, and results recorded with their provenance."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results.jsonl"


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parser(description: str, rounds: int = 5) -> argparse.ArgumentParser:
    """Parser with the common flags."""
    made = argparse.ArgumentParser(
        description=description.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help="alternating runs of each variant")
    made.add_argument("--threads", type=int, default=cores(), help="CPU threads of torch")
    made.add_argument("--results", type=Path, default=RESULTS, help="file to append the results to, as JSON lines")
    made.add_argument("--no-record", action="store_true", help="do not append them")
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the arguments, set the threads, start the load measurement."""
    global _start
    args = made.parse_args(argv)
    for name in ("rounds", "threads", "steps", "batch_size"):
        if getattr(args, name, 1) < 1:
            made.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 1 or more")
    if not args.results.parent.is_dir():
        made.error(f"--results {args.results}: its folder does not exist")
    torch.set_num_threads(args.threads)
    _start = _clocks()
    return args


def _clocks() -> tuple[float, float, float] | None:
    """Wall seconds, CPU seconds of the machine, and CPU seconds of our processes."""
    try:
        user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    except (OSError, ValueError):
        return None
    ours = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return time.perf_counter(), (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), ours


_start: tuple[float, float, float] | None = None


def disturbance() -> float | None:
    """Percent of CPU time used by other processes since `parse`; None if unknown."""
    now = _clocks()
    if now is None or _start is None:
        return None
    wall, machine, ours = (after - before for after, before in zip(now, _start, strict=True))
    return max(0.0, 100 * (machine - ours) / (wall * (os.cpu_count() or 1)))


def _serve(pipe: Any, build: Callable[[], Callable[[], float]], threads: int) -> None:
    """Build a variant, run it once to warm up, then once per request."""
    torch.set_num_threads(threads)
    run = build()
    run()
    pipe.send(None)
    while pipe.recv():
        pipe.send(run())


@contextmanager
def processes(
    builders: dict[str, Callable[[], Callable[[], float]]], threads: int
) -> Iterator[dict[str, Callable[[], float]]]:
    """Start each variant in its own process, warmed up.

    Allocators, thread pools and caches are thus separate. Builders are pickled; a process idles while another runs.
    """
    context = multiprocessing.get_context("spawn")
    pipes, children = {}, []
    try:
        for name, build in builders.items():
            pipes[name], theirs = context.Pipe()
            children.append(context.Process(target=_serve, args=(theirs, build, threads), daemon=False))
            children[-1].start()
            theirs.close()
            pipes[name].recv()

        def run(pipe: Any) -> float:
            pipe.send(True)
            return pipe.recv()

        yield {name: partial(run, pipe) for name, pipe in pipes.items()}
    finally:
        for pipe in pipes.values():
            with suppress(OSError):
                pipe.send(False)
            pipe.close()
        for child in children:
            child.join()


def alternate(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run the variants in turn, A B C A B C …, so that load affects all alike.

    Each variant returns its own seconds; the result holds them by name and round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(run())
    return seconds


def summary(values: list[float]) -> dict[str, float]:
    """Median, min and max."""
    return dict(median=statistics.median(values), min=min(values), max=max(values))


def show(figures: dict[str, dict[str, float]], unit: str = "s", digits: int = 3) -> None:
    """Print median (min … max) of each variant."""
    width = max(map(len, figures))
    for name, figure in figures.items():
        low, high = (f"{figure[key]:.{digits}f}" for key in ("min", "max"))
        print(f"{name:<{width}}  {figure['median']:.{digits}f} {unit}  ({low} … {high})")


def _git(*command: str) -> str | None:
    try:
        ran = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def provenance() -> dict[str, Any]:
    """Commit, uncommitted changes, versions, processor, threads and date."""
    from ride_timm.hardware import processor_name

    changed = _git("status", "--porcelain", "--", "ride_timm", "train_accelerate.py", "benchmarks/*.py")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": None if changed is None else bool(changed),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "numpy", "pillow")},
        "processor": processor_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value


def record(benchmark: str, args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print the load of other processes; append a JSON line unless --no-record."""
    others = disturbance()
    if others is not None:
        print(f"other processes took {others:.0f} % of the CPU time" + ("; repeat on an idle machine" * (others > 5)))
    if args.no_record:
        return
    # no machine's paths in the record: the last part only
    given = {key: Path(value).name if isinstance(value, Path) else value for key, value in vars(args).items()}
    del given["no_record"], given["results"]
    line = {
        "benchmark": benchmark,
        "figures": _rounded(figures),
        "arguments": given,
        **provenance(),
        "disturbed_percent": _rounded(others),
    }
    with args.results.open("a", encoding="utf-8") as results:
        results.write(json.dumps(line, ensure_ascii=False) + "\n")
