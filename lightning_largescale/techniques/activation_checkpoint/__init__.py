"""Activation checkpointing: blocks recompute their forward in backward."""
