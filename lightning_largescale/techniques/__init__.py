"""The techniques of a plan: one folder each."""
