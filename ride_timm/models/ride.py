"""RIDE: a shared trunk, experts whose logits are averaged, and an optional router. arXiv:2010.01809"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from timm.models._input import update_model_args
from torch import Tensor, nn

from .fused.blocks import can_go_together, forward_together, fuse_norm_relu
from .router import Router


class CosineClassifier(nn.Module):
    """Linear layer on the unit sphere: scale · <x / |x|, w_c / |w_c|>, the head of LDAM and RIDE (`use_norm`).

    weight [C, D] starts uniform in (-1, 1) with class vectors of unit norm. arXiv:1906.07413, section 3.
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 30.0) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.scale = scale
        self.weight = nn.Parameter(F.normalize(torch.empty(out_features, in_features).uniform_(-1, 1), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"


def create_pool(global_pool: str, num_classes: int) -> SelectAdaptivePool2d:
    """timm's pooling of that name; '' hands the map on, which no classifier reads: ValueError."""
    if not global_pool and num_classes > 0:
        raise ValueError(
            f"global_pool='' with num_classes={num_classes}: pooling can be left out with num_classes=0 only."
        )
    return SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))


def create_head(num_features: int, num_classes: int, use_norm: bool) -> nn.Module:
    """Cosine head (`use_norm`) or linear head with bias; no classes: identity."""
    if num_classes <= 0:
        return nn.Identity()
    return CosineClassifier(num_features, num_classes) if use_norm else nn.Linear(num_features, num_classes)


