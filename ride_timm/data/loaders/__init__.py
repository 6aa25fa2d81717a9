"""Batches: orders, in memory, by workers, streamed."""
