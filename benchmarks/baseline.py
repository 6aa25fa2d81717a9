"""Baseline: a plain re-implementation of the authors' training loop.

As in theirs, training is in fp32 and the default memory layout, forward pass and loss loop over the experts, logits are
stacked and averaged, class vectors are normalised in every forward pass, two worker processes augment PIL images one at
a time, and loss and accuracies are read as Python numbers after every step. Logging and TensorBoard image grids are
omitted, in its favour. Nothing is imported from ride_timm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T


class NormedLinear(nn.Module):
    """Cosine head without its scale; weight [D, C]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.empty(in_features, out_features).uniform_(-1, 1), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1).mm(F.normalize(self.weight, dim=0))


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def pad_shortcut(in_channels: int, out_channels: int) -> Lambda:
    """Option A of ResNet: subsample by 2 and zero-pad the channels. arXiv:1512.03385"""
    padding = (out_channels - in_channels) // 2
    return Lambda(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, padding, padding), "constant", 0))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, as in the CIFAR ResNets."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        same = stride == 1 and in_channels == planes
        self.shortcut = nn.Sequential() if same else pad_shortcut(in_channels, planes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class Bottleneck(nn.Module):
    """ResNeXt block: 1x1, grouped 3x3 and 1x1 convolutions, in-place ReLU."""

    expansion = 4
    groups, base_width = 32, 4

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        width = int(planes * (self.base_width / 64)) * self.groups
        out_channels = planes * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=self.groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def make_layer(block: type, in_channels: int, planes: int, num_blocks: int, stride: int) -> nn.Sequential:
    blocks = [block(in_channels, planes, stride)]
    blocks += [block(planes * block.expansion, planes) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


class PlainResNet32(nn.Module):
    """CIFAR ResNet-32 with reduced experts that share stem and layer1.

    images -> (mean logits [B, C], logits [B, E, C])
    """

    s = 30.0

    def __init__(self, num_classes: int = 100, num_experts: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = make_layer(BasicBlock, 16, 16, 5, 1)
        self.layer2s = nn.ModuleList([make_layer(BasicBlock, 16, 24, 5, 2) for _ in range(num_experts)])
        self.layer3s = nn.ModuleList([make_layer(BasicBlock, 24, 48, 5, 2) for _ in range(num_experts)])
        self.linears = nn.ModuleList([NormedLinear(48, num_classes) for _ in range(num_experts)])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layer1(F.relu(self.bn1(self.conv1(x))))
        outputs = []
        for layer2, layer3, linear in zip(self.layer2s, self.layer3s, self.linears, strict=True):
            own = layer3(layer2(x))
            own = F.avg_pool2d(own, own.shape[3])
            outputs.append(linear(own.view(own.shape[0], -1)) * self.s)
        logits = torch.stack(outputs, dim=1)
        return logits.mean(dim=1), logits


class PlainResNeXt50(nn.Module):
    """ResNeXt-50 32x4d with reduced experts that share stem to layer2.

    images [B, 3, 224, 224] -> (mean logits [B, C], logits [B, E, C])
    """

    s = 30.0

    def __init__(self, num_classes: int = 1000, num_experts: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = make_layer(Bottleneck, 64, 64, 3, 1)
        self.layer2 = make_layer(Bottleneck, 256, 128, 4, 2)
        self.layer3s = nn.ModuleList([make_layer(Bottleneck, 512, 192, 6, 2) for _ in range(num_experts)])
        self.layer4s = nn.ModuleList([make_layer(Bottleneck, 768, 384, 3, 2) for _ in range(num_experts)])
        self.linears = nn.ModuleList([NormedLinear(1536, num_classes) for _ in range(num_experts)])
        self.avgpool = nn.AdaptiveAvgPool2d(1)  # theirs takes 7x7 feature maps only
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        outputs = []
        for layer3, layer4, linear in zip(self.layer3s, self.layer4s, self.linears, strict=True):
            own = self.avgpool(layer4(layer3(x)))
            outputs.append(linear(own.view(own.shape[0], -1)) * self.s)
        logits = torch.stack(outputs, dim=1)
        return logits.mean(dim=1), logits


NETWORKS = {"ride_resnet32": PlainResNet32, "ride_resnext50": PlainResNeXt50}


class PlainRideLoss(nn.Module):
    """LDAM-DRW plus the diversity term, in a loop over the experts.

    `set_epoch` counts from 1, as the authors' does.
    """

    def __init__(
        self,
        class_counts: Sequence[int],
        diversity_factor: float = -0.45,
        reweight_epoch: int = 160,
        reweight_factor: float = 0.05,
        max_m: float = 0.5,
        s: float = 30.0,
    ) -> None:
        super().__init__()
        counts = np.array(class_counts, dtype=np.float64)
        margins = counts**-0.25
        self.register_buffer("margins", torch.tensor(margins * (max_m / margins.max()), dtype=torch.float32))
        weights = (1 - 0.9999) / (1 - 0.9999**counts)
        weights = weights / weights.sum() * len(counts)
        self.register_buffer("late_weights", torch.tensor(weights, dtype=torch.float32))
        spread = len(counts) * counts / counts.sum() * reweight_factor + 1 - reweight_factor
        self.register_buffer("late_temperature", torch.tensor(spread / spread.max(), dtype=torch.float32))
        self.diversity_factor, self.reweight_epoch, self.s = diversity_factor, reweight_epoch, s
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        self.late = epoch > self.reweight_epoch

    def forward(self, mean_logits: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """mean_logits [B, C], logits [B, E, C], targets [B] -> scalar"""
        loss = 0
        weights = self.late_weights if self.late else None
        temperature = self.late_temperature if self.late else torch.ones(1)
        average = temperature.mean()
        for one in logits.transpose(0, 1):
            chosen = torch.zeros_like(one, dtype=torch.bool).scatter_(1, targets[:, None], True)
            shifted = one - self.s * self.margins[targets][:, None]
            loss += F.cross_entropy(torch.where(chosen, shifted, one), targets, weight=weights)
            own = F.log_softmax(one / temperature, dim=1)
            mean = F.softmax(mean_logits / temperature, dim=1).detach()
            loss += self.diversity_factor * average * average * F.kl_div(own, mean, reduction="batchmean")
        return loss


class PlainImages(Dataset):
    """Array images, converted to PIL and augmented one at a time."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self.pixels, self.labels = pixels, labels.tolist()
        self.transform = T.Compose(
            [
                T.RandomCrop(32, padding=4),
                T.RandomHorizontalFlip(),
                T.RandomRotation(15),
                T.ToTensor(),
                T.Normalize(mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010]),
            ]
        )

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def plain_loader(pixels: np.ndarray, labels: np.ndarray, batch_size: int, num_workers: int = 2) -> DataLoader:
    """uint8 [N, 32, 32, 3] and labels [N] -> shuffled batches."""
    return DataLoader(PlainImages(pixels, labels), batch_size=batch_size, shuffle=True, num_workers=num_workers)


def top_k(logits: Tensor, targets: Tensor, k: int) -> float:
    """Fraction of samples whose class is among the k largest logits."""
    with torch.no_grad():
        chosen = torch.topk(logits, k, dim=1)[1]
        return (chosen == targets[:, None]).any(1).sum().item() / len(targets)


class PlainTraining:
    """SGD loop; `train_epoch` returns the mean loss, top-1 and top-5 accuracy."""

    def __init__(self, name: str, class_counts: Sequence[int], num_experts: int = 3, lr: float = 0.02) -> None:
        self.model = NETWORKS[name](len(class_counts), num_experts)
        self.loss = PlainRideLoss(class_counts)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def train_epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float, float]:
        self.model.train()
        sums, steps = [0.0, 0.0, 0.0], 0
        for images, targets in batches:
            self.optimizer.zero_grad()
            mean_logits, logits = self.model(images)
            loss = self.loss(mean_logits, logits, targets)
            loss.backward()
            self.optimizer.step()
            metrics = loss.item(), top_k(mean_logits, targets, 1), top_k(mean_logits, targets, 5)
            sums = [total + value for total, value in zip(sums, metrics, strict=True)]
            steps += 1
        return tuple(total / steps for total in sums)
