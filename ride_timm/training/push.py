"""A run that is released on the Hub when it ends, by hub/release.py of a clone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..errors import InputError, RunError
from .recipe import Recipe


class Push:
    """Checks and pushes a run, `--push-to-hub`; without a repository, does nothing.

    repo: [OWNER/]NAME.TAG, or None. hub: the folder hub/ of a clone. Raises `InputError` where that is missing.
    """

    def __init__(self, repo: str | None, hub: Path) -> None:
        self.repo = repo
        if repo is not None:
            if not (hub / "release.py").is_file():
                raise InputError(
                    f"--push-to-hub needs the folder {hub.name}/ beside the script: train in a clone of the project."
                )
            sys.path.insert(0, str(hub))
            import release

            self.release: Any = release

    def check(self, recipe: Recipe) -> None:
        """InputError for what the Hub or the clone would refuse after training."""
        if self.repo is not None:
            self.release.check_push(self.repo, recipe.model)

    def check_classes(self, num_classes: int) -> None:
        """InputError where timm has the tag with another number of classes."""
        if self.repo is not None:
            self.release.check_classes(self.repo, num_classes)

    def run(self, folder: Path) -> None:
        """Stage, verify and push a finished run; for the main process alone."""
        if self.repo is not None:
            self.release.push_run(self.repo, folder)

    def trained(self, folder: Path) -> None:
        """The same after training: what is refused now is no bad input any more, but RunError."""
        try:
            self.run(folder)
        except (InputError, RunError) as error:
            raise RunError(f"{folder} is finished, but not pushed: {error} To push it, pass --resume.") from error
