"""Checkpoints on disk: converted bases and trained adapters, both megatron dist checkpoints."""
