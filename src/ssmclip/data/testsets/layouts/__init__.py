"""How test sets lie on a disk."""
