"""Upload a verified release to the Hub, then download it and check it. Without --push: a dry run.

python hub/publish.py NAME.TAG [--namespace N] [--push]

The token is read from HF_TOKEN or `hf auth login`, and never printed. A pushed release is tagged with the version of
the package, after it was downloaded into an empty cache and gave its golden output.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
from folder import CARD, GOLDEN, HERE, RESULTS, STAMP, Staged, is_registered, record_published, repository
from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from tables import refresh
from verify import check_golden

import ride_timm
from ride_timm import InputError, RunError
from ride_timm.cli.process import exit_code
from ride_timm.errors import first_line
from ride_timm.models.download import hub_error
from ride_timm.models.release import NAMESPACE, WEIGHTS
from ride_timm.training.arguments import Parser

RELEASE = f"v{ride_timm.__version__}"


def make_api() -> HfApi:
    return HfApi(token=get_token() or False, library_name="ride_timm", library_version=ride_timm.__version__)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of the Hub's client into one-line `InputError`s."""
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:  # the client and its transport raise what they like
        raise hub_error(error, repo, "the release") from error


def check_access(repo: str) -> None:
    """InputError unless the user is logged in with a token that may write to the owner of `repo`."""
    api, owner = make_api(), repo.partition("/")[0]
    if not api.token:
        raise InputError("a push needs a token with write access: run `hf auth login`, or set HF_TOKEN.")
    with hub_errors(repo):
        user = api.whoami()
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(
            f"the token of {user['name']} is read-only: {constants.ENDPOINT}/settings/tokens makes others."
        )
    if owner not in (user["name"], *(org["name"] for org in user.get("orgs", ()))):
        raise InputError(f"{user['name']} may not write to {owner}: join it, or name another owner.")


def released_weights(repo: str, release: str = RELEASE) -> list[str | None] | None:
    """The sha256 of the weights of a release on the Hub; None where it does not exist."""
    try:
        with hub_errors(repo):
            there = make_api().get_paths_info(repo, [WEIGHTS], revision=release)
    except InputError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError):
            return None
        raise
    return [file.lfs and file.lfs.sha256 for file in there]


def check_release(staged: Staged, repo: str, release: str = RELEASE) -> None:
    """InputError where the release exists on the Hub with other weights."""
    if released_weights(repo, release) not in (None, [staged.hashes()[WEIGHTS]]):
        raise InputError(f"release {release} of {repo} exists with other weights: raise the version of the package.")


def check_base(staged: Staged) -> None:
    """Print a notice where the Hub has no repository that the card names as its `base_model`."""
    base = ModelCard.load(staged.path / CARD).data.base_model
    with hub_errors(str(base)):
        if base is not None and not make_api().repo_exists(base):
            print(
                f"notice: the card names {base} as its base_model, which the Hub does not have: publish it, too.",
                file=sys.stderr,
            )


def check_stamp(staged: Staged) -> None:
    """InputError unless verify.py has checked these very files."""
    seen, hashes = staged.stamp().get("files"), staged.hashes()
    if seen is None:
        raise InputError(f"{staged.path / STAMP} is missing or damaged: python hub/verify.py {staged.name}")
    if changed := sorted(name for name in seen.keys() | hashes.keys() if seen.get(name) != hashes.get(name)):
        raise InputError(
            f"{staged.path} has changed since it was verified ({', '.join(changed)}): "
            f"python hub/verify.py {staged.name}"
        )


def check_card(staged: Staged, repo: str) -> None:
    """InputError where the card names another repository; that of a tag of timm names the project's own."""
    stated = staged.json(RESULTS).get("repository")
    if stated != repo and not (stated is None and is_registered(staged.name)):
        raise InputError(
            f"the card of {staged.path} names {stated or 'no repository'}, not {repo}: stage the folder again with "
            f"--namespace {repo.partition('/')[0]}, and verify it."
        )


def print_upload(folder: Path, target: str) -> None:
    """List the files that a push would upload."""
    print(f"dry run, nothing is sent; --push would upload to {constants.ENDPOINT}/{target}:")
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STAMP):
        print(f"  {path.relative_to(folder).as_posix():<24} {path.stat().st_size:>12,} bytes")


def upload(folder: Path, repo: str, message: str, repo_type: str = "model") -> str:
    """Upload what differs, making the repository if it is new; the commit with the result."""
    api = make_api()
    sdk = dict(space_sdk="gradio") if repo_type == "space" else {}
    try:
        api.create_repo(repo, repo_type=repo_type, exist_ok=True, **sdk)
        return api.upload_folder(
            repo_id=repo, repo_type=repo_type, folder_path=folder, commit_message=message, ignore_patterns=[STAMP]
        ).oid
    except Exception as error:
        raise RunError(
            f"the upload to {repo} failed; run it again, uploaded files are not sent twice. ({first_line(error)})"
        ) from error


def check_download(staged: Staged, repo: str, revision: str) -> None:
    """Download a release into an empty cache and load it; RunError or InputError where it is not the staged one."""
    with hub_errors(repo), tempfile.TemporaryDirectory() as cache:
        differing = make_api().verify_repo_checksums(repo, revision=revision, local_dir=staged.path).mismatches
        if differing:
            raise RunError(f"{', '.join(file['path'] for file in differing)} of {repo} is not the staged file.")
        model = timm.create_model(f"hf-hub:{repo}@{revision}", pretrained=True, cache_dir=cache).eval()
        check_golden(model, staged.path / GOLDEN)


def publish(staged: Staged, repo: str, push: bool, release: str = RELEASE) -> None:
    """List what a push uploads, or push, download, check and tag the release.

    InputError, before anything is sent, for a folder that is not verified, a card that names another repository, a
    token without write access, and a release that exists with other weights.
    """
    check_stamp(staged)
    check_card(staged, repo)
    if not push:
        print_upload(staged.path, repo)
        print(f"and tag it {release}")
        return
    check_access(repo)
    check_release(staged, repo, release)
    check_base(staged)
    commit = upload(staged.path, repo, f"{staged.name} {release}")
    check_download(staged, repo, commit)
    with hub_errors(repo):
        make_api().create_tag(repo, tag=release, revision=commit, exist_ok=True)
    print(f"published {constants.ENDPOINT}/{repo}, downloaded and verified")
    if staged.path.parent == HERE and repo == f"{NAMESPACE}/{staged.name}" and is_registered(staged.name):
        record_published(staged.name)
        refresh()


def main(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("name", metavar="NAME.TAG")
    parser.add_argument("--namespace", metavar="N", help=f"owner (default: RIDE_TIMM_HUB, or {NAMESPACE})")
    parser.add_argument("--push", action="store_true", help="upload; without it, list the files only")
    parser.add_argument("--release", default=RELEASE, metavar="NAME", help="git tag (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=HERE, metavar="DIR", help="folder of the staged releases")
    args = parser.parse_args(argv)
    staged = Staged.find(args.name, args.root)
    publish(staged, repository(staged.name, args.namespace), args.push, args.release)


if __name__ == "__main__":
    sys.exit(exit_code(main, None))
