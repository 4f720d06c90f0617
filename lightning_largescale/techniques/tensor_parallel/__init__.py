"""Tensor parallelism: matrices of blocks sharded over ranks that compute the same samples."""
