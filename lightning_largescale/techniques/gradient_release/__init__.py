"""Gradient release: blocks are updated during backward."""
