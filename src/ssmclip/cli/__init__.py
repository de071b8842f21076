"""The command line: each command parses its arguments, makes one call and prints the result.

Only this folder knows argparse, stdout and exit codes.
"""
