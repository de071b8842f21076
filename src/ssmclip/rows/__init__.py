"""What is measured: rows, the files they are kept in, and published numbers to set beside them. Needs no torch."""
