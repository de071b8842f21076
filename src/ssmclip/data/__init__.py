"""What goes in: pairs to train on (`pairs`), sets to evaluate on (`sources`), generated ones (`synthetic`)."""
