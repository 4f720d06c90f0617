"""Embedding tables whose rows are sharded over all ranks."""
