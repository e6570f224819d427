"""Adapted linears beside megatron-core's, attention and elementwise operations."""
