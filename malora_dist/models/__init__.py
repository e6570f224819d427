"""megatron-core's model of any family: its configuration, its layers with adapters, its pipeline stages."""
