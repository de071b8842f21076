"""What is measured: rows, the files they are kept in, and published numbers to set beside them. Needs no torch."""

from ssmclip.rows.result import Result, append_rows, describe_run, read_rows, write_rows

__all__ = ["Result", "append_rows", "describe_run", "read_rows", "write_rows"]
