"""Data: image-text pairs to train on (`pairs`), sets to evaluate on (`testsets`), generated ones (`synthetic`)."""
