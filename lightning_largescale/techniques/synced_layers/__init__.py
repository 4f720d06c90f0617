"""Batch norms whose statistics are of all ranks."""
