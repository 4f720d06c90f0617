"""The C heap of a training process whose device is the CPU."""
