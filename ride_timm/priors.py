"""Class weights, margins, temperatures, priors and shot groups of class counts."""

from collections.abc import Sequence

import torch
from timm.loss import compute_class_weights
from torch import Tensor

from .errors import InputError


def _counts(class_counts: Sequence[int] | Tensor, least: int = 1) -> Tensor:
    """Checked class counts, float64 [C] on the CPU, so that float32 rounds once."""
    try:
        counts = torch.as_tensor(class_counts, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"class counts must be a sequence of integers, got {class_counts!r}") from error
    if counts.ndim != 1 or not len(counts):
        raise InputError(f"class counts must be one number per class, got shape {tuple(counts.shape)}")
    bad = (~counts.isfinite() | (counts != counts.trunc()) | (counts < least)).nonzero().flatten().tolist()
    if bad:
        raise InputError(
            f"class {bad[0]} has {counts[bad[0]].item():g} images, expected an integer of at least {least} "
            f"({len(bad)} such classes); drop the empty classes or renumber the labels"
        )
    return counts


def effective_number_weights(class_counts: Sequence[int] | Tensor, beta: float = 0.9999) -> Tensor:
    """Class weights by the effective number of images, with sum C.

    class_counts [C] -> weights [C], float32, proportional to (1 - beta) / (1 - beta^n_c). InputError for an empty class
    or a beta outside (0, 1). Cui et al. 2019, arXiv:1901.05555, section 4; the weights of RIDE's deferred re-weighting.
    """
    counts = _counts(class_counts)
    if not 0 < beta < 1:
        raise InputError(f"beta must lie between 0 and 1, got {beta}")
    return compute_class_weights(counts, int(counts.sum()), method="effective_num", beta=beta)[1]


def inverse_root_weights(class_counts: Sequence[int] | Tensor) -> Tensor:
    """Class weights by the inverse square root of the number of images, with mean 1.

    class_counts [C] -> weights [C], float32, proportional to n_c^(-1/2), half-way between equal and inverse-frequency
    weights. InputError for an empty class. After Mahajan et al. 2018, arXiv:1805.00932; Cui et al. 2019,
    arXiv:1901.05555, section 1.
    """
    weights = _counts(class_counts) ** -0.5
    return (weights / weights.mean()).float()


def ldam_margins(class_counts: Sequence[int] | Tensor, max_margin: float = 0.5) -> Tensor:
    """Label-distribution-aware margins n_c^(-1/4), at most `max_margin`.

    class_counts [C] -> margins [C], float32, `max_margin` at the rarest class, in units of a cosine (the loss scales
    them by s). InputError for an empty class. Cao et al. 2019, arXiv:1906.07413, section 3.
    """
    margins = _counts(class_counts) ** -0.25
    return (margins * (max_margin / margins.max())).float()


def class_temperature(class_counts: Sequence[int] | Tensor, base: float = 1.0, reweight_factor: float = 0.05) -> Tensor:
    """Class-wise temperatures of the diversity term, lower for rarer classes.

    class_counts [C] -> temperatures [C], float32: base * t_c, with t_c = (C n_c / N * r + 1 - r) / max over classes.
    InputError for an empty class or a factor that leaves no positive temperature. RIDE, arXiv:2010.01809, section 3.
    """
    counts = _counts(class_counts)
    temperature = len(counts) * counts / counts.sum() * reweight_factor + 1 - reweight_factor
    if not base > 0 or not temperature.min() > 0:
        raise InputError(
            f"temperatures must be positive: base {base} must be above 0, reweight_factor {reweight_factor} below 1"
        )
    return (base * temperature / temperature.max()).float()


def log_prior(class_counts: Sequence[int] | Tensor) -> Tensor:
    """Log-prior of each class, log(n_c / N).

    class_counts [C] -> [C], float32, in nats. InputError for an empty class. Added to logits in training or subtracted
    at test time: Menon et al. 2021, arXiv:2007.07314, sections 4 and 5.
    """
    counts = _counts(class_counts)
    return (counts / counts.sum()).log().float()


def inverse_log_prior(class_counts: Sequence[int] | Tensor) -> Tensor:
    """Log-priors in reverse order.

    class_counts [C] -> [C], float32, in nats: the k-th most frequent class has the log-prior of the k-th rarest. Of
    classes with equal counts the first is the rarer one.
    InputError for an empty class. Zhang et al. 2022, arXiv:2107.09249, section 4.1.
    """
    prior = log_prior(class_counts)
    order = prior.argsort(stable=True)  # rarest first
    inverse = torch.empty_like(prior)
    inverse[order] = prior[order].flip(0)
    return inverse


def shot_groups(class_counts: Sequence[int] | Tensor, many: int = 100, few: int = 20) -> dict[str, Tensor]:
    """Masks of many-shot (> `many`), few-shot (< `few`) and medium-shot classes.

    class_counts [C], zeros allowed -> {"many", "medium", "few"}: bool [C], each class in exactly one. InputError if
    `few` exceeds `many` + 1, so that groups overlap. Liu et al. 2019, arXiv:1904.05160, section 4.
    """
    counts = _counts(class_counts, least=0)
    if few > many + 1:
        raise InputError(f"few ({few}) must not exceed many + 1 ({many + 1})")
    groups = {"many": counts > many, "few": counts < few}
    return {"many": groups["many"], "medium": ~(groups["many"] | groups["few"]), "few": groups["few"]}
