"""Model families, one file each: which configs it accepts, how its tensors are called. No megatron."""
