"""What a run reports: console lines, TensorBoard scalars, routing statistics."""
