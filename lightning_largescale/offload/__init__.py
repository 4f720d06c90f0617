"""The model over the memory hierarchy: what is not needed at the moment is kept in DRAM or on a disk."""
