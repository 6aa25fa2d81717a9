"""Release a finished run in one command: stage it, verify it, update the tables, upload it.

python hub/release.py NAME.TAG --from RUN [--data-dir DIR] [--push]

Without --push nothing is uploaded: the release is staged in hub/NAME.TAG/ and the files of the upload are listed.
Whatever is refused, on this machine or by the Hub, is refused before anything is written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from folder import HERE, Staged, parse_name
from publish import check_access, check_release, publish, repository
from stage import build, install, scratch_folder
from tables import refresh
from verify import data_of, print_findings, verify

from ride_timm.cli.process import exit_code
from ride_timm.hardware import set_threads
from ride_timm.models.release import NAMESPACE
from ride_timm.training.arguments import Parser


def release(
    name: str,
    source: Path,
    root: Path = HERE,
    *,
    seeds: tuple[Path, ...] = (),
    data_dir: str | None = None,
    namespace: str | None = None,
    push: bool = False,
) -> Staged:
    """Build the release aside, verify it there, ask the Hub, and only then install and publish it."""
    parse_name(name)
    repo = repository(name, namespace)
    if push:
        check_access(repo)
    with scratch_folder(root) as scratch:
        new = build(source, name, scratch, seeds=seeds, data_dir=data_dir)
        data = data_of(new, data_dir, False)
        print_findings(new, verify(new, data), data is not None)
        if push:
            check_release(new, repo)
        staged = install(new, root)
    if root == HERE:
        refresh()
    publish(staged, repo, push)
    return staged


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", metavar="NAME.TAG", help="such as ride_resnet32.cifar100_lt100")
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="RUN", help="finished run folder")
    parser.add_argument("--seeds", type=Path, nargs="+", default=[], metavar="RUN", help="runs with other seeds")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data, to measure the accuracy again")
    parser.add_argument("--namespace", metavar="N", help=f"owner on the Hub (default: RIDE_TIMM_HUB, or {NAMESPACE})")
    parser.add_argument("--push", action="store_true", help="upload; without it, list the files only")
    parser.add_argument("--root", type=Path, default=HERE, metavar="DIR", help="folder of the staged releases")
    args = parser.parse_args(argv)
    set_threads(None)
    options = dict(seeds=tuple(args.seeds), data_dir=args.data_dir, namespace=args.namespace, push=args.push)
    release(args.name, args.source, args.root, **options)


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
