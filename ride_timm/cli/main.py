"""The parser of `python -m ride_timm`, and the dispatch to its commands."""

from __future__ import annotations

from functools import partial

from ..hardware import keep_memory, set_threads
from ..training.arguments import Parser
from . import datasets, demo, evaluate, export, flops, merge, models, predict, sweep

COMMANDS = (evaluate, predict, demo, export, merge, flops, datasets, models, sweep)


def build_parser() -> Parser:
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON")
    common.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser = Parser(
        prog="python -m ride_timm",
        description="RIDE for timm: long-tailed recognition by diverse experts.",
        allow_abbrev=False,
    )
    one = partial(Parser, parents=[common], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=one)  # type: ignore[call-overload]
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: list[str] | None) -> None:
    args = build_parser().parse_args(argv)
    set_threads(args.threads)
    keep_memory()
    args.run(args)
