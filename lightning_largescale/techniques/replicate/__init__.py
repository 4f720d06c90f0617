"""Replication: the full module on every rank, gradients averaged (DDP)."""
