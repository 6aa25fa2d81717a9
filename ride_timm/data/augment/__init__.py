"""Augmentation: policies, single images, batches of small images, mixing."""
