"""Fused BatchNorm, shortcut and ReLU for training on CPUs."""
