"""Probes of frozen encoders: how much a simple classifier, trained on their features, gets right."""
