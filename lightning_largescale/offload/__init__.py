"""Offload of optimizer state, parameters, gradients and activations to DRAM or a disk until they are needed."""
