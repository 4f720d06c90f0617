"""Sharding of parameters, gradients and optimizer state over ranks (FSDP2)."""
