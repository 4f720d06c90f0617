"""Activation checkpointing: blocks recompute their activations in backward."""
