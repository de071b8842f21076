"""Figures, each a class that reads rows."""
