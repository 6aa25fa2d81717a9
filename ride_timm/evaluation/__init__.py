"""From test logits to metrics, routing curves, MACs, tables and plots."""
