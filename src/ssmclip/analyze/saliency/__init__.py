"""What an image encoder looks at: maps over a picture, and numbers that say how far to trust them."""
