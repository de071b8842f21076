"""ssmclip report: rows files -> a page, and the results table of a README."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "HTML page of tables and figures from rows files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="+", type=Path, help="rows files (JSON lines), written by any command")
    parser.add_argument("--out", type=Path, help="folder for report.html and report_files/ (default: none)")
    parser.add_argument(
        "--readme", type=Path, help="README whose results table, between its markers, is updated (default: none)"
    )
    parser.add_argument(
        "--claims", type=Path, help="Markdown file of what the rows say of the papers' claims (default: none)"
    )


def run(args: argparse.Namespace) -> int:
    from ssmclip.report.claims import write_claims
    from ssmclip.report.page import write_report
    from ssmclip.report.tables import update_readme

    if args.out is None and args.readme is None and args.claims is None:
        raise ValueError("nothing to write: give --out FOLDER, --readme README.md or --claims FILE.md")
    if args.out is not None:
        sys.stdout.write(f"{write_report(args.rows, args.out)}\n")
    if args.readme is not None:
        update_readme(args.readme, args.rows)
        sys.stdout.write(f"{args.readme}\n")
    if args.claims is not None:
        write_claims(args.claims, args.rows)
        sys.stdout.write(f"{args.claims}\n")
    return 0
