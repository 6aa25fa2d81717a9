"""RIDE networks; importing this package registers their entrypoints in timm."""

from .class_affine import ClassAffine, add_class_affine, has_class_affine
from .legacy import load_legacy
from .ride import CosineClassifier, Expert, Ride, Stages
from .ride_any import build_ride_any
from .ride_resnet import build_ride_resnet
from .ride_resnet_cifar import build_ride_resnet_cifar
from .router import Router

__all__ = [
    "ClassAffine",
    "CosineClassifier",
    "Expert",
    "Ride",
    "Router",
    "Stages",
    "add_class_affine",
    "build_ride_any",
    "build_ride_resnet",
    "build_ride_resnet_cifar",
    "has_class_affine",
    "load_legacy",
]
