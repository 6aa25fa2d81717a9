"""Priors of the test set: known, or estimated from its logits.

Logits that suit one class prior suit another after adding the difference of the log-priors: Bayes' rule, with the class
likelihoods unchanged. Saerens et al. 2002, "Adjusting the outputs of a classifier to new a priori probabilities",
section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..files import read_class_values


def log_prior_of(text: str, class_counts: Sequence[int] | None, class_names: Sequence[str]) -> Tensor:
    """The log-prior that a flag names, float32 [C]: "uniform", "train", or a file of numbers by class.

    class_counts [C]: training images of each class, None if unknown. The file holds counts or probabilities, see
    `files.read_class_values`; a class of 0 has a log-prior of minus infinity and is never predicted. InputError for
    unknown counts, a file that cannot be used, or zeros alone.
    """
    if text == "uniform":
        values = torch.ones(len(class_names), dtype=torch.float64)
    elif text == "train":
        if class_counts is None:
            raise InputError("the prior of the training set is unknown: the model's folder has no class counts.")
        values = torch.tensor(class_counts, dtype=torch.float64)
    else:
        values = torch.tensor(read_class_values(text, class_names), dtype=torch.float64)
    if not values.sum() > 0:
        raise InputError(f"{text}: expected a class with a probability above 0.")
    return (values / values.sum()).log().float()


def estimate_log_prior(
    logits: Tensor,
    log_model_prior: Tensor,
    shrinkage: float = 0.5,
    max_iterations: int = 1000,
    tolerance: float = 1e-6,
) -> Tensor:
    """The log-prior of a test set by expectation maximisation, without labels, [C].

    logits [N, C] of the test images; log_model_prior [C], which they suit. Each iteration re-weighs the posteriors by
    the estimate over the model's prior, takes their mean, and shrinks it towards the uniform prior, until no more than
    `tolerance` of probability moves. shrinkage 0 is the maximum of the likelihood, which empties classes that the
    network tends to miss; 0.5 has the weight of as many images again, equally many of each class. Saerens et al. 2002,
    equation 2.9; shrinkage: Ye et al. 2024, "Label shift estimation for class-imbalance problem" (MAPLS).
    """
    posteriors = logits.softmax(1)
    model_prior = log_model_prior.to(logits).softmax(0)
    prior = model_prior
    for _ in range(max_iterations):
        ratio = torch.where(model_prior > 0, prior / model_prior, 0.0)
        evidence = (posteriors @ ratio).clamp_min(torch.finfo(logits.dtype).tiny)  # [N]
        mean = ratio * (posteriors.T @ evidence.reciprocal())
        updated = (1 - shrinkage) * mean / mean.sum() + shrinkage / len(mean)
        moved = (updated - prior).abs().sum() / 2
        prior = updated
        if moved <= tolerance:
            break
    return prior.log()
