"""The class prior that a model's logits suit, from its recipe."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..data.loaders.orders import class_probabilities
from ..errors import InputError
from ..evaluation.test_prior import log_prior_of
from ..losses import make_loss
from ..priors import log_prior
from ..training.recipe import Recipe
from ..training.recipe_keys import LEARNT
from ..training.run_folder import RunFolder
from .load import own_recipe, run_file


def add_prior_flags(parser: argparse.ArgumentParser) -> None:
    """Add --test-prior and --model-prior."""
    parser.add_argument(
        "--test-prior", metavar="PRIOR",
        help="move the logits to this class prior of the test images: uniform, train, a file of one number by class, "
        "or estimate (from the images' logits, without labels)",
    )  # fmt: skip
    parser.add_argument(
        "--model-prior",
        metavar="PRIOR",
        help="class prior that the logits suit: uniform, train, or a file (default: that of the run's loss)",
    )


def check_prior_flags(args: argparse.Namespace, shifted: bool = False) -> None:
    """InputError for a model prior that nothing reads."""
    if args.model_prior is not None and args.test_prior is None and not shifted:
        raise InputError("model-prior is where --test-prior moves the logits from: pass both, or leave it out.")


def stage_one_log_prior(
    recipe: Recipe,
    class_counts: Sequence[int],
    class_weights: Sequence[float] | None = None,
    num_epochs: int | None = None,
) -> Tensor:
    """Log-prior that the mean logits of experts suit after stage one of a recipe, [C].

    class_counts [C], of the images trained on; class_weights [C]: given to the loss, if any; num_epochs: after which
    the weights were kept, by default all of them. Batches drawn by a sampler of class probabilities s under class
    weights w and an offset o added to the logits give logits for a prior proportional to s * w * exp(-o); of RIDE and
    LDAM, by the weights of the last of these epochs, margins and diversity aside.
    """
    recipe = recipe.for_images(sum(class_counts))
    weights = {} if class_weights is None else dict(weights=class_weights)
    loss = make_loss(recipe.loss, class_counts, **recipe.loss_args, **weights)
    epochs = recipe.epochs or 1
    last = (num_epochs or epochs) - 1
    loss.set_epoch(last)
    drawn = class_probabilities(class_counts, recipe.sampler, last, epochs)
    return (torch.from_numpy(drawn).log().float() - loss.removed_log_prior()).log_softmax(0)


def rebalanced_log_prior(recipe: Recipe, class_counts: Sequence[int], before: Tensor) -> Tensor:
    """Log-prior after a recipe's `decouple`, [C], from the one before; learnt and tau-normalised heads are balanced."""
    if recipe.decouple in (*LEARNT, "tau_norm"):
        return torch.full_like(before, 1 / len(before)).log()
    if recipe.decouple == "logit_adjustment":
        return (before - recipe.decouple_tau * log_prior(class_counts)).log_softmax(0)
    return before


def run_log_prior(spec: str, class_counts: Sequence[int] | None = None) -> Tensor | None:
    """Log-prior that the logits of a run or release suit, [C]; None if it is unknown.

    class_counts [C], where it states none. A run that did not train its experts, but their heads or a router, has the
    experts of its source.
    """
    recipe, results = own_recipe(spec), run_results(spec)
    counts = results.get("train_counts") or results.get("class_counts") or class_counts
    if recipe is None or counts is None:
        return None
    stages, source = results.get("stages", {}), results.get("source")
    if source is not None and "experts" not in stages:
        before = run_log_prior(source, counts)
        if before is None or "heads" not in stages:  # a router leaves the logits as they are
            return before
    else:
        trained = stages.get("experts", {})
        before = stage_one_log_prior(recipe, counts, results.get("class_weights"), trained.get("epochs"))
    return rebalanced_log_prior(recipe, counts, before)


def model_log_prior(
    given: str | None, spec: str, class_counts: Sequence[int] | None, class_names: Sequence[str]
) -> Tensor:
    """Log-prior that a SPEC's logits suit, [C]: the one given, the run's, else a uniform one, with a notice."""
    if given is not None:
        prior = log_prior_of(given, class_counts, class_names)
        for name, value in zip(class_names, prior.tolist(), strict=True):
            if value == -math.inf:
                raise InputError(f"model-prior={given}: class {name!r} has 0, and no logits suit that.")
        return prior
    if (known := run_log_prior(spec, class_counts)) is not None:
        return known
    print(
        f"notice: how the experts of {spec} were trained is not known here; their logits are taken to suit a uniform "
        "prior (see --model-prior)",
        file=sys.stderr,
    )
    return log_prior_of("uniform", None, class_names)


def run_results(spec: str) -> dict[str, Any]:
    """results.json of a run or release, with its `class_counts`; empty for any other SPEC."""
    path = run_file(spec, "results.json")
    return RunFolder(path.parent).results() if path else {}
