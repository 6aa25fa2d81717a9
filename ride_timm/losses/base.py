"""The bases of all losses, and their registry."""

from collections.abc import Callable, Sequence
from dataclasses import Field, InitVar, dataclass, fields
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from .. import priors
from ..errors import InputError
from ..keys import coerce, key
from .terms import cross_entropy, widen

ClassCounts: TypeAlias = Sequence[int] | Tensor


@dataclass(eq=False, repr=False)
class ExpertsLoss(nn.Module):
    """A loss of all experts' logits: expert_logits [B, E, C], targets [B] -> scalar.

    A subclass is a dataclass: its fields are its arguments, and those made by `key` are recipe keys, too, checked
    against their range. Buffers stay out of `state_dict`, since the recipe restores them. class_counts [C]: training
    images of each class. InputError for a value out of range, or logits of another number of classes.
    """

    class_counts: InitVar[ClassCounts | None] = None

    num_views: ClassVar[int] = 1  # of each image in a batch

    def __init_subclass__(cls) -> None:
        dataclass(eq=False, repr=False, kw_only=True)(cls)

    def __post_init__(self, class_counts: Any) -> None:
        super().__init__()
        for item in fields(self):
            if item.metadata:
                setattr(self, item.name, coerce(item, getattr(self, item.name)))
        self.num_classes = None if class_counts is None else len(class_counts)
        self.offsets: Tensor | None  # [E, C], added to the logits where experts are trained for different priors
        self._keep("offsets", None)

    @classmethod
    def arguments(cls, recipe: Any) -> dict[str, Any]:
        """Arguments, from the recipe keys of their names.

        InputError for recipe keys that the loss does not support.
        """
        names = [item.name for item in fields(cls)]
        if recipe.label_smoothing and "label_smoothing" not in names:
            raise InputError(f"label_smoothing={recipe.label_smoothing:g}: loss {recipe.loss!r} does not support it.")
        return {name: getattr(recipe, name) for name in names if hasattr(recipe, name)}

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0."""

    def removed_log_prior(self) -> Tensor | float:
        """Log-prior that the loss removes from the logits' mean, [C]: that of the batches minus it is what they suit.

        Of the current epoch's loss, which `set_epoch` sets; margins and diversity are left out.
        """
        return 0.0 if self.offsets is None else self.offsets.mean(0)

    def forward(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of one batch."""
        if expert_logits.ndim != 3 or self.num_classes not in (None, expert_logits.shape[-1]):
            raise InputError(
                f"expected expert logits [B, E, {self.num_classes or 'C'}], got shape {tuple(expert_logits.shape)}"
            )
        return self.compute(widen(expert_logits), targets)

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of checked float32 (or wider) logits."""
        raise NotImplementedError

    def _keep(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)


class WeightedLoss(ExpertsLoss):
    """A loss with class weights, if given: one number above 0 for each class; their scale cancels in batch means."""

    weights: Sequence[float] | None = None

    def __post_init__(self, class_counts: Any) -> None:
        super().__post_init__(class_counts)
        self.class_weights: Tensor | None
        self._keep("class_weights", None if self.weights is None else torch.tensor(self.weights))

    def removed_log_prior(self) -> Tensor | float:
        return super().removed_log_prior() - (0.0 if self.class_weights is None else self.class_weights.log())


class SmoothedLoss(WeightedLoss):
    """A loss of plain cross entropy, with label smoothing.

    Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """

    label_smoothing: float = key(0.0, "label smoothing", low=0, high=0.9)


class ClassBalancedLoss(WeightedLoss):
    """A loss with class weights by effective numbers, if `class_balanced`.

    Cui et al. 2019, arXiv:1901.05555, section 4.
    """

    class_balanced: bool = False

    def __post_init__(self, class_counts: Any) -> None:
        super().__post_init__(class_counts)
        if self.class_balanced:
            self.class_weights = priors.effective_number_weights(class_counts)


class PerExpertPriorLoss(SmoothedLoss):
    """Cross entropy of each expert's logits plus its own offsets, summed.

    Adding tau * log(prior) in training gives bare logits for a test prior of prior^(1 - tau): the training prior for
    tau 0, a balanced one for 1, an inverted one for 2. InputError for a model with another number of experts.
    """

    def __post_init__(self, class_counts: Any) -> None:
        super().__post_init__(class_counts)
        self.offsets: Tensor
        self._keep("offsets", self.make_offsets(class_counts))

    def make_offsets(self, class_counts: Any) -> Tensor:
        """Offsets of each expert's logits, [E, C]."""
        raise NotImplementedError

    def adjusted(self, expert_logits: Tensor) -> Tensor:
        """Logits plus each expert's offsets, [B, E, C]."""
        num_experts = len(self.offsets)
        if expert_logits.shape[1] != num_experts:
            raise InputError(f"this loss trains {num_experts} experts, the model has {expert_logits.shape[1]}")
        return expert_logits + self.offsets

    def compute(self, expert_logits: Tensor, targets: Tensor) -> Tensor:
        adjusted = self.adjusted(expert_logits)
        return cross_entropy(adjusted, targets, self.class_weights, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class RegisteredLoss:
    """A loss by its name in a recipe.

    citation: how a paper or a table calls it. summary: what it does, to follow "the loss". paper: arXiv identifier.
    fixed: arguments that the name stands for.
    """

    loss: type[ExpertsLoss]
    citation: str
    summary: str
    paper: str | None
    fixed: dict[str, Any]

    @property
    def keys(self) -> list[Field]:
        """Its recipe keys."""
        return [item for item in fields(self.loss) if item.metadata and item.name not in self.fixed]

    @property
    def takes_weights(self) -> bool:
        """True for a loss that class weights can be given to, since it has none of its own."""
        return issubclass(self.loss, WeightedLoss) and not self.fixed.get("class_balanced")

    def arguments(self, recipe: Any) -> dict[str, Any]:
        """Arguments for `make_loss`, `weights` aside; InputError for unsupported recipe keys."""
        if recipe.class_weights is not None and not self.takes_weights:
            others = ", ".join(name for name, entry in LOSSES.items() if entry.takes_weights)
            raise InputError(
                f"class_weights={recipe.class_weights}: loss {recipe.loss!r} takes none; those that do are {others}."
            )
        return {name: value for name, value in self.loss.arguments(recipe).items() if name not in self.fixed}


LOSSES: dict[str, RegisteredLoss] = {}
_Loss = TypeVar("_Loss", bound=type[ExpertsLoss])


def register_loss(
    name: str, *, citation: str, summary: str, paper: str | None = None, **fixed: Any
) -> Callable[[_Loss], _Loss]:
    """Class decorator: register a loss, with the fields of `RegisteredLoss`."""

    def register(loss: _Loss) -> _Loss:
        LOSSES[name] = RegisteredLoss(loss, citation, summary, paper, fixed)
        return loss

    return register


def loss_keys() -> dict[str, tuple[Field, list[str]]]:
    """Recipe keys of all losses: {name of the key: (field, names of the losses)}."""
    found: dict[str, tuple[Field, list[str]]] = {}
    for name, entry in LOSSES.items():
        for item in entry.keys:
            found.setdefault(item.name, (item, []))[1].append(name)
    return found


def make_loss(name: str, class_counts: ClassCounts | None = None, **arguments: Any) -> ExpertsLoss:
    """Build a loss by its name in a recipe.

    class_counts [C]: training images of each class. InputError for an unknown name, a value out of range, or a loss of
    the prior without class counts.
    """
    if name not in LOSSES:
        raise InputError(f"unknown loss {name!r}, expected one of: {', '.join(LOSSES)}")
    entry = LOSSES[name]
    return entry.loss(class_counts, **entry.fixed, **arguments)
