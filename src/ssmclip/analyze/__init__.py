"""Model x data -> rows: what a model costs, and what its loss looks like around it."""
