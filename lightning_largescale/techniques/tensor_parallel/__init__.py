"""Tensor parallelism: matrices of blocks sharded over the ranks of a node."""
