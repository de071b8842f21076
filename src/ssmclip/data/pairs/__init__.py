"""Image-text pairs to train on."""
