"""Weights and configurations on disk and on the hub."""
