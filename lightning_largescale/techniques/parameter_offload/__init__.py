"""Offload of the parameters and gradients of blocks."""
