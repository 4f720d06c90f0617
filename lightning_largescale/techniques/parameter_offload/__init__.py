"""Offload of the parameters of blocks while the blocks do not compute."""
