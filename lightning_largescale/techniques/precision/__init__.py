"""Arithmetic of a plan: data types of matrix products and weights."""
