"""Checkpoints in the authors' format."""

from pathlib import Path

import timm
import torch

from ride_timm.models import CosineClassifier, Ride


def save(path: Path, state_dict, **others) -> Path:
    checkpoint = dict(arch="ResNet32Model", epoch=200, state_dict=state_dict, monitor_best=0.41, **others)
    torch.save(checkpoint, path)
    return path


def authors_state_dict(model: Ride) -> dict[str, torch.Tensor]:
    """Translate a model's weights to the authors' names and layout."""
    many = len(model.experts) > 1
    found = {}
    for key, value in model.trunk.state_dict().items():
        found[f"backbone.{key}"] = value
    for i, expert in enumerate(model.experts):
        for key, value in expert.stages.state_dict().items():
            stage, rest = key.split(".", 1)
            found[f"backbone.{stage}s.{i}.{rest}" if many else f"backbone.{stage}.{rest}"] = value
        head = f"backbone.linears.{i}" if many else "backbone.linear"
        if isinstance(expert.fc, CosineClassifier):
            found[f"{head}.weight"] = expert.fc.weight.detach().t().contiguous()
        else:
            found |= {f"{head}.weight": expert.fc.weight.detach(), f"{head}.bias": expert.fc.bias.detach()}
    if model.router is not None:
        for i, layer in enumerate(model.router.hidden):
            for key, value in layer.state_dict().items():
                found[f"backbone.expert_help_pred_hidden_fcs.{i}.{key}"] = value
        for i, layer in enumerate(model.router.fc):
            name = "expert_help_pred_fc" if model.router.share_expert_help_pred_fc else f"expert_help_pred_fcs.{i}"
            for key, value in layer.state_dict().items():
                found[f"backbone.{name}.{key}"] = value
    return found


def tiny() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return authors_state_dict(timm.create_model("ride_resnet32", num_experts=2, num_classes=4))


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def authors_checkpoint(path, network, marker=None, **kwargs):
    """Write an authors' checkpoint of random weights with a hostile configuration."""
    model = timm.create_model(network, **kwargs)
    theirs = {f"module.{key}": value for key, value in authors_state_dict(model).items()}
    torch.save(dict(arch="DataParallel", epoch=200, state_dict=theirs, config=Evil(marker or path)), path)
    return path
