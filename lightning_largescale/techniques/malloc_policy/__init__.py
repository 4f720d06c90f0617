"""Treatment of heap fragmentation on the CPU."""
