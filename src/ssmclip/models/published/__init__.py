"""Published checkpoints of other code bases."""
