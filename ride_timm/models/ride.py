"""RIDE: a shared trunk, experts, and an optional router. arXiv:2010.01809"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn

from .experts import Expert, Experts, Stages
from .heads import ClassAffine
from .router import Router


class Ride(nn.Module):
    """A trunk and E experts whose logits are averaged, with an optional router.

    One expert is a list of length one: the plain network. The router (stage two) runs the next expert only on samples
    that need it; `routed=True` makes `forward` use it in eval mode. arXiv:2010.01809, section 3.
    """

    __constants__ = ("routed",)
    # of types unknown to TorchScript
    __jit_unused_properties__: tuple[str, ...] = ("drop_rate", "has_class_affine", "global_pool")

    def __init__(
        self,
        trunk: nn.Module,
        experts: Sequence[Expert],
        num_classes: int,
        in_chans: int = 3,
        router: Router | None = None,
        routed: bool = False,
    ) -> None:
        super().__init__()
        if routed and router is None:
            raise ValueError("routed=True needs a router: create the model with router=True as well.")
        self.trunk = trunk
        self.experts = Experts(experts)
        self.router = router
        self.routed = routed
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_experts = len(experts)
        self.output_fmt = getattr(experts[0].stages, "output_fmt", "NCHW")
        self.channel_axis = 1 if self.output_fmt == "NCHW" else -1
        self._set_feature_sizes()

    def _set_feature_sizes(self) -> None:
        widths = [
            dict(info, num_chs=info["num_chs"] * self.num_experts, module=f"experts.0.stages.{info['module']}")
            for info in self.experts[0].stages.feature_info
        ]
        self.feature_info = [dict(i, module=f"trunk.{i['module']}") for i in self.trunk.feature_info] + widths
        self.num_features = self.num_experts * self.experts[0].num_features
        self.head_hidden_size = self.num_experts * self.experts[0].head_hidden_size

    @property
    def drop_rate(self) -> float:
        return self.experts[0].drop_rate

    @property
    def has_class_affine(self) -> bool:
        return isinstance(self.experts[0].fc, ClassAffine)

    @property
    def global_pool(self) -> SelectAdaptivePool2d | str:
        return self.experts[0].global_pool

    @torch.jit.ignore
    def add_router(self, router: Router) -> None:
        """Attach a router for stage two, on the device and in the dtype of the model."""
        self.router = router.to(**get_device_dtype(self))
        choices = dict(top_choices_num=router.top_choices_num)
        update_model_args(self, router=True, share_expert_help_pred_fc=router.share_expert_help_pred_fc, **choices)

    @torch.jit.ignore
    def add_class_affine(self) -> None:
        """Add a scale and an offset per class to the classifiers, unless they have them.

        Initially they do not change the logits.
        """
        if self.num_classes > 0 and not self.has_class_affine:
            for expert in self.experts:
                expert.fc = ClassAffine(expert.fc, self.num_classes).train(expert.training)
            update_model_args(self, class_affine=True)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^trunk\.(?!layer)",
            blocks=[
                (r"^(?:trunk|experts\.\d+\.stages)\.layer(\d+)" + ("" if coarse else r"\.(\d+)"), None),
                (r"^(?:experts\.\d+\.fc|router)", (99999,)),
            ],
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return set()

    @torch.jit.ignore
    def frozen_names(self) -> set[str]:
        """Names of the tensors that no stage trains; none, unless experts are adapters."""
        return set()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stages in [self.trunk] + [expert.stages for expert in self.experts]:
            stages.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> tuple[nn.Module, ...] | tuple[str, ...]:
        """The classifiers of all experts, or their names."""
        if name_only:
            return tuple(f"experts.{i}.fc" for i in range(self.num_experts))
        return tuple(expert.fc for expert in self.experts)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give every expert a new classifier.

        A router is replaced as well, because gates read the logits.
        """
        if self.routed and num_classes <= 0:
            raise ValueError("A routed model needs its classifiers: num_classes must be above 0.")
        for expert in self.experts:
            expert.reset_classifier(num_classes, global_pool)
        self.num_classes = num_classes
        self._set_feature_sizes()
        update_model_args(self, class_affine=False)
        if self.router is not None:
            remake = self.router.resized
            self.router = None
            update_model_args(self, router=False)
            if num_classes > 0:
                self.add_router(remake(self.experts[0].head_hidden_size, num_classes).train(self.training))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps per level: the trunk's, then the experts' concatenated.

        They are concatenated on the channel axis. For the arguments see timm.
        """
        assert output_fmt in ("NCHW",), "Output shape must be NCHW."
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        x, levels = self.trunk.forward_levels(x)
        if len(levels) < len(self.feature_info) and not (stop_early and max_index < len(levels)):
            size = levels[-1].shape[-2:] if levels else None
            by_expert = [expert.stages.forward_levels(x, norm, size) for expert in self.experts]
            levels += [torch.cat(maps, 1) for maps in zip(*(maps for _, maps in by_expert), strict=True)]
            x = torch.cat([output for output, _ in by_expert], self.channel_axis)
        intermediates = [levels[i] for i in take_indices]
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the given feature levels do not need; return the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        in_trunk, pruned = len(self.trunk.feature_info), max_index + 1 < len(self.feature_info)
        if max_index < in_trunk:
            self.trunk.prune(max_index + 1)
            width = self.trunk.feature_info[-1]["num_chs"]
            self.experts = Experts([Expert(Stages({}, []), width, 0, False, "")])  # the trunk's feature map
            self.num_experts = 1
        else:
            for expert in self.experts:
                expert.prune(max_index + 1 - in_trunk, prune_norm, prune_head)
        if prune_head or pruned:
            self.router, self.routed, self.num_classes = None, False, 0
        self._set_feature_sizes()
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> concatenated feature maps [B, E·D, h, w].

        For a backbone with output_fmt NHWC or NLC: [B, h, w, E·D] or tokens [B, N, E·D].
        """
        x = self.trunk(x)
        maps = []
        for expert in self.experts:  # TorchScript has no comprehension over modules
            maps.append(expert.forward_features(x))
        return torch.cat(maps, self.channel_axis)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature maps [B, E·D, h, w] -> mean logits [B, C].

        With pre_logits, or without classes, pooled features [B, E·D].
        """
        maps = x.chunk(self.num_experts, dim=self.channel_axis)
        outputs = []
        for i, expert in enumerate(self.experts):
            outputs.append(expert.forward_pre_logits(maps[i]) if pre_logits else expert.forward_head(maps[i]))
        if pre_logits or self.num_classes <= 0:
            return torch.cat(outputs, self.channel_axis)
        return torch.stack(outputs, 1).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> ensemble logits [B, C].

        With routed=True these are routed logits in eval mode.
        """
        if self.routed and not self.training:
            if torch.jit.is_scripting():
                raise RuntimeError("TorchScript cannot route: create the network with routed=False, or export it.")
            else:  # TorchScript skips this branch
                return self.forward_routed(x)[0]
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_experts(self, x: Tensor, use_experts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Images -> (pooled features [B, E, D], logits [B, E, C]).

        use_experts: indices of the experts to run, from 0, all by default.
        """
        return self.experts(self.trunk(x), use_experts)

    @torch.jit.ignore
    def forward_routed(self, x: Tensor, threshold: float = 0.5, masked_below: int = 0) -> tuple[Tensor, Tensor]:
        """Images -> (logits [B, C], num_experts_used [B]).

        An expert runs only on the samples sent to it.
        A sample continues to the next expert while sigmoid(gate) > threshold; its logits are the mean over the experts
        it used. Each gate waits once for the device. A batch of fewer than `masked_below` images runs all experts and
        masks instead, with the same results to rounding and without waiting: on a GPU, a small batch takes about as
        long through all experts. Below, A samples are active: those still computing. arXiv:2010.01809, section 3.3.
        """
        if self.router is None:
            raise RuntimeError("This model has no router: train one (stage two), or create it with router=True.")
        if len(x) < masked_below:
            return self._forward_masked(x, self.router, threshold)
        x = self.trunk(x)  # feature map of A samples, at first A = B
        active = torch.arange(len(x), device=x.device)  # [A] rows in the batch
        num_used = torch.ones_like(active)  # [B]
        total, output = None, None
        for i, expert in enumerate(self.experts):
            features, logits = expert(x)  # [A, D], [A, C]
            total = logits if total is None else total + logits
            mean = total / (i + 1)
            output = mean if output is None else output.index_copy(0, active, mean)  # [B, C]
            if i + 1 == self.num_experts:
                break
            more = (self.router.gate(i, features, mean).sigmoid() > threshold).nonzero().squeeze(1)  # rows of [A]
            if len(more) == 0:
                break
            if len(more) < len(x):  # not index_select, which loses channels-last
                x, total, active = x[more], total[more], active[more]
            num_used.index_fill_(0, active, i + 2)
        return output, num_used

    def _forward_masked(self, x: Tensor, router: Router, threshold: float) -> tuple[Tensor, Tensor]:
        """`forward_routed` by running all experts, without waiting for the device."""
        features, logits = self.forward_experts(x)
        means = logits.cumsum(1) / torch.arange(1, self.num_experts + 1, device=x.device)[:, None]  # [B, E, C]
        gates = [router.gate(i, features[:, i], means[:, i]) for i in range(self.num_experts - 1)]
        more = torch.stack(gates, 1).sigmoid() > threshold  # [B, E-1]
        num_used = 1 + more.long().cumprod(1).sum(1)
        last = (num_used - 1)[:, None, None].expand(-1, 1, means.shape[2])
        return means.gather(1, last).squeeze(1), num_used
