"""Data parallelism over replicas of the full model."""
