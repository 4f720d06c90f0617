"""Hardware description: detected and measured here, taken from published figures, or read from a file."""

from __future__ import annotations

from lightning_largescale.hardware.hardware import Disk, Hardware, Link, Rates

__all__ = ["Disk", "Hardware", "Link", "Rates"]
