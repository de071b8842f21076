"""Pictures distorted as published, from arrays to arrays and from files to files."""
