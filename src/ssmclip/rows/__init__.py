"""Measurements: rows, the files that store them, and published numbers to compare with. Needs no torch."""

from ssmclip.rows.result import Result, append_rows, describe_run, read_rows, write_rows

__all__ = ["Result", "append_rows", "describe_run", "read_rows", "write_rows"]
