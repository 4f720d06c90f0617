"""Techniques of a plan: one folder each, with its Plan fields (`fields`), its cost (`price`) and its work (`apply`)."""
