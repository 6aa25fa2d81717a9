"""The demo of a release as a Space: the files of hub/space/, and the package beside them."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from folder import HERE
from huggingface_hub import constants
from publish import RELEASE, hub_errors, make_api, upload

import ride_timm
from ride_timm import RunError
from ride_timm.files import write_text

SPACE = HERE / "space"
MODEL = "ride-timm/ride_resnet32.fashion_lt"  # the release that the files of hub/space/ name
FILES = ("README.md", "app.py", "requirements.txt")
PACKAGE = Path(ride_timm.__file__).parent


def build_space(repo: str, folder: Path) -> None:
    """Write the Space of the release `repo`: a Space installs packages of PyPI, and this one is not there."""
    owner, name = map(re.escape, MODEL.split("/"))
    repo_name = repo.partition("/")[2]
    for file in FILES:
        text = (SPACE / file).read_text(encoding="utf-8")
        write_text(folder / file, re.sub(rf"({owner}/)?{name}", lambda found: repo if found[1] else repo_name, text))
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))


def publish_space(repo: str, push: bool) -> None:
    """List what a push uploads, or push the Space of the release `repo` and compare it with its files."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_space(repo, folder)
        where = f"{constants.ENDPOINT}/spaces/{repo}"
        if not push:
            number = sum(path.is_file() for path in (folder / PACKAGE.name).rglob("*"))
            print(f"and its demo to {where}: {', '.join(FILES)}, {PACKAGE.name}/ ({number} files)")
            return
        commit = upload(folder, repo, f"demo of {repo} {RELEASE}", "space")
        with hub_errors(repo):
            found = make_api().verify_repo_checksums(repo, repo_type="space", revision=commit, local_dir=folder)
        if found.mismatches or found.extra_paths:  # extra: here and not there
            raise RunError(f"{where} does not hold the files that were sent: run it again.")
        print(f"published {where}")
