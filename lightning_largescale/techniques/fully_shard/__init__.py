"""Sharding of parameters, gradients and optimizer state over the data-parallel ranks (FSDP2)."""
