"""Compilation of every repeated block."""
