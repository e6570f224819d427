"""What a run will take, counted from the shapes: operations, and what devices can do in a second."""
