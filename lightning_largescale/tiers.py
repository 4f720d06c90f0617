"""How bytes move between the tiers: the sizes that what moves them and what plans for it have in common.

A step on optimizer state that is elsewhere runs page by page; while one page is stepped on, the next are read and the
last are written, each in a buffer of its own. Blocks whose parameters are elsewhere are fetched one or more ahead.

Source: Rajbhandari et al. 2021, "ZeRO-Infinity", section 5.2 (the infinity offload engine).
"""

from __future__ import annotations

# Bytes of one page: of optimizer state, and of the parameters and gradients that are elsewhere too.
PAGE_BYTES = 32 * 2**20
# Pages in memory at once: one that is stepped on, others on their way in and out.
PAGE_BUFFERS = 6
# Bytes of one request to a disk, and how many are under way at once.
REQUEST_BYTES, REQUESTS = 4 * 2**20, 8
# What O_DIRECT wants addresses, offsets and lengths to be multiples of.
ALIGNMENT_BYTES = 4096


def aligned(size: int) -> int:
    """`size` bytes rounded up to what O_DIRECT takes."""
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def page_buffer_bytes(moved_bytes: int) -> int:
    """Bytes of the buffers through which `moved_bytes` are paged in one step."""
    return min(PAGE_BUFFERS * PAGE_BYTES, aligned(moved_bytes))
