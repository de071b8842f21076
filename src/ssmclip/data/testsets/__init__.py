"""Data sets to evaluate on, a card each."""
