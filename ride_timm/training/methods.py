"""What a recipe's method needs of its keys: a loss' arguments, and which keys go together."""

from __future__ import annotations

from typing import Any

from ..errors import InputError
from ..losses import arguments_of, check_taus

Recipe = Any  # `recipe.Recipe`, whose file imports this one

DECOUPLINGS = ("none", "crt", "lws", "tau_norm", "logit_adjustment")


def spread_taus(recipe: Recipe) -> tuple[float, ...]:
    """The experts' strengths of logit adjustment: as given, else evenly around 1, as far as in BalPoE or MDCS."""
    last, reach = recipe.num_experts - 1, 1.5 if recipe.loss == "mdcs" else 1.0
    return recipe.taus or tuple(1 + reach * (2 * i / last - 1) if last else 1.0 for i in range(recipe.num_experts))


def loss_args(recipe: Recipe) -> dict[str, Any]:
    """Arguments of the recipe's loss for `losses.make_loss`."""
    values = dict(
        additional_diversity_factor=recipe.additional_diversity_factor,
        base_diversity_temperature=recipe.base_diversity_temperature,
        reweight_factor=recipe.reweight_factor,
        reweight_epoch=recipe.reweight_epoch if recipe.reweight else -1,
        max_m=recipe.max_margin,
        gamma=recipe.gamma,
        tau=recipe.tau,
        inverse_tau=recipe.inverse_tau,
        taus=spread_taus(recipe),
        consistency=recipe.consistency,
        label_smoothing=recipe.label_smoothing,
    )
    return {name: values[name] for name in arguments_of(recipe.loss) if name in values}


def check(recipe: Recipe) -> None:
    """InputError for keys of a method that do not go together."""
    if recipe.teacher_mode == "train" and not recipe.distillation:
        raise InputError("teacher_mode=train needs distillation: pass --distillation and --teacher.")
    accepted = arguments_of(recipe.loss)
    if recipe.label_smoothing and "label_smoothing" not in accepted:
        raise InputError(f"label_smoothing={recipe.label_smoothing:g}: loss {recipe.loss!r} has no smoothed labels.")
    if recipe.loss == "mdcs" and recipe.auto_augment is None:
        raise InputError("loss=mdcs learns from a weak and a strong view: set auto_augment, say rand-m9-mstd0.5.")
    if recipe.loss == "mdcs" and (recipe.mixup_alpha or recipe.cutmix_alpha):
        raise InputError("loss=mdcs compares two views of an image: it does not go with mixup_alpha or cutmix_alpha.")
    if recipe.loss == "sade" and recipe.num_experts != 3:
        raise InputError(f"num_experts={recipe.num_experts}: SADE's losses are those of 3 experts.")
    if "taus" in accepted:
        taus = spread_taus(recipe)
        if len(taus) != recipe.num_experts:
            raise InputError(f"taus: {len(taus)} of them for {recipe.num_experts} experts; give one for each, or none.")
        check_taus(taus)
