"""The run folder: resumable state, plain weights that timm loads, results and plots."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .. import __version__
from ..errors import InputError, first_line
from ..evaluation.tables import STAGE_NAMES, metrics_table
from ..files import write_atomically, write_csv, write_text
from ..hardware import device_name
from ..models import Ride
from ..models.release import WEIGHTS, save_config
from ..models.weights_file import check_weights, write_weights
from .recipe import Recipe, load_recipe
from .state import TrainingState

_ROUTER_KEYS = ("pos_weight", "top_choices_num", "share_expert_help_pred_fc", "threshold")
_STATE, _PREVIOUS, _LOCK, _OWNER = "state.pt", "state.previous.pt", ".lock", ".owner"
_FIRST_FILES = {_LOCK, _OWNER, _STATE, _PREVIOUS, f".{_STATE}.partial", "..owner.partial", ".recipe.yaml.partial"}


class RunFolder:
    """The folder of one run.

    recipe.yaml (as run), state.pt (see `TrainingState`) and while the run lasts the one before it, metrics.csv (one
    row per epoch), results.json, and model.safetensors with config.json, which `timm.create_model("local-dir:DIR")`
    loads.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._claimed_occupied = False
        self._damage: str | None = None

    @property
    def occupied(self) -> bool:
        """A run has begun here."""
        return (self.path / "recipe.yaml").is_file()

    def recipe(self) -> Recipe:
        """The recipe as it was run."""
        return load_recipe(self.path / "recipe.yaml")

    def state(self) -> TrainingState | None:
        """The last undamaged state, to resume from, or None where a run has written none.

        Raises `InputError` where neither the last state nor the one before it can be read.
        """
        last, previous = self.path / _STATE, self.path / _PREVIOUS
        self._damage, problems = None, []
        for path in (last, previous):
            if not path.is_file():
                continue
            try:
                state = TrainingState.read(path)
            except InputError:  # of another version
                raise
            except Exception as error:  # of any type, from a damaged pickle
                problems.append(f"{path} is not a readable state ({first_line(error)})")
                continue
            if path == previous:
                self._damage = problems[0] if problems else f"{last} is missing"
            return state
        if problems:
            raise InputError(f"{problems[0]}, and there is no state before it: choose another --output.")
        return None

    def notice(self, state: TrainingState | None, resume: bool) -> str | None:
        """One line where the run does not simply resume from the last state; state: that of `claim`."""
        if state is not None and self._damage is not None:
            return f"notice: {self._damage}; the run resumes from the state before it."
        if resume and not (state and state.begun):
            return f"notice: no epoch is finished in {self.path}; the run starts from the beginning."
        return None

    def _only_begun(self) -> bool:
        """The folder holds only the files that a run writes before its first step, and no recipe."""
        if {path.name for path in self.path.iterdir()} - _FIRST_FILES:
            return False
        state = self.state()
        return state is None or not state.begun

    def claim(self, recipe: Recipe, stage: str, resume: bool, router_in_place: bool) -> TrainingState | None:
        """Check that a run may use this folder, without writing; returns the state to resume from, if any.

        stage: "both", "experts" or "router"; router_in_place: the router is trained on this folder's experts.
        A run of which no epoch is finished may be begun anew. Raises `InputError` where the folder holds other files,
        another run, or one of another recipe, and where another process trains there.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"output {self.path} is a file: name a folder.")
        if (self.path / _LOCK).is_file() and (lock := self._acquire()):  # before data are loaded
            lock.release()
        self._claimed_occupied = self.occupied
        if not self.occupied:
            self._check_new(router_in_place)
            return None
        state = self.state()
        if state is None and (self.path / WEIGHTS).exists():
            raise InputError(
                f"{self.path} holds a run without its state.pt, so there is nothing to resume from: choose another "
                "--output, or delete the folder to begin again."
            )
        begun = state is not None and state.begun
        if not (begun or resume or router_in_place):
            return None  # no epoch is finished: nothing is lost if another recipe begins here
        finished = state is not None and recipe.ensemble_stage in state.results
        at_router = state is not None and state.stage == "router" and state.epoch == 0
        if not (resume or (router_in_place and finished and at_router)):
            raise InputError(
                f"output {self.path} already holds a run: continue it with --resume, or choose another --output."
            )
        self.check_recipe(recipe, but_router=not resume)
        if state is not None and state.stage in ("router", "done") and not finished and stage != "router":
            raise InputError(f"{self.path} holds a router on other experts: resume it with --stage router --resume.")
        if router_in_place and not finished and (state is None or state.stage != "router"):
            raise InputError(f"stage one in {self.path} is not finished: resume it with --resume --stage both.")
        return state

    def _check_new(self, router_in_place: bool) -> None:
        """InputError for a folder that holds no run, where one is needed, or other files."""
        if router_in_place:
            raise InputError(f"no stage one to start from: {self.path} holds no run; pass --from RUN, or train it.")
        if self.path.is_dir() and not self._only_begun():
            raise InputError(f"output {self.path} is not empty and holds no run: choose another --output.")

    def check_recipe(self, recipe: Recipe, but_router: bool = False) -> None:
        """InputError where a recipe disagrees with the one run here, its router keys aside if `but_router`."""
        theirs = self.recipe()
        keys = recipe.differing(theirs)
        if but_router:
            keys = [key for key in keys if not key.startswith("router_") and key not in _ROUTER_KEYS]
        if keys:
            differences = ", ".join(f"{key} ({getattr(theirs, key)!r} there)" for key in keys)
            raise InputError(
                f"the recipe disagrees with the run in {self.path}: {differences}. Leave --recipe and these keys out "
                "to resume the run as it began, or choose another --output."
            )

    def has_finished(self, recipe: Recipe, stage: str) -> bool:
        """The results of a stage are here; InputError where they are of another recipe, or the weights are damaged."""
        if not (self.path / "results.json").is_file() or not self.occupied:
            return False
        self.check_recipe(recipe)
        state = self.state()  # written after the results, so a kill between them is resumed
        finished = stage in self.results()["stages"] and (state is None or stage in state.results)
        if finished:
            check_weights(self.path / WEIGHTS)
        return finished

    def lock(self) -> None:
        """Keep other runs out of the folder until this process ends, however it ends; creates the folder.

        Raises `InputError` where another process trains here, naming it. A file system without locks is a notice.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output {self.path} cannot be created ({error.strerror}).") from error
        self._lock = self._acquire()
        if self._lock is None:
            print(f"notice: {self.path} is on a file system without locks; start no second run there.", file=sys.stderr)
        if self.occupied != self._claimed_occupied:
            raise InputError(f"output {self.path}: another run has begun here; choose another --output.")
        write_text(self.path / _OWNER, f"process {os.getpid()} on {platform.node()}")

    def _acquire(self) -> FileLock | None:
        """The lock of the folder, held; None where the file system has no locks."""
        lock, owner = FileLock(self.path / _LOCK), self.path / _OWNER
        try:
            with warnings.catch_warnings():
                # it would fall back to a file that stays when its process is killed
                warnings.filterwarnings("error", "flock not supported")
                lock.acquire(timeout=1)  # processes of one run look at the same moment
        except Timeout as error:
            name = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
            raise InputError(f"output {self.path}: {name} is training here; choose another --output.") from error
        except OSError as error:
            raise InputError(
                f"output {self.path} cannot be locked ({error.strerror}): choose another --output."
            ) from error
        except (UserWarning, NotImplementedError):  # of filelock from 3.21 on, and before
            return None
        return lock

    def open(self, recipe: Recipe, state: TrainingState, resume: bool) -> None:
        """Lock the folder, which `claim` has checked, and begin the run, or say what it resumes from."""
        self.lock()
        if notice := self.notice(state, resume):
            print(notice, file=sys.stderr)
        if not (resume and self._claimed_occupied):
            self.begin(recipe, state)

    def begin(self, recipe: Recipe, state: TrainingState) -> None:
        """Write the state, then the recipe, so that where a recipe is there is a state to resume from."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.save(state)
        write_text(self.path / "recipe.yaml", recipe.to_yaml())

    def save(self, state: TrainingState) -> None:
        """Write state.pt and metrics.csv; the last state stays next to the new one, unless it is known as damaged."""
        write_atomically(self.path / _STATE, state.write, keep=None if self._damage else self.path / _PREVIOUS)
        self._damage = None
        if state.history:
            columns = list(state.history[0])
            rows = ([epoch.get(column) for column in columns] for epoch in state.history)
            write_csv(self.path / "metrics.csv", columns, rows)

    def conclude(self) -> None:
        """Delete the state before the last, which a finished run does not need; with a stage in progress, nothing."""
        if not (self.path / _PREVIOUS).is_file():
            return
        state = self.state()
        if state is not None and state.epoch == 0 and self._damage is None:
            (self.path / _PREVIOUS).unlink(missing_ok=True)

    def write_results(self, recipe: Recipe, device: torch.device, stages: dict[str, Any], **facts: Any) -> None:
        """Write results.json: metrics by stage with all that they depend on; `facts` are further keys."""
        results = dict(recipe=recipe.name, seed=recipe.seed, **provenance(), device=device_name(device))
        results |= dict(precision=recipe.mixed_precision, **facts, stages=stages)
        write_text(self.path / "results.json", json.dumps(results, indent=2) + "\n")

    def results(self) -> dict[str, Any]:
        """The content of results.json; InputError where it is missing or damaged."""
        path = self.path / "results.json"
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} is missing or damaged ({first_line(error)}).") from error
        stages = results.get("stages") if isinstance(results, dict) else None
        metrics = stages.values() if isinstance(stages, dict) else [None]
        if not all(isinstance(values, dict) for values in metrics):
            raise InputError(f"{path} is damaged: it has no results of stages.")
        return results

    def table(self) -> str:
        """The results of the stages as a plain-text table."""
        return metrics_table({STAGE_NAMES[stage]: metrics for stage, metrics in self.results()["stages"].items()})

    def export(self, model: Ride, data_config: dict[str, Any], class_names: tuple[str, ...]) -> None:
        """Plain weights and timm's config.json; data_config: input_size, mean, std, crop_pct of the test transform."""
        tensors = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        config = dict(model_config=dict(label_names=list(class_names)), data_config=data_config)
        write_atomically(self.path / WEIGHTS, lambda p: write_weights(tensors, p))
        write_atomically(self.path / "config.json", lambda p: save_config(model, p, **config))


def provenance() -> dict[str, Any]:
    """Commit of the checkout that runs, "+dirty" with uncommitted changes, None outside one; and versions."""
    packages = ("torch", "timm", "accelerate", "datasets", "numpy")
    # not `version("ride-timm")`: a clone runs without being installed
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {"commit": _commit(), "versions": versions | {"ride-timm": __version__}}


def _commit() -> str | None:
    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", __file__) is None:  # installed inside somebody else's checkout
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}+dirty" if commit and git("status", "--porcelain", "--untracked-files=no") else commit
