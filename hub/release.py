"""Release a finished run in one command: stage it, verify it, update the tables, upload it.

python hub/release.py NAME.TAG --from RUN [--data-dir DIR] [--space] [--push]

Without --push nothing is uploaded: the release is staged in hub/NAME.TAG/ and the files of the upload are listed.
Whatever is refused, on this machine or by the Hub, is refused before anything is written. train_accelerate.py
--push-to-hub does the same after training, with the release in the run folder.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from folder import HERE, Staged, check_num_classes, parse_name, repository, repository_facts
from publish import RELEASE, check_access, check_release, publish, released_weights
from spaces import publish_space
from stage import build, install, scratch_folder
from tables import refresh
from verify import data_of, print_findings, verify

from ride_timm import InputError
from ride_timm.cli.process import exit_code
from ride_timm.hardware import set_threads
from ride_timm.models.release import NAMESPACE
from ride_timm.training.arguments import Parser
from ride_timm.training.run_folder import provenance


def release(
    name: str,
    source: Path,
    root: Path = HERE,
    *,
    seeds: tuple[Path, ...] = (),
    data_dir: str | None = None,
    namespace: str | None = None,
    space: bool = False,
    push: bool = False,
) -> Staged:
    """Build the release aside, verify it there, ask the Hub, and only then install and publish it.

    space: with its demo, as a Space of the same name.
    """
    parse_name(name)
    repo = repository(name, namespace)
    if push:
        check_access(repo)
    with scratch_folder(root) as scratch:
        new = build(source, name, scratch, seeds=seeds, data_dir=data_dir, facts=repository_facts(name, repo))
        data = data_of(new, data_dir, False)
        print_findings(new, verify(new, data), data is not None)
        if push:
            check_release(new, repo)
        staged = install(new, root)
    if root == HERE:
        refresh()
    publish(staged, repo, push)
    if space:
        publish_space(repo, push)
    return staged


def check_push(repo: str, network: str) -> None:
    """Refuse, before a network is trained, what `push_run` would refuse afterwards.

    repo: [OWNER/]NAME.TAG. InputError for a name of another network, a token without write access, a release that
    exists, and code or an installation from which nothing can be released.
    """
    namespace, name = _split(repo)
    found, _ = parse_name(name)
    if found != network:
        raise InputError(f"push_to_hub={repo!r} names a {found}, the recipe trains a {network}.")
    commit = provenance()["commit"]
    if commit is None:
        raise InputError("--push-to-hub: the code is in no git clone, which makes the release irreproducible.")
    if commit.endswith("+dirty"):
        raise InputError("--push-to-hub: the clone has uncommitted changes, which make the release irreproducible.")
    if find_spec("matplotlib") is None:
        raise InputError("--push-to-hub draws the plots of the card: pip install matplotlib.")
    repo = repository(name, namespace)
    check_access(repo)
    if released_weights(repo) is not None:
        raise InputError(f"release {RELEASE} of {repo} exists: choose another tag for --push-to-hub.")


def check_classes(repo: str, num_classes: int) -> None:
    """InputError for [OWNER/]NAME.TAG where timm has this tag with another number of classes."""
    check_num_classes(_split(repo)[1], num_classes)


def push_run(repo: str, run: Path) -> None:
    """Stage the finished run in its own folder RUN/hub/NAME.TAG/, verify it, and push it to [OWNER/]NAME.TAG."""
    namespace, name = _split(repo)
    release(name, run, run / "hub", namespace=namespace, push=True)


def _split(repo: str) -> tuple[str | None, str]:
    owner, _, name = repo.rpartition("/")
    return owner or None, name


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", metavar="NAME.TAG", help="such as ride_resnet32.cifar100_lt100")
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="RUN", help="finished run folder")
    parser.add_argument("--seeds", type=Path, nargs="+", default=[], metavar="RUN", help="runs with other seeds")
    parser.add_argument("--data-dir", metavar="DIR", help="folder of the data, to measure the accuracy again")
    parser.add_argument("--namespace", metavar="N", help=f"owner on the Hub (default: RIDE_TIMM_HUB, or {NAMESPACE})")
    parser.add_argument("--space", action="store_true", help="and its demo, a Space of the same name")
    parser.add_argument("--push", action="store_true", help="upload; without it, list the files only")
    parser.add_argument("--root", type=Path, default=HERE, metavar="DIR", help="folder of the staged releases")
    args = parser.parse_args(argv)
    set_threads(None)
    options = dict(seeds=tuple(args.seeds), data_dir=args.data_dir, namespace=args.namespace)
    release(args.name, args.source, args.root, **options, space=args.space, push=args.push)


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
