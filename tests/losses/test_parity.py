"""Values and gradients of the authors' losses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ride_timm.losses import make_loss
from ride_timm.losses.terms import distillation

PARITY = Path(__file__).parents[1] / "parity"
GOLDENS = json.loads((PARITY / "losses.json").read_text())
INPUTS = load_file(PARITY / "loss_inputs.safetensors")
DEFAULTS = {  # of the authors' classes, where they differ from ours
    "ride": {"additional_diversity_factor": -0.2, "reweight_epoch": -1},
    "ldam": {"reweight_epoch": -1},
    "focal": {"gamma": 0.0},
}


def golden_loss(row):
    """The row's value as a function of expert logits [B, E, C], by our names."""
    kwargs, counts = dict(row["kwargs"]), row["cls_num_list"]
    temperature = kwargs.pop("distill_temperature", None)
    if row["name"] == "CrossEntropyLoss":
        loss = make_loss("cb_ce" if kwargs.pop("reweight_CE", False) else "ce", counts, **kwargs)
    else:
        name = next(name for name in DEFAULTS if row["name"].lower().startswith(name))
        kwargs = {"max_margin" if key == "max_m" else key: value for key, value in kwargs.items()}
        loss = make_loss(name, counts, **(DEFAULTS[name] | kwargs))
    loss.set_epoch(row["epoch"] - 1)  # theirs count from 1
    if temperature is None:
        return lambda x: loss(x, INPUTS["target"])
    return lambda x: (
        x.shape[1] * (loss(x, INPUTS["target"]) + distillation(x.mean(1), INPUTS["teacher_logits"], temperature))
    )


@pytest.mark.parametrize("row", GOLDENS, ids=lambda r: f"{r['name']}-{r['kwargs']}-{r['epoch']}")
def test_values_and_gradients_equal_the_authors(row):
    x = INPUTS["expert_logits"].clone().requires_grad_()
    value = golden_loss(row)(x)
    (gradient,) = torch.autograd.grad(value, x)
    for ours, key in [(value, "value"), (gradient.abs().sum(), "grad_abs_sum"), (gradient.norm(), "grad_norm")]:
        torch.testing.assert_close(ours.item(), row[key], rtol=1e-5, atol=0, msg=lambda m, key=key: f"{key}: {m}")
