"""What goes in: pairs to train on (`pairs`), sets to evaluate on (`sources`), and generated ones that need no file
(`synthetic`)."""
