"""The model over devices: data parallel copies, FSDP2 sharding, recomputation."""
