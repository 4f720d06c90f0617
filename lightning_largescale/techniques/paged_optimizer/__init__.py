"""Optimizer state offloaded in pages, stepped on by the device or by the host."""
