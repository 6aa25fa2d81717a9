"""Publish a verified release on the Hub; without --push, only say what would change.

python hub/publish.py NAME.TAG [--namespace N] [--push]

The token is that of HF_TOKEN or of `hf auth login`; it is never printed. After a push the release is downloaded into an
empty cache and verified there.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path

import timm
from card import BEGIN, END, NOTHING_YET, hand_edited
from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from staged import CARD, GOLDEN, HERE, STAMP, Staged, is_registered, read_table, write_table
from verify import check_golden

import ride_timm
from ride_timm import InputError, RunError
from ride_timm.cli.process import exit_code
from ride_timm.models.download import hub_error, repository_of
from ride_timm.models.release import NAMESPACE, WEIGHTS, release_table, sha256_of
from ride_timm.training.arguments import Parser

RELEASE = f"v{ride_timm.__version__}"


class Hub:
    """A repository of the Hub seen by its owner: what lies there, what would change, the push."""

    def __init__(self, repo: str, repo_type: str = "model") -> None:
        self.repo, self.repo_type = repo, repo_type
        self.token = get_token()
        self.api = HfApi(token=self.token or False, library_name="ride_timm", library_version=ride_timm.__version__)
        self.place = dict(repo_id=repo, repo_type=repo_type)

    def explain(self, error: Exception) -> InputError | RunError:
        """One sentence for what the Hub refused, without the token."""
        status = getattr(getattr(error, "response", None), "status_code", None)
        owner = self.repo.partition("/")[0]
        if status == 401 and self.token:
            return InputError(
                f"{constants.ENDPOINT} does not know your token: renew it by `hf auth login`, or HF_TOKEN."
            )
        if status == 401:
            return InputError("pushing needs a token with write access: `hf auth login`, or HF_TOKEN.")
        if status == 403:
            return InputError(f"your token may not write to {owner}: it needs the write role and membership there.")
        if status == 412:
            return InputError(f"{self.repo} was changed by somebody else meanwhile: look again, without --push.")
        if status is None and not isinstance(error, HFValidationError):
            return RunError(
                f"{constants.ENDPOINT} cannot be reached, or HF_HUB_OFFLINE is set: {type(error).__name__}."
            )
        if status is not None and status >= 500:
            return RunError(
                f"{constants.ENDPOINT} failed ({status}): try again, what is there already is not sent twice."
            )
        return hub_error(error, self.repo, "the release")

    def check_token(self) -> None:
        """InputError where there is no token, a wrong one, or one that can only read, before anything is sent."""
        if not self.token:
            raise InputError("pushing needs a token with write access: `hf auth login`, or HF_TOKEN.")
        try:
            role = self.api.whoami().get("auth", {}).get("accessToken", {}).get("role")
        except Exception as error:  # the client and its transport raise what they like
            raise self.explain(error) from error
        if role == "read":
            raise InputError("your token can only read: make one with write access on the Hub's settings page.")

    def look(self, revision: str | None = None) -> tuple[dict[str, str], str | None]:
        """{file: its git or LFS hash} and the commit; ({}, None) where there is no such repository or revision."""
        try:
            commit = self.api.repo_info(**self.place, revision=revision).sha
            tree = self.api.list_repo_tree(**self.place, revision=commit, recursive=True)
            return {
                item.path: item.lfs.sha256 if item.lfs else item.blob_id for item in tree if hasattr(item, "size")
            }, commit
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            if getattr(error.response, "status_code", 404) == 401 and self.token:
                raise self.explain(error) from error
            return {}, None
        except Exception as error:
            raise self.explain(error) from error

    def read_card(self) -> str:
        """The card that lies there; "" where there is none."""
        try:
            with tempfile.TemporaryDirectory() as cache:
                where = dict(cache_dir=cache, token=self.token or False)
                path = hf_hub_download(filename=CARD, **self.place, **where)
                return Path(path).read_text(encoding="utf-8")
        except (EntryNotFoundError, RepositoryNotFoundError):
            return ""
        except Exception as error:
            raise self.explain(error) from error

    def push(self, folder: Path, base: str | None, message: str, ignore: list[str]) -> str:
        """Make the repository if it is new and upload the folder on top of commit `base`; gives the new commit."""
        try:
            if base is None:
                self.api.create_repo(**self.place)
            done = self.api.upload_folder(
                **self.place, folder_path=folder, commit_message=message, parent_commit=base, ignore_patterns=ignore
            )
            return done.oid
        except Exception as error:
            raise self.explain(error) from error

    def tag(self, release: str, commit: str) -> None:
        try:
            self.api.create_tag(**self.place, tag=release, revision=commit)
        except HfHubHTTPError as error:
            raise self.explain(error) from error


def compare(folder: Path, there: dict[str, str], ignore: tuple[str, ...] = (STAMP,)) -> dict[str, str]:
    """{file: "add" | "change" | "same", and "keep" for what only lies there}."""
    files = {
        p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ignore
    }
    found = {}
    for name, path in files.items():
        same = there.get(name) in (sha256_of(path), git_hash(path))
        found[name] = "add" if name not in there else "same" if same else "change"
    return found | {name: "keep" for name in sorted(there) if name not in files}


def git_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def print_changes(changes: dict[str, str], folder: Path) -> None:
    for name, change in changes.items():
        size = f"{(folder / name).stat().st_size:>12,} bytes" if change != "keep" else "(only there)"
        print(f"  {change:<7} {name:<24} {size}")


def check_stamp(staged: Staged) -> None:
    """InputError unless verify.py has seen these very files."""
    seen = staged.stamp().get("files")
    if seen is None:
        raise InputError(f"{staged.path / STAMP} is missing or damaged, so the release is not verified: "
                         f"python hub/verify.py {staged.name}")  # fmt: skip
    hashes = staged.hashes()
    if changed := sorted(name for name in seen.keys() | hashes.keys() if seen.get(name) != hashes.get(name)):
        raise InputError(f"{staged.path} was changed after it was verified ({', '.join(changed)}): verify it again.")


def merged_card(ours: str, theirs: str) -> str:
    """Our card with the hand-edited section of the one that lies there, if somebody has edited it."""
    by_hand = hand_edited(theirs)
    if BEGIN not in theirs or by_hand == NOTHING_YET:
        return ours
    start, end = ours.index(BEGIN) + len(BEGIN) + 1, ours.index(END) - 1
    return ours[:start] + by_hand + ours[end:]


def verify_download(staged: Staged, repo: str, revision: str, token: str | None) -> None:
    """Fetch a release into an empty cache and load it as a user does; RunError where it is not what was staged."""
    with tempfile.TemporaryDirectory() as cache:
        model = timm.create_model(f"hf-hub:{repo}@{revision}", pretrained=True, cache_dir=cache).eval()
        where = dict(cache_dir=cache, revision=revision, token=token or False)
        for name, sha256 in staged.hashes().items():
            path = Path(hf_hub_download(repo, name, **where))
            if name != CARD and sha256_of(path) != sha256:
                raise RunError(f"{name} of {repo} at {revision} is not the staged file.")
        check_golden(model, Path(hf_hub_download(repo, GOLDEN, **where)))


def publish(staged: Staged, repo: str, push: bool, release: str = RELEASE) -> dict[str, str]:
    """Say what a push would change, and push if told to; gives the changes.

    InputError for a folder that is not verified, a token that will not do, and a release that exists with other
    weights; nothing is sent then.
    """
    check_stamp(staged)
    hub = Hub(repo)
    if push:
        hub.check_token()
    there, commit = hub.look()
    released, _ = hub.look(release) if commit else ({}, None)
    if released and released.get(WEIGHTS) != staged.hashes()[WEIGHTS]:
        raise InputError(f"release {release} of {repo} exists with other weights: raise the version, or name another "
                         "--release.")  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(staged.path, Path(scratch) / staged.name))
        card = folder / CARD
        if CARD in there:
            card.write_text(merged_card(card.read_text(encoding="utf-8"), hub.read_card()), encoding="utf-8")
        changes = compare(folder, there)
        what = f"{repo} on {constants.ENDPOINT}{' (new)' if commit is None else ''}"
        print(f"pushing to {what}:" if push else f"dry run, nothing is sent; --push would change {what}:")
        print_changes(changes, folder)
        print(f"  release {release}: {'exists, stays where it is' if released else 'new'}")
        if not push:
            return changes
        if {"add", "change"} & set(changes.values()):
            commit = hub.push(folder, commit, f"{staged.name} {release}", [STAMP])
        else:
            print("nothing to change")
    verify_download(staged, repo, commit, hub.token)
    if not released:
        hub.tag(release, commit)  # of what has been seen to arrive whole
    print(f"published {constants.ENDPOINT}/{repo}, downloaded into an empty cache and verified")
    return changes


def write_down(name: str) -> None:
    """Published: stands beside the tag's cfg, so that timm lists the weights."""
    table = read_table()
    table[name]["published"] = True
    write_table(table)
    release_table.cache_clear()


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", metavar="NAME.TAG")
    parser.add_argument(
        "--namespace", metavar="N", help=f"user or organisation (default: RIDE_TIMM_HUB, or {NAMESPACE})"
    )
    parser.add_argument("--push", action="store_true", help="really send it")
    parser.add_argument(
        "--release", default=RELEASE, metavar="NAME", help="git tag of the release (default: %(default)s)"
    )
    parser.add_argument("--root", type=Path, default=HERE, metavar="DIR", help="folder of the staged releases")
    args = parser.parse_args(argv)
    staged = Staged.find(args.name, args.root)
    repo = f"{args.namespace}/{staged.name}" if args.namespace else repository_of(staged.name)
    publish(staged, repo, args.push, args.release)
    if args.push and repo == f"{NAMESPACE}/{staged.name}" and args.root == HERE and is_registered(staged.name):
        write_down(staged.name)


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
