"""Stages of a timm network as the trunk or an expert of RIDE."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from .cuts import Cut, Skip, keep_trunk, skip, stage_names, stem_names
from .experts import Expert
from .heads import CosineClassifier


class TimmStages(nn.Module):
    """A timm network stripped to some of its stages.

    feature_info: the network's own levels within these stages, modules named from here; `first`: index of the first one
    in the network's feature_info.
    """

    def __init__(self, net: nn.Module, cut: Cut, stages: range) -> None:
        super().__init__()
        self.net = net
        self.cut = cut
        self.output_fmt = "NLC" if cut.tokens else getattr(net, "output_fmt", "NCHW")
        at = [self._stage_of(info["module"]) for info in net.feature_info]
        levels = [i for i, stage in enumerate(at) if stage in stages or (stage < 0 and stages.start == 0)]
        self.first = levels[0] if levels else 0
        self.feature_info = [dict(net.feature_info[i], module=f"net.{net.feature_info[i]['module']}") for i in levels]

    def _stage_of(self, module: str) -> int:
        """Index of the stage that contains a feature level's module.

        -1 for the stem, the last stage for a final norm.
        """
        stages = stage_names(self.net, self.cut)
        for i, names in enumerate(stages):
            if any(f"{module}.".startswith(f"{name}.") for name in names):
                return i
        parts = (part for pattern in self.cut.stem for part in (pattern, f"{pattern}.*"))
        return -1 if any(fnmatch.fnmatchcase(module, part) for part in parts) else len(stages) - 1

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.net.set_grad_checkpointing(enable)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.forward_features(x)

    @torch.jit.ignore
    def forward_levels(
        self, x: Tensor, norm: bool = False, size: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x -> (output, feature maps [B, D, h, w] of all levels in order).

        x: images, or the output of a trunk;
        norm: apply the final norm; size: (h, w) of the trunk's feature maps, which tokens do not carry.
        """
        if not self.feature_info:
            return self(x), []
        indices = list(range(self.first, self.first + len(self.feature_info)))
        if not self.cut.tokens or size is None:
            return self.net.forward_intermediates(x, indices=indices, norm=norm)
        x, levels = self.net.forward_intermediates(x[..., None], indices=indices, norm=norm, output_fmt="NLC")
        return x, [level.transpose(1, 2).unflatten(2, tuple(size)) for level in levels]

    def prune(self, num_levels: int) -> None:
        """Strip a trunk to what its first `num_levels` levels need."""
        self.feature_info = self.feature_info[:num_levels]
        module = self.feature_info[-1]["module"].removeprefix("net.")
        last = self._stage_of(module)
        keep_trunk(self.net, self.cut, last + 1)
        if last < 0:  # the stem's level is taken before its pooling
            parts = stem_names(self.net, self.cut)
            skip(self.net, parts[parts.index(module) + 1 :] if module in parts else [])


@register_notrace_module
class ConvClassifier(nn.Conv2d):
    """A native 1x1 convolution as classifier, also of pooled features [B, D]."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return F.conv2d(x[:, :, None, None], self.weight, self.bias).flatten(1)
        return F.conv2d(x, self.weight, self.bias)


def classifier_name(net: nn.Module) -> str:
    """Name of a native network's classifier."""
    head = net.get_classifier()
    return next(name for name, module in net.named_modules() if module is head)


class TimmExpert(Expert):
    """The last stages of a timm network with its own norm, pooling and classifier.

    The classifier moves to `fc`.
    """

    __jit_unused_properties__ = ("global_pool",)

    def __init__(self, stages: TimmStages, use_norm: bool) -> None:
        nn.Module.__init__(self)
        self.stages = stages
        self.use_norm = use_norm
        self.drop_rate = 0.0
        self._take_classifier()

    def _take_classifier(self) -> None:
        net = self.stages.net
        head = net.get_classifier()
        net.set_submodule(classifier_name(net), Skip().train(net.training))
        self.num_features, self.head_hidden_size = net.num_features, net.head_hidden_size
        if self.use_norm and net.num_classes > 0:
            like = next(head.parameters())
            head = CosineClassifier(net.head_hidden_size, net.num_classes).to(like.device, like.dtype)
        elif isinstance(head, nn.Conv2d):
            conv = ConvClassifier(head.in_channels, head.out_channels, 1, bias=head.bias is not None, device="meta")
            conv.weight, conv.bias = head.weight, head.bias
            head = conv
        self.fc = head.train(net.training)

    @property
    def global_pool(self) -> str | None:
        net = self.stages.net
        for owner in (getattr(net, "head", None), net):
            pool = getattr(owner, "global_pool", getattr(owner, "pool_type", None))
            pool = getattr(pool, "pool_type", pool)
            if isinstance(pool, str):
                return pool
        return None

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (and the pooling) by the network's own method."""
        self.stages.net.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))
        self._take_classifier()

    @torch.jit.ignore
    def prune(self, num_levels: int, prune_norm: bool = False, prune_head: bool = True) -> None:
        stages = self.stages
        pruned = num_levels < len(stages.feature_info)
        stages.feature_info = stages.feature_info[:num_levels]
        last = stages.first + num_levels - 1
        prune_head = prune_head or pruned
        stages.net.prune_intermediate_layers([last], prune_norm=prune_norm, prune_head=prune_head)
        if prune_head:
            self._take_classifier()

    def forward_pre_logits(self, x: Tensor) -> Tensor:
        return self.stages.net.forward_head(x, pre_logits=True)
