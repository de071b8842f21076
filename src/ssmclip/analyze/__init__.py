"""Model x data -> rows: the cost of a model, and the loss around its weights."""
