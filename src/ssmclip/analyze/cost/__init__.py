"""What a model costs: operations, memory, time."""
