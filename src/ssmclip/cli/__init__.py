"""The command line: arguments in, one call, print out. The only place that knows argparse, stdout and exit codes."""
