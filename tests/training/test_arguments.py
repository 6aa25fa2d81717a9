"""Flags of the recipe keys."""

import argparse
from dataclasses import fields

from forked import run_python

from ride_timm.training.arguments import add_flags, flags_given, keys_of
from ride_timm.training.recipe import Recipe
from ride_timm.training.recipe_keys import GROUPS


def test_every_key_has_a_flag():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    known = {action.dest for action in parser._actions}
    assert {item.name for item in fields(Recipe)} <= known
    args = parser.parse_args(["--decay-epochs", "3", "4", "--no-use-norm", "--lr", "5e-2", "--clip-grad", "none"])
    recipe = Recipe().override(flags_given(args))
    assert recipe.decay_epochs == (3, 4) and recipe.use_norm is False and recipe.lr == 0.05 and recipe.clip_grad is None
    assert flags_given(parser.parse_args([])) == {}


def test_help_shows_types_choices_and_the_losses_of_a_key():
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=200))
    add_flags(parser)
    text = parser.format_help()
    for line in (
        "--batch-size N ", "--lr X ", "--model TEXT ", "--taus [X ...]", "--decay-epochs [N ...]", "--input-size N ",
        "--imb-type {exp,step,none}", "--use-norm, --no-use-norm", "focal, cb_focal: focusing exponent",
    ):  # fmt: skip
        assert line in text, line
    assert all(f"\n{group}:\n  " in text for group in GROUPS)


def test_groups_hold_every_key_once():
    names = [name for group in GROUPS for name in keys_of(group)]
    assert names == [item.name for item in fields(Recipe)]


NEW_LOSS = """
import argparse
from ride_timm.keys import key
from ride_timm.losses import ExpertsLoss, make_loss, register_loss

@register_loss("mine", citation="mine", summary="does nothing")
class MyLoss(ExpertsLoss):
    strength: float = key(2.0, "strength", low=0)

    def compute(self, expert_logits, targets):
        return self.strength * expert_logits.sum()

from ride_timm.training.arguments import add_flags, flags_given
from ride_timm.training.recipe import Recipe

parser = argparse.ArgumentParser()
add_flags(parser)
recipe = Recipe().override(flags_given(parser.parse_args(["--loss", "mine", "--strength", "3"])))
print(make_loss(recipe.loss, [5, 3], **recipe.loss_args).strength, "strength: 3.0" in recipe.to_yaml())
"""


def test_new_loss_needs_only_its_own_file():
    ran = run_python("-c", NEW_LOSS)
    assert ran.stdout == "3.0 True\n", ran.stderr
