"""RIDE networks; importing this package registers their entrypoints in timm."""

from . import ride_any, ride_resnet, ride_resnet_cifar  # noqa: F401  (register)
from .experts import Expert, Experts, Stages
from .heads import ClassAffine, CosineClassifier
from .legacy import load_legacy
from .ride import Ride
from .router import Router

__all__ = ["ClassAffine", "CosineClassifier", "Expert", "Experts", "Ride", "Router", "Stages", "load_legacy"]
