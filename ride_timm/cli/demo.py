"""Try a model in the browser: drop an image, see each expert and the router."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from ..errors import InputError
from ..inference.demo.opinions import load_demo
from ..inference.load import SPEC
from .process import print_json


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("demo", help=__doc__, description=__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, metavar="SPEC", help=SPEC)
    parser.add_argument("--device", metavar="NAME", help="such as cpu or cuda:1 (default: the GPU where there is one)")
    parser.add_argument(
        "--port", type=int, metavar="N", help="port on this machine (default: the first free from 7860)"
    )


def run(args: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise InputError("demo needs gradio: pip install gradio")
    if args.port is not None and not 1 <= args.port <= 65535:
        raise InputError(f"port={args.port}: expected a number from 1 to 65535.")
    demo = load_demo(args.model, args.device)
    from ..inference.demo.page import launch

    page, url = launch(demo, args.port, prevent_thread_lock=True, quiet=True)
    if args.json:
        print_json(dict(url=url))
    else:
        print(f"{demo.name}: {url} (Ctrl+C stops it)", flush=True)
    page.block_thread()
