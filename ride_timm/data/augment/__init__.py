"""Augmentation policies: per image, per batch, mixing."""
