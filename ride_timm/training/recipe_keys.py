"""The table of recipe keys by group: name, type, default, help text, range."""

from dataclasses import Field, dataclass, field, make_dataclass
from typing import Any

from ..data.datasets import BALANCED, EMBEDDED, LISTED, NAMES_HELP
from ..data.loaders.orders import SAMPLERS
from ..data.longtail import IMB_FACTOR, IMBALANCE_TYPES
from ..keys import key
from ..losses import LOSSES, loss_keys
from ..models.adapters import ADAPTERS
from ..models.release import LARGEST_IMAGE
from .schedules import SCHEDULES

BALANCED_BATCHES = ("crt", "lws")  # methods of `decouple` by what their heads learn from
LEARNT = (*BALANCED_BATCHES, "balanced_softmax")
DECOUPLINGS = ("none", *LEARNT, "tau_norm", "logit_adjustment")


@dataclass(frozen=True, kw_only=True)
class DataKeys:
    """Data set and input pipeline."""

    dataset: str = key(EMBEDDED[0], NAMES_HELP)
    data_dir: str | None = key(None, "read the data set from this folder instead of the Hub")
    dataset_config: str | None = key(None, "configuration of a Hub data set that has several")
    dataset_revision: str | None = key(None, "branch, tag or commit of a Hub data set")
    annotations: str | None = key(
        None,
        f"folder of annotation lists with lines `path label` (default for {', '.join(LISTED)}: data_dir)",
    )
    streaming: bool = key(False, "with annotation lists, stream a Hub data set instead of downloading it")
    shuffle_buffer: int = key(1000, "images in the shuffle buffer of a worker (streaming)", low=1)
    imb_type: str | None = key(
        None,
        f"long-tailed profile (default: exp for {' and '.join(BALANCED)}, none for all others)",
        choices=IMBALANCE_TYPES,
    )
    imb_factor: float = key(
        IMB_FACTOR,
        "images of the rarest class over those of the most frequent; 0.01 is the imbalance factor 100 of papers",
        above=0,
        high=1,
    )
    split_seed: int = key(0, "seed of the long-tailed selection; 0 is the published split", low=0, high=2**32 - 1)
    image_column: str | None = key(None, "column of the images (default: the first image column)")
    label_column: str | None = key(None, "column of the labels (default: fine_label, label or labels)")
    test_split: str | None = key(None, "split to test on (default: test, else validation, else held-out images)")
    use_val: bool = key(False, "select epochs on the data set's validation split, not on held-out training images")
    many_shot: int = key(100, "many-shot classes have more training images than this", low=0)
    few_shot: int = key(20, "few-shot classes have fewer training images than this", low=0)
    augment: str = key(
        "cifar", "augmentation and normalisation: cifar, fashion, imagenet, inat, or backbone: as its weights expect"
    )
    auto_augment: str | None = key(
        None, "AutoAugment and its kind on top: cifar10, trivial, or timm's rand-m9-mstd0.5, original, augmix-m3-w3"
    )
    cutout: int = key(0, "edge in pixels of Cutout's black square (of two views, in the strong one)", low=0)
    input_size: int | None = key(None, "image size in pixels (default: the augmentation's)", low=8, high=LARGEST_IMAGE)
    reduced_decode: bool = key(False, "decode large JPEGs at reduced size: faster, with slightly different pixels")
    holdout: float = key(0.0, "fraction of each training class held out for selection", low=0, high=0.5)


