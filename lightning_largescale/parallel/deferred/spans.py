"""Sets of byte positions, as sorted intervals that do not touch."""

from __future__ import annotations

# First byte, and the byte after the last.
Span = tuple[int, int]
Spans = list[Span]


def meets(spans: Spans, span: Span) -> bool:
    """Return whether `span` overlaps `spans`."""
    return any(low < span[1] and span[0] < high for low, high in spans)


def union(spans: Spans, span: Span) -> Spans:
    """Return the union of `spans` and `span`."""
    low, high = span
    if low >= high:
        return spans
    apart = [one for one in spans if one[1] < low or high < one[0]]
    near = [one for one in spans if one[1] >= low and high >= one[0]]
    ends = [low, high, *(end for one in near for end in one)]
    return sorted([*apart, (min(ends), max(ends))])


def without(spans: Spans, span: Span) -> Spans:
    """Return `spans` without the bytes of `span`."""
    low, high = span
    if low >= high:
        return spans
    parts = [part for one in spans for part in ((one[0], min(one[1], low)), (max(one[0], high), one[1]))]
    return [part for part in parts if part[0] < part[1]]
