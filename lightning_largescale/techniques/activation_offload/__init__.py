"""Offload of the tensors that blocks save for backward."""