@dataclass(frozen=True, kw_only=True)
class ModelKeys:
    """Network."""

    model: str = key("ride_resnet32", "timm name of the network")
    backbone: str | None = key(None, "timm network to cut (model: ride)")
    split: str | None = key(None, "first stage of the experts (model: ride; default: that of the family)")
    backbone_pretrained: bool = key(False, "start from timm's weights of the backbone (model: ride)")
    backbone_weights: str | None = key(None, "read the backbone's weights from this file instead of the Hub")
    grad_checkpointing: bool = key(False, "recompute activations in the backward pass: less memory, more time")
    adapter: str | None = key(
        None, "experts as low-rank updates (LoRA) of one frozen backbone (model: ride, needs peft)", choices=ADAPTERS
    )
    adapter_rank: int = key(8, "rank of the adapters' updates", low=1)
    num_experts: int = key(3, "number of experts; 1 is a network without a router", low=1)
    reduce_dimension: bool = key(True, "narrow the experts' stages to 3/4 of their width")
    use_norm: bool = key(True, "cosine classifiers")
    layer2_output_dim: int | None = key(None, "channels of layer2 (CIFAR networks)", low=1)
    layer3_output_dim: int | None = key(None, "channels of layer3", low=1)
    layer4_output_dim: int | None = key(None, "channels of layer4 (ImageNet networks)", low=1)
    share_layer2: bool = key(False, "layer2 in the shared trunk, not in each expert (CIFAR networks)")
    share_layer3: bool = key(False, "layer3 in the shared trunk, not in each expert (ImageNet networks)")
    drop_rate: float = key(0.0, "dropout before the classifiers", low=0, high=0.99)
    drop_path_rate: float = key(0.0, "stochastic depth (networks that have it)", low=0, high=0.99)


def _of_losses(item: Field, losses: list[str]) -> Any:
    help = f"{', '.join(losses)}: {item.metadata['help']}"
    return field(default=item.default, metadata={**item.metadata, "help": help})


LossKeys: Any = make_dataclass(
    "LossKeys",
    [
        ("loss", str, key("ride", "training loss", choices=tuple(LOSSES))),
        *((item.name, item.type, _of_losses(item, losses)) for item, losses in loss_keys().values()),
    ],
    frozen=True,
    kw_only=True,
    namespace={"__doc__": "; ".join(f"{name} {entry.summary}" for name, entry in LOSSES.items()) + "."},
)


@dataclass(frozen=True, kw_only=True)
class StageOneKeys:
    """Training of trunk and experts."""

    sampler: str = key(
        "instance",
        "classes of the batches: as the images, uniform, by the square root of their images, or from instance to "
        "class_balanced over the epochs",
        choices=SAMPLERS,
    )
    class_weights: str | None = key(
        None,
        "class weights of the loss: auto (inverse square root of the training images), or a file of lines "
        "`name,weight`, of one weight a line in class order, or JSON",
    )
    mixup_alpha: float = key(0.0, "timm's mixup; 0: off", low=0, high=10)
    cutmix_alpha: float = key(0.0, "timm's CutMix; 0: off; with mixup, one of them at random", low=0, high=10)
    random_erasing: float = key(
        0.0, "timm's random erasing: probability per image; of two views, in the strong one", low=0, high=1
    )
    ema_decay: float | None = key(
        None, "decay of an EMA of the weights, which is evaluated and saved", above=0, high=0.99999
    )
    distillation: bool = key(False, "distil a teacher as well (needs --teacher)")
    distill_temperature: float = key(1.5, "temperature of the distillation", above=0)
    teacher_mode: str = key("eval", "mode of the teacher; the authors' was in train mode", choices=("eval", "train"))
    freeze: str = key(
        "none",
        "pretrained weights that stay as they are: the trunk, or the backbone, which is all but the classifiers",
        choices=("none", "trunk", "backbone"),
    )
    freeze_norm: bool = key(False, "keep the statistics of pretrained BatchNorms, in trunk and experts")
    head_init: str = key(
        "random",
        "classifiers start at random, or from the class means of the pretrained features",
        choices=("random", "class_means"),
    )
    epochs: int | None = key(
        200,
        "epochs; given alone, it scales decay and re-weighting epochs and limits warm-up to a fifth (none: by the "
        "number of images)",
        low=1,
        by_data=True,
    )
    batch_size: int = key(128, "images per step, over all processes", low=1)
    lr: float = key(0.1, "learning rate", above=0)
    layer_decay: float | None = key(
        None, "factor on the learning rate from each layer to the one below, as timm groups them", above=0, high=1
    )
    weight_decay: float = key(5e-4, "weight decay", low=0)
    decay_norm_and_bias: bool = key(True, "weight decay on norms and biases, too, as the authors have it")
    schedule: str = key("step", "learning-rate schedule", choices=SCHEDULES)
    decay_epochs: tuple[int, ...] = key((160, 180), "epochs at which the step schedule decays", low=0, in_epochs=True)
    decay_rate: float = key(0.01, "factor of each decay", above=0, high=1)
    warmup_epochs: int = key(5, "epochs of linear warm-up", low=0)
    lr_per: str = key("epoch", "the learning rate changes each epoch or each step", choices=("epoch", "step"))


