"""Search for images by text."""
