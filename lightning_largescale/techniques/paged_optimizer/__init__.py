"""Optimizer steps page by page, on state that is offloaded."""