@dataclass(frozen=True, kw_only=True)
class DecouplingKeys:
    """Re-balancing of trained heads."""

    decouple: str = key(
        "none",
        "re-balance the heads after stage one, or with --from those of a trained network in its place",
        choices=DECOUPLINGS,
    )
    decouple_tau: float = key(1.0, "strength of tau_norm and logit_adjustment", low=0, high=10)
    decouple_epochs: int = key(10, "epochs of crt, lws and balanced_softmax; the others train nothing", low=1)
    decouple_batch_size: int = key(128, "images per step, over all processes", low=1)
    decouple_lr: float = key(0.1, "learning rate, cosine to 0", above=0)
    decouple_weight_decay: float = key(5e-4, "weight decay", low=0)


@dataclass(frozen=True, kw_only=True)
class RouterKeys:
    """Stage two: training of the router."""

    router_epochs: int = key(5, "epochs", low=1)
    router_batch_size: int = key(512, "images per step, over all processes", low=1)
    router_balanced: bool = key(True, "class-balanced batches, as the authors have them")
    router_lr: float = key(0.01, "learning rate, cosine to 0", above=0)
    router_optimizer: str = key("sgd", "any optimizer of timm")
    router_weight_decay: float = key(5e-4, "weight decay", low=0)
    pos_weight: float = key(100.0, "weight of samples that a further expert would correct", above=0)
    top_choices_num: int = key(5, "number of largest logits that the gates see", low=1)
    share_expert_help_pred_fc: bool = key(True, "share the last layer of all gates")
    threshold: float = key(0.5, "gate probability above which the next expert runs", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class RunKeys:
    """Settings of the run, for both stages."""

    name: str = key("", "name of the recipe in the results (default: that of the file)")
    optimizer: str = key("sgd", "any optimizer of timm; sgd uses Nesterov momentum, momentum does not")
    momentum: float = key(0.9, "momentum of SGD", low=0, high=0.9999)
    seed: int = key(0, "seed of weights, order and augmentation", low=0, high=2**53)
    mixed_precision: str = key("no", "no, bf16 or fp16", choices=("no", "bf16", "fp16"))
    compile: bool = key(False, "torch.compile the training step")
    fused_norm: bool = key(False, "on CPUs: BatchNorm, shortcut and ReLU of ResNets in one pass (compiled: needs g++)")
    sync_bn: bool = key(False, "BatchNorm statistics over the batches of all GPUs")
    ghost_batch: int | None = key(
        None,
        "images per BatchNorm statistics in stage one (default: the batch of a process); 32 are the authors' 256 on 8 "
        "GPUs",
        low=2,
    )
    gradient_accumulation: int = key(1, "batches per optimizer step", low=1)
    clip_grad: float | None = key(None, "largest gradient norm", above=0)
    workers: int = key(
        2, "loader processes, at most one a core, for large images, and on a GPU for AutoAugment of small ones", low=0
    )
    max_unreadable: int | None = key(
        None,
        "read all images before training, and leave out up to this many training images that cannot be read (default: "
        "the first that is met ends the run)",
        low=0,
    )
    eval_every: int = key(10, "epochs between evaluations; the last is always evaluated", low=1)
    select: str = key("last", "epoch to keep; best is judged on the held-out images", choices=("last", "best"))
    patience: int | None = key(None, "stop after this many evaluations without a better held-out accuracy", low=1)


GROUPS: dict[str, Any] = {
    "data": DataKeys,
    "model": ModelKeys,
    "loss": LossKeys,
    "stage one": StageOneKeys,
    "decoupling": DecouplingKeys,
    "router": RouterKeys,
    "run": RunKeys,
}
