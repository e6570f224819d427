"""Llama on megatron-core with adapters, and its conversion to and from Hugging Face."""
