"""The cost of a model: operations, memory, time."""