class Stages(nn.Sequential):
    """Named modules in sequence; `feature_info` says which of them are feature levels.

    feature_info: one dict(num_chs, reduction, module) for each level, `module` being a child's name.
    """

    def __init__(self, modules: dict[str, nn.Module], feature_info: list[dict[str, Any]]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.feature_info = feature_info
        self.grad_checkpointing = False

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return self.forward_levels(x)[0]
        for module in self:
            x = module(x)
        return x

    @torch.jit.ignore
    def forward_levels(
        self, x: Tensor, norm: bool = False, size: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """x [B, C, H, W] -> (its output, the feature maps of all levels in order).

        norm and size are for stages of other kinds: these have no norm at the end, and know the size of their maps.
        """
        tapped = {info["module"] for info in self.feature_info}
        levels = []
        for name, module in self.named_children():
            if self.grad_checkpointing and isinstance(module, nn.Sequential) and len(module):
                x = checkpoint_seq(module, x)
            else:
                x = module(x)
            if name in tapped:
                levels.append(x)
        return x, levels

    def prune(self, num_levels: int) -> None:
        """Keep the modules up to and including the last of the first `num_levels` levels."""
        keep = self.feature_info[num_levels - 1]["module"] if num_levels else None
        names = list(self._modules)
        for name in names[names.index(keep) + 1 if keep else 0 :]:
            del self._modules[name]
        self.feature_info = self.feature_info[:num_levels]


class Expert(nn.Module):
    """The last stages of a network with their own pooling, dropout and classifier.

    forward_features: the trunk's map [B, C, H, W] -> [B, D, h, w]; forward_head: that map -> logits [B, C].
    """

    def __init__(
        self,
        stages: Stages,
        num_features: int,
        num_classes: int,
        use_norm: bool,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.stages = stages
        self.num_features = num_features
        self.use_norm = use_norm
        self.drop_rate = drop_rate
        self.global_pool = create_pool(global_pool, num_classes)
        self.head_hidden_size = num_features * self.global_pool.feat_mult()
        self.fc = create_head(self.head_hidden_size, num_classes, use_norm)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier (and the pooling) on the device, in the dtype and in the mode of the old ones."""
        if global_pool is not None:
            self.global_pool = create_pool(global_pool, num_classes)
            self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.fc = create_head(self.head_hidden_size, num_classes, self.use_norm).to(**get_device_dtype(self))
        self.train(self.training)

    @torch.jit.ignore
    def prune(self, num_levels: int, prune_norm: bool = False, prune_head: bool = True) -> None:
        """Keep the first levels of the stages; where that drops some, classifier and pooling go as well."""
        pruned = num_levels < len(self.stages.feature_info)
        self.stages.prune(num_levels)
        self.num_features = self.stages.feature_info[-1]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(x)

    def forward_pre_logits(self, x: Tensor) -> Tensor:
        """Feature map [B, D, h, w] -> pooled features [B, D] after dropout (a map where the pooling is '')."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_pre_logits(x))

    @torch.jit.ignore
    def forward_both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's map [B, C, H, W] -> (pooled features [B, D], logits [B, C])."""
        return self.forward_both_of(self.forward_features(x))

    @torch.jit.ignore
    def forward_both_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The expert's own map [B, D, h, w] -> (pooled features [B, D], logits [B, C])."""
        features = self.forward_pre_logits(x)
        return features, self.fc(features)


class Ride(nn.Module):
    """Trunk and E experts; the ensemble's logits are the mean of the experts' logits. arXiv:2010.01809, section 3.

    One expert is a list of length one: the plain network. `router` (stage two) asks for the next expert only where
    it would help; `routed=True` makes `forward` use it in eval mode.
    """

    __constants__ = ("routed",)
    __jit_unused_properties__ = ("drop_rate", "global_pool")  # TorchScript knows the pooling under another type name

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
        self.experts = nn.ModuleList(experts)
        self.router = router
        self.routed = routed
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_experts = len(experts)
        self.together = False
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
    def global_pool(self) -> SelectAdaptivePool2d | str:
        return self.experts[0].global_pool

    @torch.jit.ignore
    def add_router(self, router: Router) -> None:
        """Attach a router for stage two, on the device and in the dtype of the model."""
        self.router = router.to(**get_device_dtype(self))
        choices = dict(top_choices_num=router.top_choices_num)
        update_model_args(self, router=True, share_expert_help_pred_fc=router.share_expert_help_pred_fc, **choices)

    @torch.jit.ignore
    def fuse_training(self) -> int:
        """Train faster on a CPU: see `fused_blocks`. In place; the number of blocks that changed, 0 without ResNet's.

        Parameters, buffers and their names stay, and so does what eval mode computes.
        """
        num_blocks = fuse_norm_relu(self)
        self.together = can_go_together(self.experts)
        return num_blocks

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
        """Give every expert a new classifier; a router is re-made for the new logits (it read the old ones)."""
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
        """Feature maps by level: the trunk's, then the experts' concatenated on the channel axis (timm's contract)."""
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
        """Drop what the given feature levels do not need (timm's contract); returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        in_trunk, pruned = len(self.trunk.feature_info), max_index + 1 < len(self.feature_info)
        if max_index < in_trunk:
            self.trunk.prune(max_index + 1)
            width = self.trunk.feature_info[-1]["num_chs"]
            self.experts = nn.ModuleList([Expert(Stages({}, []), width, 0, False, "")])  # passes the trunk's map on
            self.num_experts = 1
        else:
            for expert in self.experts:
                expert.prune(max_index + 1 - in_trunk, prune_norm, prune_head)
        if prune_head or pruned:
            self.router, self.routed, self.num_classes = None, False, 0
        self._set_feature_sizes()
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> the experts' maps, concatenated on the channel axis: [B, E·D, h, w].

        Where a backbone's maps are [B, h, w, D] or tokens [B, N, D] (`output_fmt` NHWC, NLC) that axis is the last.
        """
        x = self.trunk(x)
        maps = []
        for expert in self.experts:
            maps.append(expert.forward_features(x))
        return torch.cat(maps, self.channel_axis)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Maps [B, E·D, h, w] -> mean logits [B, C]; pre_logits (or no classes): pooled features [B, E·D]."""
        maps = x.chunk(self.num_experts, dim=self.channel_axis)
        outputs = []
        for i, expert in enumerate(self.experts):
            outputs.append(expert.forward_pre_logits(maps[i]) if pre_logits else expert.forward_head(maps[i]))
        if pre_logits or self.num_classes <= 0:
            return torch.cat(outputs, self.channel_axis)
        return torch.stack(outputs, 1).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] -> ensemble logits [B, C] (routed ones in eval mode if built with routed=True)."""
        if self.routed and not self.training:
            if torch.jit.is_scripting():
                raise RuntimeError("TorchScript cannot route: create the network with routed=False, or export it.")
            else:  # which TorchScript leaves out
                return self.forward_routed(x)[0]
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_experts(self, x: Tensor, use_experts: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Images -> (pooled features [B, E, D], logits [B, E, C]); `use_experts` picks a subset of the experts."""
        x = self.trunk(x)
        chosen = self.experts if use_experts is None else [self.experts[i] for i in use_experts]
        in_step = self.together and self.training and len(set(chosen)) == len(chosen)
        if in_step and not self.trunk.grad_checkpointing:
            both = forward_together(chosen, x)
        else:
            both = [expert.forward_both(x) for expert in chosen]
        return torch.stack([features for features, _ in both], 1), torch.stack([logits for _, logits in both], 1)

    @torch.jit.ignore
    def forward_routed(self, x: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
        """Images -> (logits [B, C], num_experts_used [B]): an expert runs only on the samples sent to it.

        A sample goes on to the next expert while sigmoid(gate) > threshold; its output is the mean of the experts
        it used. arXiv:2010.01809, section 3.3.
        """
        if self.router is None:
            raise RuntimeError("This model has no router: train one (stage two), or create it with router=True.")
        x = self.trunk(x)
        used = torch.ones(x.shape[0], dtype=torch.long, device=x.device)
        active = None  # rows of the samples that went on; None: all of them, and nothing needs copying
        total, output = None, None
        for i, expert in enumerate(self.experts):
            features, logits = expert.forward_both(x)
            total = logits if total is None else total + logits
            mean = total / (i + 1) if i else total
            output = mean if active is None else output.index_copy(0, active, mean)
            if i + 1 == self.num_experts:
                break
            go_on = (self.router.gate(i, features, mean).sigmoid() > threshold).nonzero().squeeze(1)
            if len(go_on) == 0:
                break
            if len(go_on) < len(x):
                x, total = x[go_on], total[go_on]  # indexing keeps channels last, index_select does not
                active = go_on if active is None else active[go_on]
            used[slice(None) if active is None else active] = i + 2
        return output, used
