"""Images and texts to unit vectors, kept on disk, shared by processes."""
