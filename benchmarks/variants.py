"""Variants of the training benchmarks: the baseline, and ours by recipe keys."""

from __future__ import annotations

import argparse

VARIANTS = {
    "baseline": None,
    "ours fp32": dict(mixed_precision="no"),
    "ours bf16": dict(mixed_precision="bf16"),
    "ours bf16, plain norm": dict(mixed_precision="bf16", fused_norm=False),
    "ours bf16, compiled": dict(mixed_precision="bf16", fused_norm=False, compile=True),
}


def add_variants_flag(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--variants",
        nargs="+",
        choices=tuple(VARIANTS),
        help="baseline and others; the last line is the ratio of the last one. Unless given: "
        "the baseline, ours in fp32 and, where faster, in bf16",
    )


def default_variants() -> list[str]:
    """The baseline, ours in fp32 and, where it is faster, in bf16."""
    from ride_timm.hardware import bf16_pays

    return ["baseline", "ours fp32"] + ["ours bf16"] * bf16_pays()


def ratios_of(medians: dict[str, float]) -> dict[str, float]:
    """Print and return the baseline's time over that of each variant."""
    ratios = {name: medians["baseline"] / median for name, median in medians.items() if name != "baseline"}
    for name, ratio in ratios.items():
        print(f"baseline / {name}: {ratio:.2f}")
    return ratios
